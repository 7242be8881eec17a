"""The operands of a call as a kernel sees them: where each keeps what belongs to a row, and the arguments for that."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from polysoftmax.engines.cuda import _devices
from polysoftmax.engines.cuda._devices import Scattered, Uncovered
from polysoftmax.engines.cuda._plan import SIZES

if TYPE_CHECKING:
    from polysoftmax._formula import Call
    from polysoftmax.engines.cuda._devices import Device

Map = tuple[int, int, int]
"""Where the entry for a row stands: at ``row // inner % period * stride``."""

ANOTHER_AXIS: Final = "the kernels reduce the last axis"

ONE: Map = (1, 1, 0)
_MOST_ROWS = (1 << 31) - 1
_LONGEST = (1 << 31) - (1 << 20)
"""Entries of a row: kernels count in 32 bits, and also where accesses past the end of a row would be."""


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


class Batch:
    """The rows of a call: their number and length, and where each operand keeps what belongs to a row."""

    def __init__(self, call: Call, x: View, device: Device) -> None:
        self.device = device
        self.x = x
        self.compute = _devices.dtype_name(call.compute)
        shape = self.x.shape
        if call.axis != len(shape) - 1:
            raise Uncovered(ANOTHER_AXIS)
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
            raise Scattered("the entries of a row do not lie side by side", view.pointer.place)
        found = row_map(view.shape[:-1], view.strides[:-1], self.batch)
        if found is None or (found != ONE and found[:2] != (1, self.rows)):
            raise Scattered("the rows do not lie at one distance", view.pointer.place)
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
            return (0, *ONE)
        if view.dtype != dtype:
            raise Uncovered(f"{name} has dtype {view.dtype} and not {dtype}")
        return (view.pointer, *(self.map(view) if view.shape else ONE))

    def parameter(self, value: View | Given | float | None, absent: float = 1.0) -> tuple[Argument, ...]:
        """Return the arguments for a parameter that is an array, a number, or ``absent``."""
        if not isinstance(value, View):
            return (0, absent if value is None else value, *ONE)
        pointer, *where = self.per_row(value, self.compute, "a parameter")
        return (pointer, absent, *where)

    def mask(self, where: View | None) -> tuple[Argument, ...]:
        """Return the arguments for the mask."""
        if where is None:
            return (0, *ONE, 0)
        pointer, *rows = self.per_row(where, "bool", "the mask")
        along = where.strides[-1] if where.shape and where.shape[-1] > 1 else 0
        return (pointer, *rows, along)

    def keys(self, keys: View, is_one_key: bool) -> tuple[Argument, ...]:
        """Return the arguments for a key a row, or for one from which the kernel makes those of the rows."""
        return (*self.per_row(keys, "int32", "the key"), keys.strides[-1], int(is_one_key))


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
        return ONE
    return (inner, *merged[0]) if len(merged) == 1 else None
