"""What this project asks of XLA: options of the compiler on a CPU, a count of operations, and the compilation cache."""

import ctypes
import functools
import math
import os
from collections.abc import Callable
from typing import Any

import jax
from absl import logging
from jax.stages import Compiled

# On a CPU, XLA's experimental YNN library is fast at matrix products and slow at convolutions: keep the first alone.
# A training step copied its whole donated state but for the analysis of live ranges by region, and transposed all its
# kernels, to be held until the gradient, in the forward pass but for the memory-optimized scheduler. The pass that is
# disabled takes `optimization_barrier` away before instructions are merged and fused, and `jax.checkpoint` with it.
CPU_OPTIONS = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
    "xla_cpu_copy_insertion_use_region_analysis": True,
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_disable_hlo_passes": "cse_barrier_expander",
}


# Of glibc's <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def jit(fun: Callable, **kwargs: Any) -> Callable:
    """`jax.jit` with the compiler options of the default backend."""
    return jax.jit(fun, compiler_options=compiler_options(), **kwargs)


def compiled(fun: Callable, *arguments: Any, **kwargs: Any) -> Compiled:
    """`jit(fun, **kwargs)`, compiled for arguments like these: arrays, or their shapes with their shardings.

    Nothing of what it was made from is kept: JAX does so while the function lives, hence one that ends here.
    """
    program = jit(functools.partial(fun), **kwargs).lower(*arguments).compile()
    _trim()
    return program


@functools.cache
def compiler_options() -> dict[str, str | bool]:
    """The options for this backend; on a CPU whose compiler rejects ours, none, and one logged line that says so."""
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda: jax.lax.optimization_barrier(0), compiler_options=CPU_OPTIONS).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        logging.warning(
            "this XLA rejects %s (%s): on the CPU, convolutions will be slower and `remat` saves no memory",
            CPU_OPTIONS,
            error,
        )
        return {}
    return CPU_OPTIONS


def flops(fun: Callable, *arguments: Any) -> float:
    """Floating-point operations of `fun(*arguments)`, by XLA's count for the program as lowered; shapes are enough.

    The program is that of an accelerator, in which a convolution has all its multiplications (see `cfd.convolution`).
    The CPU's XLA does the counting: NaN where JAX_PLATFORMS leaves the CPU out.
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
    """From now on, give back to the system what is freed: at once from 8 MB, and all after a compilation of 0.2 s.

    glibc keeps it for later, up to 64 MB a thread and all that lies between two things in use, but XLA's large arrays
    do not come out of it: 1.6 GB at the peak of a training step of ADM-64. Nothing is done with another C library.
    """
    if libc := _glibc():
        # Both, as one set alone puts the other at 128 kB for good, and XLA would map its smaller arrays anew each time.
        libc.mallopt(M_TRIM_THRESHOLD, 8 * 2**20)
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
    jax.monitoring.register_event_duration_secs_listener(_trim_after)


def _trim_after(event: str, duration_secs: float, **_: Any) -> None:
    if duration_secs >= 0.2 and event == "/jax/core/compile/backend_compile_duration":
        _trim()


def _trim() -> None:
    if libc := _glibc():
        libc.malloc_trim(0)


def _glibc() -> Any:
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") else None


def use_compilation_cache(folder: str) -> None:
    """Keep compiled programs in `folder` between starts; "" keeps none.

    The cache holds native code: a folder that others can write to is refused with ValueError.
    """
    if not folder:
        return
    folder = os.path.abspath(os.path.expanduser(folder))
    os.makedirs(folder, mode=0o700, exist_ok=True)
    found = os.stat(folder)
    if found.st_mode & 0o022 or found.st_uid not in (os.getuid(), 0):
        raise ValueError(
            f"compilation cache {folder} is another user's, or can be written by others, and it holds native code: "
            "chmod go-w it, or give a folder of your own"
        )
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
