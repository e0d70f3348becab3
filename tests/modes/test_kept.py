"""Checkpoints that are kept for good, and snapshots of the EMA: every one of them, once, with the bits of its step."""

import itertools
from pathlib import Path
from typing import Any

import jax
import linear
import numpy as np
import pytest
from jax.sharding import Mesh
from linear import assert_same_bits
from meshes import mesh_of

from cfd.devices import preemption
from cfd.loading import load_ema


def run(folder: Path, mesh: Mesh | None = None, draw: Any = None, **changes: Any) -> None:
    """`fit` on the linear map, with a checkpoint every 5 steps of which the newest is kept."""
    fields: Any = dict(train__num_steps=12, train__checkpoint_every_steps=5, train__keep_checkpoints=1)
    linear.run(folder, mesh=mesh, draw=draw, **fields | changes)


def steps(folder: Path, name: str) -> list[int]:
    return sorted(int(p.name) for p in (folder / name).iterdir() if p.name.isdecimal())


def emas(folder: Path, *at: int) -> list[Any]:
    return [jax.tree.map(np.asarray, load_ema(folder, "diffusion", step).params) for step in at]


def test_no_snapshots_unless_they_are_asked_for(tmp_path: Path) -> None:
    run(tmp_path)
    assert steps(tmp_path, "checkpoints") == [12] and not (tmp_path / "snapshots").exists()


def test_multiples_are_saved_and_kept_though_no_checkpoint_is_due(tmp_path: Path) -> None:
    """On eight devices, four of which divide the parameters."""
    seen = {}

    def draw(step: int, ema: Any) -> np.ndarray:
        seen[step] = jax.tree.map(np.array, ema)
        return np.zeros((8, 8, 3), np.uint8)

    every: Any = dict(train__keep_every_steps=4, train__snapshot_every_steps=3)
    run(tmp_path / "run", mesh_of(2, 4), **every)
    assert steps(tmp_path / "run", "checkpoints") == [4, 8, 12]
    assert steps(tmp_path / "run", "snapshots") == [3, 6, 9, 12]
    run(tmp_path / "drawn", mesh_of(2, 4), draw, train__sample_every_steps=1)
    for step, ema in zip((3, 4, 6, 8, 9, 12), emas(tmp_path / "run", 3, 4, 6, 8, 9, 12), strict=True):
        assert_same_bits(ema, seen[step])


def test_both_may_be_asked_for_later(tmp_path: Path) -> None:
    run(tmp_path)
    run(tmp_path, train__num_steps=20, train__keep_every_steps=8, train__snapshot_every_steps=9)
    assert steps(tmp_path, "checkpoints") == [16, 20] and steps(tmp_path, "snapshots") == [18]


@pytest.mark.parametrize("crashes", [(4, 3, 9), (7, 6)])
def test_a_run_that_resumes_misses_no_snapshot_and_changes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crashes: tuple[int, ...]
) -> None:
    """An error after each number of steps of one start. The steps since the last checkpoint are done twice."""
    fields: Any = dict(train__snapshot_every_steps=2, train__keep_every_steps=3)
    run(tmp_path / "whole", **fields)
    written: dict[str, bytes] = {}
    for crash in (*crashes, None):
        calls = itertools.count(1)

        def requested(calls: Any = calls, crash: Any = crash) -> bool:
            if next(calls) == crash:
                raise RuntimeError("out of memory")
            return False

        with monkeypatch.context() as patch:
            patch.setattr(preemption, "requested", requested)
            try:
                run(tmp_path / "run", **fields)
            except RuntimeError:
                assert crash is not None
        whole = [step for step in (tmp_path / "run" / "snapshots").iterdir() if step.name.isdecimal()]
        now = {str(p): p.read_bytes() for step in whole for p in step.rglob("*") if p.is_file()}
        assert {name: now[name] for name in written} == written
        written = now
    assert steps(tmp_path / "run", "snapshots") == [2, 4, 6, 8, 10, 12]
    assert steps(tmp_path / "run", "checkpoints") == [3, 6, 9, 12]
    both = [emas(tmp_path / name, 2, 3, 4, 6, 8, 9, 10, 12) for name in ("whole", "run")]
    assert_same_bits(*both)


def test_a_run_with_a_snapshot_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its config can no longer change, because the snapshots of two configs would be mixed."""
    calls = itertools.count(1)

    def fail() -> bool:
        if next(calls) == 4:
            raise RuntimeError("out of memory")
        return False

    fields: Any = dict(train__snapshot_every_steps=2, train__log_every_steps=9)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(preemption, "requested", fail)
        run(tmp_path, **fields)
    assert steps(tmp_path, "snapshots") == [2] and not steps(tmp_path, "checkpoints")
    with pytest.raises(ValueError, match="another run's: seed: 0 there, 1 here"):
        run(tmp_path, seed=1, **fields)
    run(tmp_path, **fields)
    assert steps(tmp_path, "snapshots") == [2, 4, 6, 8, 10, 12]
