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
        ("every(k=2)", "", 1.0),
        ("", "small", 1.0),
        ("similar(cosine=1, k=3)", "", 1.0),
    ]
    rows = [
        cell(rule, guide, w, {"fid": (5.0 + i, 4.0 + i, 6.0 + i)}, step=7, run=str(mixing_run))
        for i, (rule, guide, w) in enumerate(named)
    ]
    return write_cells(mixing_run, rows)


@pytest.mark.slow
def test_every_cell_has_its_costs_and_its_fid(run: Path) -> None:
    text = cost.cost(tiny_config(), str(run), [], str(run))
    with (run / "cost.csv").open() as file:
        lines = {(line["rule"].partition("(")[0], line["guide"], line["w"]): line for line in csv.DictReader(file)}
    counts = {key: float(line["evaluations"]) for key, line in lines.items()}
    assert counts == {
        ("", "", "0.0"): 4,
        ("", "", "1.0"): 8,
        ("every", "", "1.0"): 6,
        ("", "small", "1.0"): 8,
        ("similar", "", "1.0"): 8,
    }
    ratios = {key: float(line["cost"]) for key, line in lines.items()}
    assert ratios["", "", "0.0"] == 1.0 and ratios["", "", "1.0"] == 2.0 and ratios["every", "", "1.0"] == 1.5
    params = mixing.params()
    own = sampler.evaluation_flops(mixing.NETWORK, params)
    assert ratios["", "small", "1.0"] == pytest.approx(1.0 + 64 / own, rel=1e-6)
    assert all(float(line["seconds"]) >= 0 for line in lines.values())
    table = text.splitlines()
    assert table[0] == "|  | evaluations | GFLOP | x w = 0 | ms | x w = 0 | FID-20 at w = 0 | FID-20 at w = 1 |"
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
        row = results.latest(str(run))[1] | {"rule": f"similar(cosine={cosine}, k=3)", "num_steps": 7}
        model = measuring.Model(
            mixing.NETWORK, settings.sampling_of(config), lambda *_: mixing.params(), None, mesh_of(1), lambda _: None
        )
        assert cost.counted(model, row) == expected


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
