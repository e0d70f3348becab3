"""Memory: large blocks keep theirs for the next one, and compilations return theirs."""

import ctypes
import platform
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from cfd.devices import memory

GLIBC = tuple(map(int, platform.libc_ver()[1].split("."))) if platform.libc_ver()[0] == "glibc" else ()
needs_glibc = pytest.mark.skipif(GLIBC < (2, 35), reason="glibc alone, from 2.35 on, keeps large blocks")


def fake_glibc(accepted: int, done: list[Any]) -> SimpleNamespace:
    """A glibc that accepts mappings up to a threshold, and notes the calls."""

    def mallopt(parameter: int, value: int) -> int:
        done.append(("mallopt", parameter, value))
        return int(parameter != memory.M_MMAP_THRESHOLD or value <= accepted)

    return SimpleNamespace(
        mallopt=mallopt,
        malloc_trim=lambda pad: done.append(("trim", pad)),
        malloc=lambda size: None,
        free=lambda block: None,
        madvise=lambda *_: -1,
    )


@pytest.mark.parametrize("accepted, threshold", [(2**31, memory.KEPT), (2**25, 2**25)])  # the latter: before 2.35
def test_large_blocks_stay_and_long_compilations_return_theirs(
    monkeypatch: pytest.MonkeyPatch, accepted: int, threshold: int
) -> None:
    """JAX records the event for every compilation."""
    done: list[Any] = []
    glibc = fake_glibc(accepted, done)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: glibc)
    events: list[str] = []

    def record(event: str, duration_secs: float, **_: Any) -> None:
        events.append(event)

    listeners: list[Callable[..., None]] = []
    with monkeypatch.context() as patch:  # jax 0.7 cannot remove a single listener
        patch.setattr(jax.monitoring, "register_event_duration_secs_listener", listeners.append)
        memory.set_up.cache_clear()
        memory.set_up()
        memory.set_up.cache_clear()  # what was set up is the glibc of this test
    assert {parameter: value for call, parameter, value in done[:-1]} == {-1: -1, -3: threshold}
    jax.monitoring.register_event_duration_secs_listener(record)
    jax.jit(lambda x: x + 1.5)(1.0)
    assert memory.LONG.keys() <= set(events)
    (listener,) = listeners
    for event, seconds in memory.LONG.items():
        done.clear()
        listener(event, 0.5 * seconds)
        assert done == []
        listener(event, 1.5 * seconds)
        assert done == [("trim", 0)]


@needs_glibc
def test_the_memory_of_a_freed_block_is_used_again() -> None:
    """The second of two blocks of 100 MB takes no page fault, unless a compilation ends between them."""
    program = """
import ctypes, resource
from cfd.devices import memory
memory.set_up()
libc = memory._glibc()
def faults():
    before, block = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, libc.malloc(100 * 2**20)
    ctypes.memset(block, 1, 100 * 2**20)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first, second = faults(), faults()
memory.trim()
print(first, second, faults())
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    first, second, third = map(int, output.split())
    assert min(first, third) >= 40 and second <= 5, "huge pages of 2 MB make 50 faults, and small ones 25,600"
