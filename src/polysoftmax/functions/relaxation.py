"""gumbel_softmax."""

from __future__ import annotations

from typing import TYPE_CHECKING

from polysoftmax._formula import words
from polysoftmax._rows import last_rows
from polysoftmax._sampling import GUMBEL_SOFTMAX, PEAK
from polysoftmax._softmax import SOFTMAX
from polysoftmax.random import as_key

if TYPE_CHECKING:
    from polysoftmax._arrays import Array, DType
    from polysoftmax._rows import Axis, Number


def gumbel_softmax(
    logits: Array,
    key: Array | int | object,
    /,
    temperature: Array | Number = 1.0,
    *,
    hard: bool = False,
    axis: Axis = -1,
    where: Array | None = None,
    dtype: DType | None = None,
) -> Array:
    r"""Relax a draw: the softmax of logits with Gumbel noise, which has a gradient where a token has none.

    .. math:: y_i = \frac{e^{(x_i + g_i) / T}}{\sum_j e^{(x_j + g_j) / T}}

    Parameters
    ----------
    logits : array
        Real, of any shape.
    key : int, key or generator
        As for `sample`: one key, which is folded with each row's number, or one key a row.
    temperature : number or array
        T, in units of the logits, 0 or greater: of the relaxation, not of the distribution. The less it is, the nearer
        is y to a single 1.
    hard : bool
        Whether the answer is 1 at the greatest entry and 0 elsewhere, with the gradient of y as it is without this
        option: the straight-through estimator.
    axis : int, tuple of ints, or None
        The axes of the tokens; several are flattened in increasing order.
    where : array of bool, optional
        Broadcasts against ``logits``. Tokens under False do not exist, and are 0.
    dtype : dtype, optional
        Real floating dtype of the result; by default that of ``logits``.

    Returns
    -------
    array
        Of the shape of ``logits``; rows sum to 1.

    Raises
    ------
    TypeError
        If ``logits`` is not an array, or ``key`` is no key (see `sample`).
    ValueError
        If the axis is empty, the keys do not match the rows, or a temperature given as a number is out of range.
    AxisError
        A ValueError and IndexError, if ``axis`` is out of bounds.

    Notes
    -----
    The noise is that of `sample`: the greatest entry of a row stands at the token ``sample(logits, key)``, except where
    two noisy logits lie within rounding of each other. Each g_i is a standard Gumbel variate, independent of the rest.
    For derivatives it is a constant, as its law is, though with one key its value changes with the logits. A row with
    NaN or +inf, or of -inf, is NaN; one under a mask without a True is 0. Sources: Jang, Gu and Poole, "Categorical
    reparameterization with Gumbel-softmax"; Maddison, Mnih and Teh, "The concrete distribution"; both ICLR 2017.

    Examples
    --------
    >>> import numpy as np
    >>> import polysoftmax
    >>> logits = np.log([0.1, 0.2, 0.7])
    >>> polysoftmax.gumbel_softmax(logits, 7, 0.5).round(3)
    array([0.986, 0.002, 0.013])
    >>> polysoftmax.gumbel_softmax(logits, 7, 0.5, hard=True), int(polysoftmax.sample(logits, 7))
    (array([1., 0., 0.]), 0)
    """
    r = last_rows(logits, axis, dtype)
    r.require_entries("gumbel_softmax", "token")
    keys = as_key(key, like=r.x)
    t, mask = r.temperature(temperature), r.mask(where)
    _require_one_key_a_row(tuple(keys.shape[:-1]), r.reduced_shape)
    x, is_one_key = words(r.x).cast(r.x, r.compute), keys.ndim == 1 and bool(r.reduced_shape)
    noise = GUMBEL_SOFTMAX(r, words(x).constant(x), keys, mask, result=r.compute, is_one_key=is_one_key)
    return r.elementwise((PEAK if hard else SOFTMAX)(r, x + noise, t, mask))


def _require_one_key_a_row(keys: tuple[int, ...], batch: tuple[int, ...]) -> None:
    if keys and keys != batch:
        msg = f"keys must be one, of shape (2,), or one a row, of shape {(*batch, 2)}, got {(*keys, 2)}"
        raise ValueError(msg)
