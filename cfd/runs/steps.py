"""The steps in a folder of checkpoints or snapshots: which of them count, and how one is removed or moved.

On a disk, the folder of a step gets its name by a rename when the step is complete. A bucket cannot rename a folder.
There, the file COMMIT of a step is written last, and a step without it does not count. Before the files of a step are
deleted one by one, the file DELETED is written. A step that has it does not count either.
"""

import json
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import jax
import orbax.checkpoint as ocp
from absl import logging

from cfd.errors import reason_of
from cfd.runs import files
from cfd.runs.files import AnyPath
from cfd.runs.workdir import abbreviate

COMMIT = "commit_success.txt"
DELETED = "deleted.txt"
METADATA = "_CHECKPOINT_METADATA"
QUARANTINE = "quarantine"
TRASH = "trash"
UNFINISHED = f"*{ocp.path.atomicity_types.TMP_DIR_SUFFIX}*"
WAIT_SECONDS = 60
"""How long all files of a step may take to be deleted or asked for. TensorStore would wait for 15 minutes."""


def steps_of(directory: AnyPath) -> list[int]:
    """The steps in a folder of checkpoints or snapshots, as they are now, in ascending order."""
    return [step for step, counts in _numbered(directory) if counts]


def uncommitted(directory: AnyPath) -> list[int]:
    """The steps in a folder of a bucket that do not count, in ascending order. On a disk, there are none."""
    return [step for step, counts in _numbered(directory) if not counts]


def is_committed(place: AnyPath) -> bool:
    """Whether the folder of a step exists now and counts."""
    if isinstance(place, Path):
        return place.is_dir()
    found = files.names(place)
    return COMMIT in found and DELETED not in found


def sync_unfinished(directory: Path) -> None:
    """Flushes the files of a step to the disk. Orbax calls this just before the rename that makes the step visible.

    Orbax itself syncs the arrays but not the small files: after a power cut, the newest step could have empty metadata.
    """
    for step in directory.glob(UNFINISHED):
        for path in (*step.rglob("*"), step):
            files.fsync(path)


def remove_unfinished(directory: Path) -> None:
    """Deletes half-written steps, and old steps from the trash. Call it while no save is in progress.

    Orbax empties neither its trash nor, until it is opened again, the folders of failed saves, which would keep a full
    disk full.
    """
    if jax.process_index() != 0:
        return
    for old in (*directory.glob(UNFINISHED), *(directory / TRASH).glob("*")):
        try:
            # The folder is renamed first because a failed save may still be adding files to it. If that save makes the
            # folder again, it is deleted before the next save, or when the checkpoints are next opened.
            renamed = old.with_name(f"{old.name}.{time.time_ns()}")
            old.rename(renamed)
            shutil.rmtree(renamed)
        except OSError as e:  # the next call tries again
            logging.warning("%s was not deleted: %s", old, reason_of(e))


def is_litter(place: AnyPath) -> bool:
    """Whether a step in a bucket that does not count was left by a save or a deletion that was cut short.

    Otherwise, it was probably copied into the bucket from a disk, where Orbax writes no commit file, or is being
    copied.
    """
    if DELETED in files.names(place):
        return True
    if (content := files.read_bytes(place / METADATA)) is not None:
        try:
            if json.loads(content)["commit_timestamp_nsecs"] is None:
                return True  # no save comes to its end before this time is known
        except (ValueError, KeyError, TypeError):
            return False
    # The commit file of an item has its path: a copy of this step has the path that it was copied from.
    item = place / "state"
    return (files.read_bytes(item / COMMIT) or b"").decode(errors="replace").endswith(os.fspath(item))


def check_readable(place: AnyPath) -> None:
    """Raises an error of TensorStore or gcsfs, which have no common class, if a bucket refuses a file of a step.

    A file that is missing is no refusal.
    """
    kv, deadline = files.store(place), time.time() + WAIT_SECONDS
    for answer in [kv.read(name, byte_range=slice(0, 0)) for name in _files_in(place)]:
        answer.result(deadline=deadline)


def about_uncommitted(directory: AnyPath, steps: Sequence[int]) -> str:
    """In one line: these steps in a bucket have no commit file, and how to make them count."""
    text = abbreviate([str(step) for step in steps], separator=", ")
    add = f"[epath.Path(f'{os.fspath(directory)}/{{n}}/{COMMIT}').write_text('') for n in {list(steps)}]"
    return (
        f"{os.fspath(directory)} has steps without a commit file ({COMMIT}), which are not used: {text}. Steps copied "
        f'from a disk may lack it; if they are copied completely, add it: python -c "from etils import epath; {add}"'
    )


def hint(directory: AnyPath) -> str:
    """A sentence about the steps in a bucket that were probably copied there and do not count, or ""."""
    others = [step for step in uncommitted(directory) if not is_litter(directory / str(step))]
    return f". {about_uncommitted(directory, others)}" if others else ""


def remove(place: AnyPath) -> None:
    """Deletes a step in a bucket. The rest of a step whose deletion is cut short does not count.

    Raises an error of TensorStore or gcsfs, which have no common class, if the bucket refuses.
    """
    if found := _files_in(place):
        files.write_atomically(place / DELETED, b"")
        _delete(place, [COMMIT])
        _delete(place, [name for name in found if name not in (COMMIT, DELETED)])
        _delete(place, [DELETED])


def cleaned(directory: AnyPath) -> list[int]:
    """Deletes what saves and deletions that were cut short left in a bucket. Returns the steps that count."""
    left = uncommitted(directory)
    litter = [step for step in left if is_litter(directory / str(step))]
    deleted(directory, litter)
    if others := [step for step in left if step not in litter]:
        logging.warning("%s", about_uncommitted(directory, others))
    return steps_of(directory)


def deleted(directory: AnyPath, unwanted: list[int]) -> list[int]:
    """Deletes steps in a bucket. Returns those that are gone."""
    gone = []
    for step in unwanted:
        try:
            remove(directory / str(step))
            gone.append(step)
        except Exception as e:  # no common class, as in `remove`; the next call tries again
            logging.warning("%s was not deleted: %s", directory / str(step), reason_of(e))
    return gone


def set_aside(directory: AnyPath, step: int) -> AnyPath:
    """Moves a step into the folder QUARANTINE, under a name that is free there, and returns its new path.

    Raises the errors of `remove`, and OSError on a disk.
    """
    place, aside = directory / str(step), directory / QUARANTINE
    taken, number = files.names(aside), 0
    while (name := f"{step}.{number}") in taken:
        number += 1
    if isinstance(place, Path):
        os.makedirs(aside, exist_ok=True)
        os.rename(place, aside / name)
    else:
        found = _files_in(place)
        pairs = [os.fspath(place / file) for file in found], [os.fspath(aside / name / file) for file in found]
        fsspec.filesystem("gcs").copy(*pairs)
        remove(place)
    return aside / name


def make_room(directory: AnyPath, step: int, has_failed: bool) -> list[int]:
    """Removes what a bucket has at the place of a step that does not count, or moves it aside if it may be a copy.

    `has_failed` says that it is of a failed save. Returns [step] if it is moved. Raises the errors of `remove`.
    """
    place = directory / str(step)
    if not files.names(place):
        return []
    if has_failed or is_litter(place):
        remove(place)
        return []
    logging.warning("%s has no commit file and was moved to %s", place, set_aside(directory, step))
    return [step]


def _numbered(directory: AnyPath) -> list[tuple[int, bool]]:
    """[(step, whether it counts)] of all folders with the name of a number, in ascending order."""
    if isinstance(directory, Path):
        return sorted((int(path.name), True) for path in directory.glob("*") if path.name.isdecimal())
    numbers = sorted(int(name) for name in files.names(directory) if name.isdecimal())
    with ThreadPoolExecutor(8) as pool:  # a request for each
        counts = pool.map(lambda number: is_committed(directory / str(number)), numbers)
        return list(zip(numbers, counts, strict=True))


def _files_in(place: AnyPath) -> list[str]:
    """The names of all files of a step in a bucket, with slashes, as they are now."""
    above = os.fspath(place).partition("://")[2] + "/"
    found = fsspec.filesystem("gcs").find(os.fspath(place))
    return sorted(path.removeprefix(above) for path in found if path.startswith(above))


def _delete(place: AnyPath, names: Iterable[str]) -> None:
    kv, deadline = files.store(place), time.time() + WAIT_SECONDS
    for deleted in [kv.write(name, None) for name in names]:
        deleted.result(deadline=deadline)
