"""Rows that come in pieces: logsumexp, losses, log-probabilities and draws in one pass, softmax from file to file.

The chunks are arrays of any library, from a list, a generator or a file, each with some of the entries along an axis,
in order. What is kept is a few numbers a row, and of a draw one block of 256 entries. ``progress=True`` shows a bar,
with rich.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from polysoftmax._arrays import (
    as_int,
    default_index,
    is_kind,
    is_number,
    quietly,
    require_same_library,
)
from polysoftmax._formula import words
from polysoftmax._rows import Rows, rows
from polysoftmax.functions._race import Race, no_chunk
from polysoftmax.functions.losses import mean_or_zero, require_reduction
from polysoftmax.functions.partial import Partial, merge, partial
from polysoftmax.functions.softmax import softmax as softmax_of_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from polysoftmax._arrays import Array
    from polysoftmax._rows import Number

__all__ = ["cross_entropy", "log_prob", "logsumexp", "sample", "softmax"]

_NOTHING = Partial(-math.inf, 0.0, 0.0)

Item = TypeVar("Item")


def logsumexp(
    chunks: Iterable[Array], /, *, axis: int = -1, temperature: Array | Number = 1.0, progress: bool = False
) -> Array:
    r"""Logarithm of the sum of the exponentials of rows that come in chunks.

    .. math:: y = \log \sum_i e^{x_i / T}

    Parameters
    ----------
    chunks : iterable of arrays
        Logits, real; one after another along ``axis``, and of one shape beside it.
    axis : int
        The axis of the entries.
    temperature : number or array
        T, in units of the logits, 0 or greater; an array has one entry a row (see `softmax`).
    progress : bool
        Whether to show a bar, which needs rich.

    Returns
    -------
    array
        Of the shape of a chunk without ``axis``, in float32 or wider.

    Raises
    ------
    TypeError, ValueError, AxisError
        As for `partial`; ``ValueError`` if there is no chunk, or chunks of two shapes.
    ImportError
        If ``progress`` is asked for without rich.

    Notes
    -----
    -inf and NaN are answered as by `logsumexp`; differentiable. Source: Milakov and Gimelshein, "Online normalizer
    calculation for softmax", arXiv 1805.02867.

    Examples
    --------
    >>> import numpy as np
    >>> from polysoftmax import streaming
    >>> float(streaming.logsumexp(np.log([k, k + 1.0]) for k in (1.0, 3.0, 5.0)).round(4)), float(np.log(21.0).round(4))
    (3.0445, 3.0445)
    """
    whole = None
    for chunk in _tracked(chunks, "logsumexp", progress=progress):
        whole = _merged(whole, chunk, axis, temperature)
    r = _of(whole, axis)
    assert whole is not None
    return r.xp.squeeze(whole.logsumexp(), axis=r.axis)


def log_prob(
    chunks: Iterable[Array],
    tokens: Array,
    /,
    *,
    axis: int = -1,
    temperature: Array | Number = 1.0,
    progress: bool = False,
) -> Array:
    r"""Log-probabilities of given tokens, under the softmax of rows that come in chunks.

    .. math:: \log p_t = x_t / T - \log \sum_i e^{x_i / T}

    Parameters
    ----------
    chunks : iterable of arrays
        Logits, real; one after another along ``axis``, and of one shape beside it.
    tokens : array of int
        Indices along ``axis`` of the whole: one a row, of the shape of a chunk without ``axis``.
    axis : int
        The axis of the tokens.
    temperature : number or array
        T, in units of the logits, 0 or greater; an array has one entry a row (see `softmax`).
    progress : bool
        Whether to show a bar, which needs rich.

    Returns
    -------
    array
        Natural logarithms of the shape of ``tokens``, in float32 or wider.

    Raises
    ------
    TypeError, ValueError, AxisError
        As for `logsumexp`; ``TypeError`` if the tokens are no integers.
    ImportError
        If ``progress`` is asked for without rich.

    Notes
    -----
    NaN for a token that no chunk has, -1 among them, and for a row with NaN or +inf; -inf for a token of -inf.
    Differentiable. Source: see `logsumexp`.

    Examples
    --------
    >>> import numpy as np
    >>> from polysoftmax import streaming
    >>> chunks = np.log([[0.1, 0.2]]), np.log([[0.7]])
    >>> np.exp(streaming.log_prob(chunks, np.asarray([2]))).round(3)
    array([0.7])
    """
    whole, found = _read(_tracked(chunks, "log_prob", progress=progress), tokens, axis, temperature)
    r = _of(whole, axis)
    return r.xp.squeeze(whole.log_prob(found), axis=r.axis)


def cross_entropy(
    chunks: Iterable[Array],
    targets: Array,
    /,
    *,
    axis: int = -1,
    reduction: Literal["none", "sum", "mean"] = "mean",
    ignore_index: int | None = None,
    z_loss: float = 0.0,
    progress: bool = False,
) -> Array:
    r"""Cross-entropy of target classes, under the softmax of rows that come in chunks.

    .. math:: \ell = -\log p_t + \zeta\, (\log \sum_j e^{x_j})^2

    Parameters
    ----------
    chunks : iterable of arrays
        Logits, real; one after another along ``axis``, and of one shape beside it.
    targets : array of int
        The class of each row, of the shape of a chunk without ``axis``.
    axis : int
        The axis of the classes.
    reduction : {"mean", "sum", "none"}
        "mean" divides the sum by the number of rows that count, and is 0 where that is 0.
    ignore_index : int, optional
        Targets of this value do not count.
    z_loss : float
        ζ, 0 or greater: keeps the logsumexp of the logits near 0.
    progress : bool
        Whether to show a bar, which needs rich.

    Returns
    -------
    array
        Losses in nats, float32 or wider: a 0-d array, or one entry a row for "none".

    Raises
    ------
    TypeError, ValueError, AxisError
        As for `logsumexp`; ``TypeError`` if the targets are no integers, ``ValueError`` for another reduction.
    ImportError
        If ``progress`` is asked for without rich.

    Notes
    -----
    The loss of a target that no chunk has is NaN. Label smoothing and weights, which need every class, are options of
    `polysoftmax.cross_entropy`. Differentiable. Source: see `logsumexp`.

    Examples
    --------
    >>> import numpy as np
    >>> from polysoftmax import streaming
    >>> chunks = np.log([[0.1, 0.2], [0.5, 0.25]]), np.log([[0.7], [0.25]])
    >>> streaming.cross_entropy(chunks, np.asarray([2, 0]), reduction="none").round(4)
    array([0.3567, 0.6931])
    """
    require_reduction(reduction)
    if not is_number(z_loss) or not 0.0 <= z_loss < math.inf:
        msg = f"z_loss must be a number, 0 or greater, got {z_loss!r}"
        raise ValueError(msg)
    whole, found = _read(_tracked(chunks, "cross_entropy", progress=progress), targets, axis, 1.0)
    r = _of(whole, axis)
    losses = -whole.log_prob(found)
    if z_loss:
        losses = losses + z_loss * whole.logsumexp() ** 2
    losses = r.xp.squeeze(losses, axis=r.axis)
    counts = None
    if ignore_index is not None:
        counts = targets != as_int(ignore_index, "ignore_index", "an int or None")
        losses = r.xp.where(counts, losses, 0.0)
    if reduction == "none":
        return losses
    flat = r.xp.reshape(losses, (-1,))
    ops = words(flat, 0)
    with quietly(flat):
        if reduction == "mean" and counts is None:
            return ops.mean(flat)
        total = ops.total(flat)
        if reduction == "sum":
            return total
        return mean_or_zero(total, ops.total(r.xp.astype(r.xp.reshape(counts, (-1,)), losses.dtype)))


def sample(
    chunks: Iterable[Array],
    key: Any,
    n: int,
    /,
    *,
    axis: int = -1,
    temperature: Array | Number = 1.0,
    return_logprobs: bool = False,
    progress: bool = False,
) -> Any:
    """Draw a token from each of the rows that come in chunks: the token that `polysoftmax.sample` draws of the whole.

    Parameters
    ----------
    chunks : iterable of arrays
        Logits, real; one after another along ``axis``, and of one shape beside it.
    key : int, key or generator
        As for `polysoftmax.sample`: one for all rows, or an array of one key a row, of shape (..., 2).
    n : int
        Number of tokens of all chunks, which the draw depends on from the first block.
    axis : int
        The axis of the tokens.
    temperature : number or array
        T, in units of the logits, 0 or greater; an array has one entry a row (see `softmax`).
    return_logprobs : bool
        Whether to return also the log-probability of each token.
    progress : bool
        Whether to show a bar, which needs rich.

    Returns
    -------
    array, or tuple of two arrays
        Indices along ``axis`` of the whole, of the shape of a chunk without it, in the library's default index dtype;
        -1 for a row without a token, with NaN or with +inf. Then the log-probabilities in nats, float32 or wider.

    Raises
    ------
    TypeError, ValueError, AxisError
        As for `logsumexp` and `polysoftmax.sample`; ``ValueError`` if the chunks do not have ``n`` tokens.
    ImportError
        If ``progress`` is asked for without rich.

    Notes
    -----
    Each block of the race that `polysoftmax.sample` runs has a variate of its own, so the best block so far is all
    that is kept. The token is that of the unchunked draw, wherever the chunks are cut, except where two scores lie
    within rounding of each other. Filters need all of a row. Source: see `polysoftmax.sample`.

    Examples
    --------
    >>> import numpy as np
    >>> import polysoftmax
    >>> from polysoftmax import streaming
    >>> logits = np.sin(np.arange(3000.0)).reshape(3, 1000)
    >>> streaming.sample(np.split(logits, 10, axis=-1), 2026, 1000) == polysoftmax.sample(logits, 2026)
    array([ True,  True,  True])
    """
    n = as_int(n, "n")
    race = Race(key, n, temperature)
    whole = None
    for chunk in _tracked(chunks, "sample", progress=progress):
        if return_logprobs:
            whole = _merged(whole, chunk, axis, temperature)
        race.add(_last(chunk, axis))
    tokens, found = race.finish()
    if not return_logprobs:
        return tokens
    r = _of(whole, axis)
    assert whole is not None
    log_p = whole.log_prob(r.xp.reshape(found, tuple(whole.maximum.shape)))
    log_p = r.xp.squeeze(log_p, axis=r.axis)
    return tokens, r.xp.where(tokens >= 0, log_p, math.nan)


def softmax(
    x: Any,
    out: Any,
    /,
    *,
    temperature: float = 1.0,
    memory: int = 1 << 26,
    progress: bool = False,
) -> Any:
    r"""Softmax along the last axis, from a file to a file: memory maps, Zarr and HDF5 arrays, larger than memory.

    .. math:: y_i = \frac{e^{x_i / T}}{\sum_j e^{x_j / T}}

    Parameters
    ----------
    x : array-like
        Logits, real: what has a shape and a dtype, and answers arrays of NumPy, or of another library, when it is cut.
    out : array-like
        What the probabilities are written to, of the shape of ``x``, in its own dtype. It may be ``x``.
    temperature : float
        T, in units of the logits, 0 or greater.
    memory : int
        Bytes that the logits which are read at once may take. Shorter rows are read once, several at a time; longer
        ones twice, in pieces.
    progress : bool
        Whether to show a bar, which needs rich.

    Returns
    -------
    array-like
        ``out``.

    Raises
    ------
    TypeError, ValueError
        As for `polysoftmax.softmax`; ``ValueError`` if the shapes differ, or there is no axis.
    ImportError
        If ``progress`` is asked for without rich.

    Notes
    -----
    -inf and NaN are answered as by `polysoftmax.softmax`. Source of the formula for pieces: see `logsumexp`.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from polysoftmax import streaming
    >>> with tempfile.TemporaryFile() as a, tempfile.TemporaryFile() as b:
    ...     x = np.memmap(a, np.float32, "w+", shape=(2, 1000))
    ...     y = streaming.softmax(x, np.memmap(b, np.float32, "w+", shape=(2, 1000)))
    ...     round(float(y[0, 0]), 6)
    0.001
    """
    shape = tuple(x.shape)
    if tuple(out.shape) != shape or not shape:
        msg = f"out must have the shape of x, with at least one axis, got {tuple(out.shape)} for {shape}"
        raise ValueError(msg)
    if as_int(memory, "memory") < 1:
        msg = f"memory must be 1 byte or more, got {memory}"
        raise ValueError(msg)
    *batch, n = shape
    entries = max(1, memory // x.dtype.itemsize)
    several = max(1, entries // max(1, n))
    parts = [slice(start, min(start + entries, n)) for start in range(0, max(1, n), entries)]
    for row in _tracked(_few_rows(batch, several), "softmax", progress=progress):
        whole = None
        if len(parts) > 1:
            for part in parts:
                whole = _merged(whole, x[(*row, part)], -1, temperature)
        for part in parts:
            few = x[(*row, part)]
            out[(*row, part)] = softmax_of_rows(few, temperature=temperature) if whole is None else whole.softmax(few)
    return out


def _few_rows(batch: Sequence[int], several: int) -> list[tuple[int | slice, ...]]:
    """Cut the rows of a batch into a few at a time, which stand side by side along the last of its axes."""
    if not batch:
        return [()]
    *outer, last = batch
    cuts = [slice(start, min(start + several, last)) for start in range(0, last, several)]
    return [(*place, cut) for place in itertools.product(*map(range, outer)) for cut in cuts]


def _tracked(chunks: Iterable[Item], description: str, *, progress: bool) -> Iterable[Item]:
    if not progress:
        return chunks
    try:
        from rich.progress import track
    except ImportError as error:
        msg = "progress=True needs rich: pip install rich"
        raise ImportError(msg) from error
    return track(chunks, description)


def _merged(whole: Partial | None, chunk: Array, axis: int, temperature: Array | Number) -> Partial:
    part = partial(chunk, axis=axis, temperature=temperature)
    return merge(whole or _NOTHING, part)


def _of(whole: Partial | None, axis: int) -> Rows:
    """Return the rows of statistics, for their axis and library."""
    if whole is None:
        raise no_chunk()
    return rows(whole.maximum, axis)


def _last(chunk: Array, axis: int) -> Array:
    r = rows(chunk, axis)
    return chunk if r.axis == len(r.shape) - 1 else r.xp.moveaxis(chunk, r.axis, -1)


def _read(chunks: Iterable[Array], indices: Array, axis: int, temperature: Array | Number) -> tuple[Partial, Array]:
    """Return the statistics of rows in chunks, and their entries at an index; NaN where no chunk has it."""
    whole, found, first = None, None, 0
    for chunk in chunks:
        whole = _merged(whole, chunk, axis, temperature)
        r = rows(chunk, axis)
        require_same_library(chunk, indices, "indices")
        if not is_kind(r.xp, indices.dtype, "integral"):
            msg = f"tokens and targets must be integers, got dtype {indices.dtype}"
            raise TypeError(msg)
        if tuple(indices.shape) != r.reduced_shape:
            msg = f"one index a row has the shape of a chunk without its axis, {r.reduced_shape}, got {indices.shape}"
            raise ValueError(msg)
        at = r.from_reduced(r.xp.astype(indices, default_index(r.xp))) - first
        is_here = (at >= 0) & (at < r.length)
        ops = words(r.x, r.axis)
        x = r.xp.astype(r.x, r.compute)
        if found is None:
            found = r.xp.full_like(whole.maximum, math.nan)
        if r.length:
            found = r.xp.where(is_here, ops.take(x, ops.where(is_here, at, 0)), found)
        first += r.length
    if whole is None or found is None:
        raise no_chunk()
    return whole, found
