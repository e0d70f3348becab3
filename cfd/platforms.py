"""The choice among forms of a function by platform. Where the platform is known, one form alone is traced."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax

_PLATFORM = jax.make_user_context("")
"""The platform for which programs are traced; "" means any. JAX traces a function again when it changes."""


def by_platform(*arrays: Any, default: Callable[..., Any], **forms: Callable[..., Any]) -> Any:
    """The result of the form for the platform on which the program will run: "cpu", "tpu", "cuda" or "rocm".

    `default` serves all platforms without a form. This is `jax.lax.platform_dependent`, which traces every form,
    because a program may be compiled for any platform. Within `of_platform`, one form alone is traced, which saves a
    quarter of the time to trace and lower a training step.
    """
    if platform := _PLATFORM.value:
        return forms.get(platform, default)(*arrays)
    return jax.lax.platform_dependent(*arrays, default=default, **forms)


def of_platform(platform: str) -> AbstractContextManager[Any]:
    """Within the block, programs are traced for a platform alone: a name as in `by_platform`, or "" for any."""
    return _PLATFORM(platform)


def of_default_backend() -> AbstractContextManager[Any]:
    """Within the block, programs are traced for the default backend alone, if it is a CPU or a TPU.

    "gpu" does not tell a CUDA device from a ROCm device, so that all forms are traced there.
    """
    backend = jax.default_backend()
    return of_platform(backend if backend in ("cpu", "tpu") else "")
