"""The command line: the whole job once; every mistake is reported in a line or two, and nothing is overwritten."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Command, command_in
from PIL import Image
from tiny import ROOT, flags_of, tiny_config

from cfd.fields import FIELDS
from cfd.runs import access, manifest, npz, results, workdir

DIGITS = f"--config={ROOT}/configs/digits.py"


@pytest.fixture
def command(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    return command_in(tmp_path, tmp_path_factory.mktemp("outputs"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.train.lr=1"], ("config.train.lr is not a field", "learning_rate")),
        (["--config.train.num_steps=0"], ("config.train.num_steps is 0", "an integer >= 1")),
        (["--config.train.num_steps=ten"], ("train.num_steps", "ten")),
        (["--config.train.num_steps=1e3"], ("config.train.num_steps is '1e3'; expected an integer >= 1",)),
        (["--config.data.flip=yes"], ("config.data.flip is 'yes'; expected True or False",)),
        (["--config.sample.w=(1.0, 2.0"], ("config.sample.w is '(1.0, 2.0'; expected a tuple of guidance weights",)),
        (["digits"], ("unexpected argument 'digits'", "--config=NAME")),
        (["--runs=x"], ("--runs is read by --mode=compare and cost alone, and not by train: leave it out",)),
        (["--mode=sample", "--allow_fresh_start"], ("is read by --mode=train and train_classifier and distill alone",)),
        (["--config.train=3"], ("config.train is a group, not a field", "learning_rate")),
        (["--config.sample.w=(0.0,-2.0)"], ("config.sample.w is (0.0, -2.0)", ">= -1")),
        (["--config.train.p_uncond=nan"], ("config.train.p_uncond is nan", ">= 0 and <= 1")),
        (["--config.sample.classes=(3,10)"], ("config.sample.classes has 10", "0 to 9")),
        (["--config.sample.w=(1.0,)", "--config.sample.w=()"], ("--config.sample.w is given twice", "give it once")),
        (["--config.mesh.data=3"], ("mesh is data=3 x fsdp=1 for 1 devices",)),
        (["--config.data.source=folder", "--config.data.path=nowhere"], ("nowhere",)),
        (["--config.xla.compilation_cache=/proc/none"], ("/proc/none, which cannot be used", "'' for none")),
        (["--workdir=/proc/none"], ("/proc/none cannot be written", "give another --workdir")),
        (["--mode=evaluate"], ("mode", "evaluate", "sample", "sweep", "train")),
        (["--mode=sample"], ("runs/digits holds no run", "--mode=train")),
        (["--mode=sweep", "--workdir=elsewhere"], ("elsewhere holds no run", "--mode=train")),
        (["--verbos"], ("--verbos is no flag: choose among --config, ", "--workdir", "--config.GROUP.FIELD=VALUE")),
        (["--workdir"], ("workdir",)),
        (["--workdir="], ("--workdir is empty", "name a folder")),
        (["--workdir=s3://bucket/run"], ("--workdir is 's3://bucket/run'", "give gs://BUCKET/NAME, or a path")),
        (["--workdir=gs:/bucket/run"], ("--workdir is 'gs:/bucket/run'", "form gs://BUCKET/NAME")),
        (["--workdir=a\\b"], ("a\\b has \\ in its name", "give a --workdir")),
        (["--workdir=[old]"], ("[old] has [ ] in its name", "give a --workdir")),
        (["--init_from=nowhere"], ("nowhere/config.json does not exist", "not the folder of a run")),
        (["--init_from=file:///old/run"], ("--init_from is 'file:///old/run'", "give gs://BUCKET/NAME")),
        (["--init_from=runs/old", "--mode=sample"], ("--init_from begins a run in --mode=train", "leave it out")),
        (["--out=elsewhere"], ("--out is 'elsewhere', but --mode=train writes to the run itself",)),
        (["--out=gs://Bucket/out", "--mode=sample"], ("--out is 'gs://Bucket/out'", "lower-case letters")),
        (["--config.eval.reference=gs://b/r.npz"], ("eval.reference is 'gs://b/r.npz'", "the form gs://BUCKET/NAME")),
        (["--config.eval.inception_path=s3://b/i.npz"], ("is 's3://b/i.npz'", "a URL gs://BUCKET/NAME (copy")),
        (["--workdir=~/no/such/run", "--mode=sweep"], (f"{os.path.expanduser('~')}/no/such/run holds no run",)),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_reported_in_a_line(command: Command, arguments: list[str], words: tuple[str, ...]) -> None:
    error = command.fails(DIGITS, *arguments)
    assert all(word in error for word in words), error


def test_the_config_itself_can_be_the_mistake(command: Command) -> None:
    assert "--config is missing: give the name of a config of the package, such as --config=digits" in command().err
    assert "--config.seed sets a field of a config that is not named yet" in command.fails("--config.seed=1", DIGITS)
    assert "nowhere.py" in command.fails("--config=nowhere.py")
    assert "--config is 's3://bucket/run'" in command.fails("--config=s3://bucket/run")
    broken = command.folder / "broken.py"
    broken.write_text("def get_config(:\n")
    assert "broken.py" in command.fails(f"--config={broken}")
    (command.folder / "helper.py").write_text("def size(config):\n  return config['size']\n")
    in_helper = f"import sys\nsys.path.append({str(command.folder)!r})\nimport helper\nhelper.size({{}})"
    for text, words in (
        ('{"seed": 0}', "it has no get_config"),
        (
            "import no_such_module",
            f"ModuleNotFoundError: No module named 'no_such_module', at {broken}, line 1: import no",
        ),
        ("def get_config():\n  return {'seed': 0}", "get_config() gives dict"),
        (
            "def get_config():\n  return 1 / 0",
            f"ZeroDivisionError: division by zero, at {broken}, line 2: return 1 / 0",
        ),
        ("open('none')", f"FileNotFoundError: [Errno 2] No such file or directory: 'none', at {broken}, line 1: open("),
        (
            in_helper,
            f"KeyError: 'size', at {broken}, line 4: helper.size({{}}), at {broken.with_name('helper.py')}, line 2",
        ),
    ):
        broken.write_text(text)
        error = command.fails(f"--config={broken}")
        assert f"{broken} is no config (" in error and words in error, error
        assert "the name of a config of the package, such as digits" in error
    wrong = command.folder / "wrong.py"
    wrong.write_text("from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict(dict(sed=0))\n")
    assert "config.sed is not a field; the group has seed" in command.fails(f"--config={wrong}")


@pytest.mark.parametrize(
    ("arguments", "is_final"),
    [
        (["--config=imagenet"], True),
        ([DIGITS, "--verbos"], True),
        ([DIGITS, "--mode=evaluate"], True),
        ([DIGITS, "--config.train.lr=1"], True),
        ([DIGITS, "--config.train.num_steps=ten"], True),
        ([DIGITS, "--config.train.p_uncond=nan"], True),
        ([DIGITS, "--mode=sample", "--allow_fresh_start"], True),
        ([DIGITS, "--workdir=[old]"], True),
        ([DIGITS, "--workdir=s3://bucket/run"], True),
        ([DIGITS, "--config.data.source=folder", "--config.data.path=nowhere"], True),
        ([DIGITS, "--config.eval.weights=()", "--config.data.source=folder", "--config.data.path=nowhere"], True),
        ([DIGITS, "--config.data.num_classes=9"], True),
        ([DIGITS, "--config.eval.reference=nowhere.npz"], True),
        ([DIGITS, "--init_from=nowhere"], True),
        ([DIGITS, "--mode=distill", "--init_from=nowhere"], True),
        ([DIGITS, "--mode=distill", "--config.distill.halvings=(8, 3)"], True),
        ([DIGITS, "--mode=train_classifier", "--config.data.source=folder", "--config.data.path=nowhere"], True),
        ([DIGITS, "--config.data.source=folder", "--config.data.path=closed/data"], False),
        ([DIGITS, "--config.eval.reference=closed/reference.npz"], False),
        ([DIGITS, "--init_from=closed/run"], False),
        ([DIGITS, "--mode=sample"], False),
        ([DIGITS, "--workdir=/proc/none"], False),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_supervisor_is_told_that_the_command_itself_is_wrong(
    command: Command, arguments: list[str], is_final: bool
) -> None:
    """A new run that does not find its inputs ends alike at every start. What the system cannot read now may be read
    later: a folder without permissions stands for a disk whose server does not answer."""
    (command.folder / "closed").mkdir(mode=0, exist_ok=True)
    done = command(*arguments, supervised=True)
    assert done.code == 1 and done.err.startswith("error: ") and ("cfd-final:\n" in done.out) == is_final, done


def test_an_unknown_name_of_a_config_is_refused_with_the_names_to_choose_from(command: Command) -> None:
    error = command.fails("--config=imagenet")
    names = ", ".join(sorted(path.stem for path in (ROOT / "configs").glob("*.py")))
    assert f"error: flag --config=imagenet: imagenet names no config; choose one of {names}" in error


def test_the_help_is_no_error(command: Command) -> None:
    code, out, err = command("--help")
    assert (code, err) == (0, "") and "--workdir: The run's folder" in out
    leaves = command.folder / "leaves.py"
    leaves.write_text("raise SystemExit(3)\n")
    assert command(f"--config={leaves}").code == 3


def listed(command: Command, *arguments: str) -> dict[str, str]:
    """The value of each field that `--mode=config` prints. It must leave the folder as it is."""
    before = sorted(command.folder.rglob("*"))
    code, out, err = command(*arguments, "--mode=config")
    assert (code, err) == (0, ""), err
    assert sorted(command.folder.rglob("*")) == before
    lines = (line.partition("  # ")[0].partition(" = ") for line in out.splitlines() if line)
    return {name: value.strip() for name, _, value in lines}


def test_the_mode_config_prints_the_whole_config_and_needs_no_run(command: Command) -> None:
    values = listed(command, DIGITS)
    assert values.keys() == FIELDS.keys()
    assert values["data.source"] == "'digits'" and values["train.num_steps"] == "800" and values["sample.v"] == "0.3"
    changed = listed(command, DIGITS, "--config.train.num_steps=7", "--config.classifier.dropout=0.5")
    assert changed == values | {"train.num_steps": "7", "classifier.dropout": "0.5"}
    assert "config.train.num_steps is 0" in command.fails(DIGITS, "--config.train.num_steps=0", "--mode=config")


def test_a_name_stands_for_a_config_of_the_package(command: Command) -> None:
    assert listed(command, "--config=digits") == listed(command, DIGITS)
    (command.folder / "digits").mkdir()  # a name is never a file
    (command.folder / "digits.py").write_text("raise ValueError\n")
    assert listed(command, "--config=digits") == listed(command, DIGITS)
    assert "runs/digits holds no run" in command.fails("--config=digits", "--mode=sample")


def test_a_config_needs_to_state_only_what_differs(command: Command) -> None:
    short = command.folder / "short.py"
    short.write_text("from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict(dict(seed=3))\n")
    values = listed(command, f"--config={short}", "--config.sample.w=(0.5,)")
    expected = {name: repr(field.default) for name, field in FIELDS.items()}
    assert values == expected | {"seed": "3", "sample.w": "(0.5,)"}


@pytest.fixture
def run(command: Command) -> Command:
    """runs/digits is the folder of a run that has no checkpoint yet."""
    names = tuple("0123456789")
    content = workdir.describe("diffusion", tiny_config().to_dict(), names)
    workdir.write_config(command.folder / "runs" / "digits", content)
    return command


def test_the_folder_of_another_run_is_not_changed(run: Command) -> None:
    (run.folder / "runs" / "digits" / "checkpoints" / "2").mkdir(parents=True)
    for mode in ("train", "sample", "sweep"):
        error = run.fails(DIGITS, *flags_of(train__learning_rate=0.5), f"--mode={mode}")
        assert "learning_rate: 0.001 there, 0.5 here" in error and "another --workdir" in error
    assert "cfd-final:" in run(DIGITS, *flags_of(train__learning_rate=0.5), supervised=True).out


def test_data_that_a_run_has_found_before_may_come_back(run: Command) -> None:
    """Its disk may not be mounted at the moment."""
    done = run(DIGITS, *flags_of(data__source="folder", data__path="nowhere"), supervised=True)
    assert done.code == 1 and "nowhere" in done.err and "cfd-final:" not in done.out, done


def test_the_run_of_another_kind_is_refused_in_every_mode(command: Command) -> None:
    content = workdir.describe("gan", tiny_config().to_dict(), tuple("0123456789"))
    workdir.write_config(command.folder / "runs" / "digits", content)
    for mode in ("sample", "sweep", "likelihood", "compare", "cost", "report", "train_classifier"):
        error = command.fails(DIGITS, *flags_of(), f"--mode={mode}")
        assert "runs/digits is the run of a gan: give the folder of a diffusion model" in error


def test_a_run_without_a_checkpoint_says_that_it_has_none(run: Command) -> None:
    for mode in ("sample", "sweep"):
        assert "has no step; its steps are []" in run.fails(DIGITS, *flags_of(), f"--mode={mode}")


def test_the_folders_to_compare_may_begin_with_a_tilde(run: Command) -> None:
    folder = str(run.folder / "runs" / "digits")
    made = {name: {"sha256": ""} for name in ("reference", "features", "weights")} | {"sampling": {}}
    manifest.write_manifest(folder, made)
    results.append_row(folder, dict.fromkeys(results.COLUMNS, 1) | {"manifest": manifest.manifest_name(made)})
    error = run.fails(DIGITS, *flags_of(), "--mode=compare", "--runs=~/no/such/run")
    assert f"{os.path.expanduser('~')}/no/such/run has no sweep.csv" in error


def test_a_run_that_does_not_begin_leaves_nothing(command: Command) -> None:
    student = ["--config=digits_student", "--mode=distill"]
    assert "the teacher " in command.fails(*student) and "has no teacher yet" in command.fails(
        *student, "--config.distill.teacher="
    )
    nowhere = ["--config.data.source=folder", "--config.data.path=nowhere"]
    assert "nowhere" in command.fails(DIGITS, "--mode=train_classifier", *nowhere)
    (command.folder / "empty").mkdir()
    assert "nowhere" in command.fails(DIGITS, "--workdir=empty/a/b", *nowhere)


def test_a_sweep_without_weights_is_refused(run: Command) -> None:
    error = run.fails(DIGITS, *flags_of(eval__weights=()), "--mode=sweep")
    assert "config.eval.weights is ()" in error and "--config.eval.weights=" in error


def test_the_error_of_an_empty_list_of_weights_says_how_to_switch_the_sweep_off(command: Command) -> None:
    """The remedy is followed."""
    remedy = re.search(r"--config\.eval\.weights='(.*?)'", command.fails(DIGITS, "--config.eval.weights="))
    assert remedy is not None
    assert "eval.weights = ()" in command(DIGITS, "--mode=config", f"--config.eval.weights={remedy[1]}").out


def test_a_run_that_trains_can_be_looked_at(run: Command) -> None:
    """Only what writes to the run is refused, with the remedy."""
    folder = run.folder / "runs" / "digits"
    with access.lock(folder):
        error = run.fails(DIGITS, *flags_of())
        assert f"locked by pid {os.getpid()}" in error and "give another --workdir" in error
        error = run.fails(DIGITS, *flags_of(), "--mode=sweep")
        assert f"locked by pid {os.getpid()}" in error and "give --out=DIR" in error
        assert "has no step" in run.fails(DIGITS, *flags_of(), "--mode=sweep", "--out=elsewhere")
        assert "has no step" in run.fails(DIGITS, *flags_of(), "--mode=sample")
        assert run(DIGITS, *flags_of(), "--mode=report") == (0, "Wrote runs/digits/report.html.\n", "")
    assert run(DIGITS, *flags_of(), "--mode=report", "--out=new/folder").out == "Wrote new/folder/report.html.\n"
    assert (run.folder / "new" / "folder" / "report.html").read_text() == (folder / "report.html").read_text()


def test_a_run_that_may_only_be_read(run: Command) -> None:
    """`--out` names the folder to write to, which each refusal says. A run that may not be read is named too."""
    folder = run.folder / "runs" / "digits"
    folder.chmod(0o555)
    for mode in ("report", "compare", "sample", "sweep"):
        error = run.fails(DIGITS, *flags_of(), f"--mode={mode}")
        assert "runs/digits cannot be written (Permission denied): give --out=DIR" in error
    error = run.fails(DIGITS, *flags_of())
    assert "runs/digits cannot be written (Permission denied): give another --workdir" in error
    assert run(DIGITS, *flags_of(), "--mode=report", "--out=mine").code == 0
    assert (run.folder / "mine" / "report.html").exists() and not (folder / "report.html").exists()
    folder.chmod(0o000)
    error = run.fails(DIGITS, *flags_of(), "--mode=report", "--out=mine")
    assert "runs/digits cannot be read (Permission denied): its owner can allow it, by chmod -R a+rX" in error
    folder.chmod(0o755)
    (folder / "config.json").chmod(0o000)
    error = run.fails(DIGITS, *flags_of(), "--mode=report", "--out=mine")
    assert "config.json cannot be read (Permission denied): its owner can allow it, by chmod -R a+rX" in error
    subprocess.run(["chmod", "-R", "a+rX", folder], check=True)  # the remedy
    assert run(DIGITS, *flags_of(), "--mode=report", "--out=mine").code == 0


def test_errors_are_kept_in_the_folder_that_is_written_to(run: Command) -> None:
    """With the traceback, the time and the mode; one entry after the other."""
    for number in (1, 2):
        run.fails(DIGITS, *flags_of(), "--mode=sample")
        entries = (run.folder / "runs" / "digits" / "errors.log").read_text()
        assert entries.count("--mode=sample, process 0, pid ") == entries.count("Traceback") == number
        assert entries.count("UserError: ") == number and re.match(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00 ", entries)
    (run.folder / "mine").mkdir()
    run.fails(DIGITS, *flags_of(), "--mode=sample", "--out=mine")
    assert (run.folder / "mine" / "errors.log").read_text().count("Traceback") == 1
    assert (run.folder / "runs" / "digits" / "errors.log").read_text() == entries


def test_output_into_a_pipe_without_a_reader_is_no_error(command: Command) -> None:
    """As with `| head`: nobody wants to read more."""
    line = f"{sys.executable} -m cfd.main {DIGITS} --mode=config | head -1; echo ${{PIPESTATUS[0]}}"
    cut = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert cut.stdout.splitlines()[-1] == "0"
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    whole = [sys.executable, "-m", "cfd.main", DIGITS, "--mode=config"]
    done = subprocess.run(whole, cwd=ROOT, env=ascii_only, capture_output=True, text=True)
    assert done.returncode == 0 and "log-SNR \\u03bb" in done.stdout
    assert cut.stderr == done.stderr and "Error" not in done.stderr  # grain warns of a jaxlib below 0.11


@pytest.mark.parametrize("needed", ["eval__reference", "eval__inception_path"])
def test_the_files_that_a_sweep_needs_are_checked_before_training(command: Command, needed: str) -> None:
    colour = dict(data__channels=3, model__out_channels=3, eval__features="inception")
    changes = colour if needed == "eval__inception_path" else {}
    error = command.fails(DIGITS, *flags_of(**changes, **{needed: "no.npz"}))
    assert "no.npz" in error and "is no file" in error
    npz.write_npz(command.folder / "other.npz", {"arr_0": np.zeros((3, 16, 16, 1), np.uint8)})
    (command.folder / "weights.pth").write_bytes(b"no archive")
    wrong_size = "(16, 16, 1), but the config is for images of shape (8, 8, 1)"
    other, words = ("weights.pth", "not a sound .npz") if changes else ("other.npz", wrong_size)
    assert words in command.fails(DIGITS, *flags_of(**changes, **{needed: other}))


def test_the_whole_job(command: Command) -> None:
    """Train, sweep and sample with the real network and data; the same command again has nothing left to do."""
    changes: dict[str, Any] = dict(train__num_steps=24, train__checkpoint_every_steps=12, train__sample_every_steps=12)
    changes |= dict(eval__weights=(0.0, 2.0), xla__compilation_cache="compiled")  # for the two starts after the first
    flags = [DIGITS, "--workdir=run", *flags_of(**changes)]
    folder, environment = command.folder / "run", os.environ | {"PYTHONPATH": str(ROOT)}
    whole = [sys.executable, "-m", "cfd.main", *flags]
    done = subprocess.run(whole, cwd=command.folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    warned = [line for line in done.stderr.splitlines() if "covariance" in line or "UserWarning" in line]
    few = "20 samples of 64 features give a covariance of rank at most 19: the Fréchet distance is biased"
    assert [line.partition(";")[0] for line in warned] == [f"warning: {few}"]
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 25))
    losses = [line["loss"] for line in log]
    assert abs(losses[0] - 1.0) < 0.15  # ε has variance 1, and a new network returns 0
    assert np.mean(losses[-5:]) < 0.9 * losses[0]
    rows = results.read_rows(str(folder))
    assert [(row["w"], row["num_samples"], row["features"]) for row in rows] == [
        (0.0, 20, "classifier"),
        (2.0, 20, "classifier"),
    ]
    assert "| w |" in done.stdout and "| 2 |" in done.stdout
    for name in ("sweep.png", "samples/sweep.png", "samples/step_0000012.png", "samples/step_0000024.png"):
        with Image.open(folder / name) as image:
            image.load()
            assert image.format == "PNG"
    assert list((folder / "tensorboard").iterdir())
    labels = npz.read_npz(next((folder / "samples").glob("*w-2.0*.npz")))["arr_1"]
    assert np.bincount(labels).tolist() == [2] * 10

    before = {name: (folder / name).read_bytes() for name in ("metrics.jsonl", "sweep.csv")}
    again = command(*flags)
    assert again.code == 0, again.err
    assert "at step 24 of 24" in again.out and "2 of 2 cells are in" in again.out
    assert {name: (folder / name).read_bytes() for name in before} == before
    grid = command(*flags, "--mode=sample")
    assert grid.code == 0 and "sample_step_0000024_" in grid.out, grid.err
    written = grid.out.split("Wrote ")[1].split(".png")[0]
    assert len(npz.read_npz(command.folder / f"{written}.npz")["arr_1"]) > 0
