"""PyTorch: derivative rules in eager mode, native kernels on the CPU, CUDA kernels if asked for, formulas elsewhere."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack
from torch.autograd import forward_ad

from polysoftmax._arrays import library, require_dense, values_are_free
from polysoftmax._formula import Call
from polysoftmax._ops import Ops, ops_of
from polysoftmax._sampling import SAMPLE
from polysoftmax._softmax import LOG_SOFTMAX
from polysoftmax._truncation import TRUNCATE
from polysoftmax.engines import chosen, native, using
from polysoftmax.engines._gradients import answer_for_gradient, gradients, is_recorded

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax._arrays import Array, DType
    from polysoftmax._formula import RowFormula

_NARROW = (torch.float16, torch.bfloat16)

_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
"""Types whose memory can be given to a kernel: a subclass may have none."""

_STRIDED = torch.strided

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

    def kth_greatest(self, x: Array, k: int) -> Array:
        return x.topk(k, dim=-1, sorted=False).values.amin(-1, True)

    def running_sum(self, x: Array, dtype: DType) -> Array:
        return x.cumsum(-1, dtype=dtype)  # torch.compile cannot follow array-api-compat's


class DifferentiatedOps(TorchOps):
    """The words of PyTorch where it differentiates the formula itself, and cannot be given its rules."""

    def constant(self, x: Array) -> Array:
        return x.detach() if x.requires_grad or _is_transformed() else x

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

    def constant(self, x: Array) -> Array:
        return x.detach()

    def below(self, x: Array, top: Array) -> Array:
        return torch.clamp(x, max=top) - top  # the derivative of a minimum would be 1/2 at the maximum

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
    if torch.compiler.is_compiling():
        kind: type[Ops] = CompiledDifferentiatedOps if torch.is_grad_enabled() else CompiledOps
    else:
        require_dense(x)
        kind = DifferentiatedOps if torch.is_grad_enabled() or _is_transformed() else TorchOps
    return ops_of(kind, library(x).xp, axis)


def run(call: Call, operands: tuple[Array, ...]) -> Any:
    """Run a formula, with its own derivative rule where PyTorch lets one be given.

    Under ``torch.compile``, ``torch.func`` and forward mode the formula itself is differentiated: a Function
    with a ``jvp`` breaks the first as soon as gradients flow, and silently returns zeros for forward over
    forward.
    """
    if torch.compiler.is_compiling():
        return _run_compiled(call, operands)
    if _is_transformed():
        return _evaluate(call, operands)
    if not is_recorded(operands):
        return _run_constant(call, operands)
    if call.formula.vjp is not None:
        return _apply(call, *operands)
    if call.formula is SAMPLE and chosen() != "portable":
        return _sample_with_gradient(call, operands)
    return _evaluate(call, operands)


def explain(x: Array, formula: RowFormula) -> tuple[str, str]:
    """Return the engine for a formula along the last axis of ``x``, and why."""
    if is_on_gpu(x):
        return _cuda().explain(x, formula)  # type: ignore[no-any-return]
    if not is_in_memory(x):
        return "portable", f"the array API formula as it stands, for a {type(x).__name__} on {x.device}"
    return native.explain(x, formula)


def _evaluate(call: Call, operands: tuple[Array, ...]) -> Any:
    ops = words(operands[0], call.axis)
    if not torch.compiler.is_compiling():
        for one in operands[1:]:
            require_dense(one)
    return call.evaluate(ops, operands)


def _run_compiled(call: Call, operands: tuple[Array, ...]) -> Any:
    # An operator is given no negative view: PyTorch resolves those, and does not answer the question under a trace.
    if all(_has_gpu_memory(one) for one in operands if isinstance(one, torch.Tensor)):
        from polysoftmax.engines.cuda import _operator

        if _operator.is_chosen():
            return _operator.run_compiled(call, operands)
    return _evaluate(call, operands)


def _is_transformed() -> bool:
    """Whether PyTorch batches, differentiates forward or by ``torch.func``, or records for ``torch.jit.trace``."""
    # PyTorch has no public question for the first two, and no cheap one for the last.
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0 or _get_tracing_state() is not None


@cache
def _cuda() -> Any:
    """Return the CUDA engine, which most who use PyTorch do without; an import statement takes time in every call."""
    from polysoftmax.engines import cuda

    return cuda


def _run_constant(call: Call, operands: tuple[Array, ...]) -> Any:
    """Run a formula that nothing is differentiated through."""
    engine = chosen()
    if engine == "portable" or _len_torch_dispatch_stack():
        return _evaluate(call, operands)
    if engine == "cuda" and _are_on_gpu(operands):
        return _cuda().run(call, operands)
    y = native.run(call, operands, _MEMORY)
    return _evaluate(call, operands) if y is NotImplemented else y


def is_in_memory(x: Array) -> bool:
    """Whether a native kernel can be given the memory of ``x``."""
    return type(x) in _PLAIN and x.is_cpu and x.layout is _STRIDED and not x.is_neg()


class _Memory:
    address_is = native.DATA

    def kind(self, x: Array) -> Any:
        return (x.dtype, x.shape, x.stride()) if is_in_memory(x) else NotImplemented

    def strides(self, x: Array) -> tuple[int, ...]:
        size = x.itemsize
        return tuple([size * stride for stride in x.stride()])

    address = staticmethod(torch.Tensor.data_ptr)

    def maker(self, shape: tuple[int, ...], dtype: DType | str) -> Callable[[], Array]:
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        # Like a tensor of one entry in memory: every other way of making one takes twice as long.
        return partial(torch.empty_like, torch.empty((), dtype=dtype, device="cpu").expand(shape))


_MEMORY = _Memory()


def is_on_gpu(x: Array) -> bool:
    """Whether a CUDA kernel can be given the memory of ``x``."""
    return _has_gpu_memory(x) and not x.is_neg()


def _has_gpu_memory(x: Array) -> bool:
    return type(x) in _PLAIN and x.is_cuda and x.layout is _STRIDED


def _are_on_gpu(operands: tuple[Array, ...]) -> bool:
    for one in operands:  # a generator would take twice as long
        if one is None or type(one) is float:
            continue
        if not is_on_gpu(one):
            return False
    return True


def _sample_with_gradient(call: Call, operands: tuple[Array, ...]) -> tuple[Array, ...]:
    """Draw in a kernel, and take the log-probabilities of what was drawn by formulas that have rules."""
    x, _, t, where, *filters = operands
    detached = tuple(one.detach() if isinstance(one, torch.Tensor) else one for one in operands)
    tokens, *_ = _run_constant(call._replace(options={**call.options, "logprobs": False}, squeeze=False), detached)
    drawn = tokens >= 0
    x = torch.where(drawn.any(call.axis, keepdim=True), x, 0.0)  # a row without a token has no slope
    wide = Call(LOG_SOFTMAX, {}, call.axis, call.compute, call.compute)
    top_k = call.options["top_k"]
    if top_k is not None or any(one is not None for one in filters):
        x = run(wide._replace(formula=TRUNCATE, options={"top_k": top_k}), (x, t, where, *filters))
        where = None
    log_p = run(wide, (x, t, where))
    log_p = torch.where(drawn, log_p.gather(call.axis, tokens.clamp(min=0)), torch.nan)
    return call.without_axis((tokens, log_p))


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
        if engine == "cuda":
            y = answer_for_gradient(call, y)
        elif y.dtype != call.compute:
            # The answer was rounded to 16 bits; its gradient is to be rounded once, too, and not twice.
            y = run(call._replace(result=call.compute), tuple(operands))
        # With is_grads_batched a cotangent has no memory that a kernel could read, and PyTorch has no public question.
        is_batched = torch._C._functorch.is_legacy_batchedtensor(cotangent)
        run_formula = _evaluate if is_batched else run
        return None, *gradients(call, tuple(operands), y, cotangent, ctx.needs_input_grad[1:], run_formula)


_apply = super(torch.autograd.Function, _Formula).apply  # its own apply asks for transforms again, and at length
