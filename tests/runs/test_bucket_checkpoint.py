"""Checkpoints in a bucket: only a complete step counts, whatever request is the last one that a job sends.

Real requests go to a bucket on loopback; nothing of Orbax is replaced.
"""

import gc
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import CONFIG_JSON, abstract, damage_lines, make_state, opened, same_bits, save
from gcs import FakeGcs, Request

from cfd import loading
from cfd.runs import access, checkpoint, files, steps, workdir
from cfd.runs.checkpoint import CheckpointError

# After a failed write, Orbax closes its event loop, and writes that are still running complain of it.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def run(bucket: FakeGcs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The folder of a run in the bucket. Nothing may be written to the working directory."""
    monkeypatch.chdir(tmp_path)
    yield f"{bucket.url}/run"
    gc.collect()
    assert not os.listdir(tmp_path)


@pytest.fixture
def two_steps_there(run: str) -> str:
    """The run, with steps 1 and 2."""
    workdir.write_config(run, CONFIG_JSON)
    with opened(run) as manager:
        save(manager, 1, make_state(1))
        save(manager, 2, make_state(2))
    return run


def listed(run: str, name: str = "checkpoints") -> list[int]:
    return steps.steps_of(files.place(run, name))


def folders(bucket: FakeGcs, name: str = "checkpoints") -> set[str]:
    """The folders of checkpoints that have any object."""
    return {object.split("/")[2] for object in bucket.names(f"run/{name}/")}


def check_restores(run: str, step: int) -> None:
    with opened(run) as manager:
        found = checkpoint.restore(manager, abstract(make_state(0)))
    assert found is not None and found[0] == step and same_bits(found[1], make_state(step))
    assert found[2] == {"next_step": step}


def stopped_after(bucket: FakeGcs, number: int, what: Callable[[Request], bool]) -> None:
    """As if the job were killed: after so many requests of a kind, the bucket changes no more."""
    count = 0

    def fail(request: Request) -> int | None:
        nonlocal count
        count += what(request)
        return 403 if count > number and request.method != "GET" else None

    bucket.fail = fail


def is_change(request: Request) -> bool:
    return request.method in ("POST", "DELETE", "PUT") and "upload_id" not in request.query


def test_everything_comes_back_and_old_steps_are_deleted(bucket: FakeGcs, run: str) -> None:
    template = abstract(make_state(0))
    with opened(run) as manager:
        assert checkpoint.restore(manager, template) is None and checkpoint.latest_step(manager) is None
        for step in (1, 2, 5):
            save(manager, step, make_state(step))
        save(manager, 2, make_state(7))  # a step that is there is left as it is
        assert checkpoint.latest_step(manager) == 5
        restored = checkpoint.restore(manager, template)
        assert restored is not None and restored[0] == 5 and same_bits(restored[1], make_state(5))
    assert listed(run) == [2, 5] and folders(bucket) == {"2", "5"}
    check_restores(run, 5)


def test_multiples_of_keep_every_are_kept_for_good(bucket: FakeGcs, run: str) -> None:
    with opened(run, keep=1, keep_every=4) as manager:
        for step in (2, 4, 5, 8, 9, 11):
            save(manager, step, make_state(step, rows=1))
    assert listed(run) == [4, 8, 11] and folders(bucket) == {"4", "8", "11"}
    with opened(run, keep=1) as manager:  # asked to keep no more, a run deletes those that it kept
        save(manager, 12, make_state(12, rows=1))
    assert listed(run) == [12] and folders(bucket) == {"12"}


def test_the_commit_file_is_the_first_to_go(bucket: FakeGcs, two_steps_there: str) -> None:
    bucket.reset_counts()
    with opened(two_steps_there, keep=1) as manager:
        save(manager, 3, make_state(3))
    deleted = [r.name for r in bucket.requests if r.method == "DELETE" and r.name.startswith("run/checkpoints/1/")]
    assert deleted[0] == "run/checkpoints/1/commit_success.txt" and len(deleted) > 5
    committed = [r.name for r in bucket.requests if is_change(r)].index("run/checkpoints/3/commit_success.txt")
    assert committed < [r.name for r in bucket.requests if is_change(r)].index(deleted[0])


def test_a_deletion_that_is_cut_short_leaves_no_step(bucket: FakeGcs, run: str) -> None:
    for number in (0, 1, 2, 9):
        with opened(run) as manager:
            save(manager, 1, make_state(1, rows=1))
        stopped_after(bucket, number, lambda r: is_change(r) and r.name.startswith("run/checkpoints/1/"))
        with pytest.raises(Exception, match=r"403|PERMISSION"):
            steps.remove(files.place(run, "checkpoints", "1"))
        bucket.fail = lambda request: None
        assert listed(run) == ([1] if number == 0 else []) and folders(bucket) == {"1"}, number
        with opened(run):
            assert folders(bucket) == ({"1"} if number == 0 else set()), number


def test_a_save_that_is_cut_short_leaves_no_step(bucket: FakeGcs, two_steps_there: str, tmp_path: Path) -> None:
    """The objects of step 3 appear one after the other, and a job may be killed after each."""
    run, there = two_steps_there, dict(bucket.objects)
    bucket.reset_counts()
    with opened(run, keep=3) as manager:
        save(manager, 3, make_state(3))
    written = [r.name for r in bucket.requests if is_change(r) and r.name.startswith("run/checkpoints/3/")]
    last = "run/checkpoints/3/commit_success.txt"
    assert written[-1] == last and written.count(last) <= 2
    complete = {name: x for name, x in bucket.objects.items() if name.startswith("run/checkpoints/3/")}
    unfinished = bucket.objects["run/checkpoints/3/_CHECKPOINT_METADATA"].content
    unfinished = re.sub(rb'"commit_timestamp_nsecs": \d+', b'"commit_timestamp_nsecs": null', unfinished)
    names = [*dict.fromkeys(name for name in written if name in complete)]
    assert {*names} == {*complete}
    for number in range(1, len(names)):
        bucket.objects = dict(there)
        for name in names[:number]:
            bucket.put(name, complete[name].content)
        if number < len(names) - 1 and "run/checkpoints/3/_CHECKPOINT_METADATA" in names[:number]:
            bucket.put("run/checkpoints/3/_CHECKPOINT_METADATA", unfinished)
        assert listed(run) == [1, 2]
        with opened(run, keep=3) as manager:
            assert folders(bucket) == {"1", "2"}, names[number - 1]
    check_restores(run, 2)


def test_a_flipped_byte_a_missing_object_and_a_second_time(
    bucket: FakeGcs, two_steps_there: str, caplog: pytest.LogCaptureFixture
) -> None:
    def largest(step: int) -> str:
        return max(bucket.names(f"run/checkpoints/{step}/state/"), key=lambda name: len(bucket.objects[name].content))

    run = two_steps_there
    bucket.flip(largest(2))
    good = dict(bucket.objects)
    check_restores(run, 1)
    assert len(damage_lines(caplog)) == 1 and "step 2 " in damage_lines(caplog)[0]
    assert listed(run) == [1] and folders(bucket) == {"1", "quarantine"}
    moved = {n.replace("quarantine/2.0", "2"): x.content for n, x in bucket.objects.items() if "quarantine/2.0" in n}
    assert moved == {name: x.content for name, x in good.items() if name.startswith("run/checkpoints/2/")}
    with opened(run) as manager:
        save(manager, 2, make_state(2))
    del bucket.objects[largest(2)]
    check_restores(run, 1)
    assert {name.split("/")[3] for name in bucket.names("run/checkpoints/quarantine/")} == {"2.0", "2.1"}
    with opened(run) as manager:
        save(manager, 2, make_state(2))
    check_restores(run, 2)


def test_a_step_without_its_commit_file_does_not_count(bucket: FakeGcs, two_steps_there: str) -> None:
    del bucket.objects["run/checkpoints/2/commit_success.txt"]
    assert listed(two_steps_there) == [1]
    check_restores(two_steps_there, 1)
    assert folders(bucket) == {"1"}  # the commit file of its state says that it was saved there, and not copied
    with opened(two_steps_there) as manager:
        save(manager, 2, make_state(2))
    check_restores(two_steps_there, 2)


def test_a_quarantine_that_is_cut_short(bucket: FakeGcs, two_steps_there: str) -> None:
    """The objects of step 2 are copied. One more is written, and then all are deleted."""
    run = two_steps_there
    bucket.flip(max(bucket.names("run/checkpoints/2/state/"), key=lambda name: len(bucket.objects[name].content)))
    there, objects = dict(bucket.objects), len(bucket.names("run/checkpoints/2/"))
    for number in (0, objects // 2, objects, objects + 1, objects + 2, 2 * objects):
        bucket.objects = dict(there)
        stopped_after(bucket, number, is_change)
        with pytest.raises(CheckpointError, match=r"steps \[2\] .* not moved to quarantine: .*Move or delete them"):
            check_restores(run, 2)
        bucket.fail = lambda request: None
        assert listed(run) == ([1, 2] if number <= objects else [1])
        check_restores(run, 1)
        assert listed(run) == [1] and folders(bucket) == {"1", "quarantine"}


def test_all_steps_damaged_is_an_error_and_nothing_moves(bucket: FakeGcs, two_steps_there: str) -> None:
    for step in (1, 2):
        del bucket.objects[f"run/checkpoints/{step}/meta/metadata"]
    template = abstract(make_state(0))
    with opened(two_steps_there) as manager:
        with pytest.raises(CheckpointError, match=r"step 2: .*step 1: .*allow_fresh"):
            checkpoint.restore(manager, template)
        assert listed(two_steps_there) == [1, 2]
        assert checkpoint.restore(manager, template, allow_fresh_start=True) is None
        save(manager, 1, make_state(1))
    check_restores(two_steps_there, 1)


def test_a_bucket_that_refuses_to_be_read_moves_nothing(bucket: FakeGcs, two_steps_there: str) -> None:
    for part in ("/d/", "meta/metadata", "state/_METADATA"):
        bucket.fail = lambda request, part=part: 403 if part in request.name and request.method == "GET" else None
        with pytest.raises(ValueError, match=r"checkpoints/2 cannot be read: .*Nothing was changed: start again"):
            check_restores(two_steps_there, 2)
    bucket.fail = lambda request: 403 if request.query.get("prefix") == "run/checkpoints/" else None
    with pytest.raises(CheckpointError, match=r"gs://cfd-test/run/checkpoints cannot be read: .*Forbidden"):
        checkpoint.open_manager(two_steps_there, keep=2)
    bucket.fail = lambda request: None
    assert folders(bucket) == {"1", "2"}
    check_restores(two_steps_there, 2)


@pytest.mark.parametrize("part", ["/d/", "commit_success.txt", "run/checkpoints/"])
def test_failed_saves(bucket: FakeGcs, run: str, caplog: pytest.LogCaptureFixture, part: str) -> None:
    """A bucket that refuses the arrays, the commit files, or every request about a step."""

    def failures() -> list[str]:
        return [r.getMessage() for r in caplog.records if "was not written" in r.getMessage()]

    def refuse(request: Request) -> int | None:
        whole = request.name or request.query.get("prefix", "")
        return 403 if part in whole and (part.endswith("checkpoints/") or is_change(request)) else None

    with opened(run) as manager:
        save(manager, 1, make_state(1))
        checkpoint.wait(manager)
        bucket.fail = refuse
        save(manager, 2, make_state(2))
        save(manager, 3, make_state(3))
        assert "checkpoint of step 2 was not written" in failures()[0]
        checkpoint.wait(manager)
        bucket.fail = lambda request: None
        assert len(failures()) == 2 and listed(run) == [1] and checkpoint.latest_step(manager) == 1
        bucket.put("run/checkpoints/3/state/late", b"")  # as a write that was still running when step 3 failed may do
        restored = checkpoint.restore(manager, abstract(make_state(0)))
        assert restored is not None and restored[0] == 1 and same_bits(restored[1], make_state(1))
        for step in (3, 4):
            save(manager, step, make_state(step))
        checkpoint.wait(manager)
        assert listed(run) == [3, 4] and folders(bucket) == {"3", "4"} and len(failures()) == 2
        bucket.fail = refuse
        with pytest.raises(
            CheckpointError, match=r"3 saves in a row failed .* step 7: .* is step 4; let this job write"
        ):
            for step in (5, 6, 7):
                save(manager, step, make_state(step))
                checkpoint.wait(manager)
        bucket.fail = lambda request: None
        save(manager, 8, make_state(8))
    assert listed(run) == [4, 8] and folders(bucket) == {"4", "8"}
    check_restores(run, 8)


def test_a_busy_bucket_is_asked_again(bucket: FakeGcs, run: str) -> None:
    """The first write of an array is refused with 503, and of a commit file with 429; one answer is lost."""
    first = {"/d/": 503, "meta/commit_success.txt": 429}
    bucket.fail = lambda request: next(
        (first.pop(part) for part in [*first] if part in request.name and is_change(request)), None
    )
    lost = iter([True])
    bucket.lose = lambda request: request.name.endswith("1/commit_success.txt") and next(lost, False)
    with opened(run) as manager:
        save(manager, 1, make_state(1))
        checkpoint.wait(manager)
        assert manager.failed_saves == 0 and not first and not next(lost, False)
    check_restores(run, 1)


def test_snapshots_are_all_kept_and_loaded(bucket: FakeGcs, run: str) -> None:
    workdir.write_config(run, CONFIG_JSON)
    emas = {step: {"ema": make_state(step, rows=1).ema} for step in (3, 6, 9)}
    for last in (6, 9):
        manager = checkpoint.open_snapshots(run)
        for step in range(3, last + 1, 3):
            checkpoint.save(manager, step, emas[step], data_state={}, config_json=CONFIG_JSON)
        checkpoint.close(manager)
    assert listed(run, "snapshots") == [3, 6, 9]
    for step, state in emas.items():
        ema = loading.load_ema(run, "diffusion", step)
        assert ema.step == step and same_bits(ema.params, state["ema"])


def test_a_run_is_loaded_while_its_job_deletes_steps(
    bucket: FakeGcs, two_steps_there: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Between the listing and the reading, step 2 is deleted, all or in part, and a newer one is there."""
    run = two_steps_there
    there = dict(bucket.objects)
    place = files.place(run, "checkpoints", "2")
    for cut in (False, True):
        bucket.objects = dict(there)
        with opened(run) as manager:
            save(manager, 3, make_state(3))
        newer = {name: x for name, x in bucket.objects.items() if "checkpoints/3/" in name}
        bucket.objects = dict(there)
        reads = 0

        def fail(request: Request, newer: Any = newer, cut: bool = cut) -> None:
            nonlocal reads
            reads += "checkpoints/2/state/" in request.name and request.method == "GET"
            if reads == 2 and "run/checkpoints/3/commit_success.txt" not in bucket.objects:
                for name in [name for name in bucket.objects if "checkpoints/2/" in name]:
                    if not cut or name.endswith("2/commit_success.txt") or "/d/" in name:
                        del bucket.objects[name]
                bucket.objects |= newer

        bucket.fail = fail
        ema = loading.load_ema(run, "diffusion")
        assert ema.step == 3 and same_bits(ema.params, make_state(3).ema) and not damage_lines(caplog)
        assert not steps.is_committed(place)
    bucket.fail = lambda request: None
    with pytest.raises(ValueError, match=r"gs://cfd-test/run/checkpoints has no step 2; its steps are \[1, 3\]"):
        loading.load_ema(run, "diffusion", 2)


@pytest.mark.parametrize("with_commit_files", [True, False])
def test_a_run_that_was_copied_from_a_disk(
    bucket: FakeGcs, run: str, tmp_path_factory: pytest.TempPathFactory, with_commit_files: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Older versions of Orbax write no commit files on a disk. The message says how to add them."""
    local = tmp_path_factory.mktemp("disk")
    workdir.write_config(local, CONFIG_JSON)
    with opened(local) as manager:
        save(manager, 1, make_state(1))
        save(manager, 2, make_state(2))
    for path in local.rglob("*"):
        if path.is_file() and (with_commit_files or path.name != "commit_success.txt"):
            bucket.put(f"run/{path.relative_to(local)}", path.read_bytes())
    if not with_commit_files:
        copied = dict(bucket.objects)
        with pytest.raises(
            ValueError, match=r"has no step; its steps are \[\]. gs://cfd-test/run/checkpoints has steps"
        ):
            loading.load_ema(run, "diffusion")
        with opened(run) as manager:
            with pytest.raises(CheckpointError, match="start again from step 0 with --allow_fresh_start") as refused:
                checkpoint.restore(manager, abstract(make_state(0)))
            assert checkpoint.restore(manager, abstract(make_state(0)), allow_fresh_start=True) is None
        lines = [r.getMessage() for r in caplog.records if "without a commit file" in r.getMessage()]
        assert len(lines) == 1 and "are not used: 1, 2." in lines[0] and lines[0] in str(refused.value)
        assert bucket.objects == copied
        command = shlex.split(lines[0][lines[0].index("python -c") :])
        subprocess.run([sys.executable, *command[1:]], check=True, timeout=100)
    assert loading.load_ema(run, "diffusion").step == 2
    check_restores(run, 2)
    assert listed(run) == [1, 2]


def test_a_copied_step_makes_room_for_one_that_is_saved(bucket: FakeGcs, two_steps_there: str) -> None:
    for part in ("", "state/", "meta/"):
        del bucket.objects[f"run/checkpoints/2/{part}commit_success.txt"]
    copied = {name: x.content for name, x in bucket.objects.items() if "checkpoints/2/" in name}
    with opened(two_steps_there) as manager:
        save(manager, 2, make_state(4)._replace(step=make_state(2).step))
    assert listed(two_steps_there) == [1, 2]
    moved = {n.replace("quarantine/2.0", "2"): x.content for n, x in bucket.objects.items() if "quarantine" in n}
    assert moved == copied


def test_a_job_that_has_lost_its_lease_commits_no_step(
    bucket: FakeGcs, two_steps_there: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = two_steps_there
    with access.lock(run), opened(run) as manager:
        save(manager, 3, make_state(3))
        checkpoint.wait(manager)

        def rob(request: Request) -> None:
            if request.name.endswith("4/state/commit_success.txt"):
                bucket.put("run/lock", b'{"id": "another", "pid": 1, "host": "h", "start_time": "now"}')

        bucket.fail = rob
        save(manager, 4, make_state(4))
        checkpoint.wait(manager)
        assert "step 4 was not written" in caplog.text and "no longer by this job" in caplog.text
        assert bucket.names("run/checkpoints/4/state/commit") and listed(run) == [2, 3]
        bucket.put("run/checkpoints/5/of_the_next_job", b"")
        there = bucket.names("run/checkpoints/")
        save(manager, 5, make_state(5))
        assert "step 5 was not written" in caplog.text
    assert bucket.names("run/checkpoints/") == there
    check_restores(run, 3)
