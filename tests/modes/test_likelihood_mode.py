"""The files that `--mode=likelihood` writes, against a direct evaluation of the bound."""

import csv
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixing import eps_of_params, params
from PIL import Image
from tiny import tiny_config

from cfd.data.batches import load_arrays
from cfd.likelihood import bound, class_scores, decoder_costs
from cfd.modes import settings
from cfd.modes.likelihood import levels_of, likelihood
from cfd.process import linear
from cfd.runs import manifest
from cfd.sampling import grid

EPS = eps_of_params(jax.tree.map(jnp.asarray, params()))


def config_of(**changes: Any) -> Any:
    asked = dict(likelihood__num_steps=8, likelihood__num_images=20, likelihood__weights=(0.0, 1.0))
    return tiny_config(**asked | changes)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "likelihood.csv") as file:
        return list(csv.DictReader(file))


def test_each_row_is_the_bound_of_the_chain_that_is_best_for_the_training_split(mixing_run: Path) -> None:
    config, folder = config_of(), str(mixing_run)
    text = likelihood(config, folder, folder)
    rows = rows_of(mixing_run)
    names = [(row["split"], row["labels"], float(row["w"])) for row in rows]
    assert names == [(s, *kind) for s in ("train", "test") for kind in (("class", 0.0), ("class", 1.0), ("none", 0.0))]
    levels = np.asarray(grid(8, linear(-20.0, 13.3)))
    np.testing.assert_array_equal(levels_of(config), levels)
    end = int(rows[0]["num_steps"])
    totals = {}
    for name, row in zip(names, rows, strict=True):
        split, kind, w = name
        dataset = settings.open_split(config, split)
        index = np.arange(20) * len(dataset) // 20
        images, labels = load_arrays(dataset, index)
        x = jnp.asarray(images, jnp.float32) / 127.5 - 1.0
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(1000), i))(jnp.arange(20))
        given = jnp.asarray(labels) if kind == "class" else jnp.full(20, -1)
        run = jax.jit(lambda x, keys, given, w=w: bound(keys, EPS, x, given, logsnr=levels[:end], w=w))
        terms = run(x, keys, given)
        for column, expected in (
            ("prior", terms.prior),
            ("diffusion", terms.kl.sum(0)),
            ("reconstruction", terms.decoder),
            ("total", terms.total),
        ):
            assert float(row[column]) == pytest.approx(float(np.mean(expected)), rel=1e-4)
        error = np.std(terms.total, ddof=1) / np.sqrt(20)
        assert float(row["standard_error"]) == pytest.approx(float(error), rel=1e-3)
        assert float(row["logsnr_max"]) == levels[end - 1] and int(row["num_images"]) == 20
        assert manifest.read_manifest(folder, row["manifest"]) is not None
        if name == names[0]:
            whole = jax.jit(lambda x, keys, given: bound(keys, EPS, x, given, logsnr=levels))(x, keys, given)
            costs = jax.jit(lambda x, keys: decoder_costs(keys, x, logsnr=levels))(x, keys)
            spent = np.concatenate([np.zeros((1, 20)), np.cumsum(whole.kl, axis=0)])
            totals = np.mean(np.asarray(whole.prior) + spent + np.asarray(costs), axis=1)
            np.testing.assert_allclose(costs[-1], whole.decoder, rtol=1e-5, atol=1e-6)
            allowed = levels > 4.0
            assert levels[allowed][totals[allowed].argmin()] == levels[end - 1]
    assert "| test | none | 0 | " in text and f"after {end} levels" in text
    with Image.open(mixing_run / "likelihood.png") as image:
        image.load()


def test_one_image_has_a_bound_and_no_standard_error(mixing_run: Path) -> None:
    asked = config_of(likelihood__weights=(0.0,), likelihood__num_images=1)
    text = likelihood(asked, str(mixing_run), str(mixing_run))
    for row, line in zip(rows_of(mixing_run), text.splitlines()[2:], strict=False):
        assert row["standard_error"] == "" and line.endswith(f"| {float(row['total']):.4f} | 1 |")


def test_a_second_start_replaces_rows_of_the_same_settings_and_keeps_others(mixing_run: Path) -> None:
    folder = str(mixing_run)
    likelihood(config_of(likelihood__weights=(0.0,)), folder, folder)
    before = rows_of(mixing_run)
    likelihood(config_of(likelihood__weights=(0.0,)), folder, folder)
    assert rows_of(mixing_run) == before and len(before) == 4
    likelihood(config_of(likelihood__weights=(0.0,), likelihood__v=1.0), folder, folder)
    assert rows_of(mixing_run)[:4] == before and len(rows_of(mixing_run)) == 8


@pytest.mark.parametrize("damaged", [bytes(range(256)), b"[]\n", b"split,manifest\na,b,c\n", b"split,manifest\na\n"])
def test_a_damaged_file_is_named_before_anything_is_computed(mixing_run: Path, damaged: bytes) -> None:
    (mixing_run / "likelihood.csv").write_bytes(damaged + b"\n")
    with pytest.raises(ValueError, match=r"likelihood\.csv is damaged, or has columns .*: move it away"):
        likelihood(config_of(likelihood__weights=(1.0,), likelihood__classes=True), str(mixing_run), str(mixing_run))
    assert (mixing_run / "likelihood.csv").read_bytes() == damaged + b"\n"


def test_the_implicit_classifier_needs_w_0_and_a_student_has_no_bound(mixing_run: Path) -> None:
    folder = str(mixing_run)
    asked = config_of(likelihood__weights=(1.0,), likelihood__classes=True)
    with pytest.raises(ValueError, match=r"about w = 0, and likelihood\.weights is \(1\.0,\): add 0\.0 to them"):
        likelihood(asked, folder, folder)
    with pytest.raises(ValueError, match="is the run of a student, which learned the guided score and not the bound"):
        likelihood(config_of(model__weight_range=(0.0, 4.0)), folder, folder)


def test_the_implicit_classifier_is_that_of_class_scores(mixing_run: Path) -> None:
    config, folder = config_of(likelihood__weights=(1.0, 0.0), likelihood__classes=True), str(mixing_run)
    text = likelihood(config, folder, folder)
    rows = rows_of(mixing_run)
    assert [bool(row["class_accuracy"]) for row in rows] == [False] * 4 + [True] + [False]
    dataset = settings.open_split(config, "test")
    images, labels = load_arrays(dataset, np.arange(20) * len(dataset) // 20)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(1000), i))(jnp.arange(20))
    x, levels = jnp.asarray(images, jnp.float32) / 127.5 - 1.0, levels_of(config)[: int(rows[0]["num_steps"])]
    scores = jax.jit(lambda x: class_scores(keys, EPS, x, 10, logsnr=levels))(x)
    expected = np.mean(np.argmax(scores, axis=1) == labels)
    assert float(rows[4]["class_accuracy"]) == pytest.approx(expected)
    assert f"the right one for {expected:.1%} of the 20 images of the split 'test'" in text
    # The rows are those of a start that does not ask for it, and an earlier file without the column is read.
    lines = (mixing_run / "likelihood.csv").read_text().splitlines()
    assert lines[0].endswith("num_images,class_accuracy,manifest")
    (mixing_run / "likelihood.csv").write_text(
        "\n".join(line.replace(",class_accuracy", "") for line in lines[:1]) + "\n"
    )
    likelihood(config_of(likelihood__weights=(1.0, 0.0)), folder, folder)
    assert [row["manifest"] for row in rows_of(mixing_run)] == [row["manifest"] for row in rows]


def test_a_run_without_labels_has_no_implicit_classifier(mixing_run: Path) -> None:
    config = config_of(likelihood__classes=True, train__p_uncond=1.0)
    with pytest.raises(ValueError, match="was trained without labels: set it to False"):
        likelihood(config, str(mixing_run), str(mixing_run))


def test_a_chain_that_ends_in_noise_is_refused(mixing_run: Path) -> None:
    with pytest.raises(ValueError, match=r"likelihood\.logsnr_max is 3, and a chain must .* λ = 4, .* such as 13\.3"):
        likelihood(config_of(likelihood__logsnr_max=3.0), str(mixing_run), str(mixing_run))
    with pytest.raises(ValueError, match=r"process\.logsnr_max is 2, and a chain must end above λ = 4, .*: take a run"):
        levels_of(config_of(process__logsnr_max=2.0))


def test_guided_chains_are_classifier_free(mixing_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At w = 0, the guidance that sampling uses does not matter, and no noisy classifier is needed."""
    folder = str(mixing_run)
    with pytest.raises(ValueError, match=r"guidance is 'classifier', and the weights .*or likelihood\.weights to \(0"):
        likelihood(config_of(sample__guidance="classifier"), folder, folder)
    unguided = likelihood(config_of(sample__guidance="classifier", likelihood__weights=(0.0,)), folder, folder)
    assert unguided == likelihood(config_of(likelihood__weights=(0.0,)), folder, folder)
    assert "not used" not in capsys.readouterr().out
    with_rule = likelihood(config_of(sample__rule="every(2)", sample__interval=(-1.0, 1.0)), folder, folder)
    assert "sample.rule, sample.interval: not used by the chains of likelihood.weights." in capsys.readouterr().out
    assert with_rule == likelihood(config_of(), folder, folder)
