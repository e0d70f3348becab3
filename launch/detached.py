"""`python launch/detached.py start FOLDER -- COMMAND ...`: a command that outlives the connection that started it.

  start FOLDER -- COMMAND ...   starts the command in a session of its own, unless it already runs
  state FOLDER -- COMMAND ...   prints "cfd: running", "cfd: other: ..." if another command runs, "cfd: idle" if none
                                does, or "cfd: lost" if the last one ended without an exit code
  follow FOLDER                 prints the end of the output, and what follows, until the command ends
  stop FOLDER                   sends the command SIGTERM
  end FOLDER                    does so, waits for its end, and kills what is left after --grace-seconds

The output of the command goes to FOLDER/log. launch/tpu_pod.sh calls this file on the hosts of a slice.

Exit codes: 1 if another command runs; of `follow`, 0 if the command exited with 0, 75 if it was stopped on request, 76
if it failed, and 77 if it ended without an exit code, as it does when its machine is restarted. They differ from the
codes of ssh and gcloud, which are 1 and 255.

This file needs Linux, Python 3.9 and nothing else.
"""

import argparse
import contextlib
import fcntl
import json
import os
import select
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

STOPPED, FAILED, LOST = 75, 76, 77
MARK = "CFD_DETACHED"
"""The environment variable that all processes of the command inherit. Its value is the folder."""
SHOWN = 100
"""Lines of earlier output that `follow` prints."""


def running(folder: Path) -> bool:
    """Whether the command runs: it inherits a lock, which the kernel drops when the last process has ended."""
    try:
        with open(folder / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def start(folder: Path, command: list) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a") as lock:
        deadline = time.monotonic() + 1
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # by the command, or for a moment by another call of `running`
                if time.monotonic() > deadline:
                    return 0 if state(folder, command) == "running" else 1
                time.sleep(0.1)
        kill(folder)  # processes whose supervisor was killed would still use the accelerators
        for name in ("pid", "code"):
            with contextlib.suppress(FileNotFoundError):
                (folder / name).unlink()
        (folder / "command").write_text(json.dumps(command))
        with open(folder / "log", "wb") as log:
            subprocess.Popen(
                [sys.executable, __file__, "run", str(folder), "--", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, MARK: str(folder), "CFD_LOCK": str(lock.fileno())},
                pass_fds=[lock.fileno()],
                start_new_session=True,
            )
    return 0


def run(folder: Path, command: list) -> int:
    """Runs the command for `start`, in the background, and writes its exit code to FOLDER/code."""
    lock = int(os.environ.pop("CFD_LOCK"))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # inherited by the command, as under nohup
    for number in (signal.SIGTERM, signal.SIGINT):  # not inherited: a machine that shuts down sends them to all
        signal.signal(number, lambda *_: None)
    try:
        process = subprocess.Popen(command, pass_fds=[lock])
    except OSError as error:
        print(f"{command[0]} cannot be started: {error.strerror}", flush=True)
        code = 127
    else:
        replace(folder / "pid", str(process.pid))
        code = process.wait()
    replace(folder / "code", str(code))
    return 0


def replace(path: Path, text: str) -> None:
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)


def state(folder: Path, command: list) -> str:
    if not running(folder):
        return "lost" if (folder / "command").exists() and not (folder / "code").exists() else "idle"
    live = json.loads((folder / "command").read_text())
    return "running" if live == command else "other: " + " ".join(shlex.quote(word) for word in live)


def follow(folder: Path) -> int:
    if not (folder / "log").exists():
        print("There is no job.")
        return LOST
    reader = select.poll()
    reader.register(sys.stdout, 0)  # reports an error when the reader of the output is gone
    with open(folder / "log", "rb") as log:
        log.seek(sum(len(line) for line in log.readlines()[:-SHOWN]))
        while True:
            last = not running(folder)  # looked at before the last read, which is then complete
            sys.stdout.buffer.write(log.read())
            sys.stdout.flush()
            if last:
                break
            if reader.poll(0):
                return LOST
            time.sleep(0.5)
    try:
        code = int((folder / "code").read_text())
    except FileNotFoundError:
        print("The run ended without an exit code: the machine was restarted, or a process was killed.", flush=True)
        return LOST
    return code if code in (0, STOPPED) else FAILED


def stop(folder: Path) -> int:
    while running(folder):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # not started yet, or just ended
            os.kill(int((folder / "pid").read_text()), signal.SIGTERM)
            break
        time.sleep(0.1)
    return 0


def end(folder: Path, grace_seconds: float) -> int:
    stop(folder)
    deadline = time.monotonic() + grace_seconds
    while running(folder) and time.monotonic() < deadline:
        time.sleep(0.5)
    kill(folder)
    return 0


def kill(folder: Path) -> None:
    """Kills all processes that have inherited MARK from the command."""
    mark = f"{MARK}={folder}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            if mark in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("start", "run", "state", "follow", "stop", "end"))
    parser.add_argument("folder", type=lambda path: Path(path).resolve())
    parser.add_argument("--grace-seconds", type=float, default=150, help="of `end` (150)")
    parser.add_argument("command", nargs="*", help="after --")
    arguments = parser.parse_args()
    folder, command = arguments.folder, arguments.command
    if arguments.action == "start":
        return start(folder, command)
    if arguments.action == "run":
        return run(folder, command)
    if arguments.action == "state":
        sys.stdout.write(f"cfd: {state(folder, command)}\n")  # at once: the lines of all hosts meet in one output
        return 0
    if arguments.action == "follow":
        return follow(folder)
    return stop(folder) if arguments.action == "stop" else end(folder, arguments.grace_seconds)


if __name__ == "__main__":
    sys.exit(main())
