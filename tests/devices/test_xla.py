"""XLA: correct gradients under the compiler options, and a safe cache folder."""

import gc
import os
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen.initializers import lecun_normal
from jax import Array
from jax.extend.core import Jaxpr
from jax.sharding import NamedSharding
from permissions import obeyed
from tiny import DEFAULTS, QUICK, tiny_config

from cfd.devices import parallel, seeds, xla
from cfd.modes import settings
from cfd.modes.train import diffusion
from cfd.networks.model import build

DIGITS = dict(model__attention_resolutions=(8,))
WIDE = dict(
    data__image_size=16,
    model__base_channels=64,
    model__attention_resolutions=(16,),
    model__head_channels=64,
    classifier__attention_resolutions=(8,),
)


@pytest.mark.parametrize("changes, batch_size", [(DIGITS, 128), (WIDE, 2)])
def test_gradients_under_the_options_are_those_of_plain_layers_without(
    changes: dict[str, Any], batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradients of the loss, at the batch and width of the digits run and with Winograd convolutions."""
    config = tiny_config(**changes)
    size = config.data.image_size
    init, loss_fn = diffusion(config)
    random = np.random.default_rng(0)  # a parameter of zero would leave the layers before it without a gradient
    params = jax.tree.map(
        lambda p: jnp.asarray(random.standard_normal(p.shape, np.float32) / max(1, p.size // p.shape[-1]) ** 0.5),
        jax.eval_shape(init, jax.random.key(0)),
    )
    x = jnp.asarray(random.uniform(-1.0, 1.0, (batch_size, size, size, 1)), jnp.float32)
    arguments = jax.random.key(1), params, x, jnp.arange(batch_size) % 10

    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        options = xla.compiler_options.__wrapped__()
    monkeypatch.setattr(xla, "compiler_options", lambda: options)
    loss, gradient = xla.jit(jax.value_and_grad(loss_fn, argnums=1))(*arguments)
    monkeypatch.setattr(settings, "build", partial(build, fast=False))
    _, plain_loss_fn = diffusion(config)
    reference = jax.value_and_grad(plain_loss_fn, argnums=1)
    expected_loss, expected = jax.jit(reference, compiler_options=QUICK)(*arguments)

    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
    largest = max(float(jnp.abs(b).max()) for b in jax.tree.leaves(expected))
    for (path, a), b in zip(jax.tree.leaves_with_path(gradient), jax.tree.leaves(expected), strict=True):
        # The exact gradient of a bias is zero if groups of one channel are normalised after it: only rounding remains.
        error = float(jnp.abs(a - b).max())
        assert error <= 1e-4 * float(jnp.abs(b).max()) + 1e-6 * largest, jax.tree_util.keystr(path)


def test_rematerialisation_spares_memory_under_the_options() -> None:
    """Less memory shows that XLA does not merge the recomputation with the first computation."""
    needed = {}
    for remat in (False, True):
        config = tiny_config(model__channel_mult=(1,), model__num_res_blocks=3, model__remat=remat)
        init, loss_fn = diffusion(config)
        key = jax.eval_shape(lambda: jax.random.key(0))
        x, labels = jax.ShapeDtypeStruct((64, 8, 8, 1), jnp.float32), jax.ShapeDtypeStruct((64,), jnp.int32)
        gradient = jax.value_and_grad(loss_fn, argnums=1)
        program = xla.compiled(gradient, key, jax.eval_shape(init, key), x, labels)
        needed[remat] = program.memory_analysis().temp_size_in_bytes  # pyright: ignore[reportOptionalMemberAccess]
    assert needed[True] < 0.5 * needed[False], needed


def test_a_compiler_gets_the_options_that_it_knows_and_one_line_names_the_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    known = {"xla_disable_hlo_passes": "cse_barrier_expander"}
    unknown = {"xla_of_another_version": True, "xla_of_a_third": "NAME"}
    monkeypatch.setattr(xla, "CPU_OPTIONS", unknown | known)
    monkeypatch.setattr(xla, "CPU_DEVICES_OPTIONS", {})
    xla.compiler_options.cache_clear()
    try:
        assert xla.jit(lambda x: x + 1)(1) == 2 and xla.compiler_options() == known
    finally:
        xla.compiler_options.cache_clear()
    (record,) = caplog.records
    assert record.levelname == "WARNING" and all(name in record.message for name in unknown)
    assert "xla_disable_hlo_passes" not in record.message


def test_each_backend_has_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """The options of another backend, which this one's compiler may not know."""
    monkeypatch.setattr(xla, "_rejection", lambda name, value: "")
    expected: dict[tuple[str, int], Any] = {
        ("tpu", 1): (xla.TPU_OPTIONS, xla.TPU_FSDP_OPTIONS),
        ("cpu", 1): (xla.CPU_OPTIONS, {}),
        ("cpu", 2): (xla.CPU_OPTIONS | xla.CPU_DEVICES_OPTIONS, {}),
        ("cuda", 1): ({}, {}),
    }
    for (backend, count), options in expected.items():
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        monkeypatch.setattr(jax, "device_count", lambda count=count: count)
        found = xla.compiler_options.__wrapped__(), xla.fsdp_options.__wrapped__()
        assert found == options


def test_one_line_says_that_convolutions_on_several_cpu_devices_can_be_wrong(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """XLA of jaxlib 0.7.2 has no YNN library."""
    monkeypatch.setattr(xla, "_rejection", lambda name, value: "unknown" if "ynn" in name else "")
    for count, local, said in ((1, 1, False), (2, 1, False), (2, 2, True)):
        monkeypatch.setattr(jax, "device_count", lambda count=count: count)
        monkeypatch.setattr(jax, "local_device_count", lambda local=local: local)
        caplog.clear()
        xla.compiler_options.__wrapped__()
        assert ("2 CPU devices run convolutions" in caplog.text) == said


def test_only_programs_with_divided_parameters_get_the_options_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is divided over both axes of the mesh, and is none."""
    mesh = parallel.make_mesh(2, 4)
    batch = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=NamedSharding(mesh, parallel.BATCH))
    whole, divided = (parallel.with_shardings(m, batch) for m in (parallel.make_mesh(8, 1), mesh))
    asked = []
    monkeypatch.setattr(xla, "fsdp_options", lambda: asked.append(True) or {})
    for arguments, count in (((whole, batch), 0), (([divided], batch), 1)):
        xla.compiled(lambda x, y: None, *arguments)
        assert len(asked) == count


@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_a_cache_of_programs_that_others_can_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(ValueError, match=r"can be written by others, .* chmod go-w"):
        xla.use_compilation_cache(str(folder))


def test_the_compiler_options_leave_the_bits_of_an_initialisation() -> None:
    def init(key: Array) -> list[Array]:
        return [lecun_normal()(key, (3, 3, 8, 16)), jnp.sin(jax.random.normal(key, (9, 7))) / 3.0]

    key, plain = seeds.key(3), jax.jit(init, compiler_options=DEFAULTS)
    jax.tree.map(np.testing.assert_array_equal, xla.compiled(init, key)(key), plain(key))


def test_a_program_keeps_nothing_of_what_it_was_made_from() -> None:
    x = jnp.ones((3, 5, 7, 11))  # a shape that no other test uses

    def traced() -> int:
        gc.collect()
        jaxprs = [kept for kept in gc.get_objects() if type(kept) is Jaxpr]
        return sum(any(v.aval.str_short() == "float32[3,5,7,11]" for v in jaxpr.invars) for jaxpr in jaxprs)

    def fun(x: Any) -> Any:
        return jax.lax.neg(x)

    program = xla.compiled(fun, x)
    assert traced() == 0
    np.testing.assert_array_equal(program(x), -np.asarray(x))
    assert xla.flops(fun, x) == x.size
    assert traced() == 0
    xla.lowered(fun, x).compile()
    assert traced() > 0


def test_a_compilation_cache_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.getuid() == 0:
        os.chown(tmp_path, 54321, -1)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ValueError, match=f"{tmp_path} is another user's.*a folder of your own"):
        xla.use_compilation_cache(str(tmp_path))


def test_a_compilation_cache_that_cannot_be_used_is_named_with_the_remedy(tmp_path: Path) -> None:
    closed, file = tmp_path / "closed", tmp_path / "file"
    closed.mkdir()
    closed.chmod(0o300)
    file.touch()
    with obeyed():
        for folder in (closed, file, file / "below"):
            with pytest.raises(ValueError, match=f"compilation_cache is {folder}, which cannot be used .*'' for none"):
                xla.use_compilation_cache(str(folder))
    xla.use_compilation_cache("")  # the remedy
