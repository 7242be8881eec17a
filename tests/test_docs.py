"""Every Python block of the README and the guide runs; the reference lists every public name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import polysoftmax

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LIBRARIES = ("numpy", "jax", "torch", "matplotlib")


def blocks(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_blocks_run(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for number, block in enumerate(blocks(page)):
        for library in LIBRARIES:
            if f"import {library}" in block:
                pytest.importorskip(library)
        exec(compile(block, f"{page.name}, block {number + 1}", "exec"), names)
    capsys.readouterr()


def test_the_reference_lists_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"autofunction:: (\w+)", text)) | set(re.findall(r"automodule:: polysoftmax\.(\w+)", text))
    assert listed == set(polysoftmax.__all__) - {"__version__"}
