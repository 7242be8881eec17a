"""PyTorch: linear heads whose backward pass computes the logits of each chunk of rows again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polysoftmax._linear import Head, Heads, gradients
from polysoftmax.engines import chosen, using
from polysoftmax.engines._gradients import is_recorded
from polysoftmax.engines._torch_words import is_exporting, is_transformed

if TYPE_CHECKING:
    from polysoftmax._arrays import Array


class TorchHeads(Heads):
    """Linear heads of PyTorch."""

    def answers(self, head: Head, *arrays: Any) -> Array:
        if torch.compiler.is_compiling() and not (is_exporting() or is_transformed()):
            from polysoftmax.engines import _linear_operator

            return _linear_operator.run(head, arrays)
        if is_recorded(arrays) and not is_transformed():
            return _Answers.apply(head, *arrays)
        return super().answers(head, *arrays)

    def add_product(self, total: Array, slope: Array, hidden: Array) -> Array:
        if total.dtype is slope.dtype:
            return total.addmm_(slope.mT, hidden)
        return total.add_(slope.mT @ hidden)


_PLAIN = Heads()


class _Answers(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, head: Head, *arrays: Any) -> Array:
        ctx.kept = head, chosen(), [None if isinstance(one, Tensor) else one for one in arrays]
        ctx.save_for_backward(*(one if isinstance(one, Tensor) else None for one in arrays))
        return _PLAIN.answers(head, *arrays)

    @staticmethod
    def backward(ctx: Any, cotangent: Array) -> tuple[Array | None, ...]:
        head, engine, numbers = ctx.kept
        arrays = tuple(number if one is None else one for one, number in zip(ctx.saved_tensors, numbers, strict=True))
        # PyTorch may differentiate on threads of its own, where the caller's choice is not seen.
        with using(engine):
            return None, *gradients(head, cotangent, arrays, ctx.needs_input_grad[1:])
