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
    log_of_sum,
    nonzero,
    others,
    pull_scores,
    push_scores,
    scores,
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
    top = ops.max(x)
    if ops.is_floating(targets) or is_on(label_smoothing):
        x = ops.cast(x, top.dtype)  # the target probabilities take its dtype
        log_total = log_of_sum(ops, x, top, None)
        c = smoothed(ops, x, targets, label_smoothing)
        y = ops.sum(weighted(ops, c if weight is None else c * weight, log_total - ops.below(x, top)))
    else:
        known, index = classes(ops, x, targets)
        distance = -ops.below(ops.take(x, index), top)
        log_total = log_of_sum(ops, x, top, distance < 1.0)  # NaN below an infinite maximum, and so is the loss
        nll = log_total + distance
        y = nll if weight is None else weighted(ops, weight_of(ops, x, weight, index), nll)
        y = ops.nan_unless(known, y, log_total)
    if is_on(z_loss):
        y = y + z_loss * (top + log_total) ** 2
    return ops.where(counts, y, 0.0)


def is_on(option: float | Array) -> bool:
    """Whether an option is not 0; one whose value is left open is not."""
    return not isinstance(option, float) or option != 0.0


def counting(ops: Ops, x: Array, targets: Array, ignore_index: int | None) -> tuple[Maybe, Array, Array]:
    """Which rows count (None: all), and logits and targets of 0 for those that do not, whose slopes might be NaN."""
    if ignore_index is None:
        return None, x, targets
    counts = targets != ignore_index
    return counts, ops.where(counts, x, 0.0), ops.where(counts, targets, 0)


def classes(ops: Ops, x: Array, targets: Array) -> tuple[Array, Array]:
    """Which targets are classes, and those classes, 0 elsewhere."""
    known = (targets >= 0) & (targets < x.shape[ops.axis])
    return known, ops.where(known, targets, 0)


def weight_of(ops: Ops, x: Array, weight: Array, index: Array) -> Array:
    return ops.take(ops.broadcast_to(weight, x.shape), index)


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


def slope_of_class(ops: Ops, p: Array, total: Array, targets: Array, weight: Maybe) -> Array:
    """p·Σ c - c where each row has one class, and so without an array of c."""
    known, index = classes(ops, p, targets)
    slope = ops.where(ops.indices(p, targets.dtype) == targets, p - 1.0, p)
    if weight is not None:
        slope = slope * weight_of(ops, p, weight, index)
    return ops.nan_unless(known, slope, total)


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
    top = ops.max(x)
    distance = ops.below(x, top)
    terms = ops.exp(distance)
    total = ops.sum(terms)
    p = terms / total
    if ops.is_floating(targets) or is_on(label_smoothing) or wanted[2]:
        q = smoothed(ops, x, targets, label_smoothing)
        c = q if weight is None else q * weight
        slope = p * ops.sum(c) - c
    else:
        slope = slope_of_class(ops, p, total, targets, weight)
    if is_on(z_loss):
        slope = slope + 2.0 * z_loss * (top + ops.log(total)) * p
    slopes: list[Maybe] = [slope, None, None]
    if wanted[1] or wanted[2]:
        nll = ops.where(x == -INF, 0.0, ops.log(total) - distance)
        slopes[1] = (1.0 - label_smoothing) * (nll if weight is None else nll * weight)
        slopes[2] = q * nll
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
    log_total = ops.apply_where(total < 1.25, log1p_of_other_terms, (terms,), ops.log(total))
    # Both terms are at least 0, so nothing cancels.
    return ops.where(ops.any(where), log_total - ops.sum(p * ops.where(p != 0, z, 0.0)), 0.0)


def log1p_of_other_terms(ops: Ops, terms: Array) -> Array:
    """log Σ terms where one term is 1 and the others add up to less than 1/4."""
    return ops.log1p(ops.sum(others(ops, terms)))


def slope_of_entropy(ops: Ops, x: Array, t: Temperature, where: Maybe, y: Array) -> tuple[Array, Array]:
    """The gradient of the entropy for z, and which entries it moves with."""
    log_p = LOG_SOFTMAX.function(ops, x, t, where)
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


def log_ratios(ops: Ops, x: Array, other: Array, t: Temperature, where: Maybe) -> tuple[Array, Array, Array]:
    """p, q, and log p - log q where p is not 0."""
    log_p = LOG_SOFTMAX.function(ops, x, t, where)
    log_q = LOG_SOFTMAX.function(ops, other, t, where)
    p = ops.exp(log_p)
    alive = p != 0
    return p, ops.exp(log_q), ops.where(alive, log_p, 0.0) - ops.where(alive, log_q, 0.0)


def divergence_of_rows(ops: Ops, x: Array, other: Array, t: Temperature, where: Maybe) -> Array:
    p, _, ratio = log_ratios(ops, x, other, t, where)
    return ops.sum(p * ratio)


def push_divergence(ops: Ops, operands: tuple[Any, ...], tangents: tuple[Maybe, ...], y: Array) -> Array:
    x, other, t, where = operands
    dx, dother, dt = tangents[:3]
    p, q, ratio = log_ratios(ops, *operands)
    dx = None if dx is None else ops.where(p != 0, dx, 0.0)
    dother = None if dother is None else ops.where((p != 0) | (q != 0), dother, 0.0)
    dz_p, dz_q = push_scores(ops, x, t, where, dx, dt), push_scores(ops, other, t, where, dother, dt)
    return ops.sum(p * (ratio - y) * dz_p + (q - p) * dz_q)


def pull_divergence(
    ops: Ops, operands: tuple[Any, ...], y: Array, g: Array, wanted: tuple[bool, ...]
) -> tuple[Maybe, ...]:
    x, other, t, where = operands
    p, q, ratio = log_ratios(ops, *operands)
    gx, gt_p = pull_scores(ops, p * (ratio - y) * g, x, t, where, (True, wanted[2]))
    gother, gt_q = pull_scores(ops, (q - p) * g, other, t, where, (True, wanted[2]))
    return gx, gother, None if gt_p is None or gt_q is None else gt_p + gt_q


KL_DIVERGENCE = RowFormula("kl_divergence", divergence_of_rows, push_divergence, pull_divergence)
