"""`--mode=cost`: what is counted and timed of each cell of a sweep, and the table of it."""

import csv
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import mixing
import numpy as np
import pytest
from meshes import mesh_of
from swept import cell, pixels, write_cells
from tiny import tiny_config

from cfd.evaluation.features import FeatureNetwork
from cfd.modes import cells, compare, cost, guides, measuring, sampler, settings
from cfd.modes.sampler import Guide, Network
from cfd.runs import results

FEATURES = FeatureNetwork("classifier", "f" * 64, pixels)


def small_guide(config: Any, run: Any, mesh: Any, named: Any) -> tuple[dict[str, Any], Any]:
    """A stand-in for `guides.open_guides`: a guide that costs little."""
    network = Network(lambda params: lambda z, logsnr, labels: params * z, (8, 8, 1))
    return {}, lambda own, text: Guide(network, np.float32(0.5)) if text else None


@pytest.fixture
def run(mixing_run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run whose sweep has a plain cell, one without guidance, and others that cost less."""
    monkeypatch.setattr(guides, "open_guides", small_guide)
    monkeypatch.setattr(cost, "ROUNDS", 1)
    named = [
        ("", "", 0.0),
        ("", "", 1.0),
        ("", "", 2.0),
        ("every(k=2)", "", 1.0),
        ("", "small", 1.0),
        ("similar(cosine=1, k=3)", "", 1.0),
    ]
    rows = [
        cell(rule, guide, w, {"fid": (5.0 + i, 4.0 + i, 6.0 + i)}, step=7, run=str(mixing_run))
        for i, (rule, guide, w) in enumerate(named)
    ]
    return write_cells(mixing_run, rows)


def test_rows_of_one_program_are_timed_once_and_each_batch_beside_an_unguided_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a clock that the batches advance, and that runs slower from round to round."""
    drawn, clock = [], [0.0]
    for name in ("process_time", "perf_counter"):
        monkeypatch.setattr(cost.time, name, lambda: clock[0])
    monkeypatch.setattr(cost, "ROUNDS", 3)

    def counted(name: str, seconds: float, w: float, program: str) -> cost.Counted:
        def draw() -> None:
            drawn.append(name)
            clock[0] += seconds * len(drawn)

        return cost.Counted(cell("", "", w, {}, run="runs/a"), {"evaluations": 8 * seconds}, (program,), draw)

    rows = [counted("unguided", 1.0, 0.0, "half"), counted("w = 1", 2.0, 1.0, "all"), counted("w = 3", 9.0, 3.0, "all")]
    unguided, ratios = cost.time_of(rows)
    assert drawn == ["unguided", "w = 1"] + 3 * ["unguided", "unguided", "unguided", "w = 1"]
    # The middle round has the draws 7, 8, 9 and 10.
    assert ratios == {("half",): 8 / 7, ("all",): 2 * 10 / 9} and unguided == (7 + 9) / 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "1 of 2  a  w 0: 8 evaluations, ready in 1.0 s",
        "2 of 2  a  w 1: 16 evaluations, ready in 4.0 s",
    ]
    assert [line.partition(":")[0] for line in lines[2:]] == [f"Round {i} of 3" for i in (1, 2, 3)]


def test_a_way_is_named_by_its_run_and_by_what_varies_within_it() -> None:
    """Unguided images are those of any rule, guide or interval, but not those of another T."""

    def line(run: str, rule: str, guide: str, w: float, **changes: Any) -> results.Row:
        return cell(rule, guide, w, {"fid": (1.0, 0.5, 2.0)}, run=run, **changes)

    plain = [line("runs/a", "", "", w) for w in (1.0, 0.0)]
    assert cost.ways(plain) == {"w = 0": [plain[1]], "guided": [plain[0]]}
    student = [line("runs/b/", "", "", w, step=9) for w in (0.0, 1.0)]
    others = [line("runs/a", "every(k=2)", guide, w) for guide in ("", "small") for w in (0.0, 1.0)]
    names = {name: len(own) for name, own in cost.ways([*plain, *others, *student]).items()}
    assert names == {
        "a, w = 0": 3,
        "a, guided": 1,
        "a, every(k=2)": 1,
        "a, every(k=2), guide = small": 1,
        "b, w = 0": 1,
        "b, guided": 1,
    }
    steps = [line("runs/a", "", "", w, num_steps=t) for t in (8, 4) for w in (0.0, 1.0)]
    assert list(cost.ways(steps)) == ["w = 0, T = 8", "w = 0, T = 4", "guided, T = 8", "guided, T = 4"]


def test_the_picture_shows_which_ways_are_best_at_their_cost() -> None:
    """A weight of a single way has no axes of its own."""
    rows = [("every(k=2)", 1.0, 1.5, 6.0), ("", 1.0, 2.0, 7.0), ("", 3.0, 2.0, 9.0), ("every(k=4)", 1.0, 1.2, 80.0)]
    lines = [
        cell(rule, "", w, {"fid": (fid, fid - 1, fid + 1)}, run="runs/a") | {"cost": price, "time": price}
        for rule, w, price, fid in rows
    ]
    costs, only = cost.figure(lines).axes
    assert [label.get_text() for label in costs.get_yticklabels()] == ["guided", "every(k=2)", "every(k=4)"]
    assert only.get_title() == "w = 1" and only.get_xscale() == "log"
    filled = {dot.get_ydata()[0]: dot.get_markerfacecolor() != "white" for dot in only.lines}
    assert filled == {0: False, 1: True, 2: True}


@pytest.mark.slow
def test_every_cell_has_its_costs_and_its_fid(run: Path) -> None:
    text = cost.cost(tiny_config(), str(run), [], str(run))
    with (run / "cost.csv").open() as file:
        lines = {(line["rule"].partition("(")[0], line["guide"], line["w"]): line for line in csv.DictReader(file)}
    counts = {key: float(line["evaluations"]) for key, line in lines.items()}
    assert counts == {
        ("", "", "0.0"): 4,
        ("", "", "1.0"): 8,
        ("", "", "2.0"): 8,
        ("every", "", "1.0"): 6,
        ("", "small", "1.0"): 8,
        ("similar", "", "1.0"): 8,
    }
    ratios = {key: float(line["cost"]) for key, line in lines.items()}
    assert ratios["", "", "0.0"] == 1.0 and ratios["", "", "1.0"] == 2.0 and ratios["every", "", "1.0"] == 1.5
    params = mixing.params()
    own = sampler.evaluation_flops(mixing.NETWORK, params)
    assert ratios["", "small", "1.0"] == pytest.approx(1.0 + 64 / own, rel=1e-6)
    times = {key: float(line["time"]) for key, line in lines.items()}
    assert min(times.values()) > 0 and times["", "", "1.0"] == times["", "", "2.0"]
    assert len(set(times.values())) == len(times) - 1
    table = text.splitlines()
    weights = " | ".join(f"FID-20 at w = {w}" for w in range(3))
    assert table[0] == f"|  | evaluations | GFLOP | x w = 0 | ms | x w = 0 | {weights} |"
    assert len(table[2:7]) == 5 and all(line.startswith("| ") for line in table[2:7])
    assert (run / "cost.md").read_text() == text + "\n" and (run / "cost.png").exists()


def test_a_sweep_with_other_settings_than_the_config_is_refused_with_the_flags_of_it() -> None:
    """The remedy is followed."""
    swept = tiny_config(sample__schedule="linear", sample__corrector=0.1, process__logsnr_min=-10.0)
    made = cells.manifest_of(swept, cells.rows_of_grid(swept, 7)[0], defaultdict(str), FEATURES)
    rows = [{"weights": json.dumps(["", compare.unlisted(made)])}]
    flags = r"--config\.sample\.schedule='linear' --config\.sample\.corrector=0\.1, "
    with pytest.raises(ValueError, match=rf"^run was swept with {flags}.*: give --config=run with these flags"):
        cost.check_settings(tiny_config(process__logsnr_min=-10.0), "run", rows)
    cost.check_settings(swept, "run", rows)
    plain = tiny_config(sample__schedule="cosine")  # which is the schedule of training
    made = cells.manifest_of(plain, cells.rows_of_grid(plain, 7)[0], defaultdict(str), FEATURES)
    rows = [{"weights": json.dumps(["", compare.unlisted(made)])}]
    for config in (plain, tiny_config()):
        cost.check_settings(config, "run", rows)


def test_evaluations_of_a_rule_that_looks_at_the_images_are_counted_as_they_happen(run: Path) -> None:
    """With a cosine of −1 as the limit, it is `every(3)`; with 1, plain guidance."""
    config = tiny_config(sample__num_steps=7)
    for cosine, expected in ((-0.999999, 7 + 3), (1.0, 14)):
        changes = {"rule": f"similar(cosine={cosine}, k=3)", "num_steps": 7, "run": str(run)}
        row = results.latest(str(run))[1] | changes
        model = measuring.Model(
            mixing.NETWORK, settings.sampling_of(config), lambda *_: mixing.params(), None, mesh_of(1), lambda _: None
        )
        assert cost.counter(model)(row) == expected


def test_the_second_score_of_a_student_is_none_and_of_a_shared_trunk_less() -> None:
    def trunk_of(params: Any) -> Any:
        def eps_fn(z: Any, logsnr: Any, labels: Any) -> Any:
            return z @ params @ params

        def scores(z: Any, logsnr: Any, labels: Any, nulls: Any) -> Any:
            h = z @ params
            return h @ params, h @ params

        eps_fn.scores = scores  # pyright: ignore[reportFunctionMemberAccess]
        return eps_fn

    network, params = Network(trunk_of, (8, 8, 16)), np.ones((16, 16), np.float32)
    first = sampler.evaluation_flops(network, params)
    assert sampler.second_flops(network, params, first) == pytest.approx(first / 2)
    assert sampler.second_flops(network, params, first, Guide(network, params)) == first
    assert sampler.evaluations(settings.sampling_of(tiny_config()), 1.0, (), student=True) == 4
