"""cross_entropy, entropy and kl_divergence.

As in ``_softmax.py``, z stands for ``(x - max) / temperature``, p and q for probabilities, g for a cotangent. The
negative log-likelihood of a class is ``log Σ exp(x - max) + (max - x_c)``: the maximum never meets the
logarithm, so a loss close to 0 keeps its relative accuracy.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from polysoftmax._arrays import (
    Rows,
    accurate_mean,
    accurate_sum,
    accurate_total,
    along_axis,
    below,
    cast,
    default_index,
    device_for,
    extremes,
    float_bits,
    formulas_are_differentiated,
    is_number,
    namespace,
    or_nan,
    require_same_library,
    row_maximum,
    rows,
    take_along,
    where_any,
)
from polysoftmax._softmax import LOG_SOFTMAX, cotangents, exponentials, log1p_of_rest, log_of_sum, shifted, tangent_of_z
from polysoftmax.engines import RowFormula

if TYPE_CHECKING:
    from polysoftmax._arrays import Array, Axis, Number


# cross_entropy: y = Σ c·nll + z_loss·logsumexp², with c = (1 - ε)·w·target + ε·w / C';
# dy = Σ (p·Σ c - c + 2·z_loss·logsumexp·p)·dx


def _cross_entropy(
    x: Array,
    targets: Array,
    weight: Array | None,
    *,
    axis: int,
    ignore_index: int | None,
    label_smoothing: float,
    z_loss: float,
) -> Array:
    xp = namespace(x)
    is_index = not float_bits(xp, targets.dtype)
    counts = None
    if ignore_index is not None:
        counts = targets != ignore_index
        targets = xp.where(counts, targets, 0)
        if formulas_are_differentiated(x):
            x = xp.where(counts, x, 0.0)  # or the derivatives of what is ignored would be NaN where it is
    top = row_maximum(x, axis)
    if is_index and not label_smoothing:
        known = (targets >= 0) & (targets < x.shape[axis])
        index = xp.where(known, targets, 0)
        distance = -below(take_along(x, index, axis), top)
        log_total = log_of_sum(x, top, distance < 1.0, axis)  # NaN below an infinite maximum, and so is the loss
        nll = log_total + distance
        y = nll if weight is None else _times(take_along(xp.broadcast_to(weight, x.shape), index, axis), nll)
        y = or_nan(y, known, log_total)
    else:
        x = cast(x, top.dtype)  # smoothing makes numbers of the dtype of x
        log_total = log_of_sum(x, top, None, axis)
        c = _class_weights(x, targets, weight, label_smoothing, axis)
        y = accurate_sum(_times(c, log_total - below(x, top)), axis)
    if z_loss:
        y = y + z_loss * (top + log_total) ** 2
    return y if counts is None else xp.where(counts, y, 0.0)


def _times(c: Array, nll: Array) -> Array:
    """Return c·nll, where a class without weight adds 0 even if it is impossible."""
    return c * namespace(c).where((c == 0) & (nll == math.inf), 0.0, nll)


def _class_weights(x: Array, targets: Array, weight: Array | None, label_smoothing: float, axis: int) -> Array:
    """Return the factor c that each class's negative log-likelihood has in the loss of its row."""
    c = _smoothed(x, targets, label_smoothing, axis)
    return c if weight is None else c * weight


def _smoothed(x: Array, targets: Array, label_smoothing: float, axis: int) -> Array:
    """Return the target probabilities: as they are or of a class, and smoothed over the possible classes."""
    xp = namespace(x)
    if float_bits(xp, targets.dtype):
        q = targets
    else:
        n = x.shape[axis]
        index = along_axis(xp.arange(n, dtype=targets.dtype, device=device_for(x)), x.ndim, axis)
        q = xp.where(index == targets, 1.0, xp.zeros_like(x))
        q = or_nan(q, (targets >= 0) & (targets < n), row_maximum(x, axis))
    if label_smoothing:
        possible = xp.where(x == -math.inf, 0.0, xp.ones_like(x))
        q = (1.0 - label_smoothing) * q + label_smoothing * possible / accurate_sum(possible, axis)
    return q


def _slope_of_class(p: Array, total: Array, targets: Array, weight: Array | None, axis: int) -> Array:
    """Return p·Σ c - c where each row has one class, and so without an array of c."""
    xp = namespace(p)
    n = p.shape[axis]
    classes = along_axis(xp.arange(n, dtype=targets.dtype, device=device_for(p)), p.ndim, axis)
    slope = xp.where(classes == targets, p - 1.0, p)
    known = (targets >= 0) & (targets < n)
    if weight is not None:
        slope = slope * take_along(xp.broadcast_to(weight, p.shape), xp.where(known, targets, 0), axis)
    return or_nan(slope, known, total)


def _cross_entropy_slopes(
    operands: tuple[Array, ...],
    wanted: tuple[bool, ...],
    *,
    axis: int,
    ignore_index: int | None,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Array | None, Array | None, Array | None]:
    """Return the gradients of each row's loss for its logits, its target probabilities and the class weights."""
    x, targets, weight = operands
    xp = namespace(x)
    counts = None
    if ignore_index is not None:
        counts = targets != ignore_index
        x, targets = xp.where(counts, x, 0.0), xp.where(counts, targets, 0)
    distance = below(x, row_maximum(x, axis))
    terms = xp.exp(distance)
    total = accurate_sum(terms, axis)
    p = terms / total
    if float_bits(xp, targets.dtype) or label_smoothing or wanted[2]:
        q = _smoothed(x, targets, label_smoothing, axis)
        c = q if weight is None else q * weight
        slope = p * accurate_sum(c, axis) - c
    else:
        slope = _slope_of_class(p, total, targets, weight, axis)
    if z_loss:
        slope = slope + 2.0 * z_loss * (row_maximum(x, axis) + xp.log(total)) * p
    slopes: list[Array | None] = [slope, None, None]
    if wanted[1] or wanted[2]:
        nll = xp.where(x == -math.inf, 0.0, xp.log(total) - distance)
        slopes[1] = (1.0 - label_smoothing) * (nll if weight is None else nll * weight)
        slopes[2] = q * nll
    if counts is not None:
        slopes = [None if one is None else xp.where(counts, one, 0.0) for one in slopes]
    return slopes[0], slopes[1], slopes[2]


def _cross_entropy_jvp(
    operands: tuple[Array, ...], tangents: tuple[Array | None, ...], y: Array, **options: Any
) -> Array:
    del y
    slopes = _cross_entropy_slopes(operands, tuple(one is not None for one in tangents), **options)
    # Not the slope alone tells: it is 0 where the loss is least, and its own derivative is not.
    exists = operands[0] > -math.inf
    if options["ignore_index"] is not None:
        exists = exists & (operands[1] != options["ignore_index"])
    moves = [
        slope * namespace(slope).where(exists | (slope != 0), tangent, 0.0)
        for slope, tangent in zip(slopes, tangents, strict=True)
        if tangent is not None
    ]
    return accurate_sum(sum(moves[1:], moves[0]), options["axis"])


def _cross_entropy_vjp(
    operands: tuple[Array, ...], y: Array, cotangent: Array, wanted: tuple[bool, ...], **options: Any
) -> tuple[Array | None, ...]:
    del y
    slopes = _cross_entropy_slopes(operands, wanted, **options)
    return tuple(None if slope is None else slope * cotangent for slope in slopes)


CROSS_ENTROPY = RowFormula(
    "cross_entropy", _cross_entropy, jvp=_cross_entropy_jvp, vjp=_cross_entropy_vjp, promotes=True
)


# entropy: y = -Σ p·log p = log Σ exp(z) - Σ p·z;  dy = -Σ p·(log p + y)·dz


def _entropy(x: Array, temperature: Array | float | None, where: Array | None, *, axis: int) -> Array:
    xp = namespace(x)
    z = shifted(x, temperature, where, axis)
    terms = exponentials(z, temperature)
    total = accurate_sum(terms, axis)
    total = xp.where(total == 0, 1.0, total)
    p = terms / total
    log_total = where_any(total < 1.25, log1p_of_rest, (terms,), axis, xp.log(total))
    # Both terms are at least 0, so nothing cancels.
    y = log_total - accurate_sum(p * xp.where(p != 0, z, 0.0), axis)
    return y if where is None else xp.where(xp.any(where, axis=axis, keepdims=True), y, 0.0)


def _entropy_slope(
    x: Array, temperature: Array | float | None, where: Array | None, y: Array, axis: int
) -> tuple[Array, Array]:
    """Return the gradient of the entropy for z, and which entries it can move with."""
    xp = namespace(x)
    log_p = LOG_SOFTMAX.function(x, temperature, where, axis=axis)
    p = xp.exp(log_p)
    return -p * (xp.where(p != 0, log_p, 0.0) + y), p != 0


def _entropy_jvp(operands: tuple[Array, ...], tangents: tuple[Array | None, ...], y: Array, *, axis: int) -> Array:
    x, temperature, where = operands
    slope, exists = _entropy_slope(x, temperature, where, y, axis)
    dz = tangent_of_z(x, temperature, where, tangents, exists, axis)
    return accurate_sum(slope * dz, axis)


def _entropy_vjp(
    operands: tuple[Array, ...], y: Array, cotangent: Array, wanted: tuple[bool, ...], *, axis: int
) -> tuple[Array | None, ...]:
    x, temperature, where = operands
    gz = _entropy_slope(x, temperature, where, y, axis)[0] * cotangent
    return cotangents(gz, x, temperature, where, wanted, axis)


ENTROPY = RowFormula("entropy", _entropy, jvp=_entropy_jvp, vjp=_entropy_vjp)


# kl_divergence: y = Σ p·(log p - log q);  dy = Σ p·(log p - log q - y)·dz_p + Σ (q - p)·dz_q


def _kl_terms(
    x: Array, other: Array, temperature: Array | float | None, where: Array | None, axis: int
) -> tuple[Array, Array, Array]:
    """Return p, q, and log p - log q where p is not 0."""
    xp = namespace(x)
    log_p = LOG_SOFTMAX.function(x, temperature, where, axis=axis)
    log_q = LOG_SOFTMAX.function(other, temperature, where, axis=axis)
    p = exponentials(log_p, temperature)
    ratio = xp.where(p != 0, log_p, 0.0) - xp.where(p != 0, log_q, 0.0)
    return p, exponentials(log_q, temperature), ratio


def _kl_divergence(
    x: Array, other: Array, temperature: Array | float | None, where: Array | None, *, axis: int
) -> Array:
    p, _, ratio = _kl_terms(x, other, temperature, where, axis)
    return accurate_sum(p * ratio, axis)


def _kl_divergence_jvp(
    operands: tuple[Array, ...], tangents: tuple[Array | None, ...], y: Array, *, axis: int
) -> Array:
    x, other, temperature, where = operands
    dx, dother, dtemperature = tangents[:3]
    p, q, ratio = _kl_terms(x, other, temperature, where, axis)
    slope_p, slope_q = p * (ratio - y), q - p
    dz_p = tangent_of_z(x, temperature, where, (dx, dtemperature), p != 0, axis)
    dz_q = tangent_of_z(other, temperature, where, (dother, dtemperature), (p != 0) | (q != 0), axis)
    return accurate_sum(slope_p * dz_p + slope_q * dz_q, axis)


def _kl_divergence_vjp(
    operands: tuple[Array, ...], y: Array, cotangent: Array, wanted: tuple[bool, ...], *, axis: int
) -> tuple[Array | None, ...]:
    x, other, temperature, where = operands
    p, q, ratio = _kl_terms(x, other, temperature, where, axis)
    with_temperature = (True, wanted[2])
    gx, gt_p = cotangents(p * (ratio - y) * cotangent, x, temperature, where, with_temperature, axis)
    gother, gt_q = cotangents((q - p) * cotangent, other, temperature, where, with_temperature, axis)
    return gx, gother, None if gt_p is None else gt_p + gt_q


KL_DIVERGENCE = RowFormula("kl_divergence", _kl_divergence, jvp=_kl_divergence_jvp, vjp=_kl_divergence_vjp)


def cross_entropy(
    logits: Array,
    targets: Array,
    /,
    *,
    axis: Axis = -1,
    reduction: Literal["none", "sum", "mean"] = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    weight: Array | None = None,
    z_loss: float = 0.0,
) -> Array:
    r"""Cross-entropy of target classes, or target probabilities, under the softmax of logits.

    .. math:: \ell = (1 - \varepsilon)\, w_t\, \mathrm{nll}_t + \frac{\varepsilon}{C'} \sum_c w_c\, \mathrm{nll}_c
              + \zeta\, (\log \sum_j e^{x_j})^2, \qquad \mathrm{nll}_c = \log \sum_j e^{x_j} - x_c

    Parameters
    ----------
    logits : array
        Logits, real, of any shape; one entry along ``axis`` a class.
    targets : array
        Integers: the class of each row, of the shape of ``logits`` without ``axis``. Floating: probabilities q, of
        the shape of ``logits``; w_t·nll_t becomes Σ q·w·nll, and 0·log 0 is 0.
    axis : int, tuple of ints, or None
        The axis of the classes. Several are flattened in increasing order.
    reduction : {"mean", "sum", "none"}
        "mean" divides the sum by Σ w_t over the rows that count (integer targets) or by the number of rows
        (probabilities), and is 0 where that is 0. "none" gives one loss a row.
    ignore_index : int, optional
        Integer targets of this value do not count: loss 0, gradient 0, whatever their logits are.
    label_smoothing : float
        ε in [0, 1], the part of the target that is spread over the C' classes with a logit above -inf.
    weight : array, optional
        w, a factor for each class, of shape (n,) for n classes.
    z_loss : float
        ζ, 0 or greater: keeps the logsumexp of the logits near 0.

    Returns
    -------
    array
        Losses in nats, in the float dtype of ``logits``: a 0-d array, or one entry a row for "none".

    Raises
    ------
    IndexError
        If an integer target is out of range, where values can be looked at for free (NumPy, and PyTorch eager on
        the CPU); elsewhere the loss of that row is NaN.
    TypeError
        If arrays of two libraries or devices are mixed, or a dtype does not fit.
    ValueError
        If a shape, ``reduction``, ``label_smoothing`` or ``z_loss`` does not fit, if there is no class, or if
        ``ignore_index`` is given with probabilities.
    AxisError
        A ValueError and IndexError, if ``axis`` is out of bounds.

    Notes
    -----
    A target at a logit of -inf gives a loss of inf; a row of -inf, or with NaN or +inf, is NaN. The gradient,
    p·Σ c - c with the weights c of the classes, is computed from the logits alone: nothing of their size is kept
    for the backward pass. Sources: Goodfellow, Bengio and Courville, "Deep Learning", section 6.2.2; label
    smoothing: Szegedy et al., CVPR 2016; z-loss: Chowdhery et al., "PaLM", JMLR 24, 2023.

    Examples
    --------
    >>> import numpy as np
    >>> import polysoftmax
    >>> logits = np.asarray([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    >>> float(polysoftmax.cross_entropy(logits, np.asarray([2, 1])).round(4))
    0.9076
    >>> polysoftmax.cross_entropy(logits, np.asarray([2, -1]), ignore_index=-1, reduction="none").round(4)
    array([0.4076, 0.    ])
    """
    if reduction not in ("none", "sum", "mean"):
        msg = f'reduction must be "none", "sum" or "mean", got {reduction!r}'
        raise ValueError(msg)
    r = rows(logits, axis)
    if r.length == 0:
        msg = f"cross_entropy needs at least one class, got logits of shape {r.shape} with axis={axis}"
        raise ValueError(msg)
    if ignore_index is not None:
        ignore_index = _index(ignore_index, "ignore_index")
    q, is_index = _row_targets(r, targets, ignore_index)
    w = None if weight is None else _row_weight(r, weight)
    losses = CROSS_ENTROPY(
        r,
        r.x,
        q,
        w,
        result=r.compute,
        squeeze=reduction == "none",
        ignore_index=ignore_index,
        label_smoothing=_number(label_smoothing, "label_smoothing", 1.0),
        z_loss=_number(z_loss, "z_loss", math.inf),
    )
    if reduction == "none":
        return cast(losses, r.result)
    if reduction == "mean" and is_index and not (w is None and ignore_index is None):
        total = _over(accurate_total(losses), _total_weight(r, q, w, ignore_index))
    else:
        total = accurate_mean(losses) if reduction == "mean" else accurate_total(losses)
    return cast(total, r.result)


def _row_targets(r: Rows, targets: Array, ignore_index: int | None) -> tuple[Array, bool]:
    """Check the targets and bring them into the form of the rows; the second answer: whether they are classes."""
    require_same_library(r.x, targets, "targets")
    if float_bits(r.xp, targets.dtype):
        if ignore_index is not None:
            msg = f"ignore_index={ignore_index} goes with integer targets, got probabilities of dtype {targets.dtype}"
            raise ValueError(msg)
        return r.like_input(targets, "targets (floating, hence probabilities)"), False
    if not r.xp.isdtype(targets.dtype, "integral"):
        msg = f"targets must be integers (classes) or floating (probabilities), got dtype {targets.dtype}"
        raise TypeError(msg)
    if tuple(targets.shape) != r.reduced_shape:
        msg = (
            f"integer targets must have the shape of the logits without the class axis, {r.reduced_shape}, "
            f"got {tuple(targets.shape)}"
        )
        raise ValueError(msg)
    if targets.dtype != r.xp.int64:
        targets = cast(targets, default_index(r.xp))
    _require_known(r, targets, ignore_index)
    return r.from_reduced(targets), True


def _require_known(r: Rows, targets: Array, ignore_index: int | None) -> None:
    if 0 in targets.shape:
        return
    # As a rule all are classes, which the two extremes tell without arrays between.
    found = extremes(targets)
    if found is None or (found[0] >= 0 and found[1] < r.length):
        return
    known = (targets >= 0) & (targets < r.length)
    if ignore_index is not None:
        known = known | (targets == ignore_index)
    if not bool(r.xp.all(known)):
        worst = r.xp.reshape(targets, (-1,))[int(r.xp.argmin(r.xp.astype(r.xp.reshape(known, (-1,)), r.xp.int8)))]
        msg = f"target {int(worst)} is out of range for {r.length} classes and is not ignore_index={ignore_index}"
        raise IndexError(msg)


def _row_weight(r: Rows, weight: Array) -> Array:
    require_same_library(r.x, weight, "weight")
    if tuple(weight.shape) != (r.length,):
        msg = f"weight must have one entry a class, shape ({r.length},), got {tuple(weight.shape)}"
        raise ValueError(msg)
    return along_axis(r.real(weight, "weight"), r.x.ndim, r.axis)


def _index(value: int, name: str) -> int:
    if not (is_number(value) and hasattr(value, "__index__")):
        msg = f"{name} must be an int or None, got {type(value).__name__}"
        raise TypeError(msg)
    return int(value)


def _number(value: float, name: str, most: float) -> float:
    if not is_number(value):
        msg = f"{name} must be a number, got {type(value).__name__}"
        raise TypeError(msg)
    if not 0.0 <= value <= most:
        msg = f"{name} must lie in [0, {most:g}], got {value}"
        raise ValueError(msg)
    return float(value)


def _total_weight(r: Rows, targets: Array, weight: Array | None, ignore_index: int | None) -> Array:
    """Return Σ w_t over the rows that count."""
    xp = r.xp
    counts = xp.ones_like(targets, dtype=xp.bool) if ignore_index is None else targets != ignore_index
    if weight is None:
        each = xp.astype(counts, r.compute)
    else:
        known = counts & (targets >= 0) & (targets < r.length)
        each = take_along(xp.broadcast_to(weight, r.x.shape), xp.where(known, targets, 0), r.axis)
        each = xp.where(counts, each, 0.0)
    return accurate_total(each)


def _over(total: Array, count: Array) -> Array:
    """Return total / count, and 0 where there is nothing to count."""
    xp = namespace(total)
    return xp.where(count == 0, 0.0, total / xp.where(count == 0, 1.0, count))


def entropy(
    x: Array,
    /,
    *,
    axis: Axis = -1,
    temperature: Array | Number = 1.0,
    where: Array | None = None,
) -> Array:
    r"""Shannon entropy of the softmax of logits.

    .. math:: H = -\sum_i p_i \log p_i, \qquad p = \mathrm{softmax}(x / T)

    Parameters
    ----------
    x : array
        Logits, real, of any shape.
    axis : int, tuple of ints, or None
        The axes along which the probabilities sum to 1; None means all.
    temperature : number or array
        T, in units of the logits, 0 or greater; an array has one entry a row (see `softmax`).
    where : array of bool, optional
        Broadcasts against ``x``. Entries under False do not exist.

    Returns
    -------
    array
        Entropies in nats, of the shape of ``x`` without ``axis``.

    Raises
    ------
    TypeError, ValueError, AxisError
        As for `softmax`.

    Notes
    -----
    An entry of probability 0 adds 0. A row of -inf, or with NaN or +inf, is NaN; an empty row, or one with no True
    in ``where``, is 0. At temperature 0 it is the logarithm of the number of tied maxima. Source: Shannon, "A
    mathematical theory of communication", Bell System Technical Journal 27, 1948.

    Examples
    --------
    >>> import numpy as np
    >>> import polysoftmax
    >>> float(polysoftmax.entropy(np.zeros(8)) / np.log(2.0))
    3.0
    """
    r = rows(x, axis)
    if r.length == 0:
        return r.nothing(0.0)
    return ENTROPY(r, r.x, r.temperature(temperature), r.mask(where), squeeze=True)


def kl_divergence(
    logits_p: Array,
    logits_q: Array,
    /,
    *,
    axis: Axis = -1,
    temperature: Array | Number = 1.0,
    where: Array | None = None,
) -> Array:
    r"""Kullback-Leibler divergence between the softmaxes of two arrays of logits.

    .. math:: D(p \,\|\, q) = \sum_i p_i (\log p_i - \log q_i)

    Parameters
    ----------
    logits_p, logits_q : array
        Logits of p and q, real, of one shape.
    axis : int, tuple of ints, or None
        The axes along which the probabilities sum to 1; None means all.
    temperature : number or array
        T of both, in units of the logits, 0 or greater (as in distillation); an array has one entry a row (see
        `softmax`).
    where : array of bool, optional
        Broadcasts against the logits. Entries under False do not exist.

    Returns
    -------
    array
        Divergences in nats, of the shape of the logits without ``axis``, in the float dtype of ``logits_p``.

    Raises
    ------
    TypeError, ValueError, AxisError
        As for `softmax`; ``ValueError`` if the shapes of the logits differ.

    Notes
    -----
    An entry with p = 0 adds 0; one with q = 0 < p makes the divergence inf. A row that is NaN in either softmax is
    NaN; an empty row, or one with no True in ``where``, is 0. Between almost equal distributions the rounding of
    the logarithms, about 1e-7 in float32, can outweigh the divergence. Sources: Kullback and Leibler, Annals of
    Mathematical Statistics 22, 1951; with a temperature: Hinton, Vinyals and Dean, 2015.

    Examples
    --------
    >>> import numpy as np
    >>> import polysoftmax
    >>> p, q = np.log([0.5, 0.5]), np.log([0.25, 0.75])
    >>> float(polysoftmax.kl_divergence(p, q).round(4))
    0.1438
    """
    r = rows(logits_p, axis)
    other = r.like_input(logits_q, "logits_q")
    if r.length == 0:
        return r.nothing(0.0)
    return KL_DIVERGENCE(r, r.x, other, r.temperature(temperature), r.mask(where), squeeze=True)
