"""Dense Jacobians, and their products with a vector from either side without the matrix.

The rules stand beside each function in ``_softmax.py``; automatic differentiation uses the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from polysoftmax._arrays import cast, device_for, quietly
from polysoftmax._formula import RowFormula, words
from polysoftmax._rows import Rows, last_rows, rows
from polysoftmax._softmax import LOG_SOFTMAX, SOFTMAX, over_temperature

if TYPE_CHECKING:
    from polysoftmax._arrays import Array
    from polysoftmax._rows import Axis, Number


def softmax_jvp(
    x: Array,
    tangent: Array,
    /,
    *,
    axis: Axis = -1,
    temperature: Array | Number = 1.0,
    where: Array | None = None,
) -> Array:
    r"""Jacobian of the softmax times a tangent, without the matrix.

    .. math:: \dot y_i = \frac{y_i}{T} \Bigl(\dot x_i - \sum_j y_j \dot x_j\Bigr)

    Parameters
    ----------
    x : array
        Logits, real, of any shape.
    tangent : array
        A direction in which the logits move, of the shape of ``x``.
    axis : int, tuple of ints, or None
        The axes along which the probabilities sum to 1; None means all.
    temperature : number or array
        T, in units of the logits, 0 or greater; an array has one entry a row (see `softmax`).
    where : array of bool, optional
        Broadcasts against ``x``. Entries under False do not exist, and their tangents are ignored.

    Returns
    -------
    array
        How the probabilities move, of the shape and dtype of ``x``.

    Raises
    ------
    TypeError, ValueError, AxisError
        As for `softmax`; ``ValueError`` if the tangent's shape is not that of ``x``.

    Notes
    -----
    An entry of probability 0 (at a logit of -inf, for instance) contributes 0 whatever its tangent is. At
    temperature 0 and inf nothing moves. NaN rows stay NaN. The Jacobian is symmetric, so `softmax_vjp` has the
    same values. Source: differentiation of the definition.

    Examples
    --------
    >>> import numpy as np
    >>> import polysoftmax
    >>> polysoftmax.softmax_jvp(np.asarray([1.0, 2.0, 3.0]), np.asarray([1.0, 0.0, 0.0])).round(4)
    array([ 0.0819, -0.022 , -0.0599])
    """
    return _pushed(SOFTMAX, x, tangent, axis, temperature, where)


def softmax_vjp(
    x: Array,
    cotangent: Array,
    /,
    *,
    axis: Axis = -1,
    temperature: Array | Number = 1.0,
    where: Array | None = None,
) -> Array:
    r"""Cotangent times the Jacobian of the softmax, without the matrix: the gradient for the logits.

    .. math:: \bar x_i = \frac{y_i}{T} \Bigl(\bar y_i - \sum_j y_j \bar y_j\Bigr)

    Parameters
    ----------
    x : array
        Logits, real, of any shape.
    cotangent : array
        The gradient for the probabilities, of the shape of ``x``.
    axis : int, tuple of ints, or None
        The axes along which the probabilities sum to 1; None means all.
    temperature : number or array
        T, in units of the logits, 0 or greater; an array has one entry a row (see `softmax`).
    where : array of bool, optional
        Broadcasts against ``x``. Entries under False do not exist: their cotangents are ignored, and their
        gradient is 0.

    Returns
    -------
    array
        The gradient for the logits, of the shape and dtype of ``x``.

    Raises
    ------
    TypeError, ValueError, AxisError
        As for `softmax`; ``ValueError`` if the cotangent's shape is not that of ``x``.

    Notes
    -----
    An entry of probability 0 contributes 0 whatever its cotangent is. At temperature 0 and inf the gradient is
    0. NaN rows stay NaN. Source: differentiation of the definition.

    Examples
    --------
    >>> import numpy as np
    >>> import polysoftmax
    >>> polysoftmax.softmax_vjp(np.asarray([1.0, 2.0, 3.0]), np.asarray([1.0, 0.0, 0.0])).round(4)
    array([ 0.0819, -0.022 , -0.0599])
    """
    return _pulled(SOFTMAX, x, cotangent, axis, temperature, where)


def log_softmax_jvp(
    x: Array,
    tangent: Array,
    /,
    *,
    axis: Axis = -1,
    temperature: Array | Number = 1.0,
    where: Array | None = None,
) -> Array:
    r"""Jacobian of the log-softmax times a tangent, without the matrix.

    .. math:: \dot y_i = \frac{1}{T} \Bigl(\dot x_i - \sum_j p_j \dot x_j\Bigr)

    Parameters
    ----------
    x : array
        Logits, real, of any shape.
    tangent : array
        A direction in which the logits move, of the shape of ``x``.
    axis : int, tuple of ints, or None
        The axes along which the probabilities sum to 1; None means all.
    temperature : number or array
        T, in units of the logits, 0 or greater; an array has one entry a row (see `softmax`).
    where : array of bool, optional
        Broadcasts against ``x``. Entries under False do not exist, and their tangents are ignored.

    Returns
    -------
    array
        How the log-probabilities move, of the shape and dtype of ``x``.

    Raises
    ------
    TypeError, ValueError, AxisError
        As for `softmax`; ``ValueError`` if the tangent's shape is not that of ``x``.

    Notes
    -----
    Entries under False in ``where`` have tangent 0. At a logit of -inf the limit is returned. At temperature 0 and
    inf nothing moves. NaN rows stay NaN. Source: differentiation of the definition.

    Examples
    --------
    >>> import numpy as np
    >>> import polysoftmax
    >>> polysoftmax.log_softmax_jvp(np.asarray([1.0, 2.0, 3.0]), np.asarray([1.0, 0.0, 0.0])).round(4)
    array([ 0.91, -0.09, -0.09])
    """
    return _pushed(LOG_SOFTMAX, x, tangent, axis, temperature, where)


def log_softmax_vjp(
    x: Array,
    cotangent: Array,
    /,
    *,
    axis: Axis = -1,
    temperature: Array | Number = 1.0,
    where: Array | None = None,
) -> Array:
    r"""Cotangent times the Jacobian of the log-softmax, without the matrix: the gradient for the logits.

    .. math:: \bar x_i = \frac{1}{T} \Bigl(\bar y_i - p_i \sum_j \bar y_j\Bigr)

    Parameters
    ----------
    x : array
        Logits, real, of any shape.
    cotangent : array
        The gradient for the log-probabilities, of the shape of ``x``.
    axis : int, tuple of ints, or None
        The axes along which the probabilities sum to 1; None means all.
    temperature : number or array
        T, in units of the logits, 0 or greater; an array has one entry a row (see `softmax`).
    where : array of bool, optional
        Broadcasts against ``x``. Entries under False do not exist: their cotangents are ignored, and their
        gradient is 0.

    Returns
    -------
    array
        The gradient for the logits, of the shape and dtype of ``x``.

    Raises
    ------
    TypeError, ValueError, AxisError
        As for `softmax`; ``ValueError`` if the cotangent's shape is not that of ``x``.

    Notes
    -----
    At temperature 0 and inf the gradient is 0. NaN rows stay NaN. Source: differentiation of the definition.

    Examples
    --------
    >>> import numpy as np
    >>> import polysoftmax
    >>> polysoftmax.log_softmax_vjp(np.asarray([1.0, 2.0, 3.0]), np.asarray([0.0, 0.0, 1.0])).round(4)
    array([-0.09  , -0.2447,  0.3348])
    """
    return _pulled(LOG_SOFTMAX, x, cotangent, axis, temperature, where)


_LOGITS = (True, False, False)
"""Of logits, temperature and mask, the operands that move."""


def _pushed(
    formula: RowFormula, x: Array, tangent: Array, axis: Axis, temperature: Array | Number, where: Array | None
) -> Array:
    r = rows(x, axis)
    tangent = r.like_input(tangent, "tangent")
    if r.length == 0:
        return r.elementwise(cast(tangent, r.result))
    push = formula.pushforward(_LOGITS)
    return r.elementwise(push(r, r.x, r.temperature(temperature), r.mask(where), tangent))


def _pulled(
    formula: RowFormula, x: Array, cotangent: Array, axis: Axis, temperature: Array | Number, where: Array | None
) -> Array:
    r = rows(x, axis)
    cotangent = r.like_input(cotangent, "cotangent")
    if r.length == 0:
        return r.elementwise(cast(cotangent, r.result))
    pull = formula.pullback(_LOGITS)
    return r.elementwise(pull(r, r.x, r.temperature(temperature), r.mask(where), None, cotangent))


def softmax_jacobian(x: Array, /, *, axis: Axis = -1, temperature: Array | Number = 1.0) -> Array:
    r"""Jacobian of the softmax as a dense matrix.

    .. math:: J_{ij} = \frac{\partial y_i}{\partial x_j} = \frac{y_i (\delta_{ij} - y_j)}{T}

    Parameters
    ----------
    x : array
        Logits, real, of any shape; n of them in a row.
    axis : int, tuple of ints, or None
        The axes along which the probabilities sum to 1; several are flattened in increasing order.
    temperature : number or array
        T, in units of the logits, 0 or greater; an array has one entry a row (see `softmax`).

    Returns
    -------
    array
        The remaining axes of ``x`` in order, then (n, n): ``J[..., i, j]`` is dy_i / dx_j, per unit of the logits.

    Raises
    ------
    TypeError, ValueError, AxisError
        As for `softmax`.

    Notes
    -----
    Rows and columns sum to 0. The matrix is 0 at temperature 0 and inf, and NaN for a row that is NaN; at a logit
    of -inf its row and column are 0. It holds n² numbers: `softmax_jvp` and `softmax_vjp` do without it.

    Examples
    --------
    >>> import numpy as np
    >>> import polysoftmax
    >>> polysoftmax.softmax_jacobian(np.asarray([1.0, 2.0, 3.0])).round(4)
    array([[ 0.0819, -0.022 , -0.0599],
           [-0.022 ,  0.1848, -0.1628],
           [-0.0599, -0.1628,  0.2227]])
    """
    r = last_rows(x, axis)
    t = r.temperature(temperature)
    y = _probabilities(r, t)
    with quietly(y):
        return cast(over_temperature(words(r.x), y[..., :, None] * _identity_less(r, y), _per_matrix(r, t)), r.result)


def log_softmax_jacobian(x: Array, /, *, axis: Axis = -1, temperature: Array | Number = 1.0) -> Array:
    r"""Jacobian of the log-softmax as a dense matrix.

    .. math:: J_{ij} = \frac{\partial y_i}{\partial x_j} = \frac{\delta_{ij} - p_j}{T}

    Parameters
    ----------
    x : array
        Logits, real, of any shape; n of them in a row.
    axis : int, tuple of ints, or None
        The axes along which the probabilities sum to 1; several are flattened in increasing order.
    temperature : number or array
        T, in units of the logits, 0 or greater; an array has one entry a row (see `softmax`).

    Returns
    -------
    array
        The remaining axes of ``x`` in order, then (n, n): ``J[..., i, j]`` is dy_i / dx_j, per unit of the logits.

    Raises
    ------
    TypeError, ValueError, AxisError
        As for `softmax`.

    Notes
    -----
    Rows sum to 0. The matrix is 0 at temperature 0 and inf, and NaN for a row that is NaN; at a logit of -inf it has
    its limit.

    Examples
    --------
    >>> import numpy as np
    >>> import polysoftmax
    >>> polysoftmax.log_softmax_jacobian(np.asarray([1.0, 2.0, 3.0])).round(4)
    array([[ 0.91  , -0.2447, -0.6652],
           [-0.09  ,  0.7553, -0.6652],
           [-0.09  , -0.2447,  0.3348]])
    """
    r = last_rows(x, axis)
    t = r.temperature(temperature)
    p = _probabilities(r, t)
    with quietly(p):
        return cast(over_temperature(words(r.x), _identity_less(r, p), _per_matrix(r, t)), r.result)


def _probabilities(r: Rows, temperature: Array | float | None) -> Array:
    r.require_length()
    return SOFTMAX(r, r.x, temperature, None, result=r.compute) if r.length else cast(r.x, r.compute)


def _identity_less(r: Rows, p: Array) -> Array:
    """Return δ_ij - p_j. What the sure class lacks to 1 is what the others have."""
    ops = words(p)
    sure = p > 0.5
    lacking = r.xp.where(sure, ops.sum(r.xp.where(sure, 0.0, p)), 1.0 - p)
    diagonal = r.xp.eye(r.length, dtype=r.xp.bool, device=device_for(r.x))
    diagonal = r.xp.reshape(diagonal, (1,) * (r.x.ndim - 1) + diagonal.shape)
    return r.xp.where(diagonal, lacking[..., None, :], -p[..., None, :])


def _per_matrix(r: Rows, temperature: Array | float | None) -> Array | float | None:
    """Add an axis to a temperature with one entry a row, for the row's Jacobian."""
    if temperature is None or isinstance(temperature, float):
        return temperature
    t: Array = words(r.x).cast(temperature, r.compute)
    return t[..., None] if t.ndim else t
