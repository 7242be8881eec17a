"""cross_entropy, entropy and kl_divergence."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from polysoftmax._arrays import (
    as_float,
    as_int,
    cast,
    float_bits,
    in_native_order,
    is_kind,
    is_number,
    namespace,
    quietly,
    require_same_library,
    values_are_free,
)
from polysoftmax._formula import words
from polysoftmax._losses import CROSS_ENTROPY, ENTROPY, KL_DIVERGENCE, weight_of
from polysoftmax._rows import may_be_equal, rows
from polysoftmax.functions._indices import as_index, first_outside, has_nan

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax._arrays import Array, DType
    from polysoftmax._ops import Ops
    from polysoftmax._rows import Axis, Number, Rows


def _rows(x: Array, axis: Axis, dtype: DType | None) -> Rows:
    """Return rows whose answer has what was computed: a loss of 16 bits has 3 digits, and its scaled gradient none."""
    r = rows(x, axis, dtype)
    if dtype is None:
        r.result = r.compute
    return r


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
    dtype: DType | None = None,
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
    dtype : dtype, optional
        Real floating dtype of the result; by default that of ``logits``, and float32 for 16 bits.

    Returns
    -------
    array
        Losses in nats: a 0-d array, or one entry a row for "none".

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
    p·Σ c - c with the weights c of the classes, has the dtype of the logits and is computed from them alone: nothing
    of their size is kept for the backward pass. Sources: Goodfellow, Bengio and Courville, "Deep Learning", section
    6.2.2; label smoothing: Szegedy et al., CVPR 2016; z-loss: Chowdhery et al., "PaLM", JMLR 24, 2023.

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
    r = _rows(logits, axis, dtype)
    r.require_entries("cross_entropy", "class", may_be_open=True)
    of_rows = Targets(r, targets, weight, "weight", reduction, ignore_index, label_smoothing, z_loss)
    losses = CROSS_ENTROPY(
        r,
        r.x,
        of_rows.classes,
        of_rows.weight,
        result=r.compute,
        squeeze=reduction == "none",
        reduction=None if reduction == "none" else "sum" if of_rows.is_weighted else reduction,
        **of_rows.options,
    )
    of_rows.require_known(losses)
    if reduction == "mean" and of_rows.is_weighted:
        with quietly(losses):
            losses = mean_or_zero(losses, of_rows.total_weight(words(r.x, r.axis)))
    return losses if dtype is None else cast(losses, r.result)


def require_reduction(reduction: str) -> None:
    """Raise ``ValueError`` for what is no way to reduce losses."""
    if reduction not in ("none", "sum", "mean"):
        msg = f'reduction must be "none", "sum" or "mean", got {reduction!r}'
        raise ValueError(msg)


class Targets:
    """The targets of losses, their weights and options, checked and in the layout of the rows."""

    def __init__(
        self,
        r: Rows,
        targets: Array,
        weight: Array | None,
        name_of_weight: str,
        reduction: str,
        ignore_index: int | None,
        label_smoothing: float,
        z_loss: float,
    ) -> None:
        require_reduction(reduction)
        if ignore_index is not None:
            ignore_index = as_int(ignore_index, "ignore_index", "an int or None")
        self._rows, self._given = r, targets
        self.classes, self.is_index = _row_targets(r, targets, ignore_index)
        if ignore_index is not None and not -(1 << 31) <= ignore_index < 1 << 31:
            ignore_index = _within(ignore_index, r.xp.iinfo(self.classes.dtype))
        self.weight = None if weight is None else _row_weight(r, weight, name_of_weight)
        self.is_weighted = self.is_index and not (weight is None and ignore_index is None)
        """Whether a mean is one of weights, and of rows that count."""
        self.options = {
            "ignore_index": ignore_index,
            "label_smoothing": _number(label_smoothing, "label_smoothing", 1.0),
            "z_loss": _number(z_loss, "z_loss", math.inf),
        }

    def require_known(self, losses: Array) -> None:
        """Raise ``IndexError`` where a loss is NaN, and can be looked at, for a target that is no class."""
        if not (self.is_index and values_are_free(losses) and has_nan(losses)):
            return
        r, ignore_index = self._rows, self.options["ignore_index"]
        known = (self.classes >= 0) & (self.classes < r.length)
        if ignore_index is not None:
            known = known | (self.classes == ignore_index)
        worst = first_outside(r, self._given, known)
        if worst is not None:
            msg = f"target {worst} is out of range for {r.length} classes and is not ignore_index={ignore_index}"
            raise IndexError(msg)

    def total_weight(self, ops: Ops, weight_of: Callable[[Ops, Array, Array, Array], Array] = weight_of) -> Array:
        """Return Σ w_t over the rows that count; ``weight_of`` finds those of classes."""
        r, ignore_index = self._rows, self.options["ignore_index"]
        xp, targets = r.xp, self.classes
        counts = xp.ones_like(targets, dtype=xp.bool) if ignore_index is None else targets != ignore_index
        if self.weight is None:
            return ops.total(xp.astype(counts, r.compute))
        known = (targets >= 0) & (targets < r.length)
        index = ops.where(known, targets, 0)
        each = weight_of(ops, r.x, ops.cast(self.weight, r.compute), index)
        return ops.total(ops.where(counts & known, each, 0.0))


def _row_targets(r: Rows, targets: Array, ignore_index: int | None) -> tuple[Array, bool]:
    """Check the targets and bring them into the form of the rows; the second answer: whether they are classes."""
    require_same_library(r.x, targets, "targets")
    is_int64 = targets.dtype == r.xp.int64
    if not is_int64:
        targets = in_native_order(targets)
        if float_bits(r.xp, targets.dtype):
            if ignore_index is not None:
                msg = f"ignore_index={ignore_index} goes with integer targets, got probabilities of {targets.dtype}"
                raise ValueError(msg)
            return r.like_input(targets, "targets (floating, hence probabilities)"), False
        if not is_kind(r.xp, targets.dtype, "integral"):
            msg = (
                "targets must be integers (classes) or floating with 16 bits or more (probabilities), "
                f"got dtype {targets.dtype}"
            )
            raise TypeError(msg)
    shape = tuple(targets.shape)
    if shape != r.reduced_shape and not may_be_equal(shape, r.reduced_shape):
        msg = (
            f"integer targets must have the shape of the logits without the class axis, {r.reduced_shape}, got {shape}"
        )
        raise ValueError(msg)
    if not is_int64:
        targets = as_index(targets, r, ignore_index)
    return r.from_reduced(targets), True


def _row_weight(r: Rows, weight: Array, name: str) -> Array:
    require_same_library(r.x, weight, name)
    if tuple(weight.shape) != (r.length,):
        msg = f"{name} must have one entry a class, shape ({r.length},), got {tuple(weight.shape)}"
        raise ValueError(msg)
    return r.xp.reshape(r.real(weight, name), (1,) * r.axis + (-1,) + (1,) * (r.x.ndim - r.axis - 1))


def _within(index: int, limits: Any) -> int | None:
    """Return an index that a target may be, None for one that is out of range of their dtype."""
    return index if limits.min <= index <= limits.max else None


def _number(value: float, name: str, upper: float) -> float:
    if not is_number(value):
        msg = f"{name} must be a number, got {type(value).__name__}"
        raise TypeError(msg)
    if not 0.0 <= value <= upper:
        msg = f"{name} must lie in [0, {upper:g}], got {as_float(value)}"
        raise ValueError(msg)
    return as_float(value)


def mean_or_zero(total: Array, count: Array) -> Array:
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
    dtype: DType | None = None,
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
    dtype : dtype, optional
        Real floating dtype of the result; by default that of ``x``, and float32 for 16 bits.

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
    r = _rows(x, axis, dtype)
    if r.length == 0:
        return r.empty_result(0.0)
    return ENTROPY(r, r.x, r.temperature(temperature), r.mask(where), squeeze=True)


def kl_divergence(
    logits_p: Array,
    logits_q: Array,
    /,
    *,
    axis: Axis = -1,
    temperature: Array | Number = 1.0,
    where: Array | None = None,
    dtype: DType | None = None,
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
    dtype : dtype, optional
        Real floating dtype of the result; by default that of ``logits_p``, and float32 for 16 bits.

    Returns
    -------
    array
        Divergences in nats, of the shape of the logits without ``axis``.

    Raises
    ------
    TypeError, ValueError, AxisError
        As for `softmax`; ``ValueError`` if the shapes of the logits differ.

    Notes
    -----
    An entry with p = 0 adds 0; one with q = 0 < p makes the divergence inf. A row that is NaN in either softmax is
    NaN; an empty row, or one with no True in ``where``, is 0. It is computed as Σ p·(r + exp(-r) - 1) with r =
    log p - log q, which is never negative; the error is that of r times the distance of p from q, about the square
    root of the divergence. Sources: Kullback and Leibler, Annals of
    Mathematical Statistics 22, 1951; with a temperature: Hinton, Vinyals and Dean, 2015.

    Examples
    --------
    >>> import numpy as np
    >>> import polysoftmax
    >>> p, q = np.log([0.5, 0.5]), np.log([0.25, 0.75])
    >>> float(polysoftmax.kl_divergence(p, q).round(4))
    0.1438
    """
    r = _rows(logits_p, axis, dtype)
    other = r.like_input(logits_q, "logits_q")
    if r.length == 0:
        return r.empty_result(0.0)
    return KL_DIVERGENCE(r, r.x, other, r.temperature(temperature), r.mask(where), squeeze=True)
