"""The tables in docs/accuracy.md, from the newest results of benchmarks/accuracy.py: make figures writes them anew."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.accuracy import table_of_functions, table_of_rows

PAGE = Path(__file__).parent / "accuracy.md"
RESULTS = max((PAGE.parents[1] / "benchmarks" / "results").glob("*-accuracy")) / "results.json"


def tables() -> list[str]:
    """Return the tables, in the order of the page."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    return [table_of_rows(results), table_of_functions(results)]


def current(page: str) -> list[str]:
    """Return the tables that stand in the page."""
    starts = [page.index(f"| function | {column}") for column in ("dtype |", "numpy float32 |")]
    return [page[start : page.index("\n\n", start) + 1] for start in starts]


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    for old, new in zip(current(text), tables(), strict=True):
        text = text.replace(old, new)
    PAGE.write_text(text, encoding="utf-8")
