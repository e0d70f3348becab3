"""3x3 convolutions in float32 for a CPU, as one matrix product for all nine taps: few channels, or few positions.

Few channels are those of the first and the last convolution of a U-Net. XLA:CPU computes the last one as a product with
only as many columns as there are outputs, and is slow at it. Here the product has nine times as many. With few
positions, the kernel is larger than the image, and the transforms of Winograd convolution would not pay.

Results have the same bits on any number of threads: see `kernels.cpu.transposed_product`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float32

from cfd.kernels.cpu import transposed_product
from cfd.kernels.winograd import LAYOUT, PADDING

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
        return (_windows(x) @ kernel.reshape(-1, outputs)).reshape(b, height, width, outputs)
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
    return transposed_product(_windows(x), g.reshape(-1, outputs)).reshape(3, 3, channels, outputs)


def _windows(x: Float32[Array, "b h w c"]) -> Float32[Array, "n 9*c"]:
    """For each of the n positions, the values that the nine taps multiply, all channels of a tap together."""
    height, width, channels = x.shape[1:]
    if channels <= FEW:
        # A convolution with ones and zeros copies exactly. XLA:CPU would compile ten loops for the slices.
        copies = jnp.asarray(np.eye(9 * channels, dtype=np.float32).reshape(3, 3, channels, -1))
        windows = jax.lax.conv_general_dilated(x, copies, (1, 1), PADDING[1:3], dimension_numbers=LAYOUT)
    else:
        padded = jnp.pad(x, PADDING)
        windows = jnp.concatenate(
            [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)], axis=3
        )
    return jax.lax.optimization_barrier(windows).reshape(-1, 9 * channels)


def _has_few_outputs(channels: int, outputs: int) -> bool:
    return outputs < channels and outputs <= FEW
