"""How far a run has come, for launch/supervise.py, which gives up when a run fails again and again at one place."""

import os


def report(place: str) -> None:
    """Prints `place` in a form for launch/supervise.py, which does not pass it on. Elsewhere, nothing is printed.

    A place is a checkpoint or a row of a sweep that was found, or has just been written. Every process must report it:
    on a cluster, each host has a supervisor of its own, which would otherwise never see that the run makes progress.
    """
    if os.environ.get("CFD_SUPERVISED"):
        print(f"cfd-progress: {place}", flush=True)
