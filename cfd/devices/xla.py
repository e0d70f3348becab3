"""XLA: compiler options for CPUs, a count of floating-point operations, returned memory and the compilation cache."""

import ctypes
import functools
import math
import os
from collections.abc import Callable
from typing import Any

import jax
from absl import logging
from jax.stages import Compiled

from cfd.errors import UserError

# - XLA:CPU's experimental YNN library is fast at matrix products and slow at convolutions: use it for the former alone.
# - Without region-based live-range analysis, XLA copies the entire donated state on every training step.
# - Without the memory-optimized scheduler, it transposes every kernel in the forward pass and keeps the copies alive
#   until the backward pass.
# - The disabled pass removes `optimization_barrier` before instructions are merged and fused, which would undo
#   `jax.checkpoint`.
CPU_OPTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
    "xla_cpu_copy_insertion_use_region_analysis": True,
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_disable_hlo_passes": "cse_barrier_expander",
}

# The parameters of `mallopt` in glibc's <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def jit(fun: Callable, **kwargs: Any) -> Callable:
    """`jax.jit` with the compiler options of the default backend."""
    return jax.jit(fun, compiler_options=compiler_options(), **kwargs)


def compiled(fun: Callable, *arguments: Any, **kwargs: Any) -> Compiled:
    """`jit(fun, **kwargs)`, compiled for arguments like these: arrays, or their shapes with their shardings.

    Only the program stays in memory, not the traces it was compiled from.
    """
    # JAX keeps its traces as long as the function lives. The `partial` is a new function, which ends with this call.
    program = jit(functools.partial(fun), **kwargs).lower(*arguments).compile()
    _trim()
    return program


@functools.cache
def compiler_options() -> dict[str, str | bool]:
    """The compiler options for the default backend: CPU_OPTIONS on a CPU, or none if its compiler rejects them."""
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda: jax.lax.optimization_barrier(0), compiler_options=CPU_OPTIONS).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        logging.warning(
            "this XLA rejects %s (%s): on the CPU, convolutions are slower and `remat` saves no memory",
            CPU_OPTIONS,
            error,
        )
        return {}
    return CPU_OPTIONS


def flops(fun: Callable, *arguments: Any) -> float:
    """The floating-point operations of `fun(*arguments)`, as XLA counts them for the lowered program.

    The arguments are arrays or their shapes. The program is lowered for an accelerator, where a convolution has all its
    multiplications; on a CPU, `cfd.kernels.winograd` needs fewer. XLA:CPU does the counting: the result is NaN if
    JAX_PLATFORMS excludes the CPU.
    """
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return math.nan
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    with jax.default_device(cpu):
        lowered: Any = jax.jit(fun).trace(*shapes).lower(lowering_platforms=("tpu",))
    return lowered.cost_analysis()["flops"]


@functools.cache
def return_freed_memory() -> None:
    """Makes glibc return freed memory to the operating system from now on. With another C library, it does nothing.

    glibc returns the free memory at the end of a heap once that exceeds 8 MB, and all free memory after a compilation
    that took 0.2 s or longer. By default, it keeps up to 64 MB per thread, and everything that lies between two blocks
    in use, for later allocations. XLA's large arrays never come from that memory. On a CPU, the thresholds lower the
    peak memory of a training step of ADM-64 by 1.6 GB; returning all memory after compilations saves 0.14 GB more.
    """
    if libc := _glibc():
        # Set both. If one is set alone, glibc fixes the other at 128 kB, and XLA's smaller arrays would be mapped anew
        # at every allocation.
        libc.mallopt(M_TRIM_THRESHOLD, 8 * 2**20)
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
    jax.monitoring.register_event_duration_secs_listener(_trim_after)


def _trim_after(event: str, duration_secs: float | int, **_: Any) -> None:
    if duration_secs >= 0.2 and event == "/jax/core/compile/backend_compile_duration":
        _trim()


def _trim() -> None:
    if libc := _glibc():
        libc.malloc_trim(0)


def _glibc() -> Any:
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") else None


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs in `folder`, a path or a URL of a bucket, for later starts. "" keeps none.

    The cache holds native code. Therefore this raises UserError if another user owns a local folder or can write to it.
    It also raises UserError for a folder that cannot be made or read. The permissions of a bucket are not checked.
    """
    if not folder:
        return
    if "://" not in folder:
        folder = os.path.abspath(os.path.expanduser(folder))
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            os.listdir(folder)
            found = os.stat(folder)
        except OSError as error:
            raise UserError(
                f"config.xla.compilation_cache is {folder}, which cannot be used ({error.strerror}): give another "
                "folder, or '' for none"
            ) from None
        if found.st_mode & 0o022 or found.st_uid not in (os.getuid(), 0):
            raise UserError(
                f"compilation cache {folder} is another user's, or can be written by others, although it holds native "
                "code: chmod go-w it, or give a folder of your own"
            )
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
