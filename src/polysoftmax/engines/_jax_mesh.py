"""JAX: arrays that are spread over a mesh whose axes are explicit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
from jax import lax
from jax import numpy as jnp

if TYPE_CHECKING:
    from collections.abc import Callable

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
    count = _shards(like, 0)
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(spread, *spec_of(x)))
    return lax.broadcast_in_dim(x, (count, *x.shape), range(1, x.ndim + 1), out_sharding=where)


def take_of_shards(x: Array, index: Array, axis: int) -> Array:
    """Return the entries at an index along an axis; of one that is spread by explicit axes, without gathering it."""
    spread = axes_of_mesh(x, axis)
    if spread is None:
        return jnp.take_along_axis(x, index, axis=axis)
    shards = _shards(x, axis)
    length = x.shape[axis] // shards
    # Each shard answers for the indices that are its own, and 0 for the others.
    local = x.reshape(*x.shape[:axis], shards, length, *x.shape[axis + 1 :])
    at = jnp.expand_dims(index, axis)
    at = at - length * lax.broadcasted_iota(at.dtype, (shards,) + (1,) * (at.ndim - axis - 1), 0)
    found = jnp.take_along_axis(local, jnp.clip(at, 0, length - 1), axis=axis + 1)
    return jnp.sum(jnp.where((at >= 0) & (at < length), found, 0), axis=axis, dtype=x.dtype)


def is_uneven(x: Array, size: int) -> bool:
    """Whether blocks of ``size`` entries along the last axis are no multiple of the devices that share it."""
    return axes_of_mesh(x, x.ndim - 1) is not None and -(-x.shape[-1] // size) % _shards(x, x.ndim - 1) != 0


def over_cut_blocks(
    x: Array, start: float, combine: Callable[..., Array], size: int, reduce: Callable[..., Array]
) -> Array:
    """Reduce blocks along the last axis, which is spread: each device reduces what it has of them, and all meet."""
    names, n, shards = names_of(axes_of_mesh(x, x.ndim - 1)), x.shape[-1], _shards(x, x.ndim - 1)
    length, count = n // shards, -(-n // size)
    touched = -(-length // size) + 1

    def filled(part: Array, room: int, offset: Array) -> Array:
        """Place a part in a longer row."""
        ends = ((0, 0, 0),) * (x.ndim - 1) + ((0, room - part.shape[-1], 0),)
        return jnp.roll(lax.pad(part, part.dtype.type(start), ends), offset, axis=-1)

    def on_a_device(part: Array) -> Array:
        first = length * lax.axis_index(names)
        blocks = reduce(filled(part, touched * size, first % size), start, combine, size)
        found = filled(blocks, count + touched, first // size)[..., :count]
        return lax.psum(found, names) if combine is lax.add else lax.pmax(lax.stop_gradient(found), names)

    # With the axes that rows are spread over, too: XLA gathers rows where these are left to it.
    used = {name for one in spec_of(x) if one is not None for name in names_of(one)}
    rows, whole = jax.sharding.PartitionSpec(*spec_of(x)), jax.sharding.PartitionSpec(*spec_of(x)[:-1], None)
    mesh = jax.typeof(x).sharding.mesh
    return jax.shard_map(on_a_device, mesh=mesh, in_specs=rows, out_specs=whole, axis_names=used)(x)


def names_of(spread: Any) -> tuple[str, ...]:
    """Return the axes of a mesh that an axis is spread over."""
    return spread if isinstance(spread, tuple) else (spread,)


def _shards(x: Array, axis: int) -> int:
    mesh = jax.typeof(x).sharding.mesh
    return math.prod(mesh.shape[one] for one in names_of(axes_of_mesh(x, axis)))
