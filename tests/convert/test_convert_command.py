"""`python -m cfd.convert`: errors that a user can correct are said in a line, and others are raised."""

from pathlib import Path

import pytest
from gcs import FakeGcs
from permissions import obeyed

from cfd.convert.__main__ import main


@pytest.mark.parametrize("command", ["adm", "inception", "dinov2"])
def test_files_that_may_not_be_read_or_written_are_named(command: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    file, closed = tmp_path / "model.pt", tmp_path / "closed"
    file.touch()
    closed.mkdir()
    closed.chmod(0o555)
    with obeyed():
        with pytest.raises(SystemExit) as end:
            main([command, str(file), str(closed / "out")])
        assert end.value.code == f"error: {closed}/out cannot be written (Permission denied): give another OUT"
        file.chmod(0o000)
        with pytest.raises(SystemExit) as end:
            main([command, str(file), str(tmp_path / "out")])
        assert str(end.value.code).startswith(f"error: {file} cannot be read (Permission denied)")


@pytest.mark.parametrize("command", ["adm", "inception", "dinov2"])
def test_nothing_in_a_bucket_is_overwritten(command: str, bucket: FakeGcs) -> None:
    bucket.put("made/x.npz", b"")
    out = f"{bucket.url}/made" + ("" if command == "adm" else "/x.npz")
    with pytest.raises(SystemExit) as end:
        main([command, "FILE", out])
    assert str(end.value.code).startswith(f"error: {out} exists: give the name of a ")
    assert bucket.names() == ["made/x.npz"]


@pytest.mark.parametrize("flag", ["image-size", "head-channels", "num-heads", "num-res-blocks"])
@pytest.mark.parametrize("value", ["0", "-16", "1.5", "", str(2**31)])
def test_counts_that_no_network_has_are_refused(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["adm", "FILE", "OUT", f"--{flag}={value}"])
    assert end.value.code == 2
    assert f"argument --{flag}: it is {value!r}; give an integer >= 1 and < 2^31" in capsys.readouterr().err


def test_an_error_of_the_program_is_raised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("cfd.convert.__main__.convert_inception", lambda *_, **__: {}["a bug"])
    with pytest.raises(KeyError, match="a bug"):
        main(["inception", "FILE", str(tmp_path / "out")])
