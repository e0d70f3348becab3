"""Real processes that train in a bucket and are killed, robbed of their lock, refused and misled: nothing is lost.

Each test runs the real command through tests/job.py against the bucket on loopback. See tests/test_faults.py for local
folders. The reference is always a local run that was never stopped.
"""

import json
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from gcs import FakeGcs, Request, Stored
from jobs import Start, assert_same_run, starting, steps_of, wait_for_step
from jobs import wait_until as until
from tiny import ROOT

from cfd.runs import files

slow = pytest.mark.slow
SUPERVISE = (sys.executable, str(ROOT / "launch" / "supervise.py"))
LEASE = {"CFD_LEASE_SECONDS": "2"}
SLOWLY = LEASE | {"JOB_STEP_SECONDS": "0.05"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Mapping[str, Stored]:
    """The objects of a run of 20 steps in a bucket, with checkpoints at 10 and 20."""
    with FakeGcs() as gcs, starting(cache) as start:
        folder = tmp_path_factory.mktemp("trained") / "run"
        job = start(folder, env=LEASE | gcs.environment, workdir=f"{gcs.url}/run", train__num_steps=20)
        assert job.finish() == [0], job.report()
        return dict(gcs.objects)


def steps_in(gcs: FakeGcs) -> list[int]:
    """The steps whose checkpoints are final."""
    found = (re.fullmatch(r"run/checkpoints/(\d+)/commit_success.txt", name) for name in gcs.names())
    return sorted(int(match[1]) for match in found if match)


def steal(gcs: FakeGcs) -> None:
    holder = {"pid": 7, "host": "elsewhere", "start_time": "2026-01-01", "id": "1", "lease_seconds": 2}
    gcs.put("run/lock", json.dumps(holder).encode())


@contextmanager
def renewed(gcs: FakeGcs) -> Iterator[None]:
    """Another job, which holds the lock and lives."""
    stop = threading.Event()

    def live() -> None:
        while not stop.wait(0.2):
            steal(gcs)

    steal(gcs)
    thread = threading.Thread(target=live)
    thread.start()
    yield
    stop.set()
    thread.join()


def storms(seed: int, share: float) -> Callable[[Request], int | None]:
    """Answers this share of the requests with 429 or 503."""
    rng = random.Random(seed)
    return lambda request: rng.choice([429, 503]) if rng.random() < share else None


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kills, steps", [(1, 40), pytest.param(10, 400, marks=slow)])
def test_killed_at_random_steps_of_one_process(
    kills: int, steps: int, start: Start, reference: Any, bucket: FakeGcs, tmp_path: Path
) -> None:
    """The next start waits until the lock of the killed one has stood still. In the end nothing but the run is left."""
    folder, url, rng = tmp_path / "run", f"{bucket.url}/run", random.Random(0)
    fields: dict[str, Any] = dict(workdir=url, train__num_steps=steps, train__checkpoint_every_steps=5)
    for at in sorted(rng.sample(range(8, steps - 5), kills)):
        job = start(folder, env=SLOWLY | {"JOB_HANG": f"main:{at + 4}"}, **fields)  # it never ends by itself
        wait_for_step(job, at)
        time.sleep(rng.uniform(0.0, 0.3))
        job.send(signal.SIGKILL)
        assert job.finish() == [-signal.SIGKILL]
        assert "run/lock" in bucket.objects
    job = start(folder, env=LEASE, **fields)
    assert job.finish() == [0], job.report()
    assert re.search(r"is locked by pid \d+ on .* Waiting for up to 2 s", job.text())
    assert "run/lock" not in bucket.objects
    assert_same_run(folder, reference(steps, 1), url)


@slow
@pytest.mark.timeout(1800)
def test_killed_at_random_steps_of_two_supervised_processes(
    start: Start, reference: Any, bucket: FakeGcs, tmp_path: Path
) -> None:
    """The supervisor starts both again, by turns after the death of one and of the other."""
    folder, url, rng = tmp_path / "run", f"{bucket.url}/run", random.Random(1)
    job = start(
        folder,
        env=SLOWLY,
        prefix=(*SUPERVISE, "--processes=2", "--grace-seconds=15", "--"),
        workdir=url,
        train__num_steps=60,
        train__checkpoint_every_steps=5,
    )
    for kill, at in enumerate((13, 31, 44)):
        until(lambda at=at: any(done["step"] >= at for done in steps_of(folder)), job, 600)
        time.sleep(rng.uniform(0.0, 0.3))
        pid = job.processes[0].pid
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        os.kill(children[kill % 2], signal.SIGKILL)
        before = len(steps_of(folder))
        until(lambda before=before: len(steps_of(folder)) > before + 1, job, 600)
    assert job.finish(600) == [0], job.report()
    assert len(steps_of(folder)) > 60
    assert_same_run(folder, reference(60, 2), url)


@pytest.mark.timeout(600)
def test_a_live_run_is_left_alone_and_a_robbed_one_does_not_save(start: Start, bucket: FakeGcs, tmp_path: Path) -> None:
    """A second job is refused. When a third has taken the lock, the first ends with its name, and saves no more."""
    folder, url = tmp_path / "run", f"{bucket.url}/run"
    env = {"CFD_LEASE_SECONDS": "6", "JOB_STEP_SECONDS": "0.05"}
    fields: dict[str, Any] = dict(workdir=url, train__num_steps=100_000, train__checkpoint_every_steps=40)
    first = start(folder, env=env, **fields)
    wait_for_step(first, 3)
    second = start(folder, env=env, **fields)
    assert second.finish() == [1]
    pid = first.processes[0].pid
    assert re.search(rf"error: {url} is locked by pid {pid} on .*: two jobs cannot write to one folder", second.text())
    until(lambda: 40 in steps_in(bucket), first)
    with renewed(bucket):
        saved = steps_in(bucket)
        assert first.finish() == [1], first.report()
        [line] = [line for line in first.text().splitlines() if line.startswith("error: ")]
        assert f"{url} is locked by pid 7 on elsewhere" in line and "without saving" in line
        assert steps_in(bucket) == saved
    assert json.loads(bucket.objects["run/lock"].content)["pid"] == 7


@slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_stopped_run_leaves_no_lock(
    processes: int, start: Start, reference: Any, bucket: FakeGcs, tmp_path: Path
) -> None:
    """It exits with code 75, and the next start does not wait."""
    folder, url = tmp_path / "run", f"{bucket.url}/run"
    job = start(folder, processes=processes, env=SLOWLY, workdir=url, train__num_steps=60)
    wait_for_step(job, 13)
    job.send(signal.SIGTERM)
    assert job.finish() == [75] * processes, job.report()
    assert "run/lock" not in bucket.objects
    job = start(folder, processes=processes, env=LEASE, workdir=url, train__num_steps=60)
    assert job.finish() == [0] * processes and "Waiting" not in job.text(), job.report()
    assert len(steps_of(folder)) == 60
    assert_same_run(folder, reference(60, processes), url)


@slow
@pytest.mark.timeout(600)
def test_two_processes_that_are_robbed_both_end(start: Start, bucket: FakeGcs, tmp_path: Path) -> None:
    folder, url = tmp_path / "run", f"{bucket.url}/run"
    fields: dict[str, Any] = dict(workdir=url, train__num_steps=100_000, train__checkpoint_every_steps=40)
    job = start(folder, processes=2, env=SLOWLY, **fields)
    until(lambda: 40 in steps_in(bucket), job)
    with renewed(bucket):
        saved = steps_in(bucket)
        assert job.finish() == [1, 1], job.report()
        assert steps_in(bucket) == saved
    assert "locked by pid 7 on elsewhere" in job.text(0)
    assert "error: process 0 has lost the lock" in job.text(1)


@slow
@pytest.mark.timeout(600)
def test_a_frozen_run_that_wakes_up_does_not_save(
    start: Start, reference: Any, bucket: FakeGcs, tmp_path: Path
) -> None:
    """In the meantime another job has taken the run over, and it is that job's run that is finished."""
    folder, other, url = tmp_path / "run", tmp_path / "other" / "run", f"{bucket.url}/run"
    fields: dict[str, Any] = dict(workdir=url, train__num_steps=60)
    first = start(folder, env=SLOWLY, **fields)
    wait_for_step(first, 13)
    first.send(signal.SIGSTOP)
    second = start(other, env=SLOWLY, **fields)
    wait_for_step(second, 14)
    first.send(signal.SIGCONT)
    assert first.finish() == [1], first.report()
    assert f"is locked by pid {second.processes[0].pid}" in first.text()
    assert second.finish() == [0], second.report()
    assert_same_run(other, reference(60, 1), url)


@pytest.mark.timeout(600)
@slow
def test_storms_and_lost_answers(start: Start, reference: Any, bucket: FakeGcs, tmp_path: Path) -> None:
    """For longer than a lease, the service answers nothing but 429 and 503, and later it loses answers."""
    folder, url = tmp_path / "run", f"{bucket.url}/run"
    job = start(folder, env=SLOWLY, workdir=url, train__num_steps=40, train__checkpoint_every_steps=20)
    wait_for_step(job, 4)
    bucket.fail = storms(0, 1.0)
    time.sleep(3)
    bucket.fail = storms(1, 0.03)
    rng = random.Random(2)
    bucket.lose = lambda request: request.method == "POST" and rng.random() < 0.05
    assert job.finish() == [0], job.report()
    assert_same_run(folder, reference(40, 1), url)


def refused(gcs: FakeGcs, at_most: int) -> Callable[[Request], int | None]:
    """Refuses to store anything in the checkpoints of the first `at_most` steps that are tried."""
    tried: list[str] = []

    def fail(request: Request) -> int | None:
        match = re.match(r"run/checkpoints/(\d+)", request.name)
        if request.method not in ("POST", "PUT") or match is None:
            return None
        if match[1] not in tried:
            tried.append(match[1])
        return 403 if tried.index(match[1]) < at_most else None

    return fail


@pytest.mark.timeout(600)
@slow
@pytest.mark.parametrize("failures, code", [(2, 0), (3, 1)])
def test_a_bucket_that_refuses_to_store_for_a_while(
    failures: int, code: int, start: Start, reference: Any, bucket: FakeGcs, tmp_path: Path
) -> None:
    """A run survives two failed saves in a row, and ends at the third. Afterwards it resumes."""
    folder, url = tmp_path / "run", f"{bucket.url}/run"
    bucket.fail = refused(bucket, failures)
    job = start(folder, env=LEASE, workdir=url, train__num_steps=40)
    assert job.finish() == [code], job.report()
    assert len(re.findall(r"checkpoint of step \d+ was not written", job.text())) == failures
    if code:
        assert re.search(r"error: 3 saves in a row failed in .*, the last one that of step 30", job.text())
        assert steps_in(bucket) == []
        bucket.fail = lambda request: None
        job = start(folder, env=LEASE, workdir=url, train__num_steps=40)  # the remedy
        assert job.finish() == [0], job.report()
    assert_same_run(folder, reference(40, 1), url)


@pytest.mark.timeout(600)
@slow
@pytest.mark.parametrize("damage", ["flipped byte", "no commit file"])
def test_a_damaged_checkpoint_is_set_aside(
    damage: str, trained: Mapping[str, Stored], start: Start, reference: Any, bucket: FakeGcs, tmp_path: Path
) -> None:
    """The run goes on from the checkpoint before it."""
    folder, url = tmp_path / "run", f"{bucket.url}/run"
    bucket.objects |= trained
    if damage == "flipped byte":
        large = max(bucket.names("run/checkpoints/20/"), key=lambda name: len(bucket.objects[name].content))
        bucket.flip(large)
    else:
        del bucket.objects["run/checkpoints/20/commit_success.txt"]
    job = start(folder, env=LEASE, workdir=url, train__num_steps=40)
    assert job.finish() == [0], job.report()
    assert f"Resuming {url} at step 10 of 40" in job.text()
    assert (damage == "flipped byte") == any(bucket.names("run/checkpoints/quarantine/20.0/"))
    assert_same_run(folder, reference(40, 1), url)


@slow
@pytest.mark.timeout(600)
def test_a_local_run_that_is_copied_into_a_bucket(
    start: Start, reference: Any, bucket: FakeGcs, tmp_path: Path
) -> None:
    """Without commit files, one line says what to do, and nothing is deleted. Then the run goes on in the bucket."""
    source, folder, url = reference(20, 1), tmp_path / "run", f"{bucket.url}/run"
    for path in source.rglob("*"):
        if path.is_file() and path.name != "commit_success.txt":
            bucket.put(f"run/{path.relative_to(source)}", path.read_bytes())
    copied = bucket.names("run/checkpoints/")
    job = start(folder, env=LEASE, workdir=url, train__num_steps=40)
    assert job.finish() == [1], job.report()
    [line] = [line for line in job.text().splitlines() if line.startswith("error: ")]
    remedy = re.search(r'has steps without a commit file .*: 10, 20\. .* python -c "(.*?)"', line)
    assert remedy is not None, line
    assert bucket.names("run/checkpoints/") == copied
    exec(remedy[1], {})
    job = start(folder, env=LEASE, workdir=url, train__num_steps=40)
    assert job.finish() == [0] and f"Resuming {url} at step 20 of 40" in job.text(), job.report()
    assert_same_run(folder, reference(40, 1), url)


@slow
@pytest.mark.timeout(1200)
def test_a_sweep_is_killed_and_goes_on(start: Start, bucket: FakeGcs, tmp_path: Path) -> None:
    """The same rows as those of a sweep that was never stopped, in a local folder."""
    fields: dict[str, Any] = dict(eval__num_samples=64, sample__num_steps=4, sample__batch_size=8, train__num_steps=3)
    weights: dict[str, Any] = dict(eval__weights=(0.0, 0.5, 1.0, 2.0, 3.0))
    whole = start(tmp_path / "whole" / "run", **fields)
    assert whole.finish() == [0], whole.report()
    whole = start(whole.folder, mode="sweep", **fields, **weights)
    assert whole.finish() == [0], whole.report()
    folder, url = tmp_path / "run", f"{bucket.url}/run"
    job = start(folder, env=LEASE, workdir=url, **fields)
    assert job.finish() == [0], job.report()

    def rows() -> bytes:
        return bucket.objects["run/sweep.csv"].content if "run/sweep.csv" in bucket.objects else b""

    for count in (1, 3):
        job = start(folder, mode="sweep", env=SLOWLY, workdir=url, **fields, **weights)
        until(lambda count=count: rows().count(b"\n") > count, job)
        job.send(signal.SIGKILL)
        job.finish()
    assert rows().count(b"\n") < 6
    job = start(folder, mode="sweep", env=LEASE, workdir=url, **fields, **weights)
    assert job.finish() == [0], job.report()
    assert rows() == (whole.folder / "sweep.csv").read_bytes()


@pytest.mark.timeout(600)
@pytest.mark.skipif("CFD_TEST_BUCKET" not in os.environ, reason="CFD_TEST_BUCKET names no bucket, as gs://NAME")
def test_a_bucket_of_the_real_service(start: Start, reference: Any, tmp_path: Path) -> None:
    """A run in a new folder of it is killed once and goes on. The folder is deleted afterwards."""
    folder, url = tmp_path / "run", f"{os.environ['CFD_TEST_BUCKET'].rstrip('/')}/cfd-test-{time.time_ns()}"
    fields: dict[str, Any] = dict(workdir=url, train__num_steps=40)
    env = {"CFD_LEASE_SECONDS": "10"}
    try:
        job = start(folder, env=env | {"JOB_STEP_SECONDS": "0.5"}, **fields)
        wait_for_step(job, 13)
        second = start(folder, env=env, **fields)
        assert second.finish() == [1] and f"locked by pid {job.processes[0].pid} on" in second.text()
        job.send(signal.SIGKILL)
        job.finish()
        job = start(folder, env=env, **fields)
        assert job.finish() == [0], job.report()
        assert_same_run(folder, reference(40, 1), url)
    finally:
        store = files.store(url)
        store.delete_range(store.KeyRange()).result()
