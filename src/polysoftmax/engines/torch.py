"""PyTorch: on the CPU NumPy's engine on the same memory, or torch's own kernel; derivative rules in eager mode."""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad

from polysoftmax.engines import FORCED, Call, chosen, chosen_before

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType
    from typing import TypeAlias

    from polysoftmax._arrays import Array, DType
    from polysoftmax.engines import RowFormula

    Native: TypeAlias = Callable[..., Array | None]


def run(call: Call, operands: tuple[Array, ...]) -> Any:
    """Run a formula, with its own derivative rule where PyTorch lets one be given.

    Under ``torch.compile``, ``torch.func`` and forward mode the formula itself is differentiated: a Function
    with a ``jvp`` breaks the first as soon as gradients flow, and silently returns zeros for forward over
    forward.
    """
    if torch.compiler.is_compiling():
        return _run_compiled(call, operands)
    if _is_transformed():
        return call.evaluate(operands)
    if _is_recorded(operands):
        return call.evaluate(operands) if call.formula.vjp is None else _apply(call, *operands)
    return _run_constant(call, operands)


def describe(x: Array, name: str) -> tuple[str, str]:
    """Name the engine for a formula along the last axis of ``x``, and why it was chosen."""
    if _on_gpu(x):
        from polysoftmax.engines import cuda

        return cuda.describe(x, name)
    if not _shares_memory(x):
        return "portable", f"the array API formula as it stands, for a {type(x).__name__} on {x.device}"
    if chosen() not in FORCED and name in _NATIVE and x.ndim and _admits(name, x, x.ndim - 1):
        return "torch", f"torch's own kernel meets the accuracy bound for rows of up to {_NATIVE_LENGTH}"
    from polysoftmax.engines import numpy as numpy_engine

    return numpy_engine.describe(_bits(x), name)


def _is_recorded(operands: tuple[Array, ...]) -> bool:
    if torch.is_grad_enabled():
        for one in operands:
            if one is not None and isinstance(one, torch.Tensor) and one.requires_grad:
                return True
    return False


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _compiles_for_kernels() -> bool:
    # torch.compile cannot follow a context variable: what is chosen while it traces stays in the compiled code.
    return chosen() == "cuda"


def _run_compiled(call: Call, operands: tuple[Array, ...]) -> Any:
    if _compiles_for_kernels() and all(_on_gpu(one) for one in operands if isinstance(one, torch.Tensor)):
        from polysoftmax.engines.cuda import _operator
        from polysoftmax.engines.cuda._calls import NAMES

        if call.formula.name in NAMES and not (call.formula.vjp is None and _is_recorded(operands)):
            return _operator.run(call, operands)
    return call.evaluate(operands)


def below(x: Array, top: Array) -> Array:
    """Return ``x - top`` for a bound ``top``, exactly 0 where they are equal, whatever the compiler makes of ``x``."""
    return torch.clamp(x, max=top) - top  # the derivative of a minimum would be 1/2 at the maximum


def as_rounded(x: Array) -> Array:
    """Return 16-bit numbers rounded to their dtype; Inductor computes in 32 bits, and leaves roundings out."""
    rounded = (x.detach().view(torch.int16) & -1).view(x.dtype)  # without the step between, both views go
    if not torch.is_grad_enabled():
        return rounded
    finite = torch.isfinite(x)
    slope = torch.where(finite, x, 0.0)
    return torch.where(finite, rounded + (slope - slope.detach()), x)  # the gradient at -inf need not be 0


def _is_transformed() -> bool:
    """Whether PyTorch batches, differentiates forward or by ``torch.func``, or records for ``torch.jit.trace``."""
    # PyTorch has no public question for the first two, and no cheap one for the last.
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def _run_constant(call: Call, operands: tuple[Array, ...]) -> Any:
    """Run a formula that nothing is differentiated through."""
    engine = chosen()
    if engine == "portable" or torch._C._len_torch_dispatch_stack():
        return call.evaluate(operands)
    if engine == "cuda" and all(_on_gpu(one) for one in operands if isinstance(one, torch.Tensor)):
        from polysoftmax.engines import cuda

        return cuda.run(call, operands)
    if engine not in FORCED and _is_native(call, operands[0]):
        y = _NATIVE[call.formula.name](call.options, *operands)
        if y is not None:
            return y.squeeze(call.options["axis"]) if call.squeeze else y
    for one in operands:
        if one is not None and isinstance(one, torch.Tensor) and not _shares_memory(one):
            return call.evaluate(operands)
    return _run_as_numpy(call, operands)


def _is_native(call: Call, x: Array) -> bool:
    """Whether one of torch's own kernels may stand for the formula."""
    name = call.formula.name
    return name in _NATIVE and x.dtype is call.result and _shares_memory(x) and _admits(name, x, call.options["axis"])


def _plain(kernel: Callable[..., Array | None]) -> Native:
    """Let a kernel run rows without temperature, weights and mask."""

    def run(options: dict[str, Any], x: Array, scale: Array | None, where: Array | None, *others: Array) -> Any:
        return kernel(x, options["axis"], *others) if scale is None and where is None else None

    return run


def _finite(gradient: Array) -> Array | None:
    return gradient if math.isfinite(gradient.sum().item()) else None


def _softmax_pullback(x: Array, axis: int, y: Array, cotangent: Array) -> Array | None:
    del x
    # A cotangent of inf at a probability of 0 has to add 0, and is NaN here.
    return _finite(torch._softmax_backward_data(cotangent, y, axis, y.dtype))


def _log_softmax_pullback(x: Array, axis: int, y: Array, cotangent: Array) -> Array:
    del x
    return torch._log_softmax_backward_data(cotangent, y, axis, y.dtype)


def _surprise(log_p: Array, axis: int, entry: Array) -> Array | None:
    """Return -log p of one ``entry`` of each row of ``log_p``, which is overwritten.

    It is None where a row has no answer, or there is no row.
    """
    y = entry.neg_()
    count = y.numel()
    least = (y if count == 1 else y.min()).item() if count else math.nan
    if least >= _NEAR_0:
        return y
    if math.isnan(least):
        return None
    # Where it is near 0, no other entry has a probability above 1/2.
    others = torch.threshold_(log_p.exp_().neg_(), -0.5, 0.0).sum(axis, keepdim=True)
    return torch.where(y < _NEAR_0, others.log1p_().neg_(), y)


_NEAR_0 = 0.25
"""Where log p has lost digits that the probability of all other entries has."""


def _logsumexp(x: Array, axis: int) -> Array | None:
    log_p = torch.log_softmax(x, axis)
    log_total = _surprise(log_p, axis, log_p.amax(axis, True))
    return None if log_total is None else log_total.add_(x.amax(axis, True))


def _logsumexp_pullback(x: Array, axis: int, y: Array, cotangent: Array) -> Array | None:
    del y
    # In a row of -inf the gradient is 0, and a softmax of it NaN.
    return _finite(torch.softmax(x, axis).mul_(cotangent))


def _is_plain_loss(options: dict[str, Any], targets: Array, weight: Array | None) -> bool:
    return not (
        weight is not None
        or options["label_smoothing"]
        or options["z_loss"]
        or options["ignore_index"] is not None
        or targets.is_floating_point()
    )


def _cross_entropy(options: dict[str, Any], x: Array, targets: Array, weight: Array | None) -> Array | None:
    if not _is_plain_loss(options, targets, weight):
        return None
    axis = options["axis"]
    log_p = torch.log_softmax(x, axis)
    return _surprise(log_p, axis, log_p.gather(axis, targets))


def _cross_entropy_pullback(
    options: dict[str, Any], x: Array, targets: Array, weight: Array | None, y: Array, cotangent: Array
) -> Array | None:
    del y
    if not _is_plain_loss(options, targets, weight):
        return None
    axis = options["axis"]
    return torch.softmax(x, axis).scatter_(axis, targets, -1.0, reduce="add").mul_(cotangent)


_NATIVE: dict[str, Native] = {
    "softmax": _plain(torch.softmax),
    "log_softmax": _plain(torch.log_softmax),
    "logsumexp": _plain(_logsumexp),
    "cross_entropy": _cross_entropy,
    "pullback of softmax": _plain(_softmax_pullback),
    "pullback of log_softmax": _plain(_log_softmax_pullback),
    "pullback of logsumexp": _plain(_logsumexp_pullback),
    "pullback of cross_entropy": _cross_entropy_pullback,
}
"""torch's own kernels in place of formulas, of their options and operands; None is what they do not cover."""

_NATIVE_LENGTH = 1024
"""Longest row for which torch's kernels along the last axis meet the accuracy bound, with half of it to spare.

Measured on 2.13: at 4096 twice the bound in float32, at 8192 five times in float64. Along other axes half the bound
is reached at 64. Neither of its logsumexp and cross_entropy keeps an answer close to 0: `_surprise` stands for them.
"""

_NATIVE_LENGTH_ACROSS = 64


def _admits(name: str, x: Array, axis: int) -> bool:
    n = x.shape[axis]
    if n > (_NATIVE_LENGTH if axis == x.ndim - 1 else _NATIVE_LENGTH_ACROSS):
        return False
    if x.dtype in _NARROW and (name != "softmax" or axis != x.ndim - 1):
        return False  # only that one is computed in float32 and rounded once
    if x.numel() < _LARGE:
        return True
    if name == "logsumexp":
        return False  # one row with an answer close to its maximum, and there will be one, takes it a second pass
    if x.numel() < _MANY * n:
        return True
    is_faster = x.numel() < _VERY_LARGE or not _has_fused()
    return n > _SLOW_UP_TO and name not in _SEVERAL_KERNELS and is_faster


_SEVERAL_KERNELS = ("cross_entropy", "pullback of logsumexp", "pullback of cross_entropy")
"""Formulas that take several of torch's kernels, each a pass: that only saves the overhead of small calls."""

_SLOW_UP_TO = 15
"""Row length up to which torch's kernels are slower than ours: they make vectors of 16."""

_LARGE, _MANY = 10_000, 300
"""Entries and rows from which a call of our kernels costs no more than what torch's are slower by."""

_VERY_LARGE = 1_000_000
"""Entries from which our fused kernels are faster than torch's for rows of any length."""


@functools.cache
def _has_fused() -> bool:
    from polysoftmax.engines import fused

    return fused.installed()


_NARROW = (torch.float16, torch.bfloat16)


def _shares_memory(x: Array) -> bool:
    """Whether NumPy can be given the memory of ``x`` as it is."""
    return x.is_cpu and _is_plain(x)


def _on_gpu(x: Array) -> bool:
    """Whether a CUDA kernel can be given the memory of ``x`` as it is."""
    return x.is_cuda and _is_plain(x)


def _is_plain(x: Array) -> bool:
    kind = type(x)
    plain = kind is torch.Tensor or kind is torch.nn.Parameter
    return plain and x.layout is torch.strided and not x.is_neg()


def _run_as_numpy(call: Call, operands: tuple[Array, ...]) -> Any:
    numpy_engine, fused = _numpy_engines()
    compute = _numpy_dtype(call.compute)
    result = compute if call.result in _NARROW else _numpy_dtype(call.result)
    wide = Call(call.formula, call.options, compute, result, call.squeeze)
    large = operands[0].numel() >= numpy_engine.SMALL
    if large and any(isinstance(one, torch.Tensor) and one.dtype in _NARROW for one in operands):
        bits = tuple(_bits(one) if isinstance(one, torch.Tensor) else one for one in operands)
        if not fused.obstacle(wide, bits):  # the kernels convert what is in the cache
            same = wide._replace(result=_numpy_dtype(call.result))
            return _tensors(numpy_engine.run(same, bits), call.result)
    # torch rounds to 16 bits faster than NumPy, which has no bfloat16 either.
    arrays = [_widened(one) if one is not None and isinstance(one, torch.Tensor) else one for one in operands]
    return _tensors(numpy_engine.run(wide, tuple(arrays)), call.result)


def _tensors(y: Any, result: DType) -> Any:
    if isinstance(y, tuple):
        return tuple(map(torch.from_numpy, y))  # in dtypes of their own
    return _from_numpy(y, result)


@functools.cache
def _numpy_engines() -> tuple[ModuleType, ModuleType]:
    from polysoftmax.engines import _threads, fused
    from polysoftmax.engines import numpy as numpy_engine

    for openmp in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):  # on Linux; it is loaded already
        _threads.borrow(ctypes.CDLL(str(openmp)), torch.get_num_threads)
    return numpy_engine, fused


def _widened(x: Array) -> Array:
    if x.requires_grad:
        x = x.detach()
    return (x.float() if x.dtype in _NARROW else x).numpy()


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
        self.formula = formula
        self.wanted = wanted
        self.name = f"pullback of {formula.name}" + (" for all operands" if any(wanted[1:]) else "")

    def function(self, *arrays: Array, **options: Any) -> Any:
        *operands, y, cotangent = arrays
        assert self.formula.vjp is not None
        y = self.formula.function(*operands, **options) if y is None else y
        gradients = self.formula.vjp(tuple(operands), y, cotangent, self.wanted, **options)
        asked = tuple(gradients[i] for i, wanted in enumerate(self.wanted) if wanted)
        return asked if len(asked) > 1 else asked[0]


@functools.cache
def pullback_of(formula: RowFormula, wanted: tuple[bool, ...]) -> _Pullback:
    """Return the derivative rule of a formula as a formula, for the operands that are ``wanted``."""
    return _Pullback(formula, wanted)


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
        axis = call.options["axis"]
        y, cotangent = None if y is None else y.unsqueeze(axis), cotangent.unsqueeze(axis)
    result = operands[0].dtype if y is None and True not in wanted[1:] else call.compute
    pullback: Any = pullback_of(call.formula, wanted)
    found = run_formula(Call(pullback, call.options, call.compute, result), (*operands, y, cotangent))
    given = iter(found if isinstance(found, tuple) else (found,))
    answers: list[Array | None] = [None] * len(wanted)
    for i, asked in enumerate(wanted):
        gradient = next(given) if asked else None
        if gradient is not None:
            if i and gradient.shape != operands[i].shape:  # what stands beside the rows may have been broadcast
                gradient = gradient.sum_to_size(operands[i].shape)
            answers[i] = gradient if gradient.dtype is operands[i].dtype else gradient.to(operands[i].dtype)
    return tuple(answers)


def known_to_kernels(call: Call, y: Array) -> Array | None:
    """Return an answer from which a kernel can tell the gradient; None where that follows from the rows."""
    return y if call.formula.from_output and y.dtype == call.compute else None


def _number(operand: Array | float | None) -> float | None:
    return operand if isinstance(operand, float) else None


def _tensor(operand: Array | float | None) -> Array | None:
    return None if isinstance(operand, float) else operand


class _Formula(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, call: Call, *operands: Array) -> Array:
        y = _run_constant(call, operands)
        numbers = tuple(map(_number, operands)) if float in map(type, operands) else None
        if call.formula.from_output and y.dtype == call.compute and not any(ctx.needs_input_grad[2:]):
            operands = (y, *operands[1:])  # the rule does not look at the rows, so they need not be kept
        ctx.kept = call, chosen(), numbers
        ctx.save_for_backward(y, *(operands if numbers is None else map(_tensor, operands)))
        return y

    @staticmethod
    def backward(ctx: Any, cotangent: Array) -> tuple[Array | None, ...]:
        call, engine, numbers = ctx.kept
        if engine != chosen():
            # PyTorch may differentiate on threads of its own, where the caller's choice is not seen.
            with chosen_before(engine):
                return _Formula.backward(ctx, cotangent)
        y, *operands = ctx.saved_tensors
        if numbers is not None:
            operands = [one if number is None else number for one, number in zip(operands, numbers, strict=True)]
        if engine == "cuda":
            y = known_to_kernels(call, y)
        elif y.dtype != call.compute:
            # The answer was rounded to 16 bits; its gradient is to be rounded once, too, and not twice.
            y = run(call._replace(result=call.compute), tuple(operands))
        # With is_grads_batched a cotangent has no memory that a kernel could read, and PyTorch has no public question.
        is_batched = torch._C._functorch.is_legacy_batchedtensor(cotangent)
        run_formula = Call.evaluate if is_batched else run
        return None, *gradients(call, tuple(operands), y, cotangent, ctx.needs_input_grad[1:], run_formula)


_apply = super(torch.autograd.Function, _Formula).apply  # its own apply asks for transforms again, and at length
