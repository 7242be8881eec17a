"""Calls of row formulas as launches: which of them the kernels cover, and what was found for calls that look alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from polysoftmax._arrays import cast, float_bits, keep, namespace
from polysoftmax._formula import Call, RowFormula, words
from polysoftmax._losses import CROSS_ENTROPY
from polysoftmax._probability import LOG_PROB, TOP_LOG_PROBS
from polysoftmax._rows import rows
from polysoftmax._sampling import DRAW, LEADING, MASSES, SAMPLE
from polysoftmax.engines.cuda import _devices
from polysoftmax.engines.cuda._devices import Scattered, Uncovered
from polysoftmax.engines.cuda._families import ROLES, SAMPLING, Roles, rows_launch
from polysoftmax.engines.cuda._kind import Launch
from polysoftmax.engines.cuda._operands import Given, View
from polysoftmax.engines.cuda._plan import SIZES

if TYPE_CHECKING:
    from polysoftmax._arrays import Array
    from polysoftmax.engines.cuda._devices import Device

_ABSENT: Any = (0, None)
_NUMBER: Any = float
"""What is seen of an operand that is None, with its value, and of one that is a number."""

KERNELS = frozenset({*ROLES, *SAMPLING})
"""The formulas that have a kernel."""

COMPOSED = {SAMPLE: MASSES, LOG_PROB: CROSS_ENTROPY, TOP_LOG_PROBS: LEADING}
"""Formulas that several kernels answer, and the one whose kernel comes first."""

Prepared: TypeAlias = tuple[Launch, list[int | float], tuple["Array", ...]]
"""A launch, the values to run it with, and the arrays that these point into, to be kept until then."""


class _Widen(NamedTuple):
    """Operands to bring to the compute dtype before there can be a launch."""

    places: tuple[int, ...]


class _Copy(NamedTuple):
    """The operand to copy, so that its rows lie side by side, before there can be a launch."""

    place: int


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
    device = _devices.device_of(operands[0])
    if isinstance(device, str):
        return device
    found, values = _plan(call, operands, device)
    if isinstance(found, _Copy):
        copied = device.copied(operands[found.place])
        return prepare(call, (*operands[: found.place], copied, *operands[found.place + 1 :]))
    if isinstance(found, _Widen):
        return prepare(call, tuple([cast(x, call.compute) if i in found.places else x for i, x in enumerate(operands)]))
    return found if isinstance(found, str) else (found, values, operands)


def _plan(
    call: Call, operands: tuple[Array, ...], device: Device
) -> tuple[Launch | _Widen | _Copy | str, list[int | float]]:
    """Return the launch of a call, what has to be done before there is one, or why there is none; and its values."""
    if call.formula not in KERNELS:
        return f"there is no CUDA kernel for {call.formula.name}", []
    try:
        key, values = look(call, operands, device)
    except Uncovered as reason:
        return str(reason), []
    found = recall(key)
    if found is None:
        found = _find(call, operands, device, key[0])
        remember(key, found)
    return found, values


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
    if not options:
        return (tuple(seen), device, call.formula, call[2:]), values
    chosen = tuple(options.values())
    values += chosen
    if float in map(type, chosen):
        chosen = tuple([bool(one) if type(one) is float else one for one in chosen])
    return (tuple(seen), device, call.formula, call[2:], chosen, *options), values


def remember(key: tuple[Any, ...], found: object) -> None:
    """Keep what was found for a call."""
    keep(_found, key, found, _MOST_FOUND)


def _find(
    call: Call, operands: tuple[Array, ...], device: Device, seen: tuple[Any, ...]
) -> Launch | _Widen | _Copy | str:
    """Return the launch for all calls that look like this one, from what is seen of its operands."""
    places = _to_widen(call, operands)
    if places:
        return _Widen(places)
    find = rows_launch if call.formula in ROLES else SAMPLING[call.formula]
    given = tuple(
        View(Given(i), _devices.dtype_name(one[0]), *one[1:]) if isinstance(one, tuple) else one and Given(i)
        for i, one in enumerate(seen)
    )
    try:
        return find(call, given, device)
    except Scattered as scattered:
        return _Copy(scattered.place)
    except Uncovered as reason:
        return str(reason)


def _to_widen(call: Call, operands: tuple[Array, ...]) -> tuple[int, ...]:
    """Return the places of the parameters, weights and cotangents, one a row, that are not in the compute dtype."""
    roles = ROLES.get(call.formula)
    if roles is None:
        places: set[int | None] = {*range(1, len(operands))} - ({1} if call.formula is DRAW else set())  # 1: its logits
    else:
        places = {roles.temperature, roles.weight, roles.cotangent}

    def is_narrow(one: Array) -> bool:
        if one is None or isinstance(one, float) or one.dtype == call.compute:
            return False
        return float_bits(namespace(one), one.dtype) > 0

    return tuple(i for i, one in enumerate(operands) if i in places and is_narrow(one))


def layout_for_last_axis(x: Array, formula: RowFormula, device: Device) -> tuple[bool, str]:
    """Return whether a kernel runs a formula along the last axis of ``x`` alone, and its layout, or why none does."""
    formula = COMPOSED.get(formula, formula)
    roles, dtype = ROLES.get(formula, Roles(formula.name)), _devices.dtype_name(x.dtype)
    if dtype not in SIZES:
        return False, f"the kernels take floats of 16, 32 and 64 bits, not {dtype}"
    r = rows(x, -1)
    options = {"ignore_index": None, "label_smoothing": 0.0, "z_loss": 0.0, "top_k": 1}
    operands = tuple(r.x if i in (0, roles.x, roles.y_or_cotangent) else None for i in range(7))
    result = r.compute if formula is CROSS_ENTROPY else r.result
    found, _ = _plan(Call(formula, options, r.axis, r.compute, result), operands, device)
    if isinstance(found, _Copy):
        return True, "rows that do not lie side by side are copied first"
    return (True, found.plan.layout) if isinstance(found, Launch) else (False, str(found))
