"""sample."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

from polysoftmax._arrays import as_int, default_index, namespace
from polysoftmax._formula import words
from polysoftmax._rows import last_rows
from polysoftmax._sampling import SAMPLE
from polysoftmax.functions.probability import log_prob_of_tokens
from polysoftmax.functions.truncation import filters
from polysoftmax.random import as_key

if TYPE_CHECKING:
    from polysoftmax._arrays import Array
    from polysoftmax._rows import Axis, Number


_MOST_DIMENSIONS = 63
"""One fewer than NumPy's and PyTorch's arrays may have: the draw cuts the last into blocks."""


@overload
def sample(
    logits: Array,
    key: Array | int | object,
    /,
    *,
    axis: Axis = ...,
    temperature: Array | Number = ...,
    top_k: Array | int | None = ...,
    top_p: Array | Number | None = ...,
    min_p: Array | Number | None = ...,
    where: Array | None = ...,
    draws: int | None = ...,
    replace: bool = ...,
    return_logprobs: Literal[True],
) -> tuple[Array, Array]: ...


@overload
def sample(
    logits: Array,
    key: Array | int | object,
    /,
    *,
    axis: Axis = ...,
    temperature: Array | Number = ...,
    top_k: Array | int | None = ...,
    top_p: Array | Number | None = ...,
    min_p: Array | Number | None = ...,
    where: Array | None = ...,
    draws: int | None = ...,
    replace: bool = ...,
    return_logprobs: bool = ...,
) -> Any: ...


def sample(
    logits: Array,
    key: Array | int | object,
    /,
    *,
    axis: Axis = -1,
    temperature: Array | Number = 1.0,
    top_k: Array | int | None = None,
    top_p: Array | Number | None = None,
    min_p: Array | Number | None = None,
    where: Array | None = None,
    draws: int | None = None,
    replace: bool = True,
    return_logprobs: bool = False,
) -> Array | tuple[Array, Array]:
    r"""Draw a token from the softmax of logits: the same one on every backend.

    Parameters
    ----------
    logits : array
        Real, of any shape.
    key : int, key or generator
        An int seed, or an array of ints without axes; a `polysoftmax.random.key`; a ``jax.random.key``; a generator of
        NumPy, PyTorch or CuPy, from which two words are drawn; or an array of one key a row, of shape (..., 2), whose
        leading dimensions broadcast against the rows. A key may come from another library or device than the logits.
    axis : int, tuple of ints, or None
        The axes of the tokens; several are flattened in increasing order.
    temperature : number or array
        T, in units of the logits, 0 or greater. At 0 the most likely token is taken, the lowest index among equals.
        Rows may mix 0 and positive values.
    top_k, top_p, min_p : number or array, optional
        What is removed before the draw (see `truncate`).
    where : array of bool, optional
        Broadcasts against ``logits``. Tokens under False do not exist.
    draws : int, optional
        How many tokens to draw from each row with each of its keys, in a last dimension.
    replace : bool
        Whether a token may be drawn more than once. If not, the draws are distinct: each is from what the ones before
        have left, and -1 once nothing is left.
    return_logprobs : bool
        Whether to return also the log-probability of each token under the distribution it was drawn from; without
        replacement, too, that is the distribution of the whole row.

    Returns
    -------
    array, or tuple of two arrays
        Indices along ``axis``, of the shape of ``logits`` without it, in the library's default index dtype; -1 for a
        row without a token, with NaN or with +inf. Then the log-probabilities in nats, float32 or wider; NaN for -1.
        Both have a last dimension of ``draws`` entries if that is given.

    Raises
    ------
    TypeError
        If ``logits`` is not an array, ``key`` is none of the above, arrays of two libraries or devices are mixed, or a
        generator is given inside ``jax.jit``, ``vmap`` and the like, where it would be drawn from once and for all.
    ValueError
        If the axis is empty, there are 64 dimensions or more, the keys do not match the rows, or ``draws`` or a
        parameter given as a number is out of range.
    AxisError
        A ValueError and IndexError, if ``axis`` is out of bounds.
    NotImplementedError
        For top_k and top_p on Dask, which cannot sort lazily.

    Notes
    -----
    The random bits depend on the row's key and the index of the token alone: not on the batch around the row, its
    chunks, threads or device. Tokens are therefore equal everywhere, except where two scores lie within rounding of
    each other. A single key is folded with each row's number, so that rows differ; where every axis belongs to the
    tokens, the one row has the key itself. Give keys per row, and a row's token does not depend on its neighbours. The
    first of several draws is that of a call without ``draws``; draw j is that with the row's key folded with j:
    ``random.fold_in(key, j)``.

    The log-probabilities are those that `log_prob` answers for these tokens and options, to the last bit, and they can
    be differentiated.

    The filters leave exactly what `truncate` leaves with the same options and engine, so both calls draw from the same
    tokens, also where the mass of a prefix lies within rounding of p. There, engines and libraries may differ by a
    token. The numbers are rounded to the dtype that is computed in (see `truncate`).

    A removed, masked or -inf token is never drawn. The draw is exact: two levels of the Gumbel-max trick, over blocks
    and within one. Sources: Gumbel, "Statistical theory of extreme values", 1954; Maddison, Tarlow and Minka, "A*
    sampling", NeurIPS 2014.

    Examples
    --------
    >>> import numpy as np
    >>> import polysoftmax
    >>> logits = np.log([[0.1, 0.2, 0.7], [0.1, 0.2, 0.7]])
    >>> polysoftmax.sample(logits, 7, temperature=np.asarray([0.0, 1.0])).shape
    (2,)
    >>> tokens = polysoftmax.sample(logits[0], polysoftmax.random.split(7, 10_000))
    >>> (np.bincount(tokens) / 10_000).round(1)
    array([0.1, 0.2, 0.7])
    """
    r = last_rows(logits, axis)
    r.require_entries("sample", "token")
    if r.x.ndim > _MOST_DIMENSIONS:
        msg = f"sample takes at most {_MOST_DIMENSIONS} dimensions, got {r.x.ndim}: reshape the logits"
        raise ValueError(msg)
    several = None if draws is None else _count(draws)
    keys = as_key(key, like=r.x)
    t, mask = r.temperature(temperature), r.mask(where)
    kept, top_k = filters(r, top_k, top_p, min_p)
    batch, is_single = r.reduced_shape, keys.ndim == 1
    layout = _Draws.of(() if is_single else tuple(keys.shape[:-1]), batch, several)
    constant = words(r.x).constant
    tokens = SAMPLE(
        r,
        constant(r.floats()),
        layout.lay_out_keys(keys),
        *(one if one is None or isinstance(one, float) else constant(one) for one in (t, mask, *kept)),
        result=default_index(r.xp),
        squeeze=layout.is_one,
        top_k=top_k,
        is_one_key=is_single and bool(batch),
        draws=several or 1,
        replace=bool(replace),
    )
    if not return_logprobs:
        return layout.answer(tokens)
    each = r.xp.expand_dims(tokens, axis=-1) if layout.is_one else tokens
    logprobs = log_prob_of_tokens(r, each, t, mask, kept, top_k, squeeze=layout.is_one)
    return layout.answer(tokens), layout.answer(logprobs)


def _count(draws: int) -> int:
    count = as_int(draws, "draws", "an int or None")
    if count < 1:
        msg = f"draws must be 1 or greater, got {draws}"
        raise ValueError(msg)
    return count


class _Draws(NamedTuple):
    """Which draws are made from which rows, where the shape of the draws is that to which keys and rows broadcast."""

    rows: tuple[int, ...]
    shape: tuple[int, ...]
    order: tuple[int, ...]
    """The dimensions of the draws: first those of the rows, then those that only the keys have."""
    each: int
    """Number of keys of one row."""
    draws: int | None
    """Number of draws with each key, if they have a dimension of their own."""

    @classmethod
    def of(cls, keys: tuple[int, ...], batch: tuple[int, ...], draws: int | None) -> _Draws:
        if not keys or keys == batch:
            return cls(batch, batch, tuple(range(len(batch))), 1, draws)
        ndim = max(len(keys), len(batch))
        pairs = list(zip((1,) * (ndim - len(keys)) + keys, (1,) * (ndim - len(batch)) + batch, strict=True))
        shape = tuple(n if m == 1 else m for m, n in pairs)
        if any(one not in (1, n) for pair, n in zip(pairs, shape, strict=True) for one in pair):
            if (*keys, 2) == batch:
                msg = f"got one seed a row, of shape {batch}, where keys belong: polysoftmax.random.key(seeds)"
                raise TypeError(msg)
            msg = f"keys of shape {(*keys, 2)} do not match rows of shape {batch}: leading dimensions must broadcast"
            raise ValueError(msg)
        apart = [d for d in range(ndim) if d < ndim - len(batch) or shape[d] != pairs[d][1]]
        along = [d for d in range(ndim) if d not in apart]
        return cls(batch, shape, (*along, *apart), math.prod([shape[d] for d in apart]), draws)

    @property
    def is_one(self) -> bool:
        """Whether one token is drawn from each row."""
        return self.each == 1 and self.draws is None

    def lay_out_keys(self, keys: Array) -> Array:
        """Lay the keys of each row side by side along the last axis."""
        if keys.ndim == 1 or keys.shape[:-1] == self.rows:
            return keys  # a single one broadcasts
        xp = namespace(keys)
        spread = xp.permute_dims(xp.broadcast_to(keys, (*self.shape, 2)), (*self.order, len(self.shape)))
        return xp.reshape(spread, (*self.rows, 2 * self.each))

    def answer(self, y: Array) -> Array:
        """Give what was drawn for each row the shape of the draws."""
        if self.shape == self.rows:
            return y
        xp, last = namespace(y), () if self.draws is None else (self.draws,)
        y = xp.reshape(y, (*[self.shape[d] for d in self.order], *last))
        order = [self.order.index(d) for d in range(len(self.order))]
        return xp.permute_dims(y, (*order, *range(len(order), len(order) + len(last))))
