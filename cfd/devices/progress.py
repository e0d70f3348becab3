"""How far a run has come, for launch/supervise.py, which gives up when a run fails again and again at one place."""

import os

import jax


def report(place: str) -> None:
    """Prints `place` in a form for launch/supervise.py, which does not pass it on. Elsewhere, nothing is printed.

    A place is a checkpoint or a row of a sweep that was found, or has just been written.
    """
    if os.environ.get("CFD_SUPERVISED") and jax.process_index() == 0:
        print(f"cfd-progress: {place}", flush=True)
