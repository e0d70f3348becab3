"""Checks of the fields of a config: types, conditions, and each condition in words for a message."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple


class Check(NamedTuple):
    """The type of a value, the condition that it must satisfy, and that condition in words."""

    type: type
    holds: Callable[[Any], bool]
    words: str


INT_LIMIT = 2**31
"""Counts and steps are int32 on the devices."""
FLOAT_LIMIT = (2 - 2**-23) * 2.0**127
"""The largest float32. Other numbers are float32 on the devices."""


def accepts(check: Check, value: Any) -> bool:
    """Whether a value has the type and satisfies the condition."""
    return has_type(check, value) and check.holds(value)


def has_type(check: Check, value: Any) -> bool:
    """Whether a value has the type. An int passes for a float, a bool only for a bool."""
    types = (int, float) if check.type is float else (check.type,)
    return isinstance(value, types) and (check.type is bool or not isinstance(value, bool))


def at_least(low: int) -> Check:
    return Check(int, lambda x: low <= x < INT_LIMIT, f"an integer >= {low} and < 2^31")


def number(low: float, high: float = math.inf, *, above: bool = False) -> Check:
    end = f" and <= {high:g}" if high < math.inf else ", finite in float32"
    words = f"a number {'>' if above else '>='} {low:g}{end}"
    return Check(float, lambda x: (x > low if above else x >= low) and x <= min(high, FLOAT_LIMIT), words)


def one_of(*values: str) -> Check:
    return Check(str, lambda x: x in values, f"one of {', '.join(values)}")


def each(check: Check, words: str, *, empty: bool = True) -> Check:
    return Check(tuple, lambda x: (empty or len(x) > 0) and all(accepts(check, item) for item in x), words)


def distinct(check: Check, words: str) -> Check:
    every = each(check, words)
    return Check(tuple, lambda x: every.holds(x) and len(set(x)) == len(x), f"{words}, none twice")


def is_interval(value: Any) -> bool:
    """Whether a value is () or (logsnr_lo, logsnr_hi) with lo <= hi."""
    finite = isinstance(value, tuple) and all(accepts(FINITE, end) for end in value)
    return finite and (value == () or (len(value) == 2 and value[0] <= value[1]))


def is_range(value: Any) -> bool:
    """Whether a value is (lo, hi) with −1 <= lo <= 0 < hi."""
    return isinstance(value, tuple) and len(value) == 2 and accepts(WITH_WEIGHTS, value) and value[0] <= 0 < value[1]


SEED = Check(int, lambda x: 0 <= x < 2**32, "an integer in [0, 2^32), the seeds of JAX")
TEXT = Check(str, lambda _: True, "a string")
PATH = Check(
    str,
    lambda x: x.startswith("gs://") or not re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/|.*://", x, re.DOTALL),
    "a path, or a URL gs://BUCKET/NAME (copy what another URL names to a disk or into a bucket)",
)
BOOL = Check(bool, lambda _: True, "True or False")
FINITE = Check(float, lambda x: abs(x) <= FLOAT_LIMIT, "a number, finite in float32")
LENGTH = number(0.0, 12**-0.5, above=True)
EMA = number(0.0, 12**-0.5)
DECAY = Check(float, lambda x: 0 <= x < 1, "a number in [0, 1)")
MAX_PIXELS = Check(int, lambda x: 1 <= x <= 178_956_970, "an integer in [1, 178956970], the limit of Pillow")
CHANNELS = Check(int, lambda x: x in (1, 3), "1 or 3")
BASE_CHANNELS = Check(
    int, lambda x: 0 < x < INT_LIMIT and x % 8 == 0, "a multiple of 8, and of 32, the norm groups, if it has any"
)
MULTIPLIERS = each(number(0.0, above=True), "a tuple of numbers > 0", empty=False)
# Beyond ±88, α or σ is 0 in float32.
LOGSNR = Check(float, lambda x: -80 <= x <= 80, "a number in [-80, 80]")
WEIGHTS = "a tuple of guidance weights, each finite in float32 and >= -1 (w = -1 is the unconditional model)"
INTERVAL = "() or (logsnr_lo, logsnr_hi), finite in float32, with lo <= hi"
SEEDS = each(SEED, "a tuple of integers in [0, 2^32), the seeds of JAX", empty=False)
INTERVALS = distinct(
    Check(tuple, is_interval, INTERVAL), f"() for sample.interval, or a tuple of intervals, each {INTERVAL}"
)
GUIDE_WORDS = (
    "'', or '@STEP' of this run, 'guide', its small guide, 'RUN' or 'RUN@STEP' of another run's folder; with '~EMA' at "
    f"its end, an EMA of that length, {LENGTH.words}, such as '~0.1' of this run or 'RUN@STEP~0.1'"
)
GUIDE_LENGTH = re.compile(r"~(\d*\.\d+)$")
"""The EMA length at the end of a guide. It has a decimal point, which the name of a folder rarely has after "~"."""


def is_guide(value: str) -> bool:
    """Whether a value is "", or "@STEP", "RUN" or "RUN@STEP", perhaps with "~EMA"; RUN is a path or a bucket's URL."""
    length = GUIDE_LENGTH.search(value)
    if length and not accepts(LENGTH, float(length[1])):
        return False
    named = value[: length.start()] if length else value
    run, _, step = named.rpartition("@")
    path = run if step.isdecimal() else named
    return value.isprintable() and value == value.strip() and not path.startswith("@") and PATH.holds(path)


GUIDE = Check(str, is_guide, GUIDE_WORDS)
WEIGHT_RANGE = "(lo, hi), two guidance weights with -1 <= lo <= 0 < hi"
WITH_WEIGHTS = each(number(-1.0), WEIGHTS, empty=False)
RULE_WORDS = (
    "a rule, or (a rule, a tuple of its own weights in place of eval.weights, each finite in float32 and >= -1)"
)


def is_rule_of_grid(value: Any) -> bool:
    """Whether a value is a text, or (a text, weights), with at least one weight and none twice."""
    if isinstance(value, str):
        return True
    if not isinstance(value, tuple) or len(value) != 2 or not isinstance(value[0], str):
        return False
    return accepts(WITH_WEIGHTS, value[1]) and len(set(value[1])) == len(value[1])


RULES = each(
    Check(object, is_rule_of_grid, RULE_WORDS), f"() for sample.rule, or a tuple whose entries are each {RULE_WORDS}"
)
CLASSES = Check(
    tuple,
    lambda x: all(accepts(TEXT, item) or accepts(at_least(0), item) for item in x),
    "a tuple of class numbers and names, such as (3, 'cat'); () for the first ten",
)
MESH_DATA = Check(int, lambda x: x == -1 or x >= 1, "-1 (the devices that fsdp leaves) or an integer >= 1")
