"""Real processes that are killed, frozen and hung, and disks that are full: nothing is lost or waits for ever.

Each test runs the real command through tests/job.py, whose network is small enough to start in seconds.
"""

import json
import os
import random
import re
import signal
import socket
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from disk import filled, small_disk
from jobs import (
    HEARTBEAT,
    Start,
    assert_same_run,
    final_state,
    losses,
    steps_of,
    wait_for_step,
    wait_until,
)
from meshes import mesh_of
from tiny import tiny_config

from cfd.devices import parallel
from cfd.loading import load_ema
from cfd.modes.sampler import Network, SampleSpec, compile_sampler
from cfd.modes.settings import sampling_of
from cfd.runs import npz

slow = pytest.mark.slow
SLACK = 60
"""Seconds that a busy machine may add. Together with this, our time-outs are shorter than those that JAX has."""


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kills, steps", [(1, 40), pytest.param(15, 1500, marks=slow)])
def test_killed_at_random_steps_of_one_process(
    kills: int, steps: int, start: Start, reference: Any, tmp_path: Path
) -> None:
    """With 15 kills, at most a tenth of the steps is repeated."""
    folder = tmp_path / "run"
    rng = random.Random(0)
    for at in sorted(rng.sample(range(5, steps - 5), kills)):
        env = {"JOB_STEP_SECONDS": "0.02", "JOB_HANG": f"main:{at + 4}"}  # it never ends before it is killed
        job = start(folder, env=env, train__num_steps=steps, train__checkpoint_every_steps=5)
        wait_for_step(job, at)
        time.sleep(rng.uniform(0.0, 0.05))
        job.send(signal.SIGKILL)
        assert job.finish() == [-signal.SIGKILL]
    job = start(folder, train__num_steps=steps)
    assert job.finish() == [0], job.report()
    assert re.search(rf"Resuming .* at step \d+ of {steps}", job.text())
    assert_same_run(folder, reference(steps, 1))
    print(f"{kills} kills: {steps} steps, {len(steps_of(folder)) - steps} of them repeated")
    if kills > 1:
        assert steps / len(steps_of(folder)) >= 0.9


@slow
@pytest.mark.timeout(600)
def test_an_error_of_one_process_is_reported_and_ends_all(start: Start, tmp_path: Path) -> None:
    """The error comes after a save, on whose success the other process can then no longer agree."""
    job = start(
        tmp_path / "run",
        processes=2,
        env={"JOB_HANG": "error:17", "JOB_HANG_PROCESS": "1", "JOB_STEP_SECONDS": "0.02"},
        train__num_steps=1000,
        train__checkpoint_every_steps=5,
    )
    assert all(job.finish()), job.report()
    assert "ValueError: image 7 is bad" in job.text(1)
    assert "ValueError: image 7 is bad" in (job.folder / "errors.1.log").read_text()
    assert final_state(job.folder)[0] == 15


@slow
@pytest.mark.timeout(600)
def test_a_disk_that_is_full_for_a_while(start: Start, reference: Any, tmp_path: Path) -> None:
    """Training continues, and in the end no line of the log is missing."""
    folder = tmp_path / "run"
    with small_disk(folder, megabytes=60) as mounted:
        if not mounted:
            pytest.skip("mounting a file system needs root; tests/runs/test_failed_saves.py does without")
        job = start(
            folder,
            env={"JOB_STEP_SECONDS": "0.02", "JOB_NOTES": str(tmp_path)},
            train__num_steps=600,
            train__checkpoint_every_steps=150,
            train__sample_every_steps=300,  # with the disk full, only two saves fail: those of 150 and 300
        )
        wait_until(lambda: any(done["step"] >= 40 for done in steps_of(tmp_path)), job)
        with filled(folder):
            for refused in ("checkpoint of step 150", "metrics.jsonl", "step_0000300.png"):
                wait_until(lambda refused=refused: re.search(f"{refused}.* was not written", job.text()), job)
        assert job.finish() == [0], job.report()
        assert final_state(folder) == final_state(reference(600, 1))
        assert losses(folder) == losses(reference(600, 1))


@slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kills, steps", [(1, 30), (6, 130)])
def test_killed_at_random_steps_of_two_processes(
    kills: int, steps: int, start: Start, reference: Any, tmp_path: Path
) -> None:
    """If one process is killed, the other ends with an error; after both are started again, the run has the same bits
    as one process with two devices that was never stopped."""
    folder = tmp_path / "run"
    rng = random.Random(1)
    for kill, at in enumerate(sorted(rng.sample(range(5, steps - 5), kills))):
        env = {"JOB_STEP_SECONDS": "0.02", "JOB_HANG": f"main:{at + 4}"}
        job = start(folder, processes=2, env=env, train__num_steps=steps)
        wait_for_step(job, at)
        job.send(signal.SIGKILL, kill % 2)
        killed = time.monotonic()
        codes = job.finish(HEARTBEAT + SLACK)
        assert codes[kill % 2] == -signal.SIGKILL and codes[1 - kill % 2] != 0
        print(f"process {kill % 2} killed; the other ended after {time.monotonic() - killed:.1f} s")
    job = start(folder, processes=2, train__num_steps=steps)
    assert job.finish() == [0, 0], job.report()
    assert_same_run(folder, reference(steps, 2))


@slow
@pytest.mark.timeout(600)
def test_kills_leave_every_snapshot_once(start: Start, tmp_path: Path) -> None:
    """Two processes are killed at random steps. In the end there is every snapshot, with the bits of a run that was not
    stopped."""
    fields = dict(train__num_steps=40, train__checkpoint_every_steps=5, train__snapshot_every_steps=2)
    fields |= dict(train__keep_every_steps=15)
    whole = start(tmp_path / "whole" / "run", processes=2, **fields)
    assert whole.finish() == [0, 0], whole.report()
    rng = random.Random(2)
    for at in (9, 23):
        env = {"JOB_STEP_SECONDS": "0.02", "JOB_HANG": f"main:{at + 4}"}
        job = start(tmp_path / "killed" / "run", processes=2, env=env, **fields)
        wait_for_step(job, at)
        time.sleep(rng.uniform(0.0, 0.3))
        job.send(signal.SIGKILL)
        assert job.finish() == [-signal.SIGKILL] * 2
    job = start(tmp_path / "killed" / "run", processes=2, **fields)
    assert job.finish() == [0, 0], job.report()
    for folder in (whole.folder, job.folder):
        for name, expected in (("snapshots", list(range(2, 41, 2))), ("checkpoints", [15, 30, 35, 40])):
            assert sorted(int(p.name) for p in (folder / name).iterdir() if p.name.isdecimal()) == expected
    for step in range(2, 41, 2):
        found, expected = (load_ema(folder, "diffusion", step) for folder in (job.folder, whole.folder))
        assert found.weights_hash == expected.weights_hash


@slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("first, then", [((2, 1), (1, 2)), ((1, 2), (2, 1)), ((1, 2), (1, 1)), ((2, 2), (4, 1))])
def test_resumed_on_other_processes_or_devices(
    first: tuple[int, int], then: tuple[int, int], start: Start, reference: Any, tmp_path: Path
) -> None:
    """(processes, devices of each): the same total gives the same bits, another total the same losses to 1e-5."""
    folder = tmp_path / "run"
    for (processes, devices), steps in ((first, 20), (then, 40)):
        job = start(folder, processes=processes, devices=devices, train__num_steps=steps)
        assert job.finish() == [0] * processes, job.report()
    expected = reference(40, first[0] * first[1])
    if first[0] * first[1] == then[0] * then[1]:
        assert_same_run(folder, expected)
    else:
        np.testing.assert_allclose(losses(folder), losses(expected), rtol=1e-5)


@slow
@pytest.mark.timeout(900)
def test_one_two_and_four_processes_of_eight_devices(start: Start, reference: Any, tmp_path: Path) -> None:
    """1x8, 2x4 and 4x2 devices give the same bits. One device, and parameters divided over four, agree to 1e-5."""
    whole = reference(40, 8)
    for processes in (2, 4):
        job = start(tmp_path / f"{processes}" / "run", processes=processes, devices=8 // processes, train__num_steps=40)
        assert job.finish() == [0] * processes, job.report()
        assert_same_run(job.folder, whole)
    job = start(tmp_path / "fsdp" / "run", processes=2, devices=4, train__num_steps=40, mesh__fsdp=4)
    assert job.finish() == [0, 0], job.report()
    plain = start(tmp_path / "plain" / "run", devices=8, train__num_steps=40)  # without a coordinator
    assert plain.finish() == [0], plain.report()
    for other in (job.folder, plain.folder, reference(40, 1)):
        np.testing.assert_allclose(losses(other), losses(whole), rtol=1e-5)
        print("largest relative difference of a loss", np.max(np.abs(np.divide(losses(other), losses(whole)) - 1)))


@slow
@pytest.mark.timeout(300)
def test_two_runs_and_a_run_on_one_core_are_equal(start: Start, reference: Any, tmp_path: Path) -> None:
    for i, env in enumerate(({}, {"JOB_CORES": "1"})):
        job = start(tmp_path / str(i) / "run", env=env, train__num_steps=40)
        assert job.finish() == [0], job.report()
        assert_same_run(job.folder, reference(40, 1))


@slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_process_ends_the_other(frozen: int, start: Start, tmp_path: Path) -> None:
    env = {"JOB_STEP_SECONDS": "0.02"}
    job = start(tmp_path / "run", processes=2, env=env, train__num_steps=100_000)
    wait_for_step(job, 3)
    job.send(signal.SIGSTOP, frozen)
    stopped = time.monotonic()
    other = job.processes[1 - frozen]
    assert other.wait(HEARTBEAT + SLACK) != 0
    print(f"process {frozen} frozen; the other ended after {time.monotonic() - stopped:.1f} s, code {other.returncode}")


@slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("where, processes", [("main", 1), ("loader", 1), ("main", 2), ("loader", 2)])
def test_a_hung_process_ends_with_its_stacks(where: str, processes: int, start: Start, tmp_path: Path) -> None:
    """Every process has a watchdog, so those that wait for the hung one end as well."""
    env = {"JOB_HANG": f"{where}:{100 if where == 'loader' else 7}", "JOB_HANG_PROCESS": str(processes - 1)}
    job = start(tmp_path / "run", processes=processes, env=env, train__num_steps=10_000, train__watchdog_seconds=15)
    wait_for_step(job, 3)
    hung = time.monotonic()
    assert all(code != 0 for code in job.finish(15 + SLACK)), job.report()
    print(f"{processes} processes, {where} hung: all ended within {time.monotonic() - hung:.1f} s of step 3")
    for i in range(processes):
        assert "Timeout (0:00:15)!" in job.text(i) and "most recent call first" in job.text(i), job.report()
    assert "job.py" in job.text(processes - 1)


@slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("process", [0, 1])
def test_a_process_that_never_comes(process: int, start: Start, tmp_path: Path) -> None:
    """The other process says what it waits for, and for how long, before JAX aborts it."""
    env = {"CFD_INITIALIZATION_TIMEOUT": "10", "CFD_PROCESS_ID": str(process)}
    job = start(tmp_path / "run", of=2, env=env)
    wait_until(lambda: "joins the coordinator" in job.text(), job)
    joined = time.monotonic()
    codes = job.finish(10 + SLACK)
    print(f"process {process} alone: ended after {time.monotonic() - joined:.1f} s, code {codes}")
    assert codes[0] != 0 and f"Process {process} of 2 joins" in job.text() and "after 10 s" in job.text()


@slow
@pytest.mark.timeout(600)
def test_processes_and_kills_change_no_image(start: Start, tmp_path: Path) -> None:
    """A sweep that is killed five times, in one and two processes by turns, writes the same files and numbers as one
    that was not interrupted, in one process with as many devices. The previews of training are the same, too."""
    fields = dict(train__num_steps=3, train__sample_every_steps=3, sample__num_steps=4, sample__batch_size=16)
    fields |= dict(eval__num_samples=256, eval__weights=(0.0, 0.5, 1.0, 2.0, 3.0, 4.0))
    whole = start(tmp_path / "whole" / "run", devices=2, **fields)
    assert whole.finish() == [0], whole.report()
    folder = tmp_path / "killed" / "run"
    rows = folder / "sweep.csv"
    for kill in range(5):
        processes = 2 - kill % 2
        job = start(folder, processes=processes, devices=2 // processes, env={"JOB_STEP_SECONDS": "0.05"}, **fields)
        wait_until(lambda kill=kill: rows.exists() and rows.read_text().count("\n") >= kill + 2, job)
        job.send(signal.SIGKILL)
        assert job.finish() == [-signal.SIGKILL] * processes
    job = start(folder, processes=2, **fields)
    assert job.finish() == [0, 0] and re.search(r"[5-6] of 6 cells are in", job.text()), job.report()
    assert rows.read_text() == (whole.folder / "sweep.csv").read_text()
    for part in ("samples", "manifests"):
        found, expected = ({p.name: p.read_bytes() for p in (at / part).iterdir()} for at in (folder, whole.folder))
        assert found.keys() == expected.keys() and len(found) >= 6
        assert [name for name in found if found[name] != expected[name]] == []


@slow
@pytest.mark.timeout(300)
def test_a_run_whose_checkpoints_are_all_damaged(start: Start, reference: Any, tmp_path: Path) -> None:
    """The run ends with an error. It starts at step 0 only on request, and no checkpoint is deleted."""
    folder = tmp_path / "run"
    job = start(folder, train__num_steps=20)
    assert job.finish() == [0], job.report()
    for step in (folder / "checkpoints").glob("[0-9]*"):
        (step / "meta" / "metadata").write_text("")
    job = start(folder, train__num_steps=40)
    assert job.finish() == [1]
    assert "all checkpoints" in job.text() and "--allow_fresh_start" in job.text() and str(folder) in job.text()
    job = start(folder, train__num_steps=40, more=("--allow_fresh_start",))
    assert job.finish() == [0], job.report()
    assert_same_run(folder, reference(40, 1))
    assert len(list((folder / "checkpoints" / "quarantine").iterdir())) == 2


@slow
@pytest.mark.timeout(300)
def test_nothing_is_left_of_a_killed_trainer(start: Start, tmp_path: Path) -> None:
    """Data is loaded by threads, so there is no process and no shared memory to leave behind."""
    shared = set(os.listdir("/dev/shm"))
    job = start(tmp_path / "run", train__num_steps=100_000, data__num_workers=4)
    wait_for_step(job, 3)
    pid = job.processes[0].pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    job.send(signal.SIGKILL)
    job.finish()
    time.sleep(1)
    assert children == []
    assert set(os.listdir("/dev/shm")) - shared == set()


@slow
@pytest.mark.timeout(300)
def test_the_coordinator_listens_only_on_its_address_and_survives_noise(start: Start, tmp_path: Path) -> None:
    job = start(tmp_path / "run", processes=2, env={"JOB_STEP_SECONDS": "0.02"}, train__num_steps=300)
    wait_for_step(job, 3)
    port = int(re.findall(r"coordinator 127.0.0.1:(\d+)", job.text())[0])
    listening = listening_addresses(job.processes[0].pid)
    assert ("127.0.0.1", port) in listening
    assert not any(host in ("0.0.0.0", "::") for host, _ in listening), listening
    with socket.create_connection(("127.0.0.1", port)) as noise:
        try:
            noise.sendall(random.Random(0).randbytes(2**20))
        except OSError as error:
            print("the coordinator hung up:", error)
    assert job.finish() == [0, 0], job.report()


def listening_addresses(pid: int) -> set[tuple[str, int]]:
    """(host, port) of the TCP sockets on which a process listens, from /proc."""
    links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()]
    inodes = {match[1] for link in links if (match := re.fullmatch(r"socket:\[(\d+)\]", link))}
    found = set()
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                host, port = fields[1].split(":")
                words = [bytes.fromhex(host[i : i + 8])[::-1] for i in range(0, len(host), 8)]
                found.add((socket.inet_ntop(family, b"".join(words)).removeprefix("::ffff:"), int(port, 16)))
    return found


@slow
@pytest.mark.timeout(600)
def test_a_thousand_steps_with_a_hundred_saves_leak_nothing(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    job = start(folder, env={"JOB_STEP_SECONDS": "0.05"}, train__num_steps=1000, train__log_every_steps=10)
    assert job.finish(500) == [0], job.report()
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    steps, saves = [line for line in lines if "step" in line], [line for line in lines if "saved" in line]
    assert len(saves) == 100
    warm = [line for line in steps if line["step"] > 200]
    growth = (max(line["rss"] for line in warm[-10:]) - max(line["rss"] for line in warm[:10])) / 2**20
    blocked = sum(line["seconds"] for line in saves) / (lines[-1]["time"] - lines[0]["time"])
    goodput = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["goodput"]
    print(f"RSS grew by {growth:.1f} MB; saving took {blocked:.1%} of the time; goodput {goodput:.1%}")
    for name in ("fds", "threads", "os_threads"):
        counts = [line[name] for line in warm]
        print(name, min(counts), max(counts), "last", counts[-1])
        assert np.mean(counts[-20:]) - np.mean(counts[:20]) < 2
    assert growth < 20
    assert blocked < 0.2  # a wide limit, for a busy machine
    seconds, percent = map(float, re.findall(r"1000 steps in (\S+) s, goodput (\S+)%", job.text())[0])
    assert 999 * 0.05 / seconds - 0.002 < percent / 100 < 1 - sum(line["seconds"] for line in saves) / seconds + 0.002
    assert abs(goodput - percent / 100) < 0.05  # the logged value does not include the last save


@slow
def test_forty_thousand_images_are_streamed(tmp_path: Path) -> None:
    """120 MB of images pass through the process without its growing by as much."""
    network = Network(lambda params: lambda z, logsnr, labels: params * z, (32, 32, 3))
    sampling = sampling_of(tiny_config(sample__num_steps=1, sample__batch_size=500))
    index = np.arange(40_000, dtype=np.int32)
    spec = SampleSpec(np.zeros(40_000, np.uint32), index, index % 10, np.zeros(40_000, np.float32))
    mesh = mesh_of(1)
    sampler = compile_sampler(network, sampling, mesh)
    params = parallel.replicate(mesh, jnp.float32(0.5))
    sizes = []
    with npz.sample_writer(str(tmp_path / "samples.npz"), 40_000, (32, 32, 3)) as write:
        for images in sampler(params, spec):
            write(images, np.zeros(len(images), np.int32))
            status = Path("/proc/self/status").read_text()
            sizes.append(int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) / 1024)
    print(f"RSS grew by {sizes[-1] - sizes[4]:.1f} MB")
    assert len(sizes) == 80 and sizes[-1] - sizes[4] < 60
