"""The kernels of the CPU and of CUDA as one operator of PyTorch, which compiled code calls without looking inside.

Not in eager mode, where an operator of Python's would cost more than the kernel of a small call.
"""

from __future__ import annotations

from ctypes import c_float
from itertools import repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polysoftmax._formula import Call
from polysoftmax._sampling import SAMPLE
from polysoftmax._softmax import LOG_SOFTMAX, LOGSUMEXP, SOFTMAX
from polysoftmax.engines import _library, chosen, cuda, native
from polysoftmax.engines._gradients import answer_for_gradient, gradients, is_recorded
from polysoftmax.engines._torch_memory import MEMORY, is_plain
from polysoftmax.engines._torch_words import evaluate, is_transformed
from polysoftmax.engines.cuda._calls import KERNELS as CUDA_KERNELS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from polysoftmax._arrays import Array

_BY_NAME = {one.name: one for one in native.KERNELS}
"""An operator of PyTorch takes no objects, so it is given the name of the formula."""

_FUSED = (SOFTMAX, LOG_SOFTMAX, LOGSUMEXP)
"""What Inductor makes one loop of on the CPU, with the work around it; and its derivatives."""

_IN_KERNELS = {
    "native": {one.name for one in native.KERNELS if getattr(one.function, "formula", one) not in _FUSED},
    "cuda": {one.name for one in (*CUDA_KERNELS, SAMPLE)},
}
"""What the operator runs in each engine; the rest is in the graph as it stands."""


def run(call: Call, operands: tuple[Array, ...]) -> Any:
    """Put a call into the graph that is being made: as the operator, or as it stands."""
    if is_transformed() or not all(is_plain(one) for one in operands if isinstance(one, Tensor)):
        return evaluate(call, operands)
    return _put(_engine(operands[0].device.type), call, operands)


# Both are constants of the graph, and not looked at again before every call as all else is that is traced.


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _engine(device: str) -> str:
    """Return the engine of compiled code; what is chosen while torch.compile traces stays in it."""
    # An exported program is run without this package. PyTorch 2.6 has no such flag.
    if chosen() == "portable" or getattr(torch.compiler, "_is_exporting_flag", False):
        return "portable"
    if device == "cuda":
        return "cuda" if chosen() == "cuda" else "portable"
    return "native" if device == "cpu" and _library.load() is not None else "portable"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_in_kernel(engine: str, name: str) -> bool:
    return engine != "portable" and name in _IN_KERNELS[engine]


def _put(engine: str, call: Call, operands: tuple[Array, ...]) -> Any:
    if not _is_in_kernel(engine, call.formula.name):
        return evaluate(call, operands)
    if call.formula.vjp is None and is_recorded(operands):
        return evaluate(call, operands)
    answers = formula(*arguments_of(engine, call, operands))
    return tuple(answers) if len(answers) > 1 else answers[0]


def arguments_of(engine: str, call: Call, operands: tuple[Array, ...]) -> tuple[Any, ...]:
    """Return a call as the arguments of the operator."""
    values = (*operands, *call.options.values())
    return (
        engine,
        call.formula.name,
        [one for one in values if isinstance(one, Tensor)],
        [one for one in values if isinstance(one, float)],
        [one for one in values if isinstance(one, int) and not isinstance(one, bool)],
        "".join([_kind(one) for one in values]),
        " ".join(call.options),
        call.axis,
        call.compute,
        call.result,
        call.squeeze,
        call.reduction,
    )


def _kind(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "y" if value else "n"
    return "t" if isinstance(value, Tensor) else "i" if isinstance(value, int) else "f"


def _call(
    name: str,
    tensors: Sequence[Tensor],
    floats: Sequence[float],
    integers: Sequence[int],
    kinds: str,
    options: str,
    axis: int,
    compute: torch.dtype,
    result: torch.dtype,
    squeeze: bool,
    reduction: Any,
) -> tuple[Call, tuple[Array, ...]]:
    """Return the call that the arguments of the operator stand for."""
    of_kind: dict[str, Iterator[Any]] = {
        "t": iter(tensors),
        "f": iter(floats),
        "i": iter(integers),
        "-": repeat(None),
        "y": repeat(True),
        "n": repeat(False),
    }
    values = [next(of_kind[kind]) for kind in kinds]
    names = options.split()
    count = len(values) - len(names)
    named = dict(zip(names, values[count:], strict=True))
    return Call(_BY_NAME[name], named, axis, compute, result, squeeze, reduction), tuple(values[:count])


def _answer(engine: str, *arguments: Any) -> list[Tensor]:
    """Run a formula in its kernel, or as it stands where no kernel covers what the call has become."""
    call, operands = _call(*arguments)
    if call.compute == torch.float32:
        # Once more: torch.compile may have a symbol for a number, with which it simplifies that arithmetic away.
        operands = tuple([c_float(one).value if isinstance(one, float) else one for one in operands])
    if engine == "cuda":
        answer = cuda.launch(call, operands)
    else:
        answer = native.run(call, operands, MEMORY)
        if answer is NotImplemented:
            answer = evaluate(call, operands)
    return [one.contiguous() for one in (answer if isinstance(answer, tuple) else (answer,))]


def _shapes(engine: str, *arguments: Any) -> list[Tensor]:
    # Nothing of the formulas may run here: torch.compile assumes that what they keep does not change while it traces.
    del engine
    call, operands = _call(*arguments)
    x, axis = operands[0], call.axis
    made = []
    for length, dtype in native.KERNELS[call.formula].answers(call, operands):
        if length == 0:
            continue
        along = () if call.squeeze else (x.shape[axis] if length is None else length,)
        shape = () if call.reduction else (*x.shape[:axis], *along, *x.shape[axis + 1 :])
        made.append(x.new_empty(shape, dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype))
    return made


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.engine, ctx.name, tensors, *ctx.others = inputs
    ctx.save_for_backward(*tensors, output[0])


def _gradients(ctx: Any, cotangents: list[Tensor]) -> tuple[Any, ...]:
    *tensors, y = ctx.saved_tensors
    call, operands = _call(ctx.name, tensors, *ctx.others)
    needed = iter(ctx.needs_input_grad[2])
    wanted = tuple(isinstance(one, Tensor) and next(needed) for one in operands)
    y = answer_for_gradient(call, y)
    if y is not None and True not in wanted[1:]:
        operands = (y, *operands[1:])  # the rule does not look at the rows, so they need not be kept
    answers = gradients(call, operands, y, cotangents[0], wanted, lambda *step: _put(ctx.engine, *step))
    of_tensors = [answer for answer, one in zip(answers, operands, strict=True) if isinstance(one, Tensor)]
    # No list but an empty one may be answered for numbers: PyTorch takes that for one of tensors.
    of_numbers: list[list[None] | None] = [None if one else [] for one in ctx.others[:2]]
    return None, None, of_tensors, *of_numbers, None, None, None, None, None, None, None


_LIBRARY = torch.library.Library("polysoftmax", "DEF")
_LIBRARY.define(
    "formula(str engine, str name, Tensor[] tensors, float[] floats, SymInt[] integers, str kinds, str options, "
    "int axis, ScalarType compute, ScalarType result, bool squeeze, str? reduction) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.impl("formula", _answer, "CompositeExplicitAutograd")
torch.library.register_fake("polysoftmax::formula", _shapes, lib=_LIBRARY)
torch.library.register_autograd("polysoftmax::formula", _gradients, setup_context=_keep, lib=_LIBRARY)

formula = torch.ops.polysoftmax.formula.default
