"""The wheel works where there is no checkout: it contains the package and its configs, and runs them by name."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tiny import ROOT, flags_of


def run(*command: str, folder: Path, **environment: str) -> str:
    """The standard output of a command, which must succeed."""
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=240
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
