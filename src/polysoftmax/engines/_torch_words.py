"""PyTorch's words: those for eager code, for formulas that PyTorch differentiates itself, and for compiled code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack
from torch.autograd import forward_ad

from polysoftmax._arrays import library, values_are_free
from polysoftmax._ops import Ops, ops_of
from polysoftmax._refused import require_dense
from polysoftmax.engines._torch_memory import is_sharded

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax._arrays import Array, DType
    from polysoftmax._formula import Call

_NARROW = (torch.float16, torch.bfloat16)

_VANISHED = -1000.0
"""A score whose exponential is 0 in every dtype that is computed in."""


class TorchOps(Ops):
    """The words of PyTorch, whose sums are accurate along any axis."""

    def constant(self, x: Array) -> Array:
        return x.detach() if x.requires_grad else x

    def cast(self, x: Array, dtype: DType) -> Array:
        return x.to(dtype)

    def sum(self, x: Array) -> Array:
        return x.sum(self.axis, keepdim=True)

    def total(self, x: Array) -> Array:
        return x.sum()

    def mean(self, x: Array) -> Array:
        return x.mean() if x.numel() else x.sum()  # one step to differentiate, not two

    def apply_where(
        self, mask: Array, function: Callable[..., Array], operands: tuple[Array, ...], otherwise: Array
    ) -> Array:
        if values_are_free(mask) and not mask.any():
            return otherwise
        return super().apply_where(mask, function, operands, otherwise)

    def take(self, x: Array, index: Array) -> Array:
        # take_along_dim broadcasts by itself, but fixes every length in what torch.compile and torch.export make of it.
        axis = self.axis % x.ndim
        return x.expand(*index.shape[:axis], -1, *index.shape[axis + 1 :]).gather(axis, index)

    def kth_greatest(self, x: Array, k: int) -> Array:
        return x.topk(k, dim=-1, sorted=False).values.amin(-1, True)

    def running_sum(self, x: Array, dtype: DType) -> Array:
        return x.cumsum(-1, dtype=dtype)  # torch.compile cannot follow array-api-compat's


class DifferentiatedOps(TorchOps):
    """The words of PyTorch where it differentiates the formula itself, and cannot be given its rules."""

    def constant(self, x: Array) -> Array:
        return x.detach() if x.requires_grad or is_transformed() else x

    def apply_where(
        self, mask: Array, function: Callable[..., Array], operands: tuple[Array, ...], otherwise: Array
    ) -> Array:
        # The slopes of rows that are not looked at may be NaN, and so would be 0 times those.
        x, *others = operands
        return super().apply_where(mask, function, (torch.where(mask, x, torch.zeros_like(x)), *others), otherwise)

    def exp(self, z: Array) -> Array:
        # The derivative of what vanishes is 0: that of z for the temperature may overflow there.
        gone = z < _VANISHED
        return torch.where(gone, 0.0, torch.exp(torch.where(gone, 0.0, z)))

    def divide(self, x: Array, t: Array) -> Array:
        # The second factor is 1. Its derivative multiplies by the quotient and then divides by t, as the rules do;
        # x / t², which the quotient's own derivative holds, may overflow.
        fixed = t.detach()
        return x / fixed * torch.exp(torch.log(fixed) - torch.log(t))

    def steady(self, x: Array, answered: Array) -> Array:
        return torch.where(answered, x, 0.0)

    def with_slope_of(self, y: Array, smooth: Callable[[], Array]) -> Array:
        slope = smooth()
        return y.detach() + (slope - slope.detach())


class _Compiled(TorchOps):
    """What Inductor needs: it computes logits anew for each use, and 16 bits in 32."""

    def __init__(self, xp: Any, axis: int) -> None:
        self.xp, self.axis = xp, axis

    def __getattr__(self, name: str) -> Any:
        return getattr(self.xp, name)  # what is used alone, since compiled code looks at each before every call

    def along(self, axis: int) -> Ops:
        # Not kept: a program that has seen a dictionary of words is compiled anew as soon as that gets another entry.
        return type(self)(self.xp, axis)

    def constant(self, x: Array) -> Array:
        return x.detach()

    def below(self, x: Array, top: Array) -> Array:
        # At the maximum the derivative of a minimum would be 1/2, and in forward mode that of a clamp is 0.
        return torch.where(x > top, top, x) - top

    def block_sums(self, terms: Array, size: int) -> Array:
        # Whether the last block is shorter may not be known: the length of a row may be a symbol.
        n = terms.shape[-1]
        count = (n + size - 1) // size
        whole = torch.nn.functional.pad(terms, (0, count * size - n))
        return self.sum_of_blocks(whole.reshape(*terms.shape[:-1], count, size))

    def cast(self, x: Array, dtype: DType) -> Array:
        return (_round(x) if x.dtype in _NARROW else x).to(dtype)


class CompiledOps(_Compiled):
    """The words of PyTorch under torch.compile."""


class CompiledDifferentiatedOps(_Compiled, DifferentiatedOps):
    """The words of PyTorch under torch.compile, where gradients are recorded."""


def _round(x: Array) -> Array:
    """Return 16-bit numbers rounded to their dtype; Inductor leaves roundings out."""
    rounded = (x.detach().view(torch.int16) & -1).view(x.dtype)  # without the step between, both views go
    if not torch.is_grad_enabled():
        return rounded
    finite = torch.isfinite(x)
    slope = torch.where(finite, x, 0.0)
    return torch.where(finite, rounded + (slope - slope.detach()), x)  # the gradient at -inf need not be 0


def words(x: Array, axis: int) -> Ops:
    """Return PyTorch's words for rows of ``x``, as it is run now."""
    compiles = torch.compiler.is_compiling()
    if not compiles and is_sharded(x):
        from polysoftmax.engines import _torch_spread

        return ops_of(_torch_spread.kind(differentiates=_differentiates()), library(x).xp, axis)
    # The second question is for derivatives that are traced for compiled code, which PyTorch 2.11 runs as any others.
    if compiles or _len_torch_dispatch_stack():
        return (CompiledDifferentiatedOps if torch.is_grad_enabled() else CompiledOps)(library(x).xp, axis)
    require_dense(x)
    return ops_of(DifferentiatedOps if _differentiates() else TorchOps, library(x).xp, axis)


def _differentiates() -> bool:
    return torch.is_grad_enabled() or is_transformed()


def evaluate(call: Call, operands: tuple[Array, ...]) -> Any:
    """Run a formula as it stands."""
    if not torch.compiler.is_compiling():
        for one in operands[1:]:
            require_dense(one)
        if is_sharded(operands[0]):
            from polysoftmax.engines._torch_spread import evaluate_spread

            return evaluate_spread(call, operands)
    return call.evaluate(words(operands[0], call.axis), operands)


def is_transformed() -> bool:
    """Whether PyTorch batches, differentiates forward or by ``torch.func``, or records for ``torch.jit.trace``."""
    # PyTorch has no public question for the first two, and no cheap one for the last.
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0 or _get_tracing_state() is not None


def is_exporting() -> bool:
    """Whether the program that is made is one of torch.export, which is run without this package."""
    return getattr(torch.compiler, "_is_exporting_flag", False)  # PyTorch 2.6 has no such flag
