"""Two processes that save to a bucket: they agree on a step that process 0 alone cannot commit, and go on."""

import multiprocessing
import os
from typing import Any

import jax
import numpy as np
import pytest
from checkpoints import CONFIG_JSON, abstract, make_state, opened, save
from gcs import FakeGcs
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from ports import free_port

from cfd.runs import checkpoint, workdir


def one_of_two(index: int, port: int, run: str, ask: Any, said: Any) -> None:
    """Process `index` of two with two devices each, which saves the steps that it is asked to save, or restores."""
    jax.config.update("jax_num_cpu_devices", 2)
    address = f"127.0.0.1:{port}"
    jax.distributed.initialize(address, 2, index, coordinator_bind_address=address)
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))

    def shard(x: Any) -> jax.Array:
        sharding = NamedSharding(mesh, P("fsdp") if x.ndim and x.shape[0] % 4 == 0 else P())
        return jax.make_array_from_callback(x.shape, sharding, lambda i: np.asarray(x)[i])

    workdir.write_config(run, CONFIG_JSON)
    with opened(run) as manager:
        while (step := ask.get()) is not None:
            if step:
                save(manager, step, jax.tree.map(shard, make_state(step)))
                checkpoint.wait(manager)
                said.put(manager.bucket_steps)
                continue
            restored = checkpoint.restore(manager, abstract(jax.tree.map(shard, make_state(0))))
            assert restored is not None
            same = jax.tree.map(
                lambda x, y: all(np.array_equal(s.data, np.asarray(y)[s.index]) for s in x.addressable_shards),
                restored[1],
                make_state(restored[0]),
            )
            said.put((restored[0], jax.tree.all(same)))


def test_a_step_that_process_0_cannot_commit(bucket: FakeGcs, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    context = multiprocessing.get_context("spawn")
    said, asks, port = context.Queue(), [context.Queue(), context.Queue()], free_port()
    arguments = [(index, port, f"{bucket.url}/run", ask, said) for index, ask in enumerate(asks)]
    pair = [context.Process(target=one_of_two, args=each, daemon=True) for each in arguments]

    def tell(step: int | None) -> list[Any]:
        for ask in asks:
            ask.put(step)
        return [] if step is None else [said.get(timeout=100) for _ in pair]

    try:
        for process in pair:
            process.start()
        assert tell(1) == [[1], [1]]
        for step, part, there in ((2, "2/commit_success.txt", [1, 3]), (4, "meta/metadata", [3, 5])):
            bucket.fail = lambda request, part=part: 403 if part in request.name and request.method != "GET" else None
            assert tell(step) == [[1] if step == 2 else [1, 3]] * 2
            bucket.fail = lambda request: None
            assert tell(step + 1) == [there] * 2
        largest = max(bucket.names("run/checkpoints/5/state/"), key=lambda name: len(bucket.objects[name].content))
        bucket.flip(largest)
        assert tell(0) == [(3, True)] * 2
        tell(None)
        for process in pair:
            process.join(60)
            assert process.exitcode == 0
    finally:
        for process in pair:
            process.kill()
            process.join()
        for queue in (said, *asks):
            queue.close()
    assert not os.listdir(tmp_path)
    assert {name.split("/")[2] for name in bucket.names("run/checkpoints/")} == {"3", "quarantine"}
