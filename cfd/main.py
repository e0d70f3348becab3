"""`python -m cfd.main --config=NAME_OR_FILE [--workdir=DIR] [--mode=MODE] [--config.GROUP.FIELD=VALUE ...]`

The default mode, train, does the whole job: it trains, and then sweeps the guidance weight as the config's `eval` asks.
The same command again resumes. Other modes: train_classifier (for classifier guidance), sample, sweep, compare (several
runs' sweeps in one table), report (a page to look at) and config (print the whole config and what each field means).
"""

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from cfd.config import FIELDS, Config, check_name, complete, listing, with_defaults
from cfd.devices import parallel, preemption, watchdog, xla
from cfd.errors import UserError
from cfd.modes import compare, report, sample, sweep, train, train_classifier
from cfd.runs import workdir

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment: the name of a config of the package, such as digits, or a file.", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder; runs/<config name> by default.")
RUNS = flags.DEFINE_list("runs", [], "Folders of other runs, for --mode=compare.")
ALLOW_FRESH_START = flags.DEFINE_bool(
    "allow_fresh_start", False, "If all checkpoints of the run are damaged, set them aside and train from step 0."
)


def run_train(config: Config, folder: str) -> None:
    """The whole job: train, then sweep the weights that `eval` asks for."""
    if config.eval.weights:
        sweep.check(config, folder)
    train.train(config, folder, allow_fresh_start=ALLOW_FRESH_START.value)
    if config.eval.weights:
        sweep.sweep(config, folder)


def run_train_classifier(config: Config, folder: str) -> None:
    """Train the noisy classifier that `sample.guidance = "classifier"` needs."""
    train_classifier.train_classifier(config, folder, allow_fresh_start=ALLOW_FRESH_START.value)


def run_sample(config: Config, folder: str) -> None:
    """Sample the grid of `sample`'s classes, seeds and weights."""
    print(f"Wrote {sample.sample(config, folder)} and an .npz of the same name.")


def run_sweep(config: Config, folder: str) -> None:
    """Measure every weight of `eval.weights`."""
    sweep.sweep(config, folder)
    print(f"Wrote {folder}/sweep.csv, sweep.png and the grids samples/sweep*.png.")


def run_compare(config: Config, folder: str) -> None:
    """Compare this run's sweep with those of --runs."""
    print(compare.compare(config, folder, [os.path.expanduser(run) for run in RUNS.value]))
    print(f"Wrote {folder}/compare.md and compare.png.")


def run_report(config: Config, folder: str) -> None:
    """Write the page about the run."""
    print(f"Wrote {report.report(folder)}.")


MODES: dict[str, Callable[[Config, str], None]] = {
    "train": run_train,
    "train_classifier": run_train_classifier,
    "sample": run_sample,
    "sweep": run_sweep,
    "compare": run_compare,
    "report": run_report,
}
MODE = flags.DEFINE_enum("mode", "train", sorted((*MODES, "config")), "What to do.")


def main(argv: Sequence[str]) -> None:
    """Run one mode in one folder. Errors that a user can correct are printed in a line or two, without a traceback."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; fields are set by --config.GROUP.FIELD=VALUE")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    try:
        config = complete(CONFIG.value)
        if MODE.value == "config":
            print(listing(config))
            return
        folder = run_folder()
        parallel.init_distributed()
        xla.use_compilation_cache(config.xla.compilation_cache)
        xla.return_freed_memory()
        preemption.install()
        watchdog.install(config.train.watchdog_seconds)
        if MODE.value not in ("train", "train_classifier") and not os.path.exists(os.path.join(folder, workdir.CONFIG)):
            raise UserError(
                f"{folder} holds no run: train it first, with --mode=train, or give the --workdir of another"
            )
        with workdir.lock(folder):
            MODES[MODE.value](config, folder)
    except preemption.Stopped as stopped:
        print(f"{stopped}; the same command resumes.", flush=True)
    except UserError as error:
        sys.exit(f"error: {in_one_line(error)}")
    finally:
        watchdog.off()


def run_folder() -> str:
    """The folder that --workdir names, or runs/<config name>. Raises ValueError if it cannot be a folder."""
    if WORKDIR.value is None:
        return os.path.join("runs", Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem)
    if not WORKDIR.value:
        raise UserError("--workdir is empty: name a folder, or leave the flag out for runs/<config name>")
    if "://" in WORKDIR.value:
        raise UserError(
            f"--workdir is {WORKDIR.value!r}, a URL; a run needs a file system with locks and renames: mount one, such "
            "as a network disk, and give a path there"
        )
    return os.path.expanduser(WORKDIR.value)


def in_one_line(error: Exception) -> str:
    """The message of an error. A message of one word, such as a KeyError's, is preceded by the type of the error."""
    text = " ".join(str(error).split())
    return text if " " in text else f"{type(error).__name__}: {text}"


def config_folder() -> Path:
    """The folder of the package's configs: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).parent
    packaged = package / "configs"
    return packaged if packaged.is_dir() else package.parent / "configs"


def config_file(name_or_file: str) -> str:
    """The file of a config. A name without a slash or an ending stands for a config of the package.

    Raises ValueError, with the names to choose from, for an unknown name.
    """
    if "/" in name_or_file or "." in name_or_file or ":" in name_or_file:
        return name_or_file
    path = config_folder() / f"{name_or_file}.py"
    if not path.is_file():
        names = sorted(file.stem for file in config_folder().glob("*.py"))
        raise UserError(f"--config={name_or_file} names no config; choose one of {', '.join(names)}, or give a file")
    return str(path)


def load_config(path: str, load: Callable[[str], Any]) -> ConfigDict:
    """The ConfigDict of a config, with all defaults, so that any field can be overridden.

    Raises ValueError that says what the file is, or raises, instead.
    """
    path = config_file(path)
    try:
        if not os.path.isfile(path.partition(":")[0]):
            raise FileNotFoundError("there is no such file")
        config = load(path)
        reason = f"get_config() gives {type(config).__name__}"
    except Exception as error:  # a file can raise anything
        config = None
        # ml_collections wraps some errors in a text that ends with the traceback; its last line is the error.
        reason = (str(error).splitlines() or [""])[-1]
        reason = f"{type(error).__name__}: {reason.removeprefix(f'{type(error).__name__}: ')}"
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"{path} is no config ({reason}): give a Python file with get_config() -> ConfigDict, or the name of a "
            "config of the package, such as digits"
        )
    return with_defaults(config)


_PARSER: Any = flags.FLAGS["config"].parser
_PARSER.parse = partial(load_config, load=_PARSER.parse)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's parser, with the errors of the config file and of its overrides in one line.

    A tuple that is given twice is an error, because ml_collections would join the two.
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
                raise UserError(f"--{flag} is given twice: give it once, as --{flag}='(A, B)'")
            if FIELDS[name].check.type is tuple:
                tuples.add(name)
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError) as error:
        sys.exit(f"error: {in_one_line(error)}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=parse_flags)
