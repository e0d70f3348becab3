"""launch/slurm.sh and launch/xpk.sh with stubs of their programs, and the image of launch/Dockerfile."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from tiny import ROOT

FAKE = """#!/usr/bin/env bash
printf '%s\\n' "$(basename "$0") $*" >> "$CALLS"
"""


def with_fakes(tmp_path: Path, *names: str) -> dict[str, str]:
    """An environment in which the commands of a cluster only record how they are called."""
    for name in names:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(FAKE)
        path.chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "CALLS": str(tmp_path / "calls"), "PYTHON": sys.executable}


def test_slurm_runs_the_command_on_every_task(tmp_path: Path) -> None:
    env = with_fakes(tmp_path, "srun", "scontrol")
    script = str(ROOT / "launch" / "slurm.sh")
    command = ["bash", script, "configs/a.py", "runs/a b", "--config.seed=1"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text()
    assert calls.count("\n") == 1 and "-m cfd.main --config=configs/a.py --workdir=runs/a b --config.seed=1" in calls


def test_slurm_requeues_a_job_that_runs_out_of_time(tmp_path: Path) -> None:
    """`srun` forwards SIGUSR1, which saves the run. At a SIGTERM it kills its tasks ("forcing job termination")."""
    env = with_fakes(tmp_path, "scontrol") | {"SLURM_JOB_ID": "17"}
    srun = tmp_path / "bin" / "srun"
    traps = "trap 'echo saved; exit 75' USR1\ntrap 'echo killed; exit 137' TERM"
    # The sleep outlives the signal. It must not keep the pipe open, because the test waits for its end.
    srun.write_text(f"#!/usr/bin/env bash\n{traps}\necho ready\nsleep 60 >/dev/null 2>&1 & wait $!\n")
    srun.chmod(0o755)
    script = str(ROOT / "launch" / "slurm.sh")
    with subprocess.Popen(["bash", script, "c", "w"], env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        process.terminate()
        said, _ = process.communicate(timeout=100)
    assert process.returncode == 75 and said == "saved\n"
    assert (tmp_path / "calls").read_text() == "scontrol requeue 17\n"


def test_slurm_passes_options_to_srun(tmp_path: Path) -> None:
    env = with_fakes(tmp_path, "srun", "scontrol") | {"SRUN_FLAGS": "--container-image=nvcr.io#cfd --mpi=none"}
    command = ["bash", str(ROOT / "launch" / "slurm.sh"), "configs/a.py", "gs://b/run"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    before, _, after = (tmp_path / "calls").read_text().partition(f" {sys.executable} -m cfd.main ")
    assert before.endswith(" --container-image=nvcr.io#cfd --mpi=none") and "--workdir=gs://b/run" in after


XPK = """#!/usr/bin/env bash
exec "$PYTHON" -c 'import json, os, sys; open(os.environ["CALLS"], "w").write(json.dumps(sys.argv[1:]))' "$@"
"""


def xpk(tmp_path: Path, *arguments: str, **env: str) -> list[str]:
    """The arguments with which launch/xpk.sh calls xpk, in a checkout that has the config."""
    checkout = tmp_path / "checkout"
    for file in (
        checkout / "launch" / "supervise.py",
        checkout / "cfd" / "main.py",
        checkout / arguments[0].split(":")[0],
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    environment = with_fakes(tmp_path, "xpk") | {"XPK_CLUSTER": "c", "XPK_IMAGE": "i", "XPK_TPU_TYPE": "v5litepod-16"}
    (tmp_path / "bin" / "xpk").write_text(XPK)
    command = ["bash", str(ROOT / "launch" / "xpk.sh"), *arguments]
    done = subprocess.run(command, env=environment | env, cwd=checkout, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "calls").read_text())


def test_xpk_gets_one_command(tmp_path: Path) -> None:
    calls = xpk(tmp_path, "configs/a.py", "/mnt/a b", "--config.name=it's $HOME", XPK_FLAGS="--num-slices=2 --spot")
    assert calls[:2] == ["workload", "create"] and calls[-2:] == ["--num-slices=2", "--spot"]
    flags = dict(flag.removeprefix("--").split("=", 1) for flag in calls[2:-2])
    assert flags["cluster"] == "c" and flags["tpu-type"] == "v5litepod-16" and flags["base-docker-image"] == "i"
    assert flags["workload"] == "cfd-a" and flags["restart-on-exit-codes"] == "75"
    assert flags["termination-grace-period-seconds"] == "600"  # XPK's own value is 30
    assert shlex.split(flags["command"]) == [
        *("exec", "env", "CFD_COORDINATOR=auto", "CFD_INITIALIZATION_TIMEOUT=1800"),
        *("python3", "launch/supervise.py", "--", "python3", "-m", "cfd.main"),
        *("--config=configs/a.py", "--workdir=/mnt/a b", "--config.name=it's $HOME"),
    ]


def test_the_waiting_times_on_xpk_can_be_set(tmp_path: Path) -> None:
    calls = xpk(tmp_path, "configs/a.py", "/mnt/a", XPK_GRACE_SECONDS="120", CFD_INITIALIZATION_TIMEOUT="60")
    assert "--termination-grace-period-seconds=120" in calls
    assert any(" CFD_INITIALIZATION_TIMEOUT=60 " in call for call in calls)


NAMES = [
    *("configs/a_b.py", "configs/ImageNet64.py", "configs/_x_.py", "configs/9.py", "configs/a..b.py", "digits", "é"),
    *("configs/" + "long_name_" * 9 + ".py", "gs://bucket/runs/My_Run", "runs/x/", "my configs/a b.py", "a.py:fast"),
    "configs/" + "x" * 23 + "_y.py",
]


@pytest.mark.parametrize("config", NAMES)
@pytest.mark.parametrize("workdir", ["/mnt/a", "gs://bucket/A_b"])
def test_a_workload_has_the_name_that_kubernetes_demands(tmp_path: Path, config: str, workdir: str) -> None:
    """RFC 1123: lower case, digits and "-", with a letter or digit at both ends; XPK wants a letter first."""
    (name,) = [call.split("=", 1)[1] for call in xpk(tmp_path, config, workdir) if call.startswith("--workload=")]
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) and len(name) <= 28
    assert "bucket" not in name


def test_the_name_of_a_workload_can_be_given(tmp_path: Path) -> None:
    assert "--workload=mine" in xpk(tmp_path, "configs/a.py", "/mnt/a", XPK_WORKLOAD="mine")
    assert "--workload=cfd-imagenet64" in xpk(tmp_path, "configs/imagenet64.py", "/mnt/a")


NEEDED = ("TPU_NAME", "TPU_ZONE", "TPU_TYPE", "TPU_VERSION", "XPK_CLUSTER", "XPK_IMAGE", "XPK_TPU_TYPE")
"""The variables that one of the scripts needs."""


@pytest.mark.parametrize("script, program", [("tpu_pod.sh", "gcloud"), ("xpk.sh", "xpk"), ("slurm.sh", "srun")])
def test_a_program_that_is_not_installed_is_named_at_once(tmp_path: Path, script: str, program: str) -> None:
    """It is not waited for, as a service is that does not answer."""
    env = dict.fromkeys(NEEDED, "x") | {"PATH": str(tmp_path), "PYTHON": sys.executable}
    command = [str(shutil.which("bash")), str(ROOT / "launch" / script), "configs/digits.py", "gs://b/run"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and program in done.stderr


@pytest.mark.parametrize("script", ["tpu_pod.sh", "xpk.sh", "slurm.sh"])
def test_another_folder_than_a_checkout_is_refused(tmp_path: Path, script: str) -> None:
    """XPK would add all of it to the image."""
    env = with_fakes(tmp_path, "gcloud", "xpk", "srun") | dict.fromkeys(NEEDED, "x")
    command = ["bash", str(ROOT / "launch" / script), "digits", "gs://b/run"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and f"{tmp_path} is no checkout" in done.stderr and not (tmp_path / "calls").exists()


@pytest.mark.parametrize("config", ["configs/digitz.py", f"{ROOT}/configs/digits.py", "configs/digitz.py:fast"])
def test_a_config_that_the_pods_would_not_have_is_refused(tmp_path: Path, config: str) -> None:
    env = with_fakes(tmp_path, "xpk") | dict.fromkeys(NEEDED, "x")
    command = ["bash", str(ROOT / "launch" / "xpk.sh"), config, "gs://b/run"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and f"{config.partition(':')[0]} would not be in the pods" in done.stderr
    assert not (tmp_path / "calls").exists()


def steps(dockerfile: Path) -> list[tuple[str, list[str]]]:
    """The instructions of a Dockerfile and their words."""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", dockerfile.read_text(), flags=re.M))
    return [(words[0], words[1:]) for words in map(shlex.split, filter(None, text.splitlines()))]


def test_the_image_has_a_python_and_the_extras_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    instructions = steps(ROOT / "launch" / "Dockerfile")
    assert [name for name, _ in instructions] == ["FROM", "WORKDIR", "COPY", "COPY", "COPY", "RUN", "WORKDIR"]
    version = re.fullmatch(r"python:([\d.]+)-slim", instructions[0][1][0])
    assert version and version[1] in SpecifierSet(project["requires-python"])
    (install,) = [words for name, words in instructions if name == "RUN"]
    *pip, package = install
    assert pip == ["pip", "install", "--no-cache-dir"]
    extras = re.fullmatch(r"\.\[(.*)\]", package)
    assert extras and set(extras[1].split(",")) <= project["optional-dependencies"].keys()


def test_what_is_copied_into_the_image_can_be_installed(tmp_path: Path) -> None:
    """pip builds the package from the files that the Dockerfile copies, without the dependencies."""
    pytest.importorskip("hatchling")
    for name, words in steps(ROOT / "launch" / "Dockerfile"):
        for source in words[:-1] if name == "COPY" else ():
            target = tmp_path / "image" / words[-1]
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, target)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", "there", "."]
    done = subprocess.run(pip, cwd=tmp_path / "image", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "image" / "there" / "cfd" / "configs" / "digits.py").is_file()
    assert ".venv" in (ROOT / ".dockerignore").read_text().split()
