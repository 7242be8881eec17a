"""softmax, log_softmax, logsumexp and their derivatives: the whole idea.

Every formula takes rows ``x``, subtracts their maximum (as a constant: the answer does not depend on it, so
nothing is differentiated through it), divides by the temperature, and normalises. y stands for the answer,
p for the probabilities, z for ``(x - max) / temperature``.

Source: P. Blanchard, D. J. Higham and N. J. Higham, "Accurately computing the log-sum-exp and softmax
functions", IMA Journal of Numerical Analysis 41(4), 2021.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from polysoftmax._arrays import (
    accurate_sum,
    adds_at_once,
    below,
    below_maximum,
    divide_in_place,
    exp_in_place,
    formulas_are_differentiated,
    namespace,
    or_nan,
    quotient,
    row_maximum,
    rows,
    stop_gradient,
    subtract_in_place,
    sums_at_once,
    where_any,
)
from polysoftmax.engines import RowFormula

if TYPE_CHECKING:
    from polysoftmax._arrays import Array, Axis, DType, Number


def shifted(x: Array, temperature: Array | float | None, where: Array | None, axis: int) -> Array:
    """Return z = (x - max) / temperature along ``axis``, -inf where an entry does not exist."""
    if where is None:
        return over_temperature(below_maximum(x, axis), temperature)
    xp = namespace(x)
    x = xp.where(where, x, -math.inf)
    # -inf - -inf is NaN, which is the answer for a row of -inf, but not for a row without entries.
    top = xp.where(xp.any(where, axis=axis, keepdims=True), row_maximum(x, axis), 0.0)
    return over_temperature(below(x, top), temperature)


def over_temperature(distance: Array, temperature: Array | float | None) -> Array:
    """Return ``distance / temperature`` for a distance from the maximum, and its limits at 0 and inf.

    At 0 only the maxima are left (z = 0, the rest -inf), at inf everything that has a logit above -inf is alike
    (z = 0). Both are constants: their derivatives are 0. The distance itself may be overwritten.
    """
    if temperature is None:
        return distance
    if isinstance(temperature, float):
        return divide_in_place(distance, temperature)
    xp = namespace(distance)
    gone = (distance == -math.inf) | ((temperature == 0) & (distance < 0))
    regular = (temperature > 0) & (temperature < math.inf)
    # Division sees finite numbers alone: the derivative of -inf / T would be 0·inf.
    z = quotient(xp.where(gone, 0.0, distance), xp.where(regular, temperature, 1.0))
    z = xp.where(regular, z, 0.0 * z)  # NaN stays NaN
    z = xp.where(gone, -math.inf, z)
    if formulas_are_differentiated(distance):
        # The derivative in x at a logit of -inf is the limit 1 / T, and that in T is 0.
        limit = distance / stop_gradient(xp.where(regular, temperature, 1.0))
        z = xp.where(regular & (distance == -math.inf), limit, z)
    return or_nan(z, temperature >= 0, temperature)


_VANISHED = -1000.0
"""A score whose exponential is 0 in every dtype that is computed in."""


def exponentials(z: Array, temperature: Array | float | None, *, in_place: bool = False) -> Array:
    """Return exp(z), whose derivative is 0 where it vanishes: that of z for the temperature may overflow there."""
    xp = namespace(z)
    if temperature is None or isinstance(temperature, float) or not formulas_are_differentiated(z):
        return exp_in_place(z) if in_place else xp.exp(z)
    vanished = z < _VANISHED
    return xp.where(vanished, 0.0, xp.exp(xp.where(vanished, 0.0, z)))


def over_regular_temperature(tangent: Array, temperature: Array | float | None) -> Array:
    """Return ``tangent / temperature``, and 0 at temperature 0 and inf, where nothing moves."""
    if temperature is None:
        return tangent
    if isinstance(temperature, float):
        return tangent / temperature
    xp = namespace(tangent)
    regular = (temperature > 0) & (temperature < math.inf)
    return xp.where(regular, quotient(tangent, xp.where(regular, temperature, 1.0)), 0.0)


def tangent_of_z(
    x: Array,
    temperature: Array | float | None,
    where: Array | None,
    tangents: tuple[Array | None, ...],
    exists: Array,
    axis: int,
) -> Array:
    """Return dz = dx / T - z·(dT / T), up to a shift of the row, and 0 where nothing ``exists``."""
    xp = namespace(x)
    dx, dtemperature = tangents[0], tangents[1]
    move = xp.zeros_like(x) if dx is None else over_regular_temperature(xp.where(exists, dx, 0.0), temperature)
    if dtemperature is not None:
        z = shifted(x, temperature, where, axis)
        # Turned round for reverse mode, the product is added up before it is divided by a T that may be tiny.
        change = over_regular_temperature(dtemperature, temperature)
        move = move - xp.where(exists & (z > -math.inf), z, 0.0) * change
    return move


def cotangents(
    gz: Array,
    x: Array,
    temperature: Array | float | None,
    where: Array | None,
    wanted: tuple[bool, ...],
    axis: int,
) -> tuple[Array | None, Array | None]:
    """Return the gradients for x and for the temperature, one a row, from the gradient for z.

    They are gz / T and -Σ gz·z / T; nothing moves at temperature 0 and inf.
    """
    xp = namespace(x)
    gtemperature = None
    if wanted[1]:
        z = shifted(x, temperature, where, axis)
        alive = z > -math.inf
        moment = accurate_sum(xp.where(alive, gz, 0.0) * xp.where(alive, z, 0.0), axis)
        gtemperature = over_regular_temperature(-moment, temperature)
    return over_regular_temperature(gz, temperature), gtemperature


# softmax: y = exp(z) / Σ exp(z);  dy = y·(dz - Σ y·dz)


def _softmax(x: Array, temperature: Array | float | None, where: Array | None, *, axis: int) -> Array:
    z = shifted(x, temperature, where, axis)
    # Tiny calls had better not take the way round.
    terms = exp_in_place(z) if temperature is None else exponentials(z, temperature, in_place=True)
    if where is None:
        return divide_in_place(terms, accurate_sum(terms, axis))
    return namespace(x).where(where, over_total(terms, axis), 0.0)


def _softmax_jvp(operands: tuple[Array, ...], tangents: tuple[Array | None, ...], y: Array, *, axis: int) -> Array:
    x, temperature, where = operands
    dz = tangent_of_z(x, temperature, where, tangents, y != 0, axis)
    # Turned round for reverse mode, the outer where drops the cotangents of what does not exist.
    return namespace(y).where(y != 0, y * (dz - accurate_sum(y * dz, axis)), 0.0)


def _softmax_vjp(
    operands: tuple[Array, ...], y: Array, cotangent: Array, wanted: tuple[bool, ...], *, axis: int
) -> tuple[Array | None, ...]:
    x, temperature, where = operands
    g = namespace(y).where(y != 0, cotangent, 0.0)
    gz = y * (g - accurate_sum(y * g, axis))
    return cotangents(gz, x, temperature, where, wanted, axis)


SOFTMAX = RowFormula("softmax", _softmax, jvp=_softmax_jvp, vjp=_softmax_vjp, from_output=True, promotes=True)


# log_softmax: y = z - log Σ exp(z);  dy = dz - Σ p·dz


def _log_softmax(x: Array, temperature: Array | float | None, where: Array | None, *, axis: int) -> Array:
    xp = namespace(x)
    z = shifted(x, temperature, where, axis)
    total = accurate_sum(exponentials(z, temperature), axis)
    if where is None:
        return subtract_in_place(z, xp.log(total))
    return xp.where(where, z - xp.log(xp.where(total == 0, 1.0, total)), -math.inf)


def _log_softmax_jvp(operands: tuple[Array, ...], tangents: tuple[Array | None, ...], y: Array, *, axis: int) -> Array:
    x, temperature, where = operands
    xp = namespace(y)
    p = xp.exp(y)
    exists = (p == p) if where is None else where
    dz = tangent_of_z(x, temperature, where, tangents, exists, axis)
    return xp.where(exists, dz - accurate_sum(p * xp.where(p != 0, dz, 0.0), axis), 0.0)


def _log_softmax_vjp(
    operands: tuple[Array, ...], y: Array, cotangent: Array, wanted: tuple[bool, ...], *, axis: int
) -> tuple[Array | None, ...]:
    x, temperature, where = operands
    xp = namespace(y)
    g = cotangent if where is None else xp.where(where, cotangent, 0.0)
    gz = g - xp.exp(y) * accurate_sum(g, axis)
    return cotangents(gz, x, temperature, where, wanted, axis)


LOG_SOFTMAX = RowFormula(
    "log_softmax",
    _log_softmax,
    jvp=_log_softmax_jvp,
    vjp=_log_softmax_vjp,
    from_output=True,
    promotes=True,
)


# logsumexp: y = max + log Σ w·exp(x - max);  dy = Σ p·dx with p = w·exp(x - max) / Σ w·exp(x - max)


def _existing(x: Array, weights: Array | None, where: Array | None) -> tuple[Array, Array | None]:
    """Return x and the weights without what does not exist."""
    if weights is None and where is None:
        return x, None
    xp = namespace(x)
    exists = where
    if weights is not None:
        exists = weights != 0 if where is None else where & (weights != 0)
        weights = xp.where(exists, weights, 0.0)
    return xp.where(exists, x, -math.inf), weights


def _finite(top: Array) -> Array:
    """Return a maximum, and 0 where it is not finite."""
    xp = namespace(top)
    return xp.where(xp.isfinite(top), top, 0.0)


def log_of_sum(x: Array, top: Array, close: Array | None, axis: int) -> Array:
    """Return log Σ exp(x - top) for rows with the maximum ``top``.

    Where one term outweighs all others the answer is close to 0. Its digits matter where it stays so, in the rows that
    are ``close`` (all if None): there log1p adds what lies below the maximum.
    """
    xp = namespace(x)
    terms = exp_in_place(below(x, top))
    at_once = adds_at_once(terms, axis)
    total, *rest = sums_at_once((terms, _below_one(terms)), axis) if at_once else (accurate_sum(terms, axis),)
    if formulas_are_differentiated(x):
        total = xp.where(total == 0, 1.0, total)
    outweighs = total < 1.25
    matters = outweighs if close is None else outweighs & close
    y = xp.log(total)
    return xp.where(matters, xp.log1p(*rest), y) if at_once else where_any(matters, _log1p_below, (x, top), axis, y)


def _log1p_below(x: Array, top: Array, axis: int) -> Array:
    return log1p_of_rest(namespace(x).exp(below(x, top)), axis)


def log1p_of_rest(terms: Array, axis: int) -> Array:
    """Return log Σ terms for rows where one term is 1 and the others are below 1/4 together."""
    return namespace(terms).log1p(accurate_sum(_below_one(terms), axis))


def _below_one(terms: Array) -> Array:
    """Return terms below 1 as they are, and 0 for a term of 1."""
    # Rounded down the one stays and the others are gone. XLA would not compare in the pass that adds them.
    return terms - namespace(terms).floor(terms)


def _log_of_weighted_sum(terms: Array, at_top: Array, weights: Array, axis: int) -> Array:
    """Return log Σ w·terms, where the terms ``at_top``, at the maximum of their row, count as 1.

    They stay out of the sum and log1p adds the rest, so that what lies far below them is kept.
    """
    xp = namespace(terms)
    most = accurate_sum(xp.where(at_top, weights, 0.0), axis)
    terms = terms * weights
    rest = accurate_sum(xp.where(at_top, 0.0, terms), axis)
    y = xp.where(most > 0, xp.log(most) + xp.log1p(rest / most), xp.log(most + rest))
    if not formulas_are_differentiated(terms):
        return y
    # The greatest terms entered as constants; this adds the derivative of log Σ w·terms, and 0.
    total = accurate_sum(terms, axis)
    plain = xp.log(xp.where((total > 0) & (total < math.inf), total, 1.0))
    return stop_gradient(y) + (plain - stop_gradient(plain))


def _logsumexp(x: Array, weights: Array | None, where: Array | None, *, axis: int) -> Array:
    xp = namespace(x)
    x, weights = _existing(x, weights, where)
    top = row_maximum(x, axis)
    if weights is None:
        # 1 is far enough from 0: what is lost beside the maximum is below the rounding of the answer.
        return top + log_of_sum(x, _finite(top), xp.abs(top) < 1.0, axis)
    # Below an infinite maximum only the terms at it are NaN, which stay out of the sum; their derivatives would not.
    terms = xp.exp(x - (_finite(top) if formulas_are_differentiated(x) else top))
    return top + _log_of_weighted_sum(terms, x == top, weights, axis)


def over_total(terms: Array, axis: int) -> Array:
    """Return terms / Σ terms, and 0 in a row that sums to 0."""
    total = accurate_sum(terms, axis)
    return terms / namespace(terms).where(total == 0, 1.0, total)


def _logsumexp_slopes(x: Array, weights: Array | None, where: Array | None, axis: int) -> tuple[Array, Array | None]:
    """Return the gradients of the logsumexp for x, which is p, and for the weights; 0 for what does not exist."""
    xp = namespace(x)
    x, weights = _existing(x, weights, where)
    terms = xp.exp(below(x, _finite(row_maximum(x, axis))))
    if weights is None:
        return over_total(terms, axis), None
    shares = terms * weights
    total = accurate_sum(shares, axis)
    total = xp.where(total == 0, 1.0, total)
    return shares / total, xp.where(x > -math.inf, terms, 0.0) / total


def _logsumexp_jvp(operands: tuple[Array, ...], tangents: tuple[Array | None, ...], y: Array, *, axis: int) -> Array:
    del y
    x, weights, where = operands
    slopes = _logsumexp_slopes(x, weights, where, axis)
    moves = [
        slope * namespace(slope).where(slope != 0, tangent, 0.0)
        for slope, tangent in zip(slopes, tangents[:2], strict=True)
        if slope is not None and tangent is not None
    ]
    return accurate_sum(sum(moves[1:], moves[0]), axis)


def _logsumexp_vjp(
    operands: tuple[Array, ...], y: Array, cotangent: Array, wanted: tuple[bool, ...], *, axis: int
) -> tuple[Array | None, ...]:
    del y, wanted
    x, weights, where = operands
    return tuple(None if slope is None else slope * cotangent for slope in _logsumexp_slopes(x, weights, where, axis))


LOGSUMEXP = RowFormula("logsumexp", _logsumexp, jvp=_logsumexp_jvp, vjp=_logsumexp_vjp, promotes=True)


def softmax(
    x: Array,
    /,
    *,
    axis: Axis = -1,
    temperature: Array | Number = 1.0,
    where: Array | None = None,
    dtype: DType | None = None,
) -> Array:
    r"""Softmax: probabilities proportional to the exponentials of logits.

    .. math:: y_i = \frac{e^{x_i / T}}{\sum_j e^{x_j / T}}

    Parameters
    ----------
    x : array
        Logits, real, of any shape. Integers are promoted to the library's default float; float16 and bfloat16
        are computed in float32 and rounded once.
    axis : int, tuple of ints, or None
        The axes along which the probabilities sum to 1; None means all.
    temperature : number or array
        T, in units of the logits, 0 or greater. An array has one entry a row: the shape of ``x`` without
        ``axis``, or one that broadcasts with ``axis`` of length 1. At 0 the tied maxima share equally, at inf
        all logits above -inf do.
    where : array of bool, optional
        Broadcasts against ``x``. Entries under False do not exist: their probability is 0.
    dtype : dtype, optional
        Real floating dtype of the result; by default that of ``x``.

    Returns
    -------
    array
        Probabilities, of the shape of ``x``.

    Raises
    ------
    TypeError
        If ``x`` is not an array, is complex or boolean, or if arrays of two libraries or devices are mixed.
    ValueError
        If a temperature given as a number is negative or NaN, or a shape does not fit.
    AxisError
        A ValueError and IndexError, if ``axis`` is out of bounds.

    Notes
    -----
    The maximum is subtracted first, so nothing overflows at any temperature. A row of -inf, or with NaN or +inf,
    is NaN, and no other row is; a row with no True in ``where`` is 0. A bad entry of a temperature array makes
    its own row NaN. Derivatives, forward and reverse, are y·(dx - Σ y·dx) / T and nothing else.

    The error is at most (16 + log2 n + d + Σ y·d) units in the last place of float32 (float64 for float64)
    for an entry at a distance d·T from the maximum. Source: Blanchard, Higham and Higham, IMA J. Numer. Anal.
    41(4), 2021.

    Examples
    --------
    >>> import numpy as np
    >>> import polysoftmax
    >>> polysoftmax.softmax(np.asarray([1.0, 2.0, 3.0])).round(4)
    array([0.09  , 0.2447, 0.6652])
    >>> polysoftmax.softmax(np.asarray([1.0, 2.0, 3.0]), temperature=0)
    array([0., 0., 1.])
    >>> polysoftmax.softmax(np.zeros((2, 2)), where=np.asarray([[True, False], [True, True]]))
    array([[1. , 0. ],
           [0.5, 0.5]])
    """
    r = rows(x, axis, dtype)
    if r.length == 0:
        return r.elementwise(namespace(r.x).astype(r.x, r.result))
    return r.elementwise(SOFTMAX(r, r.x, r.temperature(temperature), r.mask(where)))


def log_softmax(
    x: Array,
    /,
    *,
    axis: Axis = -1,
    temperature: Array | Number = 1.0,
    where: Array | None = None,
    dtype: DType | None = None,
) -> Array:
    r"""Logarithm of the softmax, without the loss of digits that ``log(softmax(x))`` has.

    .. math:: y_i = x_i / T - \log \sum_j e^{x_j / T}

    Parameters
    ----------
    x : array
        Logits, real, of any shape.
    axis : int, tuple of ints, or None
        The axes along which the probabilities sum to 1; None means all.
    temperature : number or array
        T, in units of the logits, 0 or greater; an array has one entry a row (see `softmax`).
    where : array of bool, optional
        Broadcasts against ``x``. Entries under False do not exist: their log-probability is -inf.
    dtype : dtype, optional
        Real floating dtype of the result; by default that of ``x``.

    Returns
    -------
    array
        Log-probabilities in nats, of the shape of ``x``.

    Raises
    ------
    TypeError
        If ``x`` is not an array, is complex or boolean, or if arrays of two libraries or devices are mixed.
    ValueError
        If a temperature given as a number is negative or NaN, or a shape does not fit.
    AxisError
        A ValueError and IndexError, if ``axis`` is out of bounds.

    Notes
    -----
    Computed as ``(x - max) - log Σ exp(x - max)``. A row of -inf, or with NaN or +inf, is NaN; a row with no True
    in ``where`` is -inf. The absolute error is at most (16 + log2 n + d + Σ p·d + \|y\|) units in the last place
    of 1. Source: Blanchard, Higham and Higham, IMA J. Numer. Anal. 41(4), 2021.

    Examples
    --------
    >>> import numpy as np
    >>> import polysoftmax
    >>> polysoftmax.log_softmax(np.asarray([1.0, 2.0, 3.0])).round(4)
    array([-2.4076, -1.4076, -0.4076])
    >>> polysoftmax.log_softmax(np.asarray([0.0, -1e30])).tolist()
    [0.0, -1e+30]
    """
    r = rows(x, axis, dtype)
    if r.length == 0:
        return r.elementwise(namespace(r.x).astype(r.x, r.result))
    return r.elementwise(LOG_SOFTMAX(r, r.x, r.temperature(temperature), r.mask(where)))


def logsumexp(
    x: Array,
    /,
    *,
    axis: Axis = -1,
    keepdims: bool = False,
    weights: Array | None = None,
    where: Array | None = None,
    dtype: DType | None = None,
) -> Array:
    r"""Logarithm of a sum of exponentials.

    .. math:: y = \log \sum_j w_j e^{x_j}

    Parameters
    ----------
    x : array
        Exponents, real, of any shape.
    axis : int, tuple of ints, or None
        The axes that are summed over; None means all.
    keepdims : bool
        Whether the axes stay, with length 1.
    weights : array, optional
        w, real, broadcasts against ``x``. A weight of 0 removes its entry, whatever stands there; signs are
        allowed.
    where : array of bool, optional
        Broadcasts against ``x``. Entries under False do not exist.
    dtype : dtype, optional
        Real floating dtype of the result; by default that of ``x``.

    Returns
    -------
    array
        The shape of ``x`` without ``axis``, or with length 1 there if ``keepdims``.

    Raises
    ------
    TypeError
        If ``x`` is not an array, is complex or boolean, or if arrays of two libraries or devices are mixed.
    ValueError
        If a shape does not fit.
    AxisError
        A ValueError and IndexError, if ``axis`` is out of bounds.

    Notes
    -----
    Nothing to sum gives -inf: an empty axis, a row of -inf, a row with no True in ``where``; the gradient there is
    0. A weighted sum below 0 is NaN, one of 0 is -inf. NaN spreads through its own row only, +inf gives +inf.

    The terms at the maximum are kept out of the sum and enter through log1p, so that an answer close to 0 keeps
    its relative accuracy. The absolute error is at most (16 + log2 n + Σ p·d + \|y\|) units in the last place of
    1. Source: Blanchard, Higham and Higham, IMA J. Numer. Anal. 41(4), 2021; the separation of the greatest terms
    is SciPy's.

    Examples
    --------
    >>> import numpy as np
    >>> import polysoftmax
    >>> float(polysoftmax.logsumexp(np.asarray([0.0, -40.0])))
    4.248354255291589e-18
    >>> float(polysoftmax.logsumexp(np.log([3.0, 2.0]), weights=np.asarray([1.0, -1.0])).round(12))
    0.0
    """
    r = rows(x, axis, dtype)
    if r.length == 0:
        y = r.nothing(-math.inf)
    else:
        y = LOGSUMEXP(r, r.x, r.like_row(weights, "weights"), r.mask(where), squeeze=True)
    return r.with_axes(y) if keepdims else y
