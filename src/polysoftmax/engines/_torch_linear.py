"""PyTorch: linear heads whose backward pass computes the logits of each chunk of rows again, or has its gradients.

A sum has them from the forward pass, as its cotangent is one number, and so takes no more products than the logits as a
whole. It keeps them instead of the logits, which is what the backward pass would answer anyway.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polysoftmax._linear import Head, Heads, answers_and_gradients, gradients
from polysoftmax.engines import chosen, using
from polysoftmax.engines._gradients import is_recorded
from polysoftmax.engines._torch_words import is_exporting, is_transformed

if TYPE_CHECKING:
    from polysoftmax._arrays import Array


class TorchHeads(Heads):
    """Linear heads of PyTorch."""

    def answers(self, head: Head, *arrays: Any) -> Array:
        if _is_compiled():
            return _operator().answers(head, arrays)
        if is_recorded(arrays) and not is_transformed():
            return _Answers.apply(head, *arrays)
        return super().answers(head, *arrays)

    def total(self, head: Head, cotangent: Array, *arrays: Any) -> Array:
        if is_recorded(arrays) and not is_transformed():
            if _is_compiled():
                return _operator().total(head, cotangent, arrays)
            if not torch.compiler.is_compiling():
                return _Total.apply(head, cotangent, *arrays)
        return super().total(head, cotangent, *arrays)

    def add_product(self, total: Array, slope: Array, hidden: Array) -> Array:
        if total.dtype is slope.dtype:
            return total.addmm_(slope.mT, hidden)
        return total.add_(slope.mT @ hidden)


def _is_compiled() -> bool:
    """Whether a program is made that is run beside this package, and can call its operators."""
    return torch.compiler.is_compiling() and not (is_exporting() or is_transformed())


def _operator() -> Any:
    """Return what puts heads into compiled code, which eager mode does without."""
    from polysoftmax.engines import _linear_operator

    return _linear_operator


_PLAIN = Heads()


def _keep(ctx: Any, head: Head, arrays: tuple[Any, ...]) -> None:
    ctx.kept = head, chosen(), [None if isinstance(one, Tensor) else one for one in arrays]
    ctx.save_for_backward(*(one if isinstance(one, Tensor) else None for one in arrays))


def _kept(ctx: Any) -> tuple[Head, str, tuple[Any, ...]]:
    head, engine, numbers = ctx.kept
    arrays = tuple(number if one is None else one for one, number in zip(ctx.saved_tensors, numbers, strict=True))
    return head, engine, arrays


class _Answers(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, head: Head, *arrays: Any) -> Array:
        _keep(ctx, head, arrays)
        return _PLAIN.answers(head, *arrays)

    @staticmethod
    def backward(ctx: Any, cotangent: Array) -> tuple[Array | None, ...]:
        head, engine, arrays = _kept(ctx)
        # PyTorch may differentiate on threads of its own, where the caller's choice is not seen.
        with using(engine):
            return None, *gradients(head, cotangent, arrays, ctx.needs_input_grad[1:])


class _Total(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, head: Head, cotangent: Array, *arrays: Any) -> Array:
        _keep(ctx, head, (cotangent, *arrays))
        answers, found = answers_and_gradients(head, cotangent, arrays, ctx.needs_input_grad[2:])
        ctx.found = answers, found
        return (answers * cotangent).sum()

    @staticmethod
    def backward(ctx: Any, of_total: Array) -> tuple[Array | None, ...]:
        found, ctx.found = ctx.found, None
        if found is None or torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(of_total):
            # Once more, or to be differentiated, or for many at once: from the arrays.
            head, engine, (cotangent, *arrays) = _kept(ctx)
            with using(engine):
                answers = _PLAIN.answers(head, *arrays) if ctx.needs_input_grad[1] else None
                of_arrays = gradients(head, of_total * cotangent, tuple(arrays), ctx.needs_input_grad[2:])
        else:
            answers, of_arrays = found
            of_arrays = tuple(None if one is None else one.mul_(of_total) for one in of_arrays)
        return None, answers * of_total if ctx.needs_input_grad[1] else None, *of_arrays
