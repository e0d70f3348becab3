"""`python -m cfd.main` in processes that have already imported its modules, each in a folder."""

import multiprocessing
import os
import runpy
import sys
from pathlib import Path
from typing import Any, NamedTuple

import permissions

from cfd.runs import access, errors_log, workdir


class Finished(NamedTuple):
    code: int
    out: str
    err: str


def start(arguments: list[str], output: str, folder: str, supervised: bool) -> None:
    """`python -m cfd.main` in a process that has already imported its modules, and obeys permission bits."""
    permissions.obey()
    if supervised:
        os.environ["CFD_SUPERVISED"] = "1"
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.argv = ["cfd.main", *arguments]
    try:
        runpy.run_module("cfd.main", run_name="__main__", alter_sys=True)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


class Command(NamedTuple):
    """Runs the command in `folder`, the current directory of each process."""

    folder: Path
    outputs: Path
    context: Any

    def __call__(self, *arguments: str, supervised: bool = False) -> Finished:
        output = self.outputs / str(len(list(self.outputs.iterdir())))
        process = self.context.Process(target=start, args=(arguments, str(output), str(self.folder), supervised))
        process.start()
        process.join(100)
        assert process.exitcode is not None, "the process is still running"
        return Finished(process.exitcode, *(output.with_suffix(f".{name}").read_text() for name in ("out", "err")))

    def fails(self, *arguments: str) -> str:
        """The error that it prints, in a line or two, after lines about the data. Nothing in the folder may change."""
        before = contents(self.folder)
        code, out, err = self(*arguments)
        assert code == 1 and all(line.startswith("The split ") for line in out.splitlines()), (code, out, err)
        assert err.startswith("error: ") and "Traceback" not in err and err.count("\n") <= 2, err
        assert contents(self.folder) == before
        return err


def contents(folder: Path) -> dict[Path, bytes]:
    """The folders, and the files with their content, except errors.log and locks of runs: each start writes those."""
    found = (path for path in folder.rglob("*") if path.name != errors_log.ERRORS)
    there = (path for path in found if path.name != access.LOCK or not (path.parent / workdir.CONFIG).exists())
    return {path: b"" if path.is_dir() else path.read_bytes() for path in there}


def command_in(folder: Path, outputs: Path) -> Command:
    """A `Command` whose processes are forked from one that has imported the modules of most modes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cfd.modes.sweep", "cfd.modes.report", "cfd.modes.train"])
    return Command(folder, outputs, context)
