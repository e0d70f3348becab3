"""The paper's tables against its text, and the configs whose experiments the tables report."""

from typing import Any

import numpy as np
import pytest
from tiny import ROOT, read_config, tiny_config

from cfd.config import with_classes, with_defaults
from cfd.evaluation import paper
from cfd.modes import tables

TABLES = (paper.TABLE_1, paper.TABLE_2)


def test_the_text_of_the_paper_agrees() -> None:
    # Section 4.1 and the captions of Figs. 6 and 7: FID and IS of the same models, p_uncond = 0.1 and T = 256.
    captions = {
        (paper.TABLE_1, 0.1): {0.0: (1.80, 53.71), 1.0: (12.6, 170.1), 3.0: (24.83, 250.4)},
        (paper.TABLE_2, 256): {0.0: (7.27, 82.45), 1.0: (7.86, 297.98), 4.0: (21.53, 421.03)},
    }
    for (table, column), said in captions.items():
        rows = {row["w"]: row for row in paper.rows(table) if row[table.varied] == column}
        assert {w: (rows[w]["fid"], rows[w]["is"]) for w in said} == said
    # "the best FID results with a small amount of guidance (w = 0.1 or w = 0.3, depending on the dataset)"
    assert paper.WEIGHTS[np.argmin(np.array(paper.TABLE_1.fid)[:, 0])] == 0.1
    assert paper.WEIGHTS[np.argmin(np.array(paper.TABLE_2.fid)[:, 1])] == 0.3


@pytest.mark.parametrize("table", TABLES)
def test_the_columns_are_smooth(table: paper.Table) -> None:
    """A typing error in any number would break one of these assertions."""
    fid, score = np.array(table.fid), np.array(table.inception_score)
    assert fid.shape == score.shape == (14, 3)
    assert (np.diff(score, axis=0) > 0).all(), "IS rises with w"
    for column in fid.T:
        best = column.argmin()
        assert (np.diff(column[: best + 1]) < 0).all()
        assert (np.diff(column[best:]) > 0).all(), "FID falls to its best w and rises from there"
    # Between neighbours of the weights 0, 0.1, ..., 1, the second differences are small.
    assert np.abs(np.diff(np.log(score[:11]), 2, axis=0)).max() < 0.06


def table_of(config: Any) -> paper.Table | None:
    data = config.data
    return paper.table_of(
        name=data.name, num_classes=data.num_classes, image_size=data.image_size, features=config.eval.features
    )


def test_a_config_of_the_paper_gets_its_table() -> None:
    imagenet64, imagenet128 = (
        with_classes(with_defaults(read_config(ROOT / "configs" / f"{name}.py")), 1000).unlock()
        for name in ("imagenet64", "imagenet128")
    )
    assert table_of(imagenet64) is paper.TABLE_1
    assert table_of(imagenet128) is paper.TABLE_2
    assert table_of(tiny_config()) is None
    imagenet128.eval.features = "classifier"  # its FID is not comparable with Inception's
    assert table_of(imagenet128) is None
    imagenet64.data.image_size = 32
    assert table_of(imagenet64) is None


NAMES = tuple(f"class {i}" for i in range(1000))


def published(config: Any, class_names: tuple[str, ...] = NAMES) -> tables.Published:
    return tables.published_of(config, class_names)


def test_other_published_results_belong_to_their_images_and_features() -> None:
    imagenet64 = with_classes(with_defaults(read_config(ROOT / "configs" / "imagenet64.py")), 1000).unlock()
    found = published(imagenet64)
    assert found.baselines == paper.BASELINES["imagenet", 64] and found.others == paper.OTHERS["imagenet", 64]
    imagenet64.eval.features = "classifier"  # bits per dimension have nothing to do with features
    found = published(imagenet64)
    assert not found.rows and not found.baselines
    assert [(result.method, result.bits_per_dim) for result in found.others] == [("VDM", 3.40), ("IDDPM", 3.54)]
    assert published(imagenet64, NAMES[:10]) == tables.Published([], (), ())

    imported = tiny_config(data__source="adm").unlock()
    imported.data.image_size, imported.eval.features = 256, "inception"
    assert not published(imported).rows and published(imported).others == paper.OTHERS["imagenet", 256]
    for changes in (dict(data__source="folder"), dict(data__source="tfds", data__name="cifar10:3.0.2")):
        cifar = tiny_config(**changes).unlock()
        cifar.data.image_size, cifar.eval.features = 32, "inception"
        names = paper.CIFAR10[::-1] if changes["data__source"] == "folder" else NAMES[:10]
        assert published(cifar, names).others == paper.OTHERS["cifar10", 32]
    cifar.data.name = "cifar100"
    assert not published(cifar, NAMES[:100]).others


def test_published_numbers_agree_where_two_sources_state_them() -> None:
    """ADM's 64x64 and 128x128 FIDs are in ADM's table and in those of the paper, and its FID of 4.59 is in two tables.

    All are as the README of openai/guided-diffusion gives them, and DDGAN's table has the IS of DDPM's abstract.
    """

    def fids(place: tuple[str, int], name: str) -> set[float | None]:
        return {r.fid for r in (*paper.BASELINES.get(place, ()), *paper.OTHERS[place]) if r.method == name}

    assert fids(("imagenet", 64), "ADM, dropout") == {2.07} < fids(("imagenet", 64), "ADM")
    assert fids(("imagenet", 128), "ADM-G") == {2.97} and fids(("imagenet", 128), "LOGAN") == {3.36}
    assert fids(("imagenet", 256), "ADM-G") == fids(("imagenet", 256), "ADM, classifier scale 1") == {4.59}
    assert fids(("imagenet", 256), "ADM") == {10.94} and fids(("imagenet", 512), "ADM-G") == {7.72}
    cifar = {result.method: result for result in paper.OTHERS["cifar10", 32]}
    assert cifar["DDPM, no labels"].inception_score == cifar["DDPM, no labels, T = 1000"].inception_score == 9.46
    for results in paper.OTHERS.values():
        for result in results:
            assert result.source.startswith("arXiv:")
            shares = [share for share in (result.precision, result.recall) if share is not None]
            assert all(0 < share < 1 for share in shares)


def test_published_results_are_tables_with_their_sources() -> None:
    found = tables.Published([], paper.BASELINES["imagenet", 64], paper.OTHERS["imagenet", 64])
    text = tables.literature(found).splitlines()
    assert text[0] == "| published | FID | sFID | IS | precision | recall | source |"
    assert text[3] == "| CDM | 1.48 | – | 67.95 | – | – | arXiv:2207.12598, Table 1 |"
    assert text[-1] == "| ADM, dropout | 2.07 | 4.29 | – | 0.74 | 0.63 | arXiv:2105.05233, Table 5 |"
    assert tables.literature(found, bits=True).splitlines()[2] == "| VDM | 3.40 | arXiv:2107.00630 |"
    assert tables.literature(tables.Published([], (), ())) == ""


def test_the_layout_is_the_papers() -> None:
    text = tables.table({"paper": paper.rows(paper.TABLE_2)}).splitlines()
    assert text[0] == "| w | paper FID T = 128 / 256 / 1024 | paper IS T = 128 / 256 / 1024 |"
    assert text[5] == "| 0.3 | 3.04 / 2.43 / 2.43 | 156.09 / 158.47 / 156.00 |"
    assert len(text) == 2 + 14
