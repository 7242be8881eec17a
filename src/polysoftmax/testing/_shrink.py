"""The smallest case that still fails, and the program that shows it."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from polysoftmax.testing._cases import Case
from polysoftmax.testing._check import check_case, main_shape, reference, row_that_differs, same_bits, take
from polysoftmax.testing._checks import dtype_of, is_array
from polysoftmax.testing._formats import FORMATS, rounded
from polysoftmax.testing._reference import UNIT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from polysoftmax.testing._adapters import Adapter
    from polysoftmax.testing._check import Function, Outcome
    from polysoftmax.testing._checks import Check
    from polysoftmax.testing._reference import Reference

_WORK = 4_000_000
"""How many entries are computed with while a case is shrunk."""

_PATTERNS = (2, 7, 32)
_SHORT = 64


def smallest(check: Check, case: Case, fails: Callable[[Case], bool], *, needed: tuple[str, ...] = ()) -> Case:
    """Leave out options that are not needed, rows and entries, and round numbers, as long as the case fails."""
    left, goes_on = _WORK, True
    while goes_on:
        goes_on = False
        for candidate in _smaller(check, case, needed):
            left -= max(10_000, math.prod(main_shape(check, candidate)))
            if left < 0:
                return case
            if fails(candidate):
                case, goes_on = candidate, True
                break
    return case


def _smaller(check: Check, case: Case, needed: tuple[str, ...]) -> Iterator[Case]:
    for name in case.given:
        if name not in (*check.positional, *needed):
            yield _with(case, {key: one for key, one in case.given.items() if key != name})
    for dim, n in enumerate(main_shape(check, case)):
        if dim in check.frozen or n < 2:
            continue
        yield take(check, case, dim, np.arange(n // 2))
        yield take(check, case, dim, np.arange(n // 2, n))
        if n <= 12:
            yield from (take(check, case, dim, np.delete(np.arange(n), i)) for i in range(n))
    for name in case.given:
        value = case.operand(name)
        if isinstance(value, np.ndarray) and value.dtype.kind == "f" and name != UNIT:
            yield from (_with(case, {**case.given, name: one}) for one in _simpler(value))


def _simpler(value: Any) -> Iterator[Any]:
    """Yield arrays that are shorter to write."""
    if (value != 0).any():
        yield np.zeros_like(value)
    if value.size > _SHORT and not any(np.array_equal(value, _pattern(value.shape, m)) for m in _PATTERNS):
        yield from (_pattern(value.shape, m) for m in _PATTERNS)
    simple = np.round(value)
    if not np.array_equal(simple, value, equal_nan=True):
        yield simple


def _pattern(shape: tuple[int, ...], m: int) -> Any:
    return (np.arange(math.prod(shape)) % m).reshape(shape).astype(np.float64)


def _with(case: Case, given: dict[str, Any]) -> Case:
    return Case(case.name, given, case.large, case.core)


def reproducer(
    lib: Adapter, engine: str, check: Check, case: Case, dtype: str, function: Function = None, *, bits: bool = False
) -> str:
    """Return a program that fails as the case does, after shrinking it: at one entry, or at a row that is alone."""

    def outcome_of(one: Case) -> Outcome:
        return check_case(lib, check, one, dtype, function)

    kind = outcome_of(case).problem.partition(":")[0]

    def fails(one: Case) -> bool:
        try:
            outcome = outcome_of(one)
        except (ValueError, IndexError, KeyError):  # there is no expectation: operands do not go together any more
            return False
        if outcome.problem.partition(":")[0] != kind:
            return False
        return row_that_differs(lib, check, outcome, function) is not None if bits else not outcome.is_right

    # The default axis of a function of somebody else's may be another.
    case = smallest(check, case, fails, needed=() if function is None else ("axis",))
    writer = _Writer(lib, engine, check, dtype or "float32", function)
    outcome = outcome_of(case)
    if bits:
        row = row_that_differs(lib, check, outcome, function) or 0
        return writer.program(_row_alone(writer, check, outcome, row, outcome_of(take(check, case, 0, [row]))))
    return writer.program([*writer.call(case, "y"), *_compared(writer, check, outcome)])


def _row_alone(writer: _Writer, check: Check, batch: Outcome, row: int, alone: Outcome) -> list[str]:
    pairs = zip(batch.answers, alone.answers, strict=True)
    k = next(i for i, (a, b) in enumerate(pairs) if not same_bits((a[row : row + 1],), (b,)))
    of_batch, of_alone = (writer.read(name, k, len(batch.answers)) for name in ("batch", "alone"))
    return [
        *writer.call(batch.case, "batch"),
        *writer.call(take(check, batch.case, 0, [row]), "alone"),
        f"np.testing.assert_array_equal({of_batch}[{row}:{row + 1}], {of_alone})",
    ]


def _compared(writer: _Writer, check: Check, outcome: Outcome) -> list[str]:
    """Return assertions of shapes and dtypes where these are wrong, else of the worst entry."""
    wants = reference(check, outcome.case, outcome.dtype)
    if outcome.problem:
        each = enumerate(wants)
        lines = [line for k, want in each for line in writer.require("y" if len(wants) == 1 else f"y[{k}]", want)]
        return [f"# {outcome.problem}", *lines]
    want = wants[outcome.output]
    place = ", ".join(map(str, outcome.index)) or "()"
    allowed = float(want.allowed()[outcome.index]) if want.is_floating else 0.0
    found = writer.read("y", outcome.output, len(wants))
    return [f"np.testing.assert_allclose({found}[{place}], {outcome.expected!r}, rtol=0, atol={allowed!r})"]


class _Writer:
    """Code for one library: plain calls where these are what runs, else calls in the backend's way by the kit."""

    def __init__(self, lib: Adapter, engine: str, check: Check, dtype: str, function: Function) -> None:
        self.lib, self.check, self.engine, self.dtype = lib, check, engine, dtype
        self.imports = ["import numpy as np"]
        self.name = f"polysoftmax.{check.function}"
        if function is not None:
            name, module = getattr(function, "__name__", ""), getattr(function, "__module__", None)
            self.name = name if name.isidentifier() else "function"
            is_there = getattr(function, "__qualname__", "") == self.name and module not in (None, "__main__")
            self.imports.append(f"from {module} import {self.name}" if is_there else f"# {self.name}: yours")
        self.is_plain = lib.source is not None and dtype != "bfloat16"
        if self.is_plain:
            self.imports.append(str(lib.source))
            self.block = f'with polysoftmax.engine("{engine}"):' if engine != "auto" else ""
        else:
            self.imports.append("from polysoftmax.testing import open_backend")
            self.block = f'with open_backend("{lib.name}", "{engine}") as lib:'

    def call(self, case: Case, name: str) -> list[str]:
        """Return the lines that make the operands and call the function."""
        lines, compute, arrays = [], FORMATS[self.dtype].compute.name, []
        for key, value in case.given.items():
            if is_array(value):
                exact = case.operand(key)
                kind = dtype_of(key, exact, self.dtype, compute, self.lib.can.default_index)
                text = literal(rounded(exact, kind) if kind in FORMATS else exact)
                made = f"xp.asarray({text}, dtype=xp.{kind})" if self.is_plain else f'lib.asarray({text}, "{kind}")'
                lines.append(f"{key} = {made}")
                arrays.append(key)
        expression = self.check.expression(case.given, self.name)
        if not self.is_plain and not self.check.is_eager:
            expression = f"lib.call(lambda {', '.join(arrays)}: {expression}, {', '.join(arrays)})"
        return [*lines, f"{name} = {expression}"]

    def require(self, name: str, want: Reference) -> list[str]:
        """Return the lines that assert type, shape and dtype of an output."""
        kind = self.lib.can.default_index if want.dtype == "index" else want.dtype
        if not self.is_plain:
            return [f'lib.require({name}, {want.high.shape}, "{kind}")']
        return [
            f"assert type({name}) is type(xp.asarray(0.0)), type({name})",
            f"assert {name}.shape == {want.high.shape}, {name}.shape",
            f"assert {name}.dtype == xp.{kind}, {name}.dtype",
        ]

    def read(self, name: str, output: int, outputs: int) -> str:
        """Return the code that reads an output in NumPy."""
        one = name if outputs == 1 else f"{name}[{output}]"
        return f"np.asarray({one})" if self.is_plain or self.check.is_eager else f"lib.values({one})"

    def program(self, body: list[str]) -> str:
        """Return a whole program."""
        used = sorted({word for word in ("inf", "nan") if re.search(rf"\b{word}\b", "\n".join(body))})
        first = [f"from math import {', '.join(used)}"] if used else []
        if "polysoftmax." in "\n".join([self.block, *body]):
            self.imports.insert(1, "import polysoftmax")
        inner = [self.block, *(f"    {one}" for one in body)] if self.block else body
        return "\n".join([*first, *self.imports, "", *inner]) + "\n"


def literal(values: Any) -> str:
    """Return an array as Python, in short where it is of one number or a pattern."""
    array = np.asarray(values)
    if array.size > 1 and (array == array.flat[0]).all():
        return f"np.full({array.shape}, {array.flat[0].item()!r})"
    if array.size > _SHORT:
        for m in _PATTERNS:
            if np.array_equal(array, _pattern(array.shape, m)):
                return f"np.reshape(np.arange({array.size}) % {m}, {array.shape})"
    return repr(array.tolist()) if array.size else f"np.zeros({array.shape})"
