"""The package's own Python warnings in the output of the command."""

import warnings

import jax
import pytest
from absl import logging

from cfd.devices.notices import absl_errors_only, warnings_in_lines
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
