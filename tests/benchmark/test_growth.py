"""How cost grows: the fit of an exponent, and what is measured at a size."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cfd.benchmark import axes, growth
from cfd.benchmark.__main__ import main
from cfd.benchmark.axes import Axis, Work


@pytest.mark.parametrize("k", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_found(k: float) -> None:
    sizes = [3, 10, 100, 700]
    assert growth.exponent(sizes, [0.25 * size**k for size in sizes]) == pytest.approx(k, abs=1e-12)


def test_the_exponent_is_that_of_least_squares() -> None:
    """Of three points at 1, e and e², the slope is half the rise between the outer two, whatever the middle one is."""
    e = 2.718281828459045
    assert growth.exponent([1, e, e * e], [1.0, 50.0, e**3]) == pytest.approx(1.5)


@pytest.mark.parametrize("sizes, values", [([2], [1.0]), ([2, 2], [1.0, 2.0]), ([1, 2], [0.0, 1.0]), ([1, 2], [1.0])])
def test_what_has_no_exponent_is_refused(sizes: list[int], values: list[float]) -> None:
    with pytest.raises(ValueError, match="a power law needs positive finite values at two different sizes or more"):
        growth.exponent(sizes, values)


def test_the_table_marks_what_grows_faster_than_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    axis = Axis("images", (1, 10), 1, 0, lambda size: Work(lambda: None))
    monkeypatch.setattr(growth, "AXES", {"a": axis, "b": axis._replace(what="pairs"), "c": axis._replace(what="one")})
    found = [
        {"axis": name, "size": size, "seconds": 1e-3 * size**k, "bytes": 1e6}
        for name, k in (("a", 1.0), ("b", 2.0))
        for size in axis.sizes
    ]
    one = {"axis": "c", "size": 1, "seconds": 1e-3, "bytes": 1e6}
    assert growth.fits([*found, one]).keys() == {"a", "b"}
    lines = growth.table([*found, one]).splitlines()
    assert lines[2:] == [
        "| images | 1 / 10 | 1 / 10 | 1.00 (1) | 1 / 1 | 0.00 (0) |",
        "| pairs | 1 / 10 | 1 / 100 | 2.00 (1)! | 1 / 1 | 0.00 (0) |",
        "| one | 1 | 1 | – | 1 | – |",
    ]


def test_memory_is_counted_or_the_rise_of_the_peak_in_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([3 * 2**30, 4 * 2**30])
    monkeypatch.setattr(growth, "host_peak_memory", lambda: next(peaks))
    calls: list[int] = []

    def build(size: int) -> Work:
        return Work(lambda: calls.append(size))

    axis = Axis("images", (1, 10), 1, 0, build)
    assert growth.measured(axis, 10)["bytes"] == 2**30 and calls == [10] * growth.REPEATS
    monkeypatch.setattr(growth, "host_peak_memory", lambda: 5)
    assert growth.measured(axis, 10)["bytes"] == growth.LEAST_BYTES
    assert growth.measured(axis._replace(build=lambda size: Work(lambda: None, size)), 10)["bytes"] == 10


def test_an_axis_is_measured_in_processes_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(growth, "AXES", axes.AXES | {"rows": axes.AXES["rows"]._replace(sizes=(10, 20))})
    main(["--growth=rows", f"--json={tmp_path / 'growth.json'}"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:2]] == ["1 of 2  sweep", "2 of 2  sweep"]
    assert lines[4].startswith("| sweep: rows of sweep.csv | 10 / 20 | ")
    result = json.loads((tmp_path / "growth.json").read_text())
    assert [point["size"] for point in result["points"]] == [10, 20]
    assert result["exponents"].keys() == {"rows"}


def test_virtual_devices_are_those_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def run(command: list[str], env: dict[str, str], **options: Any) -> Any:
        seen.update(env, command=command)
        return type("Done", (), {"returncode": 0, "stdout": '{"seconds": 1.0}\n', "stderr": ""})

    monkeypatch.setattr(growth.subprocess, "run", run)
    monkeypatch.setenv("XLA_FLAGS", "--xla_some=1")
    assert growth.in_own_process("devices", 4) == {"seconds": 1.0}
    assert (
        seen["XLA_FLAGS"] == "--xla_some=1 --xla_force_host_platform_device_count=4" and seen["JAX_PLATFORMS"] == "cpu"
    )
    seen.clear()
    growth.in_own_process("rows", 10)
    assert seen["XLA_FLAGS"] == "--xla_some=1" and seen["command"][-2:] == ["rows", "10"]


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--growth=T,length"], r"--growth has \['length'\]: choose from batch,side,"),
        (["--growth=T", "--network=adm64"], "leave out --network$"),
        (["--growth", "--compile_for=v5e:2x2", "--peer=x"], "leave out --compile_for, --peer$"),
        (["--growth", "--json=/nowhere/a.json"], "--json is '/nowhere/a.json', whose folder cannot be written"),
    ],
)
def test_bad_flags_are_told_in_a_line(flags: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(flags)
    *_, last, empty = capsys.readouterr().err.split("\n")
    assert not empty
    assert re.search(reason, last), last


@pytest.mark.slow
def test_a_process_that_fails_is_told_in_a_line_and_the_remedy_leaves_it_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "none")
    with pytest.raises(SystemExit) as stopped:
        main(["--growth=weights"])
    text = str(stopped.value)
    assert text.startswith("error: sweep: weights = 1 was not measured (") and "\n" not in text
    remedy = text.rpartition("leave it out, ")[2]
    monkeypatch.setattr(growth, "points", lambda names: iter([{"names": names}]))
    monkeypatch.setattr(growth, "table", str)
    main([remedy])
    assert "weights" not in remedy.split("=")[1].split(",") and "'rows'" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, axis in axes.AXES.items() if not axis.virtual])
def test_every_axis_can_be_measured_at_its_smallest_size(name: str) -> None:
    axis = axes.AXES[name]
    point = growth.measured(axis, axis.sizes[0])
    assert point["seconds"] > 0 and point["bytes"] > 0
