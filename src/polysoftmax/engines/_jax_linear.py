"""JAX: linear heads as a scan over chunks of rows, each of which is computed again for a derivative."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
from jax import lax
from jax import numpy as jnp

from polysoftmax._arrays import float_bits
from polysoftmax._linear import Head, Heads, has_rows

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
    n = arrays[0].shape[0]
    if not isinstance(n, int) or n <= head.size:  # a symbol of jax.export tells no number of chunks
        return head(*arrays)
    # What is left over would have a gradient of the weight of its own.
    size = next((one for one in range(head.size, head.size // 2, -1) if n % one == 0), head.size)
    count = n // size
    whole = size * count
    is_cut = [True, False, False, *map(has_rows, arrays[3:])]
    cut = [_in_chunks(one[:whole], count) for one, cuts in zip(arrays, is_cut, strict=True) if cuts]
    shared = [_wide(one) for one in arrays]

    @jax.checkpoint  # type: ignore[untyped-decorator]
    def answer(few: list[Array]) -> Array:
        given = iter(few)
        each = zip(arrays, shared, is_cut, strict=True)
        return head(*(next(given) if cuts else _narrow(wide, like) for like, wide, cuts in each))

    _, found = lax.scan(lambda carry, few: (carry, answer(few)), None, cut)
    y = _one_after_another(found)
    if whole == n:
        return y
    rest = (one[whole:] if cuts else one for one, cuts in zip(arrays, is_cut, strict=True))
    return jnp.concatenate([y, head(*rest)])


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


def _narrow(wide: Any, like: Any) -> Any:
    return None if wide is None else wide.astype(like.dtype)
