#!/usr/bin/env bash
# Runs N processes on this machine as one job, and restarts the job until it has finished.
#
#   launch/local.sh CONFIG WORKDIR [N [FLAG ...]]      launch/local.sh configs/digits.py runs/digits 2
#
# On CPUs, JAX_NUM_CPU_DEVICES sets the number of devices of each process. A single process already uses all GPUs or TPU
# chips of a machine: take N = 1 there. PYTHON is the interpreter (default: python3).
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2; }
config=$1 workdir=$2 processes=${3:-2}
here=$(dirname "$0")
python=${PYTHON:-python3}
if ! [[ $processes =~ ^[0-9]+$ ]]; then
  echo "local.sh: N is '$processes': give the number of processes as the third word, and flags after it" >&2
  exit 2
fi
if ! "$python" -c 'import sys; from importlib.util import find_spec as f; sys.exit(not (f("cfd") and f("jax")))'; then
  echo "local.sh: $python has no cfd or no JAX: activate the environment of the package, or set PYTHON" >&2
  exit 1
fi

exec "$python" "$here/supervise.py" --processes="$processes" -- \
  "$python" -m cfd.main --config="$config" --workdir="$workdir" "${@:4}"
