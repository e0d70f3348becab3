"""From one CPU to a pod: the processes, the device mesh, and which part of an array lies where."""

import math
import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH = PartitionSpec(("data", "fsdp"))
"""The batch axis lies over every device, whatever the shape of the mesh."""


def init_distributed() -> None:
    """Join the other processes of the job, if the environment says that there are any.

    A TPU pod or SLURM is found by JAX itself; elsewhere CFD_COORDINATOR (host:port), CFD_NUM_PROCESSES and
    CFD_PROCESS_ID say it.
    """
    address = os.environ.get("CFD_COORDINATOR")
    if address:
        try:
            count, number = int(os.environ["CFD_NUM_PROCESSES"]), int(os.environ["CFD_PROCESS_ID"])
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"CFD_COORDINATOR is {address}, but CFD_NUM_PROCESSES or CFD_PROCESS_ID is no number ({error}): "
                "set all three, the last from 0 to the number of processes less one"
            ) from None
        jax.distributed.initialize(address, count, number, coordinator_bind_address=address if number == 0 else None)
    elif int(os.environ.get("SLURM_NTASKS", "1")) > 1 or len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1:
        jax.distributed.initialize()


def make_mesh(data: int, fsdp: int) -> Mesh:
    """A mesh of all devices with the axes "data" and "fsdp"; -1 for `data` takes what `fsdp` leaves.

    Raises ValueError if data x fsdp is not the number of devices.
    """
    devices = jax.device_count()
    if fsdp < 1 or (data == -1 and devices % fsdp) or (data != -1 and data * fsdp != devices):
        raise ValueError(
            f"mesh is data={data} x fsdp={fsdp} for {devices} devices; their product must be {devices} "
            "(data=-1 takes what fsdp leaves)"
        )
    return jax.make_mesh((devices // fsdp, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def placed(mesh: Mesh, tree: Any) -> Any:
    """Shapes -> shapes with shardings: of each array the longest axis that fsdp divides lies over "fsdp"."""
    fsdp = mesh.shape["fsdp"]

    def one(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axes = [i for i, n in enumerate(x.shape) if fsdp > 1 and n % fsdp == 0]
        longest = max(axes, key=lambda i: x.shape[i]) if axes else None
        spec = PartitionSpec(*("fsdp" if i == longest else None for i in range(len(x.shape))))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(one, tree)


def global_batch(mesh: Mesh, local: Any) -> Any:
    """This process's contiguous rows of the batch -> the global arrays, laid over all devices."""
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), local)


def shard_rows(mesh: Mesh, rows: np.ndarray) -> jax.Array:
    """An array that every process holds whole -> a global array with its leading axis laid over all devices."""
    return jax.make_array_from_callback(rows.shape, NamedSharding(mesh, BATCH), lambda index: rows[index])


def gather(x: jax.Array) -> np.ndarray:
    """A global array -> the whole of it, on every process."""
    if jax.process_count() == 1:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Arrays that every process holds whole -> global arrays, a copy on each device."""
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree)


def check_batch(name: str, batch_size: int, mesh: Mesh) -> None:
    """Raises ValueError, naming the field, unless the devices divide the batch."""
    devices = math.prod(mesh.shape.values())
    if batch_size % devices:
        near = max(devices, batch_size // devices * devices)
        raise ValueError(
            f"{name} is {batch_size}, which {devices} devices do not divide: use a multiple such as {near}"
        )


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
