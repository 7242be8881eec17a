"""The two-level Gumbel-max draw: the same token on every backend, for about n/256 + 256 random words a row.

The axis is cut into blocks. A Gumbel variate is added to the logarithm of each block's mass, and the best block wins;
inside it, one is added to each scaled logit, and the best token wins. As a softmax of softmaxes is a softmax, the draw
is exact. Source of the max trick: Gumbel, "Statistical theory of extreme values", 1954; Maddison, Tarlow and Minka,
"A* sampling", NeurIPS 2014.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

from polysoftmax._arrays import (
    accurate_sum,
    below,
    block_of,
    cast,
    default_index,
    exp_in_place,
    float_bits,
    formulas_are_differentiated,
    indices,
    last_rows,
    namespace,
    or_nan,
    row_maximum,
    rows,
    stop_gradient,
    values_are_free,
)
from polysoftmax._softmax import over_temperature
from polysoftmax._truncation import TRUNCATE, along_last, are_few, filtered_few, filters, is_spread, leading_of
from polysoftmax.engines import RowFormula
from polysoftmax.engines.selection import block_sums, first_maximum
from polysoftmax.random import BLOCKS, TOKENS, as_key, gumbel_of, row_keys, words

if TYPE_CHECKING:
    from polysoftmax._arrays import Array, Axis, Number


def block_length(n: int) -> int:
    """Return how many tokens a block holds, for rows of n; it is frozen, since the draw depends on it."""
    last = int(n) - 1  # torch.jit.trace gives lengths as tensors
    return max(2, min(256, 1 << ((last.bit_length() + 1) // 2)))


# Three formulas, because what is done for every token of a row should run in other blocks than what is done for a few.


def _masses(x: Array, temperature: Array | float | None, where: Array | None) -> tuple[Array, Array]:
    """Return the maximum of every row, and Σ exp((x - max) / temperature) over each of its blocks."""
    x = _masked(x, where)
    top = row_maximum(x, x.ndim - 1)
    return top, block_sums(exp_in_place(over_temperature(below(x, top), temperature)), block_length(x.shape[-1]))


def _draw(
    mass: Array,
    x: Array,
    top: Array,
    keys: Array,
    temperature: Array | float | None,
    where: Array | None,
    *,
    size: int,
    is_one_key: bool,
    logprobs: bool,
) -> tuple[Array, ...]:
    """Draw a block by the masses, and a token inside it."""
    xp = namespace(x)
    x = _masked(x, where)
    keys = row_keys(keys, mass.shape[:-1]) if is_one_key else keys
    block = _best(mass, xp.log(mass), keys, indices(mass), BLOCKS, temperature)
    inside, index = block_of(x, block, size)
    z = over_temperature(below(inside, top), temperature)
    position = _best(xp.exp(z), z, keys, index, TOKENS, temperature)
    return _answer(top, temperature, accurate_sum(mass, mass.ndim - 1), z, index, position, logprobs)


def _draw_leading(
    x: Array,
    index: Array,
    top: Array,
    keys: Array,
    temperature: Array | float | None,
    p: Array | float | None,
    min_p: Array | float | None,
    *,
    size: int,
    is_one_key: bool,
    logprobs: bool,
) -> tuple[Array, ...]:
    """Draw what `_draw` would from the few tokens that top_k left, given with their indices in increasing order."""
    xp = namespace(x)
    keys = row_keys(keys, x.shape[:-1]) if is_one_key else keys
    if p is not None or min_p is not None:
        x, *_ = filtered_few(x, index, temperature, p, min_p)
    z = over_temperature(below(x, top), temperature)
    terms = xp.exp(z)
    block = index // size
    same = block[..., :, None] == block[..., None, :]
    mass = xp.sum(xp.where(same, terms[..., None, :], 0.0), axis=-1)
    won = indices(x) == _best(mass, xp.log(mass), keys, block, BLOCKS, temperature)
    z = xp.where(block == xp.max(xp.where(won, block, -1), axis=-1, keepdims=True), z, -math.inf)
    position = _best(xp.exp(z), z, keys, index, TOKENS, temperature)
    return _answer(top, temperature, accurate_sum(terms, z.ndim - 1), z, index, position, logprobs)


def _answer(
    top: Array,
    temperature: Array | float | None,
    total: Array,
    z: Array,
    index: Array,
    position: Array,
    logprobs: bool,
) -> tuple[Array, ...]:
    xp = namespace(z)
    won = indices(z) == position
    token = xp.max(xp.where(won, index, -1), axis=-1, keepdims=True)
    # A bad logit, filter or temperature makes the total NaN, but XLA loses NaN in some sums of exponentials.
    drawn = (top > -math.inf) & (top < math.inf) & (total > 0)
    if temperature is not None and not isinstance(temperature, float):
        drawn = drawn & (temperature >= 0)
    tokens = xp.where(drawn, xp.astype(token, default_index(xp)), -1)
    if not logprobs:
        return (tokens,)
    score = xp.max(xp.where(won, z, -math.inf), axis=-1, keepdims=True)
    return tokens, or_nan(score - xp.log(total), drawn, top)


def _leading(x: Array, where: Array | None, *, top_k: int) -> tuple[Array, Array, Array]:
    """Return the maximum of every row, its top_k greatest logits, and their indices in increasing order."""
    values, index = leading_of(_masked(x, where), top_k)
    return row_maximum(values, values.ndim - 1), values, index


def _masked(x: Array, where: Array | None) -> Array:
    return x if where is None else namespace(x).where(where, x, -math.inf)


def _best(
    mass: Array, score: Array, keys: Array, index: Array, domain: int, temperature: Array | float | None
) -> Array:
    """Return the position of the best score along the last axis: with a Gumbel variate, or of the first at T = 0."""
    xp = namespace(score)
    noisy = score + cast(gumbel_of(words(keys[..., 0:1], keys[..., 1:2], index, domain)), score.dtype)
    if temperature is not None and not isinstance(temperature, float):
        greedy = xp.where(mass > 0, 0.0, xp.full_like(score, -math.inf))
        noisy = xp.where(temperature == 0, greedy, noisy)
    return first_maximum(noisy)


MASSES = RowFormula("sample_masses", along_last(_masses))
DRAW = RowFormula("sample_draw", along_last(_draw), many_steps=True)
LEADING = RowFormula("sample_leading", along_last(_leading), many_steps=True)
DRAW_LEADING = RowFormula("sample_draw_leading", along_last(_draw_leading), many_steps=True)


def _sample(
    x: Array,
    keys: Array,
    temperature: Array | float | None,
    where: Array | None,
    k: Array | None,
    p: Array | float | None,
    min_p: Array | float | None,
    *,
    axis: int,
    top_k: int | None,
    size: int,
    is_one_key: bool,
    logprobs: bool,
    in_kernels: bool = False,
) -> tuple[Array, ...]:
    """Draw as often from every row along the last axis as it has keys, which stand side by side.

    ``in_kernels`` says that the formulas below apply the mask and make the keys of rows at no cost, for all rows.
    """
    xp = namespace(x)
    r = rows(x, axis)
    if is_one_key and not in_kernels:
        keys, is_one_key = row_keys(keys, x.shape[:-1]), False
    by_mass = not (p is None and min_p is None)
    # Where PyTorch records gradients, a kernel may run for TRUNCATE and none for the draw: then TRUNCATE has to decide.
    recorded = by_mass and formulas_are_differentiated(x) and values_are_free(x)
    if top_k is not None and are_few(top_k, r.length) and not recorded:
        top, first, second = LEADING(r, x, where, top_k=top_k)
        if by_mass and not in_kernels:
            first, p, min_p = filtered_few(first, second, temperature, p, min_p)[0], None, None
        others: tuple[Array, ...] = (second, top, keys, temperature, p, min_p)
        draw = DRAW_LEADING
    else:
        if any(one is not None for one in (top_k, k, p, min_p)) or (where is not None and not in_kernels):
            x, where = TRUNCATE(r, x, temperature, where, k, p, min_p, top_k=top_k), None
        top, first = MASSES(r, x, temperature, where)
        draw, others = DRAW, (x, top, keys, temperature, where)
    draws = keys.shape[-1] // 2
    if draws == 1:
        return draw(r.of(first), first, *others, size=size, is_one_key=is_one_key, logprobs=logprobs)  # type: ignore[no-any-return]
    # Several keys for one row draw from what was found out about it once.
    second, top, _, *more = (xp.expand_dims(one, axis=-2) if is_spread(one) else one for one in others)
    keys = xp.reshape(keys, (*keys.shape[:-1], draws, 2))
    first = xp.broadcast_to(xp.expand_dims(first, axis=-2), (*keys.shape[:-1], first.shape[-1]))
    each = replace(r, x=first, axis=axis + 1)
    answers = draw(each, first, second, top, keys, *more, size=size, is_one_key=False, logprobs=logprobs)
    return tuple(xp.squeeze(one, axis=-1) for one in answers)


SAMPLE = RowFormula("sample", _sample, composed=True)


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
    return_logprobs: bool = False,
) -> Array | tuple[Array, Array]:
    r"""Draw a token from the softmax of logits: the same one on every backend.

    Parameters
    ----------
    logits : array
        Real, of any shape.
    key : int, key or generator
        An int seed; a `polysoftmax.random.key`; a ``jax.random.key``; a generator of NumPy, PyTorch or CuPy, from
        which two words are drawn; or an array of one key a row, of shape (..., 2), whose leading dimensions broadcast
        against the rows. A key may come from another library or device than the logits.
    axis : int, tuple of ints, or None
        The axes of the tokens; several are flattened in increasing order.
    temperature : number or array
        T, in units of the logits, 0 or greater. At 0 the most likely token is taken, the lowest index among equals.
        Rows may mix 0 and positive values.
    top_k, top_p, min_p : number or array, optional
        What is removed before the draw (see `truncate`).
    where : array of bool, optional
        Broadcasts against ``logits``. Tokens under False do not exist.
    return_logprobs : bool
        Whether to return also the log-probability of each token under the distribution it was drawn from.

    Returns
    -------
    array, or tuple of two arrays
        Indices along ``axis``, of the shape of ``logits`` without it, in the library's default index dtype; -1 for a
        row without a token, with NaN or with +inf. Then the log-probabilities in nats, float32 or wider; NaN for -1.

    Raises
    ------
    TypeError
        If ``logits`` is not an array, ``key`` is none of the above, or arrays of two libraries or devices are mixed.
    ValueError
        If the axis is empty, the keys do not match the rows, or a parameter given as a number is out of range.
    AxisError
        A ValueError and IndexError, if ``axis`` is out of bounds.
    NotImplementedError
        For top_k and top_p on Dask, which cannot sort lazily.

    Notes
    -----
    The random bits depend on the row's key and the index of the token alone: not on the batch around the row, its
    chunks, threads or device. Tokens are therefore equal everywhere, except where two scores lie within rounding of
    each other. A single key is folded with each row's number, so that rows differ; give keys per row, and a row's
    token does not depend on its neighbours.

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
    if r.length == 0:
        msg = f"sample needs at least one token, got logits of shape {r.shape} with axis={axis}"
        raise ValueError(msg)
    keys = as_key(key, like=r.x)
    t, mask, kept = r.temperature(temperature), r.mask(where), filters(r, top_k, top_p, min_p)
    x = r.x if float_bits(r.xp, r.x.dtype) else cast(r.x, r.compute)
    x = x if return_logprobs else stop_gradient(x)
    layout = _Draws.of(tuple(keys.shape[:-1]), r.reduced_shape)
    answers = SAMPLE(
        r,
        x,
        layout.beside_rows(keys),
        t,
        mask,
        kept.k,
        kept.p,
        kept.min_p,
        top_k=kept.top_k,
        size=block_length(r.length),
        is_one_key=keys.ndim == 1 and bool(r.reduced_shape),
        logprobs=return_logprobs,
    )
    tokens, *logprobs = map(layout.answer, answers)
    return (tokens, logprobs[0]) if return_logprobs else tokens


class _Draws(NamedTuple):
    """Which draws are made from which rows, where the shape of the draws is that to which keys and rows broadcast."""

    rows: tuple[int, ...]
    shape: tuple[int, ...]
    order: tuple[int, ...]
    """The dimensions of the draws: first those of the rows, then those that only the keys have."""
    each: int
    """Number of draws from one row."""

    @classmethod
    def of(cls, keys: tuple[int, ...], batch: tuple[int, ...]) -> _Draws:
        if not keys or keys == batch:
            return cls(batch, batch, tuple(range(len(batch))), 1)
        ndim = max(len(keys), len(batch))
        pairs = list(zip((1,) * (ndim - len(keys)) + keys, (1,) * (ndim - len(batch)) + batch, strict=True))
        shape = tuple(n if m == 1 else m for m, n in pairs)
        if any(one not in (1, n) for pair, n in zip(pairs, shape, strict=True) for one in pair):
            msg = f"keys of shape {(*keys, 2)} do not match rows of shape {batch}: leading dimensions must broadcast"
            raise ValueError(msg)
        apart = [d for d in range(ndim) if d < ndim - len(batch) or shape[d] != pairs[d][1]]
        along = [d for d in range(ndim) if d not in apart]
        return cls(batch, shape, (*along, *apart), math.prod([shape[d] for d in apart]))

    def beside_rows(self, keys: Array) -> Array:
        """Lay the keys of each row side by side along the last axis."""
        xp = namespace(keys)
        if keys.shape[:-1] == self.rows:
            return keys
        if keys.ndim == 1:
            return xp.reshape(keys, (1,) * len(self.rows) + (2,))
        spread = xp.permute_dims(xp.broadcast_to(keys, (*self.shape, 2)), (*self.order, len(self.shape)))
        return xp.reshape(spread, (*self.rows, 2 * self.each))

    def answer(self, y: Array) -> Array:
        """Give what was drawn for each row the shape of the draws."""
        xp = namespace(y)
        if self.shape == self.rows:
            return xp.squeeze(y, axis=-1)
        y = xp.reshape(y, tuple([self.shape[d] for d in self.order]))
        return xp.permute_dims(y, tuple([self.order.index(d) for d in range(len(self.order))]))
