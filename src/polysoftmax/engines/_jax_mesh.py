"""JAX: arrays that are spread over a mesh whose axes are explicit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
from jax import lax
from jax import numpy as jnp

if TYPE_CHECKING:
    from polysoftmax._arrays import Array


def axes_of_mesh(x: Array, axis: int) -> Any:
    """Return what of a mesh an axis of ``x`` is spread over, where its axes are explicit; None for nothing."""
    spec = jax.typeof(x).sharding.spec
    return spec[axis] if axis < len(spec) else None


def on_each_device(x: Array) -> Array:
    """Return ``x`` with whole rows on each device, along the last axis; it is small."""
    if axes_of_mesh(x, x.ndim - 1) is None:
        return x
    return spread_like(x, x, *jax.typeof(x).sharding.spec[:-1])


def spread_like(like: Array, x: Array, *spec: Any) -> Array:
    """Return ``x`` spread in another way over the mesh of an array."""
    mesh = jax.typeof(like).sharding.mesh
    return jax.sharding.reshard(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)))


def spec_of(x: Array) -> tuple[Any, ...]:
    """Return what of a mesh each axis is spread over, where its axes are explicit."""
    return tuple(jax.typeof(x).sharding.spec)


def copies(like: Array, x: Array) -> Array:
    """Return a copy of ``x`` for each device that the first axis of an array is spread over, along a new first axis."""
    spread, mesh = axes_of_mesh(like, 0), jax.typeof(like).sharding.mesh
    count = math.prod(mesh.shape[one] for one in (spread if isinstance(spread, tuple) else (spread,)))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(spread, *spec_of(x)))
    return lax.broadcast_in_dim(x, (count, *x.shape), range(1, x.ndim + 1), out_sharding=where)


def take_of_shards(x: Array, index: Array, axis: int) -> Array:
    """Return the entries at an index along an axis; of one that is spread by explicit axes, without gathering it."""
    spread = axes_of_mesh(x, axis)
    if spread is None:
        return jnp.take_along_axis(x, index, axis=axis)
    mesh = jax.typeof(x).sharding.mesh
    shards = math.prod(mesh.shape[one] for one in (spread if isinstance(spread, tuple) else (spread,)))
    length = x.shape[axis] // shards
    # Each shard answers for the indices that are its own, and 0 for the others.
    local = x.reshape(*x.shape[:axis], shards, length, *x.shape[axis + 1 :])
    at = jnp.expand_dims(index, axis)
    at = at - length * lax.broadcasted_iota(at.dtype, (shards,) + (1,) * (at.ndim - axis - 1), 0)
    found = jnp.take_along_axis(local, jnp.clip(at, 0, length - 1), axis=axis + 1)
    return jnp.sum(jnp.where((at >= 0) & (at < length), found, 0), axis=axis, dtype=x.dtype)
