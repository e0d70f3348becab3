"""Messages of a command to launch/supervise.py: how far the run has come, and that the command itself is wrong.

The supervisor gives up when a run fails again and again at one place, and at once when the command is wrong.
"""

import os


def report(place: str) -> None:
    """Prints `place` in a form for launch/supervise.py, which does not pass it on. Elsewhere, nothing is printed.

    A place is a checkpoint or a row of a sweep that was found, or has just been written. Every process must report it:
    on a cluster, each host has a supervisor of its own, which would otherwise never see that the run makes progress.
    """
    if os.environ.get("CFD_SUPERVISED"):
        print(f"cfd-progress: {place}", flush=True)


def give_up() -> None:
    """Tells launch/supervise.py that every start of this command ends alike. Elsewhere, nothing is printed."""
    if os.environ.get("CFD_SUPERVISED"):
        print("cfd-final:", flush=True)
