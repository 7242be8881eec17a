"""Calls that take several launches: composed once by their formula, and repeated as the launches that this took."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polysoftmax.engines.cuda import _devices
from polysoftmax.engines.cuda._calls import evaluate, look, prepare, recall, remember
from polysoftmax.engines.cuda._composed import Composed
from polysoftmax.engines.cuda._devices import Uncovered

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax._arrays import Array
    from polysoftmax._formula import Call
    from polysoftmax.engines.cuda._kind import Launch


class _Program:
    """Launches in a row: each has the answers of those before it among its values."""

    __slots__ = ("_before", "_last", "_words")

    def __init__(self, launches: list[Launch]) -> None:
        end, before = 0, []
        for one in launches[:-1]:
            launch, end = one.into_scratch(end)
            before.append(launch)
        self._before, self._last, self._words = tuple(before), launches[-1], end // 4

    def run(self, values: list[int | float]) -> Any:
        """Launch all, and return what the last answers."""
        device = self._last.device
        # One array for all that is gone in the end: to make one takes as long as half of a launch.
        scratch = device.empty((self._words,), "int32")
        start = device.pointer(scratch)
        for one in self._before:
            one.make(values, start)
        return self._last.run(values)


_COMPOSED = "there are other steps than launches"


def run(call: Call, operands: tuple[Array, ...], step: Callable[[Call, tuple[Array, ...]], Any]) -> Any:
    """Answer a call whose formula is made of others, each of which ``step`` answers by its kernel if it has one."""
    device = _devices.device_of(operands[0])
    if isinstance(device, str):
        return Composed(call, operands, step).answer()
    try:
        key, values = look(call, operands, device)
    except Uncovered:
        return Composed(call, operands, step).answer()
    found = recall(key)
    if isinstance(found, _Program):
        return found.run(values)
    if found is _COMPOSED:
        return Composed(call, operands, step).answer()
    steps = _Steps(call, operands)
    answer = Composed(call, steps.operands, steps.take).answer_of_rows()
    remember(key, steps.program(answer) or _COMPOSED)
    return call.answer(answer)


class _Steps:
    """The steps of a call while it is composed, and where each has its operands from."""

    def __init__(self, call: Call, operands: tuple[Array, ...]) -> None:
        # Each number an object of its own, since two parameters may be one.
        self.operands = tuple([one * 1.0 if isinstance(one, float) else one for one in operands])
        self._places = {id(one): i for i, one in enumerate(self.operands) if one is not None}
        self._count = len(operands) + len(call.options)
        self._squeeze = call.squeeze
        self._last: list[Array] = []
        self._kept: list[Any] = []  # an object that is gone leaves its id to another
        self._launches: list[Launch] = []
        self._is_known = len(self._places) == sum(one is not None for one in operands)

    def take(self, call: Call, operands: tuple[Array, ...]) -> Any:
        """Take a step."""
        found = prepare(call, operands)
        if isinstance(found, str):
            self._is_known = False
            return evaluate(call, operands)
        launch, values, kept = found
        made = launch.make(values)
        places = [0 if one is None else self._places.get(id(one), -1) for one in kept]
        self._is_known = self._is_known and -1 not in places
        self._launches.append(launch.taking(places))
        self._places |= {id(one): i for i, one in enumerate(made, self._count)}
        self._count += len(made)
        self._kept.append((kept, made))
        self._last = made
        return launch.answer(made)

    def program(self, answer: Array) -> _Program | None:
        """Return the launches; None if there was another step, or an array that was made on the way."""
        is_known = self._is_known and [id(answer)] == list(map(id, self._last))
        if not (is_known and self._launches):
            return None
        return _Program([*self._launches[:-1], self._launches[-1].squeezed() if self._squeeze else self._launches[-1]])
