"""One case on one library: the call, and how far its answer is from the expectation."""

from __future__ import annotations

import functools
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

import polysoftmax
from polysoftmax.testing._cases import Case
from polysoftmax.testing._checks import Check, dtype_of, is_array
from polysoftmax.testing._formats import FORMATS, rounded
from polysoftmax.testing._reference import PER_ROW, Given, Reference, axes_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from polysoftmax.testing._adapters import Adapter

Function = Any


@dataclass(frozen=True)
class Outcome:
    """The worst entry of an answer, or what went wrong before there was one."""

    function: str
    case: Case
    dtype: str
    excess: float = 0.0
    ulps: float = 0.0
    got: float = 0.0
    expected: float = 0.0
    index: tuple[int, ...] = ()
    output: int = 0
    problem: str = ""
    seconds: float = 0.0
    answers: tuple[Any, ...] = ()

    @property
    def is_right(self) -> bool:
        """Whether there is an answer, and it keeps its bound."""
        return not self.problem and self.excess <= 1

    def __str__(self) -> str:
        where = f"{self.function} of {self.case.name!r} in {self.dtype}"
        if self.problem:
            return f"{where}: {self.problem}"
        times = f": {self.excess:.3g} times the error allowed" if math.isfinite(self.excess) else ""
        return f"{where}: {self.got!r} at {self.index}, not {self.expected!r}{times}"


def named(function: str) -> Function:
    """Return a function of polysoftmax, such as ``"softmax"`` or ``"random.split"``."""
    return functools.reduce(getattr, function.split("."), polysoftmax)


def given_of(case: Case, dtype: str) -> Given:
    """Round the operands of a case as the library sees them."""
    compute = FORMATS[dtype].compute.name
    found: dict[str, Any] = {}
    for name in case.given:
        value = case.operand(name)
        if isinstance(value, np.ndarray):
            kind = dtype_of(name, value, dtype, compute, "index")
            found[name] = rounded(value, kind) if kind in FORMATS else value
        else:
            is_rounded = name in PER_ROW and isinstance(value, float)
            found[name] = float(rounded(value, compute)) if is_rounded else value
    return Given(found, dtype, compute)


# Backends are looped over outside, so that a reference serves all of them.
@functools.lru_cache(maxsize=1024)
def reference(check: Check, case: Case, dtype: str) -> tuple[Reference, ...]:
    """Return what the contract answers to a case whose arrays are of a dtype, one expectation an output."""
    return check.expect(given_of(case, dtype))


def call_case(lib: Adapter, check: Check, case: Case, dtype: str, function: Function = None) -> Any:
    """Make a case's arrays, each in its dtype, and call a function, by default polysoftmax's own."""
    compute = FORMATS[dtype].compute.name
    arrays = {}
    for name, value in case.given.items():
        if is_array(value):
            exact = case.operand(name)
            arrays[name] = lib.asarray(exact, dtype_of(name, exact, dtype, compute, lib.can.default_index))
    expression = check.expression(case.given, "function")
    program = _program(expression, tuple(arrays), function or named(check.function))
    if check.is_eager:
        return np.asarray(program(*arrays.values()))
    return lib.call(program, *arrays.values())


@functools.lru_cache(maxsize=4096)  # compiled calls are kept for the program
def _program(expression: str, names: tuple[str, ...], function: Function) -> Callable[..., Any]:
    scope = {"function": function, "polysoftmax": polysoftmax, "inf": math.inf, "nan": math.nan}
    program: Callable[..., Any] = eval(f"lambda {', '.join(names)}: {expression}", scope)
    return program


def check_case(lib: Adapter, check: Check, case: Case, dtype: str, function: Function = None) -> Outcome:
    """Call a function on a case, see that the answer is of the right kind, and measure its error.

    An exception is a failure like any other, but for what a lazy library says it cannot do.
    """
    dtype = dtype or "float32"
    want = reference(check, case, dtype)
    if not all(one.is_floating for one in want) and "func" in lib.can.how:
        return Outcome(check.function, case, dtype)  # torch.func.vjp takes no function that answers integers
    start = time.perf_counter()
    try:
        y = call_case(lib, check, case, dtype, function)
        found = tuple(y) if isinstance(y, tuple | list) else (y,)
        if function is not None:  # NumPy's own functions answer scalars, which polysoftmax's never do
            found = tuple(np.asarray(one) if isinstance(one, np.generic) else one for one in found)
        answers = tuple(np.asarray(one) if check.is_eager else lib.values(one) for one in found)
    except Exception as error:
        if isinstance(error, NotImplementedError) and lib.can.lazy:
            return Outcome(check.function, case, dtype)
        return Outcome(check.function, case, dtype, math.inf, problem=_said(error))
    seconds = time.perf_counter() - start
    if len(found) != len(want):
        problem = f"{len(found)} answers, not {len(want)}"
        return Outcome(check.function, case, dtype, math.inf, problem=problem)
    outcomes = []
    for one, values, expected in zip(found, answers, want, strict=True):
        try:
            if not check.is_eager:
                lib.require(one, expected.high.shape, _expected_dtype(expected, lib))
        except AssertionError as error:
            return Outcome(check.function, case, dtype, math.inf, problem=_said(error))
        outcomes.append(_judged(check, values, expected))
    output = max(range(len(outcomes)), key=lambda k: (not outcomes[k][0] <= 1, outcomes[k][0]))
    ulps = max(one[1] for one in outcomes)
    excess, _, got, expected_there, index = outcomes[output]
    return Outcome(
        check.function, case, dtype, excess, ulps, got, expected_there, index, output, seconds=seconds, answers=answers
    )


def _said(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _expected_dtype(expected: Reference, lib: Adapter) -> str:
    return lib.can.default_index if expected.dtype == "index" else expected.dtype


def _judged(check: Check, answer: NDArray[Any], want: Reference) -> tuple[float, float, float, float, tuple[int, ...]]:
    """Return excess, ulps, the worst entry, what it should be, and its place."""
    if not answer.size:
        return 0.0, 0.0, 0.0, 0.0, ()
    answer = answer.astype(np.float64)
    with np.errstate(over="ignore"):  # a wrong answer may be off by any factor
        excess, ulps = want.excess(answer), want.ulps(answer, relative=check.is_relative)
    worst = tuple(int(i) for i in np.unravel_index(np.argmax(excess), excess.shape))
    within = excess <= 1
    largest = float(np.max(ulps[within], initial=0.0)) if within.all() else float(ulps[worst])
    return float(excess[worst]), largest, float(answer[worst]), float(want.high[worst]), worst


# Parts of a case


def main_shape(check: Check, case: Case) -> tuple[int, ...]:
    """Return the shape of the operand whose rows are the rows of the answer."""
    return tuple(np.shape(case.operand(check.main))) if check.main else ()


def take(check: Check, case: Case, dim: int, index: Any) -> Case:
    """Return a case with some of the entries along one dimension of its main operand."""
    shape = main_shape(check, case)
    axes = axes_of(case.given.get("axis", -1), len(shape))
    kept = [i for i in range(len(shape)) if i not in axes]
    given: dict[str, Any] = {}
    for name in case.given:
        value = case.operand(name)
        given[name] = value
        if not isinstance(value, np.ndarray) or not value.ndim:
            continue
        at = _dimension(name, value, shape, dim, axes, kept)
        if at is not None and value.shape[at] == shape[dim]:
            given[name] = np.take(value, index, axis=at)
        elif dim in axes and name in ("tokens", "targets", "draft_tokens") and value.dtype.kind == "i":
            given[name] = np.minimum(value, len(index) - 1)
    return Case(case.name, given, case.large, case.core)


def _dimension(
    name: str, value: NDArray[Any], shape: tuple[int, ...], dim: int, axes: tuple[int, ...], kept: list[int]
) -> int | None:
    """Return which dimension of an operand goes with one of the main operand's, if any."""
    if name == "weight":
        return 0 if dim in axes else None
    is_per_row = name in (*PER_ROW, "key", "tokens", "draft_tokens", "lse_a", "lse_b", "data")
    if name == "targets":
        is_per_row = value.dtype.kind != "f"
    if is_per_row and not (name in PER_ROW and value.ndim == len(shape)):
        return kept.index(dim) if dim in kept and kept.index(dim) < value.ndim else None
    at = dim - (len(shape) - value.ndim)
    return at if at >= 0 else None


def same_bits(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether answers are equal to the last bit, NaN being one value."""
    return all(
        np.array_equal(x, y, equal_nan=x.dtype.kind == "f")
        and (x.dtype.kind != "f" or bool(((np.signbit(x) == np.signbit(y)) | np.isnan(x)).all()))
        for x, y in zip(a, b, strict=True)
    )


def has_rows(check: Check, outcome: Outcome) -> bool:
    """Whether an answer has a row for each of several rows that can be asked for alone."""
    case, shape = outcome.case, main_shape(check, outcome.case)
    if len(shape) < 2 or shape[0] < 2 or isinstance(case.given.get("key"), int):  # one key is folded with the number
        return False
    is_batch = 0 not in axes_of(case.given.get("axis", -1), len(shape))
    return is_batch and all(one.shape[:1] == shape[:1] for one in outcome.answers)


def row_that_differs(lib: Adapter, check: Check, outcome: Outcome, function: Function = None) -> int | None:
    """Return a row of a batch that has other bits alone, if one of a few has."""
    if not has_rows(check, outcome):
        return None
    count = main_shape(check, outcome.case)[0]
    for i in sorted({0, count // 2, count - 1}):
        alone = check_case(lib, check, take(check, outcome.case, 0, [i]), outcome.dtype, function)
        if alone.answers and not same_bits(alone.answers, tuple(one[i : i + 1] for one in outcome.answers)):
            return i
    return None
