"""softmax, log_softmax and logsumexp."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from polysoftmax._arrays import namespace
from polysoftmax._rows import rows, weighted_rows
from polysoftmax._softmax import LOG_SOFTMAX, LOGSUMEXP, SOFTMAX

if TYPE_CHECKING:
    from polysoftmax._arrays import Array, DType
    from polysoftmax._rows import Axis, Number


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
    dtype : dtype or str, optional
        Real floating dtype of the result, or its name; by default that of ``x``.

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
    for an entry at a distance d·T from the maximum; with a temperature d counts twice. Source: Blanchard, Higham and
    Higham, IMA J. Numer. Anal. 41(4), 2021.

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
    dtype : dtype or str, optional
        Real floating dtype of the result, or its name; by default that of ``x``.

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
    of 1; with a temperature d counts twice. A logarithm close to 0 comes from the other classes, and keeps its
    relative accuracy. Source: Blanchard, Higham and Higham, IMA J. Numer. Anal. 41(4), 2021.

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
        w, real. ``x`` and ``weights`` broadcast against each other, and ``axis`` is an axis of what they broadcast
        to. A weight of 0 removes its entry, whatever stands there; signs are allowed.
    where : array of bool, optional
        Broadcasts against ``x``, or against what ``x`` and ``weights`` broadcast to. Entries under False do not
        exist.
    dtype : dtype or str, optional
        Real floating dtype of the result, or its name; by default that of ``x``.

    Returns
    -------
    array
        The shape of ``x``, broadcast against ``weights``, without ``axis``, or with length 1 there if ``keepdims``.

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
    r, w = weighted_rows(x, weights, axis, dtype)
    y = r.empty_result(-math.inf) if r.length == 0 else LOGSUMEXP(r, r.x, w, r.mask(where), squeeze=True)
    return r.keepdims(y) if keepdims else y
