"""cross_entropy, entropy and kl_divergence, and their derivatives.

As in ``_softmax.py``, z are the scores of logits, p and q probabilities, g a cotangent. The negative log-likelihood of
a class is ``log Σ exp(x - max) + (max - x_c)``: the maximum never meets the logarithm, so a loss close to 0 keeps its
digits.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from polysoftmax._formula import RowFormula
from polysoftmax._softmax import (
    LOG_SOFTMAX,
    OUTWEIGHED,
    log_of_sum,
    nonzero,
    pull_scores,
    push_scores,
    scores,
    sum_of_others,
)

if TYPE_CHECKING:
    from polysoftmax._arrays import Array
    from polysoftmax._ops import Ops
    from polysoftmax._softmax import Maybe, Temperature

INF = math.inf


# cross_entropy: y = Σ c·nll + z_loss·logsumexp², with c = (1 - ε)·w·target + ε·w / C';
# dy = Σ (p·Σ c - c + 2·z_loss·logsumexp·p)·dx


def loss_of_rows(
    ops: Ops,
    x: Array,
    targets: Array,
    weight: Maybe,
    *,
    ignore_index: int | None,
    label_smoothing: float,
    z_loss: float,
) -> Array:
    counts, x, targets = counting(ops, x, targets, ignore_index)
    top, terms, total = terms_of(ops, x)
    if ops.is_floating(targets) or is_on(label_smoothing):
        log_total = log_of_sum(ops, terms, total, (x, None, None))
        x = ops.cast(x, top.dtype)  # the target probabilities take its dtype
        c = smoothed(ops, x, targets, label_smoothing)
        y = ops.sum(weighted(ops, c if weight is None else c * weight, log_total - ops.below(x, top)))
    else:
        known, index = classes(ops, x, targets)
        distance = -ops.below(ops.take(x, index), top)
        # NaN below an infinite maximum, and so is the loss.
        log_total = log_of_sum(ops, terms, total, (x, None, None), distance < 1.0)
        nll = log_total + distance
        y = nll if weight is None else weighted(ops, weight_of(ops, x, weight, index), nll)
        y = ops.nan_unless(known, y, log_total)
    if is_on(z_loss):
        y = y + z_loss * (top + log_total) ** 2
    return ops.where(counts, y, 0.0)


def is_on(option: float | Array) -> bool:
    """Whether an option is not 0; one whose value is left open is not."""
    return not isinstance(option, float) or option != 0.0


def terms_of(ops: Ops, x: Array) -> tuple[Array, Array, Array]:
    """The maximum, the terms exp(x - max), and their sum."""
    top = ops.max(x)
    terms = ops.exp(ops.below(x, top))
    return top, terms, nonzero(ops, ops.sum(terms))


def counting(ops: Ops, x: Array, targets: Array, ignore_index: int | None) -> tuple[Maybe, Array, Array]:
    """Which rows count (None: all), and logits and targets of 0 for those that do not, whose slopes might be NaN."""
    if ignore_index is None:
        return None, x, targets
    counts = targets != ignore_index
    return counts, ops.where(counts, x, 0.0), ops.where(counts, targets, 0)


def classes(ops: Ops, x: Array, targets: Array) -> tuple[Array, Array]:
    """Which targets are classes, and those classes, 0 elsewhere."""
    known = (targets >= 0) & (targets < ops.length(x))
    return known, ops.where(known, targets, 0)


def weight_of(ops: Ops, x: Array, weight: Array, index: Array) -> Array:
    return ops.take(ops.broadcast_like(weight, x), index)


def weighted(ops: Ops, c: Array, nll: Array) -> Array:
    """c·nll, where a class without weight adds 0 even if it is impossible."""
    return c * ops.where((c == 0) & (nll == INF), 0.0, nll)


def smoothed(ops: Ops, x: Array, targets: Array, label_smoothing: float) -> Array:
    """The target probabilities: as given or of a class, and smoothed over the possible classes."""
    ones = ops.ones_like(x)
    if ops.is_floating(targets):
        q = targets
    else:
        q = ops.where(ops.indices(x, targets.dtype) == targets, ones, 0.0)
        q = ops.nan_unless(classes(ops, x, targets)[0], q, ops.max(x))
    if is_on(label_smoothing):
        possible = ops.where(x == -INF, 0.0, ones)
        q = (1.0 - label_smoothing) * q + label_smoothing * possible / ops.sum(possible)
    return q


def slope_of_class(ops: Ops, p: Array, q: Array, total: Array, targets: Array, weight: Maybe) -> Array:
    """p·Σ c - c where each row has one class, and so without an array of c; q is 1 - p."""
    known, index = classes(ops, p, targets)
    slope = ops.where(ops.indices(p, targets.dtype) == targets, -q, p)
    if weight is not None:
        slope = slope * weight_of(ops, p, weight, index)
    return ops.nan_unless(known, slope, total)


def slope_of_classes(ops: Ops, p: Array, q: Array, sure: Array, c: Array) -> Array:
    """p·Σ c - c; that of the sure class is made of what the others have."""
    rest = ops.sum(ops.where(sure, 0.0, c))
    total = rest + ops.sum(ops.where(sure, c, 0.0))
    return ops.where(sure, p * rest - q * c, p * total - c)


def slopes_of_loss(
    ops: Ops,
    operands: tuple[Any, ...],
    wanted: tuple[bool, ...],
    *,
    ignore_index: int | None,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Maybe, ...]:
    """The gradients of each row's loss for its logits, its target probabilities and the class weights."""
    x, targets, weight = operands
    counts, x, targets = counting(ops, x, targets, ignore_index)
    top, terms, total = terms_of(ops, x)
    rows = (x, None, None)
    p, outweighs = terms / total, total < OUTWEIGHED
    sure = outweighs & (terms == 1.0)
    q = ops.where(sure, ops.apply_where(outweighs, sum_of_others, rows, total) / total, 1.0 - p)
    log_total = log_of_sum(ops, terms, total, rows) if is_on(z_loss) or wanted[1] or wanted[2] else None
    if ops.is_floating(targets) or is_on(label_smoothing) or wanted[2]:
        target = smoothed(ops, x, targets, label_smoothing)
        slope = slope_of_classes(ops, p, q, sure, target if weight is None else target * weight)
    else:
        slope = slope_of_class(ops, p, q, total, targets, weight)
    if is_on(z_loss):
        slope = slope + 2.0 * z_loss * (top + log_total) * p
    slopes: list[Maybe] = [slope, None, None]
    if wanted[1] or wanted[2]:
        nll = ops.where(x == -INF, 0.0, log_total - ops.below(x, top))
        slopes[1] = (1.0 - label_smoothing) * (nll if weight is None else nll * weight)
        slopes[2] = target * nll
    return tuple(None if one is None else ops.where(counts, one, 0.0) for one in slopes)


def push_loss(ops: Ops, operands: tuple[Any, ...], tangents: tuple[Maybe, ...], y: Array, **options: Any) -> Array:
    del y
    slopes = slopes_of_loss(ops, operands, tuple(one is not None for one in tangents), **options)
    # At the minimum the slope is 0 but its derivative is not, so mask by existence.
    exists = operands[0] > -INF
    if options["ignore_index"] is not None:
        exists = exists & (operands[1] != options["ignore_index"])
    moves = [
        slope * ops.where(exists | (slope != 0), tangent, 0.0)
        for slope, tangent in zip(slopes, tangents, strict=True)
        if slope is not None and tangent is not None
    ]
    return ops.sum(sum(moves[1:], moves[0]))


def pull_loss(
    ops: Ops, operands: tuple[Any, ...], y: Array, g: Array, wanted: tuple[bool, ...], **options: Any
) -> tuple[Maybe, ...]:
    del y
    return tuple(None if one is None else one * g for one in slopes_of_loss(ops, operands, wanted, **options))


CROSS_ENTROPY = RowFormula(
    "cross_entropy", loss_of_rows, push_loss, pull_loss, numbers=("ignore_index", "label_smoothing", "z_loss")
)


# entropy: y = -Σ p·log p = log Σ exp(z) - Σ p·z;  dy = -Σ p·(log p + y)·dz


def entropy_of_rows(ops: Ops, x: Array, t: Temperature, where: Maybe) -> Array:
    z = scores(ops, x, t, where)
    terms = ops.exp(z)
    total = nonzero(ops, ops.sum(terms))
    p = terms / total
    # Both are at least 0, so nothing cancels.
    y = log_of_sum(ops, terms, total, (x, t, where)) - ops.sum(p * ops.where(p != 0, z, 0.0))
    return ops.where(ops.any(where), y, 0.0)


def slope_of_entropy(ops: Ops, x: Array, t: Temperature, where: Maybe, y: Array) -> tuple[Array, Array]:
    """The gradient of the entropy for z, and which entries it moves with."""
    log_p = ops.call(LOG_SOFTMAX, x, t, where)
    p = ops.exp(log_p)
    return -p * (ops.where(p != 0, log_p, 0.0) + y), p != 0


def push_entropy(ops: Ops, operands: tuple[Any, ...], tangents: tuple[Maybe, ...], y: Array) -> Array:
    x, t, where = operands
    slope, exists = slope_of_entropy(ops, x, t, where, y)
    dx, dt = tangents[:2]
    dx = None if dx is None else ops.where(exists, dx, 0.0)
    return ops.sum(slope * push_scores(ops, x, t, where, dx, dt))


def pull_entropy(
    ops: Ops, operands: tuple[Any, ...], y: Array, g: Array, wanted: tuple[bool, ...]
) -> tuple[Maybe, Maybe]:
    x, t, where = operands
    return pull_scores(ops, slope_of_entropy(ops, x, t, where, y)[0] * g, x, t, where, wanted)


ENTROPY = RowFormula("entropy", entropy_of_rows, push_entropy, pull_entropy)


# kl_divergence: y = Σ p·(log p - log q);  dy = Σ p·(log p - log q - y)·dz_p + Σ (q - p)·dz_q


def log_ratios(ops: Ops, x: Array, other: Array, t: Temperature, where: Maybe) -> tuple[Array, Array, Array, Array]:
    """p, q, q - p, and log p - log q where p is not 0."""
    log_p = ops.call(LOG_SOFTMAX, x, t, where)
    log_q = ops.call(LOG_SOFTMAX, other, t, where)
    p, q = ops.exp(log_p), ops.exp(log_q)
    alive = p != 0
    # Of a class that is sure, 1 - p and 1 - q have more digits than p and q.
    difference = ops.where(p > 0.5, ops.expm1(log_q) - ops.expm1(log_p), q - p)
    return p, q, difference, ops.where(alive, log_p, 0.0) - ops.where(alive, log_q, 0.0)


def divergence_of_rows(ops: Ops, x: Array, other: Array, t: Temperature, where: Maybe) -> Array:
    """Σ p·r + q - p with r = log p - log q: p and q have the same sum, and no term is negative."""
    p, _, difference, ratio = log_ratios(ops, x, other, t, where)
    near = (ops.abs(ratio) < 0.5) & (p != 0)
    terms = ops.where(near, p * excess(ops, ops.where(near, ratio, 0.0)), difference + p * ratio)
    return ops.sum(ops.where(terms < 0, 0.0, terms))


def excess(ops: Ops, r: Array) -> Array:
    """exp(-r) - 1 + r for r between -1/2 and 1/2: what is left of its series, r²/2 and less."""
    factor = ops.ones_like(r)
    for k in range(_TERMS, 2, -1):
        factor = 1.0 - factor * r / k
    return 0.5 * r * r * factor


_TERMS = 15
"""Terms that the series needs for a double."""


def push_divergence(ops: Ops, operands: tuple[Any, ...], tangents: tuple[Maybe, ...], y: Array) -> Array:
    x, other, t, where = operands
    dx, dother, dt = tangents[:3]
    p, q, difference, ratio = log_ratios(ops, *operands)
    dx = None if dx is None else ops.where(p != 0, dx, 0.0)
    dother = None if dother is None else ops.where((p != 0) | (q != 0), dother, 0.0)
    dz_p, dz_q = push_scores(ops, x, t, where, dx, dt), push_scores(ops, other, t, where, dother, dt)
    return ops.sum(p * (ratio - y) * dz_p + difference * dz_q)


def pull_divergence(
    ops: Ops, operands: tuple[Any, ...], y: Array, g: Array, wanted: tuple[bool, ...]
) -> tuple[Maybe, ...]:
    x, other, t, where = operands
    p, _, difference, ratio = log_ratios(ops, *operands)
    gx, gt_p = pull_scores(ops, p * (ratio - y) * g, x, t, where, (True, wanted[2]))
    gother, gt_q = pull_scores(ops, difference * g, other, t, where, (True, wanted[2]))
    return gx, gother, None if gt_p is None or gt_q is None else gt_p + gt_q


KL_DIVERGENCE = RowFormula("kl_divergence", divergence_of_rows, push_divergence, pull_divergence)
