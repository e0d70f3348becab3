"""The test of whether cuDNN's attention can be used. cuDNN's attention itself needs a GPU."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from cfd.kernels import gpu


@pytest.mark.parametrize(
    "version, capability, dtype, size, taken",
    [
        ("PJRT C API\ncuda 13000", "9.0", "bfloat16", 64, True),
        ("PJRT C API\ncuda 13000", "8.0", "float16", 128, True),
        ("PJRT C API\ncuda 13000", "7.5", "bfloat16", 64, False),
        ("PJRT C API\nrocm 60000", "9.0", "bfloat16", 64, False),
        ("PJRT C API\ncuda 13000", "9.0", "float32", 64, False),
        ("PJRT C API\ncuda 13000", "9.0", "bfloat16", 136, False),
        ("PJRT C API\ncuda 13000", "9.0", "bfloat16", 60, False),
        ("cpu", "", "bfloat16", 64, False),
    ],
)
def test_cudnn_is_used_only_for_supported_queries_and_devices(
    version: str, capability: str, dtype: str, size: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q = jnp.zeros((1, 4, 2, size), dtype)
    device = SimpleNamespace(client=SimpleNamespace(platform_version=version), compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert gpu.cudnn_takes(q) == taken
