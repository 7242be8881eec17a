"""How each library finds the greatest entries of rows, along the last axis: their speeds differ by far."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from polysoftmax._arrays import default_index, library, stop_gradient

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax._arrays import Array, DType

_GROUP = 64


def leading(x: Array, k: int) -> Array:
    """Return the indices of the k greatest entries of every row, the lowest ones among equals, in increasing order."""
    found = library(x)
    xp = found.xp
    _refuse_lazy(found.name)
    if found.name == "jax":
        import jax

        return xp.sort(jax.lax.top_k(x, k)[1], axis=-1)
    if found.name == "numpy":
        return _leading_in_numpy(x, k)
    return xp.sort(xp.argsort(x, axis=-1, descending=True, stable=True)[..., :k], axis=-1)


def _leading_in_numpy(x: Array, k: int) -> Array:
    import numpy as np

    batch, n = x.shape[:-1], x.shape[-1]
    x = x.reshape(-1, n)
    groups = n // _GROUP
    if groups > 2 * k:
        # The k-th greatest maximum of any groups is a bound that at least k entries reach. Interleaved groups are
        # reduced for whole vectors of them.
        maxima = x[:, : groups * _GROUP].reshape(-1, _GROUP, groups).max(axis=1)
        bound = np.partition(maxima, groups - k, axis=-1)[:, groups - k, None]
        row, column = np.nonzero(~(x < bound))  # NaN stays
        counts = np.bincount(row, minlength=len(x))
        slot = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        width = int(counts.max(initial=k))
        indices = np.zeros((len(x), width), column.dtype)
        indices[row, slot] = column
        values = np.full((len(x), width), -np.inf, x.dtype)
        values[row, slot] = x[row, column]
        chosen = _leading_in_numpy(values, k)
        return np.take_along_axis(indices, chosen, axis=-1).reshape(*batch, k)
    ordered = np.where(np.isnan(x), np.inf, x)  # a row with NaN has no answer, whatever is chosen in it
    least = np.partition(ordered, n - k, axis=-1)[:, n - k, None]
    above = ordered > least
    kept = above | first(ordered == least, k - above.sum(-1, keepdims=True))
    return np.nonzero(kept)[1].reshape(*batch, k)


def first(flags: Array, room: Array) -> Array:
    """Keep the first ``room`` of the True entries of every row."""
    found = library(flags)
    xp = found.xp
    counts = xp.astype(flags, xp.int32)
    if found.name == "numpy" and (counts.sum(-1, keepdims=True) <= room).all():
        return flags
    return flags & (xp.astype(_running_sum(counts, xp.int32), room.dtype) <= room)


def end_of_prefix(x: Array, mass_of: Callable[[Array], Array], target: Array) -> tuple[Array, Array]:
    """Return the last entry of the shortest prefix of the greatest ones whose mass reaches the target.

    Beside it, the mass of all that is greater. The mass of an entry is that of every other with the same value; the
    prefix has at least one entry.
    """
    found = library(x)
    xp = found.xp
    _refuse_lazy(found.name)
    if found.name == "jax":
        x, mass, target = (stop_gradient(one) for one in (x, mass_of(x), target))
        return _jax_search()(x, mass, xp.broadcast_to(target, (*x.shape[:-1], 1)))
    ordered = xp.sort(x, axis=-1, descending=True, stable=False)
    if found.name == "numpy":
        ordered = xp.ascontiguousarray(ordered)  # a view with a negative step
    mass = mass_of(ordered)
    before = _running_sum(mass, xp.float64) - mass
    inside = xp.sum(xp.astype(before < target, xp.int32), axis=-1, keepdims=True, dtype=xp.int32)
    last = xp.astype(xp.maximum(inside, xp.ones_like(inside)) - 1, default_index(xp))
    end = xp.take_along_axis(ordered, last, axis=-1)
    return end, xp.sum(xp.where(ordered > end, mass, 0.0), axis=-1, keepdims=True)


@cache
def _jax_search() -> Callable[[Array, Array, Array], tuple[Array, Array]]:
    """Return the search in the form that JAX compiles once for each shape, under the caller's own jit or not."""
    import jax
    from jax import lax
    from jax import numpy as jnp

    @jax.jit  # type: ignore[untyped-decorator]
    def search(x: Array, mass: Array, target: Array) -> tuple[Array, Array]:
        # XLA sorts slowly on a CPU. The end is found bit by bit instead, by a sum over the row for each.
        bits = jnp.finfo(x.dtype).bits
        whole = jnp.int32 if bits == 32 else jnp.int64
        least, greatest = jnp.iinfo(whole).min, jnp.iinfo(whole).max

        def flipped(number: Array) -> Array:
            """Give integers the order of the numbers whose bits they are, or the other way round."""
            return number ^ ((number >> (bits - 1)) & greatest)

        order = flipped(lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), whole))  # -0 is no less than 0

        def set_bit(i: Array, end: Array) -> Array:
            more = end + lax.shift_left(jnp.ones_like(end), (bits - 1 - i).astype(whole))
            reached = jnp.sum(jnp.where(order >= more, mass, 0.0), axis=-1, keepdims=True)
            return jnp.where((reached >= target) & (reached > 0), more, end)

        end = lax.fori_loop(0, bits, set_bit, jnp.full(target.shape, least, whole))
        above = jnp.sum(jnp.where(order > end, mass, 0.0), axis=-1, keepdims=True)
        return jnp.where(end == least, -jnp.inf, lax.bitcast_convert_type(flipped(end), x.dtype)), above

    return search  # type: ignore[no-any-return]


def _running_sum(x: Array, dtype: DType) -> Array:
    found = library(x)
    if found.name == "torch":  # torch.compile cannot follow array-api-compat's
        return x.cumsum(-1, dtype=dtype)
    return found.xp.cumulative_sum(x, axis=-1, dtype=dtype)


def _refuse_lazy(name: str) -> None:
    if name == "dask":
        msg = "Dask cannot order rows lazily, as top_k and top_p need: compute the logits first, logits.compute()"
        raise NotImplementedError(msg)
