"""The log-probability of given tokens, under the distribution that a draw with the same options is from.

It is that of `log_softmax` after `truncate`, and a draw's own is found here, too: there is no other way to it, so a
trainer and a server that ask for the same token get the same bits. A row may have several tokens, side by side.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from polysoftmax._formula import RowFormula
from polysoftmax._losses import classes
from polysoftmax._sampling import has_token
from polysoftmax._softmax import (
    LOG_SOFTMAX,
    log_of_sum,
    nonzero,
    pull_log_softmax,
    pull_scores,
    push_log_softmax,
    push_scores,
    scores_below,
)
from polysoftmax._truncation import TRUNCATE, has_axes, on_last_axis

if TYPE_CHECKING:
    from polysoftmax._arrays import Array
    from polysoftmax._ops import Ops
    from polysoftmax._softmax import Maybe, Temperature

INF = math.inf


# log_prob: y = z_token - log Σ exp(z);  dy = dz_token - Σ p·dz


def log_prob_of_rows(
    ops: Ops,
    x: Array,
    tokens: Array,
    t: Temperature,
    where: Maybe,
    *filters: Array | float | None,
    top_k: int | None,
) -> Array:
    x = left_of(ops, x, t, where, filters, top_k)
    top = ops.where(ops.any(where), ops.max(x), 0.0)
    answered = has_token(top, t)
    x, top = ops.steady(x, answered), ops.steady(top, answered)
    terms = ops.exp(scores_below(ops, x, top, t))
    log_total = log_of_sum(ops, terms, nonzero(ops, ops.sum(terms)), (x, t, where))
    known, index = classes(ops, x, tokens)
    y = ops.nan_unless(answered, scores_below(ops, ops.take(x, index), top, t) - log_total, top)
    if where is not None:
        y = ops.where(ops.take(ops.broadcast_like(where, x), index), y, -INF)
    return ops.nan_unless(known, y, log_total)


def left_of(
    ops: Ops, x: Array, t: Temperature, where: Maybe, filters: tuple[Array | float | None, ...], top_k: int | None
) -> Array:
    """Logits with -inf for what there is not to draw from."""
    if top_k is None and all(one is None for one in filters):
        return ops.where(where, x, -INF)
    return ops.call(TRUNCATE, x, t, where, *filters, top_k=top_k)


def steady_rows(
    ops: Ops, operands: tuple[Any, ...], y: Array, top_k: int | None
) -> tuple[Array, Temperature, Maybe, Array]:
    """Logits as they are left, T, the mask, and which tokens have a slope.

    A row without one is 0 at T = 1, so that nothing in it moves.
    """
    x, _, t, where, *filters = operands
    has_slope = ops.isfinite(y)
    moves = ops.any_of(has_slope)
    left = ops.where(moves, left_of(ops, x, t, where, tuple(filters), top_k), 0.0)
    t = ops.where(moves, t, 1.0) if has_axes(t) else t
    return left, t, where, has_slope


def push_log_prob(
    ops: Ops, operands: tuple[Any, ...], tangents: tuple[Maybe, ...], y: Array, *, top_k: int | None
) -> Array:
    x, t, where, has_slope = steady_rows(ops, operands, y, top_k)
    log_p = ops.call(LOG_SOFTMAX, x, t, where)
    dx, dt = tangents[0], tangents[2]
    dx = None if dx is None else ops.where(log_p > -INF, dx, 0.0)
    dlog_p = push_log_softmax(ops, log_p, push_scores(ops, x, t, where, dx, dt), where)
    return ops.where(has_slope, ops.take(dlog_p, classes(ops, x, operands[1])[1]), 0.0)


def pull_log_prob(
    ops: Ops, operands: tuple[Any, ...], y: Array, g: Array, wanted: tuple[bool, ...], *, top_k: int | None
) -> tuple[Maybe, ...]:
    x, t, where, has_slope = steady_rows(ops, operands, y, top_k)
    g = at_tokens(ops, x, operands[1], ops.where(has_slope, g, 0.0))
    gz = pull_log_softmax(ops, ops.call(LOG_SOFTMAX, x, t, where), g, where)
    gx, gt = pull_scores(ops, gz, x, t, where, (wanted[0], wanted[2]))
    # The filters are constants.
    others = (ops.zeros_like(one) if asked else None for one, asked in zip(operands[4:], wanted[4:], strict=True))
    return gx, None, gt, None, *others


def at_tokens(ops: Ops, x: Array, tokens: Array, g: Array) -> Array:
    """Σ of the g of a row's tokens, each at its token."""
    indices, count, total = ops.indices(x, tokens.dtype), tokens.shape[ops.axis], ops.zeros_like(x)
    if count == 1:
        return ops.where(indices == tokens, g, 0.0)
    for k in range(count):
        own, here = ops.part(g, k, k + 1), ops.part(tokens, k, k + 1)
        total = total + ops.where(indices == here, own, 0.0)
    return total


LOG_PROB = RowFormula("log_prob", log_prob_of_rows, push_log_prob, pull_log_prob)


# The order of the tokens: by logit, the greatest first, then by index


def ranks_of_rows(ops: Ops, x: Array, tokens: Array, where: Maybe) -> Array:
    """How many tokens stand before each of those given, -1 for one that does not exist, or in a row with NaN."""
    known, index = classes(ops, x, tokens)
    if where is not None:
        known = known & ops.take(ops.broadcast_like(where, x), index)
    x = ops.where(where, x, -INF)
    logits, indices = ops.take(x, index), ops.indices(x, index.dtype)
    ranks = []
    for k in range(tokens.shape[ops.axis]):
        logit, here = ops.part(logits, k, k + 1), ops.part(index, k, k + 1)
        before = (x > logit) | ((x == logit) & (indices < here))
        ranks.append(ops.count(before if where is None else before & where))
    return ops.where(known & ~ops.any_of(x != x), ops.side_by_side(ranks), -1)


def leading_of_rows(ops: Ops, x: Array, where: Maybe, *, count: int) -> Array:
    """How the first tokens of every row are numbered, in order; -1 in a row that has no answer."""
    x = ops.where(where, x, -INF)
    index = ops.top_k_indices(x, count)
    index = ops.take(index, ops.descending_indices(ops.take(x, index)))
    return ops.where(ops.max(x) < INF, ops.astype(index, ops.index_dtype), -1)


RANKS = RowFormula("rank of tokens", ranks_of_rows)
TOP_LOG_PROBS = RowFormula("top_log_probs", on_last_axis(leading_of_rows))
"""The tokens of top_log_probs; their log-probabilities are those of log_prob."""
