"""Meshes over some of the eight virtual devices."""

import jax
from jax.sharding import AxisType, Mesh


def mesh_of(data: int, fsdp: int = 1) -> Mesh:
    """A mesh of the first data x fsdp devices."""
    devices = jax.devices()[: data * fsdp]
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)
