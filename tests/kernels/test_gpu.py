"""Attention, whose form depends on the device: the formula in float64, and cuDNN's form where there is a GPU."""

import jax
import numpy as np
import pytest
from jax import Array

from cfd.kernels import gpu
from cfd.networks.layers import attention


def heads(dtype: str) -> list[Array]:
    return [jax.random.normal(jax.random.key(i), (2, 16, 3, 64), dtype) for i in range(3)]


@pytest.mark.parametrize("dtype, error", [("float32", 1e-5), ("bfloat16", 0.02), ("float16", 0.002)])
def test_attention_is_the_softmax_of_scaled_products(dtype: str, error: float) -> None:
    q, k, v = (np.asarray(x, np.float64) for x in heads(dtype))
    scores = np.exp(np.einsum("btnd,bsnd->bnts", q, k) / 64**0.5)
    expected = np.einsum("bnts,bsnd->btnd", scores / scores.sum(axis=-1, keepdims=True), v)
    np.testing.assert_allclose(np.asarray(attention(*heads(dtype)), np.float64), expected, rtol=0, atol=error)


def test_cudnn_is_not_part_of_a_program_for_another_platform() -> None:
    for platform in ("cpu", "tpu"):
        program = attention.trace(*heads("bfloat16")).lower(lowering_platforms=(platform,)).as_text()
        assert "cudnn" not in program.lower()


@pytest.mark.skipif("cuda" not in jax.devices()[0].client.platform_version, reason="cuDNN needs an NVIDIA GPU")
def test_cudnns_attention_is_the_same_function() -> None:
    q, k, v = heads("bfloat16")
    assert gpu.cudnn_takes(q)
    plain = jax.nn.dot_product_attention(q, k, v, implementation="xla")
    np.testing.assert_allclose(
        np.asarray(attention(q, k, v), np.float32), np.asarray(plain, np.float32), rtol=0, atol=0.02
    )
