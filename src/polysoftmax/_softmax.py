"""softmax, log_softmax, logsumexp and their derivatives: the whole idea.

x are rows of logits, T the temperature, z = (x - max) / T their scores, y the answer, p the probabilities, g a
cotangent. ``where`` says which entries exist, None that all do. The maximum is a constant: the answer does not depend
on it.

Source: P. Blanchard, D. J. Higham and N. J. Higham, "Accurately computing the log-sum-exp and softmax functions",
IMA Journal of Numerical Analysis 41(4), 2021.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from polysoftmax._arrays import least_normal
from polysoftmax._formula import RowFormula
from polysoftmax._ops import replaceable

if TYPE_CHECKING:
    from typing import TypeAlias

    from polysoftmax._arrays import Array
    from polysoftmax._ops import Ops

    Maybe: TypeAlias = Array | None
    Temperature: TypeAlias = Array | float | None
    """One number a row, one for all, or None for 1."""

INF = math.inf

OUTWEIGHED = 1.25
"""A sum of terms, of which the greatest is 1, below which that one outweighs the others by far."""


# Scores: all that the softmax sees of its logits


def scores(ops: Ops, x: Array, t: Temperature, where: Maybe) -> Array:
    """z = (x - max) / T, -inf for what does not exist."""
    x = ops.where(where, x, -INF)
    top = ops.where(ops.any(where), ops.max(x), 0.0)  # a row of -inf is NaN, one without entries is not
    return scores_below(ops, x, top, t)


def scores_below(ops: Ops, x: Array, top: Array, t: Temperature) -> Array:
    """(x - top) / T below a bound of every row. At T = 0 only what is at it is left, at inf all that is not -inf.

    Above T = 1 halves are subtracted, and divided by half of T, which is exact: a difference may overflow where its
    quotient does not.
    """
    if t is None:
        return ops.below(x, top)
    if isinstance(t, float):
        return ops.below(0.5 * x, 0.5 * top) / (0.5 * t) if t > 1.0 else ops.below(x, top) / t
    x = ops.cast(x, top.dtype)
    half = ops.where(t > 1.0, 0.5 * ops.ones_like(t), 1.0)
    d = ops.below(half * x, half * top)
    regular, impossible = is_regular(t), d == -INF
    divisor = ops.where(regular, half * t, 1.0)
    z = ops.divide(ops.where(impossible, 0.0, d), divisor)
    limit = ops.where(is_zero(t) & (d < 0), -INF, 0.0 * z)  # 0·NaN is NaN
    z = ops.where(regular, z, limit)
    # -inf / T moves with its logit alone: the derivative in T would be 0·inf.
    z = ops.where(impossible, ops.where(regular, d / ops.constant(divisor), -INF), z)
    return ops.nan_unless(t >= 0, z, t)


def over_temperature(ops: Ops, tangent: Array, t: Temperature) -> Array:
    """tangent / T, and 0 at T = 0 and inf, where nothing moves but NaN stays."""
    if t is None or isinstance(t, float):
        return tangent if t is None else tangent / t
    limit = (t >= 0) & ~is_regular(t)
    divisor = ops.nan_unless(t >= 0, ops.where(limit, 1.0, t), t)
    return ops.where(limit, 0.0 * tangent, ops.divide(tangent, divisor))


def is_regular(t: Array) -> Array:
    """Whether a temperature divides, and is not one of the limits."""
    return (t >= least_normal(t)) & (t < INF)


def is_zero(t: Array) -> Array:
    """Whether a temperature counts as 0: below the normal numbers, which compilers and processors may flush to 0."""
    return t < least_normal(t)


def push_scores(ops: Ops, x: Array, t: Temperature, where: Maybe, dx: Maybe, dt: Maybe) -> Array:
    """dz = (dx - z·dT) / T, up to a shift of the row."""
    dz = ops.zeros_like(x) if dx is None else over_temperature(ops, ops.where(where, dx, 0.0), t)
    if dt is not None:
        z = scores(ops, x, t, where)
        # Transposed, this sums before it divides by T, which may be tiny.
        dz = dz - ops.where(z > -INF, z, 0.0) * over_temperature(ops, dt, t)
    return dz


def pull_scores(
    ops: Ops, gz: Array, x: Array, t: Temperature, where: Maybe, wanted: tuple[bool, ...]
) -> tuple[Maybe, Maybe]:
    """g_x = g_z / T and g_T = -Σ g_z·z / T."""
    gt = None
    if wanted[1]:
        z = scores(ops, x, t, where)
        alive = z > -INF
        gt = over_temperature(ops, -ops.sum(ops.where(alive, gz, 0.0) * ops.where(alive, z, 0.0)), t)
    return over_temperature(ops, gz, t), gt


def of_scores(name: str, function: Any, push: Any, pull: Any) -> RowFormula:
    """Return a formula of the scores z, with dy = push(y, dz) and g_z = pull(y, g)."""

    def jvp(ops: Ops, operands: tuple[Any, ...], tangents: tuple[Maybe, ...], y: Array) -> Array:
        return push(ops, y, push_scores(ops, *operands, *tangents[:2]), operands[2])

    def vjp(ops: Ops, operands: tuple[Any, ...], y: Array, g: Array, wanted: tuple[bool, ...]) -> Any:
        x, t, where = operands
        return pull_scores(ops, pull(ops, y, g, where), x, t, where, wanted)

    return RowFormula(name, function, jvp, vjp, keeps="answer")


def nonzero(ops: Ops, total: Array) -> Array:
    """A divisor for a row that has nothing to add up."""
    return ops.where(total == 0, 1.0, total)


# The sure class, if there is one: its probability is above 1/2, and 1 less it is what the others add up to


def beside_sure(ops: Ops, sure: Array, v: Array) -> Array:
    """v less its entry at the sure class, and exactly 0 there: v's mean of others is not lost beside it."""
    return ops.where(sure, 0.0, v - ops.sum(ops.where(sure, v, 0.0)))


# softmax: y = exp(z) / Σ exp(z);  dy = y·(dz - Σ y·dz)


def softmax_of_scores(ops: Ops, x: Array, t: Temperature, where: Maybe) -> Array:
    terms = ops.exp(scores(ops, x, t, where))
    return ops.where(where, terms / nonzero(ops, ops.sum(terms)), 0.0)


def push_softmax(ops: Ops, y: Array, dz: Array, where: Maybe) -> Array:
    del where
    alive = y != 0
    dz = beside_sure(ops, y > 0.5, ops.where(alive, dz, 0.0))
    # Masked twice, so that its transpose adds 0 for y = 0 whatever the cotangent.
    return ops.where(alive, y * (dz - ops.sum(y * dz)), 0.0)


SOFTMAX = of_scores("softmax", softmax_of_scores, push_softmax, push_softmax)


# log_softmax: y = z - log Σ exp(z);  dy = dz - Σ p·dz with p = exp(y)


def log_softmax_of_scores(ops: Ops, x: Array, t: Temperature, where: Maybe) -> Array:
    z = scores(ops, x, t, where)
    terms = ops.exp(z)
    total = nonzero(ops, ops.sum(terms))
    return ops.where(where, z - log_of_sum(ops, terms, total, (x, t, where)), -INF)


def push_log_softmax(ops: Ops, y: Array, dz: Array, where: Maybe) -> Array:
    p = ops.exp(y)
    dz = beside_sure(ops, p > 0.5, ops.where(where, dz, 0.0))
    return ops.where(where, dz - ops.sum(p * ops.where(p != 0, dz, 0.0)), 0.0)


def pull_log_softmax(ops: Ops, y: Array, g: Array, where: Maybe) -> Array:
    g, p = ops.where(where, g, 0.0), ops.exp(y)
    sure = p > 0.5
    rest = ops.sum(ops.where(sure, 0.0, g))
    total = rest + ops.sum(ops.where(sure, g, 0.0))
    return ops.where(sure, -ops.expm1(y) * g - p * rest, g - p * total)


LOG_SOFTMAX = of_scores("log_softmax", log_softmax_of_scores, push_log_softmax, pull_log_softmax)


# logsumexp: y = max + log Σ w·exp(x - max);  dy = Σ p·dx + Σ (p / w)·dw with p = w·exp(x - max) / Σ w·exp(x - max)


def logsumexp_of_rows(ops: Ops, x: Array, w: Maybe, where: Maybe) -> Array:
    x, w = existing(ops, x, w, where)
    top = ops.max(x)
    if w is not None:
        return top + log_of_weighted_sum(ops, x, w, top)
    terms = ops.exp(ops.below(x, finite(ops, top)))
    # A maximum of 1 is far enough from 0: what the sum loses is below the rounding of the answer.
    return top + log_of_sum(ops, terms, nonzero(ops, ops.sum(terms)), (x, None, None), ops.abs(top) < 1.0)


def existing(ops: Ops, x: Array, w: Maybe, where: Maybe) -> tuple[Array, Maybe]:
    """x and w without what does not exist, nor what weighs nothing."""
    if w is not None:
        where = w != 0 if where is None else where & (w != 0)
        w = ops.where(where, w, 0.0)
    return ops.where(where, x, -INF), w


def finite(ops: Ops, top: Array) -> Array:
    """A maximum that can be subtracted from what is infinite."""
    return ops.where(ops.isfinite(top), top, 0.0)


@replaceable
def log_of_sum(ops: Ops, terms: Array, total: Array, rows: tuple[Any, ...], close: Maybe = None) -> Array:
    """log Σ terms, which are exp(z) for the scores of ``rows``: logits, a temperature and a mask.

    Where one term outweighs the others, and this is ``close`` to the answer (None: always), it stays out of the sum.
    """
    del terms
    matters = total < OUTWEIGHED
    matters = matters if close is None else matters & close
    return ops.apply_where(matters, log1p_of_others, rows, ops.log(total))


def log1p_of_others(ops: Ops, x: Array, t: Temperature, where: Maybe) -> Array:
    """log Σ exp(z) in rows where one term outweighs the others. It moves with that one, too."""
    return ops.log1p(ops.sum(others(ops, ops.exp(scores(ops, x, t, where)))))


def sum_of_others(ops: Ops, x: Array, t: Temperature, where: Maybe) -> Array:
    """Σ exp(z) in rows where one term outweighs the others, without that one."""
    terms = ops.exp(scores(ops, x, t, where))
    return ops.sum(terms * (1.0 - ops.floor(terms)))  # which does not move with that one


def others(ops: Ops, terms: Array) -> Array:
    """Terms up to 1 without those of 1."""
    return terms - ops.floor(terms)  # floor is 1 at the maximum and 0 elsewhere


def log_of_weighted_sum(ops: Ops, x: Array, w: Array, top: Array) -> Array:
    """log Σ w·exp(x - top). The terms at the maximum are 1 and stay out, so that what lies far below them is kept."""
    x = ops.cast(x, top.dtype)
    at_top = x == top
    most = ops.sum(ops.where(at_top, w, 0.0))
    rest = ops.sum(ops.where(at_top, 0.0, w * ops.exp(ops.below(x, top))))
    y = ops.where(most > 0, ops.log(most) + ops.log1p(rest / most), ops.log(most + rest))

    def smooth() -> Array:
        total = ops.sum(w * ops.exp(ops.below(x, finite(ops, top))))
        return ops.log(ops.where((total > 0) & (total < INF), total, 1.0))

    return ops.with_slope_of(y, smooth)


def slopes_of_logsumexp(ops: Ops, x: Array, w: Maybe, where: Maybe) -> tuple[Array, Maybe]:
    """∂y/∂x = p and ∂y/∂w = p / w; 0 for what does not exist."""
    x, w = existing(ops, x, w, where)
    terms = ops.exp(ops.below(x, finite(ops, ops.max(x))))
    shares = terms if w is None else w * terms
    total = nonzero(ops, ops.sum(shares))
    return shares / total, None if w is None else ops.where(x > -INF, terms, 0.0) / total


def push_logsumexp(ops: Ops, operands: tuple[Any, ...], tangents: tuple[Maybe, ...], y: Array) -> Array:
    del y
    moves = [
        slope * ops.where(slope != 0, tangent, 0.0)
        for slope, tangent in zip(slopes_of_logsumexp(ops, *operands), tangents[:2], strict=True)
        if slope is not None and tangent is not None
    ]
    return ops.sum(sum(moves[1:], moves[0]))


def pull_logsumexp(ops: Ops, operands: tuple[Any, ...], y: Array, g: Array, wanted: tuple[bool, ...]) -> Any:
    del y, wanted
    return tuple(None if slope is None else slope * g for slope in slopes_of_logsumexp(ops, *operands))


LOGSUMEXP = RowFormula("logsumexp", logsumexp_of_rows, push_logsumexp, pull_logsumexp)
