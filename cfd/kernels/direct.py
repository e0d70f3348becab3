"""3x3 convolutions in float32 for a CPU, as one matrix product for all nine taps: few channels, or few positions.

Few channels are those of the first and the last convolution of a U-Net. XLA:CPU computes the last one as a product with
only as many columns as there are outputs, and is slow at it. Here the product has nine times as many. With few
positions, the kernel is larger than the image, and the transforms of Winograd convolution would not pay.

Results have the same bits on any number of threads: see `kernels.cpu.transposed_product`.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float32

from cfd.kernels.winograd import PADDING

FEW = 8


def pays(x: Array, kernel: Array) -> bool:
    """Whether there are few channels or few positions: at most FEW inputs or outputs, or fewer than 128 positions."""
    return x.dtype == jnp.float32 and (min(kernel.shape[2:]) <= FEW or x.size // x.shape[3] < 128)


def convolve(x: Float32[Array, "b h w c"], kernel: Float32[Array, "3 3 c k"]) -> Float32[Array, "b h w k"]:
    """The convolution with padding 1."""
    return _convolve(x, kernel)


@jax.jit
def _convolve(x: Float32[Array, "b h w c"], kernel: Float32[Array, "3 3 c k"]) -> Float32[Array, "b h w k"]:
    b, height, width, channels = x.shape
    outputs = kernel.shape[3]
    if not _has_few_outputs(channels, outputs):
        windows = jax.lax.optimization_barrier(jnp.concatenate(_windows(jnp.pad(x, PADDING), 1), axis=3))
        return (windows.reshape(-1, 9 * channels) @ kernel.reshape(-1, outputs)).reshape(b, height, width, outputs)
    # The width is the last axis, because loops over as few values as there are outputs are slow.
    taps = kernel.swapaxes(2, 3).reshape(9 * outputs, channels)
    products = (taps @ x.reshape(-1, channels).T).reshape(9, outputs, b, height, width)
    padded = jnp.pad(products, ((0, 0), (0, 0), (0, 0), (1, 1), (1, 1)))
    terms = [padded[3 * i + j, :, :, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return jnp.moveaxis(jax.lax.optimization_barrier(sum(terms, start=jnp.zeros((), jnp.float32))), 0, 3)


def gradients(
    x: Float32[Array, "b h w c"], kernel: Float32[Array, "3 3 c k"], g: Float32[Array, "b h w k"]
) -> tuple[Float32[Array, "b h w c"], Float32[Array, "3 3 c k"]]:
    """The gradients of x and of the kernel, given g, that of the output."""
    dx = _convolve(g, kernel[::-1, ::-1].swapaxes(2, 3))
    if _has_few_outputs(x.shape[3], g.shape[3]):
        return dx, _kernel_gradient(g, x)[::-1, ::-1].swapaxes(2, 3)
    return dx, _kernel_gradient(x, g)


@jax.jit
def _kernel_gradient(x: Float32[Array, "b h w c"], g: Float32[Array, "b h w k"]) -> Float32[Array, "3 3 c k"]:
    """The gradient of the kernel: a product with windows of x. With x and g exchanged, it is rotated by 180°."""
    channels, outputs = x.shape[3], g.shape[3]
    planes = jax.lax.optimization_barrier(jnp.moveaxis(x, 3, 0))
    windows = jnp.stack(_windows(jnp.pad(planes, ((0, 0), (0, 0), (1, 1), (1, 1))), 2))
    rows = jax.lax.optimization_barrier(windows.reshape(9 * channels, -1))
    return (rows @ g.reshape(-1, outputs)).reshape(3, 3, channels, outputs)


def _windows(padded: Array, axis: int) -> list[Array]:
    """For each of the nine taps, the values that it multiplies. The height is `axis`, and the width is the next one."""
    height, width = padded.shape[axis] - 2, padded.shape[axis + 1] - 2
    rows = [jax.lax.slice_in_dim(padded, i, i + height, axis=axis) for i in range(3)]
    return [jax.lax.slice_in_dim(row, j, j + width, axis=axis + 1) for row in rows for j in range(3)]


def _has_few_outputs(channels: int, outputs: int) -> bool:
    return outputs < channels and outputs <= FEW
