"""Which devices hold which rows of a batch, on meshes of any order, of several slices, and with too few rows."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cfd.devices import parallel


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """A device of a cluster, as JAX describes it."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    client: Any = None


def cluster(count: int, *, per_process: int, per_slice: int) -> list[Any]:
    return [FakeDevice(i, i // per_process, i // per_slice) for i in range(count)]


def use(monkeypatch: pytest.MonkeyPatch, devices: list[Any], process: int = 0) -> None:
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "process_index", lambda: process)


@pytest.mark.parametrize("fsdp", [1, 2, 4, 8])
def test_neighbours_along_fsdp_are_in_one_slice(monkeypatch: pytest.MonkeyPatch, fsdp: int) -> None:
    devices = cluster(32, per_process=4, per_slice=8)
    # As if JAX numbered the processes across the slices, and named the devices in another order.
    mixed = [
        dataclasses.replace(device, process_index=device.process_index % 2 * 4 + device.slice_index)
        for device in devices
    ]
    use(monkeypatch, mixed[::-1])
    grid = parallel.make_mesh(-1, fsdp).devices
    assert grid.shape == (32 // fsdp, fsdp) and set(grid.flat) == set(mixed)
    assert all(len({device.slice_index for device in group}) == 1 for group in grid)


@pytest.mark.parametrize("fsdp, remedy", [(16, 8), (32, 8), (3, 1), (6, 2)])
def test_parameters_do_not_straddle_slices_unless_asked(
    monkeypatch: pytest.MonkeyPatch, fsdp: int, remedy: int
) -> None:
    use(monkeypatch, cluster(96, per_process=4, per_slice=8))
    words = f"mesh.fsdp is {fsdp}, which does not divide the 8 devices of each of 12 slices: .* mesh.fsdp={remedy} and "
    with pytest.raises(ValueError, match=words):
        parallel.make_mesh(-1, fsdp)
    assert parallel.make_mesh(-1, remedy).shape == {"data": 96 // remedy, "fsdp": remedy}  # the remedies
    assert parallel.make_mesh(-1, fsdp, fsdp_across_slices=True).shape == {"data": 96 // fsdp, "fsdp": fsdp}


def test_a_single_slice_and_devices_without_slices_take_every_fsdp(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parallel.make_mesh(-1, 8).shape["fsdp"] == 8
    use(monkeypatch, cluster(96, per_process=4, per_slice=96))
    assert parallel.make_mesh(-1, 96).shape["fsdp"] == 96


def divided(monkeypatch: pytest.MonkeyPatch, devices: list[Any], *batch: int) -> list[parallel.Division]:
    """The division of a batch on each process of a mesh of `devices` in the given order."""
    parts = []
    for process in sorted({device.process_index for device in devices}):
        use(monkeypatch, devices, process)
        mesh = Mesh(np.array(devices).reshape(-1, 2), ("data", "fsdp"))
        parts.append(parallel.divide(mesh, *batch))
    return parts


@pytest.mark.parametrize("batch", [(48,), (16,), (8,), (6,), (5,), (1,), (32, 4), (12, 3), (12, 4)], ids=str)
@pytest.mark.parametrize("order", ["sorted", "scattered"])
def test_each_process_reads_the_rows_of_its_devices_and_one_of_them_counts_each(
    monkeypatch: pytest.MonkeyPatch, batch: tuple[int, ...], order: str
) -> None:
    devices = cluster(16, per_process=4, per_slice=16)
    if order == "scattered":
        devices = [devices[i] for i in np.random.default_rng(0).permutation(16)]
    parts = divided(monkeypatch, devices, *batch)
    size, microbatch = batch[0], batch[0] // (batch[1] if len(batch) > 1 else 1)
    held = np.zeros(size, int)
    for process, part in enumerate(parts):
        index = part.sharding.devices_indices_map((size,))
        mine = [np.arange(size)[rows] for device, (rows,) in index.items() if device.process_index == process]
        assert part.rows.tolist() == sorted(set(np.concatenate(mine).tolist()))
        for rows in index.values():
            held[rows[0]] += process == 0  # the same on every process
    assert len(set(held)) == 1  # all rows are on equally many devices
    split = next(n for n in range(16, 0, -1) if 16 % n == 0 and microbatch % n == 0)
    assert held[0] == 16 // split
    assert sorted(np.concatenate([part.rows[part.counted] for part in parts]).tolist()) == list(range(size))


@pytest.mark.parametrize("batch", [(16,), (6,), (4,), (1,), (16, 4), (12, 2)], ids=str)
@pytest.mark.parametrize("fsdp", [1, 4])
def test_a_batch_is_put_together_from_the_rows_of_a_process(batch: tuple[int, ...], fsdp: int) -> None:
    mesh = parallel.make_mesh(-1, fsdp)
    backwards = Mesh(mesh.devices[::-1, ::-1], mesh.axis_names)
    rows = np.arange(batch[0] * 3).reshape(-1, 3).astype(np.uint8)
    for division in (parallel.divide(mesh, *batch), parallel.divide(backwards, *batch)):
        x = parallel.global_batch(division, {"x": rows[division.rows]})["x"]
        np.testing.assert_array_equal(np.asarray(x), rows)
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), rows[shard.index])


def test_rows_that_some_processes_lack_come_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The part of a batch that one of two processes holds, in an order that gives it rows that lie apart."""
    devices = cluster(8, per_process=4, per_slice=8)
    order = devices[:2] + devices[4:6] + devices[2:4] + devices[6:]
    part = divided(monkeypatch, order, 16)[1]
    assert part.rows.tolist() == [4, 5, 6, 7, 12, 13, 14, 15]
    images = np.random.default_rng(0).integers(0, 256, (16, 2), np.uint8)
    index = part.sharding.devices_indices_map((16,))
    shards = {}

    def record(shape: tuple[int, ...], sharding: Any, part_of: Any) -> jax.Array:
        shards.update({device: part_of(index[device]) for device in index if device.process_index == 1})
        return jnp.zeros(shape)

    monkeypatch.setattr(jax, "make_array_from_callback", record)
    parallel.global_batch(part, images[part.rows])
    for device, (rows,) in index.items():
        if device.process_index == 1:
            np.testing.assert_array_equal(shards[device], images[rows])


def test_a_device_computes_no_more_than_its_rows_need() -> None:
    """Two rows on eight devices cost each device as much as one row on one device, and the result is the same."""
    mesh, weights = parallel.make_mesh(4, 2), np.ones((8, 8), np.float32)
    shape = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, None)))

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.tanh(x @ w) ** 2)

    def compiled(sharding: Any, rows: int) -> Any:
        return jax.jit(jax.grad(loss)).lower(shape, jax.ShapeDtypeStruct((rows, 8), jnp.float32, sharding=sharding))

    two, sixteen = (compiled(parallel.divide(mesh, n).sharding, n).compile() for n in (2, 16))
    assert two.cost_analysis()["flops"] < sixteen.cost_analysis()["flops"]
    x = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    spread = jax.device_put(x, parallel.divide(mesh, 2).sharding)
    np.testing.assert_allclose(two(parallel.replicate(mesh, weights), spread), jax.grad(loss)(weights, x), rtol=1e-5)


def test_devices_that_repeat_the_work_of_others_are_counted_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    mesh = parallel.make_mesh(-1, 1)
    for rows in (8, 16):
        parallel.say_copies("train.batch_size", rows, mesh)
    assert capsys.readouterr().out == ""
    parallel.say_copies("classifier_train.batch_size", 6, mesh)
    said = capsys.readouterr().out
    assert "classifier_train.batch_size is 6, fewer rows than the 8 devices: 2 of them share the work" in said
    assert "the other 6 repeat it; a multiple of 8 would use all." in said and said.count("\n") == 1
