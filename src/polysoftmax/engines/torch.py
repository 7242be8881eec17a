"""PyTorch: on the CPU NumPy's engine on the same memory, or torch's own kernel; derivative rules in eager mode."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad

from polysoftmax.engines import chosen

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax._arrays import Array, DType
    from polysoftmax.engines import Call, RowFormula


def run(call: Call, operands: tuple[Array, ...]) -> Any:
    """Run a formula, with its own derivative rule where PyTorch lets one be given.

    Under ``torch.compile``, ``torch.func`` and forward mode the formula itself is differentiated: a Function
    with a ``jvp`` breaks the first as soon as gradients flow, and silently returns zeros for forward over
    forward.
    """
    if torch.compiler.is_compiling() or _transformed():
        return call.evaluate(operands)
    if torch.is_grad_enabled() and any(isinstance(one, torch.Tensor) and one.requires_grad for one in operands):
        return call.evaluate(operands) if call.formula.vjp is None else _Formula.apply(call, *operands)
    return _run_constant(call, operands)


def describe(x: Array, name: str) -> tuple[str, str]:
    """Name the engine for a formula along the last axis of ``x``, and why it was chosen."""
    if not _shares_memory(x):
        return "portable", f"the array API formula as it stands, for a tensor on {x.device}"
    engine = chosen()
    if engine == "auto" and name in _NATIVE and x.ndim and _admits(name, x, x.ndim - 1):
        return "torch", f"torch's own kernel meets the accuracy bound for rows of up to {_NATIVE_LENGTH}"
    from polysoftmax.engines import numpy as numpy_engine

    return numpy_engine.describe(_bits(x), name)


def _transformed() -> bool:
    # PyTorch has no public question for either.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0  # type: ignore[no-any-return]


def _run_constant(call: Call, operands: tuple[Array, ...]) -> Any:
    """Run a formula that nothing is differentiated through."""
    engine = chosen()
    tensors = [one for one in operands if isinstance(one, torch.Tensor)]
    if engine == "portable" or not all(map(_shares_memory, tensors)) or torch._C._len_torch_dispatch_stack():
        return call.evaluate(operands)
    if engine == "auto" and (native := _NATIVE.get(call.formula.name)) is not None:
        x, temperature, where, *others = operands
        axis = call.options["axis"]
        if temperature is None and where is None and x.dtype == call.result and _admits(call.formula.name, x, axis):
            y = native(x, axis, *others)
            if y is not None:
                return y
    return _run_as_numpy(call, operands)


def _softmax_pullback(x: Array, axis: int, y: Array, cotangent: Array) -> Array | None:
    del x
    gradient = torch._softmax_backward_data(cotangent, y, axis, y.dtype)
    # A cotangent of inf at a probability of 0 has to add 0, and is NaN here.
    return gradient if math.isfinite(gradient.sum().item()) else None


def _log_softmax_pullback(x: Array, axis: int, y: Array, cotangent: Array) -> Array:
    del x
    return torch._log_softmax_backward_data(cotangent, y, axis, y.dtype)


_NATIVE: dict[str, Callable[..., Array | None]] = {
    "softmax": torch.softmax,
    "log_softmax": torch.log_softmax,
    "pullback of softmax": _softmax_pullback,
    "pullback of log_softmax": _log_softmax_pullback,
}
"""torch's own kernels, in place of formulas without temperature and mask."""

_NATIVE_LENGTH = 1024
"""Longest row for which torch's kernels along the last axis meet the accuracy bound, with half of it to spare.

Measured on 2.13: at 4096 twice the bound in float32, at 8192 five times in float64. Along other axes half the bound
is reached at 64. Neither of its logsumexp and cross_entropy keeps an answer close to 0.
"""

_NATIVE_LENGTH_ACROSS = 64


def _admits(name: str, x: Array, axis: int) -> bool:
    n = x.shape[axis]
    if n > (_NATIVE_LENGTH if axis == x.ndim - 1 else _NATIVE_LENGTH_ACROSS):
        return False
    if x.dtype in _NARROW and (name != "softmax" or axis != x.ndim - 1):
        return False  # only that one is computed in float32 and rounded once
    return n > _SLOW_UP_TO or x.numel() < _LARGE  # type: ignore[no-any-return]


_SLOW_UP_TO = 16
"""Row length up to which torch's kernels are slower than ours."""

_LARGE = 10_000

_NARROW = (torch.float16, torch.bfloat16)


def _shares_memory(x: Array) -> bool:
    """Whether NumPy can be given the memory of ``x`` as it is."""
    kind = type(x)
    return (
        (kind is torch.Tensor or kind is torch.nn.Parameter)
        and x.is_cpu
        and x.layout is torch.strided
        and not x.is_neg()
    )


def _run_as_numpy(call: Call, operands: tuple[Array, ...]) -> Any:
    from polysoftmax.engines import fused
    from polysoftmax.engines import numpy as numpy_engine

    compute = _numpy_dtype(call.compute)
    wide = call._replace(compute=compute, result=compute if call.result in _NARROW else _numpy_dtype(call.result))
    narrow = any(isinstance(one, torch.Tensor) and one.dtype in _NARROW for one in operands)
    if narrow and operands[0].numel() >= numpy_engine.SMALL:
        bits = tuple(_bits(one) if isinstance(one, torch.Tensor) else one for one in operands)
        if not fused.obstacle(wide, bits):  # the kernels convert what is in the cache
            same = call._replace(compute=compute, result=_numpy_dtype(call.result))
            return _tensors(numpy_engine.run(same, bits), call.result)
    # torch rounds to 16 bits faster than NumPy, which has no bfloat16 either.
    y = numpy_engine.run(wide, tuple(_widened(one) if isinstance(one, torch.Tensor) else one for one in operands))
    return _tensors(y, call.result)


def _tensors(y: Any, result: DType) -> Any:
    if isinstance(y, tuple):
        return tuple(map(torch.from_numpy, y))  # in dtypes of their own
    return _from_numpy(y, result)


def _widened(x: Array) -> Array:
    return (x.detach().float() if x.dtype in _NARROW else x.detach()).numpy()


def _bits(x: Array) -> Array:
    x = x.detach()
    return x.view(torch.int16).numpy().view("V2") if x.dtype is torch.bfloat16 else x.numpy()


def _from_numpy(y: Array, result: DType) -> Array:
    if y.dtype.kind == "V":
        return torch.from_numpy(y.view("int16")).view(torch.bfloat16)
    y = torch.from_numpy(y)
    return y.to(result) if result in _NARROW and y.is_floating_point() else y


@functools.cache
def _numpy_dtype(dtype: DType) -> Any:
    return _bits(torch.empty(0, dtype=dtype)).dtype


class _Pullback:
    """The derivative rule of a formula in the form of one, of its operands, its answer and the cotangent."""

    vjp = None
    many_steps = False
    composed = False

    def __init__(self, formula: RowFormula, wanted: tuple[bool, ...]) -> None:
        self.rule = formula.vjp
        self.wanted = wanted
        self.name = f"pullback of {formula.name}" + (" for all operands" if any(wanted[1:]) else "")

    def function(self, *arrays: Array, **options: Any) -> Any:
        *operands, y, cotangent = arrays
        assert self.rule is not None
        gradients = self.rule(tuple(operands), y, cotangent, self.wanted, **options)
        asked = tuple(gradients[i] for i, wanted in enumerate(self.wanted) if wanted)
        return asked if len(asked) > 1 else asked[0]


@functools.cache
def _pullback(formula: RowFormula, wanted: tuple[bool, ...]) -> _Pullback:
    return _Pullback(formula, wanted)


class _Formula(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, call: Call, *operands: Array) -> Array:
        y = _run_constant(call, operands)
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
        wanted = ctx.needs_input_grad[1:]
        pullback = call._replace(formula=_pullback(call.formula, wanted), result=call.compute)  # type: ignore[arg-type]
        gradients = run(pullback, (*operands, y, cotangent))
        given = iter(gradients if isinstance(gradients, tuple) else (gradients,))
        answers: list[Array | None] = [None]
        for operand, is_wanted in zip(operands, wanted, strict=True):
            gradient = next(given) if is_wanted else None
            if gradient is not None and gradient.shape != operand.shape:
                gradient = gradient.sum_to_size(operand.shape)
            answers.append(None if gradient is None else gradient.to(operand.dtype))
        return tuple(answers)
