"""Every Python block of the README and the guide runs; what they name is there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import polysoftmax
from polysoftmax.testing import Backend, missing

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
IMPORT = re.compile(r"^(?:import|from) (jax|torch|cupy|dask|ndonnx)\b", re.MULTILINE)

Block = tuple[str, frozenset[str]]


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page, each with the libraries that it imports beside NumPy."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [(block, frozenset(IMPORT.findall(block))) for block in found]


def readers(page: Path) -> list[frozenset[str]]:
    """Return the sets of libraries that the blocks of a page ask for."""
    return sorted({needed for _, needed in blocks(page)}, key=sorted)


PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
CASES = [
    pytest.param(page, have, id="-".join([page.stem, *sorted(have)]), marks=[pytest.mark.gpu] if "cupy" in have else [])
    for page in PAGES
    for have in readers(page)
]


@pytest.mark.parametrize(("page", "have"), CASES)
def test_blocks_run_for_those_who_have(page: Path, have: frozenset[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A reader with these libraries, and NumPy, runs down the page, past the blocks that need others."""
    if "ndonnx" in have:
        pytest.importorskip("ndonnx")
        pytest.importorskip("onnxruntime")
    for library in sorted(have - {"ndonnx"}):
        if reason := missing(Backend(library)):
            pytest.skip(reason)
    names: dict[str, object] = {}
    for number, (block, needed) in enumerate(blocks(page), start=1):
        if needed <= have:
            exec(compile(block, f"{page.name}, block {number}", "exec"), names)
    capsys.readouterr()


def test_the_reference_lists_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"auto(?:function|class|module):: (?:polysoftmax\.)?(\w+)$", text, re.MULTILINE)
    assert sorted(listed) == sorted({*polysoftmax.__all__, "testing"} - {"__version__"})


def test_the_readme_names_what_is_there() -> None:
    text = README.read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {one for names in re.findall(r"\.\[([\w,]+)\]", text) for one in names.split(",")}
    assert {"numpy", "cuda"} <= extras <= set(project["optional-dependencies"])
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"demo", "test", "test-quick"} <= set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE)) <= targets
    links = re.findall(r"\]\((?!https:)([^)#]+)", text)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
