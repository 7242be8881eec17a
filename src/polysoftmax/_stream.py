"""The draw of `_sampling.py` from rows that come in pieces: the best block so far is kept, and its entries.

A block's score is log Σ exp((x - max) / T) plus its Gumbel variate, under the maximum of all that has come. A higher
maximum lowers what came before, by the same for every block, so the order of two blocks never changes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from polysoftmax._formula import RowFormula
from polysoftmax._partial import partial_of_rows
from polysoftmax._sampling import gumbel_argmax, read_out, variates
from polysoftmax._softmax import finite, is_zero, scores_below
from polysoftmax._threefry import BLOCKS, TOKENS, fold
from polysoftmax._truncation import has_axes, on_last_axis

if TYPE_CHECKING:
    from polysoftmax._arrays import Array
    from polysoftmax._ops import Ops
    from polysoftmax._softmax import Temperature

INF = math.inf


def race(
    ops: Ops,
    x: Array,
    top: Array,
    best_top: Array,
    best_log: Array,
    best_noise: Array,
    best_block: Array,
    best: Array,
    keys: Array,
    first: Array,
    t: Temperature,
    *,
    is_one_key: bool,
) -> tuple[Array, ...]:
    """The maximum and the best block after the blocks of x, of which ``first`` is the number of the first.

    Rows are (r, n), with n a multiple of the length of a block, which is that of the entries ``best``. A block is known
    by its maximum, the logarithm of its mass below that, and its variate.
    """
    size = best.shape[-1]
    keys = fold(keys, ops.row_numbers(top)) if is_one_key else keys
    blocks = ops.reshape(x, (x.shape[0], x.shape[-1] // size, size))
    of_blocks = ops.expand_dims(t, axis=-1) if has_axes(t) else t
    tops, count, rest = (ops.squeeze(one, axis=-1) for one in partial_of_rows(ops, blocks, of_blocks, None))
    both = ops.maximum(top, ops.max(tops))
    logs = ops.where(tops > -INF, ops.log(count + rest), -INF)
    noise = variates(ops, keys, first + ops.indices(tops), BLOCKS, tops)
    noisy = noisy_score(ops, tops, logs, noise, both, t)
    place = ops.argmax(noisy)
    is_better = ops.take(noisy, place) > noisy_score(ops, best_top, best_log, best_noise, both, t)
    found = [ops.take(one, place) for one in (tops, logs, noise)]
    block = first + ops.astype(place, best_block.dtype)
    rows = ops.broadcast_to(ops.expand_dims(place, axis=-1), (x.shape[0], 1, size))
    entries = ops.squeeze(ops.along(1).take(blocks, rows), axis=1)
    kept = zip((*found, block, entries), (best_top, best_log, best_noise, best_block, best), strict=True)
    return (both, *(ops.where(is_better, new, old) for new, old in kept))


def noisy_score(ops: Ops, tops: Array, logs: Array, noise: Array, both: Array, t: Temperature) -> Array:
    """The scores of blocks under a maximum, with their variates; at T = 0 the first block that reaches it is best."""
    score = scores_below(ops, tops, finite(ops, both), t) + logs
    noisy = score + noise
    if t is None or isinstance(t, float):
        return noisy
    return ops.where(is_zero(t), ops.where(score > -INF, ops.zeros_like(score), -INF), noisy)


def winner(
    ops: Ops, best: Array, top: Array, block: Array, keys: Array, t: Temperature, *, is_one_key: bool
) -> tuple[Array, Array]:
    """The token that is drawn from the entries of the best block, and its logit."""
    keys = fold(keys, ops.row_numbers(top)) if is_one_key else keys
    index = block * best.shape[-1] + ops.indices(best)
    z = scores_below(ops, best, top, t)
    position = gumbel_argmax(ops, ops.exp(z), z, keys, index, TOKENS, t)
    return read_out(ops, top, t, index, position), ops.take(best, position)


RACE = RowFormula("race of blocks", on_last_axis(race))
WINNER = RowFormula("winner of a race", on_last_axis(winner))
