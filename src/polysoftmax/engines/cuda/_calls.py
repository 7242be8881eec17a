"""Calls of row formulas as launches: which of them the kernels cover, and the numbers that a kernel gets."""

from __future__ import annotations

import math
from copy import copy
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from polysoftmax._arrays import cast, float_bits, namespace
from polysoftmax._formula import Call, RowFormula, words
from polysoftmax._losses import CROSS_ENTROPY
from polysoftmax._rows import rows
from polysoftmax._sampling import DRAW, DRAW_LEADING, LEADING, MASSES, SAMPLE, block_length
from polysoftmax._softmax import LOG_SOFTMAX, LOGSUMEXP, SOFTMAX
from polysoftmax._truncation import TRUNCATE
from polysoftmax.engines.cuda import _devices
from polysoftmax.engines.cuda._devices import Uncovered
from polysoftmax.engines.cuda._plan import (
    MOST_LEADING,
    REDUCTIONS,
    SIZES,
    Plan,
    plan_draw,
    plan_draw_leading,
    plan_filter,
    plan_masses,
    plan_rows,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polysoftmax._arrays import Array
    from polysoftmax.engines.cuda._devices import Device

Map = tuple[int, int, int]
"""Where the entry for a row stands: at ``row // inner % period * stride``."""

_ONE: Map = (1, 1, 0)
_LINE = 128
"""Bytes of a line of the cache; no two arrays share one."""
_ABSENT: Any = (0, None)
_NUMBER: Any = float
"""What is seen of an operand that is None, with its value, and of one that is a number."""
_MOST_ROWS = (1 << 31) - 1
_LONGEST = (1 << 31) - (1 << 20)
"""Entries of a row: kernels count in 32 bits, and also where accesses past the end of a row would be."""


class _Roles(NamedTuple):
    """Which operand of a formula is what to its kernel; the kernel's name may be another."""

    kernel: str
    x: int = 0
    y_or_cotangent: int | None = None
    temperature: int | None = None
    where: int | None = None
    targets: int | None = None
    weight: int | None = None
    cotangent: int | None = None


_LOGITS = (True, False, False)

_ROLES = {
    SOFTMAX: _Roles("softmax", temperature=1, where=2),
    LOG_SOFTMAX: _Roles("log_softmax", temperature=1, where=2),
    LOGSUMEXP: _Roles("logsumexp", where=2),
    SOFTMAX.pullback(_LOGITS): _Roles("softmax_pullback", x=3, y_or_cotangent=4, temperature=1, where=2),
    LOG_SOFTMAX.pullback(_LOGITS): _Roles("log_softmax_pullback", x=3, y_or_cotangent=4, temperature=1, where=2),
    CROSS_ENTROPY: _Roles("cross_entropy", targets=1, weight=2),
    CROSS_ENTROPY.pullback(_LOGITS): _Roles("cross_entropy_slope", targets=1, weight=2, cotangent=4),
}


class Given(NamedTuple):
    """An argument that differs from call to call: an operand's address or number, or the number of an option."""

    place: int


Argument: TypeAlias = "int | float | Given"


class View(NamedTuple):
    """An operand as a plan sees it: all but its address. Strides count entries."""

    pointer: Given
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    """The address modulo 16."""


class Launch:
    """What calls that look alike share: a kernel, the arguments that do not differ, and the shapes of the answers."""

    __slots__ = ("_answers", "_arguments", "_given", "_is_tuple", "_pieces", "device", "plan")

    def __init__(
        self,
        device: Device,
        plan: Plan,
        before: tuple[Argument, ...],
        answers: tuple[tuple[tuple[int, ...], Any] | None, ...],
        after: tuple[Argument, ...],
    ) -> None:
        arguments = [*before, *[0] * len(answers), *after]
        self.device, self.plan = device, plan
        self._arguments = [0 if isinstance(one, Given) else one for one in arguments]
        self._given = tuple((i, one.place) for i, one in enumerate(arguments) if isinstance(one, Given))
        self._answers = tuple((i, *one) for i, one in enumerate(answers, len(before)) if one is not None)
        self._pieces: tuple[tuple[int, int], ...] = ()
        self._is_tuple = plan.kernel.formula.startswith("sample")

    def run(self, values: list[int | float]) -> Any:
        """Make the answers, launch, and return them."""
        return self.answer(self.make(values))

    def answer(self, made: list[Array]) -> Any:
        """Return the answers as the formula does."""
        return tuple(made) if self._is_tuple else made[0]

    def make(self, values: list[int | float], scratch: int = 0) -> list[Array]:
        """Launch, and return the answers; where they are, in scratch memory or not, is appended to the values."""
        device, arguments, made = self.device, self._arguments.copy(), []
        for i, place in self._given:
            arguments[i] = values[place]
        for i, offset in self._pieces:
            arguments[i] = scratch + offset
            values.append(scratch + offset)
        for i, shape, dtype in self._answers:
            y = device.empty(shape, dtype)
            pointer = arguments[i] = device.pointer(y)
            made.append(y)
            values.append(pointer)
        device.launch(self.plan, arguments)
        return made

    def taking(self, places: Sequence[int]) -> Launch:
        """Return this launch for values of which the i-th stands at ``places[i]``."""
        found = copy(self)
        found._given = tuple((i, places[place]) for i, place in self._given)
        return found

    def squeezed(self) -> Launch:
        """Return this launch with answers that lack the last axis, of length 1."""
        found = copy(self)
        found._answers = tuple((i, shape[:-1], dtype) for i, shape, dtype in self._answers)
        return found

    def into_scratch(self, start: int) -> tuple[Launch, int]:
        """Return this launch with its answers in scratch memory from ``start`` on, and where they end."""
        found, pieces = copy(self), []
        for i, shape, dtype in self._answers:
            pieces.append((i, start))
            size = math.prod(shape) * (4 if dtype == "int32" else SIZES[_devices.dtype_name(dtype)])
            start += -(-size // _LINE) * _LINE
        found._answers, found._pieces = (), tuple(pieces)
        return found, start


Prepared: TypeAlias = tuple[Launch, list[int | float], tuple["Array", ...]]
"""A launch, the values to run it with, and the arrays that these point into, to be kept until then."""


class _Widen(NamedTuple):
    """Operands to bring to the compute dtype before there can be a launch."""

    places: tuple[int, ...]


_MOST_FOUND = 4096

_found: dict[tuple[Any, ...], Any] = {}
"""What was found for a call, by all of it that a launch depends on; no array is kept, and no number of a parameter."""

recall = _found.get
"""Return what was found for a call, None the first time."""


def evaluate(call: Call, operands: tuple[Array, ...]) -> Any:
    """Run a call as it stands, in the words of its operands' library."""
    return call.evaluate(words(operands[0], call.axis), operands)


def prepare(call: Call, operands: tuple[Array, ...]) -> Prepared | str:
    """Return the launch that answers a call and what to run it with, or why there is none."""
    if call.formula not in KERNELS:
        return f"there is no CUDA kernel for {call.formula.name}"
    device = _devices.device_of(operands[0])
    if isinstance(device, str):
        return device
    try:
        key, values = look(call, operands, device)
    except Uncovered as reason:
        return str(reason)
    found = recall(key)
    if found is None:
        found = _find(call, operands, device, key[0])
        remember(key, found)
    if isinstance(found, _Widen):
        return prepare(call, tuple([cast(x, call.compute) if i in found.places else x for i, x in enumerate(operands)]))
    return found if isinstance(found, str) else (found, values, operands)


def look(call: Call, operands: tuple[Array, ...], device: Device) -> tuple[tuple[Any, ...], list[int | float]]:
    """Return all of a call that its launch depends on, and the values that it is run with."""
    view, options = device.view, call.options
    seen: list[Any] = []
    values: list[Any] = []
    for one in operands:
        if one is None:
            value, kind = _ABSENT
        elif type(one) is float:
            value, kind = one, _NUMBER
        else:
            value, kind = view(one)
        values.append(value)
        seen.append(kind)
    chosen = tuple(options.values())
    values += chosen
    if float in map(type, chosen):
        chosen = tuple([bool(one) if type(one) is float else one for one in chosen])
    return (tuple(seen), device, call.formula, call[2:], chosen, *options), values


def remember(key: tuple[Any, ...], found: object) -> None:
    """Keep what was found for a call."""
    if len(_found) >= _MOST_FOUND:
        _found.clear()
    _found[key] = found


def _find(call: Call, operands: tuple[Array, ...], device: Device, seen: tuple[Any, ...]) -> Launch | _Widen | str:
    """Return the launch for all calls that look like this one, from what is seen of its operands."""
    places = _to_widen(call, operands)
    if places:
        return _Widen(places)
    find = _rows_launch if call.formula in _ROLES else _SAMPLING[call.formula]
    given = tuple(
        View(Given(i), _devices.dtype_name(one[0]), *one[1:]) if isinstance(one, tuple) else one and Given(i)
        for i, one in enumerate(seen)
    )
    try:
        return find(call, given, device)
    except Uncovered as reason:
        return str(reason)


def _to_widen(call: Call, operands: tuple[Array, ...]) -> tuple[int, ...]:
    """Return the places of the parameters, weights and cotangents, one a row, that are not in the compute dtype."""
    roles = _ROLES.get(call.formula)
    if roles is None:
        places: set[int | None] = {*range(1, len(operands))} - ({1} if call.formula is DRAW else set())  # 1: its logits
    else:
        places = {roles.temperature, roles.weight, roles.cotangent}

    def is_narrow(one: Array) -> bool:
        if one is None or isinstance(one, float) or one.dtype == call.compute:
            return False
        return float_bits(namespace(one), one.dtype) > 0

    return tuple(i for i, one in enumerate(operands) if i in places and is_narrow(one))


def launch_for_last_axis(x: Array, formula: RowFormula) -> Launch | str:
    """Return the launch of a formula along the last axis of ``x`` with nothing beside it, or why there is none."""
    formula = MASSES if formula is SAMPLE else formula
    roles, dtype = _ROLES.get(formula, _Roles(formula.name)), _devices.dtype_name(x.dtype)
    if dtype not in SIZES:
        return f"the kernels take floats of 16, 32 and 64 bits, not {dtype}"
    r = rows(x, -1)
    options = {"ignore_index": None, "label_smoothing": 0.0, "z_loss": 0.0, "top_k": 1}
    operands = tuple(r.x if i in (0, roles.x, roles.y_or_cotangent) else None for i in range(7))
    result = r.compute if formula is CROSS_ENTROPY else r.result
    found = prepare(Call(formula, options, r.axis, r.compute, result), operands)
    return found if isinstance(found, str) else found[0]


class _Batch:
    """The rows of a call: their number and length, and where each operand keeps what belongs to a row."""

    def __init__(self, call: Call, x: View, device: Device) -> None:
        self.device = device
        self.x = x
        self.compute = _devices.dtype_name(call.compute)
        shape = self.x.shape
        if call.axis != len(shape) - 1:
            raise Uncovered("the kernels reduce the last axis")
        if self.x.dtype not in SIZES:
            raise Uncovered(f"the kernels take floats of 16, 32 and 64 bits, not {self.x.dtype}")
        if self.compute != ("float64" if self.x.dtype == "float64" else "float32"):
            raise Uncovered(f"the kernels do not compute {self.x.dtype} in {self.compute}")
        self.batch, self.n = shape[:-1], shape[-1]
        self.rows = math.prod(self.batch)
        if self.rows * self.n == 0 or self.rows > _MOST_ROWS or self.n > _LONGEST:
            raise Uncovered(f"there are {self.rows} rows of {self.n}")

    def row_stride(self, view: View) -> int:
        """Return the distance between rows whose entries lie side by side."""
        if self.n > 1 and view.strides[-1] != 1:
            raise Uncovered("the entries of a row do not lie side by side")
        found = row_map(view.shape[:-1], view.strides[:-1], self.batch)
        if found is None or (found != _ONE and found[:2] != (1, self.rows)):
            raise Uncovered("the rows do not lie at one distance")
        return found[2]

    def map(self, view: View) -> Map:
        """Return where the rows of an operand stand that may be repeated or broadcast."""
        found = row_map(view.shape[:-1], view.strides[:-1], self.batch)
        if found is None:
            raise Uncovered("an operand's strides have no pattern that the kernels know")
        return found

    def per_row(self, view: View | None, dtype: str, name: str) -> tuple[Argument, *Map]:
        """Return the arguments for an operand with one entry a row, which may be None or 0-d."""
        if view is None:
            return (0, *_ONE)
        if view.dtype != dtype:
            raise Uncovered(f"{name} has dtype {view.dtype} and not {dtype}")
        return (view.pointer, *(self.map(view) if view.shape else _ONE))

    def parameter(self, value: View | Given | float | None, absent: float = 1.0) -> tuple[Argument, ...]:
        """Return the arguments for a parameter that is an array, a number, or ``absent``."""
        if not isinstance(value, View):
            return (0, absent if value is None else value, *_ONE)
        pointer, *where = self.per_row(value, self.compute, "a parameter")
        return (pointer, absent, *where)

    def mask(self, where: View | None) -> tuple[Argument, ...]:
        """Return the arguments for the mask."""
        if where is None:
            return (0, *_ONE, 0)
        pointer, *rows = self.per_row(where, "bool", "the mask")
        along = where.strides[-1] if where.shape and where.shape[-1] > 1 else 0
        return (pointer, *rows, along)

    def keys(self, keys: View, is_one_key: bool) -> tuple[Argument, ...]:
        """Return the arguments for a key a row, or for one from which the kernel makes those of the rows."""
        return (*self.per_row(keys, "int32", "the key"), keys.strides[-1], int(is_one_key))


def _rows_launch(call: Call, operands: tuple[Any, ...], device: Device) -> Launch:
    roles = _ROLES[call.formula]
    if roles.kernel.endswith("pullback") and operands[roles.x] is None:
        roles = roles._replace(kernel=roles.kernel.replace("pullback", "vjp"), x=0)
    if roles.kernel == "logsumexp" and operands[1] is not None:
        raise Uncovered("the kernel of logsumexp takes no weights")
    if call.options.get("label_smoothing"):
        raise Uncovered("the kernel of cross_entropy takes no smoothing")
    batch = _Batch(call, operands[roles.x], device)
    x = batch.x
    stride = batch.row_stride(x)
    second: Argument = 0
    second_stride = 0
    aligned = roles.kernel in REDUCTIONS or _shares_alignment(batch, x, stride)
    if roles.y_or_cotangent is not None:
        view = operands[roles.y_or_cotangent]
        if view.dtype != x.dtype:
            raise Uncovered(f"the rows are {x.dtype} and the cotangent is {view.dtype}")
        second, second_stride = view.pointer, batch.row_stride(view)
        aligned = aligned and _shares_alignment(batch, view, second_stride)
    temperature = None if roles.temperature is None else operands[roles.temperature]
    where = None if roles.where is None else operands[roles.where]
    result = _devices.dtype_name(call.result)
    if result not in (x.dtype, batch.compute):
        raise Uncovered(f"the kernels do not answer {x.dtype} in {result}")
    plan = plan_rows(
        roles.kernel,
        x.dtype,
        result,
        batch.rows,
        batch.n,
        aligned=aligned,
        general=temperature is not None or where is not None,
        machine=device.machine,
    )
    after = (
        *(batch.n, batch.rows, stride, second_stride),
        *batch.parameter(temperature),
        *batch.mask(where),
        *_loss_arguments(batch, call, operands, roles),
    )
    length = () if call.squeeze else (1 if roles.kernel in REDUCTIONS else batch.n,)
    shape = (*batch.batch, *length)
    return Launch(device, plan, (x.pointer, second), ((shape, call.result),), after)


def _shares_alignment(batch: _Batch, view: View, stride: int) -> bool:
    """Whether the rows of an operand share the alignment of the answer's, which starts at 16 bytes and has no gaps."""
    width = 16 // SIZES[view.dtype]
    return view.offset == 0 and (batch.rows == 1 or (stride - batch.n) % width == 0)


def _loss_arguments(batch: _Batch, call: Call, operands: tuple[Any, ...], roles: _Roles) -> tuple[Argument, ...]:
    if roles.targets is None:
        return (0, *_ONE, 0, 0, *_ONE, 0, 0, 0, 0.0)
    pointer: Argument = 0
    along = 0
    weight = None if roles.weight is None else operands[roles.weight]
    if weight is not None:
        pointer, *rows = batch.per_row(weight, batch.compute, "weight")
        if rows[2] != 0:
            raise Uncovered("the class weights differ from row to row")
        along = weight.strides[-1]
    cotangent = None if roles.cotangent is None else operands[roles.cotangent]
    ignore_index = call.options["ignore_index"]
    return (
        *batch.per_row(operands[roles.targets], "int64", "targets"),
        pointer,
        *batch.per_row(cotangent, batch.compute, "the cotangent"),
        along,
        int(ignore_index is not None),
        ignore_index or 0,
        Given(len(operands) + list(call.options).index("z_loss")),
    )


def _masses_launch(call: Call, operands: tuple[Any, ...], device: Device) -> Launch:
    x, temperature, where, *_ = operands
    batch = _Batch(call, x, device)
    stride = batch.row_stride(batch.x)
    plan = plan_masses(
        batch.x.dtype,
        batch.rows,
        batch.n,
        general=temperature is not None or where is not None,
        machine=device.machine,
    )
    if isinstance(plan, str):
        raise Uncovered(plan)
    after = (batch.n, batch.rows, stride, *batch.parameter(temperature), *batch.mask(where))
    blocks = -(-batch.n // block_length(batch.n))
    answers = tuple(((*batch.batch, length), call.compute) for length in (1, blocks))
    return Launch(device, plan, (batch.x.pointer,), answers, after)


def _draw_launch(call: Call, operands: tuple[Any, ...], device: Device) -> Launch:
    mass, x, top, keys, temperature, where = operands
    batch = _Batch(call, mass, device)
    if x.dtype not in SIZES or batch.x.dtype != batch.compute:
        raise Uncovered(f"the kernels do not draw from {x.dtype} with masses in {batch.x.dtype}")
    n = x.shape[-1]
    for one in (batch.x, x):
        if one.shape[-1] > 1 and one.strides[-1] != 1:
            raise Uncovered("the entries of a row do not lie side by side")
    after = (
        *(batch.x.pointer, *batch.map(batch.x), x.pointer, *batch.map(x)),
        *(n, batch.rows, call.options["size"]),
        *batch.per_row(top, batch.compute, "the maximum"),
        *batch.keys(keys, call.options["is_one_key"]),
        *batch.parameter(temperature),
        *batch.mask(where),
    )
    general = temperature is not None or where is not None
    plan = plan_draw(x.dtype, batch.rows, n, general=general, machine=device.machine)
    return Launch(device, plan, (), _drawn(batch, call), after)


def _truncate_launch(call: Call, operands: tuple[Any, ...], device: Device) -> Launch:
    x, temperature, where, k, p, min_p, *_ = operands
    batch = _Batch(call, x, device)
    if _devices.dtype_name(call.result) != batch.x.dtype:
        raise Uncovered(f"the kernels do not answer {batch.x.dtype} in {_devices.dtype_name(call.result)}")
    top_k = call.options["top_k"]
    parameters = (temperature, 1.0), (k if top_k is None else float(top_k), 0.0), (p, 1.0), (min_p, 0.0)
    answers = (None, ((*batch.batch, batch.n), call.result), None)
    return _filter(batch, call, where, parameters, answers)


def _leading_launch(call: Call, operands: tuple[Any, ...], device: Device) -> Launch:
    x, where, *_ = operands
    batch = _Batch(call, x, device)
    top_k = call.options["top_k"]
    if top_k > MOST_LEADING:
        raise Uncovered(f"the kernels find up to {MOST_LEADING} leading tokens, not {top_k}")
    parameters = (None, 1.0), (float(top_k), 0.0), (None, 1.0), (None, 0.0)
    kept = (*batch.batch, top_k)
    answers = (((*batch.batch, 1), call.compute), (kept, call.compute), (kept, "int32"))
    return _filter(batch, call, where, parameters, answers)


def _filter(
    batch: _Batch,
    call: Call,
    where: View | None,
    parameters: tuple[tuple[View | Given | float | None, float], ...],
    answers: tuple[tuple[tuple[int, ...], Any] | None, ...],
) -> Launch:
    stride = batch.row_stride(batch.x)
    plan = plan_filter(
        call.formula.name,
        batch.x.dtype,
        batch.rows,
        batch.n,
        aligned=call.formula is LEADING or _shares_alignment(batch, batch.x, stride),
    )
    numbers = [number for one in parameters for number in batch.parameter(*one)]
    after = (batch.n, batch.rows, stride, *numbers)
    return Launch(batch.device, plan, (batch.x.pointer, *batch.mask(where)), answers, after)


def _draw_leading_launch(call: Call, operands: tuple[Any, ...], device: Device) -> Launch:
    x, index, top, keys, temperature, p, min_p = operands
    batch = _Batch(call, x, device)
    for one in (batch.x, index):
        if one.shape[-1] > 1 and one.strides[-1] != 1:
            raise Uncovered("the entries of a row do not lie side by side")
    if batch.x.dtype != batch.compute or batch.n > MOST_LEADING:
        raise Uncovered(f"the kernels do not draw from {batch.n} leading tokens in {batch.x.dtype}")
    after = (
        *(batch.x.pointer, *batch.map(batch.x), *batch.per_row(index, "int32", "the index")),
        *(batch.n, batch.rows, call.options["size"]),
        *batch.per_row(top, batch.compute, "the maximum"),
        *batch.keys(keys, call.options["is_one_key"]),
        *(*batch.parameter(temperature), *batch.parameter(p), *batch.parameter(min_p, 0.0)),
    )
    plan = plan_draw_leading(batch.compute, batch.rows, batch.n)
    return Launch(device, plan, (), _drawn(batch, call), after)


def _drawn(batch: _Batch, call: Call) -> tuple[tuple[tuple[int, ...], Any] | None, ...]:
    """Return what the answers of a draw are: tokens, and their log-probabilities if asked for."""
    shape = (*batch.batch, 1)
    return (shape, "int64"), (shape, call.compute) if call.options["logprobs"] else None


_SAMPLING = {
    TRUNCATE: _truncate_launch,
    MASSES: _masses_launch,
    DRAW: _draw_launch,
    LEADING: _leading_launch,
    DRAW_LEADING: _draw_leading_launch,
}


KERNELS = frozenset({*_ROLES, *_SAMPLING})
"""The formulas that have a kernel."""


def row_map(shape: tuple[int, ...], strides: tuple[int, ...], batch: tuple[int, ...]) -> Map | None:
    """Return where an operand's row stands for each row of the batch, in C order; None if there is no such rule."""
    missing = len(batch) - len(shape)
    merged: list[tuple[int, int]] = []
    for size, own, stride in zip(batch, (1,) * missing + shape, (0,) * missing + strides, strict=True):
        step = 0 if own == 1 else stride
        if size == 1:
            continue
        if merged and merged[-1][1] == size * step:
            merged[-1] = (merged[-1][0] * size, step)
        else:
            merged.append((size, step))
    inner = merged.pop()[0] if merged and merged[-1][1] == 0 else 1
    if merged and merged[0][1] == 0:
        merged.pop(0)  # repeated from the start, which the period says
    if not merged:
        return _ONE
    return (inner, *merged[0]) if len(merged) == 1 else None
