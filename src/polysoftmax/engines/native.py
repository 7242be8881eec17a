"""The native kernels, for NumPy and for PyTorch on the CPU: which calls they cover, and how a call is packed.

A problem is a sequence of 8-byte words: the number of the kernel, its options, the batch shape, and for each operand
what its address means, its dtype and its strides in bytes. A stride of 0 broadcasts, so nothing of the logits' size is
ever copied for a kernel, and nothing need be aligned. A problem does not change from one call to the next of the same
kind, so it is packed once, in a plan; the addresses come beside it.
"""

from __future__ import annotations

import itertools
import struct
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from polysoftmax._arrays import keep
from polysoftmax._losses import CROSS_ENTROPY, ENTROPY, KL_DIVERGENCE
from polysoftmax._partial import PARTIAL
from polysoftmax._probability import LOG_PROB, RANKS, TOP_LOG_PROBS
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
_ABSENT, DATA, INDIRECT, _NUMBER = range(4)
"""What an address is: none, that of an array's data, that of the word which holds it, or a number itself."""
_FORMAT_OF_ADDRESS = ("8x", "q", "q", "d")

_LEAST_COMPUTE = _CODES["float32"]
_OPTIONS = 7
_REDUCTIONS = (None, "sum", "mean")
_MOST_DIMENSIONS = 16


class Answer(NamedTuple):
    """An array that a kernel fills."""

    length: int | None
    """Entries along the axis: None for those of the rows, 0 for one that is absent."""
    dtype: DType | str


_NOTHING = Answer(0, "float64")


def _none(call: Call, operands: tuple[Any, ...]) -> tuple[int | float, ...]:
    del call, operands
    return ()


class Kernel(NamedTuple):
    """What a kernel makes of a call."""

    number: int
    answers: Callable[[Call, tuple[Any, ...]], tuple[Answer, ...]]
    options: Callable[[Call, tuple[Any, ...]], tuple[int | float, ...]] = _none
    leaves_out: int | None = None
    """The operand that the kernel does without, counted from the end."""


def _rows(call: Call, operands: tuple[Any, ...]) -> tuple[Answer, ...]:
    del operands
    return (Answer(None, call.result),)


def _one_a_row(call: Call, operands: tuple[Any, ...]) -> tuple[Answer, ...]:
    del operands
    return (Answer(1, call.result),)


def _three_a_row(call: Call, operands: tuple[Any, ...]) -> tuple[Answer, ...]:
    return 3 * _one_a_row(call, operands)


def _draws_a_row(call: Call, operands: tuple[Any, ...]) -> int:
    return operands[1].shape[-1] // 2 * call.options["draws"]  # type: ignore[no-any-return]


def _draws(call: Call, operands: tuple[Any, ...]) -> tuple[Answer, ...]:
    return (Answer(_draws_a_row(call, operands), "int64"),)


def _one_a_token(call: Call, operands: tuple[Any, ...]) -> tuple[Answer, ...]:
    return (Answer(operands[1].shape[call.axis], call.result),)


def _ranks(call: Call, operands: tuple[Any, ...]) -> tuple[Answer, ...]:
    return (Answer(operands[1].shape[call.axis], "int64"),)


def _leading(call: Call, operands: tuple[Any, ...]) -> tuple[Answer, ...]:
    del operands
    return (Answer(call.options["count"], "int64"),)


def _of_loss(call: Call, operands: tuple[Any, ...]) -> tuple[int | float, ...]:
    del operands
    ignored = call.options["ignore_index"]
    return int(ignored is not None), ignored or 0, call.options["label_smoothing"], call.options["z_loss"]


def _of_filters(call: Call, operands: tuple[Any, ...]) -> tuple[int | float, ...]:
    del operands
    return (call.options["top_k"] or 0,)


def _of_draws(call: Call, operands: tuple[Any, ...]) -> tuple[int | float, ...]:
    options = call.options
    is_distinct = not options["replace"]
    return options["top_k"] or 0, _draws_a_row(call, operands), options["is_one_key"], options["draws"], is_distinct


def _of_tokens(call: Call, operands: tuple[Any, ...]) -> tuple[int | float, ...]:
    return call.options.get("top_k") or 0, operands[1].shape[call.axis]


def _of_leading(call: Call, operands: tuple[Any, ...]) -> tuple[int | float, ...]:
    del operands
    return 0, call.options["count"]


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
    LOG_PROB: Kernel(17, _one_a_token, _of_tokens),
    RANKS: Kernel(19, _ranks, _of_tokens),
    TOP_LOG_PROBS: Kernel(20, _leading, _of_leading),
    PARTIAL: Kernel(21, _three_a_row),
}
"""The kernel of each formula that has one."""


def _register_pullbacks() -> None:
    """Register the reverse rules for every choice of operands that a gradient is wanted for."""
    # With the entries a row of each operand's gradient: None for those of the rows, 0 where there is none.
    rules: tuple[tuple[RowFormula, int, tuple[int | None, ...], int | None], ...] = (
        (SOFTMAX, 3, (None, 1, 0), None),
        (LOG_SOFTMAX, 4, (None, 1, 0), None),
        (LOGSUMEXP, 7, (None, None, 0), -2),
        (ENTROPY, 11, (None, 1, 0), -2),
        (KL_DIVERGENCE, 13, (None, None, 1, 0), -2),
        (LOG_PROB, 18, (None, 0, 1, 0, 0, 0, 0), -2),
    )
    for formula, number, lengths, leaves_out in rules:
        for wanted in itertools.product(*((True, False) if one != 0 else (False,) for one in lengths)):

            def answers(
                call: Call,
                operands: tuple[Any, ...],
                lengths: tuple[int | None, ...] = lengths,
                wanted: tuple[bool, ...] = wanted,
            ) -> tuple[Answer, ...]:
                del operands
                pairs = [pair for pair in zip(lengths, wanted, strict=True) if pair[0] != 0]
                return tuple(Answer(length, call.result) if asked else _NOTHING for length, asked in pairs)

            if any(wanted):
                options = _of_tokens if formula is LOG_PROB else _none
                KERNELS[formula.pullback(wanted)] = Kernel(number, answers, options, leaves_out)


_register_pullbacks()


class Memory(Protocol):
    """How the arrays of a library are described and made."""

    address_is: int

    def kind(self, x: Array) -> Any:
        """Return all that a plan has to know of an array; NotImplemented where a kernel cannot be given its memory."""

    def strides(self, x: Array) -> tuple[int, ...]:
        """Return the strides in bytes."""

    def address(self, x: Array) -> int:
        """Return what leads to the first entry as long as ``x`` lives."""

    def maker(self, shape: tuple[int, ...], dtype: DType | str) -> Callable[[], Array]:
        """Return a function that makes new arrays."""


def _code(dtype: DType) -> int:
    """Return a dtype's number; -1 if the kernels do not know it."""
    # It may be the class that stands for it, such as numpy.float32.
    return _CODES.get(str(dtype).rpartition(".")[2].removesuffix("'>"), -1)


PLANS: dict[tuple[Any, ...], _Plan | None] = {}

_MOST_PLANS = 4096


class _Plan(NamedTuple):
    """A call with everything fixed but addresses."""

    solve: Callable[[bytes, bytes], int]
    problem: bytes
    pack: Callable[..., bytes]
    """Takes the addresses of what there is, and leaves room for what is absent."""
    inputs: tuple[int, ...]
    """The operands that there are and that the kernel takes, by number."""
    makers: tuple[Callable[[], Array], ...]
    """What makes the arrays to fill."""
    is_empty: bool
    several: bool


def run(call: Call, operands: tuple[Any, ...], memory: Memory) -> Any:
    """Run a call in its kernel; NotImplemented where no kernel covers it."""
    # Loops that append: in a comprehension each of these calls would take another half a microsecond.
    kind, address = memory.kind, memory.address
    key = [call.formula, call.axis, call.compute, call.result, call.squeeze, call.reduction]
    if call.options:
        key += call.options.values()
    for one in operands:
        key.append(one if one is None else float if type(one) is float else kind(one))
    kinds = tuple(key)
    try:
        plan = PLANS[kinds]
    except KeyError:
        plan = _plan(call, operands, memory)
        keep(PLANS, kinds, plan, _MOST_PLANS)
    if plan is None:
        return NotImplemented
    solve, problem, pack, inputs, makers, is_empty, several = plan
    addresses: list[int | float] = []
    for number in inputs:
        one = operands[number]
        addresses.append(one if type(one) is float else address(one))
    made = []
    for make in makers:
        y = make()
        made.append(y)
        addresses.append(address(y))
    if not is_empty:
        status = solve(problem, pack(*addresses))
        if status:
            raise _library.failure(status, problem)
    return tuple(made) if several else made[0]


def _plan(call: Call, operands: tuple[Any, ...], memory: Memory) -> _Plan | None:
    """Return the plan of a call; None where no kernel covers it."""
    kernel, library = KERNELS.get(call.formula), _library.load()
    axis, shape = call.axis, tuple(operands[0].shape)
    kept = (*shape[:axis], *shape[axis + 1 :])
    if kernel is None or library is None or len(kept) > _MOST_DIMENSIONS or _code(call.compute) < _LEAST_COMPUTE:
        return None
    numbers = list(range(len(operands)))
    if kernel.leaves_out is not None:
        del numbers[kernel.leaves_out]
    nowhere = (0,) * (2 + len(kept))
    described = []
    for number in numbers:
        one = operands[number]
        if one is None:
            described.append((_ABSENT, *nowhere))
        elif isinstance(one, float):
            described.append((_NUMBER, _CODES["float64"], *nowhere[1:]))
        elif memory.kind(one) is NotImplemented:
            return None
        else:
            steps = _steps(tuple(one.shape), memory.strides(one), axis, shape)
            described.append((memory.address_is, _code(one.dtype), *steps))
    makers = []
    for answer in kernel.answers(call, operands):
        if answer.length == 0:
            described.append((_ABSENT, *nowhere))
            continue
        length = shape[axis] if answer.length is None else answer.length
        whole = (*shape[:axis], length, *shape[axis + 1 :])
        if call.squeeze or call.reduction:
            whole = kept if call.squeeze else ()
        makers.append(memory.maker(whole, answer.dtype))
        y = makers[-1]()
        strides = memory.strides(y)
        steps = [0, *strides] if call.squeeze else _steps(whole, strides, axis, shape)
        described.append((memory.address_is, _code(y.dtype), *steps))
    if any(code < 0 for _, code, *_ in described):
        return None
    options = kernel.options(call, operands)
    words = [kernel.number, len(kept), shape[axis], len(described), _code(call.compute)]
    words += (
        *options,
        *(0,) * (_OPTIONS - len(options)),
        _REDUCTIONS.index(call.reduction),
        *kept,
        *itertools.chain(*described),
    )
    return _Plan(
        library.solve,
        struct.pack("".join("d" if isinstance(one, float) else "q" for one in words), *words),
        struct.Struct("".join(_FORMAT_OF_ADDRESS[means] for means, *_ in described)).pack,
        tuple(number for number in numbers if operands[number] is not None),
        tuple(makers),
        0 in shape and call.reduction is None,
        len(makers) > 1,
    )


def _steps(own: tuple[int, ...], strides: tuple[int, ...], axis: int, shape: tuple[int, ...]) -> list[int]:
    """Return the strides of an operand along the row, and over the batch: 0 where it is broadcast."""
    if not own:
        return [0] * len(shape)
    missing = len(shape) - len(own)
    own, strides = (1,) * missing + own, (0,) * missing + strides
    steps = [0 if m == 1 and n != 1 else stride for m, n, stride in zip(own, shape, strides, strict=True)]
    along = strides[axis] if own[axis] != 1 else 0
    return [along, *steps[:axis], *steps[axis + 1 :]]


def explain(x: Array, formula: RowFormula) -> tuple[str, str]:
    """Return the engine for a formula along the last axis of ``x``, and why."""
    library = _library.load()
    if library is None:
        return "portable", f"the array API formula as it stands: {_library.reason()}"
    if formula not in KERNELS:
        return "portable", f"the array API formula as it stands: there is no native kernel for {formula.name}"
    if _code(x.dtype) < 0 or len(x.shape) > _MOST_DIMENSIONS + 1:
        return "portable", f"the array API formula as it stands: the native kernels do not know {x.dtype}"
    threads = library.num_threads
    return "native", f"a kernel for {library.level}, on up to {threads} thread{'s' * (threads > 1)}"
