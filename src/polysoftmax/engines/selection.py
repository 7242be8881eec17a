"""How each library finds the greatest entries of rows, along the last axis: their speeds differ by far."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polysoftmax._arrays import default_index, library

if TYPE_CHECKING:
    from polysoftmax._arrays import Array

_GROUP = 64
_STEPS = {32: 40, 64: 70}
"""Halvings of [-110, 1] or [-750, 1] after which two neighbouring numbers of the dtype are told apart."""


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


def descending(x: Array) -> Array:
    """Return every row in decreasing order."""
    found = library(x)
    _refuse_lazy(found.name)
    if found.name == "numpy":
        return found.xp.ascontiguousarray(found.xp.sort(x, axis=-1, stable=False)[..., ::-1])
    return found.xp.sort(x, axis=-1, descending=True, stable=False)


def first(flags: Array, room: Array) -> Array:
    """Keep the first ``room`` of the True entries of every row."""
    found = library(flags)
    xp = found.xp
    counts = xp.astype(flags, xp.int32)
    if found.name == "numpy" and (counts.sum(-1, keepdims=True) <= room).all():
        return flags
    return flags & (xp.astype(xp.cumulative_sum(counts, axis=-1, dtype=xp.int32), room.dtype) <= room)


def mass_threshold(z: Array, target: Array) -> tuple[Array, Array]:
    """Return where the prefix of the greatest z whose Σ exp(z) reaches the target ends, and the mass above that."""
    found = library(z)
    xp = found.xp
    _refuse_lazy(found.name)
    if found.name == "jax":
        return _halved(xp, z, target)
    ordered = descending(z)
    mass = xp.exp(ordered)
    inside = xp.astype(xp.cumulative_sum(mass, axis=-1) - mass < target, xp.int32)
    last = xp.maximum(xp.sum(inside, axis=-1, keepdims=True, dtype=xp.int32), xp.ones_like(inside[..., :1])) - 1
    end = xp.take_along_axis(ordered, xp.astype(last, default_index(xp)), axis=-1)
    return end, xp.sum(xp.where(ordered > end, mass, 0.0), axis=-1, keepdims=True)


def _halved(xp: Any, z: Array, target: Array) -> tuple[Array, Array]:
    # XLA sorts slowly on a CPU; forty sums, each over the whole row, take a tenth of the time.
    mass = xp.exp(z)
    bits = xp.finfo(z.dtype).bits
    low, high = xp.full_like(target, -110.0 if bits == 32 else -750.0), xp.ones_like(target)
    for _ in range(_STEPS[bits]):
        middle = (low + high) / 2
        reached = xp.sum(xp.where(z >= middle, mass, 0.0), axis=-1, keepdims=True) >= target
        low, high = xp.where(reached, middle, low), xp.where(reached, high, middle)
    end = xp.max(xp.where(z < high, z, -xp.inf), axis=-1, keepdims=True)
    return end, xp.sum(xp.where(z > end, mass, 0.0), axis=-1, keepdims=True)


def _refuse_lazy(name: str) -> None:
    if name == "dask":
        msg = "Dask cannot order rows lazily, as top_k and top_p need: compute the logits first, logits.compute()"
        raise NotImplementedError(msg)
