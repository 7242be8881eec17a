"""Many random calls on many backends, each held to the conformance kit's expectation.

    python -m tests.random_calls --examples 20000 --seed 0 --backend numpy torch

prints how often each function was called on each backend in each engine, and the smallest program of the first failure
of each. The exit code is 1 if anything failed. A library that compiles gets calls of a few shapes; with --quickly JAX's
programs are compiled without what LLVM does for their speed, which takes less than half of the time.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from polysoftmax.testing import FORMATS, Adapter, Backend, check_case, missing, open_backend
from polysoftmax.testing._libraries import forget_programs
from polysoftmax.testing._shrink import reproducer
from tests.call_strategies import FUNCTIONS, RandomCall, random_calls
from tests.quick_programs import compile_quickly

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hypothesis.strategies import SearchStrategy

    Array = Any

_FEW_SHAPES = ((3, 6), (6,), (2, 3, 4), (2, 300))
_AT_ONCE = 500
"""How many calls hypothesis draws in one run, each run with a seed of its own."""

every = settings(
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
"""Calls are drawn and not shrunk: the kit makes a failing one smaller."""


class Place(NamedTuple):
    """A backend in an engine, and a function."""

    backend: str
    engine: str
    function: str


class Failed(NamedTuple):
    """A call that failed, and what was wrong."""

    place: Place
    call: RandomCall
    message: str


def draw_calls(
    visit: Callable[[RandomCall], None], calls: SearchStrategy[RandomCall], examples: int, number: int
) -> None:
    """Visit random calls, the same for the same seed."""
    for first in range(0, examples, _AT_ONCE):

        @seed(number + first)
        @settings(every, max_examples=min(_AT_ONCE, examples - first))
        @given(calls)
        def of_each(call: RandomCall) -> None:
            visit(call)

        of_each()
        if "jax" in sys.modules:  # each program takes memory maps, of which a process may have some 65,000
            sys.modules["jax"].clear_caches()


def try_call(call: RandomCall, lib: Adapter) -> str | None:
    """Return what is wrong with the answer to a call, "" if nothing is, and None if the library has no such arrays."""
    placed = laid_out(lib, call)
    if placed is None:
        return None
    with np.errstate(all="ignore"):
        outcome = check_case(placed, call.check, call.case, call.dtype)
    return "" if outcome.is_right else f"{outcome} ({call.layout} arrays)"


def laid_out(lib: Adapter, call: RandomCall) -> Adapter | None:
    """Return a library whose arrays lie in memory as those of a call do, if it has them."""
    operands = [one for one in call.case.given.values() if isinstance(one, np.ndarray)]
    if call.dtype not in lib.can.dtypes:
        return None
    if call.has_integers and call.dtype != lib.can.default_float:
        return None
    tiny = FORMATS[call.dtype].compute.tiny
    if lib.can.compiles and any(((np.abs(one) < tiny) & (one != 0)).any() for one in operands if one.dtype.kind == "f"):
        return None  # XLA reads subnormal numbers as 0
    lay = {"numpy": _numpy_as, "torch": _torch_as}.get(lib.backend.library)
    if lay is None or call.layout == "plain":  # other libraries choose their layout themselves
        return lib
    own, found = lib.make, copy.copy(lib)
    found.make = lambda exact, dtype: lay(own(exact, dtype), call.layout)  # type: ignore[method-assign]
    return found


def _numpy_as(y: Array, layout: str) -> Array:
    if layout == "read-only":
        y.flags.writeable = False
        return y
    if layout == "other order of bytes":
        return y.astype(y.dtype.newbyteorder()) if y.dtype.kind in "fi" else y
    if layout == "fortran":
        return np.asfortranarray(y) if y.ndim else y
    if layout == "offset":  # of one byte, which no entry is aligned to
        view = np.empty(y.nbytes + 1, np.uint8)[1:].view(y.dtype).reshape(y.shape)
    else:
        step = -2 if layout == "reversed" else 2
        view = np.empty([2 * n for n in y.shape], y.dtype)[(*(slice(None, None, step),) * y.ndim, ...)]
    view[...] = y
    return view


def _torch_as(y: Array, layout: str) -> Array:
    """Return a tensor in a layout that PyTorch has, or as it is."""
    if layout == "fortran":
        return y.permute(*reversed(range(y.ndim))).contiguous().permute(*reversed(range(y.ndim))) if y.ndim else y
    if layout == "offset":
        view = y.new_empty(math.prod(y.shape) + 1)[1:].reshape(tuple(y.shape))
    elif layout in ("strided", "reversed"):
        view = y.new_empty([2 * n for n in y.shape])[(slice(None, None, 2),) * y.ndim]
    else:
        return y
    view[...] = y
    return view


def engines_of(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return backends by name, each in all of its engines."""
    return [(name, engine) for name in names for engine in Backend(name).capability.engines]


def run(
    names: Sequence[str], examples: int, number: int, functions: tuple[str, ...] = FUNCTIONS
) -> tuple[Counter[Place], list[Failed]]:
    """Make random calls on backends, and return how many there were of each function, and what failed."""
    counts: Counter[Place] = Counter()
    failed: list[Failed] = []
    for shapes in ((), _FEW_SHAPES):
        places = [
            (name, engine) for name, engine in engines_of(names) if Backend(name).capability.compiles == bool(shapes)
        ]

        def visit(call: RandomCall, places: Sequence[tuple[str, str]] = places) -> None:
            for name, engine in places:
                with open_backend(name, engine) as lib:
                    said = try_call(call, lib)
                if said is not None:
                    place = Place(name, engine, call.check.function)
                    counts[place] += 1
                    if sum(n for one, n in counts.items() if one.backend == name) % 64 == 0:
                        forget_programs()
                    failed.extend([Failed(place, call, said)] if said else [])

        if places:
            draw_calls(visit, random_calls(functions, shapes), examples, number)
    return counts, failed


def program_of(one: Failed) -> str:
    """Return the smallest program found that fails as a call does."""
    place, call, _ = one
    with open_backend(place.backend, place.engine) as lib, np.errstate(all="ignore"):
        return reproducer(laid_out(lib, call) or lib, place.engine, call.check, call.case, call.dtype)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make random calls, say what was found, and return an exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.random_calls", description=__doc__.partition("\n")[0])
    parser.add_argument("--examples", type=int, default=1000, help="calls drawn; each goes to every backend and engine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", nargs="+", default=["numpy", "torch", "array_api_strict"], metavar="NAME")
    parser.add_argument("--function", nargs="+", default=FUNCTIONS, choices=FUNCTIONS, metavar="NAME")
    parser.add_argument("--quickly", action="store_true", help="compile JAX's programs without LLVM's slow passes")
    asked = parser.parse_args(arguments)
    known = {one.value: one for one in Backend}
    for name in asked.backend:
        if name not in known:
            parser.error(f"unknown backend {name!r}: choose from {', '.join(known)}")
        if absent := missing(known[name]):
            parser.error(f"backend {name!r} cannot be opened here: {absent}")
    with pytest.MonkeyPatch.context() as patch:
        if asked.quickly:
            compile_quickly(patch)
        counts, failed = run(asked.backend, asked.examples, asked.seed, tuple(asked.function))
    wrong = Counter(one.place for one in failed)
    for place, count in sorted(counts.items()):
        print(f"{place.backend:18} {place.engine:9} {place.function:22} {count:7} calls {wrong[place]:5} failed")
    for place in sorted(wrong):
        first = next(one for one in failed if one.place == place)
        print(f"\n{place.backend} ({place.engine}): {first.message}\n\n{program_of(first)}")
    print(f"\n{sum(wrong.values())} of {sum(counts.values())} calls failed (seed {asked.seed}).")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
