"""The words that formulas are written in: the array API's functions, and a few about rows along one axis.

A library of the standard needs nothing of its own. Where one of these words has a better way, or a trap, in some
library, a subclass in that library's engine overrides it, and formulas never know.
"""

from __future__ import annotations

import math
from functools import wraps
from typing import TYPE_CHECKING, Any, ClassVar

from polysoftmax._arrays import default_index, device_for, float_bits

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    from polysoftmax._arrays import Array, DType
    from polysoftmax._formula import RowFormula

    Standard: TypeAlias = Callable[..., Array]
    """A function of the array API, as it is."""

_SEQUENTIAL = 16
"""Terms that are left to the library's own sum, whatever its order."""

_BLOCK = 256
"""Entries that are summed together before a running sum."""


class Ops:
    """The array API of one library, for rows along one axis. What reduces a row keeps the axis, with length 1."""

    replacements: ClassVar[dict[Callable[..., Any], Callable[..., Any]]] = {}

    abs: Standard
    astype: Standard
    broadcast_to: Standard
    exp: Standard
    expand_dims: Standard
    expm1: Standard
    floor: Standard
    isfinite: Standard
    log: Standard
    log1p: Standard
    maximum: Standard
    moveaxis: Standard
    ones_like: Standard
    reshape: Standard
    squeeze: Standard
    zeros_like: Standard

    def __init_subclass__(cls) -> None:
        cls.replacements = dict(cls.replacements)

    @classmethod
    def replace(cls, piece: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register this library's own way to compute a `replaceable` piece of mathematics."""

        def register(own: Callable[..., Any]) -> Callable[..., Any]:
            cls.replacements[piece] = own
            return own

        return register

    def __init__(self, xp: Any, axis: int) -> None:
        self.xp, self.axis = xp, axis
        for name in STANDARD:
            if not hasattr(type(self), name):
                setattr(self, name, getattr(xp, name))

    def along(self, axis: int) -> Ops:
        """Return the words for rows along another axis."""
        return ops_of(type(self), self.xp, axis)

    # Reductions of a row

    def max(self, x: Array) -> Array:
        """Return the maximum of every row, as a constant."""
        return self.constant(self.xp.max(x, axis=self.axis, keepdims=True))

    def min(self, x: Array) -> Array:
        """Return the minimum of every row."""
        return self.xp.min(x, axis=self.axis, keepdims=True)

    def sum(self, x: Array) -> Array:
        """Return the sum of every row, with an error that grows with log2(n): halves are added until a few are left."""
        n = x.shape[self.axis]
        while n > _SEQUENTIAL:
            half = n // 2
            head = self.part(x, 0, half) + self.part(x, half, 2 * half)
            x = head if n == 2 * half else self.xp.concat([head, self.part(x, n - 1, n)], axis=self.axis % x.ndim)
            n = x.shape[self.axis]
        return self.xp.sum(x, axis=self.axis, keepdims=True)

    def any(self, mask: Array | None) -> Array | None:
        """Return whether a row has an entry; None where all exist."""
        return None if mask is None else self.any_of(mask)

    def any_of(self, flags: Array) -> Array:
        """Return whether a row has an entry that is True."""
        return self.xp.any(flags, axis=self.axis, keepdims=True)

    def count(self, flags: Array) -> Array:
        """Return how many entries of every row are True."""
        return self.xp.sum(self.astype(flags, self.index_dtype), axis=self.axis, keepdims=True)

    def argmax(self, x: Array) -> Array:
        """Return the index of the greatest entry of every row, the lowest among equals; any index if it has NaN."""
        return self.xp.argmax(x, axis=self.axis, keepdims=True)

    def total(self, x: Array) -> Array:
        """Return the sum of all entries, as accurate as `sum`, as an array without axes."""
        return self.xp.squeeze(self._flat_sum(x), axis=0)

    def mean(self, x: Array) -> Array:
        """Return the mean of all entries, 0 of none."""
        return self.xp.squeeze(self._flat_sum(x) / max(1, math.prod(x.shape)), axis=0)

    def _flat_sum(self, x: Array) -> Array:
        return self.along(0).sum(self.xp.reshape(x, (-1,)))

    # Entry by entry

    def where(self, mask: Array | None, x: Array, otherwise: Array | float) -> Array:
        """Return ``x`` where the mask is True; a mask of None is True everywhere."""
        return x if mask is None else self.xp.where(mask, x, otherwise)

    def apply_where(
        self, mask: Array, function: Callable[..., Array], operands: tuple[Array, ...], otherwise: Array
    ) -> Array:
        """Return ``function(ops, *operands)`` where the mask is True; an engine may see that it need not be called.

        The function stands in a module: a compiler compiles anew for every new one.
        """
        return self.xp.where(mask, function(self, *operands), otherwise)

    def nan_unless(self, answered: Array, y: Array, like: Array) -> Array:
        """Return ``y`` where it is an answer, and NaN elsewhere; ``like`` holds real numbers of each row."""
        del like
        return self.xp.where(answered, y, math.nan)

    def below(self, x: Array, top: Array) -> Array:
        """Return ``x - top`` for a bound ``top`` of every row, and exactly 0 where ``x`` is equal to it.

        A compiler may compute x anew for each use, and contract a product and the subtraction to one operation, which
        leaves the rounding of the product.
        """
        return x - top

    def cast(self, x: Array, dtype: DType) -> Array:
        """Return ``x`` in another dtype, rounded to its own before, whatever a compiler makes of it."""
        return x if x.dtype == dtype else self.astype(x, dtype)

    def is_floating(self, x: Array) -> bool:
        """Whether ``x`` holds floating numbers."""
        return float_bits(self.xp, x.dtype) > 0

    @property
    def index_dtype(self) -> DType:
        """The library's default dtype for indices."""
        return default_index(self.xp)

    @property
    def int32(self) -> DType:
        """The dtype of an index that a random word is made of."""
        return self.xp.int32

    # Derivatives: what a library does that differentiates the formula itself, and is not given its rules

    def constant(self, x: Array) -> Array:
        """Return ``x``, which is not differentiated."""
        return x

    def divide(self, x: Array, t: Array) -> Array:
        """Return ``x / t`` for a positive ``t``, whose derivative overflows only where it is itself infinite."""
        return x / t

    def steady(self, x: Array, answered: Array) -> Array:
        """Return ``x``, which is not differentiated in rows without an answer: there it may be any number."""
        del answered
        return x

    def computed_first(self, x: Array) -> Array:
        """Return ``x``, which a compiler does not compute anew within each of its uses."""
        return x

    def with_slope_of(self, y: Array, smooth: Callable[[], Array]) -> Array:
        """Return ``y``, which is differentiated as ``smooth()`` is, its equal but for rounding."""
        del smooth
        return y

    # Entries by their place in the row

    def arange(self, n: int | Array, dtype: DType, like: Array) -> Array:
        """Return the integers below ``n``, beside another array."""
        return self.xp.arange(n, dtype=dtype, device=device_for(like))

    def length(self, x: Array) -> int | Array:
        """Return the number of entries of a row; an array where that is open while a program is made."""
        return x.shape[self.axis]

    def part(self, x: Array, start: int, stop: int | None) -> Array:
        """Return the entries of every row from ``start`` to ``stop``."""
        return x[(slice(None),) * (self.axis % x.ndim) + (slice(start, stop), ...)]

    def indices(self, x: Array, dtype: DType = None) -> Array:
        """Return the indices of a row, int32 by default, laid along the axis of ``x``."""
        along = self.arange(self.length(x), dtype or self.xp.int32, x)
        axis = self.axis % x.ndim
        return self.xp.reshape(along, (1,) * axis + (-1,) + (1,) * (x.ndim - axis - 1))

    def row_numbers(self, x: Array) -> Array:
        """Return the numbers of the rows along the last axis, int32, of length 1 there."""
        batch = x.shape[:-1]
        return self.reshape(self.arange(math.prod(batch), self.xp.int32, x), (*batch, 1))

    def broadcast_like(self, x: Array, like: Array) -> Array:
        """Return ``x`` in the shape of another array."""
        return self.xp.broadcast_to(x, like.shape)

    def take(self, x: Array, index: Array) -> Array:
        """Return the entries of every row that ``index`` points at."""
        return self.xp.take_along_axis(x, index, axis=self.axis)

    def side_by_side(self, parts: list[Array]) -> Array:
        """Return arrays one after another along the rows."""
        return parts[0] if len(parts) == 1 else self.xp.concat(parts, axis=self.axis % parts[0].ndim)

    def block_of(self, x: Array, block: Array, size: int) -> tuple[Array, Array]:
        """Return a block of ``size`` entries of every row, and their indices as int32; the last entry is repeated."""
        within = self.arange(size, self.xp.int32, x)
        index = self.astype(block, self.xp.int32) * size + self.xp.reshape(within, (1,) * (x.ndim - 1) + (-1,))
        inside = self.xp.minimum(index, self.xp.full_like(index, x.shape[-1] - 1))
        return self.take(x, self.astype(inside, self.index_dtype)), index

    # Order, along the last axis alone

    def descending(self, x: Array) -> Array:
        """Return the entries of every row, the greatest first; any order if it has NaN."""
        return self.xp.sort(x, axis=-1, descending=True, stable=False)

    def descending_indices(self, x: Array) -> Array:
        """Return the indices of a few entries in descending order, the lowest first among equals."""
        return self.xp.argsort(x, axis=-1, descending=True, stable=True)

    def kth_greatest(self, x: Array, k: int) -> Array:
        """Return the k-th greatest entry of every row."""
        last = x.shape[-1] - k
        return self.xp.sort(x, axis=-1)[..., last : last + 1]

    def ranked(self, x: Array, rank: Array, greatest: int | None) -> Array:
        """Return the entry of every row that has a rank of its own, an index; 1 is that of the greatest entry.

        Where no rank is above ``greatest``, few entries need to be ordered.
        """
        del greatest
        return self.take(self.descending(x), rank - 1)

    def top_k_indices(self, x: Array, k: int) -> Array:
        """Return the indices of the k greatest entries, the lowest ones among equals, in increasing order."""
        return self.xp.sort(self.xp.argsort(x, axis=-1, descending=True, stable=True)[..., :k], axis=-1)

    def keep_first(self, flags: Array, room: Array) -> Array:
        """Keep the first ``room``, 1 or more, of the True entries of every row."""
        numbers = self.astype(flags, room.dtype)
        reached = self.running_sum(self.block_sums(numbers, _BLOCK), room.dtype)
        block, _, inside = self.find_crossing(numbers, reached, lambda entries: entries, room)
        last = block * _BLOCK + inside
        return flags & (self.indices(flags, last.dtype) <= last)

    def end_of_prefix(
        self, x: Array, mass_of: Callable[[Array], Array], target_of: Callable[[Array], Array]
    ) -> tuple[Array, Array]:
        """Return the last value of the shortest prefix of the greatest entries whose mass reaches a target.

        Beside it, how many of the entries with this value belong to the prefix: it has at least one entry. The target
        is a function of the whole mass.
        """
        ordered = self.descending(x)
        reached = self.running_sum(self.block_sums(mass_of(ordered), _BLOCK), self.xp.float64)
        target = target_of(reached[..., -1:])
        block, entries, last = self.find_crossing(ordered, reached, mass_of, target)
        end = self.take(entries, last)
        return end, self.astype(block * _BLOCK + last + 1 - self.count(ordered > end), x.dtype)

    def find_crossing(
        self, x: Array, reached: Array, mass_of: Callable[[Array], Array], target: Array
    ) -> tuple[Array, Array, Array]:
        """Return where the running sum of masses reaches a target: number of the block, its entries, the place in it.

        ``reached`` is the running sum over whole blocks, which is enough for all blocks but that one.
        """
        block = self.count(reached[..., :-1] < target)
        before = self.take(reached, self.xp.maximum(block, self.xp.ones_like(block)) - 1)
        entries, index = self.block_of(x, block, _BLOCK)
        mass = self.xp.where(index < x.shape[-1], mass_of(entries), 0)
        inside = self.xp.where(block > 0, before, 0) + self.running_sum(mass, reached.dtype)
        return block, entries, self.count(inside[..., :-1] < target)

    def running_sum(self, x: Array, dtype: DType) -> Array:
        """Return the sums of each entry and all before it."""
        return self.xp.cumulative_sum(x, axis=-1, dtype=dtype)

    def block_sums(self, terms: Array, size: int) -> Array:
        """Return the sum of every block of ``size`` entries; the last block may be shorter."""
        n = terms.shape[-1]
        whole = n // size * size
        if not whole:
            return self.sum(terms)
        blocks = self.reshape(terms[..., :whole], (*terms.shape[:-1], whole // size, size))
        sums = self.sum_of_blocks(blocks)
        return sums if n == whole else self.xp.concat([sums, self.sum(terms[..., whole:])], axis=terms.ndim - 1)

    def sum_of_blocks(self, blocks: Array) -> Array:
        """Return the sums along the last axis, which is dropped."""
        return self.sum(blocks)[..., 0]

    # Formulas that a formula is made of

    def call(self, formula: RowFormula, *operands: Any, **options: Any) -> Any:
        """Evaluate another formula; an engine may have a kernel for it."""
        return formula.function(self, *operands, **options)


STANDARD = tuple(name for name, kind in Ops.__annotations__.items() if kind == "Standard")
"""The array API functions among the words."""


def replaceable(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let an engine replace a piece of mathematics: ``JaxOps.replace(log_of_sum)(its_own)``.

    Its own way returns NotImplemented for operands that it does not cover.
    """

    @wraps(function)
    def call(ops: Ops, *operands: Any) -> Any:
        own = ops.replacements.get(call)
        if own is not None and (y := own(ops, *operands)) is not NotImplemented:
            return y
        return function(ops, *operands)

    return call


_OPS: dict[tuple[type[Ops], str, int], Ops] = {}


def ops_of(kind: type[Ops], xp: Any, axis: int) -> Ops:
    """Return the words of a library for rows along an axis, made once."""
    key = (kind, xp.__name__, axis)
    found = _OPS.get(key)
    if found is None:
        found = _OPS[key] = kind(xp, axis)
    return found
