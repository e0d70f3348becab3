"""The config that `--config` names: one of the package, one in a Python file, or that of a run."""

import os
import runpy
import traceback
from itertools import dropwhile
from pathlib import Path

from ml_collections import ConfigDict

from cfd.config import with_defaults
from cfd.devices.buckets import is_url
from cfd.errors import CommandError
from cfd.modes import settings
from cfd.runs import access, workdir


def config_folder() -> Path:
    """The folder of the package's configs: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).parents[1]
    packaged = package / "configs"
    return packaged if packaged.is_dir() else package.parent / "configs"


def is_name(config: str) -> bool:
    """Whether --config is the name of a config of the package: a word without a slash, an ending or a colon."""
    return not any(mark in config for mark in "/.:")


def named_run(config: str) -> str | None:
    """The folder of a run that --config names, by itself or by its config.json; None if it names no folder.

    A URL always names a run. Raises UserError if it is no URL of a bucket, or if the bucket cannot be read.
    """
    path = access.run_path("--config", config) if is_url(config) else os.path.expanduser(config)
    if os.path.basename(path) == workdir.CONFIG:
        return os.path.dirname(path) or "."
    return path if is_url(path) or (os.path.isdir(path) and not is_name(config)) else None


def config_file(name_or_file: str) -> str:
    """The file of a config, from its name or from itself.

    Raises ValueError, with the names to choose from, for an unknown name.
    """
    if not is_name(name_or_file):
        return name_or_file
    path = config_folder() / f"{name_or_file}.py"
    if not path.is_file():
        names = sorted(file.stem for file in config_folder().glob("*.py"))
        raise CommandError(
            f"{name_or_file or 'an empty name'} names no config; choose one of {', '.join(names)}, or give a file, or "
            f"the folder of a run, with a slash, such as runs/{name_or_file or 'digits'}"
        )
    return str(path)


def reason_of(error: Exception, file: str) -> str:
    """An error that a config file raised, in a line: its type, its text, and where it was raised.

    The place is the line of the file and, if another file raised the error, the line there.
    """
    frames = traceback.extract_tb(error.__traceback__)
    from_file = list(dropwhile(lambda frame: os.path.abspath(frame.filename) != os.path.abspath(file), frames))
    ends = [from_file[0], from_file[-1]] if from_file else []
    places = dict.fromkeys(f"{frame.filename}, line {frame.lineno}: {frame.line}" for frame in ends)
    return ", at ".join((f"{type(error).__name__}: {error}", *places))


def load_config(path: str) -> ConfigDict:
    """The ConfigDict of a config, with all defaults, so that any field can be overridden.

    For the folder of a run, it is the run's own config. Raises ValueError that says what the file is, or raises,
    instead.
    """
    if (folder := named_run(path)) is not None:
        return settings.config_of_run(folder)
    path = config_file(path)
    file, *argument = path.split(":", 1)
    try:
        if not os.path.isfile(file):
            raise FileNotFoundError("there is no such file")
        module = runpy.run_path(file)
        if "get_config" not in module:
            raise AttributeError("it has no get_config")
        config = module["get_config"](*argument)
        reason = f"get_config() gives {type(config).__name__}"
    except Exception as error:  # a file can raise anything
        config, reason = None, reason_of(error, file)
    if not isinstance(config, ConfigDict):
        raise CommandError(
            f"{path} is no config ({reason}): give a Python file with get_config() -> ConfigDict, the name of a config "
            "of the package, such as digits, or the folder of a run"
        )
    return with_defaults(config)
