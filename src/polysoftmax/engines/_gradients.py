"""Gradients of PyTorch's tensors by the rule of a formula, in eager mode and in compiled code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from polysoftmax._formula import Call
from polysoftmax._truncation import TRUNCATE

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax._arrays import Array


def is_recorded(operands: tuple[Array, ...]) -> bool:
    """Whether PyTorch records what is computed from the operands, for a gradient."""
    if torch.is_grad_enabled():
        for one in operands:
            if one is not None and type(one) is not float and one.requires_grad:
                return True
    return False


def gradients(
    call: Call,
    operands: tuple[Array, ...],
    y: Array | None,
    cotangent: Array,
    wanted: tuple[bool, ...],
    run_formula: Callable[[Call, tuple[Array, ...]], Any],
) -> tuple[Array | None, ...]:
    """Return the gradients for the operands of a call that answered ``y``, None where they are not ``wanted``.

    Without ``y`` they follow from the operands alone.
    """
    if call.squeeze:
        y, cotangent = None if y is None else y.unsqueeze(call.axis), cotangent.unsqueeze(call.axis)
    elif call.reduction is not None:
        y = None
        if call.reduction == "mean":
            x = operands[0]
            cotangent = cotangent / max(1, x.numel() // x.shape[call.axis])
    result = operands[0].dtype if y is None and True not in wanted[1:] else call.compute
    pullback = Call(call.formula.pullback(wanted), call.options, call.axis, call.compute, result)
    found = run_formula(pullback, (*operands, y, cotangent))
    given = iter(found if isinstance(found, tuple) else (found,))
    answers: list[Array | None] = [None] * len(wanted)
    for i, asked in enumerate(wanted):
        gradient = next(given) if asked else None
        if gradient is not None:
            if i and gradient.shape != operands[i].shape:  # what stands beside the rows may have been broadcast
                gradient = gradient.sum_to_size(operands[i].shape)
            answers[i] = gradient if gradient.dtype is operands[i].dtype else gradient.to(operands[i].dtype)
    return tuple(answers)


def answer_for_gradient(call: Call, y: Array) -> Array | None:
    """Return an answer from which the gradient follows; None where it follows from the rows."""
    return y if call.formula.keeps == "answer" and is_exact(call, y) else None


def is_exact(call: Call, y: Array) -> bool:
    """Whether an answer has the digits that a gradient needs, and was not rounded to 16 bits."""
    return y.dtype == call.compute or call.formula is TRUNCATE  # what survives keeps every bit
