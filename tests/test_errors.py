"""Which errors about the inputs of a command a later start may not meet."""

import errno
import os
from pathlib import Path

import pytest

from cfd.data.files import is_file, is_folder
from cfd.errors import CommandError, InputError, PassingError, UserError, about_inputs, os_error_of, root_reason
from cfd.runs import files, workdir


@pytest.mark.parametrize("kind", [CommandError, PassingError, InputError])
def test_errors_that_say_what_they_are_stay_as_they_are(kind: type[UserError]) -> None:
    error = kind("data.path is 'x'")
    with pytest.raises(UserError) as found, about_inputs():
        raise error
    assert found.value is error


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOENT, InputError),
        (errno.ENOTDIR, InputError),
        (errno.ENAMETOOLONG, InputError),
        (errno.EIO, UserError),
        (errno.ESTALE, UserError),
        (errno.ENOTCONN, UserError),
        (errno.EACCES, UserError),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) else "",
)
@pytest.mark.parametrize("shown", [True, False])
def test_a_missing_file_is_an_error_of_the_input_and_a_disk_that_is_away_is_not(
    number: int, kind: type[UserError], shown: bool
) -> None:
    with pytest.raises(UserError, match="x cannot be read") as found, about_inputs():
        try:
            raise OSError(number, os.strerror(number), "x")
        except OSError as error:
            raise UserError("x cannot be read") from (error if shown else None)
    assert type(found.value) is kind


def test_what_an_error_says_of_the_data_itself_is_about_the_input() -> None:
    with pytest.raises(InputError, match="10 classes"), about_inputs():
        raise UserError("10 classes")


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOTCONN, errno.ENOENT])
def test_a_disk_that_does_not_answer_is_not_taken_for_an_empty_one(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert files.exists(tmp_path / "config.json") and is_file(tmp_path / "config.json") and is_folder(tmp_path)

    def stat(path: object, **named: object) -> None:
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(os, "stat", stat)
    if number == errno.ENOENT:
        assert not (files.exists(tmp_path) or is_file(tmp_path) or is_folder(tmp_path) or workdir.has_config(tmp_path))
        return
    with pytest.raises(OSError, match=os.strerror(number)):
        files.exists(tmp_path)
    for look in (is_file, is_folder, workdir.has_config):
        with pytest.raises(UserError, match=f"cannot be read .{os.strerror(number)}"):
            look(tmp_path)


def test_an_error_about_inputs_is_final_for_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="nowhere"), workdir.inputs_are_final(tmp_path):
        raise InputError("nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="nowhere"), workdir.inputs_are_final(tmp_path):
        raise InputError("nowhere")


def test_the_reason_of_the_system_is_found_behind_the_errors_of_libraries() -> None:
    refused = OSError(errno.EROFS, os.strerror(errno.EROFS), "x/3")
    of_tensorstore = ValueError(f"Error writing {'x' * 300} [os_error_code='28' source locations='y']")
    wrapped, shown = RuntimeError("the save failed"), ValueError("no such key")
    wrapped.__cause__ = of_tensorstore
    for error, number, text in (
        (refused, errno.EROFS, "OSError: [Errno 30] Read-only file system: 'x/3'"),
        (of_tensorstore, errno.ENOSPC, "No space left on device"),
        (wrapped, errno.ENOSPC, "No space left on device"),
        (shown, None, "ValueError: no such key"),
    ):
        found = os_error_of(error)
        assert (found and found.errno) == number and root_reason(error) == text
