"""Log-probabilities of tokens, and the tokens of the greatest, by kernels of other formulas.

A token has the same bits alone and among several: what they share, the greatest logit and log Σ exp(x - max), is found
by the same kernel in the same layout, and the rest is two subtractions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polysoftmax import _formula
from polysoftmax._formula import Call
from polysoftmax._losses import CROSS_ENTROPY, classes
from polysoftmax._probability import INF
from polysoftmax._sampling import LEADING
from polysoftmax._softmax import LOG_SOFTMAX
from polysoftmax._truncation import TRUNCATE
from polysoftmax.engines.cuda._calls import evaluate
from polysoftmax.engines.cuda._plan import MOST_LEADING

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax._arrays import Array

    Step = Callable[[Call, tuple[Any, ...]], Any]

_PLAIN = {"ignore_index": None, "label_smoothing": 0.0, "z_loss": 0.0}


def run(call: Call, operands: tuple[Array, ...], step: Step) -> Any:
    """Return the log-probabilities of tokens."""
    x, tokens, t, where, *filters = operands
    if call.options["top_k"] is not None or any(one is not None for one in filters):
        truncate = Call(TRUNCATE, call.options, call.axis, call.compute, x.dtype)
        x = step(truncate, (x, t, where, *filters))
    if t is not None or where is not None:
        return call.answer(_by_log_softmax(call, x, tokens, (t, where), step))
    if tokens.shape[call.axis] == 1:
        # Not with its sign changed, which would make -0 of what is 0 among several tokens.
        return 0.0 - step(call._replace(formula=CROSS_ENTROPY, options=_PLAIN), (x, tokens, None))
    return call.answer(_by_the_loss_of_the_greatest(call, x, tokens, step))


def _by_log_softmax(call: Call, x: Array, tokens: Array, others: tuple[Any, ...], step: Step) -> Array:
    """Return log-probabilities under a temperature or a mask, which the kernel of the loss does not take."""
    ops = _formula.words(x, call.axis)
    known, index = classes(ops, x, tokens)
    y = ops.take(step(Call(LOG_SOFTMAX, {}, call.axis, call.compute, call.compute), (x, *others)), index)
    return ops.nan_unless(known, y, y)


def _by_the_loss_of_the_greatest(call: Call, x: Array, tokens: Array, step: Step) -> Array:
    """Return log-probabilities of several tokens a row. The loss of the greatest logit is log Σ exp(x - max) itself."""
    ops = _formula.words(x, call.axis)
    known, index = classes(ops, x, tokens)
    best = ops.astype(ops.argmax(x), ops.index_dtype)
    log_total = step(Call(CROSS_ENTROPY, _PLAIN, call.axis, call.compute, call.compute), (x, best, None))
    top, logits = (ops.cast(ops.take(x, at), call.compute) for at in (best, index))
    return ops.nan_unless(known, (logits - top) - log_total, log_total)


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
