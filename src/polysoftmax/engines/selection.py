"""How each library finds the greatest entries of rows, along the last axis: their speeds differ by far."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

from polysoftmax._arrays import accurate_sum, block_of, default_index, device_for, library, stop_gradient, take_along

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax._arrays import Array, DType

_GROUP = 64
"""Entries that NumPy looks at together: they are passed over unless their maximum may be among the greatest."""

_BLOCK = 256
"""Entries that are summed together before a running sum."""


def block_sums(terms: Array, size: int) -> Array:
    """Return the sum of every block of ``size`` entries along the last axis; the last block may be shorter."""
    found = library(terms)
    xp = found.xp
    n = terms.shape[-1]
    if found.name == "jax":
        from jax import lax

        return _over_blocks_in_jax(terms, 0, lax.add, size)
    whole = n // size * size
    blocks = xp.reshape(terms[..., :whole], (*terms.shape[:-1], whole // size, size))
    # NumPy's sum has a cost of its own for each of many short blocks, and einsum hardly any.
    numpy = found.name == "numpy"
    sums = xp.einsum("...j->...", blocks) if numpy else accurate_sum(blocks, blocks.ndim - 1)[..., 0]
    if n == whole:
        return sums
    return xp.concat([sums, accurate_sum(terms[..., whole:], terms.ndim - 1)], axis=-1)


def _over_blocks_in_jax(x: Array, start: float, combine: Callable[..., Array], size: int) -> Array:
    """Reduce every block of ``size`` entries along the last axis."""
    from jax import lax

    # A window is computed together with its entries, which are then never kept, as a reshape of whole blocks is not.
    # The barrier keeps XLA from computing it anew for each use of the answer.
    window = (1,) * (x.ndim - 1) + (size,)
    padding = ((0, 0),) * (x.ndim - 1) + ((0, -x.shape[-1] % size),)
    return lax.optimization_barrier(lax.reduce_window(x, x.dtype.type(start), combine, window, window, padding))


def first_maximum(x: Array) -> Array:
    """Return the index of the greatest entry of every row, the lowest among equals; any index if the row has NaN."""
    found = library(x)
    xp = found.xp
    if found.name != "jax":
        return xp.argmax(x, axis=-1, keepdims=True)
    # XLA computes the entries for its argmax one by one, and for these two reductions many at once.
    at_top = x == xp.max(x, axis=-1, keepdims=True)
    return xp.min(xp.where(at_top, xp.arange(x.shape[-1]), x.shape[-1]), axis=-1, keepdims=True)


def kth_greatest(x: Array, k: int) -> Array:
    """Return the k-th greatest entry of every row, kept with length 1."""
    found = library(x)
    xp = found.xp
    _refuse_lazy(found.name)
    last = x.shape[-1] - k
    if found.name == "numpy":
        return xp.partition(x, last, axis=-1)[..., last : last + 1]
    if found.name == "torch":
        return x.topk(k, dim=-1, sorted=False).values.amin(-1, True)
    if found.name == "jax":
        from jax import lax

        candidates, _ = _candidates_in_jax(x, k)
        if candidates is x:  # k is no small part of the row, so XLA's search would take twice as long as this one
            return _jax_search()(stop_gradient(x), xp.ones_like(x), xp.full((*x.shape[:-1], 1), k, x.dtype))
        # Not the last of them: XLA would sort the rows for that.
        return xp.min(lax.top_k(candidates, k)[0], axis=-1, keepdims=True)
    return xp.sort(x, axis=-1)[..., last : last + 1]


def leading(x: Array, k: int) -> Array:
    """Return the indices of the k greatest entries of every row, the lowest ones among equals, in increasing order."""
    found = library(x)
    xp = found.xp
    _refuse_lazy(found.name)
    if found.name == "jax":
        from jax import lax

        entries, index = _candidates_in_jax(x, k)
        return xp.take_along_axis(index, xp.sort(lax.top_k(entries, k)[1], axis=-1), axis=-1)
    if found.name == "numpy":
        return _leading_in_numpy(x, k)
    return xp.sort(xp.argsort(x, axis=-1, descending=True, stable=True)[..., :k], axis=-1)


def _candidates_in_jax(x: Array, k: int) -> tuple[Array, Array]:
    """Return few entries that the k greatest are among, and their indices in increasing order."""
    from jax import lax
    from jax import numpy as jnp

    n = x.shape[-1]
    size = 1 << ((n // k).bit_length() // 2)
    if -(-n // size) <= 8 * k:
        return x, jnp.broadcast_to(jnp.arange(n), x.shape)
    # XLA's search is slow. The k greatest entries are in the k groups with the greatest maxima: whatever stands in
    # another group is less than each of those, or equal to it and of a higher index.
    chosen = jnp.sort(lax.top_k(_over_blocks_in_jax(x, -jnp.inf, lax.max, size), k)[1], axis=-1)
    index = (chosen[..., None] * size + jnp.arange(size)).reshape(*x.shape[:-1], k * size)
    return jnp.where(index < n, jnp.take_along_axis(x, jnp.minimum(index, n - 1), axis=-1), -jnp.inf), index


def _leading_in_numpy(x: Array, k: int) -> Array:
    import numpy as np

    batch, n = x.shape[:-1], x.shape[-1]
    x = x.reshape(-1, n)
    groups = n // _GROUP
    if groups <= 2 * k:
        return _leading_by_partition(x, k).reshape(*batch, k)
    # The k-th greatest maximum of any groups is a bound that at least k entries reach. Interleaved groups are
    # reduced for whole vectors of them.
    maxima = x[:, : groups * _GROUP].reshape(-1, _GROUP, groups).max(axis=1)
    bound = np.partition(maxima, groups - k, axis=-1)[:, groups - k, None]
    row, column = np.divmod(np.flatnonzero(~(x < bound)), n)  # NaN stays
    counts = np.bincount(row, minlength=len(x))
    slot = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    width = int(counts.max(initial=k))
    indices = np.zeros((len(x), width), column.dtype)
    indices[row, slot] = column
    values = np.full((len(x), width), -np.inf, x.dtype)
    values[row, slot] = x[row, column]
    return np.take_along_axis(indices, _leading_by_partition(values, k), axis=-1).reshape(*batch, k)


def _leading_by_partition(x: Array, k: int) -> Array:
    import numpy as np

    ordered = np.where(np.isnan(x), np.inf, x)  # a row with NaN has no answer, whatever is chosen in it
    start = x.shape[-1] - k
    least = np.partition(ordered, start, axis=-1)[:, start, None]
    above = ordered > least
    kept = above | first(ordered == least, k - above.sum(-1, keepdims=True))
    return (np.flatnonzero(kept) % x.shape[-1]).reshape(-1, k)


def first(flags: Array, room: Array) -> Array:
    """Keep the first ``room`` of the True entries of every row."""
    found = library(flags)
    xp = found.xp
    if found.name != "numpy":
        numbers = xp.astype(flags, room.dtype)
        reached = _running_sum(block_sums(numbers, _BLOCK), room.dtype)
        block, _, inside = _reaching(numbers, reached, lambda entries: xp.astype(entries > 0, room.dtype), room)
        last = block * _BLOCK + inside
        return flags & (xp.arange(flags.shape[-1], dtype=last.dtype, device=device_for(flags)) <= last)
    # Few entries are True, as a rule: they are numbered by themselves.
    place = xp.flatnonzero(flags)
    row = place // flags.shape[-1]
    counts = xp.bincount(row, minlength=room.size)
    number = xp.arange(1, len(place) + 1) - (xp.cumsum(counts) - counts)[row]
    kept = flags.copy()
    kept.reshape(-1)[place[number > room.reshape(-1)[row]]] = False
    return kept


def end_of_prefix(
    x: Array, mass_of: Callable[[Array], Array], target_of: Callable[[Array], Array]
) -> tuple[Array, Array]:
    """Return the last value of the shortest prefix of the greatest entries whose mass reaches a target.

    Beside it, how many of the entries with this value belong to the prefix: it has at least one entry. The target is a
    function of the whole mass.
    """
    found = library(x)
    xp = found.xp
    _refuse_lazy(found.name)
    if found.name == "jax":
        from jax import lax

        # Computed once: in each program XLA may compile another exponential for the sum than for the search.
        mass = lax.optimization_barrier(stop_gradient(mass_of(x)))
        target = xp.broadcast_to(target_of(accurate_sum(mass, x.ndim - 1)), (*x.shape[:-1], 1))
        x, target = stop_gradient(x), stop_gradient(target)
        end = _jax_search()(x, mass, target)
        above = xp.sum(xp.where(x > end, mass, 0.0), axis=-1, keepdims=True)
        return end, xp.maximum(xp.ceil((target - above) / mass_of(end)), 1.0)
    ordered = xp.sort(x, axis=-1, descending=True, stable=False)
    if found.name == "numpy":
        ordered = xp.ascontiguousarray(ordered)  # a view with a negative step
    reached = _running_sum(block_sums(mass_of(ordered), _BLOCK), xp.float64)
    block, entries, last = _reaching(ordered, reached, mass_of, target_of(reached[..., -1:]))
    end = take_along(entries, last, x.ndim - 1)
    return end, xp.astype(block * _BLOCK + last + 1 - count(ordered > end), x.dtype)


def _reaching(x: Array, reached: Array, mass_of: Callable[[Array], Array], target: Array) -> tuple[Array, Array, Array]:
    """Return where the running sum of masses reaches a target: number of the block, its entries, and the place in it.

    ``reached`` is the running sum over whole blocks, which is enough for all blocks but that one.
    """
    xp = library(x).xp
    block = count(reached[..., :-1] < target)
    before = take_along(reached, xp.maximum(block, xp.ones_like(block)) - 1, x.ndim - 1)
    entries, _ = block_of(x, block, _BLOCK)
    inside = xp.where(block > 0, before, 0.0) + _running_sum(mass_of(entries), reached.dtype)
    return block, entries, count(inside[..., :-1] < target)


def count(flags: Array) -> Array:
    """Return how many entries of every row are True, kept with length 1."""
    xp = library(flags).xp
    return xp.sum(xp.astype(flags, default_index(xp)), axis=-1, keepdims=True)


_CACHED = 1 << 20
"""Entries that JAX searches together on a CPU, so that they are in its cache for all bits."""


@cache
def _jax_search() -> Callable[[Array, Array, Array], Array]:
    """Return the search in the form that JAX compiles once for each shape, under the caller's own jit or not."""
    import jax
    from jax import lax
    from jax import numpy as jnp

    def search(x: Array, mass: Array, target: Array) -> Array:
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
        return jnp.where(end == least, -jnp.inf, lax.bitcast_convert_type(flipped(end), x.dtype))

    def search_in_cache(x: Array, mass: Array, target: Array) -> Array:
        batch, n = x.shape[:-1], x.shape[-1]
        lines = math.prod(batch)
        parts = -(-lines // max(1, _CACHED // n))
        if parts < 2:
            return search(x, mass, target)
        each = -(-lines // parts)

        def cut(one: Array) -> Array:
            flat = jnp.pad(one.reshape(lines, -1), ((0, parts * each - lines), (0, 0)))
            return flat.reshape(parts, each, -1)

        end = lax.map(lambda part: search(*part), tuple(map(cut, (x, mass, target))))
        return end.reshape(-1)[:lines].reshape(*batch, 1)

    def anywhere(x: Array, mass: Array, target: Array) -> Array:
        return lax.platform_dependent(x, mass, target, cpu=search_in_cache, default=search)

    return jax.jit(anywhere)  # type: ignore[no-any-return]


def _running_sum(x: Array, dtype: DType) -> Array:
    found = library(x)
    if found.name == "torch":  # torch.compile cannot follow array-api-compat's
        return x.cumsum(-1, dtype=dtype)
    return found.xp.cumulative_sum(x, axis=-1, dtype=dtype)


def _refuse_lazy(name: str) -> None:
    if name == "dask":
        msg = "Dask cannot order rows lazily, as top_k and top_p need: compute the logits first, logits.compute()"
        raise NotImplementedError(msg)
