"""The log-probability of a token a row, which is the loss of that class with its sign changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polysoftmax._formula import Call
from polysoftmax._losses import CROSS_ENTROPY
from polysoftmax._truncation import TRUNCATE
from polysoftmax.engines.cuda._calls import evaluate

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax._arrays import Array

_PLAIN = {"ignore_index": None, "label_smoothing": 0.0, "z_loss": 0.0}


def run(call: Call, operands: tuple[Array, ...], step: Callable[[Call, tuple[Array, ...]], Any]) -> Any:
    """Answer a call by the kernels of filters and loss, where neither a temperature nor a mask is given."""
    x, tokens, t, where, *filters = operands
    if t is not None or where is not None or tokens.shape[call.axis] != 1:
        return evaluate(call, operands)
    if call.options["top_k"] is not None or any(one is not None for one in filters):
        truncate = Call(TRUNCATE, call.options, call.axis, call.compute, x.dtype)
        x = step(truncate, (x, None, None, *filters))
    return -step(call._replace(formula=CROSS_ENTROPY, options=_PLAIN), (x, tokens, None))
