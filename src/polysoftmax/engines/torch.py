"""PyTorch: derivative rules as an ``autograd.Function`` in eager reverse mode, the formula itself elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad

if TYPE_CHECKING:
    from polysoftmax._arrays import Array
    from polysoftmax.engines import Call


def run(call: Call, operands: tuple[Array, ...]) -> Array:
    """Run a formula, with its own derivative rule where PyTorch lets one be given.

    Under ``torch.compile``, ``torch.func`` and forward mode the formula itself is differentiated: a Function
    with a ``jvp`` breaks the first as soon as gradients flow, and silently returns zeros for forward over
    forward.
    """
    if torch.compiler.is_compiling() or _transformed() or not torch.is_grad_enabled():
        return call.evaluate(operands)
    moves = any(isinstance(one, torch.Tensor) and one.requires_grad for one in operands)
    return _Formula.apply(call, *operands) if moves and call.formula.vjp is not None else call.evaluate(operands)


def describe(x: Array, name: str) -> tuple[str, str]:
    """Name the engine for ``x``, and why it was chosen."""
    del x, name
    return "portable", "the array API formula as it stands"


def _transformed() -> bool:
    # PyTorch has no public question for either.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0  # type: ignore[no-any-return]


class _Formula(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, call: Call, *operands: Array) -> Array:
        y = call.evaluate(operands)
        if call.formula.from_output and y.dtype == call.compute and not any(ctx.needs_input_grad[2:]):
            operands = (y, *operands[1:])  # the rule does not look at the rows, so they need not be kept
        ctx.call = call
        ctx.constants = tuple(None if isinstance(one, torch.Tensor) else one for one in operands)
        ctx.is_tensor = tuple(isinstance(one, torch.Tensor) for one in operands)
        ctx.save_for_backward(y, *[one for one in operands if isinstance(one, torch.Tensor)])
        return y

    @staticmethod
    def backward(ctx: Any, cotangent: Array) -> tuple[Array | None, ...]:
        call: Call = ctx.call
        y, *tensors = ctx.saved_tensors
        left = iter(tensors)
        operands = tuple(
            next(left) if is_tensor else one for is_tensor, one in zip(ctx.is_tensor, ctx.constants, strict=True)
        )
        if y.dtype != call.compute:
            # The answer was rounded to 16 bits; its gradient is to be rounded once, too, and not twice.
            y = run(call._replace(result=call.compute), operands)
        assert call.formula.vjp is not None
        wanted = ctx.needs_input_grad[1:]
        gradients = call.formula.vjp(call.widen(operands), y, cotangent.to(call.compute), wanted, **call.options)
        answers: list[Array | None] = [None]
        for i, operand in enumerate(operands):
            gradient = gradients[i] if wanted[i] else None
            answers.append(None if gradient is None else gradient.sum_to_size(operand.shape).to(operand.dtype))
        return tuple(answers)
