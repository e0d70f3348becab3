#!/usr/bin/env bash
# Runs one job on all hosts of a Cloud TPU slice, from any machine with gcloud, and restarts it until it has finished.
# It creates the slice if it does not exist, and again if it was preempted.
#
#   TPU_NAME=my-slice TPU_ZONE=us-east5-b TPU_TYPE=v5litepod-16 TPU_VERSION=v2-alpha-tpuv5-lite \
#     launch/tpu_pod.sh CONFIG WORKDIR [FLAG ...]
#
# Run it in the checkout. It copies the checkout to the hosts, with uncommitted changes and new files. TPU_CREATE_FLAGS
# holds more flags for the creation of the slice, such as --spot.
# WORKDIR and data.path must be on a disk that all hosts mount at the same place, such as Filestore. TPU_SETUP is a
# command that runs on every host before each start, and can mount the disk.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2; }
: "${TPU_NAME:?}" "${TPU_ZONE:?}" "${TPU_TYPE:?}" "${TPU_VERSION:?}"
config=$1 workdir=$2

if [ -z "${CFD_ATTEMPT:-}" ]; then
  CFD_ATTEMPT=1 exec python3 "$(dirname "$0")/supervise.py" --pause-seconds=30 -- bash "$0" "$@"
fi

tpu() { gcloud compute tpus tpu-vm "$1" "${@:2}" --zone="$TPU_ZONE"; }
everywhere() { tpu ssh "$TPU_NAME" --worker=all --command="$1"; }

# ssh does not forward the signal. Therefore this asks the remote run to stop, and waits for it.
stop() {
  everywhere "pkill -TERM -f 'cfd[.]main' || true; while pgrep -f 'cfd[.]main' >/dev/null; do sleep 2; done"
  exit 75
}
trap stop TERM INT HUP

state=$(tpu describe "$TPU_NAME" --format='value(state)' 2>/dev/null || true)
if [ "$state" = PREEMPTED ] || [ "$state" = TERMINATED ]; then
  tpu delete "$TPU_NAME" --quiet
  state=""
fi
if [ -z "$state" ]; then
  # shellcheck disable=SC2086  # several flags
  tpu create "$TPU_NAME" --accelerator-type="$TPU_TYPE" --version="$TPU_VERSION" ${TPU_CREATE_FLAGS:-}
fi

archive=$(mktemp --suffix=.tar.gz)
git ls-files -z --cached --others --exclude-standard | tar --null --files-from=- -czf "$archive"
tpu scp "$archive" "$TPU_NAME:cfd.tar.gz" --worker=all
rm -f "$archive"
everywhere "pkill -KILL -f 'cfd[.]main' || true
  mkdir -p cfd && tar -xzf cfd.tar.gz -C cfd && cd cfd &&
  { [ -d .venv ] || python3 -m venv .venv; } && .venv/bin/pip install -q -e '.[tpu,tfds]'"
[ -z "${TPU_SETUP:-}" ] || everywhere "$TPU_SETUP"

printf -v arguments ' %q' --config="$config" --workdir="$workdir" "${@:3}"
everywhere "cd cfd && CFD_SUPERVISED=1 CFD_COORDINATOR=auto exec .venv/bin/python -m cfd.main$arguments" &
wait $!
