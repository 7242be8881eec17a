"""The two-level Gumbel-max draw: the same token on every backend, for about n/256 + 256 random words a row.

The axis is cut into blocks. A Gumbel variate is added to the logarithm of each block's mass, and the best block wins;
inside it, one is added to each scaled logit, and the best token wins. As a softmax of softmaxes is a softmax, the draw
is exact. Source of the max trick: Gumbel, "Statistical theory of extreme values", 1954; Maddison, Tarlow and Minka,
"A* sampling", NeurIPS 2014. All of this is along the last axis.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from polysoftmax._formula import RowFormula
from polysoftmax._softmax import (
    is_zero,
    pull_scores,
    push_scores,
    push_softmax,
    scores_below,
    softmax_of_scores,
)
from polysoftmax._threefry import BLOCKS, TOKENS, fold, fold_draws, gumbel_of, words
from polysoftmax._truncation import (
    TRUNCATE,
    Filters,
    are_few,
    filtered_few,
    first_of,
    has_axes,
    has_mass,
    leading_of,
    on_last_axis,
)

if TYPE_CHECKING:
    from polysoftmax._arrays import Array
    from polysoftmax._ops import Ops
    from polysoftmax._softmax import Maybe, Temperature

INF = math.inf


def block_length(n: int) -> int:
    """Return how many tokens a block holds, for rows of n; it is frozen, since the draw depends on it."""
    size = 2
    while size < 256 and n > size * size:  # no bit_length, which a length that torch.export has a symbol for lacks
        size *= 2
    return size


def sample_of_rows(
    ops: Ops,
    x: Array,
    keys: Array,
    t: Temperature,
    where: Maybe,
    *filters: Array | float | None,
    top_k: int | None,
    is_one_key: bool,
    draws: int,
    replace: bool,
) -> Array:
    """Draw from every row with each of its keys, which stand side by side, that many times.

    A single key is folded with the row's number.
    """
    size, kept = block_length(x.shape[-1]), Filters(*filters)
    if draws > 1:
        keys = fold(keys, ops.row_numbers(x)) if is_one_key else keys
        keys, is_one_key = fold_draws(ops, keys, draws), False
    count = keys.shape[-1] // 2
    how = {"size": size, "is_one_key": is_one_key}
    is_distinct = draws > 1 and not replace
    if top_k is not None and are_few(top_k, x.shape[-1]) and not is_distinct:
        top, few, index = ops.call(LEADING, x, where, top_k=top_k)
        operands = (first_of(ops, few, kept.k), index, top, keys, t, kept.p, kept.min_p)
        return draw_each(ops, DRAW_LEADING, operands, count, how)
    if top_k is not None or any(one is not None for one in kept):
        x, where = ops.call(TRUNCATE, x, t, where, *kept, top_k=top_k), None
    if is_distinct:
        return draw_distinct(ops, x, keys, t, where, draws)
    top, mass = ops.call(MASSES, x, t, where)
    return draw_each(ops, DRAW, (mass, x, top, keys, t, where), count, how)


def draw_each(ops: Ops, draw: RowFormula, operands: tuple[Any, ...], count: int, how: dict[str, Any]) -> Array:
    """Draw once from every row, or with each of several keys from what is known of the row."""
    if count == 1:
        return ops.call(draw, *operands, **how)
    first, second, top, keys, *more = (ops.expand_dims(one, axis=-2) if has_axes(one) else one for one in operands)
    keys = ops.reshape(keys, (*keys.shape[:-2], count, 2))
    first = ops.broadcast_to(first, (*keys.shape[:-1], first.shape[-1]))
    return ops.squeeze(ops.call(draw, first, second, top, keys, *more, **how), axis=-1)


def draw_distinct(ops: Ops, x: Array, keys: Array, t: Temperature, where: Maybe, draws: int) -> Array:
    """Draw one token after another, each from what the ones before have left."""
    x = ops.where(where, x, -INF)
    if t is not None and not isinstance(t, float):
        x = ops.where(is_zero(t) & (x < ops.max(x)), -INF, x)  # at T = 0 what is below the maximum does not exist
    each = keys.shape[-1] // (2 * draws)
    x, t = (ops.expand_dims(one, axis=-2) if has_axes(one) else one for one in (x, t))
    x = ops.broadcast_to(x, (*x.shape[:-2], each, x.shape[-1]))
    keys = ops.reshape(ops.broadcast_to(keys, (*x.shape[:-2], keys.shape[-1])), (*x.shape[:-1], 2 * draws))
    how = {"size": block_length(x.shape[-1]), "is_one_key": False}
    tokens = []
    for j in range(draws):
        top, mass = ops.call(MASSES, x, t, None)
        token = ops.call(DRAW, mass, x, top, ops.part(keys, 2 * j, 2 * j + 2), t, None, **how)
        x = ops.where(ops.indices(x, token.dtype) == token, -INF, x)
        tokens.append(token)
    return ops.reshape(ops.side_by_side(tokens), (*x.shape[:-2], each * draws))


def masses(ops: Ops, x: Array, t: Temperature, where: Maybe) -> tuple[Array, Array]:
    """The maximum of every row, and Σ exp((x - max) / T) over each of its blocks."""
    x = ops.where(where, x, -INF)
    top = ops.max(x)
    return top, ops.block_sums(ops.exp(scores_below(ops, x, top, t)), block_length(x.shape[-1]))


def has_token(top: Array, t: Temperature) -> Array:
    """Whether there is a token to draw: a bad logit or filter shows in the maximum of what is left of the row."""
    good = (top > -INF) & (top < INF)
    return good if t is None or isinstance(t, float) else good & (t >= 0)


def draw(
    ops: Ops,
    mass: Array,
    x: Array,
    top: Array,
    keys: Array,
    t: Temperature,
    where: Maybe,
    *,
    size: int,
    is_one_key: bool,
) -> Array:
    """Draw a block by the masses, and a token inside it."""
    keys = fold(keys, ops.row_numbers(mass)) if is_one_key else keys
    block = gumbel_argmax(ops, mass, ops.log(mass), keys, ops.indices(mass), BLOCKS, t)
    inside, index = ops.block_of(x, block, size)
    exists = index < x.shape[-1]
    if where is not None:
        exists = exists & ops.block_of(ops.broadcast_like(where, x), block, size)[0]
    z = scores_below(ops, ops.where(exists, inside, -INF), top, t)
    position = gumbel_argmax(ops, ops.exp(z), z, keys, index, TOKENS, t)
    return read_out(ops, top, t, index, position)


def leading(ops: Ops, x: Array, where: Maybe, *, top_k: int) -> tuple[Array, Array, Array]:
    """The maximum of every row, its top_k greatest logits, and their indices in increasing order."""
    values, index = leading_of(ops, ops.where(where, x, -INF), top_k)
    return ops.max(values), values, index


def draw_leading(
    ops: Ops,
    x: Array,
    index: Array,
    top: Array,
    keys: Array,
    t: Temperature,
    p: Array | float | None,
    min_p: Array | float | None,
    *,
    size: int,
    is_one_key: bool,
) -> Array:
    """Draw what `draw` would from the few tokens that top_k left, given with their indices in increasing order."""
    keys = fold(keys, ops.row_numbers(x)) if is_one_key else keys
    filters = Filters(None, p, min_p)
    if has_mass(filters):
        x, *_ = filtered_few(ops, x, index, t, filters)
        top = ops.nan_unless(ops.isfinite(top), ops.max(x), top)
    z = scores_below(ops, x, top, t)
    terms = ops.exp(z)
    block = index // size
    same = block[..., :, None] == block[..., None, :]
    mass = ops.squeeze(ops.sum(ops.where(same, terms[..., None, :], 0.0)), axis=-1)
    won = ops.indices(x, ops.index_dtype) == gumbel_argmax(ops, mass, ops.log(mass), keys, block, BLOCKS, t)
    z = ops.where(block == ops.max(ops.where(won, block, -1)), z, -INF)
    position = gumbel_argmax(ops, ops.exp(z), z, keys, index, TOKENS, t)
    return read_out(ops, top, t, index, position)


def gumbel_argmax(ops: Ops, mass: Array, score: Array, keys: Array, index: Array, domain: int, t: Temperature) -> Array:
    """The position of the best score: with a Gumbel variate, or of the first at T = 0."""
    noisy = score + variates(ops, keys, index, domain, score)
    if t is not None and not isinstance(t, float):
        noisy = ops.where(is_zero(t), ops.where(mass > 0, ops.zeros_like(score), -INF), noisy)
    return ops.argmax(noisy)


def variates(ops: Ops, keys: Array, index: Array, domain: int, like: Array) -> Array:
    """Standard Gumbel variates of the indices, in the dtype of what they are added to."""
    return ops.astype(gumbel_of(words(keys[..., 0:1], keys[..., 1:2], index, domain)), like.dtype)


def read_out(ops: Ops, top: Array, t: Temperature, index: Array, position: Array) -> Array:
    """The token at a position, and -1 for a row without an answer."""
    won = ops.indices(index, ops.index_dtype) == position
    token = ops.max(ops.where(won, index, -1))
    return ops.where(has_token(top, t), ops.astype(token, ops.index_dtype), -1)


def noise_of_rows(ops: Ops, x: Array, keys: Array, where: Maybe, *, is_one_key: bool) -> Array:
    """Standard Gumbel variates, one a token, with which x + noise is greatest at the token that `draw` draws.

    The greatest noisy logit of each block is known from the block's own variate. Those inside are shifted to lie below
    it, which makes them variates under that condition: Maddison, Tarlow and Minka, as above; in the stable form of
    Kool, van Hoof and Welling, "Stochastic beams and where to find them", ICML 2019, appendix B.
    """
    x = ops.where(where, x, -INF)
    n, size = x.shape[-1], block_length(x.shape[-1])
    keys = fold(keys, ops.row_numbers(x)) if is_one_key else keys
    top, mass = ops.call(MASSES, x, None, None)
    best = ops.expand_dims(ops.log(mass) + variates(ops, keys, ops.indices(mass), BLOCKS, mass), axis=-1)
    z = scores_below(ops, x, top, None)
    noisy = in_blocks(ops, z + variates(ops, keys, ops.indices(x), TOKENS, z), size)
    v = best - noisy + ops.log1p(-ops.exp(noisy - ops.max(noisy)))
    shifted = best - ops.where(v > 0, v, 0.0) - ops.log1p(ops.exp(-ops.abs(v)))
    noise = ops.part(ops.reshape(shifted, (*x.shape[:-1], size * mass.shape[-1])), 0, n) - z
    return ops.where(z > -INF, noise, 0.0)


def in_blocks(ops: Ops, x: Array, size: int) -> Array:
    """Cut rows into blocks, a dimension of their own; the last one is filled up with -inf."""
    rest = -x.shape[-1] % size
    if rest:
        x = ops.side_by_side([x, -INF * ops.ones_like(ops.broadcast_to(x[..., :1], (*x.shape[:-1], rest)))])
    return ops.reshape(x, (*x.shape[:-1], x.shape[-1] // size, size))


# Each is a formula of its own because an engine may have a kernel for it.
MASSES = RowFormula("sample_masses", on_last_axis(masses))
DRAW = RowFormula("sample_draw", on_last_axis(draw))
LEADING = RowFormula("sample_leading", on_last_axis(leading))
DRAW_LEADING = RowFormula("sample_draw_leading", on_last_axis(draw_leading))
SAMPLE = RowFormula("sample", on_last_axis(sample_of_rows))
GUMBEL_SOFTMAX = RowFormula("gumbel_softmax", on_last_axis(noise_of_rows))
"""The noise of gumbel_softmax."""


# gumbel_softmax: the softmax of noisy logits; hard, it is 1 at their maximum and its slope is that of the softmax


def peak_of_scores(ops: Ops, x: Array, t: Temperature, where: Maybe) -> Array:
    y = softmax_of_scores(ops, x, t, where)
    is_peak = (ops.indices(y, ops.index_dtype) == ops.argmax(y)) & (y > 0)
    return ops.with_slope_of(ops.where(is_peak, ops.ones_like(y), 0.0 * y), lambda: y)  # 0·NaN is NaN


def push_peak(ops: Ops, operands: tuple[Any, ...], tangents: tuple[Maybe, ...], y: Array) -> Array:
    del y
    x, t, where = operands
    dz = push_scores(ops, x, t, where, *tangents[:2])
    return push_softmax(ops, softmax_of_scores(ops, x, t, where), dz, where)


def pull_peak(ops: Ops, operands: tuple[Any, ...], y: Array, g: Array, wanted: tuple[bool, ...]) -> tuple[Maybe, ...]:
    del y
    x, t, where = operands
    gz = push_softmax(ops, softmax_of_scores(ops, x, t, where), g, where)
    return pull_scores(ops, gz, x, t, where, wanted)


PEAK = RowFormula("peak", peak_of_scores, push_peak, pull_peak)
