"""`python -m cfd.main --config=FILE [--workdir=DIR] [--mode=MODE] [--config.GROUP.FIELD=VALUE ...]`

Trains, and then sweeps the guidance weight as the config's `eval` asks. The same command again resumes. Other modes:
train_classifier (for classifier guidance), sample, sweep, compare (several runs' sweeps in one table) and report (a
page to look at).
"""

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from cfd import evaluation, generate, parallel, preemption, report, train, watchdog, workdir, xla
from cfd.checkpoint import CheckpointError
from cfd.config import FIELDS, Config, check_name, validate

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: a file of configs/.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder; runs/<config name> by default.")
RUNS = flags.DEFINE_list("runs", [], "Folders of other runs, for --mode=compare.")
ALLOW_FRESH_START = flags.DEFINE_bool(
    "allow_fresh_start", False, "If all checkpoints of the run are damaged, set them aside and train from step 0."
)


def train_and_sweep(config: Config, folder: str) -> None:
    """The whole job: train, then sweep the weights that `eval` asks for."""
    if config.eval.weights:
        evaluation.check(config, folder)
    train.train(config, folder, allow_fresh_start=ALLOW_FRESH_START.value)
    if config.eval.weights:
        evaluation.sweep(config, folder)


def train_classifier(config: Config, folder: str) -> None:
    """Train the noisy classifier that `sample.guidance = "classifier"` needs."""
    train.train_classifier(config, folder, allow_fresh_start=ALLOW_FRESH_START.value)


def sample(config: Config, folder: str) -> None:
    """Draw the grid of `sample`'s classes, seeds and weights."""
    print(f"Wrote {generate.sample(config, folder)} and the .npz beside it.")


def sweep(config: Config, folder: str) -> None:
    """Measure every weight of `eval.weights`."""
    evaluation.sweep(config, folder)
    print(f"Wrote {folder}/sweep.csv, sweep.png and the grids samples/sweep*.png.")


def compare(config: Config, folder: str) -> None:
    """Put the sweeps of --runs beside this run's."""
    print(evaluation.compare(config, folder, [os.path.expanduser(run) for run in RUNS.value]))
    print(f"Wrote {folder}/compare.md and compare.png.")


def make_report(config: Config, folder: str) -> None:
    """Write the page about the run."""
    print(f"Wrote {report.report(folder)}.")


MODES: dict[str, Callable[[Config, str], None]] = {
    "train": train_and_sweep,
    "train_classifier": train_classifier,
    "sample": sample,
    "sweep": sweep,
    "compare": compare,
    "report": make_report,
}
MODE = flags.DEFINE_enum("mode", "train", sorted(MODES), "What to do.")


def main(argv: Sequence[str]) -> None:
    """Run one mode in one folder. What a user can mend is said in a line or two, without a traceback."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; fields are set by --config.GROUP.FIELD=VALUE")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    try:
        config = CONFIG.value
        validate(config)
        folder = os.path.join("runs", Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem)
        if WORKDIR.value is not None:
            folder = os.path.expanduser(WORKDIR.value)
        if not folder:
            raise ValueError("--workdir is empty: name a folder, or leave the flag out for runs/<config name>")
        if "://" in folder:
            raise ValueError(
                f"--workdir is {folder!r}, a URL; a run needs a file system with locks and renames: mount one, such as "
                "a network disk, and give a path there"
            )
        parallel.init_distributed()
        xla.use_compilation_cache(config.xla.compilation_cache)
        xla.return_freed_memory()
        preemption.install()
        watchdog.install(config.train.watchdog_seconds)
        if MODE.value not in ("train", "train_classifier") and not os.path.exists(os.path.join(folder, workdir.CONFIG)):
            raise ValueError(
                f"{folder} holds no run: train it first, with --mode=train, or give the --workdir of another"
            )
        with workdir.lock(folder):
            MODES[MODE.value](config, folder)
    except preemption.Stopped as stopped:
        print(f"{stopped}; the same command resumes.", flush=True)
    except (ValueError, OSError, CheckpointError, FloatingPointError) as error:
        sys.exit(f"error: {in_one_line(error)}")
    finally:
        watchdog.off()


def in_one_line(error: Exception) -> str:
    """What an error says; a message that is a bare name, as of a KeyError, with its type."""
    text = " ".join(str(error).split())
    return text if " " in text else f"{type(error).__name__}: {text}"


def load_config(path: str, load: Callable[[str], Any]) -> ConfigDict:
    """The ConfigDict of a config file. Raises ValueError with what the file is, or raises, instead."""
    try:
        if not os.path.isfile(path.partition(":")[0]):
            raise FileNotFoundError("there is no such file")
        config = load(path)
        if isinstance(config, ConfigDict):
            return config
        reason = f"get_config() gives {type(config).__name__}"
    except Exception as error:  # a file can raise anything
        reason = (str(error).splitlines() or [""])[-1]  # of a traceback, which ml_collections puts around some
        reason = f"{type(error).__name__}: {reason.removeprefix(f'{type(error).__name__}: ')}"
    raise ValueError(
        f"{path} is no config ({reason}): give a Python file with get_config() -> ConfigDict, such as configs/digits.py"
    )


_PARSER: Any = flags.FLAGS["config"].parser
_PARSER.parse = partial(load_config, load=_PARSER.parse)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's parser, with the errors of the config file and of its overrides in one line.

    A tuple that is given twice is an error: ml_collections would join the two.
    """
    try:
        tuples = set()
        for argument in flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=False):
            flag = argument.lstrip("-").partition("=")[0]
            if not flag.startswith("config."):
                continue
            name = flag.removeprefix("config.")
            check_name(name)
            if name in tuples:
                raise ValueError(f"--{flag} is given twice: give it once, as --{flag}='(A, B)'")
            if FIELDS[name].type is tuple:
                tuples.add(name)
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError) as error:
        sys.exit(f"error: {in_one_line(error)}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)
