#!/usr/bin/env bash
# Runs one job on all hosts of one or more TPU slices on GKE, with XPK (https://github.com/AI-Hypercomputer/xpk).
#
#   XPK_CLUSTER=my-cluster XPK_IMAGE=us-docker.pkg.dev/PROJECT/REPOSITORY/cfd XPK_TPU_TYPE=v5litepod-16 \
#     launch/xpk.sh CONFIG WORKDIR [FLAG ...]
#
# Run it in the checkout. XPK_IMAGE holds Python and the dependencies of this checkout, and XPK adds the checkout:
#   docker build -f launch/Dockerfile -t "$XPK_IMAGE" . && docker push "$XPK_IMAGE"
#
# WORKDIR and data.path can be in a bucket (gs://BUCKET/PATH), which needs no storage of XPK, or on a storage that all
# hosts mount, of the type gcpfilestore or lustre: XPK_FLAGS="--storage=NAME". The type gcsfuse is no place for WORKDIR,
# because it has no locks between hosts and, on most buckets, renames no folders. Give the gs:// path itself instead.
#
# After a fault, the processes start again inside their pods. A pod that is evicted saves and exits with 75, and GKE
# then starts the job again. After three faults without a new checkpoint, or one error of a flag or a field of the
# config, the job exits with 1, which is final. A host whose pod starts late, for example while it pulls the image, is
# waited for. Optional variables:
#   XPK_FLAGS                   more flags of `xpk workload create`, such as --num-slices=2 --spot
#   XPK_WORKLOAD                the name of the workload (cfd- and the name of CONFIG, as a DNS label)
#   XPK_GRACE_SECONDS           the time that an evicted pod has to save (600); a spot machine leaves about 25 s of it
#   CFD_INITIALIZATION_TIMEOUT  the seconds for which a pod waits for the others (1800), which is a fault thereafter
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p;}' "$0"; exit 2; }
: "${XPK_CLUSTER:?}" "${XPK_IMAGE:?}" "${XPK_TPU_TYPE:?}"
config=$1 workdir=$2 file=${1%%:*}
say() { echo "xpk.sh: $*" >&2; }
if ! command -v xpk >/dev/null; then
  say "there is no xpk on the PATH: install it from https://github.com/AI-Hypercomputer/xpk"
  exit 1
elif ! [ -f launch/supervise.py ] || ! [ -d cfd ]; then
  say "$PWD is no checkout, which XPK would add to the image: run this script in the checkout, as launch/xpk.sh"
  exit 2
elif [[ $file = *.py ]] && { [[ $file = /* ]] || ! [ -f "$file" ]; }; then
  say "the config $file would not be in the pods: give a file of the checkout by its path from here, such as" \
    "configs/digits.py"
  exit 2
fi

# XPK allows 40 characters, and 28 for some clusters.
name=$(basename "$config" .py | tr '[:upper:]' '[:lower:]' | tr -cs 'a-z0-9\n' -)
name=$(echo "cfd-${name#-}" | cut -c 1-28)
name=${XPK_WORKLOAD:-${name%-}}

printf -v arguments ' %q' --config="$config" --workdir="$workdir" "${@:3}"
# exec: XPK sends SIGTERM to the command itself.
printf -v command 'exec env CFD_COORDINATOR=auto CFD_INITIALIZATION_TIMEOUT=%q' "${CFD_INITIALIZATION_TIMEOUT:-1800}"
command+=" python3 launch/supervise.py -- python3 -m cfd.main$arguments"
# shellcheck disable=SC2086  # several flags
exec xpk workload create --cluster="$XPK_CLUSTER" --workload="$name" --tpu-type="$XPK_TPU_TYPE" \
  --base-docker-image="$XPK_IMAGE" --script-dir=. --command="$command" \
  --termination-grace-period-seconds="${XPK_GRACE_SECONDS:-600}" \
  --max-restarts=1000 --restart-on-exit-codes=75 ${XPK_FLAGS:-}
