"""The lock of a run in a bucket: one job at a time, taken over when it stands still, and lost without harm."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gcs import FakeGcs

from cfd.devices import preemption
from cfd.errors import UserError
from cfd.runs import access, files, lease

ELSEWHERE = "give another --workdir"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(lease.SECONDS, "1.5")


@pytest.fixture(params=["disk", "memory", "bucket"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder of each kind of store, which does not exist yet."""
    local = {"disk": f"file://{tmp_path}/run", "memory": f"memory://{tmp_path.name}/run"}
    return local.get(request.param) or f"{request.getfixturevalue('bucket').url}/run"


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The reasons for which leases were lost."""
    reasons: list[str] = []
    monkeypatch.setattr(preemption, "lose", reasons.append)
    yield reasons


def held(folder: str) -> dict[str, Any] | None:
    """The content of the lock of a folder."""
    content = files.store(folder).read("lock").result()
    return json.loads(content.value) if content.state == "value" else None


def steal(folder: str, **holder: Any) -> None:
    """Another job's name in the lock, as after it was taken over."""
    other = {"pid": 7, "host": "elsewhere", "start_time": "2026-01-01", "id": "1", "lease_seconds": 1.5, **holder}
    files.store(folder).write("lock", json.dumps(other).encode()).result()


def until(happened: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextlib.contextmanager
def renewed(folder: str) -> Iterator[None]:
    """Another job, which lives: its lock gets a new generation again and again."""
    stop = threading.Event()

    def live() -> None:
        while not stop.wait(0.2):
            steal(folder)

    steal(folder)
    thread = threading.Thread(target=live)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_one_job_holds_a_folder_and_leaves_nothing(folder: str, lost: list[str]) -> None:
    with lease.leased(folder, ELSEWHERE) as ours:
        first = files.store(folder).read("lock").result().stamp.generation
        holder = held(folder)
        assert holder is not None and (holder["pid"], holder["host"]) == (os.getpid(), os.uname().nodename)
        until(lambda: files.store(folder).read("lock").result().stamp.generation != first)
        assert held(folder) == holder and lease.problem(ours) == "" and lease.stands(ours)
        message = f"{folder} is locked by pid {os.getpid()} on .* two jobs cannot write .*; stop the other job or give"
        with pytest.raises(UserError, match=message), lease.leased(folder, ELSEWHERE):
            pass
        with lease.leased(f"{folder}2", ELSEWHERE):  # the remedy
            pass
    assert held(folder) is None and lost == []
    for end in (KeyError(), KeyboardInterrupt(), preemption.Stopped("Stopped")):
        with pytest.raises(type(end)), lease.leased(folder, ELSEWHERE):
            raise end
        assert held(folder) is None
    with lease.leased(folder, ELSEWHERE):  # the other remedy
        pass


def test_a_live_job_is_not_disturbed(folder: str) -> None:
    with renewed(folder), pytest.raises(UserError, match="locked by pid 7 on elsewhere since 2026-01-01"):  # noqa: SIM117
        with lease.leased(folder, ELSEWHERE):
            pass
    assert (held(folder) or {})["pid"] == 7


def test_a_dead_jobs_lock_is_taken_over_after_it_stood_still(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time is that which the dead job promised, and a line tells who is waited for, and for how long."""
    monkeypatch.setenv(lease.SECONDS, "0.2")
    steal(folder, lease_seconds=1.0)
    began = time.monotonic()
    with lease.leased(folder, ELSEWHERE):
        assert time.monotonic() - began >= 1.0
        assert (held(folder) or {})["pid"] == os.getpid()
    said = capsys.readouterr().out
    assert f"{folder} is locked by pid 7 on elsewhere since 2026-01-01. Waiting for up to 1 s" in said
    assert "not renewed its lock for 1 s. This one takes it over." in said
    assert held(folder) is None


@pytest.mark.parametrize("content", [b"", b"{", b"null", b'{"pid": 1}'])
def test_a_damaged_lock_does_not_lock_for_ever(content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """One without content was copied from a disk, with the rest of a run that has ended, and is not waited for."""
    monkeypatch.setenv(lease.SECONDS, "0.2")
    folder = "memory://damaged/run"
    files.store(folder).write("lock", content).result()
    with lease.leased(folder, ELSEWHERE):
        assert (held(folder) or {})["pid"] == os.getpid()


def test_two_that_take_over_at_once_do_not_both_get_it(folder: str) -> None:
    steal(folder)
    inside, refused, most = [], [], []

    def start() -> None:
        try:
            with lease.leased(folder, ELSEWHERE):
                inside.append(1)
                most.append(len(inside))
                until(lambda: len(refused) == 3)
                inside.pop()
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and len(refused) == 3 and all(f"pid {os.getpid()}" in text for text in refused)


def test_a_stolen_lease_is_noticed_and_left_to_the_thief(folder: str, lost: list[str]) -> None:
    with lease.leased(folder, ELSEWHERE) as ours:
        steal(folder)
        assert f"{folder} is locked by pid 7 on elsewhere since 2026-01-01, and no longer by" in lease.problem(ours)
        until(lambda: lost)
        assert lost == [lease.problem(ours)] and "stopped without saving; stop the other job and start" in lost[0]
    assert (held(folder) or {})["pid"] == 7


def test_a_deleted_lease_is_lost(folder: str, lost: list[str]) -> None:
    """Another job may have held it in the meantime."""
    with lease.leased(folder, ELSEWHERE):
        files.store(folder).delete_range(files.store(folder).KeyRange()).result()
        until(lambda: lost)
        assert f"the lock of {folder} was deleted" in lost[0]
    assert held(folder) is None
    with lease.leased(folder, ELSEWHERE):  # the remedy: start it again
        pass


@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_lost_answers_do_not_lose_the_lease(method: str, bucket: FakeGcs, lost: list[str]) -> None:
    """The first answer to a creation, a renewal and a deletion is lost. TensorStore then reports a refusal."""
    folder, answered = f"{bucket.url}/run", set()

    def lose(request: Any) -> bool:
        number = sum(r.method == method and r.name == "run/lock" for r in bucket.requests)
        first = request.method == method and request.name == "run/lock" and number in (1, 3)
        answered.add(number) if first else None
        return first

    bucket.lose = lose
    with lease.leased(folder, ELSEWHERE) as ours:
        generation = bucket.objects["run/lock"].generation
        until(lambda: bucket.objects["run/lock"].generation > generation + 2)
        assert lease.stands(ours)
    assert bucket.names() == [] and lost == [] and answered


@pytest.mark.parametrize("status", [429, 503, 403])
def test_a_storm_does_not_lose_the_lease(status: int, bucket: FakeGcs, lost: list[str]) -> None:
    """It lasts for longer than the lease. Within it, no save is made final; after it, the lease is renewed."""
    folder = f"{bucket.url}/run"
    with access.lock(folder):
        ours = access._leases[0]
        bucket.fail = lambda request: status
        until(lambda: not lease.stands(ours))
        preemption.check_held()
        with pytest.raises(OSError, match=rf"{status}|no answer within"):
            access.still_held(f"{folder}/checkpoints/3")
        bucket.fail = lambda request: None
        until(lambda: lease.stands(ours))
        preemption.check_held()
        access.still_held(f"{folder}/checkpoints/3")
    assert bucket.names() == [] and lost == []


def test_a_holder_that_was_away_in_a_storm_finds_the_new_holder(bucket: FakeGcs) -> None:
    """The run is asked to stop, and stops without saving, with the name of the new holder."""
    folder = f"{bucket.url}/run"
    with preemption.stopping_on_request(), access.lock(folder):
        assert not preemption.requested()
        steal(folder)
        for check in (preemption.check_held, lambda: access.still_held(f"{folder}/checkpoints/3")):
            with pytest.raises(preemption.Lost, match="locked by pid 7 on elsewhere"):
                check()
        access.still_held(f"{bucket.url}/run2/checkpoints/3")  # another folder
        until(preemption._requested.is_set)
        with pytest.raises(preemption.Lost, match="locked by pid 7 on elsewhere"):
            preemption.requested()
    with access.lock(f"{bucket.url}/other"):  # in a notebook, without a handler of signals
        preemption.lose("stolen")
    assert not preemption.requested()
    preemption.check_held()  # without a lock, there is none to lose
    access.still_held(f"{folder}/checkpoints/3")


def test_without_a_permission_the_remedies_are_named(bucket: FakeGcs) -> None:
    bucket.fail = lambda request: 403 if request.method == "POST" else None
    with (
        pytest.raises(UserError, match=r"no permission to write.*: run .*; or give --out=DIR"),
        access.lock(f"{bucket.url}/run", "give --out=DIR"),
    ):
        pass
    bucket.fail = lambda request: 403 if request.method == "POST" and request.name == "run/lock" else None
    with (
        pytest.raises(UserError, match=r"cannot be written \(.*403.*\): give --out=DIR"),
        access.lock(f"{bucket.url}/run", "give --out=DIR"),
    ):
        pass
    assert bucket.names() == []


@pytest.mark.parametrize("text", ["", "0", "-1", "a minute", "nan", "inf"])
def test_a_duration_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(lease.SECONDS, text)
    with pytest.raises(UserError, match=f"CFD_LEASE_SECONDS is '{text}' in the environment; expected a number"):
        lease.lease_seconds()
    monkeypatch.delenv(lease.SECONDS)  # the remedy
    assert lease.lease_seconds() == lease.DEFAULT_SECONDS
