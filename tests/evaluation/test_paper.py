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


def test_the_layout_is_the_papers() -> None:
    text = tables.table({"paper": paper.rows(paper.TABLE_2)}).splitlines()
    assert text[0] == "| w | paper FID T = 128 / 256 / 1024 | paper IS T = 128 / 256 / 1024 |"
    assert text[5] == "| 0.3 | 3.04 / 2.43 / 2.43 | 156.09 / 158.47 / 156.00 |"
    assert len(text) == 2 + 14
