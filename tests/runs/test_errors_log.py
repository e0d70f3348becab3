"""errors.log: what a start leaves behind about what ended it."""

import os
from pathlib import Path

import pytest
from permissions import obeyed

from cfd.runs.errors_log import append_error


def test_entries_follow_each_other_and_each_process_has_its_file(tmp_path: Path) -> None:
    for process, text in ((0, "first\nof two lines"), (3, "of another process"), (0, "second \udcff")):
        assert append_error(tmp_path, "--mode=train", text, process=process) is not None
    head = f"--mode=train, process {{}}, pid {os.getpid()} on {os.uname().nodename}"
    first, second, end = (tmp_path / "errors.log").read_text().split("\n\n")
    assert first.splitlines()[1:] == ["first", "of two lines"] and head.format(0) in first
    assert second.splitlines()[1:] == ["second \\udcff"] and end == ""
    assert head.format(3) in (tmp_path / "errors.3.log").read_text()


def test_no_folder_is_made_and_a_closed_one_is_an_error(tmp_path: Path) -> None:
    assert append_error(tmp_path / "none", "", "") is None and not (tmp_path / "none").exists()
    tmp_path.chmod(0o555)
    with obeyed(), pytest.raises(PermissionError):
        append_error(tmp_path, "", "")
