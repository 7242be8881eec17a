"""truncate, unpack_mask, and the checks of filters."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from polysoftmax._arrays import (
    as_float,
    as_int,
    cast,
    device_for,
    in_native_order,
    is_number,
    is_whole,
    library,
    quietly,
)
from polysoftmax._formula import words
from polysoftmax._rows import rows
from polysoftmax._truncation import TRUNCATE, Filters

if TYPE_CHECKING:
    from polysoftmax._arrays import Array
    from polysoftmax._rows import Axis, Number, Rows


def filters(
    r: Rows, top_k: Array | int | None, top_p: Array | Number | None, min_p: Array | Number | None
) -> tuple[Filters, int | None]:
    """Check the filters of a call, and return a number ``top_k`` apart; what keeps everything is the same as None."""
    if top_k is None and top_p is None and min_p is None:
        return _OFF, None
    r.require_length()
    k = None
    if is_number(top_k):
        top_k = _whole(top_k)
        top_k = top_k if 0 < top_k < r.length else None
    elif top_k is not None:
        k, top_k = r.parameter(top_k, "top_k", counts=True), None
    return Filters(k, _share(r, top_p, "top_p", off=1.0), _share(r, min_p, "min_p", off=0.0)), top_k


_OFF = Filters(None, None, None)


def _whole(top_k: Array | int) -> int:
    if not is_whole(top_k):
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
    if not 0.0 <= value <= 1.0:  # as it was given: 1 + 1e-9 is out of range
        msg = f"{name} must lie in [0, 1], got {as_float(value)}"
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
    kept, top_k = filters(r, top_k, top_p, min_p)
    if r.length == 0:
        return r.elementwise(cast(r.x, r.result))
    has_entries = not (temperature is None or isinstance(temperature, float))  # which may be bad, without axes too
    if top_k is None and not any(one is not None for one in kept) and not has_entries:
        ops, x = words(r.x, r.axis), cast(r.x, r.compute)  # NumPy's bfloat16 does not keep its dtype beside a number
        with quietly(x):
            top = ops.max(x)
            y = ops.nan_unless(top < math.inf, x, top)
        return r.elementwise(cast(y, r.result))
    # Integers are widened here as they are for a draw, which may change how they lie in memory, and so the engine.
    return r.elementwise(TRUNCATE(r, r.floats(), temperature, None, *kept, top_k=top_k))


def unpack_mask(words: Array, n: int, /) -> Array:
    """Unpack a bitmask of 32-bit words, as grammar engines give it, into a mask for ``where``.

    Parameters
    ----------
    words : array of int32 or uint32
        Of shape (..., W) with 32·W bits of n or more; token i is allowed where bit i % 32 of word i // 32 is set, the
        lowest bit being bit 0.
    n : int
        Number of tokens.

    Returns
    -------
    array of bool
        Of shape (..., n), in the library and on the device of ``words``.

    Raises
    ------
    TypeError
        If ``words`` is not an array of 32-bit integers, or ``n`` no int.
    ValueError
        If ``words`` has no axis, or not enough bits.

    Examples
    --------
    >>> import numpy as np
    >>> import polysoftmax
    >>> polysoftmax.unpack_mask(np.asarray([0b1101], np.int32), 5)
    array([ True, False,  True,  True, False])
    """
    found = library(words)
    xp, packed = found.xp, in_native_order(words)
    name = str(packed.dtype).rpartition(".")[2]
    if name not in ("int32", "uint32"):
        msg = f"words must hold 32 bits each, int32 or uint32, got dtype {packed.dtype}"
        raise TypeError(msg)
    n = as_int(n, "n")
    if packed.ndim < 1 or not 0 <= n <= 32 * packed.shape[-1]:
        msg = f"{n} tokens need {-(-n // 32)} words along the last axis, got shape {tuple(packed.shape)}"
        raise ValueError(msg)
    signed = xp.expand_dims(cast(packed, xp.int32), axis=-1)
    bits = (signed >> xp.arange(32, dtype=xp.int32, device=device_for(packed))) & 1
    flat = xp.reshape(bits, (*packed.shape[:-1], 32 * packed.shape[-1]))
    return flat[..., :n] != 0
