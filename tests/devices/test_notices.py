"""The package's own Python warnings in the output of the command."""

import errno
import logging as python_logging
import os
import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from absl import logging

from cfd.devices.notices import absl_errors_only, tracebacks_in_a_file, warnings_in_lines
from cfd.evaluation import metrics


def warn() -> None:
    """A warning of the package, and one of another place."""
    warnings.warn_explicit("30 samples are few", UserWarning, metrics.__file__, 85)
    warnings.warn("of a test", stacklevel=1)


@pytest.mark.parametrize("process", [0, 1])
def test_a_warning_of_the_package_is_one_line_of_process_0_and_others_keep_their_form(
    process: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: process)
    with pytest.warns(UserWarning) as others, warnings_in_lines():
        warn()
    assert capsys.readouterr().err == ("warning: 30 samples are few\n" if process == 0 else "")
    assert [(str(w.message), w.filename) for w in others] == [("of a test", __file__)]


def test_a_message_of_the_package_by_absl_is_one_line_and_those_of_others_keep_their_form(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def log(place: str) -> None:
        code = "for f in (logging.error, logging.warning): f('step %d is damaged', 4)"
        exec(compile(code, place, "exec"), {"logging": logging})

    with warnings_in_lines():
        log(metrics.__file__)
        log("/elsewhere.py")
    assert capsys.readouterr().err == "error: step 4 is damaged\nwarning: step 4 is damaged\n"
    log(metrics.__file__)
    assert [record.pathname for record in caplog.records] == ["/elsewhere.py"] * 2 + [metrics.__file__] * 2


def test_outside_of_the_block_warnings_are_those_of_python(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning) as every:
        with warnings_in_lines():
            pass
        warn()
    assert len(every) == 2 and capsys.readouterr().err == ""


def test_only_errors_of_absl_are_logged_within_the_block(caplog: pytest.LogCaptureFixture) -> None:
    before = logging.get_verbosity()
    with absl_errors_only():
        logging.warning("worker processes cannot be profiled")
        logging.error("no such file")
    with pytest.raises(KeyError), absl_errors_only():
        raise KeyError
    logging.warning("a later one")
    assert [record.getMessage() for record in caplog.records] == ["no such file", "a later one"]
    assert logging.get_verbosity() == before


@pytest.fixture
def absl_handler(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """absl's handler, through which a command logs."""
    root, handler = python_logging.getLogger(), logging.get_absl_handler()
    monkeypatch.setattr(handler.python_handler, "stream", sys.stderr)
    root.addHandler(handler)
    yield
    root.removeHandler(handler)


def fail(place: str, logger: object = logging) -> None:
    """The traceback that a function in this file logs of an error of TensorStore."""
    code = """
try:
    raise ValueError("Failed to write 9 bytes to file 5: [os_error_code='28']")
except ValueError:
    log.exception("thread 3 failed")
"""
    exec(compile(code, place, "exec"), {"log": logger})


def test_tracebacks_of_other_packages_are_in_a_file_and_the_same_reason_is_one_line(
    capsys: pytest.CaptureFixture[str], absl_handler: None
) -> None:
    texts: list[str] = []

    def append(text: str) -> str:
        texts.append(text)
        return "errors.log"

    before = sys.unraisablehook
    with tracebacks_in_a_file(append), warnings_in_lines():
        fail("/x/site-packages/orbax/future.py")
        fail("/x/site-packages/orbax/manager.py")
        fail("/x/asyncio/events.py", python_logging.getLogger("asyncio"))
        fail(metrics.__file__)
        raised = RuntimeError("Event loop is closed")
        of_task: Any = SimpleNamespace(
            exc_type=RuntimeError, exc_value=raised, exc_traceback=None, err_msg=None, object="a task"
        )
        sys.unraisablehook(of_task)
        logging.error("no traceback")
    assert sys.unraisablehook is before
    space = os.strerror(errno.ENOSPC)
    *lines, last = [line for line in capsys.readouterr().err.splitlines() if "before flag parsing" not in line]
    assert lines == [
        f"error: orbax: {space}; the traceback is in errors.log",
        f"error: asyncio: {space}; the traceback is in errors.log",
        "error: thread 3 failed",
        "error: Exception ignored in: 'a task': RuntimeError: Event loop is closed; the traceback is in errors.log",
    ]
    assert last.endswith("no traceback")
    assert len(texts) == 5 and all("thread 3 failed\nTraceback" in text for text in texts[:4])
    assert texts[4] == "Exception ignored in: 'a task'\nRuntimeError: Event loop is closed"


@pytest.mark.parametrize("full_for", [1, 9])
def test_a_traceback_that_a_full_disk_refuses_is_added_later_or_printed(
    full_for: int, capsys: pytest.CaptureFixture[str], absl_handler: None
) -> None:
    calls, texts = [], []

    def append(text: str) -> str:
        calls.append(text)
        if len(calls) <= full_for:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        texts.append(text)
        return "errors.log"

    with tracebacks_in_a_file(append):
        for name in ("a", "b"):
            fail(f"/x/site-packages/{name}/f.py")
    printed = capsys.readouterr().err
    both = printed if full_for == 9 else "\n".join(texts)
    assert both.count("Traceback (most recent call last)") == 2
    assert printed.count("Traceback") == (2 if full_for == 9 else 0)
    assert "error: a: No space left on device; the traceback follows later" in printed


def test_without_a_file_tracebacks_keep_their_form(capsys: pytest.CaptureFixture[str], absl_handler: None) -> None:
    with tracebacks_in_a_file(lambda text: None):
        fail("/x/site-packages/orbax/future.py")
    printed = capsys.readouterr().err
    assert "thread 3 failed\nTraceback" in printed and "error: orbax" not in printed
