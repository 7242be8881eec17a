"""log_prob and top_log_probs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polysoftmax._arrays import (
    as_int,
    default_index,
    in_native_order,
    is_kind,
    namespace,
    require_same_library,
    values_are_free,
)
from polysoftmax._formula import words
from polysoftmax._probability import LOG_PROB, RANKS, TOP_LOG_PROBS
from polysoftmax._rows import last_rows, may_be_equal
from polysoftmax.functions._indices import as_index, first_outside, has_nan
from polysoftmax.functions.truncation import filters

if TYPE_CHECKING:
    from polysoftmax._arrays import Array
    from polysoftmax._rows import Axis, Number, Rows
    from polysoftmax._truncation import Filters


def log_prob(
    logits: Array,
    tokens: Array,
    /,
    *,
    axis: Axis = -1,
    temperature: Array | Number = 1.0,
    top_k: Array | int | None = None,
    top_p: Array | Number | None = None,
    min_p: Array | Number | None = None,
    where: Array | None = None,
    return_rank: bool = False,
) -> Any:
    r"""Log-probability of given tokens, under exactly the distribution that `sample` with the same options draws from.

    .. math:: \log p_t = \frac{x_t - \max x}{T} - \log \sum_{j\ \mathrm{left}} e^{(x_j - \max x) / T}

    Parameters
    ----------
    logits : array
        Real, of any shape.
    tokens : array of int
        Indices along ``axis``. One token a row: of the shape of ``logits`` without ``axis``. K tokens a row: of the
        shape of ``logits`` with K entries in place of those along ``axis``; with several axes, of the shape without
        these and K entries in a last dimension. -1 stands for a row without a token, as in `sample`.
    axis : int, tuple of ints, or None
        The axes of the tokens; several are flattened in increasing order.
    temperature : number or array
        T, in units of the logits, 0 or greater.
    top_k, top_p, min_p : number or array, optional
        What is removed first (see `truncate`), by its probability at this temperature.
    where : array of bool, optional
        Broadcasts against ``logits``. Tokens under False do not exist. The set of tokens that another system kept can
        stand here in place of filters.
    return_rank : bool
        Whether to return also how many tokens stand before each one: 0 for the most likely.

    Returns
    -------
    array, or tuple of two arrays
        Natural logarithms of the shape of ``tokens``, in float32 or wider. Then the ranks, in the library's default
        index dtype, in order of logit and then index, before any filter.

    Raises
    ------
    IndexError
        If a token is out of range, where values can be looked at for free (NumPy, and PyTorch eager on the CPU);
        elsewhere the answer is NaN.
    TypeError
        If ``logits`` is not an array, ``tokens`` are no integers, or arrays of two libraries or devices are mixed.
    ValueError
        If the axis is empty, a shape does not fit, or a parameter given as a number is out of range.
    AxisError
        A ValueError and IndexError, if ``axis`` is out of bounds.
    NotImplementedError
        For top_k and top_p on Dask, which cannot sort lazily.

    Notes
    -----
    A removed, masked or -inf token has the log-probability -inf. Token -1 has NaN, and so has every token that is not
    masked in a row with NaN or +inf, with a bad parameter, or without a token that is possible. At T = 0 each of k tied
    maxima has -log k. The rank is -1 for token -1, for a masked token, and in a row with NaN.

    ``sample(..., return_logprobs=True)`` answers these very bits, on every engine: it asks the same formula. A token's
    log-probability does not depend on the other tokens that are asked for (on CUDA, where a kernel answers one token a
    row and the formula several, by rounding alone). For the most likely token it is computed
    from what all others add up to, so it keeps its digits close to 0.

    The gradient for the logits is g·(onehot - p) over the tokens that are left, and 0 for a token of -inf or NaN; the
    filters are constants. Neither way needs memory of the logits' size beside the gradient itself, on NumPy and
    PyTorch. Source of the formula: Blanchard, Higham and Higham, IMA Journal of Numerical Analysis 41(4), 2021.

    Examples
    --------
    >>> import numpy as np
    >>> import polysoftmax
    >>> logits = np.log([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    >>> np.exp(polysoftmax.log_prob(logits, np.asarray([0, 2]))).round(3)
    array([0.5, 0.8])
    >>> np.exp(polysoftmax.log_prob(logits, np.asarray([[0, 1], [2, 1]]), top_k=2)).round(3)
    array([[0.625, 0.375],
           [0.889, 0.   ]])
    """
    r = last_rows(logits, axis)
    r.require_entries("log_prob", "token", may_be_open=True)
    t, mask = r.temperature(temperature), r.mask(where)
    kept, most = filters(r, top_k, top_p, min_p)
    laid_out, is_one = lay_out_tokens(r, tokens)
    y = log_prob_of_tokens(r, laid_out, t, mask, kept, most, squeeze=is_one)
    if values_are_free(y) and has_nan(y):
        require_tokens(r, tokens)  # the log-probability of what is no token is NaN
    y = _as_given(r, y, is_one)
    if not return_rank:
        return y
    x = words(r.x).constant(r.x)
    return y, _as_given(r, RANKS(r, x, laid_out, mask, result=laid_out.dtype, squeeze=is_one), is_one)


def log_prob_of_tokens(
    r: Rows, tokens: Array, t: Any, where: Any, kept: Filters, top_k: int | None, *, squeeze: bool
) -> Array:
    """Return the log-probabilities of tokens that stand side by side, or of one a row, without the axis."""
    return LOG_PROB(r, r.floats(), tokens, t, where, *kept, result=r.compute, squeeze=squeeze, top_k=top_k)


def top_log_probs(
    logits: Array,
    k: int,
    /,
    *,
    axis: Axis = -1,
    temperature: Array | Number = 1.0,
    where: Array | None = None,
) -> tuple[Array, Array]:
    r"""Log-probabilities of the k most likely tokens of each row, and these tokens.

    Parameters
    ----------
    logits : array
        Real, of any shape.
    k : int
        How many tokens of each row, from 1 to the length of the row.
    axis : int, tuple of ints, or None
        The axes of the tokens; several are flattened in increasing order.
    temperature : number or array
        T, in units of the logits, 0 or greater.
    where : array of bool, optional
        Broadcasts against ``logits``. Tokens under False do not exist.

    Returns
    -------
    tuple of two arrays
        Log-probabilities in nats, float32 or wider, and indices along ``axis`` in the library's default index dtype:
        of the shape of ``logits`` with k entries in place of those along ``axis``; with several axes, of the shape
        without these and k entries in a last dimension. They are in order of logit, the greatest first, then index.

    Raises
    ------
    TypeError
        If ``logits`` is not an array or ``k`` no int.
    ValueError
        If ``k`` is out of range, the axis is empty, or a shape does not fit.
    AxisError
        A ValueError and IndexError, if ``axis`` is out of bounds.
    NotImplementedError
        On Dask, which cannot sort lazily.

    Notes
    -----
    The log-probabilities have the same bits as `log_prob` of these tokens. Where fewer than k tokens are possible, the
    others follow with -inf. A row with NaN or +inf has the indices -1 and NaN; one with a bad temperature has NaN, and
    keeps its indices, which do not depend on the temperature. Source of the formula: see `log_prob`.

    Examples
    --------
    >>> import numpy as np
    >>> import polysoftmax
    >>> values, tokens = polysoftmax.top_log_probs(np.log([0.2, 0.5, 0.3]), 2)
    >>> tokens, np.exp(values).round(3)
    (array([1, 2]), array([0.5, 0.3]))
    """
    r = last_rows(logits, axis)
    r.require_entries("top_log_probs", "token")
    k = as_int(k, "k")
    if not 1 <= k <= r.length:
        msg = f"k must lie in [1, {r.length}], the number of tokens of a row, got {k}"
        raise ValueError(msg)
    t, mask = r.temperature(temperature), r.mask(where)
    x = r.floats()
    tokens = TOP_LOG_PROBS(r, words(x).constant(x), mask, result=default_index(r.xp), count=k)
    y = LOG_PROB(r, x, tokens, t, mask, None, None, None, result=r.compute, top_k=None)
    return _as_given(r, y, False), _as_given(r, tokens, False)


def lay_out_tokens(r: Rows, tokens: Array) -> tuple[Array, bool]:
    """Bring tokens into the rows' layout, several of a row side by side; the second answer: whether each has one."""
    require_same_library(r.x, tokens, "tokens")
    xp = r.xp
    tokens = in_native_order(tokens)
    if not is_kind(xp, tokens.dtype, "integral"):
        msg = f"tokens must be integers, got dtype {tokens.dtype}"
        raise TypeError(msg)
    shape, batch = tuple(tokens.shape), r.reduced_shape
    is_one = shape == batch or may_be_equal(shape, batch)
    if not is_one:
        at = r.axes[0] if len(r.axes) == 1 else len(batch)
        if len(shape) != len(batch) + 1 or not may_be_equal(shape[:at] + shape[at + 1 :], batch):
            several = (*batch[:at], "K", *batch[at:])
            msg = (
                f"tokens must have the shape of the logits without the axis, {batch}, "
                f"or ({', '.join(map(str, several))}) for K tokens a row, got {shape}"
            )
            raise ValueError(msg)
        tokens = xp.moveaxis(tokens, at, -1) if at < len(batch) else tokens
    tokens = as_index(tokens, r)
    return (xp.expand_dims(tokens, axis=-1) if is_one else tokens), is_one


def _as_given(r: Rows, y: Array, is_one: bool) -> Array:
    """Give what was found for each token the shape that the tokens have."""
    at = r.axes[0] if len(r.axes) == 1 else y.ndim - 1
    return y if is_one or at == y.ndim - 1 else namespace(y).moveaxis(y, -1, at)


def require_tokens(r: Rows, tokens: Array) -> None:
    """Raise ``IndexError`` for the first of the tokens that is neither -1 nor an index."""
    worst = first_outside(r, tokens, (tokens >= -1) & (tokens < r.length))
    if worst is not None:
        msg = f"token {worst} is out of range for {r.length} tokens, and is not -1, which stands for none"
        raise IndexError(msg)
