"""The published results with which ours are compared, each with its source.

Tables 1 and 2 of Ho and Salimans (arXiv:2207.12598) are for ImageNet, with 50,000 samples per weight. Section 4 gives
v = 0.3 and 400,000 training steps for 64x64, and v = 0.2 and 2.7 million training steps for 128x128. The other methods
are those of the same tables, of Tables 4 and 5 of Dhariwal and Nichol (ADM, arXiv:2105.05233), and of papers that the
rows name. This module contains nothing that its sources do not state.
"""

from collections.abc import Sequence
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


class Result(NamedTuple):
    """Metrics of one method in one source, with Inception features; None is not stated. Bits are of the test split."""

    method: str
    source: str
    fid: float | None = None
    sfid: float | None = None
    inception_score: float | None = None
    precision: float | None = None
    recall: float | None = None
    bits_per_dim: float | None = None


CFG, ADM, VDM = "arXiv:2207.12598, Table {}", "arXiv:2105.05233, Table {}", "arXiv:2107.00630"

BASELINES: dict[tuple[str, int], tuple[Result, ...]] = {
    ("imagenet", 64): (
        Result("ADM", CFG.format(1), fid=2.07),
        Result("CDM", CFG.format(1), fid=1.48, inception_score=67.95),
    ),
    ("imagenet", 128): (
        Result("BigGAN-deep, max IS", CFG.format(2), fid=25.0, inception_score=253.0),
        Result("BigGAN-deep", CFG.format(2), fid=5.7, inception_score=124.5),
        Result("CDM", CFG.format(2), fid=3.52, inception_score=128.8),
        Result("LOGAN", CFG.format(2), fid=3.36, inception_score=148.2),
        Result("ADM-G", CFG.format(2), fid=2.97),
    ),
}
"""The other methods in Tables 1 and 2, by data set and image size."""


def _adm(
    table: int, *rows: tuple[str, float, float | None, float | None, float | None, float | None]
) -> tuple[Result, ...]:
    """Rows of a table of ADM's: method, FID, sFID, IS, precision, recall."""
    source = ADM.format(table)
    return tuple(Result(name, source, fid, sfid, score, *rates) for name, fid, sfid, score, *rates in rows)


OTHERS: dict[tuple[str, int], tuple[Result, ...]] = {
    ("imagenet", 64): (
        *_adm(
            5,
            ("BigGAN-deep, trained by ADM's authors", 4.06, 3.96, None, 0.79, 0.48),
            ("IDDPM", 2.92, 3.79, None, 0.74, 0.62),
            ("ADM", 2.61, 3.77, None, 0.73, 0.63),
            ("ADM, dropout", 2.07, 4.29, None, 0.74, 0.63),
        ),
        Result("VDM", VDM, bits_per_dim=3.40),
        Result("IDDPM", VDM, bits_per_dim=3.54),
    ),
    ("imagenet", 128): _adm(
        5,
        ("BigGAN-deep", 6.02, 7.18, None, 0.86, 0.35),
        ("LOGAN", 3.36, None, None, None, None),
        ("ADM", 5.91, 5.09, None, 0.70, 0.65),
        ("ADM-G, 25 steps", 5.98, 7.04, None, 0.78, 0.51),
        ("ADM-G", 2.97, 5.09, None, 0.78, 0.59),
    ),
    ("imagenet", 256): (
        *_adm(
            4,
            ("ADM, no labels", 26.21, 6.35, 39.70, 0.61, 0.63),
            ("ADM, no labels, classifier scale 1", 33.03, 6.99, 32.92, 0.56, 0.65),
            ("ADM, no labels, classifier scale 10", 12.00, 10.40, 95.41, 0.76, 0.44),
            ("ADM", 10.94, 6.02, 100.98, 0.69, 0.63),
            ("ADM, classifier scale 1", 4.59, 5.25, 186.70, 0.82, 0.52),
            ("ADM, classifier scale 10", 9.11, 10.93, 283.92, 0.88, 0.32),
        ),
        *_adm(
            5,
            ("DCTransformer", 36.51, 8.24, None, 0.36, 0.67),
            ("VQ-VAE-2", 31.11, 17.38, None, 0.36, 0.57),
            ("IDDPM", 12.26, 5.42, None, 0.70, 0.62),
            ("SR3", 11.30, None, None, None, None),
            ("BigGAN-deep", 6.95, 7.36, None, 0.87, 0.28),
            ("ADM", 10.94, 6.02, None, 0.69, 0.63),
            ("ADM-G, 25 steps", 5.44, 5.32, None, 0.81, 0.49),
            ("ADM-G", 4.59, 5.25, None, 0.82, 0.52),
        ),
    ),
    ("imagenet", 512): _adm(
        5,
        ("BigGAN-deep", 8.43, 8.13, None, 0.88, 0.29),
        ("ADM", 23.24, 10.19, None, 0.73, 0.60),
        ("ADM-G, 25 steps", 8.41, 9.67, None, 0.83, 0.47),
        ("ADM-G", 7.72, 6.57, None, 0.87, 0.42),
    ),
    ("imagenet", 32): (Result("VDM", VDM, bits_per_dim=3.72),),
    ("cifar10", 32): (
        Result("DDPM, no labels", "arXiv:2006.11239, abstract", fid=3.17, inception_score=9.46),
        Result("DDPM, no labels, augmented data", VDM, bits_per_dim=3.69),
        Result("IDDPM, no labels", VDM, bits_per_dim=2.94),
        Result("VDM, no labels", VDM, fid=4.00, bits_per_dim=2.65),
        Result("VDM, no labels, augmented data", VDM, bits_per_dim=2.49),
        Result("DDPM, no labels, T = 1000", "arXiv:2112.07804", fid=3.21, inception_score=9.46, recall=0.57),
        Result("DDGAN, no labels, T = 4", "arXiv:2112.07804", fid=3.75, inception_score=9.63, recall=0.57),
    ),
}
"""Other published results, by data set and image size."""

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def data_set(name: str, class_names: Sequence[str], *, imported: bool = False) -> str:
    """The data set "imagenet", "cifar10", or "" for any other, by its name in TFDS, or for CIFAR-10 by its classes.

    An imported model has no data. With ADM's 1000 classes, it is one of ImageNet.
    """
    if len(class_names) == 1000 and (imported or name.startswith("imagenet")):
        return "imagenet"
    return "cifar10" if name.split(":")[0] == "cifar10" or set(class_names) == set(CIFAR10) else ""


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
