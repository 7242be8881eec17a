"""The report of all checks on all libraries: a table each, failures with programs that show them, and the peers."""

from __future__ import annotations

import json as json_module
import math
import sys
from dataclasses import asdict, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Self

from polysoftmax.testing._backends import missing
from polysoftmax.testing._checks import CHECKS
from polysoftmax.testing._confident import confident, table
from polysoftmax.testing._peers import distances, faults
from polysoftmax.testing._results import Report
from polysoftmax.testing._run import chosen, dtypes_of, named_check, run

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from polysoftmax.testing._results import Result
    from polysoftmax.testing._run import Answers

_SHORT = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f64"}
_RIGHT, _WRONG = "green", "bold red"

Cell = tuple[str, str]
"""Text and its style."""


def report(
    functions: Sequence[str] = (),
    *,
    backends: Sequence[str] | None = None,
    quick: bool = False,
    peers: bool = False,
    json: Path | None = None,
) -> int:
    """Check functions on every backend in every engine, and print what was found.

    Parameters
    ----------
    functions : sequence of str
        Names such as ``"softmax"`` or ``"random.bits"``; by default every public function.
    backends : sequence of str, optional
        Values of `Backend`; by default every backend that can be opened here.
    quick : bool
        Whether only the most telling cases are tried, in one narrow and one wide dtype.
    peers : bool
        Whether scipy, jax.nn and torch are measured, too.
    json : Path, optional
        File that every figure is written to.

    Returns
    -------
    int
        0 if every answer is right, else 1. Peers are not judged.

    Raises
    ------
    ValueError
        If there is no function or no backend of a name, or it cannot be opened here.
    """
    checks = [named_check(name) for name in functions] or list(CHECKS.values())
    ways = [(backend, engine) for backend in chosen(backends) for engine in backend.capability.engines]
    others: Answers = {}
    whole = Report()
    with _Screen() as screen:
        screen.expect(
            sum(
                len(dtypes_of(backend.capability.dtypes, None, quick=quick)) if one.has_dtypes else 1
                for backend, _ in ways
                for one in checks
            )
        )
        for backend, engine in ways:
            if absent := missing(backend, engine):
                screen.line(f"{backend.value}, engine {engine}: left out, since {absent}")
                continue
            found = run(backend, engine, checks, quick=quick, others=others, tell=screen.step)
            whole.results += found
            screen.table(f"{backend.value}, engine {engine}", *_rows(found))
            _show_failures(screen, found)
        beside = _peers(screen) if peers else {}
        screen.line(_LEGEND)
        screen.line(str(Report([_without_failures(one) for one in whole.results])), _RIGHT if whole else _WRONG)
    if json is not None:
        figures = {"results": [asdict(one) for one in whole.results]} | beside
        json.write_text(json_module.dumps(_finite(figures), indent=1) + "\n", encoding="utf-8")
    return 0 if whole else 1


_LEGEND = (
    "f16 to f64: the largest error in ulp, of the answer for probabilities, of max(1, |answer|) for all else. "
    "Bound: the\nlargest error by what is allowed. Alone: whether rows have the same bits alone. Apart: ulp from the "
    "first library."
)


def _show_failures(screen: _Screen, results: list[Result]) -> None:
    """Print what failed, with the first program of each function: others differ in the dtype alone."""
    shown = set()
    for one in results:
        for failure in one.failures:
            screen.line(failure.message, _WRONG)
            is_first = failure.code and one.function not in shown
            screen.line(f"\n{failure.code}" if is_first else "")
            shown.add(one.function)


def _without_failures(one: Result) -> Result:
    return replace(one, failures=[])


def _rows(results: list[Result]) -> tuple[list[str], list[list[Cell]]]:
    """Return the columns and the lines of one library's table, a function a line."""
    dtypes = [one for one in _SHORT if any(result.dtype == one for result in results)] or ["float32"]
    functions: dict[str, dict[str, Result]] = {}
    for one in results:
        functions.setdefault(one.function, {})[one.dtype] = one
    lines = []
    for name, of_dtypes in functions.items():
        each = list(of_dtypes.values())
        is_right = not any(one.failed for one in each)
        cells = [(name, "" if is_right else _WRONG)]
        for dtype in dtypes:
            found = of_dtypes.get(dtype) or (of_dtypes.get("") if dtype == "float32" or len(dtypes) == 1 else None)
            cells.append(("", "") if found is None else (figure(found.ulps), _WRONG if found.failed else _RIGHT))
        worst = max(each, key=lambda one: one.of_bound)
        alone = [one.rows_alone for one in each if one.rows_alone is not None]
        apart = [one.apart for one in each if one.apart is not None]
        lines.append(
            [
                *cells,
                (figure(worst.of_bound), _RIGHT if worst.of_bound <= 1 else _WRONG),
                ("", "") if not alone else ("same", _RIGHT) if all(alone) else ("differ", _WRONG),
                (figure(max(apart)) if apart else "", ""),
                (f"{1000 * sum(one.seconds for one in each):.0f}", "dim"),
            ]
        )
    return ["function", *(_SHORT[one] for one in dtypes), "bound", "alone", "apart", "ms"], lines


def figure(value: float) -> str:
    """Return a figure to read."""
    if math.isinf(value):
        return "wrong"
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"


def _peers(screen: _Screen) -> dict[str, Any]:
    found, wrong = list(distances()), list(faults())
    everyone = list(dict.fromkeys(one.by for one in found))
    ulps = {(one.function, one.dtype, one.by): one.ulps for one in found}
    lines: list[list[Cell]] = []
    for function, dtype in dict.fromkeys((one.function, one.dtype) for one in found):
        each = [ulps.get((function, dtype, by)) for by in everyone]
        lines.append(
            [(function, ""), (dtype, ""), *((figure(one), "") if one is not None else ("", "") for one in each)]
        )
    screen.table("Largest error in ulp, rows without options", ["function", "dtype", *everyone], lines)
    screen.table(
        "What they get wrong",
        ["question", "asked", "answers", "polysoftmax", "right"],
        [
            [
                (one.question, ""),
                (one.by, ""),
                (one.answer, _RIGHT if one.answer == one.right else _WRONG),
                (one.ours, _RIGHT if one.ours == one.right else _WRONG),
                (one.right, ""),
            ]
            for one in wrong
        ],
    )
    if find_spec("torch"):
        screen.line(
            f"Relative errors where a row is all but certain, or two rows nearly equal:\n\n{table(list(confident()))}\n"
        )
    return {"peers": [asdict(one) for one in found], "faults": [asdict(one) for one in wrong]}


def _finite(value: Any) -> Any:
    """Return null for infinity and NaN, which JSON lacks."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Screen:
    """A terminal with rich: tables, colours, and a bar of progress; else plain columns of any width."""

    def __init__(self) -> None:
        self.console: Any = None
        self.bar: Any = None
        if sys.stdout.isatty() and find_spec("rich"):
            from rich.console import Console

            self.console = Console(highlight=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def expect(self, steps: int) -> None:
        """Say how many steps there will be."""
        if self.console is not None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
            self.bar = Progress(*columns, console=self.console, transient=True)
            self.task = self.bar.add_task("", total=steps)
            self.bar.start()

    def step(self, name: str) -> None:
        """Say what comes next."""
        if self.bar is not None:
            self.bar.update(self.task, advance=1, description=name)

    def line(self, text: str, style: str = "") -> None:
        """Print a line."""
        if self.console is None:
            print(text, flush=True)
        else:
            self.console.print(text, style=style, markup=False, soft_wrap=True)

    def table(self, title: str, columns: list[str], rows: list[list[Cell]]) -> None:
        """Print a table; numbers stand to the right."""
        if self.console is None:
            cells = [columns, *([text for text, _ in row] for row in rows)]
            widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
            lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)
            print(title, *lines, "", sep="\n", flush=True)
            return
        from rich import box
        from rich.table import Table
        from rich.text import Text

        shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for name in columns:
            shown.add_column(name, justify="right" if name in ("bound", "apart", "ms", *_SHORT.values()) else "left")
        for row in rows:
            shown.add_row(*(Text(text, style=style) for text, style in row))
        self.console.print(shown)
