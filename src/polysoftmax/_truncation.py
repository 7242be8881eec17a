"""top-k, top-p and min-p: which tokens survive.

Tokens are ordered by logit, then by index, and each filter keeps a prefix of that order: all above a threshold, and the
first few of the entries equal to it. All of this is along the last axis.
"""

from __future__ import annotations

import math
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple

from polysoftmax._formula import RowFormula
from polysoftmax._softmax import scores_below

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax._arrays import Array
    from polysoftmax._ops import Ops
    from polysoftmax._softmax import Maybe, Temperature

INF = math.inf


class Filters(NamedTuple):
    """The filters of a call, the last operands of its formula; None where one is off."""

    k: Array | None
    """The number of tokens of each row; a number for all rows is the option ``top_k``, which else bounds it."""
    p: Array | float | None
    min_p: Array | float | None


def truncated(
    ops: Ops, x: Array, t: Temperature, where: Maybe, *filters: Array | float | None, top_k: int | None
) -> Array:
    """x with -inf for what the filters remove, and NaN for a row that has no answer."""
    x = ops.where(where, x, -INF)
    top = ops.max(x)
    k, p, min_p = kept = Filters(*filters)
    if has_mass(kept) and top_k is not None and are_few(top_k, x.shape[-1]):
        few, index = leading_of(ops, ops.constant(x), top_k)
        _, end, last = filtered_few(ops, first_of(ops, few, k), index, t, kept)
        left = ops.where(is_up_to(x, ops.indices(x), end, last), x, -INF)
    else:
        left = filtered(ops, x, top, t, kept, top_k)
    answered = top < INF
    for bound, upper in ((k, INF), (p, 1.0), (min_p, 1.0), (t, INF)):
        if bound is not None and not isinstance(bound, float):
            answered = answered & (bound >= 0)  # False for NaN
            answered = answered if upper == INF else answered & (bound <= upper)
    return ops.nan_unless(answered, left, top)


def filtered(ops: Ops, x: Array, top: Array, t: Temperature, filters: Filters, top_k: int | None) -> Array:
    """x with -inf for what the filters remove, each from what the one before left."""
    k, p, min_p = filters
    if k is not None:
        x = ops.where((k == 0) | is_up_to_rank(ops, x, rank_of(ops, k, x.shape[-1], top), top_k), x, -INF)
    elif top_k is not None:
        x = ops.where(is_among_greatest(ops, x, top_k), x, -INF)

    def mass_of(entries: Array) -> Array:
        return ops.exp(scores_below(ops, entries, top, t))

    if p is not None:
        # In the compute dtype, which the whole mass may be wider than. A number has been rounded to it, except where
        # torch.compile has a symbol for it, with which it simplifies that arithmetic away.
        share = p * ops.ones_like(top)
        inside = is_in_prefix(ops, x, mass_of, lambda total: share * total)
        x = ops.where(inside if isinstance(p, float) else inside | (p >= 1), x, -INF)
    if min_p is not None:
        x = ops.where(mass_of(x) >= min_p, x, -INF)
    return x


def has_mass(filters: Filters) -> bool:
    """Whether a filter goes by probabilities, and not by order alone."""
    return filters.p is not None or filters.min_p is not None


def are_few(top_k: int, n: int) -> bool:
    """Whether top_k of n tokens are so few that they are gathered, and each is compared with each other."""
    return 2 * top_k**2 <= n


def leading_of(ops: Ops, x: Array, top_k: int) -> tuple[Array, Array]:
    """The top_k greatest logits of every row, and their indices, which increase."""
    index = ops.top_k_indices(x, top_k)
    return ops.take(x, index), ops.astype(index, ops.int32)


def filtered_few(ops: Ops, x: Array, index: Array, t: Temperature, filters: Filters) -> tuple[Array, Array, Array]:
    """What top_p and min_p leave of the few tokens that top_k left, the least logit of it, and its last index.

    `truncated` and the draw both ask here, because a sum in another order could end at another token.
    """
    left = truncated(ops, x, t, None, None, filters.p, filters.min_p, top_k=None)
    end = ops.min(ops.where(left > -INF, left, INF))
    last = ops.max(ops.where(left == end, index, -1))
    # Exponentials grow with the logits only up to rounding, so min_p may leave a gap, which a prefix has not. What is
    # NaN, because the row has no answer, stays.
    return ops.where(is_up_to(x, index, end, last), x, left), end, last


def is_up_to(x: Array, index: Array, end: Array, last: Array) -> Array:
    """Which entries come before a last one in order, or are it."""
    return (x > end) | ((x == end) & (index <= last))


def is_among_greatest(ops: Ops, x: Array, k: int) -> Array:
    """Which entries are the k greatest, the lowest indices among equals."""
    return is_among_first(ops, x, ops.kth_greatest(x, k), k)


def is_up_to_rank(ops: Ops, x: Array, rank: Array, greatest: int | None) -> Array:
    """Which entries have a rank up to that of their row, where no row's is above ``greatest``."""
    return is_among_first(ops, x, ops.ranked(x, rank, greatest), rank)


def is_among_first(ops: Ops, x: Array, least: Array, count: Array | int) -> Array:
    """Which entries are the first ``count`` in order, of which ``least`` is the last value."""
    above = x > least
    return above | ops.keep_first(x == least, count - ops.count(above))


def rank_of(ops: Ops, k: Array, n: int, like: Array) -> Array:
    """The rank of the last of the k greatest of n entries of every row, from 1 to n; ``like`` has a number a row."""
    inside = ops.where((k >= 1) & (k < n), k, 1)
    whole = -ops.floor(-inside) if ops.is_floating(k) else inside
    rank = ops.where(k < n, ops.astype(whole, ops.index_dtype), n)
    return ops.broadcast_like(rank, like)


def first_of(ops: Ops, few: Array, k: Maybe) -> Array:
    """The k greatest of a few logits, with -inf in place of the others."""
    if k is None:
        return few
    rank = rank_of(ops, k, few.shape[-1], ops.part(few, 0, 1))
    return ops.where(is_up_to_rank(ops, few, rank, None), few, -INF)


def is_in_prefix(ops: Ops, x: Array, mass_of: Callable[[Array], Array], target_of: Callable[[Array], Array]) -> Array:
    """Which entries belong to the shortest prefix whose mass reaches the target, the crossing one included."""
    end, room = ops.end_of_prefix(x, mass_of, target_of)
    return (x > end) | ops.keep_first(x == end, room)


def on_last_axis(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function of rows along the last axis one of rows along any."""

    @wraps(function)
    def on_any(ops: Ops, x: Array, *operands: Array | float | None, **options: Any) -> Any:
        axis, last = ops.axis, ops.along(-1)
        if axis in (-1, x.ndim - 1):
            return function(last, x, *operands, **options)
        moved = (ops.moveaxis(one, axis, -1) if has_axes(one) else one for one in (x, *operands))
        y = function(last, *moved, **options)
        return tuple(ops.moveaxis(one, -1, axis) for one in y) if isinstance(y, tuple) else ops.moveaxis(y, -1, axis)

    return on_any


def has_axes(operand: Array | float | None) -> bool:
    """Whether an operand has axes, and is not a number for all rows."""
    return operand is not None and not isinstance(operand, float) and operand.ndim > 0


def pull_truncated(
    ops: Ops, operands: tuple[Any, ...], y: Array, g: Array, wanted: tuple[bool, ...], **options: Any
) -> tuple[Maybe, ...]:
    """What survives moves with its logit; the filters are constants."""
    del options
    others = (ops.zeros_like(one) if asked else None for one, asked in zip(operands[1:], wanted[1:], strict=True))
    return ops.where(y > -INF, g, 0.0), *others


# With a rule PyTorch's engine runs the kernel for logits that need a gradient, too, and a draw from these runs it.
TRUNCATE = RowFormula("truncate", on_last_axis(truncated), vjp=pull_truncated, keeps="answer")
