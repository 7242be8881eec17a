"""Dense Jacobians, and their products with a vector from either side without the matrix.

The rules themselves stand beside each function in ``_softmax.py``; automatic differentiation uses the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from polysoftmax._arrays import Rows, cast, device_for, last_rows, rows
from polysoftmax._softmax import LOG_SOFTMAX, SOFTMAX, over_regular_temperature
from polysoftmax.engines import RowFormula

if TYPE_CHECKING:
    from polysoftmax._arrays import Array, Axis, Number


def _pushforward(formula: RowFormula) -> RowFormula:
    def jvp(x: Array, tangent: Array, temperature: Array | float | None, where: Array | None, *, axis: int) -> Array:
        operands = (x, temperature, where)
        y = formula.function(*operands, axis=axis)
        assert formula.jvp is not None
        return formula.jvp(operands, (tangent, None), y, axis=axis)

    return RowFormula(f"{formula.name}_jvp", jvp)


def _pullback(formula: RowFormula) -> RowFormula:
    def vjp(x: Array, cotangent: Array, temperature: Array | float | None, where: Array | None, *, axis: int) -> Array:
        operands = (x, temperature, where)
        y = formula.function(*operands, axis=axis)
        assert formula.vjp is not None
        return formula.vjp(operands, y, cotangent, (True, False), axis=axis)[0]

    return RowFormula(f"{formula.name}_vjp", vjp)


SOFTMAX_JVP, SOFTMAX_VJP = _pushforward(SOFTMAX), _pullback(SOFTMAX)
LOG_SOFTMAX_JVP, LOG_SOFTMAX_VJP = _pushforward(LOG_SOFTMAX), _pullback(LOG_SOFTMAX)


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
    return _product(SOFTMAX_JVP, x, tangent, "tangent", axis, temperature, where)


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
    return _product(SOFTMAX_VJP, x, cotangent, "cotangent", axis, temperature, where)


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
    return _product(LOG_SOFTMAX_JVP, x, tangent, "tangent", axis, temperature, where)


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
    return _product(LOG_SOFTMAX_VJP, x, cotangent, "cotangent", axis, temperature, where)


def _product(
    formula: RowFormula,
    x: Array,
    vector: Array,
    name: str,
    axis: Axis,
    temperature: Array | Number,
    where: Array | None,
) -> Array:
    r = rows(x, axis)
    vector = r.like_input(vector, name)
    if r.length == 0:
        return r.elementwise(cast(vector, r.result))
    return r.elementwise(formula(r, r.x, vector, r.temperature(temperature), r.mask(where)))


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
    matrix = y[..., :, None] * (_identity(r) - y[..., None, :])
    return cast(over_regular_temperature(matrix, _per_matrix(t)), r.result)


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
    return cast(over_regular_temperature(_identity(r) - p[..., None, :], _per_matrix(t)), r.result)


def _probabilities(r: Rows, temperature: Array | float | None) -> Array:
    return SOFTMAX(r, r.x, temperature, None, result=r.compute) if r.length else cast(r.x, r.compute)


def _identity(r: Rows) -> Array:
    return r.xp.eye(r.length, dtype=r.compute, device=device_for(r.x))


def _per_matrix(temperature: Array | float | None) -> Array | float | None:
    """Give a temperature with one entry a row one more axis, for the Jacobian of the row."""
    if temperature is None or isinstance(temperature, float) or temperature.ndim == 0:
        return temperature
    return temperature[..., None]
