"""`--config=RUN`: the folder of a run is its config, and the default of --workdir."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mixing import DIGITS
from tiny import ROOT, tiny_config

from cfd import main
from cfd.config import complete
from cfd.errors import UserError
from cfd.fields import BEFORE, FIELDS
from cfd.runs import workdir


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that has no checkpoint yet, runs/mine."""
    folder = tmp_path / "runs" / "mine"
    config = tiny_config(train__learning_rate=0.5, eval__intervals=((), (-3.0, 5.0)))
    workdir.write_config(folder, workdir.describe("diffusion", config.to_dict(), DIGITS))
    return folder


def loaded(path: object) -> Any:
    """The config that --config=PATH stands for."""
    return main.load_config(str(path))


def test_a_run_is_its_own_config(run: Path) -> None:
    expected = tiny_config(train__learning_rate=0.5, eval__intervals=((), (-3.0, 5.0)))
    for path in (run, f"{run}/", run / "config.json"):
        assert complete(loaded(path)) == expected
        assert os.path.samefile(main.named_run(str(path)) or "", run)


def test_a_field_that_is_younger_than_the_run_means_what_the_code_did_before(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.loads((run / "config.json").read_text())
    del content["config"]["train"]["ema_warmup"], content["config"]["eval"]["steps"]
    (run / "config.json").write_text(json.dumps(content))
    monkeypatch.setitem(BEFORE, "train.ema_warmup", True)
    config = complete(loaded(run))
    assert config.train.ema_warmup and config.eval.steps == ()


def test_a_name_is_never_a_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    with pytest.raises(UserError, match=r"--config=mine names no config; .*, or the folder of a run, with a slash"):
        loaded("mine")
    assert complete(loaded("./mine")).train.learning_rate == 0.5


def test_a_folder_that_is_no_run_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a folder without config.json, which is no run: give the folder of a run"):
        loaded(run.parent)
    classifier = run / "classifier"
    workdir.write_config(classifier, workdir.describe("classifier", tiny_config().to_dict(), DIGITS))
    with pytest.raises(UserError, match=rf"is the run of a noisy classifier: give .* which is usually {run}$"):
        loaded(classifier)
    content = json.loads((run / "config.json").read_text())
    content["config"]["train"]["momentum"] = 0.5
    (run / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"config.train.momentum is not a field"):
        loaded(run)
    (run / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is not JSON"):
        loaded(run)


def command(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "cfd.main", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_the_command_takes_a_run_as_its_config_and_as_its_workdir(run: Path, tmp_path: Path) -> None:
    done = command("--config=runs/mine", "--config.sample.v=0.9", "--mode=config", folder=tmp_path)
    values = dict(line.partition("  # ")[0].split(" = ", 1) for line in done.stdout.splitlines() if line)
    assert {name.strip() for name in values} == FIELDS.keys()
    assert values["train.learning_rate"].strip() == "0.5" and values["sample.v"].strip() == "0.9"
    done = command("--config=runs/mine", "--mode=sample", folder=tmp_path)
    assert done.returncode == 1 and "runs/mine/checkpoints has no step" in done.stderr
    elsewhere = command("--config=runs/mine", "--mode=sample", "--workdir=other", folder=tmp_path)
    assert elsewhere.returncode == 1 and "other holds no run" in elsewhere.stderr
