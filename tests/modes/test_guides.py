"""Guides: what their text names, and that a run that does not fit is refused before hours of training."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import mixing
import pytest
from jax.tree_util import Partial
from meshes import mesh_of
from tiny import tiny_config

from cfd import main
from cfd.devices import parallel
from cfd.modes import guides, settings, sweep, train
from cfd.runs import results, workdir


@pytest.mark.parametrize(
    ("guide", "expected"),
    [
        ("@100", ("", 100)),
        ("runs/small", ("runs/small", None)),
        ("runs/small@20", ("runs/small", 20)),
        ("a@b", ("a@b", None)),
        ("a@b@7", ("a@b", 7)),
    ],
)
def test_a_guide_is_a_run_and_a_step(guide: str, expected: tuple[str, int | None]) -> None:
    assert guides.split(guide) == expected
    assert tiny_config(sample__guide=guide).sample.guide == guide


def other_run(
    folder: Path, kind: str = "diffusion", names: Any = mixing.DIGITS, steps: Any = (), **changes: Any
) -> str:
    """The folder of another run, which has checkpoints of these steps in name alone."""
    workdir.write_config(folder, workdir.describe(kind, tiny_config(**changes).to_dict(), names))
    for step in steps:
        (folder / workdir.CHECKPOINTS / str(step)).mkdir(parents=True)
    return str(folder)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (dict(kind="classifier"), "is no run of a diffusion model"),
        (dict(data__image_size=4), r"has images of shape \(4, 4, 1\), and the run of shape \(8, 8, 1\)"),
        (dict(names=mixing.DIGITS[:9], data__num_classes=9), "has 9 classes, and the run 10"),
        (dict(names=(*mixing.DIGITS[:9], "nine")), "class 9 is 'nine' in the guide .* and '9' in the run"),
        (dict(model__weight_range=(0.0, 4.0)), r"is a student, whose score depends on the guidance weight"),
        (dict(process__logsnr_max=5.0), r"is trained on λ in \[-20, 5\], which does not cover the run's \[-20, 20\]"),
        (dict(), r"names a checkpoint that is not there: name another run, or leave the guide out"),
    ],
)
def test_a_run_that_does_not_fit_is_refused(tmp_path: Path, made: dict[str, Any], words: str) -> None:
    place = other_run(tmp_path / "other", **made)
    with pytest.raises(ValueError, match=words):
        guides.check(tiny_config(), ("", "@3", place), mixing.DIGITS)


def test_a_guide_is_asked_for_at_a_step_that_it_has(tmp_path: Path) -> None:
    place = other_run(tmp_path / "other", steps=(20, 40))
    guides.check(tiny_config(), (place, f"{place}@20"), mixing.DIGITS)
    with pytest.raises(ValueError, match=r"names a step 30 that is not there: take one of \[20, 40\], as .*other@STEP"):
        guides.check(tiny_config(), (f"{place}@30",), mixing.DIGITS)
    with pytest.raises(ValueError, match=rf"names {tmp_path}/none, which is no run of a diffusion model"):
        guides.check(tiny_config(), (f"{tmp_path}/none@30",), mixing.DIGITS)


def test_a_step_of_the_run_itself_must_be_there_when_training_ends(tmp_path: Path) -> None:
    """The remedy is followed."""
    with pytest.raises(
        ValueError, match=r"or a guide has 1, which will not be there .* set train\.snapshot_every_steps"
    ):
        train.check_steps(tiny_config(eval__guides=("", "@1")), str(tmp_path))
    train.check_steps(tiny_config(eval__guides=("", "@1"), train__snapshot_every_steps=1), str(tmp_path))


def test_the_small_guide_of_a_run_is_another_network_on_the_same_batches(tmp_path: Path) -> None:
    small = dict(model_guide__channel_mult=(2,), model_guide__attention_resolutions=(), guide_train__num_steps=3)
    config = tiny_config(eval__guides=("", "guide"), **small)
    guides.check(config, config.eval.guides, mixing.DIGITS)
    assert guides.has_own(config) and not guides.has_own(tiny_config(eval__guides=("", "@2", "other/guide")))
    own = guides.config_of_own(config)
    assert own.model.channel_mult == (2,) and (own.train.num_steps, own.train.p_uncond) == (3, 1.0)
    assert not guides.has_own(own) and (own.seed, own.data) == (config.seed, config.data)
    assert own.train.batch_size == config.train.batch_size
    assert guides.config_of_own(tiny_config(**small | {"guide_train__num_steps": 0})).train.num_steps == 6
    wrong = small | {"eval__guides": ("guide",), "model_guide__attention_resolutions": (5,)}
    with pytest.raises(ValueError, match=r"config\.model_guide\.attention_resolutions is \(5,\)"):
        guides.check(tiny_config(**wrong), ("guide",))
    guides.check(tiny_config(**wrong | {"model_guide__attention_resolutions": ()}), ("guide",))
    with pytest.raises(
        ValueError, match=r"model_guide\.weight_range is \(0\.0, 4\.0\), .* as an input: set it to \(\)"
    ):
        guides.check(tiny_config(**small, eval__guides=("guide",), model_guide__weight_range=(0.0, 4.0)), ("guide",))
    # The variance of the run's own steps needs none of the guide.
    learned = dict(model__learn_variance=True, sample__variance="learned", eval__guides=("guide",))
    guides.check(tiny_config(**small | learned), ("guide",))


def test_a_small_guide_that_is_not_there_is_named_with_the_remedy(tmp_path: Path) -> None:
    run = mixing.opening(mixing.params())(tiny_config(), str(tmp_path))._replace(folder=str(tmp_path))
    with pytest.raises(ValueError, match=rf"and {tmp_path}/guide holds none: train it with --mode=train"):
        guides.load_guide(tiny_config(), run, "guide@3")


@pytest.mark.parametrize(("p_uncond", "given"), [(0.1, [0, 3]), (1.0, [-1, -1])])
def test_a_network_that_saw_no_labels_is_given_none(p_uncond: float, given: list[int]) -> None:
    def eps_fn(params: Any, z: Any, logsnr: Any, labels: Any) -> Any:
        return 0.0 * z + labels[:, None, None, None]

    model = mixing.opening(mixing.params())(tiny_config(), "").model_at(7)
    model = model._replace(eps_fn=Partial(eps_fn, {}), config={"train": {"p_uncond": p_uncond}})
    network = settings.network_of_run(model)
    seen = network.eps_of_params({})(jnp.zeros((2, 8, 8, 1)), jnp.zeros(2), jnp.array([0, 3]))
    assert seen[:, 0, 0, 0].tolist() == given


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*covariance of rank:UserWarning")
def test_the_whole_job_trains_the_small_guide_and_is_guided_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The remedy for a missing guide is followed, and a second job trains nothing."""
    monkeypatch.setattr(parallel, "make_mesh", lambda **_: mesh_of(1))
    monkeypatch.setattr(main, "INIT_FROM", SimpleNamespace(value=None))
    monkeypatch.setattr(main, "ALLOW_FRESH_START", SimpleNamespace(value=False))
    folder = str(tmp_path / "run")
    config = tiny_config(
        eval__guides=("", "guide"),
        eval__weights=(1.0,),
        model_guide__network="mp",
        model_guide__base_channels=8,
        model_guide__head_channels=8,
        model_guide__channel_mult=(1,),
        model_guide__attention_resolutions=(),
    )
    main.run_train(tiny_config(eval__weights=()), folder, folder)
    with pytest.raises(ValueError, match="holds none: train it with --mode=train"):
        sweep.sweep(config, folder, folder)
    main.run_train(config, folder, folder)
    rows = {row["guide"]: row for row in results.latest(folder)}
    assert rows.keys() == {"", "guide"} and rows[""]["fid"] != rows["guide"]["fid"]
    metrics = (tmp_path / "run" / "guide" / "metrics.jsonl").read_text()
    main.run_train(config, folder, folder)
    assert (tmp_path / "run" / "guide" / "metrics.jsonl").read_text() == metrics


def test_sample_grids_of_training_have_no_guide(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sample\.guide is '@2', and sample grids are drawn during training"):
        train.preview(tiny_config(sample__guide="@2"), mesh_of(1), str(tmp_path), mixing.DIGITS)
