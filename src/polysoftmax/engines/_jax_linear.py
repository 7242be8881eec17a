"""JAX: linear heads as a scan over chunks of rows, each of which is computed again for a derivative."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import jax
from jax import lax
from jax import numpy as jnp

from polysoftmax._arrays import float_bits
from polysoftmax._linear import Head, Heads, has_rows
from polysoftmax.engines._jax_mesh import axes_of_mesh, copies, names_of, spec_of, spread_like

if TYPE_CHECKING:
    from polysoftmax._arrays import Array


class JaxHeads(Heads):
    """Linear heads of JAX."""

    def answers(self, head: Head, *arrays: Any) -> Array:
        return _answers(head, *arrays)

    def product(self, hidden: Array, weight: Array) -> Array:
        return lax.dot_general(hidden, weight, (((1,), (1,)), ((), ())))  # XLA would keep a copy that is transposed


@functools.partial(jax.jit, static_argnums=0)
def _answers(head: Head, *arrays: Any) -> Array:
    hidden = arrays[0]
    if not isinstance(hidden.shape[0], int) or hidden.shape[0] <= head.size:  # a symbol tells no number of chunks
        return head(*arrays)
    is_cut = (True, False, False, *map(has_rows, arrays[3:]))
    dtypes = [getattr(one, "dtype", None) for one in arrays]
    given = [one if cuts else _wide(one) for one, cuts in zip(arrays, is_cut, strict=True)]
    spread, shared = axes_of_mesh(hidden, 0), [one for one, cuts in zip(given, is_cut, strict=True) if not cuts]
    if spread is None or any(one is not None and any(spec_of(one)) for one in shared):
        return _by_chunks(head, is_cut, dtypes, *given)
    return _on_each_device(head, is_cut, dtypes, spread, *given)


def _on_each_device(head: Head, is_cut: tuple[bool, ...], dtypes: list[Any], spread: Any, *arrays: Any) -> Array:
    """Let each device go over its own rows, and add up its part of a gradient in a copy of what they share.

    These parts meet once. Those of an array that devices share would be sent after every chunk.
    """
    hidden, names = arrays[0], names_of(spread)
    mesh, rows = jax.typeof(hidden).sharding.mesh, jax.sharding.PartitionSpec(spread)
    each = head._replace(size=-(-head.size // math.prod(mesh.shape[one] for one in names)))

    def on_a_device(*here: Any) -> Array:
        own = (one if cuts or one is None else one[0] for one, cuts in zip(here, is_cut, strict=True))
        return _by_chunks(each, is_cut, dtypes, *own)

    given = (
        None if one is None else spread_like(hidden, one, spread, *spec_of(one)[1:]) if cuts else copies(hidden, one)
        for one, cuts in zip(arrays, is_cut, strict=True)
    )
    everywhere = jax.shard_map(on_a_device, mesh=mesh, in_specs=rows, out_specs=rows, axis_names=set(names))
    return everywhere(*given)


def _by_chunks(head: Head, is_cut: tuple[bool, ...], dtypes: list[Any], *arrays: Any) -> Array:
    """Go over chunks of rows, with what they share in the dtypes in which its gradient is added up."""
    n = arrays[0].shape[0]
    # What is left over would have a gradient of the weight of its own.
    size = next((one for one in range(head.size, head.size // 2, -1) if n % one == 0), head.size)
    count = n // size
    whole = size * count
    cut = [_in_chunks(one[:whole], count) for one, cuts in zip(arrays, is_cut, strict=True) if cuts]

    def answer(few: list[Array]) -> Array:
        given = iter(few)
        each = zip(arrays, dtypes, is_cut, strict=True)
        return head(*(next(given) if cuts else _narrow(one, dtype) for one, dtype, cuts in each))

    checkpointed = jax.checkpoint(answer)
    _, found = lax.scan(lambda carry, few: (carry, checkpointed(few)), None, cut)
    y = _one_after_another(found)
    if whole == n:
        return y
    return jnp.concatenate([y, answer([one[whole:] for one, cuts in zip(arrays, is_cut, strict=True) if cuts])])


def _in_chunks(x: Array, count: int) -> Array:
    """Cut rows into chunks of every count-th one, so that rows on several devices stay where they are."""
    if jax.device_count() == 1:  # without the copy
        return x.reshape(count, -1, *x.shape[1:])
    return jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0)


def _one_after_another(chunks: Array) -> Array:
    """Bring what `_in_chunks` has cut back into order."""
    in_order = chunks if jax.device_count() == 1 else jnp.moveaxis(chunks, 0, 1)
    return in_order.reshape(-1, *chunks.shape[2:])


def _wide(one: Any) -> Any:
    """Return 16 bits as 32, in which their gradient is added up: it would lose what a chunk adds to many."""
    return one.astype(jnp.float32) if one is not None and float_bits(jnp, one.dtype) == 16 else one


def _narrow(wide: Any, dtype: Any) -> Any:
    return None if wide is None else wide.astype(dtype)
