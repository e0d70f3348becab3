"""The published results with which ours are compared: Tables 1 and 2 of Ho and Salimans (arXiv:2207.12598).

They are for ImageNet, with 50,000 samples per weight. Section 4 gives v = 0.3 and 400,000 training steps for 64x64, and
v = 0.2 and 2.7 million training steps for 128x128. This module contains nothing that the tables do not state.
"""

from typing import Any, NamedTuple

NUM_SAMPLES = 50_000
WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 2.0, 3.0, 4.0)


class Table(NamedTuple):
    """FID and IS. Each row is a weight of WEIGHTS; each column is a value of `varied`, a column of sweep.csv."""

    source: str
    image_size: int
    varied: str
    columns: tuple[float, ...]
    fid: tuple[tuple[float, ...], ...]
    inception_score: tuple[tuple[float, ...], ...]


TABLE_1 = Table(
    "Table 1 of arXiv:2207.12598, ImageNet 64x64",
    image_size=64,
    varied="p_uncond",
    columns=(0.1, 0.2, 0.5),
    fid=(
        (1.8, 1.8, 2.21),
        (1.55, 1.62, 1.91),
        (2.04, 2.1, 2.08),
        (3.03, 2.93, 2.65),
        (4.3, 4.0, 3.44),
        (5.74, 5.19, 4.34),
        (7.19, 6.48, 5.27),
        (8.62, 7.73, 6.23),
        (10.08, 8.9, 7.25),
        (11.41, 10.09, 8.21),
        (12.6, 11.21, 9.13),
        (21.03, 18.79, 16.16),
        (24.83, 22.36, 19.75),
        (26.22, 23.84, 21.48),
    ),
    inception_score=(
        (53.71, 52.9, 47.61),
        (66.11, 64.58, 56.1),
        (78.91, 76.99, 65.6),
        (92.8, 88.64, 74.92),
        (106.2, 101.11, 84.27),
        (119.3, 112.15, 92.95),
        (131.1, 122.13, 102.0),
        (141.8, 131.6, 109.8),
        (151.6, 140.82, 116.9),
        (161.0, 150.26, 124.6),
        (170.1, 158.29, 131.1),
        (225.5, 212.98, 183.0),
        (250.4, 237.65, 208.9),
        (260.2, 248.97, 225.1),
    ),
)

TABLE_2 = Table(
    "Table 2 of arXiv:2207.12598, ImageNet 128x128",
    image_size=128,
    varied="num_steps",
    columns=(128, 256, 1024),
    fid=(
        (8.11, 7.27, 7.22),
        (5.31, 4.53, 4.5),
        (3.7, 3.03, 3.0),
        (3.04, 2.43, 2.43),
        (3.02, 2.49, 2.48),
        (3.43, 2.98, 2.96),
        (4.09, 3.76, 3.73),
        (4.96, 4.67, 4.69),
        (5.93, 5.74, 5.71),
        (6.89, 6.8, 6.81),
        (7.88, 7.86, 7.8),
        (15.9, 15.93, 15.75),
        (19.77, 19.77, 19.56),
        (21.55, 21.53, 21.45),
    ),
    inception_score=(
        (81.46, 82.45, 81.54),
        (105.01, 106.12, 104.67),
        (130.79, 132.54, 130.09),
        (156.09, 158.47, 156.0),
        (183.01, 183.41, 180.88),
        (206.94, 207.98, 204.31),
        (227.72, 228.83, 226.76),
        (247.92, 249.25, 247.89),
        (265.54, 267.99, 265.52),
        (280.19, 283.41, 281.14),
        (295.29, 297.98, 294.56),
        (378.56, 377.37, 373.18),
        (409.16, 407.44, 405.68),
        (422.29, 421.03, 419.06),
    ),
)


def table_of(*, name: str, num_classes: int, image_size: int, features: str) -> Table | None:
    """The table of the paper's experiment on these images, or None if the paper has none.

    The paper's experiments use all of ImageNet's classes at 64x64 or 128x128. `name` is the data set's, and `features`
    is the name of the feature network: the paper's results are comparable only with those of "inception".
    """
    imagenet = name.startswith("imagenet") and num_classes == 1000
    tables = {table.image_size: table for table in (TABLE_1, TABLE_2)}
    return tables.get(image_size) if imagenet and features == "inception" else None


def rows(table: Table) -> list[dict[str, Any]]:
    """The table as rows like those of sweep.csv: w, fid, is, num_samples, features and the column that it varies."""
    shared = {"num_samples": NUM_SAMPLES, "features": "inception"}
    return [
        {"w": w, "fid": fid[i], "is": score[i], table.varied: column} | shared
        for i, column in enumerate(table.columns)
        for w, fid, score in zip(WEIGHTS, table.fid, table.inception_score, strict=True)
    ]
