"""The kernels as one operator of PyTorch, which ``torch.compile`` takes into its graph without looking inside.

Not in eager mode, where an operator of Python's would cost more than the launch.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polysoftmax._formula import Call
from polysoftmax._losses import CROSS_ENTROPY
from polysoftmax._sampling import DRAW, DRAW_LEADING, LEADING, MASSES, SAMPLE, block_length
from polysoftmax._softmax import LOGSUMEXP
from polysoftmax.engines import chosen
from polysoftmax.engines._gradients import answer_for_gradient, gradients, is_recorded
from polysoftmax.engines.cuda import launch_or_evaluate
from polysoftmax.engines.cuda._calls import KERNELS, evaluate
from polysoftmax.engines.cuda._composed import Composed

if TYPE_CHECKING:
    from polysoftmax._arrays import Array

_BY_NAME = {one.name: one for one in KERNELS}
"""An operator of PyTorch takes no objects, so it is given the name of the formula."""

_SEVERAL = (MASSES, DRAW, LEADING, DRAW_LEADING)
"""Formulas that answer a tuple."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_chosen() -> bool:
    """Whether the kernels were asked for; what is chosen while torch.compile traces stays in the compiled code."""
    return chosen() == "cuda"


def run_compiled(call: Call, operands: tuple[Array, ...]) -> Any:
    """Put what has kernels of a call into the graph that is being made, as the operator."""
    if call.reduction is not None:
        return call.in_steps(run_compiled, operands)
    if call.formula is SAMPLE:
        return Composed(call, operands, _run_or_evaluate).answer()
    return _run_or_evaluate(call, operands)


def run(call: Call, operands: tuple[Array, ...]) -> Any:
    """Put a call into the graph that is being made."""
    answers = formula(
        call.formula.name,
        [one for one in operands if isinstance(one, Tensor)],
        [float(one) for one in operands if isinstance(one, float)],
        "".join("t" if isinstance(one, Tensor) else "-" if one is None else "n" for one in operands),
        "{" + ", ".join([f"'{key}': {value}" for key, value in call.options.items()]) + "}",
        call.axis,
        call.compute,
        call.result,
        call.squeeze,
    )
    return tuple(answers) if call.formula in _SEVERAL else answers[0]


def _call(
    name: str,
    tensors: list[Tensor],
    numbers: list[float],
    kinds: str,
    options: str,
    axis: int,
    compute: torch.dtype,
    result: torch.dtype,
    squeeze: bool,
) -> tuple[Call, tuple[Array, ...]]:
    """Return the call that the arguments of the operator stand for."""
    of_kind = {"t": iter(tensors), "n": iter(numbers), "-": iter([None] * len(kinds))}
    operands = tuple(next(of_kind[kind]) for kind in kinds)
    return Call(_BY_NAME[name], ast.literal_eval(options), axis, compute, result, squeeze), operands


@torch.library.custom_op("polysoftmax::formula", mutates_args=())  # type: ignore[untyped-decorator]
def formula(
    name: str,
    tensors: list[Tensor],
    numbers: list[float],
    kinds: str,
    options: str,
    axis: int,
    compute: torch.dtype,
    result: torch.dtype,
    squeeze: bool,
) -> list[Tensor]:
    """Run a formula in its kernel, or as it stands where no kernel covers what the call has become."""
    call, operands = _call(name, tensors, numbers, kinds, options, axis, compute, result, squeeze)
    answer = launch_or_evaluate(call, operands)
    return [one.contiguous() for one in (answer if isinstance(answer, tuple) else (answer,))]


@formula.register_fake  # type: ignore[untyped-decorator]
def _shapes(*arguments: Any) -> list[Tensor]:
    # Nothing of the formulas may run here: torch.compile assumes that what they keep does not change while it traces.
    call, (x, *_) = _call(*arguments)
    axis, n = call.axis, int(x.shape[call.axis])
    answers = [(n, call.result)]
    if call.formula in (LOGSUMEXP, CROSS_ENTROPY):
        answers = [(1, call.result)]
    elif call.formula is MASSES:
        answers = [(1, call.compute), (-(-n // block_length(n)), call.compute)]
    elif call.formula is LEADING:
        k = call.options["top_k"]
        answers = [(1, call.compute), (k, call.compute), (k, torch.int32)]
    elif call.formula in _SEVERAL:
        answers = [(1, torch.int64), (1, call.compute)][: 1 + call.options["logprobs"]]
    lengths = [() if call.squeeze else (length,) for length, _ in answers]
    shapes = [(*x.shape[:axis], *length, *x.shape[axis + 1 :]) for length in lengths]
    return [torch.empty(shape, dtype=one, device=x.device) for shape, (_, one) in zip(shapes, answers, strict=True)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    name, tensors, *ctx.others = inputs
    ctx.name = name
    ctx.save_for_backward(*tensors, output[0])


def _gradients(ctx: Any, cotangents: list[Tensor]) -> tuple[Any, ...]:
    *tensors, y = ctx.saved_tensors
    call, operands = _call(ctx.name, tensors, *ctx.others)
    needed = iter(ctx.needs_input_grad[1])
    wanted = tuple(isinstance(one, Tensor) and next(needed) for one in operands)
    answers = gradients(call, operands, answer_for_gradient(call, y), cotangents[0], wanted, _run_or_evaluate)
    of_tensors = [answer for answer, one in zip(answers, operands, strict=True) if isinstance(one, Tensor)]
    of_numbers: list[None] | None = None if ctx.others[0] else []  # an empty list could be one of tensors
    return None, of_tensors, of_numbers, None, None, None, None, None, None


def _run_or_evaluate(call: Call, operands: tuple[Array, ...]) -> Any:
    if call.formula in KERNELS and not (call.formula.vjp is None and is_recorded(operands)):
        return run(call, operands)
    return evaluate(call, operands)


formula.register_autograd(_gradients, setup_context=_keep)
