"""The host runs ahead of the devices, few rows are repeated on many devices, and neither changes what is trained."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from linear import assert_same_bits, bad_at, bad_loss, run
from meshes import mesh_of
from test_fit import lines, saved

from cfd.devices import preemption
from cfd.modes import fit as fit_module

RARELY: dict[str, Any] = dict(train__checkpoint_every_steps=100, train__log_every_steps=100)
"""A run that neither saves nor logs until its last step, so that nothing else makes the host wait."""


def bad_steps(*steps: int) -> Callable:
    """A loss that is not finite at these steps, counted from 1."""
    return bad_loss("data", bad_at(jax.random.split(jax.random.key(0))[1], list(steps)))


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The steps whose results each call of `check_finite` reads, for all calls that read any."""
    seen: list[list[int]] = []
    real = fit_module.check_finite

    def check(unchecked: Any, newest: int, *rest: Any) -> None:
        steps = [step for step, _ in unchecked]
        seen.append(steps[: len(steps) - newest])
        real(unchecked, newest, *rest)

    monkeypatch.setattr(fit_module, "check_finite", check)
    return seen


def test_the_host_looks_at_the_results_of_all_steps_but_waits_at_few(tmp_path: Path, looks: list[list[int]]) -> None:
    run(tmp_path, train__num_steps=50, **RARELY)
    every, lag = fit_module.CHECK_EVERY, fit_module.LAG
    assert list(itertools.chain(*looks)) == list(range(1, 51))
    assert [steps[-1] for steps in looks[:3]] == [every - lag, 2 * every - lag, 3 * every - lag]
    assert len(looks) == 3 + 2  # and at the last step, which is logged and saved


def test_fast_steps_are_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits, real = [], jax.block_until_ready
    monkeypatch.setattr(jax, "block_until_ready", lambda x: waits.append(1) or real(x))
    monkeypatch.setattr(fit_module, "SLOW_STEP", 1e6)
    run(tmp_path / "fast", train__num_steps=64, **RARELY)
    assert len(waits) == fit_module.CHECK_EVERY - 1  # until the speed of the steps is known
    waits.clear()
    monkeypatch.setattr(fit_module, "SLOW_STEP", 0.0)
    run(tmp_path / "slow", train__num_steps=64, **RARELY)
    assert len(waits) == 63
    assert_same_bits(saved(tmp_path / "fast")[1], saved(tmp_path / "slow")[1])


@pytest.mark.parametrize(("bad", "first"), [((5, 6, 7), 7), ((14, 15, 16, 17, 18), 16), (tuple(range(20, 60)), 22)])
def test_non_finite_steps_are_found_late_but_named_and_nothing_is_saved(
    tmp_path: Path, bad: tuple[int, ...], first: int
) -> None:
    """Also if finite steps follow. The run stops before the next look, and has logged and saved nothing since."""
    with pytest.raises(FloatingPointError, match=rf"at step {first} \(loss nan\), 3 in a row; .* is none of"):
        run(tmp_path, bad_steps(*bad), train__num_steps=60, **RARELY)
    assert lines(tmp_path) == []


def test_each_line_and_each_save_comes_after_a_look(tmp_path: Path) -> None:
    """As when the host waited at every step: a line says no more than that its own step was not finite."""
    rarely: dict[str, Any] = dict(train__checkpoint_every_steps=6, train__log_every_steps=2, train__num_steps=60)
    with pytest.raises(FloatingPointError, match=r"at step 9 .* last good checkpoint is step 6 of"):
        run(tmp_path, bad_steps(*range(7, 20)), **rarely)
    assert lines(tmp_path, "nonfinite_in_a_row") == [(2, 0), (4, 0), (6, 0), (8, 2)]
    with pytest.raises(FloatingPointError, match=r"at step 6 .* last good checkpoint is none of"):
        run(tmp_path / "b", bad_steps(4, 5, 6), **RARELY, train__snapshot_every_steps=6)
    assert not [path for path in (tmp_path / "b" / "snapshots").iterdir() if path.name.isdecimal()]


def test_a_wait_for_data_counts_only_while_the_devices_have_nothing_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = itertools.count()
    monkeypatch.setattr(fit_module, "time", SimpleNamespace(perf_counter=lambda: next(looks)))
    shares = {}
    for name, ready in (("idle", True), ("busy", False)):
        with monkeypatch.context() as patch:
            patch.setattr(type(jax.numpy.zeros(())), "is_ready", lambda x, ready=ready: ready)
            run(tmp_path / name, train__num_steps=12, **RARELY)
        (shares[name],) = lines(tmp_path / name, "data_wait", "goodput")
    assert shares["busy"][1] < shares["idle"][1] and shares["busy"][2] > shares["idle"][2]


@pytest.mark.parametrize("rows, parts, fsdp", [(4, 1, 1), (6, 1, 2), (16, 4, 1)])
def test_rows_that_are_repeated_on_other_devices_train_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: int, parts: int, fsdp: int
) -> None:
    changes: dict[str, Any] = dict(train__batch_size=rows, train__num_microbatches=parts, train__num_steps=10)
    run(tmp_path / "one", **changes)
    assert "repeat" not in capsys.readouterr().out
    run(tmp_path / "many", mesh=mesh_of(8 // fsdp, fsdp), **changes)
    assert "fewer rows than the 8 devices" in capsys.readouterr().out
    one, many = (np.array(lines(tmp_path / name, "loss", "grad_norm")) for name in ("one", "many"))
    np.testing.assert_allclose(many, one, rtol=1e-5)
    states = (saved(tmp_path / "one")[1], saved(tmp_path / "many")[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *states)
    record = json.loads((tmp_path / "many" / "config.json").read_text())
    assert record["config"]["train"]["batch_size"] == rows


def test_a_job_that_has_lost_its_lock_saves_nothing(tmp_path: Path) -> None:
    """It is asked before each save, of a checkpoint and of a snapshot, after all that takes time."""
    answers = iter(["", "another job has it"])
    with preemption.holding(lambda: next(answers)), pytest.raises(preemption.Lost, match="another job has it"):
        run(tmp_path)
    assert saved(tmp_path)[0] == 2
    with preemption.holding(lambda: "another job has it"), pytest.raises(preemption.Lost):
        run(tmp_path / "b", train__snapshot_every_steps=1)
    assert not [p for p in (tmp_path / "b").glob("*/*") if p.name.isdecimal()]
