"""The memory of the C library: XLA's arrays keep theirs between calls, and compilations return theirs.

That is for glibc, the C library of most Linux distributions. With another one, nothing is done. `frozen_objects` is for
Python's own memory.
"""

import ctypes
import functools
import gc
import math
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax

# The parameters of `mallopt` in glibc's <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT = 512 * 2**20
"""A freed block of fewer bytes stays with the process, which uses its memory for the next block."""
MAPPED = 32 * 2**20
"""This is in place of KEPT with a glibc older than 2.35, which accepts no larger value."""
LONG = {
    "/jax/core/compile/jaxpr_to_mlir_module_duration": 0.05,
    "/jax/core/compile/backend_compile_duration": 0.2,
}
"""Free memory returns to the operating system after these events of JAX, if they took so many seconds or longer.

The first is the lowering of a program to XLA's input, just before its compilation.
"""


@functools.cache
def set_up() -> None:
    """Sets how glibc keeps and returns the memory of this process from now on.

    XLA:CPU allocates the temporary memory of a program at every call. By default, glibc maps it anew each time if it
    has more than 32 MB, and the operating system provides it in pages of 4 kB. Here, blocks below KEPT are reused,
    and lie in huge pages of 2 MB where the kernel has them: a training step takes 0.6 (digits) or 0.8 (U-Net of 8 M
    parameters) of the time (Linux 6.18, two cores). Two kinds of blocks are mapped as before: those above KEPT, because
    a free block cannot be reused whole once a smaller one has taken a part of it, and the peak memory would double; and
    those above 64 MB on threads with a heap of their own. With one heap for all threads, compilations, and the steps
    after them, would take half as long again.

    All free memory returns to the operating system before and after a compilation that takes long. Otherwise, the
    memory of a training step would stay with the process while a sampler is compiled.
    """
    if libc := _glibc():
        # Set both. If one is set alone, glibc fixes the other at 128 kB.
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # only `trim` returns the free end of the heap
        if not libc.mallopt(M_MMAP_THRESHOLD, KEPT):
            libc.mallopt(M_MMAP_THRESHOLD, MAPPED)
        trim()
    jax.monitoring.register_event_duration_secs_listener(_trim_at)


def trim() -> None:
    """Returns all free memory to the operating system, and asks for huge pages at the end of the heap.

    A kernel without huge pages refuses them, which changes nothing.
    """
    if libc := _glibc():
        libc.malloc_trim(0)
        # The heap grows by 2 KEPT, which takes no memory until it is used.
        size = KEPT - mmap.PAGESIZE
        for block in [libc.malloc(size) for _ in range(2)]:
            if block:
                first = -(-block // mmap.PAGESIZE) * mmap.PAGESIZE
                libc.madvise(first, block + size - first, mmap.MADV_HUGEPAGE)
                libc.free(block)


def _trim_at(event: str, duration_secs: float | int, **_: Any) -> None:
    if duration_secs >= LONG.get(event, math.inf):
        trim()


@contextmanager
def frozen_objects() -> Iterator[None]:
    """Within the block, garbage collections pass over all objects that exist when it begins.

    Otherwise, Python's full collections scan what tracing left behind, for 0.2 s each. If the host program has frozen
    objects of its own, nothing is done, because only all objects can be unfrozen.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _glibc() -> Any:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        return None
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
