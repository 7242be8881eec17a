"""Statistics of a part of a row, that merge to those of the whole: a maximum, and what is at it and below it.

For the entries x of a part, with m = max x, they are m, the number of entries at m, and Σ exp((x - m) / T) over the
others. Kept apart, the others are not lost beside the maximum. Of two parts the lower one is scaled down to the maximum
of both. Source: M. Milakov and N. Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867, 2018.

A maximum is a constant for derivatives: its entries move through the number of them, which is Σ exp((x - m) / T), too.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from polysoftmax._formula import RowFormula
from polysoftmax._softmax import finite, nonzero, scores_below

if TYPE_CHECKING:
    from polysoftmax._arrays import Array
    from polysoftmax._ops import Ops
    from polysoftmax._softmax import Maybe, Temperature

INF = math.inf


def partial_of_rows(ops: Ops, x: Array, t: Temperature, where: Maybe) -> tuple[Array, Array, Array]:
    """The maximum of every row, the number of entries at it, and Σ exp((x - max) / T) over the others."""
    x = ops.where(where, x, -INF)
    top = ops.max(x)
    at_top, regular = x == top, ops.isfinite(top)
    if where is not None:
        at_top = at_top & where
    terms = ops.exp(scores_below(ops, ops.where(regular, x, 0.0), finite(ops, top), t))
    return top, ops.sum(ops.where(at_top, terms, 0.0)), ops.sum(ops.where(at_top | ~regular, 0.0, terms))


def merged(
    ops: Ops, top: Array, count: Array, rest: Array, top_b: Array, count_b: Array, rest_b: Array, t: Temperature
) -> tuple[Array, Array, Array]:
    both = ops.constant(ops.maximum(top, top_b))
    count, rest = lowered(ops, top, count, rest, both, t)
    count_b, rest_b = lowered(ops, top_b, count_b, rest_b, both, t)
    return both, count + count_b, rest + rest_b


def lowered(ops: Ops, top: Array, count: Array, rest: Array, both: Array, t: Temperature) -> tuple[Array, Array]:
    """What a part has at the maximum of both, which it may not reach, and below it."""
    at_top, regular = top == both, ops.isfinite(both)
    scale = ops.exp(scores_below(ops, ops.where(regular, ops.constant(top), 0.0), finite(ops, both), t))
    lower = ops.where(regular, (count + rest) * scale, 0.0)
    return ops.where(at_top, count, 0.0), ops.where(at_top, rest, lower)


def log_total(ops: Ops, count: Array, rest: Array) -> Array:
    """log Σ exp((x - max) / T), -inf of nothing."""
    is_reached = count > 0
    most = ops.where(is_reached, count, ops.where(rest > 0, rest, 1.0))
    y = ops.log(most) + ops.log1p(ops.where(is_reached, rest, 0.0) / most)
    return ops.where(is_reached | (rest > 0), y, -INF)


def logsumexp_of_partial(ops: Ops, top: Array, count: Array, rest: Array, t: Temperature) -> Array:
    """log Σ exp(x / T)."""
    scaled = top if t is None else top / t if isinstance(t, float) else ops.divide(top, t)
    y = scaled + ops.where(ops.isfinite(top), log_total(ops, count, rest), 0.0)
    return y if t is None or isinstance(t, float) else ops.nan_unless(t >= 0, y, t)


def softmax_of_partial(
    ops: Ops, x: Array, top: Array, count: Array, rest: Array, t: Temperature, where: Maybe
) -> Array:
    """exp((x - max) / T) / Σ exp((x - max) / T)."""
    y = ops.nan_unless(top < INF, ops.exp(scores_below(ops, x, top, t)) / nonzero(ops, count + rest), count)
    return ops.where(where, ops.where(is_empty(top, count), 0.0, y), 0.0)


def log_prob_of_partial(
    ops: Ops, x: Array, top: Array, count: Array, rest: Array, t: Temperature, where: Maybe
) -> Array:
    """(x - max) / T - log Σ exp((x - max) / T)."""
    y = ops.nan_unless(top < INF, scores_below(ops, x, top, t) - log_total(ops, count, rest), count)
    return ops.where(where, ops.where(is_empty(top, count), -INF, y), -INF)


def is_empty(top: Array, count: Array) -> Array:
    """Which rows have no entries."""
    return (top == -INF) & (count == 0)


def merged_outputs(ops: Ops, out_a: Array, a: Array, out_b: Array, b: Array) -> tuple[Array, Array]:
    """log(exp(a) + exp(b)), and the mean of two outputs, weighted with exp(a) and exp(b)."""
    top = ops.constant(ops.maximum(a, b))
    weights = [ops.exp(ops.where(ops.isfinite(top), one - finite(ops, top), -INF)) for one in (a, b)]
    total = nonzero(ops, weights[0] + weights[1])
    shares = [weight / total for weight in weights]
    # What weighs nothing may be anything: attention to no key is 0/0.
    parts = [ops.where(share > 0, out, 0.0) * share for share, out in zip(shares, (out_a, out_b), strict=True)]
    return top + ops.log(total), ops.nan_unless(top < INF, parts[0] + parts[1], total)


PARTIAL = RowFormula("partial", partial_of_rows)
MERGE = RowFormula("merge", merged)
LOGSUMEXP_OF_PARTIAL = RowFormula("logsumexp of a partial", logsumexp_of_partial)
SOFTMAX_OF_PARTIAL = RowFormula("softmax of a partial", softmax_of_partial)
LOG_PROB_OF_PARTIAL = RowFormula("log_prob of a partial", log_prob_of_partial)
MERGE_OUTPUTS = RowFormula("merge_outputs", merged_outputs)
