"""top-k, top-p and min-p: which tokens survive.

Tokens are ordered by logit, then by index. Each filter keeps a prefix of that order, so all of them together keep the
first m for some m: the m-th greatest value, and how many of the entries that are equal to it, say which.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from polysoftmax._arrays import (
    Array,
    Rows,
    accurate_sum,
    cast,
    default_index,
    device_for,
    is_number,
    largest,
    namespace,
    row_maximum,
    rows,
    take_along,
)
from polysoftmax._softmax import over_temperature
from polysoftmax.engines import RowFormula

if TYPE_CHECKING:
    from polysoftmax._arrays import Axis, Number


def truncated(
    x: Array,
    temperature: Array | float | None,
    k: Array | None,
    p: Array | float | None,
    min_p: Array | float | None,
    *,
    top_k: int | None,
) -> Array:
    """Return x with -inf for what the filters remove, and NaN for a row that has no answer; along the last axis."""
    xp = namespace(x)
    top = row_maximum(x, x.ndim - 1)
    keep = top == top
    if top_k is None and k is None and p is None:
        if min_p is not None:
            keep = xp.exp(over_temperature(x - top, temperature)) >= min_p
    else:
        values = largest(x, x.shape[-1] if top_k is None else top_k)
        m = _survivors(values, temperature, k, p, min_p)
        least = take_along(values, xp.astype(m - 1, default_index(xp)), x.ndim - 1)
        tie = x == least
        room = m - xp.sum(xp.astype(values > least, xp.int32), axis=-1, keepdims=True, dtype=xp.int32)
        rank = xp.cumulative_sum(xp.astype(tie, xp.int32), axis=-1, dtype=xp.int32)
        keep = (x > least) | (tie & (rank <= room))
    answered = top < math.inf
    for bound, most in ((k, math.inf), (p, 1.0), (min_p, 1.0), (temperature, math.inf)):
        if bound is not None and not isinstance(bound, float):
            answered = answered & (bound >= 0) & (bound <= most)  # False for NaN
    return xp.where(answered, xp.where(keep, x, -math.inf), math.nan)


def _survivors(
    values: Array,
    temperature: Array | float | None,
    k: Array | None,
    p: Array | float | None,
    min_p: Array | float | None,
) -> Array:
    """Return how many of the values, which decrease along the last axis, survive: at least one."""
    xp = namespace(values)
    mass = xp.exp(over_temperature(values - values[..., :1], temperature))
    kept = mass == mass
    if k is not None:
        rank = xp.arange(values.shape[-1], dtype=values.dtype, device=device_for(values))
        kept = (rank < k) | (k == 0)
        mass = xp.where(kept, mass, 0.0)
    if p is not None:
        before = xp.cumulative_sum(mass, axis=-1) - mass
        short = before < p * accurate_sum(mass, mass.ndim - 1)
        kept = kept & (short if isinstance(p, float) else short | (p >= 1))
    if min_p is not None:
        kept = kept & (mass >= min_p)
    count = xp.sum(xp.astype(kept, xp.int32), axis=-1, keepdims=True, dtype=xp.int32)
    return xp.maximum(count, xp.ones_like(count))


def _truncate(
    x: Array,
    temperature: Array | float | None,
    k: Array | None,
    p: Array | float | None,
    min_p: Array | float | None,
    *,
    axis: int,
    top_k: int | None,
) -> Array:
    xp = namespace(x)
    operands = (xp.moveaxis(one, axis, -1) if is_spread(one) else one for one in (x, temperature, k, p, min_p))
    return xp.moveaxis(truncated(*operands, top_k=top_k), -1, axis)


def is_spread(operand: Array | float | None) -> bool:
    """Whether an operand has axes, and is not a number for all rows."""
    return operand is not None and not isinstance(operand, float) and operand.ndim > 0


TRUNCATE = RowFormula("truncate", _truncate)


class Filters(NamedTuple):
    """The filters of a call in the form that formulas take; None where one is off."""

    k: Array | None
    p: Array | float | None
    min_p: Array | float | None
    top_k: int | None

    @property
    def off(self) -> bool:
        """Whether nothing is filtered."""
        return all(one is None for one in self)


def filters(r: Rows, top_k: Array | int | None, top_p: Array | Number | None, min_p: Array | Number | None) -> Filters:
    """Check the filters of a call; a number that keeps everything is the same as None."""
    k = None
    if is_number(top_k):
        top_k = _whole(top_k)
        top_k = top_k if 0 < top_k < r.length else None
    elif top_k is not None:
        k, top_k = r.parameter(top_k, "top_k"), None
    return Filters(k, _share(r, top_p, "top_p", off=1.0), _share(r, min_p, "min_p", off=0.0), top_k)


def _whole(top_k: Array | int) -> int:
    if not hasattr(top_k, "__index__"):
        msg = f"top_k must be a whole number of tokens, got {top_k!r}"
        raise TypeError(msg)
    if top_k < 0:
        msg = f"top_k must be 0 (off) or greater, got {top_k}"
        raise ValueError(msg)
    return int(top_k)


def _share(r: Rows, value: Array | Number | None, name: str, off: float) -> Array | float | None:
    if value is None:
        return None
    value = r.parameter(value, name)
    if isinstance(value, float):
        if not 0.0 <= value <= 1.0:
            msg = f"{name} must lie in [0, 1], got {value}"
            raise ValueError(msg)
        return None if value == off else value
    return value


def truncate(
    logits: Array,
    /,
    *,
    axis: Axis = -1,
    temperature: Array | Number = 1.0,
    top_k: Array | int | None = None,
    top_p: Array | Number | None = None,
    min_p: Array | Number | None = None,
) -> Array:
    r"""Remove unlikely tokens: their logits become -inf, and the others keep every bit.

    Parameters
    ----------
    logits : array
        Real, of any shape.
    axis : int, tuple of ints, or None
        The axes of the tokens; several are flattened in increasing order.
    temperature : number or array
        T, in units of the logits, 0 or greater. It decides what top_p and min_p remove; the logits stay unscaled.
    top_k : int or array, optional
        How many tokens survive: exactly that many, the lowest indices among equals. 0 switches it off.
    top_p : number or array, optional
        The shortest prefix of the tokens, in order of probability and then index, whose mass reaches top_p
        survives, the token that crosses it included. 1 switches it off.
    min_p : number or array, optional
        Tokens with p >= min_p · max p survive. 0 switches it off.

    Returns
    -------
    array
        Of the shape and float dtype of ``logits``.

    Raises
    ------
    TypeError
        If ``logits`` is not an array, or arrays of two libraries or devices are mixed.
    ValueError
        If a filter or a temperature given as a number is out of range, or a shape does not fit.
    AxisError
        A ValueError and IndexError, if ``axis`` is out of bounds.
    NotImplementedError
        For top_k and top_p on Dask, which cannot sort lazily.

    Notes
    -----
    The filters are applied in this order, each to what the one before left, renormalised; the most likely token
    always survives. Each parameter is a number, or an array with one entry a row (see `softmax`), whose bad entries
    make their own rows NaN. A row with NaN or +inf becomes NaN; a row of -inf stays. Sources: top-k: Fan, Lewis and Dauphin,
    ACL 2018; top-p: Holtzman et al., "The curious case of neural text degeneration", ICLR 2020; min-p: Nguyen et al.,
    ICLR 2025.

    Examples
    --------
    >>> import numpy as np
    >>> import polysoftmax
    >>> polysoftmax.truncate(np.asarray([1.0, 3.0, 2.0, 3.0]), top_k=2)
    array([-inf,   3., -inf,   3.])
    >>> polysoftmax.truncate(np.log([0.5, 0.3, 0.15, 0.05]), top_p=0.6).round(3)
    array([-0.693, -1.204,   -inf,   -inf])
    """
    r = rows(logits, axis)
    temperature = r.temperature(temperature)
    kept = filters(r, top_k, top_p, min_p)
    if r.length == 0:
        return r.elementwise(cast(r.x, r.result))
    if kept.off and not is_spread(temperature):
        answered = row_maximum(r.x, r.axis) < math.inf
        return r.elementwise(cast(r.xp.where(answered, cast(r.x, r.result), math.nan), r.result))
    return r.elementwise(TRUNCATE(r, r.x, temperature, kept.k, kept.p, kept.min_p, top_k=kept.top_k))
