"""NumPy: native kernels, and formulas as they stand where there is no library of them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from polysoftmax._arrays import library
from polysoftmax._linear import Heads
from polysoftmax._ops import Ops, ops_of
from polysoftmax.engines import chosen, native

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax._arrays import Array, DType
    from polysoftmax._formula import Call, RowFormula
    from polysoftmax._linear import Head

_GROUP = 64
"""Entries that are looked at together: they are passed over unless their maximum may be among the greatest."""


class NumpyOps(Ops):
    """The words of NumPy: arrays can be looked at, and only sums along the contiguous axis are accurate."""

    def max(self, x: Array) -> Array:
        return np.maximum.reduce(x, self.axis, None, None, True)  # type: ignore[call-overload]  # half the call overhead of max

    def sum(self, x: Array) -> Array:
        if x.strides[self.axis] == min(x.strides, key=abs):
            return np.add.reduce(x, self.axis, None, None, True)  # type: ignore[call-overload]
        return super().sum(x)

    def apply_where(
        self, mask: Array, function: Callable[..., Array], operands: tuple[Array, ...], otherwise: Array
    ) -> Array:
        return super().apply_where(mask, function, operands, otherwise) if mask.any() else otherwise

    def astype(self, x: Array, dtype: DType) -> Array:
        return x.astype(dtype)  # NumPy's function refuses the scalars that its operators make of arrays without axes

    def descending(self, x: Array) -> Array:
        # NumPy sorts arrays of 32 dimensions at most.
        return np.sort(x.reshape(-1, x.shape[-1]), axis=-1)[:, ::-1].reshape(x.shape)

    def descending_indices(self, x: Array) -> Array:
        return np.argsort(-x.reshape(-1, x.shape[-1]), axis=-1, kind="stable").reshape(x.shape)

    def sum_of_blocks(self, blocks: Array) -> Array:
        return np.einsum("...j->...", blocks)  # a sum has a cost of its own for each of many short blocks

    def kth_greatest(self, x: Array, k: int) -> Array:
        last = x.shape[-1] - k
        ordered = np.partition(x.reshape(-1, x.shape[-1]), last, axis=-1)
        return ordered[:, last].reshape(*x.shape[:-1], 1)

    def top_k_indices(self, x: Array, k: int) -> Array:
        batch, n = x.shape[:-1], x.shape[-1]
        x = x.reshape(-1, n)
        groups = n // _GROUP
        if groups <= 2 * k:
            return self._by_partition(x, k).reshape(*batch, k)
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
        return np.take_along_axis(indices, self._by_partition(values, k), axis=-1).reshape(*batch, k)

    def _by_partition(self, x: Array, k: int) -> Array:
        ordered = np.where(np.isnan(x), np.inf, x)  # a row with NaN has no answer, whatever is chosen in it
        start = x.shape[-1] - k
        least = np.partition(ordered, start, axis=-1)[:, start, None]
        above = ordered > least
        kept = above | self.keep_first(ordered == least, k - above.sum(-1, keepdims=True))
        return (np.flatnonzero(kept) % x.shape[-1]).reshape(-1, k)

    def keep_first(self, flags: Array, room: Array) -> Array:
        # Few entries are True, as a rule: they are numbered by themselves.
        place = np.flatnonzero(flags)
        row = place // flags.shape[-1]
        counts = np.bincount(row, minlength=room.size)
        number = np.arange(1, len(place) + 1) - (np.cumsum(counts) - counts)[row]
        kept = flags.copy()
        kept.reshape(-1)[place[number > room.reshape(-1)[row]]] = False
        return kept


_CLASSES = 4096
"""Rows of a weight's gradient that a product is added to at once."""


class NumpyHeads(Heads):
    """Linear heads of NumPy, whose arrays can be written to."""

    @np.errstate(all="ignore")
    def answers(self, head: Head, *arrays: Any) -> Array:
        return super().answers(head, *arrays)

    def add_product(self, total: Array, slope: Array, hidden: Array) -> Array:
        for start in range(0, total.shape[0], _CLASSES):
            part = slice(start, min(start + _CLASSES, total.shape[0]))
            total[part, ...] = super().add_product(total[part, ...], slope[:, part], hidden)
        return total


heads = NumpyHeads()


class _Memory:
    address_is = native.INDIRECT

    def kind(self, x: Array) -> Any:
        return (x.dtype, x.shape, x.strides) if isinstance(x, np.ndarray) else NotImplemented

    def strides(self, x: Array) -> tuple[int, ...]:
        return x.strides  # type: ignore[no-any-return]

    def address(self, x: Array) -> int:
        # In an array the address of its data follows what every object begins with: NumPy's C interface compiles this
        # into each extension. What NumPy offers to Python for it takes ten times as long.
        return id(x) + _HEAD

    def maker(self, shape: tuple[int, ...], dtype: DType | str) -> Callable[[], Array]:
        return partial(np.empty, shape, np.dtype(dtype))


_HEAD = object.__basicsize__
_MEMORY = _Memory()


def words(x: Array, axis: int) -> Ops:
    """Return NumPy's words for rows of ``x``; array-api-strict has those of the standard."""
    kind = NumpyOps if type(x) is np.ndarray else Ops
    return ops_of(kind, library(x).xp, axis)


def run(call: Call, operands: tuple[Array, ...]) -> Any:
    """Run a formula. NaN and inf are answers here, documented and tested, and no reason to warn."""
    if type(operands[0]) is np.ndarray and chosen() != "portable":
        y = native.run(call, operands, _MEMORY)
        if y is not NotImplemented:
            return y
    return _evaluate(call, operands)


@np.errstate(all="ignore")
def _evaluate(call: Call, operands: tuple[Array, ...]) -> Any:
    return call.evaluate(words(operands[0], call.axis), operands)


def explain(x: Array, formula: RowFormula) -> tuple[str, str]:
    """Return the engine for a formula along the last axis of ``x``, and why."""
    if type(x) is not np.ndarray:
        return "portable", "the array API formula as it stands: the array is not NumPy's own"
    return native.explain(x, formula)
