"""Output that cannot end a run: real pipes, terminals and a full device in place of standard output."""

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from absl import logging
from tqdm import tqdm

from cfd.devices import output


@contextmanager
def stream_in_place(name: str, descriptor: int, **settings: Any) -> Iterator[Any]:
    """sys.stdout or sys.stderr that writes to a descriptor, as the interpreter would open it."""
    before = getattr(sys, name)
    stream = io.TextIOWrapper(os.fdopen(descriptor, "wb"), **settings)
    setattr(sys, name, stream)
    try:
        yield stream
    finally:
        setattr(sys, name, before)
        stream.close()


def pipe() -> tuple[int, Callable[[], None]]:
    """A descriptor to write to, and a function after which nobody reads it any more."""
    reading, writing = os.pipe()
    return writing, lambda: os.close(reading)


def terminal() -> tuple[int, Callable[[], None]]:
    master, slave = os.openpty()
    return slave, lambda: os.close(master)


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize(("opened", "reason"), [(pipe, "Broken pipe"), (terminal, "Input/output error")])
def test_a_reader_that_goes_away_ends_nothing(name: str, opened: Callable, reason: str) -> None:
    """Nothing raises, it is said once, and the descriptor then leads nowhere, also for native code and at exit."""
    descriptor, leave = opened()
    said: list[str] = []
    with stream_in_place(name, descriptor) as stream:
        with output.lasting(said.append):
            print("read", file=stream)
            leave()
            for _ in tqdm(range(3), file=stream):
                print("not read", file=stream)
                tqdm.write("not read", file=stream)
            logging.warning("not read")
            os.write(descriptor, b"native")
        print("after the block", file=stream, flush=True)
    assert said == [f"{name} cannot be written any more ({reason}); the run goes on without it"]


def test_a_full_disk_loses_text_and_no_more(tmp_path: Path) -> None:
    """Once there is space again, the text arrives."""
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    said: list[str] = []
    file = tmp_path / "log"
    full = os.open("/dev/full", os.O_WRONLY)
    with stream_in_place("stdout", full), output.lasting(said.append):
        for _ in range(10_000):
            print("lost")
        there_is_space = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(there_is_space, full)
        os.close(there_is_space)
        print("kept")
    assert file.read_text().endswith("kept\n")
    assert said == ["stdout cannot be written any more (No space left on device); the run goes on without it"]


def test_a_letter_that_the_encoding_lacks_is_escaped() -> None:
    reading, writing = os.pipe()
    with stream_in_place("stdout", writing, encoding="ascii"):
        with output.lasting(print):
            print("λ = 1")
        assert os.read(reading, 100) == b"\\u03bb = 1\n"  # flushed at the end of the line
        with pytest.raises(UnicodeEncodeError):
            print("λ")
    os.close(reading)


def test_a_stream_that_was_closed_at_the_start_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with output.lasting(print):
        print("nowhere")
        sys.stdout.flush()
    assert sys.stdout is None


def test_nothing_is_changed_for_a_stream_that_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    """The stream keeps its identity, which absl's logging handler looks at, and its own methods come back."""
    stream, before = sys.stdout, dict(vars(sys.stdout))
    with output.lasting(lambda _: pytest.fail("nothing was lost")):
        assert sys.stdout is stream
        print("read")
    assert vars(sys.stdout) == before and capsys.readouterr().out == "read\n"
