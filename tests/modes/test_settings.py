"""A config is checked against the run that it is used with, before anything is sampled or measured."""

import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh_of
from mixing import DIGITS
from tiny import tiny_config

from cfd.errors import UserError
from cfd.modes import settings, sweep, train
from cfd.networks.times import logsnr_table
from cfd.runs import workdir


def test_a_run_of_another_config_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        settings.open_run(tiny_config(), str(tmp_path))
    workdir.write_config(tmp_path, workdir.describe("diffusion", tiny_config().to_dict(), DIGITS))
    with pytest.raises(ValueError, match=r"num_res_blocks: 1 there, 2 here"):
        settings.open_run(tiny_config(model__num_res_blocks=2), str(tmp_path))
    run = settings.open_run(tiny_config(sample__v=0.9), str(tmp_path))
    with pytest.raises(ValueError, match="has no step"):
        run.model_at(-1)


def test_transparent_images_do_not_get_another_background_on_resume(tmp_path: Path) -> None:
    """A run that refused transparent images has seen none, so that any background may follow; then it stays."""
    refused, white, black = (tiny_config(data__transparency=name) for name in ("refuse", "white", "black"))
    workdir.write_config(tmp_path, workdir.describe("diffusion", refused.to_dict(), DIGITS))
    assert settings.of_run(white, str(tmp_path)).data.transparency == "white"
    workdir.write_config(tmp_path, workdir.describe("diffusion", white.to_dict(), DIGITS))
    for other in (refused, black):
        with pytest.raises(UserError, match=r"data\.transparency was 'white' .* set it to 'white', or give another"):
            settings.of_run(other, str(tmp_path))
    assert settings.of_run(white, str(tmp_path)).data.transparency == "white"


def test_an_unconditional_score_is_asked_only_of_a_run_that_trains_it() -> None:
    config = tiny_config(train__p_uncond=0.0)
    settings.check_weights(config, (0.0,))
    with pytest.raises(ValueError, match=r"w = 2 needs the unconditional score.*p_uncond = 0"):
        settings.check_weights(config, (0.0, 2.0))
    settings.check_weights(tiny_config(train__p_uncond=0.0, sample__guidance="classifier"), (0.0, 2.0))


def test_a_run_without_a_conditional_score_is_sampled_only_at_minus_1() -> None:
    settings.check_weights(tiny_config(train__p_uncond=1.0), (-1.0,))
    for guidance, weights in (("classifier-free", (-1.0, 0.0)), ("classifier", (-1.0,))):
        with pytest.raises(ValueError, match=r"needs the conditional score.*p_uncond = 1"):
            settings.check_weights(tiny_config(train__p_uncond=1.0, sample__guidance=guidance), weights)


def test_a_run_without_a_conditional_score_is_not_told_to_train_a_classifier(tmp_path: Path) -> None:
    """Classifier guidance would be refused with it too. The remedy works without it."""
    config = tiny_config(train__p_uncond=1.0, sample__guidance="classifier", eval__weights=(-1.0,))
    with pytest.raises(UserError, match=r"p_uncond = 1 trains no conditional.*set sample.guidance='classifier-free'"):
        settings.check_classifier(config, str(tmp_path))
    config.sample.guidance = "classifier-free"
    settings.check_classifier(config, str(tmp_path))
    settings.check_weights(config, config.eval.weights)


def test_an_interval_that_no_step_falls_into_is_refused() -> None:
    """The four steps of the paper's schedule are at λ = −20, −1.0985, 1.0985 and 20. The remedy, more steps, works."""
    config = tiny_config()
    with pytest.raises(UserError, match=r"interval \(-1, 1\) .* no effect with 4 steps.* at λ = -1\.098"):
        settings.check_sampling(config, (64, 4), ((), (-3.0, 5.0), (-1.0, 1.0)))
    settings.check_sampling(config, (64,), ((), (-3.0, 5.0), (-1.0, 1.0)))
    settings.check_sampling(config, (4,), ((), (-20.0, -19.0), (-1.0, 1.1), (20.0, 30.0)))


def test_such_an_interval_is_refused_before_training(tmp_path: Path) -> None:
    for interval in ({"sample__interval": (-1.0, 1.0)}, {"eval__intervals": ((), (-1.0, 1.0))}):
        with pytest.raises(UserError, match="no effect with 4 steps"):
            sweep.check(tiny_config(**interval), str(tmp_path))
    with pytest.raises(UserError, match="no effect with 8 steps"):
        sweep.check(tiny_config(eval__num_steps=(64, 8), eval__intervals=((-0.1, 0.1),)), str(tmp_path))
    with pytest.raises(UserError, match="no effect with 4 steps"):
        train.preview(tiny_config(sample__interval=(-1.0, 1.0)), mesh_of(1), str(tmp_path), DIGITS)


@pytest.mark.parametrize(
    ("sampler", "v", "said"), [("ddim", 0.41, True), ("ddim", 0.3, False), ("ancestral", 0.41, False)]
)
def test_a_v_that_the_sampler_does_not_use_is_said(sampler: str, v: float, said: bool, capsys) -> None:
    settings.check_sampling(tiny_config(sample__sampler=sampler, sample__v=v), (4,), ((),))
    assert ("sample.v = 0.41 is not used: sample.sampler 'ddim' has no v." in capsys.readouterr().out) == said


def test_a_schedule_is_that_of_training_unless_sampling_has_its_own() -> None:
    """DDPM's table has its own ends, which the message gives; with them it is accepted."""
    ends = dict(process__logsnr_min=-6.0, process__logsnr_max=6.0)
    assert settings.sampling_of(tiny_config(**ends)).levels == 4
    trained = tiny_config(process__schedule="linear", **ends)
    np.testing.assert_allclose(settings.training_schedule(trained)(np.float32(0.25)), 3.0)
    np.testing.assert_allclose(settings.sampling_of(trained).levels, [-6.0, -2.0, 2.0, 6.0], rtol=1e-6)
    cosine = tiny_config(process__schedule="linear", sample__schedule="cosine", **ends)
    assert settings.sampling_of(cosine).levels == 4
    with pytest.raises(UserError, match=r"'adm_linear' goes from .*logsnr_min to -10\.1177 and .* 9\.21024"):
        settings.check_schedules(tiny_config(process__schedule="adm_linear"))
    with pytest.raises(UserError, match=r"'adm_cosine' goes from"):
        settings.check_schedules(tiny_config(sample__schedule="adm_cosine"))
    table = tiny_config(process__schedule="adm_linear", process__logsnr_min=-10.1177, process__logsnr_max=9.21024)
    settings.check_schedules(table)
    assert settings.training_schedule(table)(np.float32(0.0)) == pytest.approx(9.21024, abs=1e-4)
    edm = tiny_config(process__schedule="edm", sample__num_steps=3)
    np.testing.assert_allclose(settings.sampling_of(edm).levels, [-20.0, 2.4, 20.0], rtol=1e-5)


def test_the_weight_of_the_loss_is_that_of_its_name() -> None:
    """At λ = 2: 1 / (e^λ), 1 + 1 / e^λ, the square of (1 − e^{−h}) α' over e^λ, and the sigmoid over its integral."""
    logsnr, table = jnp.float32([2.0]), logsnr_table("linear")

    def weight(**changes: Any) -> float:
        found = settings.training_weight(tiny_config(**changes))
        assert found is not None
        return float(found(logsnr)[0])

    assert settings.training_weight(tiny_config()) is None
    assert weight(train__weight="x") == pytest.approx(math.exp(-2))
    assert weight(train__weight="v") == pytest.approx(1 + math.exp(-2))
    at = int(np.abs(table - 2.0).argmin())
    added = (1 - math.exp(2.0 - table[at - 1])) / math.sqrt(1 + math.exp(-table[at - 1]))
    assert weight(train__weight="mean", model__time="adm_linear") == pytest.approx(added**2 * math.exp(-2), rel=1e-3)
    uniform = dict(process__schedule="linear", process__logsnr_min=-10.0, process__logsnr_max=10.0)
    total = math.log1p(math.exp(11.0)) - math.log1p(math.exp(-9.0))
    sigmoid = weight(train__weight="sigmoid", train__sigmoid_bias=1.0, **uniform)
    assert sigmoid == pytest.approx(20.0 / (1 + math.exp(1.0)) / total, rel=1e-3)


def test_a_mean_without_a_table_and_a_bias_without_a_sigmoid_are_refused() -> None:
    for changes in (dict(model__predict="mean"), dict(train__weight="mean")):
        with pytest.raises(UserError, match=r"is 'mean', the mean of a step .* 'cosine', which has no table: set"):
            tiny_config(**changes)
        tiny_config(**changes, model__time="adm_cosine")
    with pytest.raises(UserError, match=r"sigmoid_bias is -1, and train.weight 'x' has no bias"):
        tiny_config(train__weight="x", train__sigmoid_bias=-1.0)
    tiny_config(train__weight="sigmoid", train__sigmoid_bias=-1.0)
