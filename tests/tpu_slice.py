"""A slice of TPUs for launch/tpu_pod.sh: a stub of gcloud, whose hosts are folders of this machine."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tiny import ROOT

SCRIPT = ROOT / "launch" / "tpu_pod.sh"

GCLOUD = r"""#!/usr/bin/env bash
printf '%s\n' "gcloud $*" >> "$SLICE/calls"
for word in "$@"; do
  case $word in
    --worker=*) worker=${word#--worker=} ;;
    --command=*) command=${word#--command=} ;;
    *.tar.gz) archive=$word ;;
  esac
done
case "$4" in
  describe)
    state=$(head -n 1 "$SLICE/states")
    [ "$(wc -l < "$SLICE/states")" -le 1 ] || sed -i 1d "$SLICE/states"
    case $state in
      NONE) echo "ERROR: NOT_FOUND: Resource 'queuedResources/slice' was not found" >&2; exit 1 ;;
      ERROR*) echo "$state" >&2; exit 1 ;;
      *) printf '%s\n' "$state" ;;
    esac ;;
  create) [ ! -f "$SLICE/refusal" ] || { cat "$SLICE/refusal" >&2; rm "$SLICE/refusal"; exit 1; } ;;
  scp) for host in "$SLICE"/host*; do cp "$5" "$host/cfd.tar.gz"; done ;;
  ssh)
    [ ! -f "$SLICE/unreachable" ] || exit 255
    code=0 jobs=()
    hostname() { basename "$HOME"; }
    export -f hostname
    for host in "$SLICE"/host${worker/all/*}; do
      (cd "$host" && HOME=$host exec bash -c "$command") & jobs+=($!)
    done
    for job in "${jobs[@]}"; do wait "$job" || code=$?; done
    exit "$code" ;;
esac
"""

UV = r"""#!/usr/bin/env bash
printf '%s\n' "uv $*" >> "$SLICE/calls"
if [ "$1" = venv ]; then
  mkdir -p .venv/bin
  printf '#!/usr/bin/env bash\nexec %q "$SLICE/job.py" "$@"\n' "$PYTHON" > .venv/bin/python
  chmod +x .venv/bin/python
elif [ -f "$SLICE/no-packages" ]; then
  echo "no packages" >&2
  exit 1
fi
"""

SLEEP = r"""#!/usr/bin/env bash
echo "$1" >> "$SLICE/pauses"
exec /bin/sleep 0.05
"""

JOB = """
import json, os, pathlib, signal, sys, time
host, folder = pathlib.Path.home(), pathlib.Path(os.environ["SLICE"])
(host / "seen").write_text(json.dumps({"arguments": sys.argv[1:], "environment": dict(os.environ)}))
with open(host / "starts", "a") as starts:
    print(os.getpid(), file=starts)
def save(*_):
    print("Saved.", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("Training.", flush=True)
while not (folder / "code").exists():
    time.sleep(0.05)
print("Over.", flush=True)
sys.exit(int((folder / "code").read_text()))
"""


def soon(condition: Callable[[], bool]) -> bool:
    """Whether the condition comes true within a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def end(host: Path) -> None:
    """All processes of the job on a host end at once, as on a machine that is lost."""
    command = [sys.executable, ROOT / "launch" / "detached.py", "end", host / "cfd-run", "--grace-seconds=0"]
    subprocess.run(command, check=True)


class Slice:
    """The folder of a slice of two hosts, and the environment of the script."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.scripts: list[subprocess.Popen[str]] = []
        for name, text in {"gcloud": GCLOUD, "uv": UV, "sleep": SLEEP}.items():
            path = folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        (folder / "bin" / "python3").symlink_to(Path(sys.executable).resolve())  # a version manager's own is slow
        (folder / "job.py").write_text(JOB)
        self.checkout = folder / "checkout"
        shutil.copytree(ROOT / "launch", self.checkout / "launch")
        (self.checkout / "configs").mkdir()
        (self.checkout / "configs" / "a.py").touch()
        subprocess.run(["git", "init", "-q", str(self.checkout)], check=True)
        for number in range(2):
            (folder / f"host{number}").mkdir()
        self.env = os.environ | {
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "SLICE": str(folder),
            "PYTHON": sys.executable,
            **{"TPU_NAME": "slice", "TPU_ZONE": "zone", "TPU_TYPE": "v5litepod-16", "TPU_VERSION": "version"},
            "TPU_PAUSE_SECONDS": "1",
        }
        self.states("ACTIVE")

    def states(self, *states: str) -> None:
        """The answers to the next questions for the state of the queued resource. The last one stays."""
        (self.folder / "states").write_text("".join(f"{state}\n" for state in states))

    def start(self, *flags: str, config: str = "configs/a.py", **env: str) -> subprocess.Popen[str]:
        command = ["--stop"] if flags == ("--stop",) else [config, "gs://b/run", *flags]
        process = subprocess.Popen(
            ["bash", str(SCRIPT), *command],
            cwd=self.checkout,
            env=self.env | env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.scripts.append(process)
        return process

    def run(self, *flags: str, **env: str) -> tuple[int, str]:
        process = self.start(*flags, **env)
        said, _ = process.communicate(timeout=120)
        return process.returncode, said

    def finish(self, code: int) -> None:
        """Lets the job end with a code. Faults are seen three times before the supervisor gives up."""
        (self.folder / "new").write_text(str(code))
        (self.folder / "new").rename(self.folder / "code")

    def calls(self, *words: str) -> list[str]:
        """The calls that have all the words."""
        lines = (self.folder / "calls").read_text().splitlines()
        return [line for line in lines if all(word in line for word in words)]

    def starts(self) -> list[int]:
        """How often the job was started on each host."""
        paths = [self.folder / f"host{number}" / "starts" for number in range(2)]
        return [len(path.read_text().splitlines()) if path.exists() else 0 for path in paths]

    def started(self, *counts: int) -> bool:
        """Whether the job was started this often on each host, of which one may be slower than the script."""
        return soon(lambda: self.starts() == list(counts))

    def pauses(self) -> list[int]:
        path = self.folder / "pauses"
        return [int(line) for line in path.read_text().split() if line.isdecimal()] if path.exists() else []

    def clean_up(self) -> None:
        for script in self.scripts:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(script.pid, signal.SIGKILL)
            script.communicate()
        for number in range(2):
            end(self.folder / f"host{number}")


def until(process: subprocess.Popen[str], text: str) -> str:
    """The output until a line has the text."""
    assert process.stdout
    said = ""
    for line in process.stdout:
        said += line
        if text in line:
            return said
    raise AssertionError(said)
