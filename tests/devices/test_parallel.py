"""The device mesh, the division of arrays over it, and the environment variables that announce other processes."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from cfd.devices import parallel
from cfd.errors import UserError


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError("Unable to initialize backend 'tpu':\nno libtpu.so"),
            "backend 'tpu': no libtpu.so; JAX_PLATFORMS",
        ),
        (AssertionError(), "(it knows no such platform; JAX_PLATFORMS is 'cuda')"),
    ],
)
def test_devices_that_jax_cannot_use_are_an_error_with_remedies(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def process_count() -> int:
        raise error

    monkeypatch.setattr(jax, "process_count", process_count)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    for name in [name for name in os.environ if name.startswith(("CFD_", "SLURM_", "TPU_", "MEGASCALE_"))]:
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match=r"install the extra .* or set JAX_PLATFORMS=cpu") as refusal:
        parallel.init_distributed()
    assert reason in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(("data", "fsdp", "shape"), [(-1, 1, (8, 1)), (-1, 2, (4, 2)), (2, 4, (2, 4)), (8, 1, (8, 1))])
def test_a_mesh_has_all_devices(data: int, fsdp: int, shape: tuple[int, int]) -> None:
    mesh = parallel.make_mesh(data, fsdp)
    assert mesh.axis_names == ("data", "fsdp") and tuple(mesh.shape.values()) == shape
    assert set(mesh.devices.flat) == set(jax.devices())


def test_a_mesh_is_ordered_by_process_whatever_the_order_of_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a torus, JAX's own order scatters the devices of a process, and with them its rows of the batch."""
    found = jax.devices()
    monkeypatch.setattr(jax, "devices", lambda: found[::-2] + found[::2])
    assert list(parallel.make_mesh(-1, 2).devices.flat) == found


@pytest.mark.parametrize(("data", "fsdp"), [(3, 1), (-1, 3), (8, 2), (1, 1), (-1, 16), (-1, 0)])
def test_a_mesh_of_another_number_of_devices_is_refused(data: int, fsdp: int) -> None:
    with pytest.raises(ValueError, match=rf"mesh is data={data} x fsdp={fsdp} for 8 devices; .* must be 8"):
        parallel.make_mesh(data, fsdp)


def test_parameters_are_divided_along_their_longest_axis_that_fsdp_divides() -> None:
    shapes = {"kernel": (3, 3, 32, 64), "odd": (3, 3, 32, 7), "bias": (64,), "count": (), "prime": (7, 5)}
    specs = {
        "kernel": (None, None, None, "fsdp"),
        "odd": (None, None, "fsdp", None),
        "bias": ("fsdp",),
        "count": (),
        "prime": (None, None),
    }
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    for name, x in parallel.with_shardings(parallel.make_mesh(2, 4), tree).items():
        assert x.sharding.spec == PartitionSpec(*specs[name]), name
    for x in parallel.with_shardings(parallel.make_mesh(8, 1), tree).values():
        assert all(axis is None for axis in x.sharding.spec)


@pytest.mark.parametrize("fsdp", [1, 2, 8])
def test_rows_go_out_to_the_devices_in_order_and_come_back(fsdp: int) -> None:
    mesh = parallel.make_mesh(-1, fsdp)
    rows = np.arange(48, dtype=np.float32).reshape(16, 3)
    for x in (parallel.shard_rows(mesh, rows), parallel.global_batch(parallel.divide(mesh, 16), {"x": rows})["x"]):
        shards = {shard.device: np.asarray(shard.data) for shard in x.addressable_shards}
        np.testing.assert_array_equal(np.concatenate([shards[d] for d in mesh.devices.flat]), rows)
        np.testing.assert_array_equal(parallel.gather(x), rows)
    copies = parallel.replicate(mesh, {"x": rows})["x"].addressable_shards
    assert len(copies) == 8 and all((np.asarray(copy.data) == rows).all() for copy in copies)


def test_a_batch_that_devices_do_not_divide_is_refused_with_one_that_they_do() -> None:
    mesh = parallel.make_mesh(4, 2)
    for rows in (24, 8, 3):
        parallel.check_batch("train.batch_size", rows, mesh)
    with pytest.raises(ValueError, match=r"train\.batch_size is 30, which 8 devices do not divide: .* such as 24"):
        parallel.check_batch("train.batch_size", 30, mesh)


def test_no_other_process_is_looked_for_without_being_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CFD_COORDINATOR", "SLURM_STEP_NUM_TASKS", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("it was"))
    parallel.init_distributed()
    for count, number in (("1", "0"), ("", "")):
        monkeypatch.setenv("CFD_NUM_PROCESSES", count)
        monkeypatch.setenv("CFD_PROCESS_ID", number)
        parallel.init_distributed()


@pytest.mark.parametrize(
    ("count", "number", "words"),
    [
        (None, "0", r"CFD_NUM_PROCESSES is '' in the environment; expected an integer >= 0"),
        ("2", None, r"CFD_PROCESS_ID is ''"),
        ("two", "0", r"CFD_NUM_PROCESSES is 'two'"),
        ("2", "-1", r"CFD_PROCESS_ID is '-1'"),
        ("2", "2", r"CFD_PROCESS_ID is 2 of CFD_NUM_PROCESSES 2"),
    ],
)
def test_an_environment_that_is_half_set_is_refused(
    monkeypatch: pytest.MonkeyPatch, count: str | None, number: str | None, words: str
) -> None:
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("it started"))
    monkeypatch.setenv("CFD_COORDINATOR", "localhost:1234")
    for name, value in (("CFD_NUM_PROCESSES", count), ("CFD_PROCESS_ID", number)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        parallel.init_distributed()


@pytest.mark.parametrize("name, value", [("CFD_NUM_PROCESSES", "2"), ("CFD_PROCESS_ID", "1")])
def test_an_environment_without_its_coordinator_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """Otherwise the process would train alone, as if it were the only one."""
    for other in ("CFD_COORDINATOR", "CFD_NUM_PROCESSES", "CFD_PROCESS_ID"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"CFD_COORDINATOR \(host:port\) is not set"):
        parallel.init_distributed()


def test_the_coordinator_listens_only_at_the_address_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: asked.append(arguments))
    monkeypatch.setenv("CFD_COORDINATOR", "10.0.0.1:1234")
    monkeypatch.setenv("CFD_NUM_PROCESSES", "2")
    for number in ("0", "1"):
        monkeypatch.setenv("CFD_PROCESS_ID", number)
        parallel.init_distributed()
    assert asked[0]["coordinator_bind_address"] == asked[0]["coordinator_address"] == "10.0.0.1:1234"
    assert "coordinator_bind_address" not in asked[1] and asked[1]["process_id"] == 1
