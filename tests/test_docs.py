"""Every Python block of the README and the guide runs, and prints what stands beneath it; what they name is there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import polysoftmax
from polysoftmax.testing import Backend, missing

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
IMPORT = re.compile(r"^(?:import|from) (jax|torch|cupy|dask|ndonnx)\b", re.MULTILINE)


class Block(NamedTuple):
    """A block of Python: the libraries that it imports beside NumPy, and what stands beneath it as its output."""

    code: str
    needed: frozenset[str]
    output: str


def blocks(page: Path) -> list[Block]:
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [Block(code, frozenset(IMPORT.findall(code)), output) for code, output in found]


def readers(page: Path) -> list[frozenset[str]]:
    """Return the sets of libraries that the blocks of a page ask for."""
    return sorted({block.needed for block in blocks(page)}, key=sorted)


PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
CHAPTERS = [ROOT / "docs" / "softmax.md", ROOT / "docs" / "softmax-ja.md"]
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
    with np.printoptions():  # a page may set its own
        for number, block in enumerate(blocks(page), start=1):
            if block.needed <= have:
                exec(compile(block.code, f"{page.name}, block {number}", "exec"), names)
                printed = capsys.readouterr().out
                assert block.output in ("", printed), f"{page.name}, block {number}"


@pytest.mark.parametrize("page", CHAPTERS, ids=lambda page: page.stem)
def test_every_block_of_a_chapter_shows_its_output(page: Path) -> None:
    assert [block.code for block in blocks(page) if not block.output] == []


def test_both_chapters_compute_the_same() -> None:
    """The text is written for its readers; the numbers beneath the blocks are the same."""
    english, japanese = ([re.findall(r"-?\d+\.\d*", one.output) for one in blocks(page)] for page in CHAPTERS)
    assert english == japanese


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


def headings(page: Path) -> list[str]:
    """Return the headings of a page as a code host, and the built guide, name them in addresses."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_heading_can_be_linked_to(page: Path) -> None:
    """No two headings of a page have one address, and links to headings lead to one."""
    names = headings(page)
    assert [one for one in set(names) if names.count(one) > 1] == []
    links = re.findall(r"\]\((?!https:)([^)#\s]*)#([^)\s]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if link[1] not in headings(page.parent / link[0] if link[0] else page)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_can_be_read_where_it_lies(page: Path) -> None:
    """A code host shows Markdown: no directive and no placeholder, and what a page links to is there."""
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https:)([^)#\s]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    directives = set(re.findall(r"^:::.*|^`{3,}\{([\w-]+)|\{\{", text, re.MULTILINE))
    assert directives <= {"api": {"eval-rst"}, "index": {"toctree"}}.get(page.stem, set())
