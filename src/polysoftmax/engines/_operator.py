"""The kernels of the CPU and of CUDA as one operator of PyTorch, which compiled code calls without looking inside.

Not in eager mode, where an operator of Python's would cost more than the kernel of a small call.
"""

from __future__ import annotations

from ctypes import c_float
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from polysoftmax._formula import Call
from polysoftmax.engines import _library, chosen, cuda, native
from polysoftmax.engines._gradients import answer_for_gradient, gradients, is_recorded
from polysoftmax.engines._torch_memory import MEMORY, is_plain
from polysoftmax.engines._torch_words import evaluate, is_exporting, is_transformed
from polysoftmax.engines.cuda._calls import COMPOSED as CUDA_COMPOSED
from polysoftmax.engines.cuda._calls import KERNELS as CUDA_KERNELS
from polysoftmax.engines.cuda._devices import torch_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polysoftmax._arrays import Array
    from polysoftmax._formula import Reduction

_BY_NAME = {one.name: one for one in native.KERNELS}
"""An operator of PyTorch takes no objects, so it is given the name of the formula."""

_IN_KERNELS = {
    "native": {one.name for one in native.KERNELS},
    "cuda": {one.name for one in (*CUDA_KERNELS, *CUDA_COMPOSED)},
}
"""What the operator runs in each engine; the rest is in the graph as it stands."""


def run(call: Call, operands: tuple[Array, ...]) -> Any:
    """Put a call into the graph that is being made: as the operator, or as it stands."""
    if is_transformed() or not all(is_plain(one) for one in operands if isinstance(one, Tensor)):
        return evaluate(call, operands)
    device = operands[0].device
    return _put(_engine(device.type, device.index), call, operands)


def words_of(numbers: list[int], device: Any) -> Tensor:
    """Put the words of a key into the graph that is being made, given as numbers, which may be symbols.

    Inductor would compile a C++ kernel for these few bytes, and take most of the time of a first call for it.
    """
    place = torch.device("cpu" if device is None else device)
    if is_transformed() or _engine(place.type, place.index) == "portable":
        return torch.tensor(numbers, dtype=torch.int32, device=device)  # asarray would make constants of symbols
    return torch.ops.polysoftmax.words.default(numbers, device)


# Both are constants of the graph, and not looked at again before every call as all else is that is traced.


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _engine(device: str, ordinal: int | None) -> str:
    """Return the engine of compiled code; what is chosen while torch.compile traces stays in it."""
    if chosen() == "portable" or is_exporting():
        return "portable"
    if device == "cuda":
        return "cuda" if cuda.are_on(torch_device(ordinal or 0)) else "portable"
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
    """Return a call as the arguments of the operator: few, because PyTorch converts each of them in every call."""
    values = (*operands, *call.options.values())
    text = (
        engine,
        call.formula.name,
        "".join([_kind(one) for one in values]),
        " ".join(call.options),
        str(call.axis),
        str(call.compute),
        str(call.result),
        "squeeze" if call.squeeze else "",
        call.reduction or "",
    )
    return (
        ";".join(text),
        [one for one in values if isinstance(one, Tensor)],
        [one for one in values if isinstance(one, float)],
        [one for one in values if isinstance(one, int) and not isinstance(one, bool)],
    )


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return "t"
    if isinstance(value, bool):
        return "y" if value else "n"
    return "-" if value is None else "i" if isinstance(value, int) else "f"


class _Form(NamedTuple):
    """What the text of a call says: all of it but its tensors and numbers."""

    engine: str
    call: Call
    places: tuple[tuple[int, int], ...]
    """Where each operand stands, and then each option: in which of the sequences, and at which place."""
    names: tuple[str, ...]

    def call_of(
        self, tensors: Sequence[Tensor], floats: Sequence[float], integers: Sequence[int]
    ) -> tuple[Call, tuple[Any, ...]]:
        """Return the call, and its operands."""
        given = (tensors, floats, integers, _CONSTANTS)
        values = [given[sequence][place] for sequence, place in self.places]
        if not self.names:
            return self.call, tuple(values)
        count = len(values) - len(self.names)
        options = dict(zip(self.names, values[count:], strict=True))
        return self.call._replace(options=options), tuple(values[:count])


_SEQUENCES = "tfi"
_CONSTANTS = (None, True, False)


@cache  # there are as many texts as calls in the code that was compiled
def _read(text: str) -> _Form:
    engine, name, kinds, names, axis, compute, result, squeeze, reduction = text.split(";")
    places = []
    for i, kind in enumerate(kinds):
        if kind in _SEQUENCES:
            places.append((_SEQUENCES.index(kind), kinds[:i].count(kind)))
        else:
            places.append((len(_SEQUENCES), "-yn".index(kind)))
    computed, answered = [getattr(torch, one.removeprefix("torch.")) for one in (compute, result)]
    reduced = cast("Reduction", reduction or None)
    call = Call(_BY_NAME[name], {}, int(axis), computed, answered, bool(squeeze), reduced)
    return _Form(engine, call, tuple(places), tuple(names.split()))


def _answer(text: str, tensors: Sequence[Tensor], floats: Sequence[float], integers: Sequence[int]) -> list[Tensor]:
    """Run a formula in its kernel, or as it stands where no kernel covers what the call has become."""
    form = _read(text)
    call, operands = form.call_of(tensors, floats, integers)
    if floats and call.compute is torch.float32:
        # Numbers come as they were given, because torch.compile may have had symbols for them.
        operands = tuple([c_float(one).value if isinstance(one, float) else one for one in operands])
    if form.engine == "cuda":
        answer = cuda.launch(call, operands)
    else:
        answer = native.run(call, operands, MEMORY)
        if answer is NotImplemented:
            answer = evaluate(call, operands)
    return [one.contiguous() for one in (answer if isinstance(answer, tuple) else (answer,))]


def _shapes(text: str, *arguments: Any) -> list[Tensor]:
    # Nothing of the formulas may run here: torch.compile assumes that what they keep does not change while it traces.
    call, operands = _read(text).call_of(*arguments)
    x, axis = operands[0], call.axis
    made = []
    for length, dtype in native.KERNELS[call.formula].answers(call, operands):
        if length == 0:
            continue
        along = () if call.squeeze else (x.shape[axis] if length is None else length,)
        shape = () if call.reduction else (*x.shape[:axis], *along, *x.shape[axis + 1 :])
        made.append(x.new_empty(shape, dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype))
    return made


class _Formula(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(
        ctx: Any, text: str, floats: Sequence[float], integers: Sequence[int], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        answers = kernel(text, tensors, floats, integers)
        ctx.call = text, floats, integers
        ctx.save_for_backward(*tensors, answers[0])
        return tuple(answers)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        text, *numbers = ctx.call
        *tensors, y = ctx.saved_tensors
        form = _read(text)
        call, operands = form.call_of(tensors, *numbers)
        needed = iter(ctx.needs_input_grad[3:])
        wanted = tuple(isinstance(one, Tensor) and next(needed) for one in operands)
        y = answer_for_gradient(call, y)
        if y is not None and True not in wanted[1:]:
            operands = (y, *operands[1:])  # the rule does not look at the rows, so they need not be kept
        answers = gradients(call, operands, y, cotangents[0], wanted, partial(_put, form.engine))
        of_tensors = [answer for answer, one in zip(answers, operands, strict=True) if isinstance(one, Tensor)]
        return None, None, None, *of_tensors


def _differentiable(
    text: str, tensors: Sequence[Tensor], floats: Sequence[float], integers: Sequence[int]
) -> Sequence[Tensor]:
    if is_recorded(tuple(tensors)):
        return list(_Formula.apply(text, floats, integers, *tensors))
    return kernel(text, tensors, floats, integers)  # type: ignore[no-any-return]


def _words(numbers: Sequence[int], device: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)


def _shape_of_words(numbers: Sequence[int], device: Any) -> Tensor:
    return torch.empty(len(numbers), dtype=torch.int32, device=device)


# Two operators, because a derivative is registered in Python and takes longer than a small kernel: "formula" dissolves
# into its derivative while a program is compiled, and the program runs "kernel".
_LIBRARY = torch.library.Library("polysoftmax", "DEF")
for _name in ("formula", "kernel"):
    _LIBRARY.define(
        f"{_name}(str call, Tensor[] tensors, float[] floats, SymInt[] integers) -> Tensor[]",
        tags=torch.Tag.pt2_compliant_tag,
    )
_LIBRARY.define("words(SymInt[] numbers, Device? device) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
_LIBRARY.impl("formula", _differentiable, "CompositeImplicitAutograd")
_LIBRARY.impl("kernel", _answer, "CPU")
_LIBRARY.impl("kernel", _answer, "CUDA")
_LIBRARY.impl("kernel", torch.library.fallthrough_kernel, "Autograd")
_LIBRARY.impl("words", _words, "CompositeExplicitAutograd")
torch.library.register_fake("polysoftmax::kernel", _shapes, lib=_LIBRARY)
torch.library.register_fake("polysoftmax::words", _shape_of_words, lib=_LIBRARY)

formula = torch.ops.polysoftmax.formula.default
kernel = torch.ops.polysoftmax.kernel.default
