"""The choice among forms by platform, with all forms traced, or with one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from cfd.devices import xla
from cfd.platforms import by_platform, of_default_backend, of_platform


def times(traced: list[str]) -> Callable[[Any], Any]:
    """A function that multiplies by 2 on a CPU, by 3 on a TPU and by 5 elsewhere. `traced` records its forms."""

    def form(name: str, factor: float) -> Callable[[Any], Any]:
        def multiply(x: Any) -> Any:
            traced.append(name)
            return factor * x

        return multiply

    return lambda x: by_platform(x, default=form("default", 5.0), cpu=form("cpu", 2.0), tpu=form("tpu", 3.0))


def factor_for(fun: Callable[[Any], Any], platform: str) -> str:
    """The number by which the program of `fun` for a platform multiplies."""
    text = jax.jit(fun).trace(jnp.float32(1.0)).lower(lowering_platforms=(platform,)).as_text()
    (constant,) = [line for line in text.splitlines() if "constant" in line and "tensor<f32>" in line]
    return constant.split("dense<")[1].split(">")[0]


def test_a_program_of_this_package_traces_one_form() -> None:
    traced: list[str] = []
    assert xla.jit(times(traced))(jnp.float32(7.0)) == 14.0
    assert xla.compiled(times(traced), jnp.float32(7.0))(jnp.float32(7.0)) == 14.0
    assert traced == ["cpu", "cpu"]


def test_a_program_of_a_caller_has_the_form_of_each_platform() -> None:
    traced: list[str] = []
    fun = times(traced)
    assert jax.jit(fun)(jnp.float32(7.0)) == 14.0
    assert sorted(traced) == ["cpu", "default", "tpu"]
    assert [float(factor_for(fun, platform)) for platform in ("cpu", "tpu", "rocm")] == [2.0, 3.0, 5.0]


def test_a_trace_for_one_platform_is_not_used_for_another() -> None:
    """The function is traced by the package first, then by its caller, in a function of `jax.jit` within it too."""
    fun = jax.jit(times([]))
    assert xla.jit(fun)(jnp.float32(7.0)) == 14.0
    with of_default_backend():
        assert fun(jnp.float32(7.0)) == 14.0
    assert float(factor_for(fun, "tpu")) == 3.0 and float(factor_for(lambda x: fun(x), "tpu")) == 3.0


@pytest.mark.parametrize("backend, forms", [("tpu", ["tpu"]), ("gpu", ["cpu", "default", "tpu"])])
def test_the_default_backend_decides(monkeypatch: pytest.MonkeyPatch, backend: str, forms: list[str]) -> None:
    """The backend "gpu" does not tell "cuda" from "rocm"."""
    traced: list[str] = []
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    with of_default_backend():
        jax.eval_shape(times(traced), jnp.float32(7.0))
    assert sorted(traced) == forms


def test_shapes_spare_the_trace_of_the_program() -> None:
    traced: list[str] = []
    fun = times(traced)
    assert xla.shapes(fun, jnp.float32(7.0)) == jax.ShapeDtypeStruct((), jnp.float32)
    assert xla.lowered(fun, jnp.float32(7.0)).compile()(jnp.float32(7.0)) == 14.0
    assert traced == ["cpu"]


def test_a_program_for_another_machine_traces_the_form_of_its_platform() -> None:
    traced: list[str] = []
    fun = times(traced)
    with of_platform("tpu"):
        assert float(factor_for(fun, "tpu")) == 3.0
    assert traced == ["tpu"]
