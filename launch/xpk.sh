#!/usr/bin/env bash
# All hosts of one or more TPU slices on GKE as one job, by XPK (https://github.com/AI-Hypercomputer/xpk).
#
#   XPK_CLUSTER=my-cluster XPK_IMAGE=gcr.io/PROJECT/cfd:latest XPK_TPU_TYPE=v5litepod-16 \
#     launch/xpk.sh CONFIG WORKDIR [FLAG ...]
#
# XPK_IMAGE holds Python and `pip install cfd[tpu]`'s dependencies; XPK puts the checkout, from which this is run, on top.
# XPK_FLAGS is added to `xpk workload create`, such as --num-slices=2 --storage=NAME: WORKDIR, and data.path, lie on a
# storage that all hosts mount. A fault starts the processes again inside of their pods; a pod that is evicted saves and
# ends with code 75, on which GKE starts the job again; after three faults without a new checkpoint it ends with 1.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; }
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
