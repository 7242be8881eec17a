"""top-k, top-p and min-p: which tokens survive.

Tokens are ordered by logit, then by index, and each filter keeps a prefix of that order: all that is above a threshold,
and the first few of the entries that are equal to it.
"""

from __future__ import annotations

import math
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple

from polysoftmax._arrays import (
    Array,
    Rows,
    below,
    cast,
    float_bits,
    indices,
    is_number,
    namespace,
    or_nan,
    row_maximum,
    rows,
    stop_gradient,
    take_along,
)
from polysoftmax._softmax import over_temperature
from polysoftmax.engines import RowFormula
from polysoftmax.engines.selection import count, end_of_prefix, first, kth_greatest, leading

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax._arrays import Axis, Number


def truncated(
    x: Array,
    temperature: Array | float | None,
    where: Array | None,
    k: Array | None,
    p: Array | float | None,
    min_p: Array | float | None,
    *,
    top_k: int | None,
) -> Array:
    """Return x with -inf for what the filters remove, and NaN for a row that has no answer; along the last axis."""
    xp = namespace(x)
    if where is not None:
        x = xp.where(where, x, -math.inf)
    top = row_maximum(x, x.ndim - 1)
    by_mass = not (p is None and min_p is None)
    if by_mass and top_k is not None and are_few(top_k, x.shape[-1]):
        values, index = leading_of(stop_gradient(x), top_k)
        _, end, last = filtered_few(values, index, temperature, p, min_p)
        kept = xp.where(_up_to(x, indices(x), end, last), x, -math.inf)
    else:
        kept = _filtered(x, top, temperature, k, p, min_p, top_k)
    answered = top < math.inf
    for bound, most in ((k, math.inf), (p, 1.0), (min_p, 1.0), (temperature, math.inf)):
        if bound is not None and not isinstance(bound, float):
            answered = answered & (bound >= 0) & (bound <= most)  # False for NaN
    return or_nan(kept, answered, top)


def _filtered(
    x: Array,
    top: Array,
    temperature: Array | float | None,
    k: Array | None,
    p: Array | float | None,
    min_p: Array | float | None,
    top_k: int | None,
) -> Array:
    xp = namespace(x)
    kept = x
    if top_k is not None:
        kept = xp.where(_first_k(kept, top_k), kept, -math.inf)
    elif k is not None:
        inside = _prefix(kept, xp.ones_like, lambda _: xp.where(k > 0, k, 1.0))
        kept = xp.where((k == 0) | inside, kept, -math.inf)

    def mass_of(entries: Array) -> Array:
        return xp.exp(over_temperature(below(entries, top), temperature))

    if p is not None:
        # In the compute dtype, which the whole mass may be wider than. A number has been rounded to it, except where
        # torch.compile has a symbol for it, with which it simplifies that arithmetic away.
        share = p * xp.ones_like(top)
        inside = _prefix(kept, mass_of, lambda total: share * total)
        kept = xp.where(inside if isinstance(p, float) else inside | (p >= 1), kept, -math.inf)
    if min_p is not None:
        kept = xp.where(mass_of(kept) >= min_p, kept, -math.inf)
    return kept


def are_few(top_k: int, n: int) -> bool:
    """Whether top_k of n tokens are so few that they are taken out of the row, and each is compared with each other."""
    return 2 * top_k**2 <= n


def leading_of(x: Array, top_k: int) -> tuple[Array, Array]:
    """Return the top_k greatest logits of every row, and their indices, which increase."""
    index = leading(x, top_k)
    return take_along(x, index, x.ndim - 1), namespace(x).astype(index, namespace(x).int32)


def filtered_few(
    x: Array, index: Array, temperature: Array | float | None, p: Array | float | None, min_p: Array | float | None
) -> tuple[Array, Array, Array]:
    """Return what top_p and min_p leave of the few tokens that top_k left, the least logit of it, and its last index.

    `truncated` and the draw both ask here, because a sum in another order could end at another token.
    """
    xp = namespace(x)
    left = truncated(x, temperature, None, None, p, min_p, top_k=None)
    end = xp.min(xp.where(left > -math.inf, left, math.inf), axis=-1, keepdims=True)
    last = xp.max(xp.where(left == end, index, -1), axis=-1, keepdims=True)
    # Exponentials grow with the logits only up to rounding, so min_p may leave a gap, which a prefix has not. What is
    # NaN, because the row has no answer, stays.
    return xp.where(_up_to(x, index, end, last), x, left), end, last


def _up_to(x: Array, index: Array, end: Array, last: Array) -> Array:
    """Return which entries come before a last one in order, or are it."""
    return (x > end) | ((x == end) & (index <= last))


def _first_k(x: Array, k: int) -> Array:
    """Return which entries are the k greatest, the lowest indices among equals."""
    least = kth_greatest(x, k)
    above = x > least
    return above | first(x == least, k - cast(count(above), x.dtype))


def _prefix(x: Array, mass_of: Callable[[Array], Array], target_of: Callable[[Array], Array]) -> Array:
    """Return which entries belong to the shortest prefix whose mass reaches the target, the one that does included."""
    end, room = end_of_prefix(x, mass_of, target_of)
    return (x > end) | first(x == end, room)


def along_last(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function of rows along the last axis one of rows along any."""

    @wraps(function)
    def along_any(*operands: Array | float | None, axis: int, **options: Any) -> Any:
        x = operands[0]
        if axis == x.ndim - 1:  # type: ignore[union-attr]
            return function(*operands, **options)
        xp = namespace(x)
        y = function(*(xp.moveaxis(one, axis, -1) if is_spread(one) else one for one in operands), **options)
        return tuple(xp.moveaxis(one, -1, axis) for one in y) if isinstance(y, tuple) else xp.moveaxis(y, -1, axis)

    return along_any


def is_spread(operand: Array | float | None) -> bool:
    """Whether an operand has axes, and is not a number for all rows."""
    return operand is not None and not isinstance(operand, float) and operand.ndim > 0


def _truncated_vjp(
    operands: tuple[Array, ...], y: Array, cotangent: Array, wanted: tuple[bool, ...], **options: Any
) -> tuple[Array | None, ...]:
    """Return the gradient for the rows: what survives moves with its logit, and the filters are constants."""
    del options
    xp = namespace(y)
    others = (xp.zeros_like(one) if asked else None for one, asked in zip(operands[1:], wanted[1:], strict=True))
    return xp.where(y > -math.inf, cotangent, 0.0), *others


# With a rule PyTorch's engine runs the kernel for logits that need a gradient, too, and a draw from these runs it.
TRUNCATE = RowFormula("truncate", along_last(truncated), vjp=_truncated_vjp, from_output=True, many_steps=True)


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
    given = r.parameter(value, name)
    if not isinstance(given, float):
        return given
    if not 0.0 <= float(value) <= 1.0:  # as it was given: 1 + 1e-9 is out of range
        msg = f"{name} must lie in [0, 1], got {float(value)}"
        raise ValueError(msg)
    return None if given == off else given


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
    always survives. Each parameter is a number, or an array with one entry a row (see `softmax`); a bad entry makes
    its own row NaN. A row with NaN or +inf becomes NaN; a row of -inf stays.

    A number is rounded to the dtype that is computed in, as an array of it would be: ``top_p=0.9`` is 0.89999998 for
    logits of 32 bits or fewer. Where the mass of a prefix lies within rounding of p, libraries and engines may differ
    by a token. `sample` never differs from the ``truncate`` of the same engine: one function decides for both.

    Sources: top-k: Fan, Lewis and Dauphin, ACL 2018; top-p: Holtzman et al., "The curious case of neural text
    degeneration", ICLR 2020; min-p: Nguyen et al., ICLR 2025.

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
        x = cast(r.x, r.result)
        top = row_maximum(x, r.axis)
        return r.elementwise(or_nan(x, top < math.inf, top))
    # Integers are widened here as they are for a draw, which may change how they lie in memory, and so the engine.
    x = r.x if float_bits(r.xp, r.x.dtype) else cast(r.x, r.compute)
    return r.elementwise(TRUNCATE(r, x, temperature, None, kept.k, kept.p, kept.min_p, top_k=kept.top_k))
