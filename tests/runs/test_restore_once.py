"""A restore reads the state once, whatever the number of processes, the parts that were saved, and the mesh.

Real processes read from a bucket on loopback, which counts the bytes that it sends.
"""

import multiprocessing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import CONFIG_JSON, State, opened, save
from gcs import FakeGcs
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from ports import free_port

from cfd import loading
from cfd.devices import parallel
from cfd.runs import checkpoint, workdir
from cfd.runs.digest import leaves

DEVICES = 2
"""Devices of a process."""
SEED = 0


def make_state() -> State:
    """5 MB of random bits, among them -0.0 and denormal numbers. There are few shapes because Orbax compiles each."""
    rng = np.random.default_rng(SEED)

    def finite(*shape: int) -> np.ndarray:
        x = rng.integers(0, 2**32, shape, np.uint32).view(np.float32)
        return np.where(np.isfinite(x), x, np.float32(-0.0))

    params = {f"layer_{i}": {"kernel": finite(3, 3, 64, 128), "bias": finite(128)} for i in range(4)}
    params["wide"] = {"kernel": finite(640, 512), "bias": np.array([-0.0, 0.0, 1e-45], np.float32)}
    opt_state = {"mask": rng.integers(0, 2, 77).astype(bool), "half": finite(37).astype(jnp.bfloat16)}
    ema = jax.tree.map(lambda x: x[::-1].copy(), params)
    return State(np.int32(7), params, ema, opt_state)


def size(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def shardings(fsdp: int, tree: Any) -> Any:
    """The shardings of a training state on a mesh of all devices."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    return parallel.with_shardings(parallel.make_mesh(-1, fsdp), shapes)


def placed(template: Any, tree: Any) -> Any:
    return jax.tree.map(
        lambda t, x: jax.make_array_from_callback(x.shape, t.sharding, lambda index: np.asarray(x)[index]),
        template,
        tree,
    )


def wrong(tree: Any, expected: Any) -> list[str]:
    """The keys of the arrays of which this process holds other bits than expected."""
    there = dict(leaves(expected))
    return [
        key
        for key, x in leaves(tree)
        if x.dtype != there[key].dtype
        or any(np.asarray(s.data).tobytes() != np.asarray(there[key])[s.index].tobytes() for s in x.addressable_shards)
    ]


def one_process(index: int, count: int, port: int, ask: Any, said: Any) -> None:
    """Process `index` of `count`, which saves and reads as it is asked, and says which arrays are wrong."""
    jax.config.update("jax_num_cpu_devices", DEVICES)
    address = f"127.0.0.1:{port}"
    jax.distributed.initialize(address, count, index, coordinator_bind_address=address)
    check_bits(index, count)
    said.put([])
    while (order := ask.get()) is not None:
        said.put(done(*order))
    said.put([])


def done(what: str, run: str, fsdp: int) -> list[str]:
    state = make_state()
    template = shardings(fsdp, state)
    if what == "save":
        workdir.write_config(run, CONFIG_JSON)
        with opened(run) as manager:
            save(manager, 1, placed(template, state))
        return []
    if what == "restore":
        with opened(run) as manager:
            restored = checkpoint.restore(manager, template)
        return ["no step"] if restored is None else wrong(restored[1], state)
    everywhere = NamedSharding(parallel.make_mesh(-1, 1), P())
    sharding = {"ema": everywhere, "local ema": SingleDeviceSharding(jax.local_devices()[-1])}[what]
    params = loading.load_ema(run, "diffusion", sharding=sharding).params
    return wrong(params, state.ema) + [key for key, x in leaves(params) if x.sharding != sharding]


def check_bits(index: int, count: int) -> None:
    """`united` sends all bits, of every type: NaN with a payload, -0.0 and denormal numbers too."""
    rng = np.random.default_rng(1)
    odd = np.array([0x7FC01234, 0xFF800001, 0x80000000, 1, 0x7F800000], np.uint32).view(np.float32)
    arrays = [odd, rng.integers(0, 2, 5).astype(bool), np.int32(3).reshape(()), odd.astype(jnp.bfloat16), odd[:0]]
    arrays += [rng.integers(0, 2**63, (300, 2000))]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]
    for chosen in (range(len(arrays)), range(4, 5)):
        own = {at: arrays[number] for at, number in enumerate(chosen) if number % count == index}
        united = parallel.united([shapes[number] for number in chosen], own)
        assert [x.tobytes() for x in united] == [arrays[number].tobytes() for number in chosen]
        assert [(x.shape, x.dtype) for x in united] == [(shapes[n].shape, shapes[n].dtype) for n in chosen]


@pytest.mark.parametrize("count", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_state_is_read_once(bucket: FakeGcs, count: int) -> None:
    state = make_state()
    workdir.write_config(f"{bucket.url}/whole", CONFIG_JSON)
    with opened(f"{bucket.url}/whole") as manager:
        save(manager, 1, jax.tree.map(lambda x: jax.device_put(x, jax.devices()[3]), state))
    context = multiprocessing.get_context("spawn")
    said, asks = context.Queue(), [context.Queue() for _ in range(count)]
    port = free_port()
    processes = [
        context.Process(target=one_process, args=(index, count, port, ask, said), daemon=True)
        for index, ask in enumerate(asks if count > 1 else [])
    ]

    def answers() -> list[list[str]]:
        return [said.get(timeout=120) for _ in asks]

    def tell(*order: Any) -> float:
        """Has all processes do something, and returns how many bytes the bucket sent."""
        bucket.reset_counts()
        if count == 1:
            assert done(*order) == []
        else:
            for ask in asks:
                ask.put(order)
            assert answers() == [[]] * count, order
        return bucket.bytes_out

    try:
        for process in processes:
            process.start()
        assert count == 1 or answers() == [[]] * count
        devices = count * DEVICES if count > 1 else jax.device_count()
        runs = {1: f"{bucket.url}/parts", 2: f"{bucket.url}/halves", devices: f"{bucket.url}/all"}
        for fsdp, run in runs.items():
            tell("save", run, fsdp)
        whole = f"{bucket.url}/whole"
        for run, fsdp in ((whole, 1), (whole, devices), (runs[1], 2), (runs[2], 1), (runs[devices], 2)):
            read = tell("restore", run, fsdp) / size(state)
            print(f"{count} processes, {run}, fsdp {fsdp}: {read:.3f} of the state")
            assert 0.9 < read <= 1.1
        for what, run in (("ema", whole), ("local ema", runs[1])):
            read = tell(what, run, 1) / size(state.ema)
            print(f"{count} processes, {run}, {what}: {read:.3f} of the EMA")
            assert 0.9 < read <= 1.1
        for ask in asks:
            ask.put(None)
        assert count == 1 or answers() == [[]] * count
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
            process.join()
        for queue in (said, *asks):
            queue.close()
