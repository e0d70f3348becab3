"""Starts a function in new processes, which `jax.distributed` connects."""

import multiprocessing
from collections.abc import Callable
from typing import Any

import jax
from ports import free_port


def in_processes(function: Callable[..., Any], *arguments: Any, processes: int = 2, devices: int = 1) -> list[Any]:
    """The result of `function(*arguments)`, of a module of the tests, in each process, which has `devices` devices."""
    context = multiprocessing.get_context("spawn")
    address = f"127.0.0.1:{free_port()}"
    said = context.SimpleQueue()
    each = [(index, processes, devices, address, said, function, arguments) for index in range(processes)]
    started = [context.Process(target=_one, args=one) for one in each]
    for process in started:
        process.start()
    for process in started:
        process.join(200)
        process.kill()
        process.join()
    found = dict(said.get() for _ in started if not said.empty())
    assert sorted(found) == list(range(processes)), "a process did not finish: its traceback is above"
    return [found[index] for index in range(processes)]


def _one(
    index: int, processes: int, devices: int, address: str, said: Any, function: Callable[..., Any], arguments: Any
) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.distributed.initialize(address, processes, index, coordinator_bind_address=address)
    said.put((index, function(*arguments)))
