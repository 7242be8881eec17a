"""linear_cross_entropy and linear_log_prob: a language model's head, whose logits never stand in memory as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from polysoftmax._arrays import (
    namespace,
    quietly,
    values_are_free,
)
from polysoftmax._formula import runner, words
from polysoftmax._linear import answers_and_gradients
from polysoftmax._losses import CROSS_ENTROPY
from polysoftmax._probability import LOG_PROB
from polysoftmax.functions._indices import has_nan
from polysoftmax.functions._layer import Layer
from polysoftmax.functions.losses import Targets, mean_or_zero
from polysoftmax.functions.probability import lay_out_tokens, require_tokens
from polysoftmax.functions.truncation import filters

if TYPE_CHECKING:
    from polysoftmax._arrays import Array
    from polysoftmax._ops import Ops
    from polysoftmax._rows import Number


class LinearGradients(NamedTuple):
    """The gradients for what a linear layer takes.

    Attributes
    ----------
    hidden, weight : array
        Of the shapes and dtypes of these.
    bias : array or None
        Of the shape and dtype of the bias; None where there is none.
    """

    hidden: Array
    weight: Array
    bias: Array | None


def linear_cross_entropy(
    hidden: Array,
    weight: Array,
    targets: Array,
    /,
    *,
    bias: Array | None = None,
    softcap: float | None = None,
    reduction: Literal["none", "sum", "mean"] = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    class_weight: Array | None = None,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
) -> Array:
    r"""`cross_entropy` of the logits of a linear layer, which are computed for a few rows at a time.

    .. math:: \ell = \mathrm{cross\_entropy}(x), \qquad x = c \tanh \frac{h W^\top + b}{c}

    Parameters
    ----------
    hidden : array
        h, floating, of shape (..., d): what a language model makes of each position.
    weight : array
        W, of shape (v, d) and the dtype of ``hidden``, as ``torch.nn.Linear`` and an embedding hold it: a row a class.
    targets : array of int
        The class of each row, of shape (...).
    bias : array, optional
        b, of shape (v,).
    softcap : float, optional
        c, above 0: logits are squeezed between -c and c; without it they are h·Wᵀ + b.
    reduction, ignore_index, label_smoothing, z_loss
        As for `cross_entropy`.
    class_weight : array, optional
        A factor for each class, of shape (v,): the ``weight`` of `cross_entropy`.
    chunk_size : int, optional
        Rows whose logits stand in memory at once. By default as many as have twice the size of ``hidden``, 192 or more.

    Returns
    -------
    array
        Losses in nats, float32 or wider: a 0-d array, or one entry a row for "none".

    Raises
    ------
    IndexError
        If a target is out of range, where values can be looked at for free (NumPy, and PyTorch eager on the CPU);
        elsewhere the loss of that row is NaN.
    TypeError
        If arrays of two libraries, devices or dtypes are mixed, or targets are no integers: probabilities would be as
        large as the logits.
    ValueError
        If a shape or a number does not fit.

    Notes
    -----
    The answer is that of ``cross_entropy(hidden @ weight.mT + bias, targets)``, but for the rounding of a product of
    fewer rows: it is the library's own, in the dtype of the layer, so a row's bits may depend on its batch. -inf and
    NaN are answered as there.

    For the gradient the logits are computed again, a chunk at a time, and the gradient of the weight is added up in
    float32 or wider. In PyTorch, a mean or a sum has its gradients from the forward pass already, which is quicker, and
    is work for nothing where no gradient is asked for: evaluate under ``torch.no_grad``. Reverse mode in PyTorch
    (eager, and under ``torch.compile``) and in JAX holds two arrays of a chunk's logits beside the gradients. Second
    derivatives, and the reverse mode of ``torch.func``, take as much memory as for the logits as a whole.
    `linear_cross_entropy_value_and_grad` is for NumPy. Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary
    Language Models", ICLR 2025.

    Examples
    --------
    >>> import numpy as np
    >>> import polysoftmax
    >>> hidden, weight = np.eye(2), np.asarray([[2.0, 0.0], [1.0, 3.0], [0.0, 1.0]])
    >>> polysoftmax.linear_cross_entropy(hidden, weight, np.asarray([0, 1]), reduction="none").round(4)
    array([0.4076, 0.1698])
    """
    layer = Layer(hidden, weight, bias, softcap, chunk_size)
    of_rows = _targets(layer, targets, class_weight, reduction, ignore_index, label_smoothing, z_loss)
    head = layer.head(CROSS_ENTROPY, squeeze=True, **of_rows.options)
    if reduction == "none":
        losses = layer.answers(head, (of_rows.classes, of_rows.weight))
    else:
        cotangent = _cotangent(layer, of_rows, reduction)
        losses = runner(layer.hidden).heads.total(head, cotangent, *layer.arrays((of_rows.classes, of_rows.weight)))
    of_rows.require_known(losses)
    return layer.as_given(losses) if reduction == "none" else losses


def linear_cross_entropy_value_and_grad(
    hidden: Array,
    weight: Array,
    targets: Array,
    /,
    *,
    bias: Array | None = None,
    softcap: float | None = None,
    reduction: Literal["sum", "mean"] = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    class_weight: Array | None = None,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
) -> tuple[Array, LinearGradients]:
    r"""`linear_cross_entropy` and its gradients, for libraries that do not differentiate, from logits computed once.

    .. math:: \frac{\partial \ell}{\partial h} = g W, \quad \frac{\partial \ell}{\partial W} = g^\top h, \quad
              \frac{\partial \ell}{\partial b} = \sum_{\mathrm{rows}} g, \qquad
              g = \frac{\partial \ell}{\partial x} \left(1 - \frac{x^2}{c^2}\right)

    Parameters
    ----------
    hidden, weight, targets, bias, softcap, ignore_index, label_smoothing, class_weight, z_loss, chunk_size
        As for `linear_cross_entropy`.
    reduction : {"mean", "sum"}
        As for `linear_cross_entropy`.

    Returns
    -------
    (array, LinearGradients)
        The loss, and its gradients for ``hidden``, ``weight`` and ``bias``.

    Raises
    ------
    IndexError, TypeError, ValueError
        As for `linear_cross_entropy`.

    Notes
    -----
    Works on every library; on JAX and PyTorch, ``jax.grad`` and autograd answer the same. -inf and NaN are answered as
    by `cross_entropy`. The second part of the last formula is that of the softcap.

    Examples
    --------
    >>> import numpy as np
    >>> import polysoftmax
    >>> hidden, weight = np.ones((1, 1)), np.zeros((2, 1))
    >>> loss, gradients = polysoftmax.linear_cross_entropy_value_and_grad(hidden, weight, np.asarray([1]))
    >>> float(loss.round(4)), gradients.weight.tolist()
    (0.6931, [[0.5], [-0.5]])
    """
    if reduction not in ("sum", "mean"):
        msg = f'reduction must be "sum" or "mean" for a gradient, got {reduction!r}'
        raise ValueError(msg)
    layer = Layer(hidden, weight, bias, softcap, chunk_size)
    of_rows = _targets(layer, targets, class_weight, reduction, ignore_index, label_smoothing, z_loss)
    head = layer.head(CROSS_ENTROPY, squeeze=True, **of_rows.options)
    arrays = layer.arrays((of_rows.classes, of_rows.weight))
    wanted = (True, True, bias is not None, False, False)
    with quietly(layer.hidden):
        cotangent = _cotangent(layer, of_rows, reduction)
        losses, (of_hidden, of_weight, of_bias, *_) = answers_and_gradients(head, cotangent, arrays, wanted)
        of_rows.require_known(losses)
        if of_bias is not None:
            of_bias = namespace(of_bias).reshape(of_bias, (-1,))
        return words(losses, 0).total(losses * cotangent), LinearGradients(
            layer.as_given(of_hidden), of_weight, of_bias
        )


def linear_log_prob(
    hidden: Array,
    weight: Array,
    tokens: Array,
    /,
    *,
    bias: Array | None = None,
    softcap: float | None = None,
    temperature: Array | Number = 1.0,
    top_k: Array | int | None = None,
    top_p: Array | Number | None = None,
    min_p: Array | Number | None = None,
    where: Array | None = None,
    chunk_size: int | None = None,
) -> Array:
    r"""`log_prob` of given tokens under the logits of a linear layer, which are computed for a few rows at a time.

    .. math:: \log p_t = \mathrm{log\_prob}(x, t), \qquad x = c \tanh \frac{h W^\top + b}{c}

    Parameters
    ----------
    hidden : array
        h, floating, of shape (..., d).
    weight : array
        W, of shape (v, d) and the dtype of ``hidden``: a row a token.
    tokens : array of int
        One token a row, of shape (...), or K tokens a row, of shape (..., K); -1 stands for none.
    bias : array, optional
        b, of shape (v,).
    softcap : float, optional
        c, above 0: logits are squeezed between -c and c; without it they are h·Wᵀ + b.
    temperature, top_k, top_p, min_p : number or array
        As for `log_prob`, with one entry a row in an array.
    where : array of bool, optional
        Broadcasts against (..., v). Tokens under False do not exist. One of a single row is kept as it is; one with
        rows of its own is as long as the logits.
    chunk_size : int, optional
        Rows whose logits stand in memory at once (see `linear_cross_entropy`).

    Returns
    -------
    array
        Natural logarithms of the shape of ``tokens``, in float32 or wider.

    Raises
    ------
    IndexError
        If a token is out of range, where values can be looked at for free (NumPy, and PyTorch eager on the CPU);
        elsewhere the answer is NaN.
    TypeError
        If arrays of two libraries, devices or dtypes are mixed, or tokens are no integers.
    ValueError
        If a shape or a number does not fit.

    Notes
    -----
    The answer is that of ``log_prob(hidden @ weight.mT + bias, tokens)``, but for the rounding of the product; -inf and
    NaN are answered as there. Memory and derivatives are those of `linear_cross_entropy`, also for the temperature.
    Source of the formula: see `log_prob`.

    Examples
    --------
    >>> import numpy as np
    >>> import polysoftmax
    >>> hidden, weight = np.eye(2), np.log([[0.5, 0.1], [0.3, 0.1], [0.2, 0.8]])
    >>> np.exp(polysoftmax.linear_log_prob(hidden, weight, np.asarray([0, 2]))).round(3)
    array([0.5, 0.8])
    """
    layer = Layer(hidden, weight, bias, softcap, chunk_size)
    r = layer.rows
    t, mask = r.temperature(temperature), r.mask(where)
    kept, most = filters(r, top_k, top_p, min_p)
    laid_out, is_one = lay_out_tokens(r, tokens)
    head = layer.head(LOG_PROB, squeeze=is_one, top_k=most)
    y = layer.answers(head, (laid_out, t, mask, *kept))
    if values_are_free(y) and has_nan(y):
        require_tokens(r, tokens)  # the log-probability of what is no token is NaN
    return layer.as_given(y)


def _targets(layer: Layer, targets: Array, class_weight: Array | None, *options: Any) -> Targets:
    of_rows = Targets(layer.rows, targets, class_weight, "class_weight", *options)
    if not of_rows.is_index:
        msg = (
            f"targets must be integers, got dtype {targets.dtype}: probabilities are as large as the logits, "
            "for which there is cross_entropy(hidden @ weight.mT, targets)"
        )
        raise TypeError(msg)
    return of_rows


def _cotangent(layer: Layer, of_rows: Targets, reduction: str) -> Array:
    """Return what each row's loss is multiplied by in the answer."""
    xp, ops = namespace(layer.hidden), words(layer.hidden, 0)
    with quietly(layer.hidden):
        each = xp.ones_like(layer.hidden[:, 0], dtype=layer.rows.compute)
        if reduction == "sum":
            return each
        return mean_or_zero(each, of_rows.total_weight(ops, _weight_of) if of_rows.is_weighted else ops.total(each))


def _weight_of(ops: Ops, x: Array, weight: Array, index: Array) -> Array:
    """Return the weight of each class of an index, without an array of the logits' size."""
    del x
    xp = namespace(weight)
    return ops.reshape(xp.take(xp.reshape(weight, (-1,)), xp.reshape(index, (-1,)), axis=0), tuple(index.shape))
