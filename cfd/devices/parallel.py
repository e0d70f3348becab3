"""From one CPU to a pod: the processes, the device mesh, and which part of an array each device has."""

import errno
import inspect
import math
import os
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.clusters import GceTpuCluster
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Int

from cfd.errors import UserError

BATCH = PartitionSpec(("data", "fsdp"))
"""The batch axis is divided among all devices, whatever the shape of the mesh. See `divide` for smaller batches."""

TIMEOUTS = {
    "initialization_timeout": ("CFD_INITIALIZATION_TIMEOUT", 300),
    "heartbeat_timeout_seconds": ("CFD_HEARTBEAT_TIMEOUT", 100),
    "shutdown_timeout_seconds": ("CFD_SHUTDOWN_TIMEOUT", 300),
}
"""Arguments of `jax.distributed.initialize`: the environment variable that sets each, and its default in seconds."""

TAKES_SHUTDOWN_TIMEOUT = "shutdown_timeout_seconds" in inspect.signature(jax.distributed.initialize).parameters
"""Whether JAX takes that argument: jax 0.7 and 0.8.0 do not, and always wait for the default time."""

UNITED_BYTES = 2**20
"""`united` sends a multiple of this many bytes per device of a process: equal lengths share a compiled program."""

ALONE = {"CFD_NUM_PROCESSES": "1", "CFD_PROCESS_ID": "0"}
"""The values that these environment variables may have without a coordinator: the process is then the only one."""


def init_distributed() -> None:
    """Connects this process to the other processes of the job, if there are any.

    The first of these that is there decides:

    1. CFD_COORDINATOR=host:port, with CFD_NUM_PROCESSES and CFD_PROCESS_ID. The coordinator then listens only on that
       host:port. With CFD_COORDINATOR=auto, JAX finds the processes. CFD_NUM_PROCESSES=1 alone: this process is alone.
    2. SLURM_STEP_NUM_TASKS, which SLURM sets.
    3. TPU_PROCESS_ADDRESSES or TPU_WORKER_HOSTNAMES, which GKE sets, and MEGASCALE_NUM_SLICES.
    4. The metadata server of a Cloud TPU VM. It is asked only if JAX found TPU chips and libtpu on this machine when it
       was imported, and if TPU_SKIP_MDS_QUERY is not set. No other machine waits for it.

    If they announce several processes, JAX joins them by its own detection of clusters. Its coordinator then listens on
    all addresses of its host, which therefore needs a private network. Raises UserError if a number is malformed or out
    of range, if there are other processes but no CFD_COORDINATOR, also on the hosts of a Cloud TPU slice, if the other
    processes cannot be joined, and if JAX cannot use the devices.
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
        _check_coordinator(address, listens=number == 0)
        arguments |= dict(coordinator_bind_address=address) if number == 0 else {}
        who = f"Process {number} of {count} joins the coordinator {address}"
    elif address == "auto":
        who = "Joining the other processes of the cluster"
    elif any(os.environ.get(name, alone) not in ("", alone) for name, alone in ALONE.items()):
        raise UserError(
            "CFD_NUM_PROCESSES or CFD_PROCESS_ID announces other processes, but CFD_COORDINATOR (host:port) is not "
            "set: set it, or unset all CFD_* variables"
        )
    elif not os.environ.get("CFD_NUM_PROCESSES") and (announced := _announced()):
        who = f"Joining the other processes that {announced} (CFD_NUM_PROCESSES=1 would start this one alone)"
    elif (count := process_count()) > 1:
        # On a Cloud TPU slice, each host's devices already know those of all hosts, but the processes do not talk.
        raise UserError(
            f"this process is one of {count} of a TPU slice, which are not connected: set CFD_COORDINATOR=auto on "
            "every host, and start the command on all of them"
        )
    else:
        return
    if not TAKES_SHUTDOWN_TIMEOUT:
        variable, default = TIMEOUTS["shutdown_timeout_seconds"]
        if arguments.pop("shutdown_timeout_seconds") != default:
            print(f"{variable} has no effect: jax {jax.__version__} always waits {default} s.", flush=True)
    # Print this first: on a timeout, JAX ends the process with SIGABRT and raises no exception.
    seconds = arguments["initialization_timeout"]
    print(f"{who}; if one is missing after {seconds} s (CFD_INITIALIZATION_TIMEOUT), the run aborts.", flush=True)
    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"the other processes cannot be joined ({' '.join(str(error).split())}): start the same command on every "
            "host, and give each process CFD_COORDINATOR=host:port of process 0, CFD_NUM_PROCESSES and CFD_PROCESS_ID "
            "if JAX cannot find them itself; without CFD_COORDINATOR, CFD_NUM_PROCESSES=1 starts a process alone"
        ) from error
    process_count()


def process_count() -> int:
    """The number of processes of the job. Raises UserError if JAX cannot use the devices that it is to use."""
    try:
        return jax.process_count()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that a platform of the list is there
        raise UserError(
            f"JAX cannot use the devices of this machine ({' '.join(str(error).split()) or 'it knows no such platform'}"
            f"; JAX_PLATFORMS is {os.environ.get('JAX_PLATFORMS', '')!r}): install the extra [cuda] or [tpu] of this "
            "package, end other programs that use the devices, or set JAX_PLATFORMS=cpu"
        ) from error


def _check_coordinator(address: str, *, listens: bool) -> None:
    """Raises UserError unless `address` is host:port, and if the port is taken on the process that listens there."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            f"CFD_COORDINATOR is {address!r}; expected host:port of process 0, such as 10.0.0.1:8476, or auto"
        )
    if not listens:
        return
    try:
        socket.create_server((host, int(port))).close()
    except OSError as error:
        # Only this: JAX can crash on a port that is taken. It reports other faults, and knows more kinds of addresses.
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"another program listens at CFD_COORDINATOR = {address}, perhaps an earlier start of this job: end "
                "it, or give all processes another port"
            ) from None


def _announced() -> str:
    """Says who announces other processes of this job, where no CFD_* variable does; "" if there are none."""
    if tasks := os.environ.get("SLURM_STEP_NUM_TASKS"):
        return "" if tasks == "1" else f"SLURM announces, {tasks} in all"
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES", os.environ.get("TPU_WORKER_HOSTNAMES"))
    if hosts is not None:
        several = "," in hosts or os.environ.get("MEGASCALE_NUM_SLICES", "1") != "1"
        return "the environment of this TPU slice announces" if several else ""
    try:
        count = GceTpuCluster.get_process_count() if GceTpuCluster.is_env_present() else 1
    except (OSError, ValueError, RuntimeError) as error:  # no connection, or another answer than expected
        reason = " ".join(str(error).split())
        print(f"The metadata server of this TPU VM does not say which other hosts there are ({reason}).", flush=True)
        return ""
    return "" if count == 1 else f"the metadata server of this TPU VM announces, {count} in all"


def _from_environment(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise UserError(
            f"{name} is {text!r} in the environment; expected an integer >= 0: set it, or unset all CFD_* variables"
        )
    return int(text)


def make_mesh(data: int, fsdp: int, fsdp_across_slices: bool = False) -> Mesh:
    """A mesh of all devices with the axes "data" and "fsdp". `data` = -1 stands for all devices / `fsdp`.

    Neighbours along "fsdp" are in one slice, that is, in one group of devices with a fast network of its own. Raises
    UserError unless data x fsdp is the number of devices, and if fsdp does not divide the devices of each slice, except
    with `fsdp_across_slices`.
    """
    # In the order of slices and processes, neighbours are close to each other. `jax.make_mesh` orders devices along the
    # torus of one slice; it supports neither several slices nor every value of fsdp.
    ordered = sorted(jax.devices(), key=lambda device: (_slice_of(device), device.process_index, device.id))
    count, slices = len(ordered), Counter(map(_slice_of, ordered))
    if fsdp < 1 or (data == -1 and count % fsdp) or (data != -1 and data * fsdp != count):
        raise UserError(
            f"mesh is data={data} x fsdp={fsdp} for {count} devices; their product must be {count} "
            "(data=-1 stands for the number of devices / fsdp)"
        )
    if not fsdp_across_slices and any(size % fsdp for size in slices.values()):
        near = math.gcd(fsdp, *slices.values())
        raise UserError(
            f"mesh.fsdp is {fsdp}, which does not divide the {min(slices.values())} devices of each of {len(slices)} "
            f"slices: the parameters would cross the network between slices at every step. Give mesh.fsdp={near} and "
            "mesh.data=-1, or mesh.fsdp_across_slices=True"
        )
    return Mesh(np.array(ordered).reshape(-1, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def _slice_of(device: Any) -> int:
    """The slice of a device: of a TPU slice among several, or of GPUs with fast links. 0 where JAX knows of none."""
    return getattr(device, "slice_index", None) or 0


def with_shardings(mesh: Mesh, tree: Any) -> Any:
    """The same shapes, with shardings: each array is split over "fsdp" along its longest axis that fsdp divides."""
    fsdp = mesh.shape["fsdp"]

    def one(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axes = [i for i, n in enumerate(x.shape) if fsdp > 1 and n % fsdp == 0]
        longest = max(axes, key=lambda i: x.shape[i]) if axes else None
        spec = PartitionSpec(*("fsdp" if i == longest else None for i in range(len(x.shape))))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(one, tree)


class Division(NamedTuple):
    """How the rows of a training batch are divided among the devices, and which of them this process has.

    rows: int64 [n], the rows that the devices of this process hold, in ascending order.
    counted: bool [n], whether this is the first process that holds a row: each row is counted by one process.
    """

    sharding: NamedSharding
    batch_size: int
    rows: Int[np.ndarray, " n"]
    counted: Bool[np.ndarray, " n"]


def divide(mesh: Mesh, batch_size: int, num_microbatches: int = 1) -> Division:
    """The division of a batch of `batch_size` rows, whose microbatches are computed one after the other.

    All devices have equal parts if they divide the rows of a microbatch. Otherwise, as many devices as divide them have
    equal parts, and the neighbours of each hold copies, which repeat its work.
    """
    split = math.gcd(batch_size // num_microbatches, mesh.size)
    sharding = NamedSharding(mesh, BATCH)
    if split < mesh.size:
        grid = mesh.devices.reshape(split, -1)
        copies = Mesh(grid, ("rows", "copies"), axis_types=(AxisType.Auto, AxisType.Auto))
        sharding = NamedSharding(copies, PartitionSpec("rows"))
    # The sharding says which rows a device has. No order of devices is assumed.
    here, first = np.zeros(batch_size, bool), np.full(batch_size, np.iinfo(np.int64).max)
    for device, (rows,) in sharding.devices_indices_map((batch_size,)).items():
        here[rows] |= device.process_index == jax.process_index()
        first[rows] = np.minimum(first[rows], device.process_index)
    rows = np.flatnonzero(here)
    return Division(sharding, batch_size, rows, first[rows] == jax.process_index())


def global_batch(division: Division, local: Any) -> Any:
    """The global arrays of a batch, from this process's rows of it."""

    def one(x: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(division.batch_size)
            first = np.searchsorted(division.rows, start)
            return x[first : first + stop - start]

        return jax.make_array_from_callback((division.batch_size, *x.shape[1:]), division.sharding, part)

    return jax.tree.map(one, local)


def batch_shapes(division: Division, image_shape: tuple[int, int, int]) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and shardings that `global_batch` gives a batch: "image" is uint8 and "label" is int32."""
    size, sharding = division.batch_size, division.sharding
    return {
        "image": jax.ShapeDtypeStruct((size, *image_shape), np.uint8, sharding=sharding),
        "label": jax.ShapeDtypeStruct((size,), np.int32, sharding=sharding),
    }


def shard_rows(mesh: Mesh, rows: np.ndarray) -> jax.Array:
    """A global array whose leading axis is split over all devices, from rows that every process has in full."""
    return jax.make_array_from_callback(rows.shape, NamedSharding(mesh, BATCH), lambda index: rows[index])


def gather(x: jax.Array) -> np.ndarray:
    """The full content of a global array, on every process."""
    if jax.process_count() == 1:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def gather_rows(rows: np.ndarray) -> np.ndarray:
    """The rows of all processes, in the order of the processes, on every process. All must give equally many."""
    if jax.process_count() == 1:
        return rows
    return np.asarray(multihost_utils.process_allgather(rows, tiled=True))


def united(shapes: Sequence[Any], own: Mapping[int, np.ndarray]) -> list[np.ndarray]:
    """The content of arrays, of which each process has some, on every process, bit for bit.

    `own` maps the places of this process's arrays in `shapes` to their content. Together, the processes have each array
    once. Every process must call this.
    """
    if jax.process_count() == 1:
        return [own[number] for number in range(len(shapes))]
    sizes = [x.size * x.dtype.itemsize for x in shapes]
    starts = np.cumsum([0, *(-(-size // 8) * 8 for size in sizes)])
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    mesh = Mesh(np.array(devices).reshape(jax.process_count(), -1), ("process", "device"))
    unit = UNITED_BYTES * mesh.shape["device"]
    content = np.zeros(max(-(-int(starts[-1]) // unit), 1) * unit, np.uint8)
    for number, x in own.items():
        content[starts[number] :][: sizes[number]] = x.reshape(-1).view(np.uint8)
    # The sum of integers is exact, and the other processes add 0: NaN and -0.0 keep their bits.
    sharding = NamedSharding(mesh, PartitionSpec("process", "device"))
    rows = jax.make_array_from_process_local_data(sharding, content.view(np.uint32)[None])
    added = jax.jit(_sum_of_rows, out_shardings=NamedSharding(mesh, PartitionSpec()))(rows)
    content = np.asarray(added.addressable_data(0)).view(np.uint8)
    return [
        content[start:][:size].view(x.dtype).reshape(x.shape)
        for x, size, start in zip(shapes, sizes, starts, strict=False)
    ]


def _sum_of_rows(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=0, dtype=x.dtype)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Global arrays with a full copy on each device, from arrays that every process has in full."""
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree)


def say_copies(name: str, rows: int, mesh: Mesh) -> None:
    """Prints, on process 0, how many devices repeat the work of others.

    None do unless there are fewer rows than devices. `rows` is the number of rows of a microbatch, and `name` is its
    field.
    """
    split = math.gcd(rows, mesh.size)
    if split < mesh.size and jax.process_index() == 0:
        print(
            f"{name} is {rows}, fewer rows than the {mesh.size} devices: {split} of them share the work of a step, and "
            f"the other {mesh.size - split} repeat it; a multiple of {mesh.size} would use all.",
            flush=True,
        )


def check_batch(name: str, batch_size: int, mesh: Mesh) -> None:
    """Raises UserError, with the name of the field, if there are more rows than devices, which do not divide them."""
    if batch_size > mesh.size and batch_size % mesh.size:
        near = batch_size // mesh.size * mesh.size
        raise UserError(
            f"{name} is {batch_size}, which {mesh.size} devices do not divide: use a multiple such as {near}"
        )


def total(count: int) -> int:
    """The sum of a count over all processes. Every process must call this."""
    if jax.process_count() == 1:
        return count
    return int(multihost_utils.process_allgather(np.int32(count)).sum())


def barrier(name: str) -> None:
    """Waits until every process has reached this call."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
