"""Log-probabilities of tokens, and the tokens of the greatest, by as few kernels as their operands allow.

A token has the same bits alone and among several: what they share, the greatest logit and log Σ exp(x - max), is found
by the same kernel in the same layout, and the rest is two subtractions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polysoftmax import _formula
from polysoftmax._formula import Call
from polysoftmax._losses import CROSS_ENTROPY, classes
from polysoftmax._probability import INF, LOG_PROB
from polysoftmax._sampling import LEADING
from polysoftmax._softmax import scores_below
from polysoftmax._truncation import TRUNCATE
from polysoftmax.engines.cuda._calls import evaluate
from polysoftmax.engines.cuda._plan import MOST_LEADING

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax._arrays import Array
    from polysoftmax._softmax import Maybe, Temperature

    Step = Callable[[Call, tuple[Any, ...]], Any]

_PLAIN = {"ignore_index": None, "label_smoothing": 0.0, "z_loss": 0.0}
_UNFILTERED = {"top_k": None}


def run(call: Call, operands: tuple[Array, ...], step: Step) -> Any:
    """Return the log-probabilities of tokens."""
    x, tokens, t, where, *filters = operands
    if call.options["top_k"] is not None or any(one is not None for one in filters):
        truncate = Call(TRUNCATE, call.options, call.axis, call.compute, x.dtype)
        x = step(truncate, (x, t, where, *filters))
    if tokens.shape[call.axis] == 1:
        return _of_one(call, x, tokens, t, where, step)
    return call.answer(_of_several(call, x, tokens, t, where, step))


def _of_one(call: Call, x: Array, token: Array, t: Temperature, where: Maybe, step: Step) -> Array:
    """Return the log-probability of a token a row, in the kernel that asks least."""
    if t is None and where is None:
        # Not with its sign changed, which would make -0 of what is 0 among several tokens.
        return 0.0 - step(call._replace(formula=CROSS_ENTROPY, options=_PLAIN), (x, token, None))
    return step(call._replace(options=_UNFILTERED), (x, token, t, where, None, None, None))


def _of_several(call: Call, x: Array, tokens: Array, t: Temperature, where: Maybe, step: Step) -> Array:
    """Return log-probabilities of several tokens a row. That of the greatest logit is -log Σ exp(z) itself."""
    ops = _formula.words(x, call.axis)
    known, index = classes(ops, x, tokens)
    best = ops.astype(ops.argmax(ops.where(where, x, -INF)), ops.index_dtype)
    alone = Call(LOG_PROB, _UNFILTERED, call.axis, call.compute, call.compute)
    log_total = 0.0 - _of_one(alone, x, best, t, where, step)
    top, logits = (ops.cast(ops.take(x, at), call.compute) for at in (best, index))
    y = scores_below(ops, logits, top, t) - log_total
    if where is not None:
        y = ops.where(ops.take(ops.broadcast_like(where, x), index), y, -INF)
    return ops.nan_unless(known, y, log_total)


def run_leading(call: Call, operands: tuple[Array, ...], step: Step) -> Any:
    """Return the first tokens of every row in the order of their logits; -1 in a row that has no answer."""
    x, where = operands
    count = call.options["count"]
    if count > MOST_LEADING:
        return evaluate(call, operands)
    top, values, index = step(Call(LEADING, {"top_k": count}, call.axis, call.compute, call.compute), (x, where))
    ops = _formula.words(x, call.axis)
    # As indices they increase, so that the order of equal logits is theirs.
    index = ops.take(index, ops.descending_indices(values))
    return call.answer(ops.where(top < INF, ops.astype(index, ops.index_dtype), -1))
