"""Arguments as callers give them: numbers that are known before a program runs are checked, and keys get one meaning.

A traced number is unknown until the program runs. It is never checked, so these functions work under `jit`, `vmap`,
`grad` and `shard_map` and add nothing to the program.
"""

import functools
import inspect
import operator
import warnings
from collections.abc import Callable
from typing import Any, get_args, get_origin

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jaxtyping import Bool, Float, Int, Key, PyTree, UInt32

INT_LIMIT = 2**31
"""Counts are int32 on the devices."""
EPS_FN = "(z, logsnr, labels) -> eps"
YNN_OPTION = "xla_cpu_experimental_ynn_fusion_type"


def concrete(value: Any) -> np.ndarray | None:
    """The value as a NumPy array. None for a function, and for arrays that this process cannot read.

    Such arrays are those that are traced, and those that are divided among several processes.
    """

    def unknown(leaf: Any) -> bool:
        if isinstance(leaf, Tracer) or callable(leaf):
            return True
        return isinstance(leaf, Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)

    if any(map(unknown, jax.tree.leaves(value))):
        return None
    return np.asarray(jax.device_get(value))  # an explicit transfer, which `jax.transfer_guard("disallow")` permits


def check_numbers(name: str, value: Any, holds: Callable[[np.ndarray], Any], remedy: str) -> np.ndarray | None:
    """The concrete numbers of `value` in float64, or None if it has none, as `concrete` says.

    Floating numbers are rounded to float32 first, because the programs compute with that: 1e39 is infinite, and 1e-50
    is 0. Raises ValueError if they are not real numbers (bool is not), or if `holds` is false for one of them.
    """
    given = concrete(value)
    if given is None:
        return None
    if given.dtype == bool or not any(jnp.issubdtype(given.dtype, kind) for kind in (jnp.integer, jnp.floating)):
        raise ValueError(f"{name} is {value!r}; {remedy}")
    if jnp.issubdtype(given.dtype, jnp.floating):
        with np.errstate(over="ignore"):
            numbers = given.astype(np.float32).astype(np.float64)
    else:
        numbers = given.astype(np.float64)
    if not np.all(fits := np.asarray(holds(numbers))):
        index = np.argwhere(~fits)[0].tolist()
        place = f" at index {', '.join(map(str, index))}" if index else ""
        raise ValueError(f"{name} is {given[tuple(index)]}{place}; {remedy}")
    return numbers


def check_number(name: str, value: Any, holds: Callable[[np.ndarray], Any], remedy: str) -> np.ndarray | None:
    """`check_numbers` of a single number. Raises ValueError for an array of another shape than () too, traced or not.

    Such an array would be broadcast over the last axis of the images, which may have as many channels as it has rows.
    """
    if np.ndim(value) != 0:
        raise ValueError(f"{name} has shape {np.shape(value)}; it is one number: {remedy}")
    return check_numbers(name, value, holds, remedy)


def check_count(name: str, value: Any, lowest: int = 1) -> int:
    """The value as an int. Raises ValueError unless it is an integer >= `lowest` and < 2^31, of any type but bool."""
    try:
        count = lowest - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = lowest - 1
    if not lowest <= count < INT_LIMIT:
        upper = " and < 2^31" if count >= INT_LIMIT else ""
        given = repr(value) if isinstance(value, str) else value
        raise ValueError(
            f"{name} is {given}; it is a count: give an integer {name} >= {lowest}{upper}{if_traced(value)}"
        )
    return count


def if_traced(value: Any) -> str:
    """The end of a remedy for a value on which the program itself depends: under `jit`, it must be static."""
    traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(value))
    return ", and name its argument in static_argnames of jax.jit" if traced else ""


def check_shape(shape: Any) -> tuple[int, ...]:
    """The shape of one image as a tuple. A number n means (n,). Raises ValueError unless it has integers >= 1."""
    try:
        sizes = tuple(operator.index(size) for size in (shape if np.ndim(shape) else (shape,)))
    except (TypeError, ValueError):
        sizes = (0,)
    if min(sizes, default=1) < 1:
        raise ValueError(
            f"shape is {shape!r}; it is that of one image, without a batch axis: give integers >= 1, such as (8, 8, 1)"
            + if_traced(shape)
        )
    return sizes


def is_zero(value: Any) -> bool:
    """Whether a value is one concrete number, 0, of any type."""
    number = concrete(value)
    return number is not None and number.shape == () and bool(number == 0)


def check_returned(function: str, value: Any, shape: tuple[int | None, ...], meaning: str) -> None:
    """Raises ValueError unless `value`, which the caller's `function` returned, is one floating array of `shape`.

    None in `shape` stands for any length.
    """
    given = f"a {type(value).__name__}"
    if isinstance(value, Array | np.ndarray):
        same = len(value.shape) == len(shape) and all(b in (None, a) for a, b in zip(value.shape, shape, strict=True))
        if same and jnp.issubdtype(value.dtype, jnp.floating):
            return
        given = f"dtype {value.dtype}" if same else f"shape {value.shape}"
    expected = str(shape).replace("None", "K")
    raise ValueError(f"{function} returned {given}; it must return {meaning}, one float32 array of shape {expected}")


def eps_and_v(output: Any) -> tuple[Any, Any]:
    """(ε, v) of an eps_fn's output, which is ε alone, or this pair with a learned variance. Of ε alone, v is None.

    Nichol and Dhariwal (arXiv:2102.09672), Eq. 15, log Σ = v log β + (1 − v) log β̃, is the variance of `posterior`.
    """
    return output if isinstance(output, tuple) and len(output) == 2 else (output, None)


def check_output(function: str, output: Any, shape: tuple[int, ...]) -> tuple[Array, Array | None]:
    """`eps_and_v` in float32. Raises ValueError unless both are floating arrays of the shape of z."""
    eps, v = eps_and_v(output)
    check_returned(function, eps, shape, "the noise of z")
    if v is None:
        return eps.astype(jnp.float32), None
    check_returned(function, v, shape, "v, the second of its pair")
    return eps.astype(jnp.float32), v.astype(jnp.float32)


def check_same_shape(**arrays: Any) -> None:
    """Raises ValueError unless the arrays have one shape. They would be broadcast."""
    if len({np.shape(array) for array in arrays.values()}) > 1:
        shapes = " and ".join(f"{name} has shape {np.shape(array)}" for name, array in arrays.items())
        raise ValueError(f"{shapes}; give arrays of the same shape")


def check_function(name: str, value: Any, signature: str) -> None:
    """Raises ValueError unless the caller's argument `name` is a function, and as `check_called` does."""
    check_called(name, value)
    if not callable(value):
        given = f"a {type(value).__name__}" if isinstance(value, tuple | list | dict) else repr(value)
        wanted = f"its {name}" if hasattr(value, name) else f"a function {signature}"
        raise ValueError(f"{name} is {given}; give {wanted}")


def check_called(name: str, value: Any) -> None:
    """Raises ValueError for a function or class that makes arguments and was not called: `cosine` for `cosine()`.

    Such a function is annotated to return a function, or a tuple of this package, such as `cfd.rules.Rule`.
    """
    made = value if isinstance(value, type) else getattr(value, "__annotations__", {}).get("return")
    if _is_argument(made):
        call = f"{value.__name__}({', '.join(inspect.signature(value).parameters)})"
        raise ValueError(f"{name} is {value.__name__}, which was not called: give {name}={call}")


def _is_argument(hint: Any) -> bool:
    """Whether a type is that of functions or of tuples of this package, or a union with one."""
    if get_origin(hint) is Callable or any(map(_is_argument, get_args(hint))):
        return True
    return isinstance(hint, type) and issubclass(hint, tuple) and hint.__module__.startswith("cfd.")


def check_switch(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is True or False. A function or a text would mean True."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} is {value!r}; give True or False{if_traced(value)}")


def check_representable(labels: PyTree) -> None:
    """Raises ValueError for labels of NumPy or Python that JAX does not have, or has only as other numbers.

    Without `jax_enable_x64`, 2^31 of int64 would become −2^31, and 1e39 of float64 would be infinite.
    """
    for leaf in jax.tree.leaves(labels):
        if isinstance(leaf, Array):
            continue
        given = np.asarray(leaf)
        if given.dtype.kind in "OSUmM":
            raise ValueError(f"labels have {given.ravel()[:1].tolist()} of {given.dtype}; give numbers, as int32")
        with np.errstate(all="ignore"):
            kept = given.astype(jax.dtypes.canonicalize_dtype(given.dtype))
            changed = (kept != given) if given.dtype.kind in "iu" else np.isinf(kept) & np.isfinite(given)
        if np.any(changed):
            raise ValueError(
                f"labels have {given[changed].ravel()[0]}, which {kept.dtype} cannot represent, and JAX casts "
                f"{given.dtype} to it: give the numbers of classes as int32, or set jax_enable_x64"
            )


def levels_at(schedule: Callable[[Array], Array], u: Float[Array, "t"]) -> Float[Array, "t"]:
    """λ = schedule(u). Raises ValueError unless it is a function that returns one λ for each u."""
    check_function("schedule", schedule, "of u in [0, 1] that returns λ, such as cosine(-20.0, 20.0)")
    logsnr = schedule(u)
    check_returned("schedule", logsnr, u.shape, "λ for each u")
    return logsnr


def row_weights(weight: Callable[[Array], Array], logsnr: Float[Array, "b"]) -> Float[Array, "b"]:
    """The weight of each row of a loss, `weight(logsnr)`, in float32. Raises ValueError unless it is one per row."""
    check_function("weight", weight, "of λ [B], or None")
    weights = weight(logsnr)
    check_returned("weight", weights, logsnr.shape, "one weight per row")
    return weights.astype(jnp.float32)


def check_floating(x: Any) -> None:
    """Raises ValueError if x is an array of integers, such as images that are uint8."""
    dtype = getattr(x, "dtype", None)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"x has dtype {dtype}; data lie in [-1, 1]: give float32, of uint8 images x / 127.5 - 1")


def check_data(x: Array, labels_shape: tuple[int, ...]) -> Array:
    """x in float32. Under `jax_enable_x64`, NumPy's images are float64.

    Raises ValueError unless x holds floating numbers, and one example for each label, of which there are [B].
    """
    if not isinstance(x, Array | np.ndarray):
        raise ValueError(f"x is a {type(x).__name__}; give one array of float32, such as jnp.asarray(x)")
    check_floating(x)
    if x.shape[:1] != labels_shape:
        raise ValueError(f"x has shape {x.shape} for labels of shape {labels_shape}; give one label per example, [B]")
    return x.astype(jnp.float32)


def check_examples(x: Array, labels_shape: tuple[int, ...]) -> Array:
    """`check_data` for a mean over examples. Raises ValueError also if there are none: the mean would be NaN."""
    if np.shape(x)[:1] == (0,):
        raise ValueError(f"x has shape {np.shape(x)}; a mean over no examples is undefined: give at least one")
    return check_data(x, labels_shape)


def known_labels(labels: Int[Array, "b"], logits: Float[Array, "b k"], lowest: int) -> Bool[Array, "b"]:
    """Which labels are lowest, lowest + 1, ..., K − 1. The caller makes the rows of all others NaN.

    Raises ValueError if a concrete label is another one, or if labels are not integers [B].
    """
    batch, num_classes = logits.shape
    given = isinstance(labels, Array | np.ndarray)
    if not given or labels.shape != (batch,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        known = f"have dtype {labels.dtype} and shape {labels.shape}" if given else f"are a {type(labels).__name__}"
        raise ValueError(f"labels {known}; a label is the number of a class: give int32 of shape ({batch},)")
    classes = f"0 to {num_classes - 1}" + (f", or {lowest} for no class" if lowest < 0 else "")
    check_numbers(
        "label",
        labels,
        lambda x: (x >= lowest) & (x < num_classes),
        f"the classifier has K = {num_classes} classes: give labels of {classes}",
    )
    if jnp.issubdtype(labels.dtype, jnp.unsignedinteger):
        return labels.astype(jnp.promote_types(labels.dtype, jnp.uint32)) < num_classes
    labels = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))
    return (labels >= lowest) & (labels < num_classes)


def threefry(key: Key[Array, "*b"] | UInt32[Array, "*b 2"] | UInt32[Array, "*b 4"]) -> Key[Array, "*b"]:
    """The threefry keys of the same seeds, so that what a seed draws does not depend on `jax_default_prng_impl`.

    Under `vmap`, a key of "rbg" or "unsafe_rbg" draws numbers that depend on the row. The first two words of its data
    are the threefry key of the same seed. For "rbg", this also holds after `fold_in` and `split`.

    Raises ValueError for other implementations, for what is no key, and if `jax_threefry_partitionable` is off, because
    every seed then has another meaning.
    """
    dtype, shape = getattr(key, "dtype", None), np.shape(key)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not typed and (dtype != np.uint32 or shape[-1:] not in ((2,), (4,))):
        number = isinstance(key, int | np.integer)
        raise ValueError(f"key is {key!r}; give a PRNG key, such as jax.random.key({key if number else 0})")
    if not getattr(jax.config, "jax_threefry_partitionable", True):
        raise ValueError(
            "jax_threefry_partitionable is False, with which a seed draws other numbers: call "
            'jax.config.update("jax_threefry_partitionable", True), JAX\'s default'
        )
    if typed and jax.random.key_impl(key) == "threefry2x32":
        return key
    if typed and jax.random.key_impl(key) not in ("rbg", "unsafe_rbg"):
        raise ValueError(
            f"key is of the implementation {jax.random.key_impl(key)}; give one of threefry: "
            'jax.random.key(seed, impl="threefry2x32")'
        )
    data = jax.random.key_data(key) if typed else jnp.asarray(key)
    return jax.random.wrap_key_data(data[..., :2], impl="threefry2x32")


def random_signs(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """−1 or 1 with equal probability, in float32: Rademacher numbers.

    `jax.random.rademacher` draws others from the same key under `jax_enable_x64`.
    """
    return 2.0 * jax.random.bernoulli(key, jnp.float32(0.5), shape).astype(jnp.float32) - 1.0


def image_keys(key: Key[Array, "*b"] | UInt32[Array, "*b 2"] | UInt32[Array, "*b 4"], batch: int) -> Key[Array, "b"]:
    """Keys [B], one per image. From a single key, image i takes `fold_in(key, i)`. Keys are as in `threefry`.

    Raises ValueError as `threefry` does, and if there is another number of keys.
    """
    keys = threefry(key)
    if keys.shape == ():
        return jax.vmap(jax.random.fold_in, (None, 0))(keys, jnp.arange(batch))
    if keys.shape != (batch,):
        raise ValueError(f"key has batch shape {keys.shape} for {batch} images; give one key, or one per image")
    return keys


def warn_of_wrong_rows(rows: int) -> None:
    """Warns the caller's caller if XLA:CPU, by default, computes wrong sums over 3 values for this number of rows."""
    if rows > 2**15 and jax.default_backend() == "cpu" and not _sums_are_right(rows):
        warnings.warn(
            f"XLA:CPU of this jaxlib computes wrong sums over 3 values for {rows} rows, from row 32768 on: give at "
            f"most 32768 rows at a time, or jax.jit(..., compiler_options={{{YNN_OPTION!r}: ''}}), or set "
            f"XLA_FLAGS=--{YNN_OPTION}= before JAX starts, or use another jaxlib than 0.10.2",
            RuntimeWarning,
            stacklevel=3,
        )


@functools.cache
def _sums_are_right(rows: int) -> bool:
    """Whether row i of a product with a sum behind it is row i: jaxlib 0.10.2 gives row i − 128 (jax issue 39103).

    Its YNN fusions do so for arrays of [32769 … 43520, 3], in every program compiled without `cfd.devices.xla`.
    """
    x = np.zeros((rows, 3), np.float32)
    x[:, 0] = np.arange(rows)
    with jax.ensure_compile_time_eval():
        program = jax.jit(lambda m, x: jnp.sum(jnp.square(m @ x.T), axis=0))
        sums = program.lower(np.eye(3, dtype=np.float32), x).compile()(np.eye(3, dtype=np.float32), x)
    return bool(np.allclose(np.sqrt(np.asarray(sums)), x[:, 0], atol=1.0))
