"""From one CPU to a pod: the processes, the device mesh, and which part of an array each device has."""

import math
import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cfd.errors import UserError

BATCH = PartitionSpec(("data", "fsdp"))
"""The batch axis is divided among all devices, whatever the shape of the mesh."""

TIMEOUTS = {
    "initialization_timeout": ("CFD_INITIALIZATION_TIMEOUT", 300),
    "heartbeat_timeout_seconds": ("CFD_HEARTBEAT_TIMEOUT", 100),
    "shutdown_timeout_seconds": ("CFD_SHUTDOWN_TIMEOUT", 300),
}
"""Arguments of `jax.distributed.initialize`: the environment variable that sets each, and its default in seconds."""

ALONE = {"CFD_NUM_PROCESSES": "1", "CFD_PROCESS_ID": "0"}
"""The values that these environment variables may have when there is only one process."""


def init_distributed() -> None:
    """Connects this process to the other processes of the job, if the environment announces any.

    The environment does so with CFD_COORDINATOR (host:port), CFD_NUM_PROCESSES and CFD_PROCESS_ID; then the coordinator
    listens only on the given host:port. With CFD_COORDINATOR=auto, under SLURM and on GKE, JAX finds the processes
    itself; then its coordinator listens on all addresses of its host, which therefore needs a private network. Raises
    ValueError if a number is malformed or out of range, or if there are other processes but no CFD_COORDINATOR, also on
    the hosts of a Cloud TPU slice.
    """
    address = os.environ.get("CFD_COORDINATOR")
    arguments: dict[str, Any] = {name: _from_environment(*timeout) for name, timeout in TIMEOUTS.items()}
    if address and address != "auto":
        count, number = _from_environment("CFD_NUM_PROCESSES"), _from_environment("CFD_PROCESS_ID")
        if not 0 <= number < count:
            raise UserError(
                f"CFD_PROCESS_ID is {number} of CFD_NUM_PROCESSES {count}: give each process its own number, from 0 to "
                f"CFD_NUM_PROCESSES - 1"
            )
        arguments |= dict(coordinator_address=address, num_processes=count, process_id=number)
        arguments |= dict(coordinator_bind_address=address) if number == 0 else {}
        who = f"Process {number} of {count} joins the coordinator {address}"
    elif (
        address == "auto"
        or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
        or len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1
    ):
        who = "Joining the other processes of the cluster"
    elif any(os.environ.get(name, alone) not in ("", alone) for name, alone in ALONE.items()):
        raise UserError(
            "CFD_NUM_PROCESSES or CFD_PROCESS_ID announces other processes, but CFD_COORDINATOR (host:port) is not "
            "set: set it, or unset all CFD_* variables"
        )
    elif (count := jax.process_count()) > 1:
        # On a Cloud TPU slice, each host's devices already know those of all hosts, but the processes do not talk.
        raise UserError(
            f"this process is one of {count} of a TPU slice, which are not connected: set CFD_COORDINATOR=auto on "
            "every host, and start the command on all of them"
        )
    else:
        return
    # Print this first: on a timeout, JAX ends the process with SIGABRT and raises no exception.
    seconds = arguments["initialization_timeout"]
    print(f"{who}; if one is missing after {seconds} s (CFD_INITIALIZATION_TIMEOUT), the run aborts.", flush=True)
    jax.distributed.initialize(**arguments)


def _from_environment(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise UserError(
            f"{name} is {text!r} in the environment; expected an integer >= 0: set it, or unset all CFD_* variables"
        )
    return int(text)


def make_mesh(data: int, fsdp: int) -> Mesh:
    """A mesh of all devices with the axes "data" and "fsdp". `data` = -1 stands for all devices / `fsdp`.

    Raises ValueError unless data x fsdp is the number of devices.
    """
    devices = jax.device_count()
    if fsdp < 1 or (data == -1 and devices % fsdp) or (data != -1 and data * fsdp != devices):
        raise UserError(
            f"mesh is data={data} x fsdp={fsdp} for {devices} devices; their product must be {devices} "
            "(data=-1 stands for the number of devices / fsdp)"
        )
    # Ordered by process, each process has contiguous rows of the batch. `jax.make_mesh` orders devices along the torus
    # of a TPU slice, which scatters the rows, and it supports neither several slices nor every value of fsdp.
    ordered = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    grid = np.array(ordered).reshape(devices // fsdp, fsdp)
    return Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def with_shardings(mesh: Mesh, tree: Any) -> Any:
    """The same shapes, with shardings: each array is split over "fsdp" along its longest axis that fsdp divides."""
    fsdp = mesh.shape["fsdp"]

    def one(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axes = [i for i, n in enumerate(x.shape) if fsdp > 1 and n % fsdp == 0]
        longest = max(axes, key=lambda i: x.shape[i]) if axes else None
        spec = PartitionSpec(*("fsdp" if i == longest else None for i in range(len(x.shape))))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(one, tree)


def global_batch(mesh: Mesh, local: Any) -> Any:
    """The global arrays, split over all devices, from this process's contiguous rows of the batch."""
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), local)


def batch_shapes(mesh: Mesh, batch_size: int, image_shape: tuple[int, int, int]) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and shardings that `global_batch` gives a batch: "image" is uint8 and "label" is int32."""
    sharding = NamedSharding(mesh, BATCH)
    return {
        "image": jax.ShapeDtypeStruct((batch_size, *image_shape), np.uint8, sharding=sharding),
        "label": jax.ShapeDtypeStruct((batch_size,), np.int32, sharding=sharding),
    }


def shard_rows(mesh: Mesh, rows: np.ndarray) -> jax.Array:
    """A global array whose leading axis is split over all devices, from rows that every process has in full."""
    return jax.make_array_from_callback(rows.shape, NamedSharding(mesh, BATCH), lambda index: rows[index])


def gather(x: jax.Array) -> np.ndarray:
    """The full content of a global array, on every process."""
    if jax.process_count() == 1:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Global arrays with a full copy on each device, from arrays that every process has in full."""
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree)


def check_batch(name: str, batch_size: int, mesh: Mesh) -> None:
    """Raises ValueError, with the name of the field, unless the number of devices divides the batch size."""
    devices = math.prod(mesh.shape.values())
    if batch_size % devices:
        near = max(devices, batch_size // devices * devices)
        raise UserError(f"{name} is {batch_size}, which {devices} devices do not divide: use a multiple such as {near}")


def total(count: int) -> int:
    """The sum of a count over all processes. Every process must call this."""
    if jax.process_count() == 1:
        return count
    return int(multihost_utils.process_allgather(np.int32(count)).sum())


def barrier(name: str) -> None:
    """Waits until every process has reached this call."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
