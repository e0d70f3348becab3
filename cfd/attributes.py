"""The attributes by which a network tells the sampler how it may be called: two ranges, and both scores in one call.

logsnr_range = (lo, hi)   the λ on which it was trained
weight_range = (lo, hi)   it is a student, ε(z, λ, c, w): its input w is the guidance weight (arXiv:2210.03142)
scores                    `scores(z, logsnr, labels, null_labels) -> (ε or (ε, v), ε of null_labels)`, at less than the
                          cost of two evaluations
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from cfd.arguments import check_numbers, concrete


def declared(function: Any, name: str) -> Any:
    """The attribute `name` of a network, or None. `functools.wraps`, `partial` and JAX's `Partial` do not hide it."""
    while function is not None and getattr(function, name, None) is None:
        function = getattr(function, "func", getattr(function, "__wrapped__", None))
    return None if function is None else getattr(function, name)


def trained_range(*functions: Any) -> tuple[float, float] | None:
    """The range of λ on which all these networks were trained, for those that say it; None if none does."""
    ranges = [found for function in functions if (found := declared(function, "logsnr_range")) is not None]
    return (max(lo for lo, _ in ranges), min(hi for _, hi in ranges)) if ranges else None


def check_trained(eps_fn: Callable[..., Any], logsnr_min: Any, logsnr_max: Any) -> None:
    """Raises ValueError if an end lies outside the range of λ on which eps_fn was trained. Unknown ends pass."""
    trained = trained_range(eps_fn)
    if trained is None:
        return
    lo, hi = trained
    slack = 1e-3 * (hi - lo)  # for ends that were rounded
    ends = concrete(logsnr_min), concrete(logsnr_max)
    if not all(end is None or lo - slack <= end <= hi + slack for end in ends):
        raise ValueError(
            f"logsnr_min is {logsnr_min} and logsnr_max {logsnr_max}, but eps_fn was trained on λ in [{lo}, {hi}]: "
            f"give logsnr_min={lo} and logsnr_max={hi}, or **run.process of the run that cfd.loading.load returned"
        )


def is_student(eps_fn: Any) -> bool:
    """Whether a network takes the guidance weight as its fourth input, and has one score, which is guided already."""
    return declared(eps_fn, "weight_range") is not None


def check_student(eps_fn: Any, w: Any, *, often_zero: bool, **others: bool) -> None:
    """Raises ValueError if a student did not learn a concrete weight w, or if one of `others` is asked of it.

    `others` are arguments that concern a second score. `often_zero` says that the weight is 0 at some λ too.
    """
    lo, hi = (np.float32(end) for end in declared(eps_fn, "weight_range"))
    for argument in (name for name, given in others.items() if given):
        raise ValueError(
            f"{argument} concerns a second score, and eps_fn is a student, whose one score is guided by its input w: "
            f"leave {argument} out, or give the network that the student learned from"
        )
    remedy = f"eps_fn is a student that learned w in [{lo:g}, {hi:g}]: give weights in this range"
    check_numbers("w", w, lambda x: (x >= lo) & (x <= hi), remedy)
    if often_zero and not lo <= 0.0 <= hi:
        raise ValueError(f"w is 0 outside of its Interval, and {remedy}, without an Interval")


def joint_scores(eps_fn: Any) -> Callable[..., Any] | None:
    """The function `scores` of a network, with the arguments of `partial` or `Partial` bound; None if it has none.

    One that `functools.wraps` copied does not count, because the wrapper may change what the network returns.
    """
    if isinstance(eps_fn, functools.partial):
        inner = joint_scores(eps_fn.func)
        return None if inner is None else functools.partial(inner, *eps_fn.args, **eps_fn.keywords)
    own, copied = (getattr(fn, "scores", None) for fn in (eps_fn, getattr(eps_fn, "__wrapped__", None)))
    return None if own is copied else own
