"""Waiting in loops, without the interpreter's lock: what threads that share work for microseconds can afford.

A thread that sleeps is woken tens of microseconds late on a virtual machine. Importing this file imports Numba.
"""

from __future__ import annotations

import platform
import time
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

if TYPE_CHECKING:
    from polysoftmax._arrays import Array


@intrinsic  # type: ignore[untyped-decorator]
def _read(_: Any, number: Any) -> Any:
    """Read a number, each time anew."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.load_atomic(data, "acquire", 8)

    return types.int64(number), generate


@intrinsic  # type: ignore[untyped-decorator]
def _decrease(_: Any, number: Any) -> Any:
    """Take 1 from a number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.atomic_rmw("sub", data, context.get_constant(types.int64, 1), "acq_rel")

    return types.int64(number), generate


_PAUSES = {"x86_64": "llvm.x86.sse2.pause", "AMD64": "llvm.x86.sse2.pause"}
"""LLVM's names of the instruction that leaves a core's units to its other thread for a moment."""


@intrinsic  # type: ignore[untyped-decorator]
def _pause(_: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        name = _PAUSES.get(platform.machine())
        if name is not None:
            builder.call(builder.module.declare_intrinsic(name, (), ir.FunctionType(ir.VoidType(), ())), ())
        return context.get_dummy_value()

    return types.void(), generate


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _rest(turns: int) -> None:
    for _ in range(turns):
        _pause()


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _wait(busy: Array, turns: int) -> bool:
    for _ in range(turns):
        if _read(busy) == 0:
            return True
        _pause()
    return False


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _leave(busy: Array, posted: Array, last: int, turns: int, head_start: int) -> None:
    _decrease(busy)
    for _ in range(turns):
        if _read(posted) != last:
            for _ in range(head_start):
                _pause()
            return
        _pause()


@intrinsic  # type: ignore[untyped-decorator]
def _call(_: Any, address: Any) -> Any:
    """Call a C function of one pointer, which gets none."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = ir.IntType(8).as_pointer()
        function = builder.inttoptr(arguments[0], ir.FunctionType(ir.VoidType(), [pointer]).as_pointer())
        builder.call(function, [ir.Constant(pointer, None)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@numba.cfunc("void(CPointer(int64))", cache=True)  # type: ignore[untyped-decorator]
def _enter_late(entry: Any) -> None:
    for _ in range(entry[0]):
        _pause()
    _call(entry[1])


def number() -> Array:
    """Return a number that threads can wait for, 0."""
    return np.zeros(1, np.int64)


def _turns_in(seconds: float) -> int:
    """Return how many turns of a loop take so long."""
    turns, least = 1000, 1.0
    for _ in range(3):
        start = time.perf_counter()
        _rest(turns)
        least = min(least, time.perf_counter() - start)
    return int(turns * seconds / least)


_rest(1)
_TURNS = _turns_in(100e-6)
_HEAD_START = _turns_in(8e-6)
"""Time after which a caller who has posted a job is at work on it, and has let go of the interpreter's lock."""


def wait(busy: Array) -> bool:
    """Wait until nobody is busy, but not for long; return whether that is so."""
    return _wait(busy, _TURNS)  # type: ignore[no-any-return]


def leave(busy: Array, posted: Array, *, waits: bool) -> None:
    """Stop being busy, and wait for another job to be posted, but not for long, or not at all."""
    _leave(busy, posted, posted[0], _TURNS if waits else 0, _HEAD_START)


ENTER_LATE = _enter_late.address
"""A C function of what `late_entry` returns."""


def late_entry(function: int) -> Array:
    """Return the data for a call of a C function that lets the caller get to work first."""
    return np.array((_HEAD_START, function), np.int64)
