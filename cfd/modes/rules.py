"""The text of a guidance rule in a config, such as "apg(0, 2, -0.5)", and the functions that it means.

A text is a sum of calls of functions of `cfd.rules` with literal numbers, by position or by name, where inf stands for
infinity: "ramp(-4, 2) + dynamic_threshold(99.5)". Each call fills another argument of `guided_sample`:

rule=   apg, cfgpp, cfg_zero_star, rescale, power_law, feedback or tangential
w=      constant, ramp, exponential, negative_window, middle or interval, whose first argument is the cell's own weight
clip=   dynamic_threshold
reuse=  every, extrapolated or similar
null=   other_labels(), whose classes follow from the seed and the number of each image
"""

import ast
import difflib
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import Array
from jaxtyping import Float

from cfd import rules
from cfd.config import Config
from cfd.errors import UserError
from cfd.guidance import Interval, check_weight, guide
from cfd.reuse import Reuse, every, extrapolated, similar

MIXES: tuple[Callable[..., rules.Rule], ...] = (
    rules.apg,
    rules.cfgpp,
    rules.cfg_zero_star,
    rules.rescale,
    rules.power_law,
    rules.feedback,
    rules.tangential,
)
SCHEDULES: tuple[Callable[..., Callable[[Array], Array]], ...] = (
    rules.constant,
    rules.ramp,
    rules.exponential,
    rules.negative_window,
    rules.middle,
)
REUSES: tuple[Callable[..., Reuse], ...] = (every, extrapolated, similar)
FILLS = {
    **{function.__name__: "rule" for function in MIXES},
    **{function.__name__: "w" for function in SCHEDULES},
    "interval": "w",
    "dynamic_threshold": "clip",
    **{function.__name__: "reuse" for function in REUSES},
    "other_labels": "null",
}
"""The argument of `guided_sample` that each function fills, by the function's name in a text."""
PARAMETERS = {
    **{function.__name__: tuple(inspect.signature(function).parameters) for function in MIXES},
    **{function.__name__: tuple(inspect.signature(function).parameters)[1:] for function in SCHEDULES},
    "interval": ("logsnr_lo", "logsnr_hi"),
    "dynamic_threshold": tuple(inspect.signature(rules.dynamic_threshold).parameters),
    **{function.__name__: tuple(inspect.signature(function).parameters) for function in REUSES},
    "other_labels": (),
}
"""The names of the numbers that each function takes in a text."""


class Guidance(NamedTuple):
    """The meaning of a text. The text "" means plain guidance, and has none of this.

    `text` is the text in its shortest form. `rule` is the mix of the two scores, with the weight schedule in it if
    there is one. `interval` is the λ interval that is guided, or (). `clip` replaces sample.clip. `reuse` says at which
    steps the second score is evaluated; None: at all. `other_labels` says that another class of each image takes the
    place of ∅. `always` says that both scores are evaluated at w = 0 too.
    """

    text: str = ""
    rule: rules.Rule | None = None
    interval: tuple[float, ...] = ()
    clip: Callable[[Array], Array] | None = None
    reuse: Reuse | None = None
    other_labels: bool = False
    always: bool = False


PLAIN = Guidance()


@functools.cache
def guidance_of(text: str) -> Guidance:
    """The functions that a text means. Raises UserError, which says what there is, if it means none."""
    calls = _calls(text)
    filled: dict[str, tuple[str, dict[str, float]]] = {}
    for name, numbers in calls:
        argument = FILLS[name]
        if argument in filled:
            raise UserError(
                f"the rule {text!r} has {filled[argument][0]} and {name}, which both give {argument}= to the sampler: "
                "leave one of them out"
            )
        filled[argument] = name, numbers
    try:
        mix = _called(MIXES, *filled["rule"]) if "rule" in filled else None
        clip = rules.dynamic_threshold(**filled["clip"][1]) if "clip" in filled else None
        rests = _called(REUSES, *filled["reuse"]) if "reuse" in filled else None
        interval: tuple[float, ...] = ()
        name, numbers = filled.get("w", ("", {}))
        if name == "interval":
            check_weight(Interval(1.0, **numbers))
            interval = numbers["logsnr_lo"], numbers["logsnr_hi"]
        elif name:
            _called(SCHEDULES, name, {"w": 1.0} | numbers)
            mix = scheduled(mix, functools.partial(_called, SCHEDULES, name), numbers)
    except ValueError as error:
        raise UserError(f"the rule {text!r} is not possible: {error}") from error
    if (short := canonical(calls)) != text:
        return guidance_of(short)  # equal rules are the same functions, and share a program
    always = "rule" in filled or (name == "negative_window" and numbers["w_inside"] != 0.0)
    return Guidance(short, mix, interval, clip, rests, "null" in filled, always)


def scheduled(
    mix: rules.Rule | None, schedule: Callable[[dict[str, Any]], Callable[[Array], Array]], numbers: dict[str, float]
) -> rules.Rule:
    """A mix whose weight is that of a schedule of λ. Without a mix, it is the linear one.

    A rule rather than a function as w, because the sampler can then leave out the second score where w is 0.
    """

    def weights(w: Float[Array, "b"], logsnr: Array) -> Float[Array, "b"]:
        return jax.vmap(lambda w: schedule({"w": w} | numbers)(logsnr))(w)

    if mix is None:
        return rules.stateless(lambda z, cond, other, logsnr, w: (z, guide(cond, other, weights(w, logsnr))))
    return rules.Rule(
        mix.init, lambda z, cond, other, logsnr, w, state: mix.mix(z, cond, other, logsnr, weights(w, logsnr), state)
    )


def canonical(calls: Sequence[tuple[str, dict[str, float]]]) -> str:
    """The text of these calls with all numbers by name, in the order of FILLS, so that equal rules have equal texts."""
    ordered = sorted(calls, key=lambda call: list(FILLS).index(call[0]))
    written = (
        f"{name}({', '.join(f'{key}={_number_text(number)}' for key, number in numbers.items())})"
        for name, numbers in ordered
    )
    return " + ".join(written)


def without_interval(guidance: Guidance) -> Guidance:
    """The guidance that is compiled: the sampler's program takes the ends of the interval as arguments."""
    if not guidance.interval:
        return guidance
    return guidance_of(canonical([call for call in _calls(guidance.text) if call[0] != "interval"]))


def in_grid(config: Config) -> list[tuple[Guidance, tuple[float, ...]]]:
    """The rules that a sweep takes, each with its weights: those of `eval.rules`, or sample.rule with eval.weights.

    Raises UserError, which names the field, as `guidance_of` does, and for a rule that is given twice.
    """
    evaluate = config.eval
    if not evaluate.rules:
        return [(_of_field("sample.rule", config.sample.rule), tuple(map(float, evaluate.weights)))]
    entries = [entry if isinstance(entry, tuple) else (entry, tuple(evaluate.weights)) for entry in evaluate.rules]
    found = [(_of_field("eval.rules", text), tuple(map(float, weights))) for text, weights in entries]
    texts = [guidance.text for guidance, _ in found]
    if twice := next((text for text in texts if texts.count(text) > 1), None):
        raise UserError(f"config.eval.rules has {twice!r} twice: give it once, with all of its weights")
    return found


def check(config: Config) -> None:
    """Raises UserError if a rule of a config means nothing, or if another field leaves it or a corrector no room."""
    sample, evaluate = config.sample, config.eval
    found = [_of_field("sample.rule", sample.rule), *(guidance for guidance, _ in in_grid(config))]
    guided = [guide for guide in (sample.guide, *evaluate.guides) if guide]
    intervals = [interval for interval in (sample.interval, *evaluate.intervals) if interval]
    for guidance in found:
        if guidance.interval and intervals:
            raise UserError(
                f"the rule {guidance.text!r} and the interval {intervals[0]} of sample.interval or eval.intervals both "
                "say where to guide: leave interval() out of the rule, or set these fields to ()"
            )
        if guidance.other_labels and guided:
            raise UserError(
                f"the rule {guidance.text!r} leads away from another class, and the guide {guided[0]!r} from another "
                "network: set sample.guide and eval.guides to '' and (), or leave other_labels() out of the rule"
            )
        if guidance.other_labels and config.data.num_classes == 1:
            raise UserError(f"the rule {guidance.text!r} needs another class, and the data have one: leave it out")
    ruled = [guidance.text for guidance in found if guidance.text]
    if not sample.predictor_guided and (not sample.corrector or sample.guidance != "classifier-free" or ruled):
        raise UserError(
            f"config.sample.predictor_guided is False, with sample.corrector {sample.corrector}, sample.guidance "
            f"{sample.guidance!r} and the rules {ruled}: set it to True, or set sample.corrector to a number > 0, "
            "sample.guidance to 'classifier-free', sample.rule to '' and eval.rules to ()"
        )


def _of_field(field: str, text: str) -> Guidance:
    try:
        return guidance_of(text)
    except UserError as error:
        raise UserError(f"config.{field}: {error}") from error


def _called(functions: Sequence[Callable[..., Any]], name: str, numbers: dict[str, Any]) -> Any:
    return next(function for function in functions if function.__name__ == name)(**numbers)


def _calls(text: str) -> list[tuple[str, dict[str, float]]]:
    """The (name, numbers by name) of each call in a text. Raises UserError if it is no sum of such calls."""
    if not text.strip():
        return []
    try:
        expression = ast.parse(text.strip(), mode="eval").body
        parts: list[ast.expr] = []
        while isinstance(expression, ast.BinOp) and isinstance(expression.op, ast.Add):
            parts.insert(0, expression.right)
            expression = expression.left
        return [_call(text, part) for part in (expression, *parts)]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, UserError):
            raise
        raise _not_understood(text) from None


def _call(text: str, part: ast.expr) -> tuple[str, dict[str, float]]:
    if isinstance(part, ast.Name):
        part = ast.Call(part, [], [])
    if not isinstance(part, ast.Call) or not isinstance(part.func, ast.Name):
        raise _not_understood(text)
    name = part.func.id
    if name not in FILLS:
        close = difflib.get_close_matches(name, FILLS, n=1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(f"the rule {text!r} has {name!r}, which is no rule{meant}: choose among {_listed()}")
    expected = PARAMETERS[name]
    named = [keyword.arg for keyword in part.keywords]
    given = [*expected[: len(part.args)], *named]
    if len(part.args) > len(expected) or sorted(map(str, given)) != sorted(expected):
        raise UserError(f"the rule {text!r} does not give {name} its numbers: write {_signature(name)}")
    values = [*part.args, *(keyword.value for keyword in part.keywords)]
    numbers = {str(key): _number(text, name, value) for key, value in zip(given, values, strict=True)}
    return name, {key: numbers[key] for key in expected}


def _number(text: str, name: str, value: ast.expr) -> float:
    """A literal number, perhaps with a sign; inf is infinity."""
    literal, sign = value, 1.0
    if isinstance(literal, ast.UnaryOp) and isinstance(literal.op, ast.USub | ast.UAdd):
        literal, sign = literal.operand, -1.0 if isinstance(literal.op, ast.USub) else 1.0
    number: Any = literal.value if isinstance(literal, ast.Constant) else None
    if isinstance(literal, ast.Name) and literal.id == "inf":
        number = math.inf
    if isinstance(number, bool) or not isinstance(number, int | float) or math.inf > abs(number) > 1e300:
        raise UserError(
            f"the rule {text!r} gives {name} {ast.unparse(value)}, which is no number: write {_signature(name)} with "
            "numbers such as -0.5, or inf"
        )
    return sign * float(number) + 0.0  # −0 is 0


def _number_text(number: float) -> str:
    return repr(number).removesuffix(".0")


def _signature(name: str) -> str:
    return f"{name}({', '.join(PARAMETERS[name])})"


def _listed() -> str:
    return ", ".join(map(_signature, FILLS))


def _not_understood(text: str) -> UserError:
    return UserError(
        f"the rule {text!r} is not understood: write one of {_listed()} with numbers, or several of them that fill "
        "different arguments, joined by ' + '; '' is plain guidance"
    )
