"""Files of a run: the same functions on a disk and in a bucket."""

import errno
import os
import re
from pathlib import Path

import pytest
from disk import file_size_limit
from gcs import FakeGcs

from cfd.runs import files


@pytest.fixture(params=["disk", "bucket"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder that does not exist yet."""
    return f"{tmp_path}/run" if request.param == "disk" else f"{request.getfixturevalue('bucket').url}/run"


def test_a_file_is_read_as_it_was_last_written(folder: str) -> None:
    path = files.place(folder, "deep", "x.txt")
    assert files.read_bytes(path) is None and files.names(folder) == []
    for content in ("one", "ä" * 1000, ""):
        files.write_atomically(path, content)
        assert files.read_bytes(path) == content.encode()
        assert path.read_text(encoding="utf-8") == content
    assert files.names(folder) == ["deep"] and files.names(files.place(folder, "deep")) == ["x.txt"]


def test_a_file_that_cannot_be_written_keeps_its_content_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    files.write_atomically(path, "old")
    with file_size_limit(4), pytest.raises(OSError) as raised:
        files.write_atomically(path, "new content")
    assert raised.value.errno in files.FULL
    assert path.read_text() == "old" and files.names(tmp_path) == ["x.json"]


@pytest.mark.parametrize(
    ("number", "action", "remedy"),
    [
        (errno.ENOSPC, "written", "free space"),
        (errno.EDQUOT, "written", "free space, or ask for a larger quota"),
        (errno.EFBIG, "written", r"raise the limit on the size of a file \(ulimit -f\)"),
        (errno.EROFS, "written", "mount its file system so that it can be written"),
        (errno.EACCES, "read or written", "let this job write there, by chmod or chown"),
        (errno.EIO, "read or written", "look whether its disk works and is mounted"),
    ],
)
def test_a_disk_that_refuses_a_file_is_named_with_the_file_and_a_remedy_for_the_cause(
    number: int, action: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, text = tmp_path / "x.json", os.strerror(number)

    def refuse(place: Path, data: bytes) -> None:
        raise OSError(number, text, *([] if number in files.FULL else [str(place)]))  # as the system says it

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(OSError) as raised:
        files.write_atomically(path, "new")
    message = files.reason_of_storage(raised.value, str(tmp_path))
    assert re.fullmatch(f"{path} cannot be {action} \\({text}\\): {remedy}, and start again", message)


def test_an_error_of_no_disk_is_no_message_about_one() -> None:
    assert files.reason_of_storage(FileNotFoundError(errno.ENOENT, "no", "x"), "run") == ""
    assert files.reason_of_storage(PermissionError(errno.EPERM, "not permitted"), "run") == ""  # of no file
    assert files.reason_of_storage(OSError(errno.ENOSPC, "full"), "run").startswith("run cannot be written (full): ")


def test_a_large_file_is_whole_or_absent(folder: str) -> None:
    path, content = files.place(folder, "x.npz"), os.urandom(3_000_000)
    with pytest.raises(RuntimeError, match="in the middle"), files.uploaded(path) as local:
        local.write_bytes(content)
        raise RuntimeError("in the middle")
    assert files.names(folder) == []
    with files.uploaded(path) as local:
        local.write_bytes(content)
    assert files.read_bytes(path) == content and files.names(folder) == ["x.npz"]
    with files.downloaded(path) as local:
        assert local.read_bytes() == content
    assert files.read_bytes(path) == content
    with pytest.raises(FileNotFoundError), files.downloaded(f"{path}.missing"):
        pass


@pytest.mark.parametrize("where", ["disk", "bucket", "memory"])
def test_a_write_can_be_bound_to_what_it_replaces(where: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = {"disk": str(tmp_path), "memory": "memory://run"}.get(where) or request.getfixturevalue("bucket").url
    kv = files.store(folder)
    missing = kv.read("lock").result().stamp.generation
    first = kv.write("lock", b"a", if_equal=missing).result().generation
    assert first and not kv.write("lock", b"b", if_equal=missing).result().generation
    second = kv.write("lock", b"c", if_equal=first).result().generation
    assert second and second != first and kv.read("lock").result().value == b"c"
    assert not kv.write("lock", None, if_equal=first).result().generation
    assert kv.write("lock", None, if_equal=second).result().generation
    assert kv.read("lock").result().state == "missing"


def test_what_another_client_writes_is_seen_at_once(bucket: FakeGcs) -> None:
    folder = f"{bucket.url}/run"
    assert files.names(folder) == [] and files.read_bytes(f"{folder}/x") is None
    bucket.put("run/x", b"1")
    bucket.put("run/deep/y", b"2")
    bucket.put("runs/z", b"3")
    assert files.names(folder) == ["deep", "x"] and files.read_bytes(f"{folder}/x") == b"1"
    bucket.put("run/x", b"4")
    assert files.read_bytes(f"{folder}/x") == b"4"


def test_busy_and_failing_services_are_asked_again(bucket: FakeGcs) -> None:
    """Statuses 429 and 503 are answers of a service that is busy, and a lost answer is like the latter."""
    answers = iter([503, 429])
    bucket.fail = lambda request: next(answers, None)
    files.write_atomically(f"{bucket.url}/x", "1")
    assert files.read_bytes(f"{bucket.url}/x") == b"1"
    lost = iter([True])
    bucket.lose = lambda request: request.method == "POST" and next(lost, False)
    files.write_atomically(f"{bucket.url}/x", "2")
    assert files.read_bytes(f"{bucket.url}/x") == b"2"


def test_a_refusal_is_an_error_that_names_the_file(bucket: FakeGcs) -> None:
    bucket.fail = lambda request: 403
    for call in (
        lambda: files.read_bytes(f"{bucket.url}/x"),
        lambda: files.names(bucket.url),
        lambda: files.write_atomically(f"{bucket.url}/x", "1"),
    ):
        with pytest.raises(OSError, match=r"403|Forbidden") as refused:
            call()
        assert str(refused.value.filename).startswith(bucket.url)
