"""The table of backends in docs/backends.md, from what the tests go by: python docs/support.py writes it anew."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from polysoftmax.testing import CAPABILITIES, Backend

PAGE = Path(__file__).parent / "backends.md"
HEAD = "| backend, and how it is run | dtypes | derivatives |\n|---|---|---|\n"


def table() -> str:
    """Return the table: a row for each library, and in it a line for each way of running it."""
    by_library = groupby(sorted(Backend, key=_place_of_library), key=lambda backend: backend.library)
    return HEAD + "".join(_row(list(ways)) for _, ways in by_library)


def _place_of_library(backend: Backend) -> int:
    return [one.library for one in Backend].index(backend.library)


def _row(ways: list[Backend]) -> str:
    capabilities = [CAPABILITIES[one] for one in ways]
    lines = "<br>".join(f"`{one.value}`: {can.how}" for one, can in zip(ways, capabilities, strict=True))
    dtypes = [one for one in CAPABILITIES[Backend.NUMPY].dtypes if any(one in can.dtypes for can in capabilities)]
    return f"| {lines} | {', '.join(dtypes)} | {'yes' if any(can.autodiff for can in capabilities) else '–'} |\n"


def current(page: str) -> str:
    """Return the table that stands in the page."""
    start = page.index(HEAD)
    return page[start : page.index("\n\n", start) + 1]


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text.replace(current(text), table()), encoding="utf-8")
