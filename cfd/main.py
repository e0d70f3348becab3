"""`python -m cfd.main --config=NAME_FILE_OR_RUN [--workdir=DIR] [--mode=MODE] [--config.GROUP.FIELD=VALUE ...]`

The default mode, train, does the whole job: it trains, and then sweeps the guidance weight as the config's `eval` asks.
The same command again resumes. Other modes: train_classifier (for classifier guidance), distill (students, whose
guidance weight is an input), sample, sweep, likelihood (bits per dimension), compare (several runs' sweeps in one
table), cost (of guided images), report (a page to look at) and config (the whole config and what each field means).
"""

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from cfd.config import Config, check_name, complete, listing
from cfd.devices import memory, notices, output, parallel, preemption, progress, watchdog, xla
from cfd.devices.buckets import is_url
from cfd.errors import CommandError, UserError, about_inputs
from cfd.fields import FIELDS
from cfd.modes import (
    compare,
    cost,
    distill,
    finetune,
    guides,
    likelihood,
    report,
    rules,
    sample,
    settings,
    sweep,
    train,
    train_classifier,
)
from cfd.modes.named import load_config, named_run
from cfd.runs import access, files, workdir
from cfd.runs.errors_log import ERRORS, append_error

CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "The experiment: the name of a config of the package, such as digits, a file, or the folder of a run.",
    lock_config=True,
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run's folder; by default the one that --config names, or runs/<config name>."
)
OUT = flags.DEFINE_string("out", None, "The folder for results of modes that train nothing; by default the run's.")
RUNS = flags.DEFINE_list("runs", [], "Folders of other runs, for --mode=compare and cost.")
ALLOW_FRESH_START = flags.DEFINE_bool(
    "allow_fresh_start", False, "If all checkpoints of the run are damaged, set them aside and train from step 0."
)
INIT_FROM = flags.DEFINE_string(
    "init_from", None, "RUN or RUN:STEP: a new run begins with the EMA weights of another run, in distill its teacher."
)


def run_train(config: Config, folder: str, out: str) -> None:
    """The whole job: train, with the small guide if `eval` asks for one, then sweep the weights of `eval`."""
    with about_inputs():
        finetune.check(config, folder, source_run())
        train.check_run(config, folder)
        if config.eval.weights:
            sweep.check(config, folder, out)
            train.check_steps(config, folder)
    train.train(config, folder, init_from=source_run(), allow_fresh_start=ALLOW_FRESH_START.value)
    if guides.has_own(config):
        say(f"The small guide of the run is in {guides.own_folder(folder)}.")
        train.train(guides.config_of_own(config), guides.own_folder(folder), allow_fresh_start=ALLOW_FRESH_START.value)
    if config.eval.weights:
        sweep.sweep(config, folder, out)


def run_train_classifier(config: Config, folder: str, out: str) -> None:
    """Train the noisy classifier that `sample.guidance = "classifier"` needs."""
    train_classifier.train_classifier(config, folder, allow_fresh_start=ALLOW_FRESH_START.value)


def run_distill(config: Config, folder: str, out: str) -> None:
    """Distill the students that `distill` asks for, and sweep the weights that `eval` asks for with each."""
    with about_inputs():
        students = distill.stages(config, folder, source_run())
        distill.check(*students[0])
        if config.eval.weights:
            for student, place, _ in students:
                sweep.check(student, place, place)
    for student, place, teacher in students:
        distill.distill(student, place, init_from=teacher, allow_fresh_start=ALLOW_FRESH_START.value)
        if config.eval.weights:
            sweep.sweep(student, place, place)


def run_sample(config: Config, folder: str, out: str) -> None:
    """Sample the grid of `sample`'s classes, seeds and weights."""
    say(f"Wrote {sample.sample(config, folder, out)} and an .npz of the same name.")


def run_sweep(config: Config, folder: str, out: str) -> None:
    """Measure every weight of `eval.weights`."""
    sweep.sweep(config, folder, out)
    say(f"Wrote {out}/sweep.csv, sweep.png and the grids samples/sweep*.png.")


def run_likelihood(config: Config, folder: str, out: str) -> None:
    """Compute the variational bound in bits per dimension."""
    text = likelihood.likelihood(config, folder, out)
    say(f"{text}\nWrote {out}/likelihood.csv and likelihood.png.")


def run_compare(config: Config, folder: str, out: str) -> None:
    """Compare this run's sweep with those of --runs. Process 0 does it alone."""
    if jax.process_index() == 0:
        say(compare.compare(config, folder, [access.run_path("--runs", run) for run in RUNS.value], out))
        say(f"Wrote {out}/compare.md and compare.png.")


def run_cost(config: Config, folder: str, out: str) -> None:
    """Measure what an image costs in the cells of this run's sweep and of those of --runs. Process 0 does it alone."""
    if jax.process_index() == 0:
        say(cost.cost(config, folder, [access.run_path("--runs", run) for run in RUNS.value], out))
        say(f"Wrote {out}/cost.md, cost.csv and cost.png.")


def run_report(config: Config, folder: str, out: str) -> None:
    """Write the page about the run. Process 0 does it alone."""
    if jax.process_index() == 0:
        say(f"Wrote {report.report(folder, out)}.")


MODES: dict[str, Callable[[Config, str, str], None]] = {
    "train": run_train,
    "train_classifier": run_train_classifier,
    "distill": run_distill,
    "sample": run_sample,
    "sweep": run_sweep,
    "likelihood": run_likelihood,
    "compare": run_compare,
    "cost": run_cost,
    "report": run_report,
}
"""{mode: what it does with a config, a run's folder and the folder that it writes to}."""
TRAINING = ("train", "train_classifier", "distill")
READ_BY = {"runs": ("compare", "cost"), "allow_fresh_start": TRAINING}
"""The modes that read a flag that not all of them read. `out_folder` and `source_run` check the other two."""
MODE = flags.DEFINE_enum("mode", "train", sorted((*MODES, "config")), "What to do.")


def main(argv: Sequence[str]) -> int:
    """Run one mode in one folder. Returns the exit code: 0 finished, 75 stopped on request and saved.

    An error that a user can correct is printed in a line, and exits with code 1. Every other error is raised. The
    traceback of both is added to errors.log in the folder that the mode writes to, if there is such a folder, and so is
    that of an interrupt that does not wait. If the command itself is wrong, launch/supervise.py is told not to start it
    again.
    """
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    out, process = "", 0

    def append(text: str, *, also_in_bucket: bool = False) -> files.AnyPath | None:
        """Adds a text to errors.log, and returns the file, or None if there is none, or if a bucket has to wait."""
        if not out or (is_url(out) and not also_in_bucket):
            return None
        return append_error(out, f"--mode={MODE.value}", text, process=process)

    def note(text: str) -> str:
        """Adds a text to errors.log. Returns the reason why it is not there, or ""."""
        try:
            append(text, also_in_bucket=True)
        except OSError as error:
            return f"The traceback is not in {out}/{ERRORS} ({error.strerror})."
        return ""

    with output.lasting(note), notices.tracebacks_in_a_file(append), notices.warnings_in_lines():
        try:
            config = checked_config()
            if MODE.value == "config":
                print(listing(config))
                return 0
            check_flags()
            folder = run_folder()
            with workdir.inputs_are_final(folder):
                out = out_folder(folder)
                source_run()
                memory.set_up()
                parallel.init_distributed()
                process = jax.process_index()
                xla.use_compilation_cache(config.xla.compilation_cache)
                watchdog.install(config.train.watchdog_seconds)
                with stoppable(), access_to(folder, out):
                    MODES[MODE.value](config, folder, out)
            return 0
        except preemption.Stopped as stopped:
            say(str(stopped))
            return preemption.EXIT_CODE
        except UserError as error:
            note(traceback.format_exc())
            refuse(error, in_one_line(error))
        except Exception as error:
            problem = note(traceback.format_exc())
            if isinstance(error, OSError) and (reason := files.reason_of_storage(error, out)):
                sys.exit(f"error: {reason}")
            if problem:
                print(problem, file=sys.stderr)
            raise
        except KeyboardInterrupt:
            note(traceback.format_exc())
            sys.exit("error: interrupted at once, without saving: the same command goes on from what is written")
        finally:
            watchdog.off()


def checked_config() -> Config:
    """The whole config. Raises CommandError if a field is wrong, or if fields do not fit each other."""
    try:
        config = complete(CONFIG.value)
        rules.check(config)
        settings.check_schedules(config)
    except UserError as error:
        raise CommandError(str(error)) from error
    return config


def say(text: str) -> None:
    """Prints a line on process 0."""
    if jax.process_index() == 0:
        print(text, flush=True)


def stoppable() -> contextlib.AbstractContextManager[None]:
    """The signal handlers of a mode that looks whether it is asked to stop. Other modes end at once at a signal."""
    looks = MODE.value in (*TRAINING, "sample", "sweep", "likelihood")
    return preemption.stopping_on_request() if looks else contextlib.nullcontext()


@contextlib.contextmanager
def access_to(folder: str, out: str) -> Iterator[None]:
    """Locks the folder of a run that is trained, or that a sweep writes to. The other modes only read the run.

    Raises UserError if there is no run to read, or if the mode cannot write its results.
    """
    if MODE.value in TRAINING:
        with access.lock(folder):
            yield
        return
    check_is_run(folder)
    elsewhere = "give --out=DIR, another folder for what this mode writes"
    if MODE.value == "sweep":
        with access.lock(out, elsewhere):
            yield
    else:
        access.check_writable(out, elsewhere)
        yield


def check_is_run(folder: str) -> None:
    """Raises UserError if there is no diffusion model in the folder, or if this job may not read it."""
    path = os.path.join(folder, workdir.CONFIG)
    try:
        if not is_url(folder):
            os.stat(path)
        elif files.read_bytes(path) is None:
            raise FileNotFoundError
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder} holds no run: train it first, with --mode=train, or give the --workdir of another"
        ) from None
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): {files.how_to_allow(path)}") from None
    workdir.check_kind(folder)


def check_flags() -> None:
    """Raises CommandError for a flag that the mode does not read."""
    for flag, modes in READ_BY.items():
        if flags.FLAGS[flag].value and MODE.value not in modes:
            raise CommandError(
                f"--{flag} is read by --mode={' and '.join(modes)} alone, and not by {MODE.value}: leave it out"
            )


def run_folder() -> str:
    """The folder that --workdir or --config names, or runs/<config name>. Raises UserError if it cannot be one."""
    if WORKDIR.value is None:
        config = config_flags.get_config_filename(flags.FLAGS["config"])
        folder = named_run(config) or os.path.join("runs", Path(config).stem)
    else:
        folder = access.run_path("--workdir", WORKDIR.value)
    access.check_run_path(folder)
    return folder


def out_folder(folder: str) -> str:
    """The folder that --out names, or the run's. Raises UserError if the mode writes to the run itself."""
    if OUT.value is None:
        return folder
    if MODE.value in TRAINING:
        raise CommandError(
            f"--out is {OUT.value!r}, but --mode={MODE.value} writes to the run itself: give --workdir alone"
        )
    return access.run_path("--out", OUT.value)


def source_run() -> str | None:
    """The run that --init_from names. Raises UserError for a mode that begins no run."""
    if INIT_FROM.value is None:
        return None
    if MODE.value not in ("train", "distill"):
        raise CommandError(
            f"--init_from begins a run in --mode=train or distill, and --mode={MODE.value} begins none: leave it out"
        )
    return access.run_path("--init_from", INIT_FROM.value)


def refuse(error: BaseException | None, text: str) -> NoReturn:
    """Ends the command with an error in one line and code 1. Every start of a command with a wrong flag ends alike."""
    if isinstance(error, CommandError) or not isinstance(error, UserError):
        progress.give_up()
    sys.exit(f"error: {text}")


def in_one_line(error: Exception) -> str:
    """The message of an error. A message of one word, such as a KeyError's, is preceded by the type of the error."""
    text = " ".join(str(error).split())
    return text if " " in text else f"{type(error).__name__}: {text}"


# The parser of ml_collections hides where some errors were raised, and uses a function that Python will remove.
_PARSER: Any = flags.FLAGS["config"].parser
_PARSER.parse = load_config


def parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's parser, with the errors of the config file and of its overrides in one line.

    A tuple that is given twice is an error, because ml_collections would join the two.
    """
    try:
        named, tuples = False, set()
        for argument in flags.FLAGS.read_flags_from_files(argv[1:], force_gnu=False):
            flag = argument.lstrip("-").partition("=")[0]
            named |= flag == "config"
            if not flag.startswith("config."):
                continue
            name = flag.removeprefix("config.")
            check_name(name)
            if not named:
                raise CommandError(f"--{flag} sets a field of a config that is not named yet: give --config=NAME first")
            if name in tuples:
                raise CommandError(f"--{flag} is given twice: give it once, as --{flag}='(A, B)'")
            if FIELDS[name].check.type is tuple:
                tuples.add(name)
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise CommandError(
                f"unexpected argument {rest[1]!r}: the config is given as --config=NAME, the mode as --mode=MODE, and "
                "a field as --config.GROUP.FIELD=VALUE"
            )
        if CONFIG.value is None:
            raise CommandError(
                "--config is missing: give the name of a config of the package, such as --config=digits, a Python "
                "file, or the folder of a run"
            )
        return rest
    except flags.UnrecognizedFlagError as error:
        known = [f"--{flag.name}" for flag in (CONFIG, WORKDIR, MODE, OUT, RUNS, INIT_FROM, ALLOW_FRESH_START)]
        text = f"--{error.flagname} is no flag: choose among {', '.join(known)}"
        refuse(error, f"{text}, and set a field as --config.GROUP.FIELD=VALUE")
    except flags.IllegalFlagValueError as error:
        refuse(error.__context__, illegal_value(str(error)))
    except (flags.Error, UserError) as error:
        refuse(error, in_one_line(error))
    except SystemExit as end:  # absl exits with 1 after it has printed the help
        sys.exit(0 if any(argument.lstrip("-").startswith("help") for argument in argv[1:]) else end.code)


def illegal_value(message: str) -> str:
    """absl's message about a value that a flag cannot have. For a field of the config, it says what is expected."""
    found = re.match(r"flag --config\.([\w.]+)=(.*?): ", message, re.DOTALL)
    if not found:
        return in_one_line(ValueError(message))
    return f"config.{found[1]} is {found[2]!r}; expected {FIELDS[found[1]].check.words}"


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
