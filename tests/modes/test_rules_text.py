"""The text of a rule in a config: what it means, that equal rules have equal texts, and what is refused."""

import inspect
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from cfd import reuse
from cfd import rules as functions
from cfd.guidance import guide
from cfd.modes import rules
from cfd.modes.rules import guidance_of, without_interval

Z, COND, OTHER = jax.random.normal(jax.random.key(0), (3, 4, 8, 8, 1))
W = jnp.asarray([0.0, 0.5, 1.0, -2.0])


def mixed(rule: Any, logsnr: float = 0.5, w: Any = W) -> tuple[Any, Any]:
    """(z, ε̃) of a rule in its first step."""
    return rule.mix(Z, COND, OTHER, jnp.float32(logsnr), w, rule.init(Z))[:2]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("apg(0, 2.5, -0.5)", functions.apg(0.0, 2.5, -0.5)),
        ("apg(norm=inf, eta=+1, momentum=-0)", functions.apg(1.0, math.inf, 0.0)),
        ("cfgpp()", functions.cfgpp()),
        ("cfg_zero_star(zero_until=-inf)", functions.cfg_zero_star(-math.inf)),
        ("feedback(0.9, 1e-3, w_max=4, offset=0.1)", functions.feedback(0.9, 1e-3, 0.1, 4.0)),
        (" tangential ", functions.tangential()),
    ],
)
def test_a_text_means_the_function_of_that_name_with_these_numbers(text: str, rule: Any) -> None:
    found = guidance_of(text)
    assert found.rule is not None and found.always and found.clip is None and not found.interval
    for ours, theirs in zip(mixed(found.rule), mixed(rule), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("constant()", lambda w: functions.constant(w)),
        ("ramp(-4, 2)", lambda w: functions.ramp(w, -4.0, 2.0)),
        ("exponential(rate=0.5, logsnr=2)", lambda w: functions.exponential(w, 0.5, 2.0)),
        ("negative_window(-0.5, -1, 3)", lambda w: functions.negative_window(w, -0.5, -1.0, 3.0)),
        ("middle(-1, 3)", lambda w: functions.middle(w, -1.0, 3.0)),
    ],
)
def test_a_schedule_takes_the_weight_of_each_image(text: str, schedule: Any) -> None:
    """It mixes as Eq. 6 does at the weight that the schedule has there, alone and inside another mix."""
    for logsnr in (-3.0, 0.5, 5.0):
        weights = jnp.stack([schedule(float(w))(jnp.float32(logsnr)) for w in W])
        scheduled = guidance_of(text).rule
        assert scheduled is not None
        np.testing.assert_allclose(mixed(scheduled, logsnr)[1], guide(COND, OTHER, weights), rtol=1e-6, atol=1e-6)
        both = guidance_of(f"rescale(0.7) + {text}")
        assert both.rule is not None and both.always
        for ours, theirs in zip(mixed(both.rule, logsnr), mixed(functions.rescale(0.7), logsnr, weights), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_what_fills_no_mix() -> None:
    plain, window = guidance_of(""), guidance_of("interval(-inf, 2)")
    assert plain == rules.PLAIN and window.interval == (-math.inf, 2.0) and window.rule is None and not window.always
    assert without_interval(window) == plain
    both = guidance_of("interval(-2, 4) + apg(0, 2, 0)")
    assert both.interval == (-2.0, 4.0) and without_interval(both) is guidance_of("apg(0, 2, 0)")
    thin = guidance_of("similar(0.97, 4) + interval(-2, 4)")
    assert thin.reuse == reuse.similar(0.97, 4) and thin.rule is None and not thin.always
    assert thin.text == "interval(logsnr_lo=-2, logsnr_hi=4) + similar(cosine=0.97, k=4)"
    assert guidance_of("every(2)").reuse == reuse.every(2) != guidance_of("extrapolated(k=2)").reuse
    assert guidance_of("other_labels()").other_labels and not guidance_of("other_labels()").always
    clip = guidance_of("dynamic_threshold(99.5)").clip
    assert clip is not None
    np.testing.assert_array_equal(clip(3.0 * Z), functions.dynamic_threshold(99.5)(3.0 * Z))
    assert not guidance_of("ramp(-4, 2)").always and not guidance_of("negative_window(0, -1, 3)").always
    assert guidance_of("negative_window(-0.5, -1, 3)").always, "its weight at w = 0 is not 0"


def test_equal_rules_have_equal_texts_which_mean_themselves() -> None:
    same = ["apg(0,2.50,-.5)+ramp(-4,2)", "ramp(logsnr_hi=2.0, logsnr_lo=-4) + apg(-0, momentum=-5e-1, norm=2.5)"]
    assert len({guidance_of(text).text for text in same}) == 1
    for text in (*same, "interval(-inf, inf)", "feedback(1, 1e-3, 0, 4)", "other_labels + tangential", ""):
        short = guidance_of(text).text
        assert guidance_of(short).text == short and "\n" not in short
    assert guidance_of("rescale(0.30000000000000004)").text != guidance_of("rescale(0.3)").text


def test_every_function_of_cfd_rules_has_a_text() -> None:
    public = {
        name
        for name, value in vars(functions).items()
        if inspect.isfunction(value) and value.__module__ == functions.__name__
    } | {"every", "extrapolated", "similar"}
    without_a_text = {"stateless", "cads"}  # a helper, and a rule for labels that are embeddings
    assert {name for name in public if not name.startswith("_")} - without_a_text == set(rules.FILLS) - {"interval"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "agp(0, 2, 0)",
            r"has 'agp', which is no rule \(did you mean apg\?\): choose among apg\(eta, norm, momentum\)",
        ),
        ("apg(1)", r"does not give apg its numbers: write apg\(eta, norm, momentum\)"),
        ("apg(1, 2, 3, 4)", r"does not give apg its numbers"),
        ("apg(1, 2, 3, eta=4)", r"does not give apg its numbers"),
        ("apg(1, 2, drift=3)", r"does not give apg its numbers"),
        ("cfgpp(*a)", r"does not give cfgpp its numbers: write cfgpp\(\)"),
        ("ramp(1.0, -4, 2)", r"does not give ramp its numbers: write ramp\(logsnr_lo, logsnr_hi\)"),
        ("rescale(nan)", r"gives rescale nan, which is no number: write rescale\(phi\)"),
        ("rescale(True)", r"gives rescale True, which is no number"),
        ("rescale(0.1 + 0.2)", r"gives rescale 0\.1 \+ 0\.2, which is no number"),
        ("rescale(" + "9" * 400 + ")", r"which is no number"),
        ("rescale(2)", r"is not possible: phi is 2\.0; give a number in \[0, 1\]"),
        ("apg(0, -1, 0)", r"is not possible: norm is -1\.0; give a number that is positive"),
        ("ramp(2, 2)", r"is not possible"),
        ("every(1.5)", r"is not possible: k is 1\.5; it is a count: give an integer k >= 1"),
        ("every(0)", r"is not possible: k is 0"),
        ("similar(2, 3)", r"is not possible: cosine is 2\.0; .* give a number in \[-1, 1\]"),
        ("every(2) + similar(0.9, 2)", r"has every and similar, which both give reuse= to the sampler: leave one"),
        ("ramp(-inf, 2)", r"is not possible: logsnr_lo is -inf; give a number that is finite"),
        ("interval(3, 1)", r"is not possible: .* give logsnr_lo <= logsnr_hi"),
        ("cfgpp() + tangential()", r"has cfgpp and tangential, which both give rule= to the sampler: leave one"),
        ("ramp(-4, 2) + interval(-4, 2)", r"has ramp and interval, which both give w= to the sampler"),
        ("cfgpp() - tangential()", r"is not understood: write one of apg"),
        ("os.system('x')", r"is not understood"),
        ("rescale(0.5); import os", r"is not understood"),
        ("3", r"is not understood"),
        ("(", r"is not understood"),
        ("cfgpp() +", r"is not understood"),
        ("(" * 500, r"is not understood"),
        ("\x00", r"is not understood"),
    ],
)
def test_a_text_that_means_nothing_is_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        guidance_of(text)
    assert str(caught.value).startswith(f"the rule {text!r} ")


def test_the_remedy_for_wrong_numbers_is_possible() -> None:
    """Each signature that a message prints is followed, with a number for each of its names."""
    with pytest.raises(ValueError) as caught:
        guidance_of("x()")
    for name, names in re.findall(r"(\w+)\(([\w, ]*)\)", str(caught.value).partition("choose among")[2]):
        keys = filter(None, names.split(", "))
        numbers = [f"{key}={1 + i if key == 'k' else 0.25 + i}" for i, key in enumerate(keys)]
        assert guidance_of(f"{name}({', '.join(numbers)})").text.startswith(name)


# Configs


def test_the_rules_of_a_grid_have_their_own_weights() -> None:
    config = tiny_config(eval__rules=("", ("cfgpp()", (-1.0, -0.5)), "ramp(-4, 2)"), eval__weights=(0.0, 1.0))
    found = [(guidance.text, weights) for guidance, weights in rules.in_grid(config)]
    assert found == [
        ("", (0.0, 1.0)), ("cfgpp()", (-1.0, -0.5)), ("ramp(logsnr_lo=-4, logsnr_hi=2)", (0.0, 1.0)),
    ]  # fmt: skip
    assert rules.in_grid(tiny_config(sample__rule="cfgpp", eval__weights=(1.0,)))[0][0] is guidance_of("cfgpp")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(sample__rule="apgg()"), r"config\.sample\.rule: the rule 'apgg\(\)' has 'apgg'"),
        (dict(eval__rules=("", "rescale(2)")), r"config\.eval\.rules: the rule 'rescale\(2\)' is not possible"),
        (dict(eval__rules=("rescale(.5)", "rescale(0.50)")), r"config\.eval\.rules has 'rescale\(phi=0\.5\)' twice"),
        (
            dict(eval__rules=("interval(-2, 4)",), eval__intervals=((), (-1.0, 2.0))),
            r"both say where to guide: leave interval\(\) out of the rule",
        ),
        (
            dict(sample__rule="other_labels", eval__guides=("", "@3")),
            r"leads away from another class, and the guide '@3'",
        ),
    ],
)
def test_rules_that_leave_each_other_no_room_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rules.check(tiny_config(**changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(eval__rules=(("cfgpp()", ()),)), r"config\.eval\.rules is .* expected \(\) for sample\.rule, or a tuple"),
        (dict(eval__rules=(("cfgpp()", (1.0, 1.0)),)), r"config\.eval\.rules is "),
        (dict(eval__rules=(("cfgpp()", (float("nan"),)),)), r"config\.eval\.rules is "),
        (dict(eval__rules=(3,)), r"config\.eval\.rules is "),
        (dict(eval__guides=("@3", "@3")), r"config\.eval\.guides is .*none twice"),
        (dict(eval__seeds=(1, 1)), r"config\.eval\.seeds is .*none twice"),
        (dict(eval__seeds=(-1,)), r"config\.eval\.seeds is "),
        (dict(sample__guide="@"), r"config\.sample\.guide is '@'; expected '', or '@STEP' of this run"),
        (dict(sample__guide="@x"), r"config\.sample\.guide is "),
        (dict(sample__guide="s3://bucket/run@3"), r"config\.sample\.guide is "),
        (dict(sample__guide="runs/a\n"), r"config\.sample\.guide is "),
        (dict(sample__guide="@3", sample__doubled=True), r"sample\.doubled is True, and the guide '@3' is another"),
        (
            dict(sample__guidance="classifier", eval__rules=("", "cfgpp()")),
            r"'classifier', which has no second score for 'cfgpp\(\)'",
        ),
        (dict(sample__guidance="classifier", eval__guides=("@3",)), r"which has no second score for '@3'"),
    ],
)
def test_fields_are_checked(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny_config(**changes)
