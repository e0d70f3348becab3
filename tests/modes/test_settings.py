"""A config is checked against the run that it is used with, before anything is sampled or measured."""

from pathlib import Path

import pytest
from mixing import DIGITS
from tiny import tiny_config

from cfd.modes import settings
from cfd.runs import workdir


def test_a_run_of_another_config_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        settings.open_run(tiny_config(), str(tmp_path))
    workdir.write_config(tmp_path, workdir.describe("diffusion", tiny_config().to_dict(), DIGITS))
    with pytest.raises(ValueError, match=r"num_res_blocks: 1 there, 2 here"):
        settings.open_run(tiny_config(model__num_res_blocks=2), str(tmp_path))
    with pytest.raises(ValueError, match="has no step"):
        settings.open_run(tiny_config(sample__v=0.9), str(tmp_path))


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
