"""`python launch/supervise.py [--processes=N] -- COMMAND ...`: runs a training command until it has finished.

The command starts again after it was stopped by a preemption (it prints this, and exits with 0) and after it failed,
unless it failed three times without a new checkpoint in between. The command is `python -m cfd.main ...`, or a program
that runs this on other machines. The supervisor reads only its standard output, and passes it on.

With N processes, the command runs N times on this machine, as the processes of one job. If one of them fails, the
others have `--grace-seconds` to notice before they are killed. SIGTERM or SIGINT makes the job save and stop, and it
does not start again.

Exit codes: 0 finished, 1 gave up, 75 stopped on request (EX_TEMPFAIL: the same command resumes).

This file needs Python 3.9 and nothing else.
"""

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from types import FrameType

MAX_FAULTS = 3
STOPPED = re.compile(r"; the same command resumes\.")
PROGRESS = re.compile(
    r"(?:Resuming .* at|Saving) (step \d+ of \d+)|(\d+ of \d+ [a-z]+ are in .*) already|^(T \d+  w \S+)"
)
"""Lines that report progress: a checkpoint that was found or is saved, or cells of a sweep, found or just measured."""


class Job:
    """The processes of one start. `place` is the progress that they last reported, `stopped` whether they stopped."""

    def __init__(self, command: list, environments: list):
        self.stopped = False
        self.place = "no checkpoint yet"
        self.processes = [
            # The command gets its own process group. Therefore a signal to this program's group reaches it only once,
            # through `send`.
            subprocess.Popen(
                command,
                env={**os.environ, **environment},
                stdout=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            for environment in environments
        ]
        self.readers = [threading.Thread(target=self._read, args=(p.stdout,)) for p in self.processes]
        for reader in self.readers:
            reader.start()

    def _read(self, output) -> None:
        for line in output:
            self.stopped |= bool(STOPPED.search(line))
            if progress := PROGRESS.search(line):
                self.place = progress[progress.lastindex or 0]
            sys.stdout.write(line)
            sys.stdout.flush()

    def send(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, number)

    def wait(self, grace_seconds: float) -> int:
        """The exit code of the first process that failed, or 0."""
        code, deadline = 0, float("inf")
        while any(process.poll() is None for process in self.processes):
            failed = [process.returncode for process in self.processes if process.returncode]
            if failed and not code:
                code, deadline = failed[0], time.monotonic() + grace_seconds
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
            time.sleep(0.05)
        for reader in self.readers:
            reader.join()
        return code or next((process.returncode for process in self.processes if process.returncode), 0)


def environments(count: int) -> list:
    """The environment variables that tell each of `count` processes on this machine about the others."""
    if count == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = {"CFD_COORDINATOR": address, "CFD_NUM_PROCESSES": str(count)}
    return [{**shared, "CFD_PROCESS_ID": str(number)} for number in range(count)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1, help="processes on this machine (1)")
    parser.add_argument("--grace-seconds", type=float, default=120, help="time for the others when one fails (120)")
    parser.add_argument("--pause-seconds", type=float, default=5, help="time before the next start (5)")
    parser.add_argument(
        "--stop-signal", choices=("TERM", "USR1"), help="signal to send to the command (default: the received one)"
    )
    parser.add_argument("command", nargs="+", help="after --")
    arguments = parser.parse_args()
    if arguments.processes < 1:
        parser.error(f"--processes is {arguments.processes}: give 1 or more")
    for name in ("grace_seconds", "pause_seconds"):
        if not getattr(arguments, name) >= 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(arguments, name)}: give 0 or more")

    job = None
    asked: list = []

    def ask(number: int, frame: "FrameType | None") -> None:
        asked.append(signal.Signals["SIG" + arguments.stop_signal] if arguments.stop_signal else number)
        if job is not None:
            job.send(asked[-1])

    signal.signal(signal.SIGTERM, ask)
    signal.signal(signal.SIGINT, ask)

    faults, before = 0, None
    while not asked:
        try:
            job = Job(arguments.command, environments(arguments.processes))
        except OSError as error:
            say(f"{arguments.command[0]} cannot be started: {error.strerror}")
            return 1
        if asked:  # the signal came before there was a job to send it to
            job.send(asked[-1])
        code = job.wait(arguments.grace_seconds)
        if code == 0 and not job.stopped:
            return 0
        if asked:
            break
        if code == 0:
            say("stopped by a preemption; it starts again")
            faults = 0
        else:
            faults = faults + 1 if job.place == before else 1
            if faults == MAX_FAULTS:
                say(f"failed {MAX_FAULTS} times at the same place ({job.place}), the last with exit code {code}")
                say("gave up: fix the cause of the last error, then start again")
                return 1
            say(f"failed with exit code {code} ({job.place}); it starts again")
        before = job.place
        time.sleep(arguments.pause_seconds)
    say("stopped on request")
    return 75


def say(text: str) -> None:
    print(f"supervise: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
