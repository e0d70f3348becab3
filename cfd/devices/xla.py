"""XLA: compiler options, a count of floating-point operations and the compilation cache."""

import functools
import math
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jax.stages import Compiled, Lowered

from cfd import platforms
from cfd.devices import buckets, memory, parallel
from cfd.errors import UserError

# - XLA:CPU's experimental YNN library is fast at matrix products and slow at convolutions: use it for the former alone.
# - Without region-based live-range analysis, XLA copies the entire donated state on every training step.
# - Without the memory-optimized scheduler, it transposes every kernel in the forward pass and keeps the copies alive
#   until the backward pass.
# - The disabled pass removes `optimization_barrier` before instructions are merged and fused, which would undo
#   `jax.checkpoint`.
# - The other disabled pass only checks XLA's own work, and takes a twelfth of the time to compile a training step.
# - With level 1 of LLVM's optimizations instead of level 3, the default, programs take four fifths of the time to
#   compile, and about 1.02 times as long to run.
CPU_OPTIONS: dict[str, str | bool | int] = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
    "xla_cpu_copy_insertion_use_region_analysis": True,
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_disable_hlo_passes": "cse_barrier_expander,hlo-verifier",
    "xla_backend_optimization_level": 1,
}

# With several CPU devices, the YNN library takes the convolutions too: XLA's own, if two devices of a process run them
# in a loop at the same time, have wrong values in some rows (jaxlib 0.7.2 and 0.10.2). The devices of all processes
# count, so that results do not depend on how they are divided over processes.
CPU_DEVICES_OPTIONS: dict[str, str | bool | int] = {
    "xla_cpu_experimental_ynn_fusion_type": (
        "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
    ),
}

# A program that runs once, such as the one that draws the initial parameters, takes 0.6 of the time to compile without
# optimizations, and without the emitters that give fast loops.
CPU_ONCE_OPTIONS: dict[str, str | bool | int] = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
}

# - In a program for several chips, XLA's reshape mover places the cast of a gradient to float32, at the beginning of a
#   norm's gradient, directly behind the convolution that gives it. XLA fuses the two, and writes the gradient in
#   float32.
# - With the other options, most sums of gradients over the chips run while the chips compute. XLA does so with sums of
#   a single array only. Therefore only sums of at most 2 MB are combined.
TPU_OPTIONS: dict[str, str | bool | int] = {
    "xla_disable_hlo_passes": "reshape-mover",
    "xla_enable_async_all_reduce": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
    "xla_jf_crs_combiner_threshold_in_bytes": 2**21,
}

# A part of the reduce-scatters of the gradient then runs while the chip computes. Sums of at most 2 MB are combined.
TPU_FSDP_OPTIONS: dict[str, str | bool | int] = {
    "xla_enable_async_reduce_scatter_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": True,
    "xla_tpu_ars_combiner_threshold_in_bytes": 2**21,
}


def jit(fun: Callable, **kwargs: Any) -> Callable:
    """`jax.jit` for the default backend, with its compiler options."""
    program = jax.jit(fun, compiler_options=compiler_options(), **kwargs)

    @functools.wraps(fun)
    def call(*arguments: Any) -> Any:
        with platforms.of_default_backend():
            return program(*arguments)

    return call


def compiled(fun: Callable, *arguments: Any, **kwargs: Any) -> Compiled:
    """The program of `lowered`. Only the program stays in memory, not the traces it was compiled from."""
    # JAX keeps its traces as long as the function lives. The `partial` is a new function, which ends with this call.
    program = lowered(functools.partial(fun), *arguments, **kwargs).compile()
    memory.trim()
    return program


def lowered(fun: Callable, *arguments: Any, once: bool = False, **kwargs: Any) -> Lowered:
    """`jit(fun, **kwargs)`, lowered for arguments like these: arrays, or their shapes with their shardings.

    If parameters among them are divided over "fsdp", the options are also those of `fsdp_options`. With `once`, the
    program is to run once: it takes less time to compile, and more to run.
    """
    options = compiler_options() | (fsdp_options() if _are_divided(arguments) else {})
    options |= once_options() if once else {}
    with platforms.of_default_backend():
        return jax.jit(fun, compiler_options=options, **kwargs).lower(*arguments)


def shapes(fun: Callable, *arguments: Any) -> Any:
    """`jax.eval_shape(fun, *arguments)`, after which `lowered` need not trace `fun` again."""
    with platforms.of_default_backend():
        return jax.eval_shape(fun, *arguments)


def _are_divided(arguments: tuple[Any, ...]) -> bool:
    """Whether an array is divided over the mesh axis "fsdp" alone, as `parallel.with_shardings` divides parameters."""
    shardings = (getattr(x, "sharding", None) for x in jax.tree.leaves(arguments))
    return any("fsdp" in tuple(x.spec) for x in shardings if isinstance(x, jax.sharding.NamedSharding))


@functools.cache
def compiler_options() -> dict[str, str | bool | int]:
    """The compiler options for the default backend: of CPU_OPTIONS or TPU_OPTIONS, those that its compiler knows.

    With several CPU devices, those of CPU_DEVICES_OPTIONS replace some. XLA's versions differ in the options that they
    know.
    """
    if jax.default_backend() != "cpu":
        return _accepted(TPU_OPTIONS if jax.default_backend() == "tpu" else {})
    if jax.device_count() == 1:
        return _accepted(CPU_OPTIONS)
    options = _accepted(CPU_OPTIONS | CPU_DEVICES_OPTIONS)
    if jax.local_device_count() > 1 and not CPU_DEVICES_OPTIONS.items() <= options.items():
        logging.warning(
            "%d CPU devices run convolutions of this XLA at the same time, which can give wrong values in some rows: "
            "use one CPU device, or jax 0.10.2",
            jax.local_device_count(),
        )
    return options


@functools.cache
def fsdp_options() -> dict[str, str | bool | int]:
    """Further options for programs with divided parameters: of TPU_FSDP_OPTIONS on a TPU, those that it knows."""
    return _accepted(TPU_FSDP_OPTIONS if jax.default_backend() == "tpu" else {})


@functools.cache
def once_options() -> dict[str, str | bool | int]:
    """The options that replace some of `compiler_options` in a program that runs once: of CPU_ONCE_OPTIONS on a CPU."""
    return _accepted(CPU_ONCE_OPTIONS if jax.default_backend() == "cpu" else {})


def _accepted(options: dict[str, str | bool | int]) -> dict[str, str | bool | int]:
    """The options that the default backend's compiler knows. A line says which it does not know."""
    rejected = {name: reason for name, value in options.items() if (reason := _rejection(name, value))}
    if rejected:
        logging.warning(
            "this XLA rejects %s: a step may be slower, and may need more memory",
            "; ".join(f"{name} ({reason})" for name, reason in rejected.items()),
        )
    return {name: value for name, value in options.items() if name not in rejected}


def _rejection(name: str, value: str | bool | int) -> str:
    """The reason why XLA rejects a compiler option, or "" if it accepts the option."""
    try:
        jax.jit(lambda: jax.lax.optimization_barrier(0), compiler_options={name: value}).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return str(error)
    return ""


def flops(fun: Callable, *arguments: Any) -> float:
    """The floating-point operations of `fun(*arguments)`, as XLA counts them for the lowered program.

    The arguments are arrays or their shapes. The program is lowered for a platform on which convolution and attention
    have their plain forms: `cfd.kernels.winograd` needs fewer multiplications, and XLA counts a loop as one iteration.
    XLA:CPU does the counting: the result is NaN if JAX_PLATFORMS excludes the CPU.
    """
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return math.nan
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    with jax.default_device(cpu):
        lowered: Any = jax.jit(functools.partial(fun)).trace(*abstract).lower(lowering_platforms=("rocm",))
    return lowered.cost_analysis()["flops"]


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs in `folder`, a path or a URL of a bucket, for later starts. "" keeps none.

    The cache holds native code. Therefore this raises UserError if another user owns a local folder or can write to it.
    Whoever may write to a bucket is trusted. This also raises UserError for a folder that cannot be made or read, and
    for a bucket that cannot be read or, by process 0, be written. A folder that processes do not share is logged.

    Every process must call this, after `parallel.init_distributed`.
    """
    if not folder:
        return
    problem = None
    try:
        folder = _usable(folder)
    except UserError as error:
        problem = error
    if parallel.total(int(problem is not None)):
        raise problem or UserError(f"another process cannot use config.xla.compilation_cache, {folder}, and says why")
    if buckets.is_url(folder):
        # XLA's own cache, of what it has measured on a GPU, is written to local folders alone.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    elif (alone := _processes_without(folder)) and jax.process_index() == 0:
        logging.warning(
            "config.xla.compilation_cache is %s, which %d of %d processes do not share with process 0, and only "
            "process 0 writes to it: the others compile again at every start. Give gs://BUCKET/FOLDER, or a folder on "
            "a disk that all hosts mount",
            folder,
            alone,
            jax.process_count(),
        )
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _usable(folder: str) -> str:
    """The URL or the absolute path of a cache that this process can use. Raises UserError if it cannot."""
    if buckets.is_url(folder):
        buckets.check("config.xla.compilation_cache", folder, write=jax.process_index() == 0)
        return folder
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
    return folder


def _processes_without(folder: str) -> int:
    """How many processes see another folder of this name than process 0 does. Every process must call this."""
    if jax.process_count() == 1:
        return 0
    first = jax.process_index() == 0
    mark = Path(folder) / f".shared-{parallel.total(secrets.randbelow(2**31) if first else 0)}"
    if first:
        mark.touch()
    parallel.barrier("the compilation cache is marked")
    alone = parallel.total(int(not mark.exists()))
    if first:
        mark.unlink()
    return alone
