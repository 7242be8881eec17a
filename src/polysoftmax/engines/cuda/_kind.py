"""A kind of call: what all calls share that look alike."""

from __future__ import annotations

import math
from copy import copy
from typing import TYPE_CHECKING, Any

from polysoftmax.engines.cuda import _devices
from polysoftmax.engines.cuda._operands import Argument, Given
from polysoftmax.engines.cuda._plan import ANSWERS_SEVERAL, SIZES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polysoftmax._arrays import Array
    from polysoftmax.engines.cuda._devices import Device
    from polysoftmax.engines.cuda._plan import Plan

_LINE = 128
"""Bytes of a line of the cache; no two arrays share one."""


class Launch:
    """What calls that look alike share: a kernel, the arguments that do not differ, and the shapes of the answers."""

    __slots__ = ("_answers", "_arguments", "_given", "_is_tuple", "_pieces", "device", "plan")

    def __init__(
        self,
        device: Device,
        plan: Plan,
        before: tuple[Argument, ...],
        answers: tuple[tuple[tuple[int, ...], Any], ...],
        after: tuple[Argument, ...],
    ) -> None:
        arguments = [*before, *[0] * len(answers), *after]
        self.device, self.plan = device, plan
        self._arguments = [0 if isinstance(one, Given) else one for one in arguments]
        self._given = tuple((i, one.place) for i, one in enumerate(arguments) if isinstance(one, Given))
        self._answers = tuple((i, *one) for i, one in enumerate(answers, len(before)))
        self._pieces: tuple[tuple[int, int], ...] = ()
        self._is_tuple = plan.formula in ANSWERS_SEVERAL

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
