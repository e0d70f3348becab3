#!/usr/bin/env bash
# Runs one process per GPU on the nodes of a SLURM job, and restarts them until the run has finished, also after the
# time limit of the job.
#
#   sbatch --nodes=2 launch/slurm.sh CONFIG WORKDIR [FLAG ...]
#
# Submit it from the checkout. The numbers below are for nodes with 8 GPUs; options of sbatch, given before the script,
# override them. WORKDIR must be on a file system that all nodes share, or in a bucket (gs://BUCKET/PATH). Optional
# variables: PYTHON is the interpreter (python3); SRUN_FLAGS holds options of srun, such as the container of the tasks:
# SRUN_FLAGS="--container-image=IMAGE --mpi=none".
#SBATCH --job-name=cfd
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2; }
config=$1 workdir=$2
python=${PYTHON:-python3}
if ! [ -f launch/supervise.py ]; then
  echo "slurm.sh: $PWD is no checkout: submit the job from the checkout, as launch/slurm.sh" >&2
  exit 2
fi

# Each task must see all GPUs of its node, because JAX gives it the GPU that has the task's number: no --gpus-per-task.
# The signal that asks the run to stop is USR1, which srun forwards to its tasks. At TERM, srun kills its tasks. A task
# that has saved exits with 75, which must not kill the others. They end by themselves if a task fails.
# shellcheck disable=SC2086  # several flags
"$python" launch/supervise.py --stop-signal=USR1 -- \
  srun --kill-on-bad-exit=0 --wait=300 ${SRUN_FLAGS:-} \
  "$python" -m cfd.main --config="$config" --workdir="$workdir" "${@:3}" &
supervisor=$!

# 300 s before the time limit, the run saves and stops, and the job goes back to the queue.
trap 'kill -TERM "$supervisor"' TERM
code=0
wait "$supervisor" || code=$?
while kill -0 "$supervisor" 2>/dev/null; do # a signal ends `wait` although the supervisor still runs
  code=0
  wait "$supervisor" || code=$?
done
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
