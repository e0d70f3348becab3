"""`python launch/supervise.py [--processes=N] -- COMMAND ...`: runs a training command until it has finished.

The command is `python -m cfd.main ...`, or a program that runs this on other machines and exits with the same code: 0
finished, 75 stopped by a preemption, anything else a fault. It starts again after the last two, but not after three
faults at the same place. Lines `cfd-progress: PLACE` in its standard output tell the place. A line `cfd-final:` says
that a flag or a field of the config is wrong, or that a new run does not find its data or the run to begin from: such a
fault is final, because the next start would end alike. The command prints both because CFD_SUPERVISED is set; other
lines are passed on.

If this program is killed (SIGKILL), the command runs on. Its output is lost, and it still holds the lock of the run,
which names its process: end it with SIGTERM, or wait for its end, before the next start.

With N processes, the command runs N times on this machine, as the processes of one job. If one of them fails, the
others have `--grace-seconds` to notice before they are killed. A signal, or the end of the terminal, makes the job save
and stop, and it does not start again.

Exit codes: 0 finished, 1 gave up, 75 stopped on request (EX_TEMPFAIL: the same command resumes).

This file needs Python 3.9 and nothing else.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time

STOPPED = 75
MAX_FAULTS = 3
PROGRESS = "cfd-progress: "
FINAL = "cfd-final:"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


class Job:
    """The processes of one start. `place` is the last progress that they reported.

    `is_final` is whether one of them reported that every start ends alike.
    """

    def __init__(self, command: list, environments: list):
        self.place, self.is_final = "no checkpoint yet", False
        self.processes = [
            # In a session of its own, the command gets a signal to this program's group only once, through `send`.
            subprocess.Popen(
                command,
                env={**os.environ, "CFD_SUPERVISED": "1", **environment},
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
            text, mark, place = line.partition(PROGRESS)
            if mark:
                self.place = place.strip()
            text, mark, _ = text.partition(FINAL)
            self.is_final |= bool(mark)
            write(sys.stdout, text)

    def send(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, number)

    def wait(self, grace_seconds: float) -> int:
        """The exit code of the first process that failed, or 75 if one was stopped, or 0."""
        failed, deadline = 0, float("inf")
        while True:
            codes = [process.poll() for process in self.processes]
            failed = failed or next((code for code in codes if code not in (None, 0, STOPPED)), 0)
            if None not in codes:
                break
            if failed:
                deadline = min(deadline, time.monotonic() + grace_seconds)
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
            time.sleep(0.05)
        for reader in self.readers:
            reader.join()
        return failed or max(codes)


def environments(count: int) -> list:
    """The environment variables that tell each of `count` processes on this machine about the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = {"CFD_COORDINATOR": address, "CFD_NUM_PROCESSES": str(count)}
    return [{**shared, "CFD_PROCESS_ID": str(number)} for number in range(count)] if count > 1 else [{}]


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
    for name, low in (("processes", 1), ("grace_seconds", 0), ("pause_seconds", 0)):
        if not getattr(arguments, name) >= low:
            parser.error(f"--{name.replace('_', '-')} is {getattr(arguments, name)}: give {low} or more")

    job = None
    asked: list = []

    def ask(number, frame) -> None:
        asked.append(signal.Signals["SIG" + arguments.stop_signal] if arguments.stop_signal else number)
        if job is not None:
            job.send(asked[-1])

    for number in SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # ignored under nohup
            signal.signal(number, ask)

    faults, before, code = 0, None, STOPPED
    while not asked:
        try:
            job = Job(arguments.command, environments(arguments.processes))
        except OSError as error:
            say(f"{arguments.command[0]} cannot be started: {error.strerror}")
            return 1
        if asked:  # the signal came before there was a job to send it to
            job.send(asked[-1])
        code = job.wait(arguments.grace_seconds)
        if code == 0:
            return 0
        if asked:
            break
        if job.is_final:
            say(f"failed with exit code {code}: the command is wrong; correct it as its error says, then start again")
            return 1
        faults = 0 if code == STOPPED else faults + 1 if job.place == before else 1
        what = "stopped by a preemption" if code == STOPPED else f"failed with exit code {code} ({job.place})"
        if faults == MAX_FAULTS:
            say(f"{what}, {faults} times at the same place: gave up; fix the cause of the last error, then start again")
            return 1
        say(f"{what}; it starts again")
        before = job.place
        start = time.monotonic() + arguments.pause_seconds
        while time.monotonic() < start and not asked:
            time.sleep(0.05)
    say(f"stopped on request (exit code {code})")
    return STOPPED


def write(stream, text: str) -> None:
    """Writes a text, also if the reader of the stream is gone: the command must still be able to save."""
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(text: str) -> None:
    write(sys.stderr, f"supervise: {text}\n")


if __name__ == "__main__":
    sys.exit(main())
