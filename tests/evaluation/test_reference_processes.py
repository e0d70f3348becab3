"""The reference set in two processes: each decodes half of it, and the statistics are those of one process."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jax.sharding import Mesh
from pairs import in_processes

from cfd.data.dataset import Dataset
from cfd.data.decode import BadImage
from cfd.devices import parallel
from cfd.evaluation import features, reference

COUNT, BAD = 150, (3, 70, 71, 149)


def dataset(read: list[int], on_bad_image: str) -> Dataset:
    """Images of 8x8x1, of which those in BAD cannot be decoded. The indices of all that are decoded go into `read`."""
    images = np.random.default_rng(0).integers(0, 256, (COUNT, 8, 8, 1), np.uint8)

    def decode(index: int) -> tuple[np.ndarray, int]:
        read.append(index)
        if index in BAD:
            raise BadImage(f"image {index} is bad")
        return images[index], 0

    labels = np.zeros(COUNT, np.int32)
    return Dataset(decode, lambda _: 0, lambda: labels, COUNT, 8, 1, ("a",), on_bad_image, identity="0" * 64)


def network(mesh: Mesh) -> features.FeatureNetwork:
    """A classifier that was never trained, whose batches of 8 images the blocks do not fill."""
    net: Any = features.ImageClassifier(3)
    params = jax.tree.map(np.asarray, net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1), jnp.uint8))["params"])

    def outputs(params: Any, images: Array) -> tuple[Array, Array, Array]:
        pool, logits = net.apply({"params": params}, images)
        return pool, pool[:, ::2], jax.nn.softmax(logits)

    return features.FeatureNetwork("classifier", "f" * 64, features._extractor(outputs, params, mesh, 8))


def measured(folder: str) -> tuple[list[int], str]:
    """The images that this process decodes for a reference of 20 rows, and its error if a bad image is one."""
    reference.BLOCK_BYTES, reference.NEIGHBOUR_ROWS = 64 * 40, 20
    read: list[int] = []
    features_here, data = network(parallel.make_mesh(-1, 1)), dataset(read, "skip")
    reference.open_reference(folder, features_here, data, "name", path="", image_shape=(8, 8, 1), num_workers=2)
    with pytest.raises(ValueError) as caught:
        reference.decode_together(dataset([], "raise"), np.arange(20), 1)
    return read, str(caught.value)


def test_two_processes_decode_half_each_and_find_the_same_bits(tmp_path: Path) -> None:
    ((whole, alone),) = in_processes(measured, str(tmp_path / "one"), processes=1, devices=2)
    (first, bad), (second, told) = in_processes(measured, str(tmp_path / "two"))
    assert sorted(first + second) == sorted(whole) == list(range(COUNT)), "each image is decoded once"
    assert len(first) == len(second) == COUNT / 2
    name = Path("features", "reference_name.npz")
    assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert bad == alone and "image 3 is bad" in bad
    assert told == "process 0 cannot decode its share of the reference set, and says why"


def test_the_share_of_a_process_may_be_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four processes, one after the other, with three images: the rows that they give are gathered by hand."""
    given: list[list[np.ndarray]] = []

    def gather(rows: np.ndarray) -> np.ndarray:
        given[-1].append(rows)
        return np.tile(rows, (4, *[1] * (rows.ndim - 1)))

    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(parallel, "gather_rows", gather)
    for process in range(4):
        given.append([])
        monkeypatch.setattr(jax, "process_index", functools.partial(int, process))
        reference.decode_together(dataset([], "skip"), np.arange(1, 4), 1)
    assert [int(count[0]) for count, _ in given] == [1, 1, 0, 0], "image 3 is bad, and there is no fourth"
    assert {rows.shape for _, rows in given} == {(1, 64)}
