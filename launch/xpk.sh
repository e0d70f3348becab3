#!/usr/bin/env bash
# Runs one job on all hosts of one or more TPU slices on GKE, with XPK (https://github.com/AI-Hypercomputer/xpk).
#
#   XPK_CLUSTER=my-cluster XPK_IMAGE=gcr.io/PROJECT/cfd:latest XPK_TPU_TYPE=v5litepod-16 \
#     launch/xpk.sh CONFIG WORKDIR [FLAG ...]
#
# Run it in the checkout. XPK_IMAGE holds Python, and the dependencies that `pip install '.[tpu,tfds]'` in the checkout
# installs; XPK adds the checkout itself.
# XPK_FLAGS holds more flags of `xpk workload create`, such as --num-slices=2 --storage=NAME. WORKDIR and data.path must
# be on a storage that all hosts mount. After a fault, the processes start again inside their pods. A pod that is
# evicted saves and exits with 75, and GKE then starts the job again. After three faults without a new checkpoint, the
# job exits with 1.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2; }
: "${XPK_CLUSTER:?}" "${XPK_IMAGE:?}" "${XPK_TPU_TYPE:?}"
config=$1 workdir=$2
name=${XPK_WORKLOAD:-cfd-$(basename "$config" .py)}

printf -v arguments ' %q' --config="$config" --workdir="$workdir" "${@:3}"
# exec: XPK sends SIGTERM to the command itself.
command="exec env CFD_COORDINATOR=auto python3 launch/supervise.py -- python3 -m cfd.main$arguments"
# shellcheck disable=SC2086  # several flags
exec xpk workload create --cluster="$XPK_CLUSTER" --workload="$name" --tpu-type="$XPK_TPU_TYPE" \
  --base-docker-image="$XPK_IMAGE" --script-dir=. --command="$command" \
  --max-restarts=1000 --restart-on-exit-codes=75 ${XPK_FLAGS:-}
