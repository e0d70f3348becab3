"""The network of a config's group `model`: its module, and its outputs as ε, or as (ε, v) with a learned variance."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from cfd.networks.mp_unet import MPUNet, normalized
from cfd.networks.times import logsnr_table
from cfd.networks.transformer import Transformer
from cfd.networks.unet import UNet
from cfd.process import from_mean, from_v, from_x

MODULES: dict[str, Any] = {"adm": UNet, "mp": MPUNet, "transformer": Transformer}
"""The Flax module that model.network names. Each takes the fields of the group that it has."""
TO_EPS: dict[str, Callable[[Any], Any]] = {"eps": lambda eps_fn: eps_fn, "x": from_x, "v": from_v}
"""The functions that make an eps_fn of a network, by the names of model.predict, without "mean"."""


class Model(NamedTuple):
    """A diffusion network without its parameters.

    `init(key)` gives parameters, and `apply(params, z, logsnr, labels, **options)` gives ε [B, H, W, C], or (ε, v).
    The options are those of the module: `train`, and `rngs` for dropout. `project(params)` is what each training step
    must make of the parameters that the optimizer leaves; None: nothing.
    `scores(params, z, logsnr, labels, nulls, **options)` gives the outputs of `apply` for `labels` and the ε for
    `nulls`, and evaluates the trunk that they share once; None: there is no such trunk (model.label_from).
    """

    init: Callable[[Array], Any]
    apply: Callable[..., Any]
    project: Callable[[Any], Any] | None = None
    scores: Callable[..., Any] | None = None


def build(
    fields: Mapping[str, Any], image_size: int, channels: int, *, variance: bool = False, fast: bool = True
) -> Model:
    """The network that the fields of a group `model` describe, for images [image_size, image_size, channels].

    Fields that a run is too old to have are left out: network is then "adm", and predict "eps". A network with twice as
    many outputs as channels has a learned variance, which is dropped unless `variance` asks for it. With it, v is
    (o + 1) / 2 of those outputs o: Nichol and Dhariwal (arXiv:2102.09672), Eq. 15. `fast` is as in `UNet`.
    """
    exponents = tuple(fields.get("fourier", ()))
    outputs = fields.get("out_channels", 0) or channels * (2 if fields.get("learn_variance", False) else 1)
    fields = {**fields, "out_channels": outputs}  # by itself, a network would have as many outputs as inputs
    net = module(fields, image_size, fast=fast)
    to_eps = adapter(fields)

    def features(z: Array) -> Array:
        if exponents and z.shape[-1] != channels:  # the network would name the number of its own inputs
            raise ValueError(f"z has shape {z.shape}; this network takes [B, H, W, {channels}]: give z of that shape")
        return fourier_features(z, exponents)

    def init(key: Array) -> Any:
        shape = (1, image_size, image_size, channels)
        inputs = features(jnp.zeros(shape)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
        return net.init(key, *inputs, **({"w": jnp.zeros(1)} if fields.get("weight_range") else {}))["params"]

    def apply(params: Any, z: Array, logsnr: Array, labels: Array, **options: Any) -> Any:
        learned = []

        def predicted(z: Array, logsnr: Array, labels: Array) -> Array:
            outputs: Any = net.apply({"params": params}, features(z), logsnr, labels, **options)
            learned.append(outputs[..., channels:])
            return outputs[..., :channels]

        eps = to_eps(predicted)(z, logsnr, labels)
        return (eps, 0.5 * (learned[0] + 1.0)) if variance else eps

    def scores(params: Any, z: Array, logsnr: Array, labels: Array, nulls: Array, **options: Any) -> Any:
        both: Any = net.apply({"params": params}, features(z), logsnr, labels, nulls, method="scores", **options)
        eps, eps_null = (
            to_eps(lambda *_, out=out: out[..., :channels])(z, logsnr, c)
            for out, c in zip(both, (labels, nulls), strict=True)
        )
        return ((eps, 0.5 * (both[0][..., channels:] + 1.0)) if variance else eps), eps_null

    has_trunk = getattr(net, "label_from", -1) >= 0
    return Model(init, apply, normalized if isinstance(net, MPUNet) else None, scores if has_trunk else None)


def fourier_features(z: Float[Array, "*b c"], exponents: Sequence[int]) -> Float[Array, "*b k"]:
    """z, and sin(2ⁿ π z) and cos(2ⁿ π z) for each exponent n as further channels: Kingma et al. (arXiv:2107.00630).

    Their pixel values are 2/256 apart, and those here 2/255. z is therefore scaled by 255/256: with n = 7, neighbouring
    pixel values differ by π in the angle, and the features repeat up to their sign. The values of the digits are 1/8
    apart: there, n = 3 does the same.
    """
    angles = [2.0**n * jnp.pi * 255.0 / 256.0 * z for n in exponents]
    return jnp.concatenate([z, *map(jnp.sin, angles), *map(jnp.cos, angles)], axis=-1) if exponents else z


def adapter(fields: Mapping[str, Any]) -> Callable[[Any], Any]:
    """The function that makes an eps_fn of a network whose output is that of model.predict.

    "mean" is the mean of DDPM's next step, in the table of model.time. Raises ValueError if that has no table.
    """
    if fields.get("predict", "eps") != "mean":
        return TO_EPS[fields.get("predict", "eps")]
    time = fields.get("time", "cosine")
    if not time.startswith("adm_"):
        raise ValueError(
            f"model.predict is 'mean', the mean of a step in a table of levels, and model.time is {time!r}, which has "
            "no table: set model.time to 'adm_linear', DDPM's, or to 'adm_cosine'"
        )
    return functools.partial(from_mean, levels=tuple(map(float, logsnr_table(time.removeprefix("adm_"))[::-1])))


def module(fields: Mapping[str, Any], image_size: int, *, fast: bool = True) -> Any:
    """The Flax module of a group `model`, whose outputs are those that model.predict names."""
    network = MODULES[fields.get("network", "adm")]
    if fields.get("weight_range") and "weight_range" not in network.__dataclass_fields__:
        raise ValueError(
            f"model.weight_range is {tuple(fields['weight_range'])}, and the network {fields['network']!r} has no "
            "input for w: distill a run whose model.network is 'adm'"
        )
    own = {name: x for name, x in fields.items() if name in network.__dataclass_fields__}
    # JSON makes lists of tuples.
    own = {name: tuple(x) if isinstance(x, list) else x for name, x in own.items()}
    return network(image_size=image_size, fast=fast, **own)
