"""Saves that fail because a disk is full: the run continues, and fails only if they go on failing."""

import gc
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from checkpoints import abstract, litter, make_state, only_litter_of, opened, same_bits, save, steps
from disk import file_size_limit, filled, small_disk

from cfd.runs import checkpoint
from cfd.runs.checkpoint import CheckpointError

# After a failed write, Orbax closes its event loop, and writes that are still running complain of it.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


LIMIT = r"File too large: raise the limit on the size of a file \(ulimit -f\)"
"""The reason and the remedy, where a limit on the size of a file makes saves fail."""


@pytest.fixture(autouse=True)
def no_late_complaints() -> Iterator[None]:
    """Complaints that garbage makes are made in the test that left it."""
    yield
    gc.collect()


def check_failed_saves(
    folder: Path, full: Callable[[], Any], caplog: pytest.LogCaptureFixture, rows: int, reason: str
) -> list[int]:
    """Saves to a disk that is full inside the context `full()`. Returns the steps in the folder at the end.

    `reason` is the system's reason and the remedy for it.
    """
    why, remedy = reason.split(": ")

    def failures() -> list[Any]:
        return [r for r in caplog.records if "was not written" in r.getMessage()]

    template = abstract(make_state(0, rows))
    with opened(folder) as manager:
        save(manager, 1, make_state(1, rows))
        checkpoint.wait(manager)
        with full():
            save(manager, 2, make_state(2, rows))
            save(manager, 3, make_state(3, rows))
            assert len(failures()) == 1
            message = failures()[0].getMessage()
            assert message == f"checkpoint of step 2 was not written in {folder / 'checkpoints'}: {why}"
            checkpoint.wait(manager)
            assert len(failures()) == 2 and steps(folder) == [1] and only_litter_of(folder, 2, 3)
        restored = checkpoint.restore(manager, template)
        assert restored is not None and restored[0] == 1 and same_bits(restored[1], make_state(1, rows))
        late = folder / "checkpoints" / "3.orbax-checkpoint-tmp" / "state"
        late.mkdir(parents=True, exist_ok=True)  # as a write that was still running when step 3 failed may do
        for step in (4, 5, 6):
            save(manager, step, make_state(step, rows))
            assert not late.exists()
        checkpoint.wait(manager)
        assert steps(folder) == [5, 6] and not litter(folder) and len(failures()) == 2
        with full():
            save(manager, 7, make_state(7, rows))
            save(manager, 8, make_state(8, rows))
            save(manager, 9, make_state(9, rows))
            with pytest.raises(
                CheckpointError, match=rf"3 saves in a row failed .* step 9: {why}. .* is step 6; {remedy} and"
            ):
                save(manager, 10, make_state(10, rows))
        assert steps(folder) == [5, 6] and only_litter_of(folder, 7, 8, 9)
        with full():
            save(manager, 11, make_state(11, rows))
            with pytest.raises(CheckpointError):
                checkpoint.wait(manager)
        save(manager, 12, make_state(12, rows))
    with opened(folder) as manager:
        assert not litter(folder)
        restored = checkpoint.restore(manager, template)
        assert restored is not None and restored[0] == 12 and same_bits(restored[1], make_state(12, rows))
    return steps(folder)


def test_litter_that_cannot_be_deleted_is_no_error(
    two_steps: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed save may still be writing to the folder, which is then deleted after the next save."""
    half = two_steps / "checkpoints" / "3.orbax-checkpoint-tmp" / "state"
    half.mkdir(parents=True)
    with monkeypatch.context() as patched:
        patched.setattr(os, "rmdir", os.readlink)  # which raises OSError for a folder
        manager = checkpoint.open_manager(two_steps, keep=2)
    assert "3.orbax-checkpoint-tmp was not deleted: OSError" in caplog.text
    save(manager, 3, make_state(3))
    checkpoint.close(manager)
    assert steps(two_steps) == [2, 3] and not litter(two_steps)


def test_failed_saves_by_a_limit_on_file_sizes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert check_failed_saves(tmp_path, lambda: file_size_limit(20_000), caplog, 64, LIMIT) == [6, 12]


def test_the_last_save_of_a_run_must_not_fail_unheard(two_steps: Path) -> None:
    manager = checkpoint.open_manager(two_steps, keep=2)
    with file_size_limit(20_000):
        save(manager, 3, make_state(3))
        with pytest.raises(
            CheckpointError,
            match=r"the last checkpoint, step 3, was not written in .*: File too large. .* step 2; raise",
        ):
            checkpoint.close(manager)
    assert steps(two_steps) == [1, 2] and only_litter_of(two_steps, 3)
    with opened(two_steps):
        assert not litter(two_steps)


@pytest.mark.slow
def test_failed_saves_on_a_full_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """On a file system of its own. Without the right to mount one: the limit on file sizes and a larger state."""
    disk = tmp_path / "disk"
    with small_disk(disk, megabytes=200) as mounted:
        full = partial(filled, disk, but=2_000_000) if mounted else partial(file_size_limit, 1_000_000)
        reason = "No space left on device: free space" if mounted else LIMIT
        assert check_failed_saves(disk, full, caplog, 16384, reason) == [6, 12]
