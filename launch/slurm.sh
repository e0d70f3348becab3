#!/usr/bin/env bash
# One process a GPU on the nodes of a SLURM job, restarted until it has finished, also beyond the job's time limit.
#
#   sbatch --nodes=2 launch/slurm.sh CONFIG WORKDIR [FLAG ...]
#
# Submit it from the checkout. The numbers below are for nodes of 8 GPUs; sbatch's own options go before the script and
# override them. WORKDIR lies on a file system that all nodes share. PYTHON is the interpreter, python3 unless it is set.
#SBATCH --job-name=cfd
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2; }
config=$1 workdir=$2
python=${PYTHON:-python3}

# JAX gives each task the GPU of its own number among those it sees, so that all must be seen: no --gpus-per-task.
# The signal that asks the run to stop is USR1, which srun passes on: at a TERM it kills its tasks.
"$python" launch/supervise.py --stop-signal=USR1 -- \
  srun --kill-on-bad-exit=1 --wait=300 \
  "$python" -m cfd.main --config="$config" --workdir="$workdir" "${@:3}" &
supervisor=$!

# 300 s before the time limit the run stops, saved, and the job goes back to the queue.
trap 'kill -TERM "$supervisor"' TERM
code=0
wait "$supervisor" || code=$?
while kill -0 "$supervisor" 2>/dev/null; do # a signal ends `wait` before the supervisor ends
  code=0
  wait "$supervisor" || code=$?
done
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
