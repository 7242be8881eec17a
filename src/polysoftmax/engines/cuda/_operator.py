"""The kernels as one operator of PyTorch, which ``torch.compile`` takes into its graph without looking inside.

Not in eager mode, where an operator of Python's would cost more than the launch.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polysoftmax._sampling import block_length
from polysoftmax.engines import FORMULAS, Call
from polysoftmax.engines.cuda._calls import NAMES, Launch, answers_several, prepare
from polysoftmax.engines.cuda._plan import REDUCTIONS
from polysoftmax.engines.torch import gradients, known_to_kernels, pullback_of

if TYPE_CHECKING:
    from polysoftmax._arrays import Array

_PULLBACK = "pullback of "


def run(call: Call, operands: tuple[Array, ...]) -> Any:
    """Put a call into the graph that is being made."""
    answers = formula(
        call.formula.name,
        [one for one in operands if isinstance(one, Tensor)],
        [float(one) for one in operands if isinstance(one, float)],
        "".join("t" if isinstance(one, Tensor) else "-" if one is None else "n" for one in operands),
        "{" + ", ".join([f"'{key}': {value}" for key, value in call.options.items()]) + "}",
        call.compute,
        call.result,
        call.squeeze,
    )
    return tuple(answers) if answers_several(call.formula.name) else answers[0]


def _call(
    name: str,
    tensors: list[Tensor],
    numbers: list[float],
    kinds: str,
    options: str,
    compute: torch.dtype,
    result: torch.dtype,
    squeeze: bool,
) -> tuple[Call, tuple[Array, ...]]:
    """Return the call that the arguments of the operator stand for."""
    of_kind = {"t": iter(tensors), "n": iter(numbers), "-": iter([None] * len(kinds))}
    operands = tuple(next(of_kind[kind]) for kind in kinds)
    found: Any
    if name.startswith(_PULLBACK):
        found = pullback_of(FORMULAS[name.removeprefix(_PULLBACK)], (True,) + (False,) * (len(operands) - 3))
    else:
        found = FORMULAS[name]
    return Call(found, ast.literal_eval(options), compute, result, squeeze), operands


@torch.library.custom_op("polysoftmax::formula", mutates_args=())  # type: ignore[untyped-decorator]
def formula(
    name: str,
    tensors: list[Tensor],
    numbers: list[float],
    kinds: str,
    options: str,
    compute: torch.dtype,
    result: torch.dtype,
    squeeze: bool,
) -> list[Tensor]:
    """Run a formula in its kernel, or as it stands where no kernel covers what the call has become."""
    call, operands = _call(name, tensors, numbers, kinds, options, compute, result, squeeze)
    found = prepare(call, operands)
    answer = found.run() if isinstance(found, Launch) else call.evaluate(operands)
    return [one.contiguous() for one in (answer if isinstance(answer, tuple) else (answer,))]


@formula.register_fake  # type: ignore[untyped-decorator]
def _shapes(*arguments: Any) -> list[Tensor]:
    # Nothing of the formulas may run here: torch.compile assumes that what they keep does not change while it traces.
    call, (x, *_) = _call(*arguments)
    axis, n, name = call.options["axis"], int(x.shape[call.options["axis"]]), call.formula.name
    answers = [(n, call.result)]
    if name in REDUCTIONS:
        answers = [(1, call.result)]
    elif name == "sample_masses":
        answers = [(1, call.compute), (-(-n // block_length(n)), call.compute)]
    elif name == "sample_leading":
        k = call.options["top_k"]
        answers = [(1, call.compute), (k, call.compute), (k, torch.int32)]
    elif answers_several(name):
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
    answers = gradients(call, operands, known_to_kernels(call, y), cotangents[0], wanted, _run_or_evaluate)
    of_tensors = [answer for answer, one in zip(answers, operands, strict=True) if isinstance(one, Tensor)]
    of_numbers: list[None] | None = None if ctx.others[0] else []  # an empty list could be one of tensors
    return None, of_tensors, of_numbers, None, None, None, None, None


def _run_or_evaluate(call: Call, operands: tuple[Array, ...]) -> Any:
    return run(call, operands) if call.formula.name in NAMES else call.evaluate(operands)


formula.register_autograd(_gradients, setup_context=_keep)
