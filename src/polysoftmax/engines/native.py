"""The native kernels, for NumPy and for PyTorch on the CPU: which calls they cover, and how a call is packed.

A problem is a sequence of 8-byte words: the number of the kernel, its options, the batch shape, and for each operand
its address, dtype and strides in bytes. A stride of 0 broadcasts, so nothing of the logits' size is ever copied for a
kernel. What does not change from one call to the next of the same kind is packed once, in a plan.
"""

from __future__ import annotations

import itertools
import struct
import sys
from array import array
from typing import TYPE_CHECKING, Any, NamedTuple

from polysoftmax._losses import CROSS_ENTROPY, ENTROPY, KL_DIVERGENCE
from polysoftmax._sampling import SAMPLE
from polysoftmax._softmax import LOG_SOFTMAX, LOGSUMEXP, SOFTMAX
from polysoftmax._truncation import TRUNCATE
from polysoftmax.engines import _library

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax._arrays import Array, DType
    from polysoftmax._formula import Call, RowFormula

_CODES = {
    name: code
    for code, name in enumerate(
        (
            *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
            *("float16", "bfloat16", "float32", "float64"),
        )
    )
}
_LEAST_COMPUTE = _CODES["float32"]
_OPTIONS = 8
_MOST_DIMENSIONS = 16


class Answer(NamedTuple):
    """An array that a kernel fills."""

    length: int | None
    """Entries along the axis: None for those of the rows, 0 for one that is absent."""
    dtype: DType | str


_ABSENT = Answer(0, "float64")


class Kernel(NamedTuple):
    """What a kernel makes of a call."""

    number: int
    answers: Callable[[Call, tuple[Any, ...]], tuple[Answer, ...]]
    options: Callable[[Call, tuple[Any, ...]], tuple[int | float, ...]] = lambda call, operands: ()
    leaves_out: int | None = None
    """The operand that the kernel does without, counted from the end."""


def _rows(call: Call, operands: tuple[Any, ...]) -> tuple[Answer, ...]:
    del operands
    return (Answer(None, call.result),)


def _one_a_row(call: Call, operands: tuple[Any, ...]) -> tuple[Answer, ...]:
    del operands
    return (Answer(1, call.result),)


def _draws(call: Call, operands: tuple[Any, ...]) -> tuple[Answer, ...]:
    draws = operands[1].shape[-1] // 2
    return Answer(draws, "int64"), Answer(draws, call.compute) if call.options["logprobs"] else _ABSENT


def _of_loss(call: Call, operands: tuple[Any, ...]) -> tuple[int | float, ...]:
    del operands
    ignored = call.options["ignore_index"]
    return int(ignored is not None), ignored or 0, call.options["label_smoothing"], call.options["z_loss"]


def _of_filters(call: Call, operands: tuple[Any, ...]) -> tuple[int | float, ...]:
    del operands
    return (call.options["top_k"] or 0,)


def _of_draws(call: Call, operands: tuple[Any, ...]) -> tuple[int | float, ...]:
    return call.options["top_k"] or 0, operands[1].shape[-1] // 2, int(call.options["is_one_key"])


_LOGITS = (True, False, False)

KERNELS = {
    SOFTMAX: Kernel(0, _rows),
    LOG_SOFTMAX: Kernel(1, _rows),
    LOGSUMEXP: Kernel(2, _one_a_row),
    SOFTMAX.pushforward(_LOGITS): Kernel(5, _rows),
    LOG_SOFTMAX.pushforward(_LOGITS): Kernel(6, _rows),
    CROSS_ENTROPY: Kernel(8, _one_a_row, _of_loss),
    CROSS_ENTROPY.pullback(_LOGITS): Kernel(9, _rows, _of_loss, leaves_out=-2),
    ENTROPY: Kernel(10, _one_a_row),
    KL_DIVERGENCE: Kernel(12, _one_a_row),
    TRUNCATE: Kernel(14, _rows, _of_filters),
    SAMPLE: Kernel(15, _draws, _of_draws),
}
"""The kernel of each formula that has one."""


def _register_pullbacks() -> None:
    """Register the reverse rules for every choice of operands that a gradient is wanted for."""
    rules: tuple[tuple[RowFormula, int, tuple[int | None, ...], int | None], ...] = (
        (SOFTMAX, 3, (None, 1), None),
        (LOG_SOFTMAX, 4, (None, 1), None),
        (LOGSUMEXP, 7, (None, None), -2),
        (ENTROPY, 11, (None, 1), -2),
        (KL_DIVERGENCE, 13, (None, None, 1), -2),
    )
    for formula, number, lengths, leaves_out in rules:
        for wanted in itertools.product((True, False), repeat=len(lengths)):

            def answers(
                call: Call,
                operands: tuple[Any, ...],
                lengths: tuple[int | None, ...] = lengths,
                wanted: tuple[bool, ...] = wanted,
            ) -> tuple[Answer, ...]:
                del operands
                pairs = zip(lengths, wanted, strict=True)
                return tuple(Answer(length, call.result) if asked else _ABSENT for length, asked in pairs)

            if any(wanted):  # the mask, which is last, never is
                KERNELS[formula.pullback((*wanted, False))] = Kernel(number, answers, leaves_out=leaves_out)


_register_pullbacks()


class Memory:
    """How the arrays of a library are described and made: NumPy's."""

    def __init__(self) -> None:
        self.plans: dict[tuple[Any, ...], _Plan | None] = {}

    @staticmethod
    def code(dtype: DType) -> int:
        """Return a dtype's number; -1 if the kernels do not know it."""
        # It may be the class that stands for it, such as numpy.float32.
        return _CODES.get(str(dtype).rpartition(".")[2].removesuffix("'>"), -1)

    def kind(self, x: Array) -> tuple[Any, ...]:
        """Return all that a plan has to know of an array."""
        return x.dtype, x.shape, x.strides

    def strides(self, x: Array) -> tuple[int, ...]:
        """Return the strides in bytes."""
        return x.strides  # type: ignore[no-any-return]

    def address(self, x: Array) -> int:
        """Return where the first entry is."""
        return x.__array_interface__["data"][0]  # type: ignore[no-any-return]

    def aligned(self, x: Array) -> Array:
        """Return a copy whose entries are at addresses that the CPU takes."""
        return x.copy()

    def empty(self, shape: tuple[int, ...], dtype: DType | str) -> Array:
        """Return new memory."""
        return sys.modules["numpy"].empty(shape, dtype)


class _TorchMemory(Memory):
    def kind(self, x: Array) -> tuple[Any, ...]:
        return x.dtype, x.shape, x.stride()

    def strides(self, x: Array) -> tuple[int, ...]:
        size = x.itemsize
        return tuple([size * stride for stride in x.stride()])

    def address(self, x: Array) -> int:
        return x.data_ptr()  # type: ignore[no-any-return]

    def aligned(self, x: Array) -> Array:
        return x.clone()

    def empty(self, shape: tuple[int, ...], dtype: DType | str) -> Array:
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype)


NUMPY, TORCH = Memory(), _TorchMemory()

_MOST_PLANS = 4096
"""Plans that are kept; a program whose shapes are always new would fill the memory with them."""


class _Plan(NamedTuple):
    """A call with everything fixed but addresses."""

    run: Callable[[bytes], None]
    pack: Callable[..., bytes]
    words: list[int | float]
    inputs: tuple[tuple[int, int, int], ...]
    """Of each operand that is given: its number, the place of its address, and the size of its entries."""
    answers: tuple[tuple[int, tuple[int, ...], DType | str], ...]
    """Of each array to fill: the place of its address, its shape and dtype."""
    is_empty: bool
    squeezed: int | None
    several: bool


def run(call: Call, operands: tuple[Any, ...], memory: Memory) -> Any:
    """Run a call in its kernel; NotImplemented where no kernel covers it."""
    key = (
        call.formula,
        call.axis,
        call.compute,
        call.result,
        call.squeeze,
        *call.options.values(),
        *[one if one is None else float if type(one) is float else memory.kind(one) for one in operands],
    )
    try:
        plan = memory.plans[key]
    except KeyError:
        if len(memory.plans) >= _MOST_PLANS:
            memory.plans.clear()
        plan = memory.plans[key] = _plan(call, operands, memory)
    if plan is None:
        return NotImplemented
    words = plan.words.copy()
    alive = []  # what has an address in the problem, until it is solved
    for number, place, size in plan.inputs:
        one = operands[number]
        if type(one) is float:
            held = array("d", (one,))
            alive.append(held)
            words[place] = held.buffer_info()[0]
            continue
        address = memory.address(one)
        if address % size:
            alive.append(one := memory.aligned(one))
            address = memory.address(one)
        words[place] = address
    made = []
    for place, shape, dtype in plan.answers:
        y = memory.empty(shape, dtype)
        made.append(y)
        words[place] = memory.address(y)
    if not plan.is_empty:
        plan.run(plan.pack(*words))
    if plan.several:
        return tuple(made)
    return made[0] if plan.squeezed is None else made[0].squeeze(plan.squeezed)


def _plan(call: Call, operands: tuple[Any, ...], memory: Memory) -> _Plan | None:
    """Return the plan of a call; None where no kernel covers it."""
    kernel, library = KERNELS.get(call.formula), _library.load()
    axis, shape = call.axis, tuple(operands[0].shape)
    kept = (*shape[:axis], *shape[axis + 1 :])
    if kernel is None or library is None or len(kept) > _MOST_DIMENSIONS or memory.code(call.compute) < _LEAST_COMPUTE:
        return None
    given = list(enumerate(operands))
    if kernel.leaves_out is not None:
        del given[kernel.leaves_out]
    answers, options = kernel.answers(call, operands), kernel.options(call, operands)
    words: list[int | float] = [kernel.number, len(kept), shape[axis], len(given) + len(answers)]
    words += (memory.code(call.compute), *options, *(0,) * (_OPTIONS - len(options)), *kept)
    inputs, outputs = [], []
    for number, one in given:
        if one is None:
            words += (0,) * (3 + len(kept))
            continue
        place = len(words)
        if isinstance(one, float):
            inputs.append((number, place, 8))
            words += (0, _CODES["float64"], *(0,) * (1 + len(kept)))
            continue
        code, strides = memory.code(one.dtype), memory.strides(one)
        if code < 0 or any(stride % one.itemsize for stride in strides):
            return None
        inputs.append((number, place, one.itemsize))
        words += (0, code, *_steps(tuple(one.shape), strides, axis, shape))
    for answer in answers:
        length = shape[axis] if answer.length is None else answer.length
        whole = (*shape[:axis], length, *shape[axis + 1 :])
        if answer.length == 0:
            words += (0,) * (3 + len(kept))
            continue
        y = memory.empty(whole, answer.dtype)
        if memory.code(y.dtype) < 0:
            return None
        outputs.append((len(words), whole, answer.dtype))
        words += (0, memory.code(y.dtype), *_steps(whole, memory.strides(y), axis, shape))
    kinds = ["d" if isinstance(one, float) else "q" for one in words]
    several = call.formula is SAMPLE or len(outputs) > 1
    return _Plan(
        library.run,
        struct.Struct(f"={''.join(kinds)}").pack,
        words,
        tuple(inputs),
        tuple(outputs),
        0 in shape,
        axis if call.squeeze else None,
        several,
    )


def _steps(own: tuple[int, ...], strides: tuple[int, ...], axis: int, shape: tuple[int, ...]) -> list[int]:
    """Return the strides of an operand along the row, and over the batch: 0 where it is broadcast."""
    if not own:
        return [0] * len(shape)
    steps = [0 if m == 1 and n != 1 else stride for m, n, stride in zip(own, shape, strides, strict=True)]
    along = strides[axis] if own[axis] != 1 else 0
    return [along, *steps[:axis], *steps[axis + 1 :]]


def explain(x: Array, formula: RowFormula, memory: Memory) -> tuple[str, str]:
    """Return the engine for a formula along the last axis of ``x``, and why."""
    library = _library.load()
    if library is None:
        return "portable", f"the array API formula as it stands: {_library.reason()}"
    if formula not in KERNELS:
        return "portable", f"the array API formula as it stands: there is no native kernel for {formula.name}"
    if memory.code(x.dtype) < 0 or len(x.shape) > _MOST_DIMENSIONS + 1:
        return "portable", f"the array API formula as it stands: the native kernels do not know {x.dtype}"
    threads = library.num_threads
    return "native", f"a kernel for {library.level}, on up to {threads} thread{'s' * (threads > 1)}"
