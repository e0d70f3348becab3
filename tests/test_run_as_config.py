"""`--config=RUN`: the folder of a run is its config, and the default of --workdir."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mixing import DIGITS
from tiny import ROOT, tiny_config

from cfd import __version__, main
from cfd.config import complete
from cfd.errors import UserError
from cfd.fields import BEFORE, FIELDS
from cfd.modes import finetune, settings, sweep, train
from cfd.runs import workdir

REMOVED = object()


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
    with pytest.raises(UserError, match=r"mine names no config; .*, or the folder of a run, with a slash"):
        loaded("mine")
    assert complete(loaded("./mine")).train.learning_rate == 0.5


def test_a_run_of_another_config_is_refused_before_a_sweep_looks_at_its_results(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The remedy for features that do not fit removes them, which does not help if the config is another one."""

    def fail(*_: object) -> None:
        raise AssertionError("the features of another run were looked at")

    monkeypatch.setattr(sweep, "check", fail)
    monkeypatch.setattr(main, "INIT_FROM", SimpleNamespace(value=None))
    same = dict(train__learning_rate=0.5, eval__intervals=((), (-3.0, 5.0)))
    other = tiny_config(**same | {"train__learning_rate": 0.1})
    with pytest.raises(AssertionError):
        main.run_train(other, str(run), str(run))  # it has no checkpoint, and takes this config
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    for mode in (main.run_train, main.run_sweep):
        with pytest.raises(UserError, match=r"is another run's: train\.learning_rate: 0\.5 there, 0\.1 here"):
            mode(other, str(run), str(run))
        with pytest.raises(AssertionError):
            mode(tiny_config(**same), str(run), str(run))


def test_a_folder_that_is_no_run_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is a folder without config.json, which is no run: give the folder of a run"):
        loaded(run.parent)
    classifier = run / "classifier"
    workdir.write_config(classifier, workdir.describe("classifier", tiny_config().to_dict(), DIGITS))
    with pytest.raises(UserError, match=rf"is the run of a classifier: give .* which is usually {run}$"):
        loaded(classifier)
    gan = run / "gan"
    workdir.write_config(gan, workdir.describe("gan", tiny_config().to_dict(), DIGITS))
    with pytest.raises(UserError, match=r"gan is the run of a gan: give the folder of a diffusion model$"):
        loaded(gan)
    (run / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is not JSON"):
        loaded(run)


@pytest.mark.parametrize(
    ("group", "field", "value", "words"),
    [
        (
            "train",
            "momentum",
            0.5,
            rf"has the field train\.momentum, which this version of cfd, {__version__}, does not",
        ),
        (
            "train",
            "num_steps",
            "4",
            r"is damaged, because it has train\.num_steps = '4': restore it from .* checkpoints/<step>/meta/metadata",
        ),
        ("data", "channels", None, r"is damaged, because it has data\.channels = None: restore it"),
        ("data", "source", REMOVED, r"is damaged, because it has no data\.source: restore it"),
        ("sample", None, 5, r"is damaged, because it has sample = 5: restore it"),
        ("model", None, REMOVED, r'has no "model" in its "config": restore it'),
        ("process", None, REMOVED, r"is damaged, because it has no process\.logsnr_min: restore it"),
    ],
)
@pytest.mark.parametrize("has_begun", [False, True])
def test_a_config_of_another_version_or_a_damaged_one_is_named(
    run: Path, group: str, field: str | None, value: object, words: str, has_begun: bool
) -> None:
    """By every door: as the config, as the folder that is trained or sampled, and as the source of another run."""
    content = json.loads((run / "config.json").read_text())
    if value is REMOVED:
        del (content["config"][group] if field else content["config"])[field or group]
    else:
        (content["config"][group] if field else content["config"])[field or group] = value
    (run / "config.json").write_text(json.dumps(content))
    if has_begun:
        (run / "checkpoints" / "4").mkdir(parents=True)
        (run / "checkpoints" / "4" / "commit_success.txt").touch()
    config = tiny_config()
    for call in (
        lambda: loaded(run),
        lambda: train.check_run(config, str(run)),
        lambda: settings.open_run(config, str(run)),
        lambda: finetune.check(config, str(run.parent / "new"), str(run)) if has_begun else loaded(run),
    ):
        with pytest.raises(UserError, match=rf"mine/config\.json {words}"):
            call()


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


def test_a_full_disk_is_reported_in_a_line_and_nothing_half_written_is_left(run: Path, tmp_path: Path) -> None:
    """The limit of the size of a file stands for the full disk."""
    before = sorted(run.rglob("*"))
    program = f"ulimit -f 0; exec {sys.executable} -m cfd.main --config=runs/mine --mode=report"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    remedy = "raise the limit on the size of a file (ulimit -f), and start again"
    assert done.stderr == f"error: {run}/report.html cannot be written (File too large): {remedy}\n"
    assert sorted(run.rglob("*")) == sorted([*before, run / "errors.log"])
