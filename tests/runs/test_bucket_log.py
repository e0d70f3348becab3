"""The metrics of a run in a bucket: every line once and in order, whatever the service does."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import jax
import numpy as np
import pytest
from event_files import records
from gcs import FakeGcs, Request

from cfd.devices import preemption
from cfd.runs import growing, log

METRICS = "run/metrics.jsonl"


def lines(bucket: FakeGcs) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without their times."""
    found = [json.loads(line) for line in bucket.objects[METRICS].content.splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in found]


def expected(last: int) -> list[dict[str, Any]]:
    return [{"step": step, "loss": 1.0 / step} for step in range(1, last + 1)]


def write(to: log.MetricsLog, *steps: int) -> None:
    for step in steps:
        log.write_metrics(to, step, {"loss": 1.0 / step})


def is_update(request: Request) -> bool:
    return request.method == "POST" and request.name == METRICS


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake bucket has no limit of updates, unless a test sets one."""
    monkeypatch.setattr(log, "UPDATE_SECONDS", 0.01)


@pytest.fixture
def start(bucket: FakeGcs) -> Iterator[Callable[[int], log.MetricsLog]]:
    """`start(step)` begins a log in the bucket, which is closed after the test."""
    started: list[log.MetricsLog] = []

    def begin(step: int) -> log.MetricsLog:
        started.append(log.metrics_log(f"{bucket.url}/run", step))
        return started[-1]

    before = threading.active_count()
    yield begin
    bucket.fail, bucket.lose = lambda request: None, lambda request: False
    for one in started:
        log.close(one)
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("uploads")]
    assert not left, f"{threading.active_count() - before} threads are left"


Start = Callable[[int], log.MetricsLog]


def test_many_lines_are_few_updates(bucket: FakeGcs, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The service accepts one update of an object per second. After a flush, all lines are there."""
    bucket.updates_per_second = 1.0
    put, statuses = bucket.put, []
    monkeypatch.setattr(bucket, "put", lambda *arguments: statuses.append(put(*arguments)) or statuses[-1])
    to = start(0)
    for first in (1, 501):
        write(to, *range(first, first + 500))
        log.flush(to)
        assert lines(bucket) == expected(first + 499)
    assert set(statuses) == {200} and sum(map(is_update, bucket.requests)) < 50


@pytest.mark.usefixtures("quick")
def test_a_flush_without_new_lines_asks_for_nothing(bucket: FakeGcs, start: Start) -> None:
    to = start(0)
    write(to, 1)
    log.flush(to)
    bucket.reset_counts()
    log.flush(to)
    assert bucket.requests == []


@pytest.mark.usefixtures("quick")
def test_a_killed_run_and_its_restart_have_every_step_once(bucket: FakeGcs, start: Start) -> None:
    for resumed, stopped in [(0, 7), (5, 6), (5, 12), (10, 15)]:
        to = start(resumed)
        write(to, *range(resumed + 1, stopped + 1))
        log.close(to)
        assert lines(bucket) == expected(stopped)
    torn = bucket.objects[METRICS].content + b'{"step": 16, "lo'
    bucket.put(METRICS, torn)
    start(14)
    assert lines(bucket) == expected(14)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("faults", ["busy", "lost"])
def test_a_busy_service_and_lost_answers_cost_no_line(bucket: FakeGcs, start: Start, faults: str) -> None:
    """A lost answer is the hard case: the object changes, and every further attempt is refused."""
    answers = iter([429, 503])
    for first in (1, 4):
        if faults == "busy":
            bucket.fail = lambda request: next(answers, None) if is_update(request) else None
        else:
            lost = iter([True])
            bucket.lose = lambda request, lost=lost: is_update(request) and next(lost, False)
        to = start(first - 1)
        write(to, first)
        if faults == "lost":
            more = iter([True])
            bucket.lose = lambda request, more=more: is_update(request) and next(more, False)
        write(to, first + 1)
        log.flush(to)
        write(to, first + 2)
        log.close(to)
        assert lines(bucket) == expected(first + 2)


@pytest.mark.usefixtures("quick")
def test_what_the_service_refuses_for_a_while_is_written_later(
    bucket: FakeGcs, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    """A flush does not wait for ever. The refusal is logged once, however often it is tried."""
    to = start(0)
    write(to, 1)
    log.flush(to)
    bucket.fail = lambda request: 403 if request.method == "POST" else None
    for step in (2, 3, 4):
        write(to, step)
        log.flush(to)
    assert lines(bucket) == expected(1)
    bucket.fail = lambda request: None
    log.flush(to)
    assert lines(bucket) == expected(4)
    said = [record.message for record in caplog.records if "metrics.jsonl" in record.message]
    assert len(said) == 2 and "was not written" in said[0] and "PERMISSION_DENIED" in said[0]
    assert said[1].endswith("metrics.jsonl is written again")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_job_does_not_overwrite_what_another_has_written(
    bucket: FakeGcs, start: Start, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    """Not even lines of the same content: the second start has the same lines as the first.

    One of several processes raises nothing where the others would wait for it. All of them stop at `check_held`.
    """
    reasons: list[str] = []
    monkeypatch.setattr(preemption, "lose", reasons.append)
    first = log.metrics_log(f"{bucket.url}/run", 0)
    write(first, 1, 2, 3)
    log.flush(first)
    second = start(3)
    with monkeypatch.context() as several:
        several.setattr(jax, "process_count", lambda: processes)
        write(first, 4)
        with pytest.raises(preemption.Lost, match="one job at a time") if processes == 1 else nullcontext():
            log.flush(first)
        assert lines(bucket) == expected(3)
        write(second, 4)
        log.flush(second)
        write(first, 5)
        log.flush(first)
        assert lines(bucket) == expected(4)
        with pytest.raises(preemption.Lost, match="one job at a time") if processes == 2 else nullcontext():
            log.close(first)
    assert len(reasons) == 1 and re.fullmatch(r"another program has written gs://.*/metrics\.jsonl: .*", reasons[0])
    assert caplog.text.count("metrics.jsonl is no longer written") == 1


@pytest.mark.usefixtures("quick")
def test_lines_that_a_stopped_job_adds_at_the_last_moment_are_cut(bucket: FakeGcs, start: Start) -> None:
    """A job that has lost its lease and does not know it writes between the reading and the writing of the next job."""
    first = start(0)
    write(first, 1, 2, 3)
    log.flush(first)
    late = iter([bucket.objects[METRICS].content + b'{"step": 4, "loss": 0.25}\n'])

    def fail(request: Request) -> None:
        if is_update(request) and (content := next(late, None)) is not None:
            bucket.put(METRICS, content)

    bucket.fail = fail
    second = log.metrics_log(f"{bucket.url}/run", 2)
    assert lines(bucket) == expected(2)
    write(second, 3)
    log.close(second)
    assert lines(bucket) == expected(3)


@pytest.mark.usefixtures("quick")
def test_tensorboard_gets_new_files_in_the_order_of_their_names(bucket: FakeGcs, start: Start) -> None:
    picture = np.zeros((4, 6, 3), np.uint8)
    for resumed in (0, 2):
        to = start(resumed)
        for step in (resumed + 1, resumed + 2):
            write(to, step)
            log.flush(to)
        log.write_image(to, resumed + 2, "grid", picture)
        log.close(to)
    names = bucket.names("run/tensorboard/")
    assert len(names) == 6 and all("tfevents" in name for name in names)
    found = [records(bucket.objects[name].content) for name in names]
    assert all(events[0].file_version == "brain.Event:2" for events in found)
    statuses = [[e.step for e in events if e.session_log.status == e.session_log.START] for events in found]
    assert statuses == [[1], [], [], [3], [], []]  # TensorBoard hides later steps that an earlier start wrote
    tags = [(e.step, value.tag) for events in found for e in events for value in e.summary.value]
    assert tags == [(1, "loss"), (2, "loss"), (2, "grid"), (3, "loss"), (4, "loss"), (4, "grid")]


def test_another_error_of_an_upload_is_raised(caplog: pytest.LogCaptureFixture) -> None:
    def put(data: bytes) -> None:
        raise ZeroDivisionError("in the thread")

    file = growing.GrowingUpload("somewhere", put, pause=0.0, shortest_pause=0.0)
    file.write(b"x")
    with pytest.raises(ZeroDivisionError, match="in the thread"):
        file.flush()
    file.close()
    assert caplog.text.count("somewhere is no longer written: in the thread") == 1


def test_nobody_waits_for_long_for_a_service_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The bytes are uploaded when it answers again."""
    monkeypatch.setattr(growing, "WAIT_SECONDS", 0.1)
    answers, uploaded = threading.Event(), []

    def put(data: bytes) -> None:
        answers.wait()
        uploaded.append(data)

    file = growing.GrowingUpload("somewhere", put, pause=0.0, shortest_pause=0.0)
    file.write(b"a")
    file.flush()
    assert "somewhere is not written yet: the service has not answered for 0.1 s" in caplog.text
    file.write(b"b")
    monkeypatch.setattr(growing, "WAIT_SECONDS", 60.0)
    answers.set()
    file.close()
    assert b"".join(uploaded) == b"ab"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("held", [True, False])
def test_a_job_whose_metrics_another_has_written_is_asked_to_stop(bucket: FakeGcs, start: Start, held: bool) -> None:
    """Without a lock, as in a notebook, the exception ends it, and the next run in the process is not asked to stop."""
    with preemption.stopping_on_request(), preemption.holding(lambda: "") if held else nullcontext():
        first = log.metrics_log(f"{bucket.url}/run", 0)
        start(0)
        write(first, 1)
        with pytest.raises(preemption.Lost, match=r"another program has written gs://"):
            log.flush(first)
        log.close(first)
        with pytest.raises(preemption.Lost, match=r"another program has written gs://") if held else nullcontext():
            assert not preemption.requested()
