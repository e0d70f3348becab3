"""The wheel works where there is no checkout: it contains the package and its configs, and runs them by name.

Installing it on Colab replaces none of the packages of Colab's runtimes, whose versions are in .github/colab-*.txt. A
replaced package would need a restart of the runtime, and others that are installed there may not work with it.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tiny import ROOT, flags_of

RUNTIMES = sorted((ROOT / ".github").glob("colab-*.txt"))


def run(*command: str, folder: Path, **environment: str) -> str:
    """The standard output of a command, which must succeed."""
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the checkout. If hatchling is not installed here, pip builds in an environment of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    run(
        sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", *isolation, "-w", str(folder), str(ROOT), folder=folder
    )
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_contains_the_package_and_its_configs_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {path.relative_to(ROOT) for path in (ROOT / "cfd").rglob("*.py")}
    configs = {Path("cfd") / path.relative_to(ROOT) for path in (ROOT / "configs").glob("*.py")}
    assert {name for name in names if name.endswith(".py")} == {path.as_posix() for path in package | configs}
    assert all(name.startswith("cfd/") for name in names)


def test_an_installed_wheel_trains_a_config_by_its_name(wheel: Path, tmp_path: Path) -> None:
    target, folder = tmp_path / "installed", tmp_path / "elsewhere"
    folder.mkdir()
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel), folder=folder)

    def python(*arguments: str) -> str:
        # The target comes before the site-packages, where an editable install may point to the checkout; -P leaves out
        # the current directory.
        return run(sys.executable, "-P", *arguments, folder=folder, PYTHONPATH=str(target), JAX_PLATFORMS="cpu")

    assert Path(python("-c", "import cfd; print(cfd.__file__)").strip()) == target / "cfd" / "__init__.py"
    listing = python("-m", "cfd.main", "--config=digits", "--mode=config")
    assert "data.source = 'digits' " in listing and "train.num_steps = 800 " in listing
    assert not list(folder.iterdir())

    out = python("-m", "cfd.main", "--config=digits", *flags_of(train__num_steps=2, eval__weights=()))
    assert "Saving step 2 of 2." in out
    assert [path.name for path in folder.iterdir()] == ["runs"]
    (run_folder,) = (folder / "runs").iterdir()
    assert run_folder.name == "digits"
    assert {"config.json", "checkpoints", "metrics.jsonl"} <= {path.name for path in run_folder.iterdir()}


def pins(runtime: Path) -> dict[str, str]:
    """The version of each package of a runtime, by its canonical name."""
    lines = [line for line in runtime.read_text().split() if "==" in line]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def test_the_bounds_admit_the_versions_of_colab() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [Requirement(text) for group in (project["dependencies"], extras["tfds"], extras["gcs"]) for text in group]
    assert [runtime.stem for runtime in RUNTIMES] == ["colab-gpu", "colab-tpu"]
    for runtime in RUNTIMES:
        versions = pins(runtime)
        assert {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "scipy"} <= versions.keys()
        for requirement in wanted:
            version = versions.get(canonicalize_name(requirement.name))
            assert version is None or version in requirement.specifier, (runtime.name, requirement, version)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("runtime", RUNTIMES, ids=lambda path: path.stem)
def test_an_installation_on_colab_replaces_nothing(wheel: Path, runtime: Path, tmp_path: Path) -> None:
    """pip says what it would install beside exactly the packages of the runtime. It needs the network."""
    venv.create(tmp_path / "venv", with_pip=True)

    def pip_install(*arguments: str) -> None:
        python = str(tmp_path / "venv" / "bin" / "python")
        run(python, "-m", "pip", "install", "-q", *arguments, folder=tmp_path, PIP_DISABLE_PIP_VERSION_CHECK="1")

    pip_install("--no-deps", "-r", str(runtime))
    # fsspec and gcsfs need the same version. Without constraints, pip prefers the newest gcsfs to the installed fsspec.
    for requirement, *constraints in ([f"{wheel}"], [f"{wheel}[tfds]"], [f"{wheel}[gcs]", "-c", str(runtime)]):
        report = tmp_path / "report.json"
        pip_install("--dry-run", "--report", str(report), requirement, *constraints)
        items = json.loads(report.read_text())["install"]
        names = {canonicalize_name(item["metadata"]["name"]) for item in items}
        assert "cfd" in names and not names & pins(runtime).keys()
