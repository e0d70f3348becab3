"""The averages that a run keeps for EMAs of other lengths: while it trains, in its folder, and read again."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from checkpoints import damage_lines, flip_weights
from gcs import FakeGcs
from jax.sharding import NamedSharding, PartitionSpec
from linear import assert_same_bits, bad_at, bad_loss, init, run
from meshes import mesh_of
from tiny import tiny_config

from cfd.config import complete
from cfd.devices import seeds
from cfd.loading import load_ema
from cfd.modes import train
from cfd.modes.fit import posthoc_every_steps
from cfd.runs import workdir
from cfd.runs.checkpoint import CheckpointError
from cfd.runs.steps import steps_of

KEPT = (0.05, 0.1)
LONG: dict[str, Any] = dict(train__num_steps=48, train__checkpoint_every_steps=48)


def ema(folder: Any, *step_and_length: Any) -> Any:
    return jax.tree.map(np.asarray, load_ema(folder, "diffusion", *step_and_length).params)


def recorded(folder: Path, place: str) -> dict[str, Any]:
    """The digests of the arrays of a step."""
    return json.loads((folder / place / "meta" / "metadata").read_text())["arrays"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 48 steps with the averages KEPT at every second step."""
    folder = tmp_path_factory.mktemp("kept")
    run(folder, train__posthoc_ema=KEPT, train__posthoc_every_steps=2, **LONG)
    return folder


def test_a_reconstruction_is_the_average_that_another_run_keeps(kept: Path, tmp_path: Path) -> None:
    lengths = (0.06, 0.075, 0.12)
    run(tmp_path, train__posthoc_ema=lengths, train__posthoc_every_steps=48, **LONG)
    for length in lengths:
        direct, made = ema(tmp_path, None, length), ema(kept, None, length)
        off = [
            np.abs(a - b).max() / np.abs(a).max() for a, b in zip(*map(jax.tree.leaves, (direct, made)), strict=True)
        ]
        assert max(off) < 1e-5, (length, off)
    assert_same_bits(ema(kept), ema(tmp_path))
    steps = [np.abs(ema(kept, None, length)["w"] - ema(kept)["w"]).max() for length in (0.05, 0.1)]
    assert min(steps) > 1e-3, "the lengths differ from each other and from the run's own"


def test_the_run_is_the_same_with_and_without_averages(kept: Path, tmp_path: Path) -> None:
    run(tmp_path, **LONG)
    there, here = recorded(kept, "checkpoints/48"), recorded(tmp_path, "checkpoints/48")
    assert here == {key: x for key, x in there.items() if not key.startswith("posthoc/")}
    assert {key for key in there if key.startswith("posthoc/")} == {f"posthoc/{i}/{x}" for i in (0, 1) for x in "bw"}
    assert not (tmp_path / "posthoc").exists() and steps_of(kept / "posthoc") == list(range(2, 49, 2))


def test_a_run_that_is_resumed_keeps_its_averages(tmp_path: Path) -> None:
    changes: dict[str, Any] = dict(
        train__posthoc_ema=KEPT, train__posthoc_every_steps=3, train__checkpoint_every_steps=4
    )
    for end in (4, 7, 12):
        run(tmp_path / "resumed", train__num_steps=end, **changes)
    run(tmp_path / "whole", train__num_steps=12, **changes)
    for place in (*(f"posthoc/{step}" for step in (3, 6, 9, 12)), "checkpoints/12"):
        assert recorded(tmp_path / "resumed", place) == recorded(tmp_path / "whole", place)
    assert_same_bits(ema(tmp_path / "resumed", None, 0.07), ema(tmp_path / "whole", None, 0.07))
    with pytest.raises(ValueError, match=r"train\.posthoc_ema: \[0\.05, 0\.1\] there, \[\] here"):
        run(tmp_path / "whole", train__num_steps=13)


def test_a_step_that_is_not_finite_counts_as_one_without_change(tmp_path: Path) -> None:
    key = jax.random.split(seeds.key(tiny_config().seed))[1]
    run(tmp_path, bad_loss("loss", bad_at(key, [1])), train__posthoc_ema=KEPT, train__num_steps=3)
    first, last = (ema(tmp_path, step, 0.1) for step in (1, 3))
    fresh = init(jax.random.split(seeds.key(tiny_config().seed))[0])
    np.testing.assert_allclose(first["w"], fresh["w"], rtol=1e-6)
    assert np.isfinite(last["w"]).all() and not np.array_equal(first["w"], last["w"])


def test_the_default_stores_a_32nd_of_the_steps(tmp_path: Path) -> None:
    assert [posthoc_every_steps(tiny_config(train__num_steps=n).train) for n in (1, 32, 33, 70)] == [1, 1, 2, 3]
    run(tmp_path, train__posthoc_ema=KEPT, train__num_steps=33, train__checkpoint_every_steps=40)
    assert steps_of(tmp_path / "posthoc") == list(range(2, 33, 2))
    ema(tmp_path, None, 0.07)  # at step 33, whose averages are in the checkpoint


def test_a_step_is_one_with_averages(kept: Path) -> None:
    assert load_ema(kept, "diffusion", 40, 0.07).step == 40 and load_ema(kept, "diffusion", None, 0.07).step == 48
    assert not np.array_equal(ema(kept, 40, 0.07)["w"], ema(kept, 48, 0.07)["w"])
    with pytest.raises(ValueError, match=r"step 41 has no averages stored\. Steps with averages are \[2, 4, 6"):
        load_ema(kept, "diffusion", 41, 0.07)


def test_the_weights_are_divided_as_asked(kept: Path) -> None:
    sharding = NamedSharding(mesh_of(2), PartitionSpec())
    found = load_ema(kept, "diffusion", None, 0.07, sharding=sharding)
    assert found.params["w"].sharding == sharding
    whole = load_ema(kept, "diffusion", None, 0.07)
    assert found.weights_hash == whole.weights_hash
    assert_same_bits(found.params, whole.params)


def test_damaged_averages_are_skipped_and_named(kept: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = shutil.copytree(kept, tmp_path / "run")
    flip_weights(folder / "posthoc" / "46")
    near = [
        np.abs(x - y).max() for x, y in zip(*(jax.tree.leaves(ema(f, 48, 0.15)) for f in (kept, folder)), strict=True)
    ]
    assert 0 < max(near) < 1e-4
    (line,) = damage_lines(caplog)
    assert "step 46 in" in line and "posthoc is damaged and skipped" in line
    flip_weights(folder / "posthoc" / "48")
    with pytest.raises(CheckpointError, match=r"step 48 in posthoc: .* restore the folder from a copy"):
        ema(folder, 48, 0.15)


def test_a_run_in_a_bucket_keeps_averages(bucket: FakeGcs, tmp_path: Path) -> None:
    changes: dict[str, Any] = dict(train__posthoc_ema=KEPT, train__posthoc_every_steps=1, train__num_steps=4)
    url: Any = f"{bucket.url}/run"
    run(url, **changes)
    run(tmp_path, **changes)
    assert_same_bits(ema(url, None, 0.08), ema(tmp_path, None, 0.08))
    assert_same_bits(ema(url, 3, 0.08), ema(tmp_path, 3, 0.08))


def test_a_length_that_the_averages_cannot_give_is_refused(kept: Path, tmp_path: Path) -> None:
    """Each remedy is followed."""
    with pytest.raises(ValueError, match=r"length 0\.004 at step 48 .* lengths 0\.05, 0\.1 at 24 steps: .* 10% is the"):
        load_ema(kept, "diffusion", None, 0.004)
    run(tmp_path / "none", train__num_steps=2)
    with pytest.raises(ValueError, match=r"keeps no averages .*set the length to 0\.0 .*'\(0\.05, 0\.1\)'") as caught:
        load_ema(tmp_path / "none", "diffusion", None, 0.07)
    given = re.search(r"--config\.train\.posthoc_ema='(.*)'", str(caught.value))
    assert given
    run(tmp_path / "some", train__posthoc_ema=eval(given[1]), train__posthoc_every_steps=1)
    load_ema(tmp_path / "some", "diffusion", None, 0.07)
    with pytest.raises(ValueError, match=r"has no checkpoint and no averages: train it first"):
        workdir.write_config(tmp_path / "new", workdir.read_config(kept))
        load_ema(tmp_path / "new", "diffusion", None, 0.07)


def test_lengths_are_checked_before_training(tmp_path: Path) -> None:
    """Each remedy is followed."""

    def check(**changes: Any) -> None:
        train.check_steps(
            tiny_config(**dict(train__num_steps=64, train__checkpoint_every_steps=32) | changes), str(tmp_path)
        )

    asks: list[dict[str, Any]] = [{"eval__emas": (0.0, 0.07)}, {"sample__ema": 0.07}, {"eval__guides": ("", "~0.07")}]
    for asked in asks:
        with pytest.raises(ValueError, match=r"this run keeps no averages .*train\.posthoc_ema='\(0\.05, 0\.1\)'"):
            check(**asked)
        check(train__posthoc_ema=KEPT, **asked)
    few: dict[str, Any] = dict(train__posthoc_ema=KEPT, eval__emas=(0.02,))
    with pytest.raises(ValueError, match=r"0\.02 at step 64 .* at 4 steps.*or store them more often, by a smaller"):
        check(train__posthoc_every_steps=16, **few)
    check(train__posthoc_every_steps=2, **few)
    steps: dict[str, Any] = dict(train__posthoc_ema=KEPT, eval__emas=(0.07,), eval__steps=(33, 64))
    with pytest.raises(ValueError, match=r"has 33, which will not .* set train\.posthoc_every_steps to 33 or to a div"):
        check(train__posthoc_every_steps=2, **steps)
    check(train__posthoc_every_steps=33 // 11, **steps)
    with pytest.raises(ValueError, match=r"has 33, which will not .* set train\.snapshot_every_steps to 33"):
        check(train__posthoc_every_steps=3, **steps | dict(eval__emas=(0.0, 0.07)))
    small: dict[str, Any] = dict(
        model_guide__channel_mult=(1,), model_guide__attention_resolutions=(), eval__guides=("guide~0.02",)
    )
    with pytest.raises(ValueError, match=r"0\.02 at step 64 .* at 4 steps"):
        check(train__posthoc_ema=KEPT, train__posthoc_every_steps=16, **small)
    check(train__posthoc_ema=KEPT, train__posthoc_every_steps=2, **small)
    with pytest.raises(ValueError, match=r"has 40.*posthoc_every_steps"):
        check(train__posthoc_ema=KEPT, train__posthoc_every_steps=3, eval__guides=("@40~0.07",))


def test_sample_grids_of_training_have_the_own_ema(tmp_path: Path) -> None:
    config = tiny_config(sample__ema=0.07, train__posthoc_ema=KEPT)
    with pytest.raises(ValueError, match=r"sample\.ema is 0\.07, .* set train\.sample_every_steps to 0"):
        train.preview(config, mesh_of(1), str(tmp_path), tuple("0123456789"))


@pytest.mark.parametrize("field", ["train.posthoc_ema", "eval.emas", "sample.ema"])
def test_lengths_in_a_config_are_in_range(field: str) -> None:
    group, _, name = field.partition(".")
    for value in (0.3, -0.1, float("nan")):
        config: Any = tiny_config().copy_and_resolve_references().unlock()
        config[group][name] = value if name == "ema" else (0.05, value)
        with pytest.raises(ValueError, match=rf"config\.{field} is .*; expected .*<= 0\.288675"):
            complete(config)
