#!/usr/bin/env bash
# Runs one job on all hosts of one or more Cloud TPU slices, from any machine with gcloud, until it has finished.
#
#   TPU_NAME=my-slice TPU_ZONE=us-east5-b TPU_TYPE=v5litepod-16 TPU_VERSION=v2-alpha-tpuv5-lite \
#     launch/tpu_pod.sh CONFIG WORKDIR [FLAG ...]
#   TPU_NAME=my-slice TPU_ZONE=us-east5-b launch/tpu_pod.sh --stop
#
# Run it in the checkout. It asks for the slice with a queued resource named TPU_NAME, waits for capacity, copies the
# checkout to the hosts, with uncommitted changes and new files, and starts the job there.
#
# The job does not need this script: it goes on when the script is killed or its machine sleeps. Started again, the
# script finds the job and follows its output. Ctrl-C (SIGINT, or SIGTERM) stops the job, which saves; so does --stop.
# A closed terminal (SIGHUP) or a second Ctrl-C ends the script alone.
#
# After a fault, the processes start again on their hosts, with or without this script, until three faults at the same
# place, or one error of a flag or a field of the config. Only the script replaces a slice that was preempted, and starts
# the job again after a host was restarted. While it does not run, such a job waits or gives up. It loses no saved step,
# and goes on when the script is started again.
#
# WORKDIR and data.path can be in a bucket (gs://BUCKET/PATH), or on a disk that all hosts mount at the same place, such
# as Filestore. The hosts get a Python of their own, with uv, because their image has Python 3.10. Optional variables:
#   TPU_CREATE_FLAGS   more flags of `gcloud compute tpus queued-resources create`, such as --spot
#   TPU_SLICES         the number of slices (1)
#   TPU_ENV            the environment of the job, quoted as in a shell: TPU_ENV='A=1 LIBTPU_INIT_ARGS="--b=2 --c=3"'
#   TPU_SETUP          a command to run on every host before each start, for example to mount a disk
#   TPU_PYTHON         the version of Python on the hosts (3.13)
#   TPU_PAUSE_SECONDS  the first pause while there is no capacity (30); pauses double up to 20 times this
set -euo pipefail
usage() { sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p;}' "$0"; exit 2; }
[ $# -ge 2 ] || [ "$*" = --stop ] || usage
: "${TPU_NAME:?}" "${TPU_ZONE:?}"
first_pause=${TPU_PAUSE_SECONDS:-30}
there=cfd/launch/detached.py
child="" asked="" told=""

say() { echo "tpu_pod: $*" >&2; }

if ! command -v gcloud >/dev/null; then
  say "there is no gcloud on the PATH: install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install)"
  exit 1
fi
export CLOUDSDK_CORE_DISABLE_PROMPTS=1 # this script reads what gcloud says, so that nobody would see a question
work=$(mktemp -d)

queued() { gcloud compute tpus queued-resources "$1" "$2" "${@:3}" --zone="$TPU_ZONE"; }

# Some versions of gcloud take `--batch-size=all` for 64, and wait for the first 64 hosts before they call the others.
# Therefore no command for all hosts may wait for another host. A dead connection ends within two minutes.
on() {
  queued ssh "$TPU_NAME" --node="$1" --worker="$1" --batch-size=all --ssh-flag=-oConnectTimeout=15 \
    --ssh-flag=-oServerAliveInterval=30 --command="$2"
}

# Kills a process and its descendants: gcloud does not end its ssh.
kill_tree() {
  local process children
  children=$(pgrep -P "$1") || true
  kill "$1" 2>/dev/null || true
  for process in $children; do kill_tree "$process"; done
}

leave() {
  [ -z "$child" ] || kill_tree "$child"
  rm -rf "$work"
}
trap leave EXIT
trap '[ -z "$asked" ] || { say "the job may still be saving"; exit 75; }; asked=1' INT TERM
trap 'say "the job goes on; the same command follows it again"; exit 129' HUP

# Bash handles signals between commands, and during `wait` at once. Therefore what takes long runs in the background.
rest() {
  [ -n "$asked" ] || { sleep "$pause" >/dev/null 2>&1 & child=$!; wait "$child" || kill "$child" || true; }
  child=""
  if [ -n "$asked" ]; then
    say "ends on request; a job that runs on $TPU_NAME goes on, unless --stop stops it; to give the slice back:" \
      "gcloud compute tpus queued-resources delete $TPU_NAME --zone=$TPU_ZONE --force"
    exit 75
  fi
  pause=$((pause * 2 < first_pause * 20 ? pause * 2 : first_pause * 20))
}

# Prints the output of host 0 until the job ends, and returns the exit code of detached.py, or another one if the host
# cannot be reached. A request to stop is passed on to all hosts.
follow() {
  local before code
  on 0 "if [ -f $there ]; then python3 $there follow cfd-run; else echo 'There is no job.'; exit 77; fi" &
  child=$!
  while true; do
    if [ -n "$asked" ] && [ -z "$told" ]; then
      told=1
      say "the job saves and stops; a second Ctrl-C ends only this script"
      on all "[ ! -f $there ] || python3 $there stop cfd-run" || say "not all hosts were reached"
    fi
    before=$asked code=0
    wait "$child" || code=$?
    [ "$asked" != "$before" ] || break
  done
  child=""
  return "$code"
}

if [ "$1" = --stop ]; then
  asked=1 code=0
  follow || code=$?
  [ "$code" -ne 75 ] && [ "$code" -ne 77 ] || exit 0
  exit "$code"
fi

: "${TPU_TYPE:?}" "${TPU_VERSION:?}"
config=$1 workdir=$2 pause=$first_pause
if ! [[ $first_pause =~ ^[1-9][0-9]*$ ]]; then
  say "TPU_PAUSE_SECONDS is '$first_pause': give whole seconds, 1 or more"
  exit 2
fi
if ! [ -f launch/detached.py ] || ! git rev-parse --git-dir >/dev/null; then
  say "$PWD is no checkout: run this script in the checkout, as launch/tpu_pod.sh"
  exit 2
fi
file=${config%%:*}
if [[ $file = *.py ]] && { [[ $file = /* ]] ||
  [ -z "$(git ls-files --cached --others --exclude-standard -- ":(literal)$file")" ] || ! [ -f "$file" ]; }; then
  say "the config $file would not be on the hosts: give a file of the checkout that git does not ignore, by its path" \
    "from here, such as configs/digits.py"
  exit 2
fi

# The command of every host, in which each word is quoted for the shell there. Nothing in TPU_ENV is expanded.
environment=$(python3 - <<'PYTHON'
import os, re, shlex, sys
try:
    words = shlex.split(os.environ.get("TPU_ENV", ""))
except ValueError as error:
    sys.exit(f"tpu_pod: TPU_ENV cannot be read ({error}): quote its values as in a shell, such as A=1 B='2 3'")
for word in words:
    if not re.match(r"[A-Za-z_][A-Za-z0-9_]*=", word):
        sys.exit(f"tpu_pod: TPU_ENV has the word {word!r}: give NAME=VALUE, with quotes around a value with spaces")
print(" ".join(map(shlex.quote, words)))
PYTHON
)
printf -v arguments ' %q' --config="$config" --workdir="$workdir" "${@:3}"
job="exec env CFD_COORDINATOR=auto $environment python3 launch/supervise.py -- .venv/bin/python -m cfd.main$arguments"

# Runs gcloud with its output in $work/out. Errors that waiting does not mend are final.
gcloud_says() {
  local code=0 final='PERMISSION_DENIED|INVALID_ARGUMENT|NOT_FOUND|UNAUTHENTICATED|required property|active account'
  final+='|Failed to find attribute|Reauthentication|invalid_grant'
  "$@" >"$work/out" 2>"$work/error" || code=$?
  [ "$code" -ne 0 ] || return 0
  [ "$2" = create ] || ! grep -q NOT_FOUND "$work/error" || return "$code"
  cat "$work/error" >&2
  if grep -q ALREADY_EXISTS "$work/error"; then
    say "there is a TPU VM of this name without a queued resource: delete it with gcloud compute tpus tpu-vm delete" \
      "$TPU_NAME --zone=$TPU_ZONE, or give another TPU_NAME"
    exit 1
  elif [ "$code" -eq 2 ] || grep -qE "$final" "$work/error"; then
    say "gcloud refuses this, and waiting does not help"
    exit 1
  elif grep -qi 'quota' "$work/error"; then
    say "the quota of the project is used up: end another slice or ask for more quota; this waits for either"
  fi
  return "$code"
}

# Sets `state` to the state of the queued resource, or to "" if there is none. A FAILED one has a reason.
look() {
  state="" reason=""
  if gcloud_says queued describe "$TPU_NAME" --format='value(state.state, state.failedData.error.message)'; then
    IFS=$'\t' read -r state reason <"$work/out" || true
  elif [ -s "$work/error" ] && ! grep -q NOT_FOUND "$work/error"; then
    state="in a state that is not known now"
  fi
}

ask_for_slice() {
  local nodes=(--node-id="$TPU_NAME")
  [ "${TPU_SLICES:-1}" = 1 ] || nodes=(--node-count="$TPU_SLICES" --node-prefix="$TPU_NAME")
  # shellcheck disable=SC2086  # several flags
  gcloud_says queued create "$TPU_NAME" "${nodes[@]}" --accelerator-type="$TPU_TYPE" \
    --runtime-version="$TPU_VERSION" ${TPU_CREATE_FLAGS:-}
}

# Waits until the slice is there. What has failed or was preempted is asked for again.
wait_for_slice() {
  while true; do
    look
    [ "$state" != ACTIVE ] || return 0
    if [ "$state" = FAILED ] || [ "$state" = SUSPENDED ]; then
      say "$TPU_NAME is $state${reason:+ ($reason)}: it is deleted and asked for again"
      gcloud_says queued delete "$TPU_NAME" --force --quiet || true
      look
    fi
    if [ -z "$state" ]; then
      faults=0
      if ask_for_slice; then state="asked for"; else state="not to be had"; fi
    fi
    say "$TPU_NAME is $state; the next look is in $pause s"
    rest
  done
}

# Copies the checkout and installs it. `curl | sh` is the installation of uv that needs no Python.
install() {
  local file
  git ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do [ ! -e "$file" ] || printf '%s\0' "$file"; done |
    tar --null --files-from=- -czf "$work/cfd.tar.gz" || return
  queued scp "$work/cfd.tar.gz" "$TPU_NAME:cfd.tar.gz" --node=all --worker=all --batch-size=all || return
  on all "mkdir -p cfd && tar -xzf cfd.tar.gz -C cfd" || return
  [ -z "${TPU_SETUP:-}" ] || on all "$TPU_SETUP" || return
  on all "set -eo pipefail; cd cfd; PATH=\$HOME/.local/bin:\$PATH
    command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh ||
      { echo \"\$(hostname) cannot install uv: let it reach astral.sh, or install uv in TPU_SETUP\" >&2; exit 1; }
    [ -x .venv/bin/python ] || uv venv -q --python ${TPU_PYTHON:-3.13} .venv
    uv pip install -q -e '.[tpu,tfds,gcs]'"
}

# Starts the job on all hosts, unless it runs there already. Returns 1 if it could not be started, 2 if the hosts could
# not be reached, and 3 if this script was asked to stop before.
begin() {
  local command states running hosts
  printf -v command 'bash -c %q' "$job"
  states=$(on all "if [ -f $there ]; then python3 $there state cfd-run -- $command; else echo 'cfd: idle'; fi") ||
    return 2
  if grep -q '^cfd: other' <<<"$states"; then
    grep '^cfd: other' <<<"$states" | head -n 1 >&2
    say "another job runs on $TPU_NAME: stop it with launch/tpu_pod.sh --stop, or give another TPU_NAME"
    exit 1
  fi
  running=$(grep -c '^cfd: running' <<<"$states") hosts=$(grep -c '^cfd: ' <<<"$states")
  if [ "$running" -gt 0 ] && [ "$running" -eq "$hosts" ]; then
    say "the job runs already; this follows it"
    return 0
  fi
  if [ "$running" -gt 0 ]; then
    say "the job runs on $running of $hosts hosts only: it starts again on all"
    on all "[ ! -f $there ] || python3 $there end cfd-run" || return 2
  fi
  [ -z "$asked" ] || return 3
  install || return 1
  [ -z "$asked" ] || return 3
  on all "cd cfd && python3 launch/detached.py start ../cfd-run -- $command" || return 1
  say "the job has started; Ctrl-C stops it and lets it save; it goes on if this script or its machine ends"
}

faults=0
while true; do
  wait_for_slice
  code=0
  begin || code=$?
  if [ "$code" -eq 0 ]; then
    pause=$first_pause start=$SECONDS
    follow || code=$?
    [ $((SECONDS - start)) -lt 3600 ] || faults=0
    case $code in
      0) say "the job has finished; the slice is still there"; exit 0 ;;
      75) say "the job was stopped and has saved; the same command resumes it; the slice is still there"; exit 75 ;;
      76) say "the job gave up; the last lines of all hosts:"
        on all "sed \"s/^/\$(hostname): /\" cfd-run/log | tail -n 20" >&2 || true
        # The other hosts waited in vain for one that was restarted: the job starts again on all.
        states=$(on all "python3 $there state cfd-run") || true
        grep -q '^cfd: lost' <<<"$states" || exit 1
        say "a host has lost its processes: it was restarted, or they were killed"
        faults=$((faults + 1)) ;;
      77) faults=$((faults + 1)) ;;
      *) say "the output cannot be followed now; the job does not need it" ;;
    esac
  elif [ "$code" -eq 1 ]; then
    faults=$((faults + 1))
  fi
  [ "$faults" -lt 3 ] || { say "the job could not be started three times: fix the cause of the last error"; exit 1; }
  rest
done
