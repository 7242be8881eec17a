"""The guide's tables that are made of what the tests go by, or of measured results: make figures writes them anew."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks import newest_results
from benchmarks.accuracy import table_of_functions, table_of_rows
from polysoftmax.testing import CAPABILITIES, Backend

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).parent


def support() -> str:
    """Return a row for each library, and in it a line for each way of running it."""
    by_library = groupby(sorted(Backend, key=_place_of_library), key=lambda backend: backend.library)
    head = "| backend, and how it is run | dtypes | derivatives |\n|---|---|---|\n"
    return head + "".join(_row(list(ways)) for _, ways in by_library)


def _place_of_library(backend: Backend) -> int:
    return [one.library for one in Backend].index(backend.library)


def _row(ways: list[Backend]) -> str:
    capabilities = [CAPABILITIES[one] for one in ways]
    lines = "<br>".join(f"`{one.value}`: {can.how}" for one, can in zip(ways, capabilities, strict=True))
    dtypes = [one for one in CAPABILITIES[Backend.NUMPY].dtypes if any(one in can.dtypes for can in capabilities)]
    return f"| {lines} | {', '.join(dtypes)} | {'yes' if any(can.autodiff for can in capabilities) else '–'} |\n"


DRAWS = {"plain": "sample", "top-k": "sample_top_k", "top-p": "sample_top_p"}
SHAPES = ((64, 50257), (1, 128256), (256, 32000), (4096, 1000))
RUNNERS = {"NumPy": ("numpy", "eager"), "PyTorch": ("torch", "eager"), "JAX `jit`": ("jax", "jit")}


def draws() -> str:
    """Return the first peer's time divided by ours, for draws on a few shapes."""
    ratios = {
        (case["op"], case["backend"], case["mode"], tuple(case["shape"])): case["peers"][0]["ratio"]
        for case in newest_results("cpus")["cases"]
        if (case["dtype"], case["axis"]) == ("float32", -1)
    }
    lines = [f"| peer / ours | {' | '.join('×'.join(map(str, shape)) for shape in SHAPES)} |", "|---|---|---|---|---|"]
    for name, op in DRAWS.items():
        each = [[ratios[op, *runner, shape] for runner in RUNNERS.values()] for shape in SHAPES]
        cells = [" / ".join(f"{ratio:.1f}" if ratio < 9.95 else f"{ratio:.0f}" for ratio in one) for one in each]
        lines.append(f"| {name}: {' / '.join(RUNNERS)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


class Table(NamedTuple):
    """A table of a page, how it begins there, and what makes it."""

    page: Path
    start: str
    make: Callable[[], str]

    def current(self) -> str:
        """Return the table that stands in the page."""
        text = self.page.read_text(encoding="utf-8")
        start = text.index(self.start)
        return text[start : text.index("\n\n", start) + 1]


TABLES = (
    Table(HERE / "backends.md", "| backend, and how", support),
    Table(HERE / "accuracy.md", "| function | dtype |", lambda: table_of_rows(newest_results("accuracy"))),
    Table(HERE / "accuracy.md", "| function | numpy", lambda: table_of_functions(newest_results("accuracy"))),
    Table(HERE / "speed.md", "| peer / ours |", draws),
)

if __name__ == "__main__":
    for table in TABLES:
        text = table.page.read_text(encoding="utf-8").replace(table.current(), table.make())
        table.page.write_text(text, encoding="utf-8")
