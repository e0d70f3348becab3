"""The EMA of a step is found in checkpoints and in snapshots, also while another job trains and deletes steps."""

import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest
from checkpoints import CONFIG_JSON, damage_lines, flip_weights, make_state, opened, same_bits, save, shardings

from cfd import loading
from cfd.loading import load_ema
from cfd.runs import checkpoint, workdir
from cfd.runs.checkpoint import CheckpointError
from cfd.runs.digest import weights_hash


def save_snapshots(folder: Path, *steps: int) -> None:
    manager = checkpoint.open_snapshots(folder)
    for step in steps:
        checkpoint.save(manager, step, {"ema": make_state(step).ema}, data_state={}, config_json=CONFIG_JSON)
    checkpoint.close(manager)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 4 and 6, and snapshots of steps 3, 6 and 9."""
    workdir.write_config(tmp_path, CONFIG_JSON)
    with opened(tmp_path) as manager:
        for step in (4, 6):
            save(manager, step, make_state(step))
    save_snapshots(tmp_path, 3, 6, 9)
    return tmp_path


def test_a_step_is_a_checkpoint_or_a_snapshot_and_the_newest_is_a_checkpoint(run: Path) -> None:
    for step in (None, 3, 4, 6, 9):
        ema = load_ema(run, "diffusion", step)
        assert ema.step == (6 if step is None else step)
        assert same_bits(ema.params, make_state(ema.step).ema)
        assert ema.weights_hash == weights_hash(make_state(ema.step).ema) and ema.config_json == CONFIG_JSON
    with pytest.raises(ValueError, match=r"has no step 5; its steps are \[4, 6\], and the snapshots .* \[3, 6, 9\]"):
        load_ema(run, "diffusion", 5)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ValueError, match=r"has no step; its steps are \[\], and the snapshots of the EMA are \[3, 6"):
        load_ema(run, "diffusion")


def test_a_damaged_snapshot_is_named(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    flip_weights(run / "snapshots" / "3")
    with pytest.raises(CheckpointError, match=r"no undamaged step 3 in .*step 3 in snapshots: .*restore the folder"):
        load_ema(run, "diffusion", 3)
    flip_weights(run / "checkpoints" / "6")
    assert same_bits(load_ema(run, "diffusion", 6).params, make_state(6).ema)  # from the snapshot
    assert load_ema(run, "diffusion").step == 4
    assert all("is damaged and skipped" in line for line in damage_lines(caplog)) and len(damage_lines(caplog)) == 3
    assert sorted(p.name for p in (run / "snapshots").iterdir()) == ["3", "6", "9"]


def test_the_hash_does_not_depend_on_the_sharding_that_was_saved(tmp_path: Path) -> None:
    workdir.write_config(tmp_path, CONFIG_JSON)
    state = make_state(1)
    hashes = []
    with opened(tmp_path, keep=9) as manager:
        for step, name in enumerate(("one", "fsdp", "columns")):
            save(manager, step, jax.tree.map(lambda x, put=shardings()[name]: jax.device_put(x, put(x)), state))
            checkpoint.wait(manager)
            hashes.append(load_ema(tmp_path, "diffusion", step).weights_hash)
    assert set(hashes) == {weights_hash(state.ema)}


def test_a_step_that_is_deleted_while_it_is_read_is_no_damage(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As by a job that trains: a newer step is there before the older one goes."""
    real, read = loading.read_verified, []

    def reading(place: Path, template: Any) -> Any:
        read.append(place.name)
        if len(read) == 1:
            with opened(run, keep=1) as manager:
                save(manager, 8, make_state(8))
        return real(place, template)

    monkeypatch.setattr(loading, "read_verified", reading)
    ema = load_ema(run, "diffusion")
    assert read == ["6", "8"] and same_bits(ema.params, make_state(8).ema) and not damage_lines(caplog)

    def deleting(place: Path, template: Any) -> Any:
        shutil.rmtree(place)
        return real(place, template)

    monkeypatch.setattr(loading, "read_verified", deleting)
    with pytest.raises(ValueError, match=r"has no step 8; its steps are \[\]"):
        load_ema(run, "diffusion", 8)


def train(folder: str, first: Any, stop: Any) -> None:
    """Saves one step after the other, of which it keeps one."""
    with opened(Path(folder), keep=1) as manager:
        for step in range(1, 10_000):
            save(manager, step, make_state(step, rows=4))
            checkpoint.wait(manager)
            first.set()
            if stop.is_set():
                break


def test_a_run_that_trains_can_be_read_at_any_moment(tmp_path: Path) -> None:
    workdir.write_config(tmp_path, CONFIG_JSON)
    context = multiprocessing.get_context("spawn")
    first, stop = context.Event(), context.Event()
    trainer = context.Process(target=train, args=(str(tmp_path), first, stop))
    trainer.start()
    try:
        assert first.wait(120)
        found = []
        for _ in range(20):
            ema = load_ema(tmp_path, "diffusion")
            assert same_bits(ema.params, make_state(ema.step, rows=4).ema)
            found.append(ema.step)
    finally:
        stop.set()
        trainer.join(60)
        trainer.kill()
    assert found == sorted(found) and found[-1] > found[0]
