"""partial, merge and merge_outputs: rows in parts, which may come one by one or lie on several devices."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from polysoftmax._arrays import cast, is_number, library, require_same_library
from polysoftmax._partial import (
    LOG_PROB_OF_PARTIAL,
    LOGSUMEXP_OF_PARTIAL,
    MERGE,
    MERGE_OUTPUTS,
    PARTIAL,
    SOFTMAX_OF_PARTIAL,
)
from polysoftmax._rows import rows

if TYPE_CHECKING:
    from polysoftmax._arrays import Array
    from polysoftmax._rows import Axis, Number, Rows


class Partial(NamedTuple):
    """Statistics of a part of each row, as `partial` answers them and `merge` merges them.

    A named tuple of arrays that have length 1 on the axis, so JAX and PyTorch take it apart like any other, in ``jit``,
    ``scan``, ``vmap`` and collectives. ``Partial(-math.inf, 0.0, 0.0)`` is the part without entries: merged with
    another, it changes nothing.

    Attributes
    ----------
    maximum : array
        The greatest entry of each row, -inf where there is none.
    count : array
        The number of entries that are equal to it, as a floating number.
    rest : array
        Σ exp((x - maximum) / T) over the entries below it.
    temperature : None, float or array
        The T that the parts are under, None for 1; it is the same for parts that merge.

    Examples
    --------
    >>> import numpy as np
    >>> import polysoftmax
    >>> part = polysoftmax.partial(np.log([[1.0, 2.0, 2.0, 4.0]]))
    >>> np.exp(part.maximum).round(6), part.count, part.rest
    (array([[4.]]), array([[1.]]), array([[1.25]]))
    """

    maximum: Array
    count: Array
    rest: Array
    temperature: Array | float | None = None

    def logsumexp(self) -> Array:
        """Return log Σ exp(x / T) of each row, with length 1 on the axis; -inf for no entries."""
        r, others = _laid_out(self.maximum, self)
        return r.elementwise(LOGSUMEXP_OF_PARTIAL(r, r.x, *others[1:]))

    def softmax(self, x: Array, /, *, where: Array | None = None) -> Array:
        """Return the probabilities of entries of the rows, which broadcast against the statistics.

        What ``where`` hides has a probability of 0, as has everything in a row without entries.
        """
        r, others = _laid_out(x, self)
        return r.elementwise(SOFTMAX_OF_PARTIAL(r, r.x, *others, r.mask(where)))

    def log_prob(self, x: Array, /, *, where: Array | None = None) -> Array:
        """Return the log-probabilities of entries of the rows, in float32 or wider.

        ``x`` holds logits, the whole part or those of some tokens, and broadcasts against the statistics. What
        ``where`` hides has -inf, as has everything in a row without entries.
        """
        r, others = _laid_out(x, self)
        return r.elementwise(LOG_PROB_OF_PARTIAL(r, r.x, *others, r.mask(where), result=r.compute))


def partial(x: Array, /, *, axis: Axis = -1, temperature: Array | Number = 1.0, where: Array | None = None) -> Partial:
    r"""Statistics of a part of each row, from which those of the whole are merged.

    .. math:: m = \max_i x_i, \qquad c = \#\{i : x_i = m\}, \qquad r = \sum_{x_i < m} e^{(x_i - m) / T}

    Parameters
    ----------
    x : array
        Logits, real, of any shape: a part of the entries along ``axis``.
    axis : int, tuple of ints, or None
        The axes that the statistics are taken along; None means all.
    temperature : number or array
        T, in units of the logits, 0 or greater: a number, or an array with one entry a row (see `softmax`).
    where : array of bool, optional
        Broadcasts against ``x``. Entries under False do not exist.

    Returns
    -------
    Partial
        The maximum, how many entries are equal to it, and what the others add up to below it: arrays with length 1 on
        ``axis``, in float32 or wider.

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
    The terms at the maximum stay out of the sum, so a logsumexp close to 0 keeps its digits however many parts there
    are. Entries of -inf are counted where they are the maximum: a row of -inf has probabilities of NaN, one without
    entries has 0. NaN stays in its row. Differentiable: the maximum is a constant, and its entries move through
    ``count``. Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867.

    Examples
    --------
    A softmax over a vocabulary that is cut in two:

    >>> import numpy as np
    >>> import polysoftmax
    >>> left, right = np.log([0.1, 0.3]), np.log([0.2, 0.4])
    >>> whole = polysoftmax.merge(polysoftmax.partial(left), polysoftmax.partial(right))
    >>> whole.softmax(left).round(6), whole.softmax(right).round(6)
    (array([0.1, 0.3]), array([0.2, 0.4]))
    >>> whole.logsumexp().round(6) + 0.0
    array([0.])
    """
    r = rows(x, axis)
    r = replace(r, result=r.compute)
    t, mask = r.temperature(temperature), r.mask(where)
    if r.length == 0:
        top, count, rest = (r.empty_result(answer) for answer in (-math.inf, 0.0, 0.0))
    else:
        top, count, rest = PARTIAL(r, r.x, t, mask, squeeze=True)
    return Partial(r.keepdims(top), r.keepdims(count), r.keepdims(rest), _beside(r, t))


def _beside(r: Rows, t: Array | float | None) -> Array | float | None:
    """Return a temperature in the shape of the statistics, or one that broadcasts against it."""
    if t is None or isinstance(t, float) or not t.ndim or not r.flattened:
        return t
    return r.keepdims(r.xp.broadcast_to(t, (*r.reduced_shape, 1)))


def merge(a: Partial, b: Partial, /) -> Partial:
    """Merge the statistics of two parts of each row to those of both together.

    Parameters
    ----------
    a, b : Partial
        Of one shape and one temperature. A part of three numbers, such as ``Partial(-math.inf, 0.0, 0.0)``, stands for
        arrays of them.

    Returns
    -------
    Partial
        The statistics of what is in either part. Merging is associative and commutative, up to rounding.

    Raises
    ------
    TypeError
        If the parts are not a `Partial`, are both numbers, or belong to two libraries or devices.
    ValueError
        If their shapes differ, or two temperatures that are numbers.

    Notes
    -----
    The lower part is scaled by exp((m_lower - m_higher) / T), at most 1, so nothing overflows. Differentiable.

    Examples
    --------
    >>> import functools, math
    >>> import numpy as np
    >>> import polysoftmax
    >>> chunks = np.split(np.arange(12.0), 4)
    >>> nothing = polysoftmax.Partial(-math.inf, 0.0, 0.0)
    >>> whole = functools.reduce(polysoftmax.merge, map(polysoftmax.partial, chunks), nothing)
    >>> float(whole.logsumexp()[0].round(6)), float(polysoftmax.logsumexp(np.arange(12.0)).round(6))
    (11.458669, 11.458669)
    """
    _require_partial(a)
    _require_partial(b)
    a, b = _filled(a, b), _filled(b, a)
    t = _common_temperature(a.temperature, b.temperature)
    r, others = _laid_out(a.maximum, b._replace(temperature=t))
    mine = [r.like_input(one, "count and rest of one part") for one in a[1:3]]
    top, count, rest = map(r.elementwise, MERGE(r, r.x, *mine, *others))
    return Partial(top, count, rest, t)


def _require_partial(part: object) -> None:
    if not isinstance(part, Partial):
        msg = f"merge takes two of polysoftmax.Partial, got {type(part).__name__}"
        raise TypeError(msg)


def _filled(part: Partial, like: Partial) -> Partial:
    """Return a part of arrays, where it may be one of numbers."""
    if not is_number(part.maximum):
        return part
    if is_number(like.maximum):
        msg = "both parts hold numbers: one must hold the arrays of polysoftmax.partial"
        raise TypeError(msg)
    xp = library(like.maximum).xp
    top, count, rest = (xp.full_like(like.maximum, float(one)) for one in part[:3])
    return Partial(top, count, rest, like.temperature)


def _common_temperature(a: Array | float | None, b: Array | float | None) -> Array | float | None:
    numbers = [1.0 if one is None else one for one in (a, b)]
    if all(map(is_number, numbers)) and numbers[0] != numbers[1]:
        msg = f"the parts are under two temperatures, {numbers[0]} and {numbers[1]}: take them under one"
        raise ValueError(msg)
    return b if is_number(numbers[0]) else a


def _laid_out(x: Array, part: Partial) -> tuple[Rows, list[Any]]:
    """Return entries as rows, and what a part knows of these, in the layout of the rows."""
    r = rows(x, -1)
    others = []
    for name, one in zip(part._fields, part, strict=True):
        if one is None or isinstance(one, float):
            others.append(one)
            continue
        require_same_library(r.x, one, name)
        if one.ndim and (
            one.ndim != len(r.shape) or any(m not in (1, n) for m, n in zip(one.shape, r.shape, strict=True))
        ):
            msg = f"{name} has shape {tuple(one.shape)}, which does not broadcast against {r.shape}"
            raise ValueError(msg)
        others.append(r.xp.reshape(one, (1,)) if r.flattened and not one.ndim else r.real(one, name))
    return r, others


def merge_outputs(a: tuple[Array, Array], b: tuple[Array, Array], /) -> tuple[Array, Array]:
    r"""Merge attention over two parts of the keys.

    .. math:: l = \log(e^{l_a} + e^{l_b}), \qquad o = \frac{e^{l_a} o_a + e^{l_b} o_b}{e^{l_a} + e^{l_b}}

    Parameters
    ----------
    a, b : (array, array)
        For each query the logsumexp of its scores over a part of the keys, of shape (...), and the mean of the values
        under their softmax, of shape (..., d); both pairs of one shape.

    Returns
    -------
    (array, array)
        The logsumexp over both parts, in float32 or wider, and the output, in the dtype of ``a``'s.

    Raises
    ------
    TypeError
        If one of them is not an array, or they belong to two libraries or devices.
    ValueError
        If a shape does not fit.

    Notes
    -----
    A part without keys has a logsumexp of -inf, and its output, whatever it is, counts for nothing; without keys in
    either, the output is 0. A sink, a logit that has no value, is the part ``(sink, zeros)``. Differentiable. Source:
    T. Dao and others, "FlashAttention", NeurIPS 2022.

    Examples
    --------
    >>> import numpy as np
    >>> import polysoftmax
    >>> one = np.asarray(0.0), np.asarray([1.0, 0.0])
    >>> other = np.log(3.0), np.asarray([0.0, 1.0])
    >>> lse, output = polysoftmax.merge_outputs(one, other)
    >>> np.exp(lse).round(6), output
    (np.float64(4.0), array([0.25, 0.75]))
    """
    (lse_a, out_a), (lse_b, out_b) = a, b
    r, like = rows(out_a, -1), rows(lse_a, -1)
    if not r.shape or like.shape != r.shape[:-1]:
        msg = f"an output of shape {r.shape} needs a logsumexp of shape {r.shape[:-1]}, got {like.shape}"
        raise ValueError(msg)
    lse_b = like.like_input(lse_b, "the other logsumexp")
    others = r.like_input(out_b, "the other output")
    require_same_library(r.x, lse_a, "the logsumexp")
    xp = r.xp
    first, second = (xp.reshape(r.real(one, "the logsumexp"), (*r.shape[:-1], 1)) for one in (lse_a, lse_b))
    lse, out = MERGE_OUTPUTS(r, r.x, first, others, second)
    return xp.squeeze(lse, axis=-1), cast(out, r.result)
