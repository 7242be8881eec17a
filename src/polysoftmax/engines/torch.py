"""PyTorch: derivative rules in eager mode, native kernels on the CPU, CUDA kernels on GPUs, formulas elsewhere."""

from __future__ import annotations

from functools import cache
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch._C import _len_torch_dispatch_stack

from polysoftmax.engines import chosen, native, using
from polysoftmax.engines._gradients import answer_for_gradient, gradients, is_exact, is_recorded
from polysoftmax.engines._torch_linear import TorchHeads
from polysoftmax.engines._torch_memory import MEMORY, is_in_memory, is_on_gpu, is_sharded
from polysoftmax.engines._torch_words import evaluate, is_transformed, words

if TYPE_CHECKING:
    from polysoftmax._arrays import Array
    from polysoftmax._formula import Call, RowFormula

__all__ = ["explain", "heads", "run", "words"]

heads = TorchHeads()


def run(call: Call, operands: tuple[Array, ...]) -> Any:
    """Run a formula, with its own derivative rule where PyTorch lets one be given.

    Under ``torch.func`` and forward mode the formula itself is differentiated: a Function with a ``jvp`` silently
    returns zeros for forward over forward, and ``torch.compile`` cannot follow it as soon as gradients flow.
    """
    if torch.compiler.is_compiling():
        return _operator().run(call, operands)
    if is_transformed():
        return evaluate(call, operands)
    if not is_recorded(operands):
        return _run_constant(call, operands)
    if call.formula.vjp is not None:
        return _apply(call, *operands)
    return evaluate(call, operands)


def explain(x: Array, formula: RowFormula) -> tuple[str, str]:
    """Return the engine for a formula along the last axis of ``x``, and why."""
    if is_on_gpu(x):
        return _cuda().explain(x, formula)  # type: ignore[no-any-return]
    if not is_in_memory(x):
        return "portable", f"the array API formula as it stands, for a {type(x).__name__} on {x.device}"
    return native.explain(x, formula)


is_cuda = attrgetter("is_cuda")
"""Whether a tensor is on a GPU: all that calls on the CPU take time for."""


def _operator() -> Any:
    """Return what puts formulas into compiled code, which eager mode does without."""
    from polysoftmax.engines import _operator

    return _operator


@cache
def _cuda() -> Any:
    """Return the CUDA engine, which most who use PyTorch do without; an import statement takes time in every call."""
    from polysoftmax.engines import cuda

    return cuda


def _run_constant(call: Call, operands: tuple[Array, ...]) -> Any:
    """Run a formula that nothing is differentiated through."""
    if chosen() == "portable" or _len_torch_dispatch_stack():
        return _run_elsewhere(call, operands)
    if is_cuda(operands[0]):
        return (_cuda().run if _are_on_gpu(operands) else _run_elsewhere)(call, operands)
    y = native.run(call, operands, MEMORY)
    return _run_elsewhere(call, operands) if y is NotImplemented else y


def _run_elsewhere(call: Call, operands: tuple[Array, ...]) -> Any:
    """Run a formula that no kernel covers as it is."""
    if is_sharded(operands[0]):
        from polysoftmax.engines import _torch_sharded

        if _torch_sharded.has_whole_rows(operands[0], call.axis):
            return _torch_sharded.run(call, operands, _run_constant)
    return evaluate(call, operands)


def _are_on_gpu(operands: tuple[Array, ...]) -> bool:
    for one in operands:  # a generator would take twice as long
        if one is None or type(one) is float:
            continue
        if not is_on_gpu(one):
            return False
    return True


def _number(operand: Array | float | None) -> float | None:
    return operand if isinstance(operand, float) else None


def _tensor(operand: Array | float | None) -> Array | None:
    return None if isinstance(operand, float) else operand


class _Formula(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, call: Call, *operands: Array) -> Array:
        y = _run_constant(call, operands)
        numbers = tuple(map(_number, operands)) if float in map(type, operands) else None
        if call.formula.keeps == "answer" and y.dtype == call.compute and True not in ctx.needs_input_grad[2:]:
            operands = (None, *operands[1:])  # the rule does not look at the rows, so they need not be kept
        ctx.kept = call, chosen(), numbers
        ctx.save_for_backward(y, *(operands if numbers is None else map(_tensor, operands)))
        return y

    @staticmethod
    def backward(ctx: Any, cotangent: Array) -> tuple[Array | None, ...]:
        call, engine, numbers = ctx.kept
        if engine != chosen():
            # PyTorch may differentiate on threads of its own, where the caller's choice is not seen.
            with using(engine):
                return _Formula.backward(ctx, cotangent)
        y, *operands = ctx.saved_tensors
        if operands[0] is None:
            operands[0] = y
        if numbers is not None:
            operands = [one if number is None else number for one, number in zip(operands, numbers, strict=True)]
        if is_on_gpu(y) and _cuda().are_on_for(y):
            y = answer_for_gradient(call, y)
        elif not is_exact(call, y):
            y = None  # the gradient is to be rounded once, too, and not twice
        # With is_grads_batched a cotangent has no memory that a kernel could read, and PyTorch has no public question.
        is_batched = torch._C._functorch.is_legacy_batchedtensor(cotangent)
        run_formula = evaluate if is_batched else run
        return None, *gradients(call, tuple(operands), y, cotangent, ctx.needs_input_grad[1:], run_formula)


_apply = super(torch.autograd.Function, _Formula).apply  # its own apply asks for transforms again, and at length
