"""The guide's pictures, table, formulas and sliders: up to date, and shown without a network."""

from __future__ import annotations

import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest

import polysoftmax
from benchmarks import newest_results

DOCS = Path(__file__).parents[1] / "docs"
MATH = re.compile(r"\$\$(.+?)\$\$|\$([^$\s](?:[^$]*[^$\s])?)\$", re.DOTALL)
CODE = re.compile(r"^```.*?^```$|`[^`]*`", re.MULTILINE | re.DOTALL)


def load(name: str) -> Any:
    """Import a module of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{Path(name).stem}", DOCS / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_figures_are_up_to_date() -> None:
    figures = load("figures.py")
    from benchmarks.svg import digest

    drawn = {one.__name__: digest(one()) for one in figures.FIGURES}
    kept = {file.stem: file.read_text(encoding="utf-8") for file in figures.FOLDER.glob("*.svg")}
    assert set(kept) == set(drawn)
    assert [name for name in drawn if drawn[name] not in kept[name]] == [], "run: make figures"
    assert [name for name in kept if "currentColor" not in kept[name]] == []


def test_tables_are_up_to_date() -> None:
    tables = load("tables.py")
    assert [one.page.name for one in tables.TABLES if one.current() != one.make()] == [], "run: make figures"


def test_the_page_on_errors_names_its_results() -> None:
    page = (DOCS / "accuracy.md").read_text(encoding="utf-8").replace("\n", " ")
    found = newest_results("accuracy")
    assert f"benchmarks/results/{found['date']}-accuracy" in page
    assert f"on an {found['machine']['cpu']} with AVX-512 on {found['date']}:" in page


def formulas() -> list[str]:
    """Return every formula of the guide and of the docstrings of public functions."""
    pages = [CODE.sub("", page.read_text(encoding="utf-8")) for page in sorted(DOCS.glob("*.md"))]
    found = [block or inline for page in pages for block, inline in MATH.findall(page)]
    public = [getattr(polysoftmax, name) for name in polysoftmax.__all__]
    docs = [inspect.getdoc(one) or "" for one in public]
    return found + [one for doc in docs for one in re.findall(r"^\.\. math:: ((?:.+\n?)+)", doc, re.MULTILINE)]


def test_every_formula_becomes_mathml() -> None:
    pytest.importorskip("math_core")
    mathml = load("_ext/mathml.py").mathml
    found = formulas()
    assert len(found) > 100
    for formula in found:
        assert mathml(formula, block=True).startswith("<math"), formula


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Build a page with the guide's settings, and return its HTML."""
    for name in ("furo", "math_core", "myst_parser", "sphinx"):
        pytest.importorskip(name)
    source = tmp_path_factory.mktemp("guide")
    for name in ("conf.py", "_ext", "_static", "figures"):
        (source / name).symlink_to(DOCS / name)
    lines = (
        "# A page\n\nThe sum $\\sum_i x_i$.\n\n$$y = \\frac{1}{2}$$\n\n![Some bars](figures/steps.svg)\n",
        "![More bars](figures/emphasis.svg)\n\n```{eval-rst}\n.. autofunction:: polysoftmax.softmax\n```\n",
    )
    (source / "index.md").write_text("\n".join(lines), encoding="utf-8")
    run = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", str(source), str(source / "html")]
    done = subprocess.run(run, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return (source / "html" / "index.html").read_text(encoding="utf-8")


def test_pages_need_no_network(built: str) -> None:
    loaded = re.findall(r"<(?:script|img|source|iframe)\b[^>]*\bsrc=\"([^\"]+)|<link\b[^>]*\bhref=\"([^\"]+)", built)
    assert loaded
    assert [one for one in loaded if re.match(r"(?:https?:)?//", "".join(one))] == []


def test_formulas_are_mathml(built: str) -> None:
    """Inline, in a block, and in a docstring."""
    assert built.count("<math") == 3
    assert "\\frac" not in built


def test_figures_are_part_of_the_page(built: str) -> None:
    figures = re.findall(r'<svg class="figure" role="img" aria-label="([^"]+)".*?</svg>', built, re.DOTALL)
    assert figures == ["Some bars", "More bars"]
    names = re.findall(r'\bid="([^"]+)"', built)
    assert sorted(names) == sorted(set(names))


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium to run the sliders in")
    return found


PAGE = """<!doctype html><meta charset="utf-8">
<div class="sliders" data-logits="0 2 1 3 -1" data-temperature="1">without JavaScript</div>
<script src="{script}"></script>
<script>{then}</script>
"""


@pytest.mark.parametrize(
    ("address", "then", "logits", "temperature"),
    [
        ("", "", [0, 2, 1, 3, -1], 1),
        ("#T=0&x=3,1,3", "", [3, 1, 3], 0),
        ("#T=0.05&x=5,-5,4.9", "", [5, -5, 4.9], 0.05),
        ("#x=1,2,3", "move(0, 0)", [1, 2, 3], 0),
        ("#x=1,2,3", "move(0, 2); move(3, -4)", [1, 2, -4], 2),
    ],
    ids=["as it begins", "ties", "address", "T to 0", "moved"],
)
def test_sliders_show_the_softmax(
    address: str, then: str, logits: list[float], temperature: float, chromium: str, tmp_path: Path
) -> None:
    move = """function move(place, value) {
        const input = document.querySelectorAll("input")[place];
        input.value = value;
        input.dispatchEvent(new Event("input", { bubbles: true }));
    } """
    page = tmp_path / "page.html"
    script = (DOCS / "_static" / "sliders.js").as_uri()
    page.write_text(PAGE.format(script=script, then=move + then), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    run = [chromium, *flags, page.as_uri() + quote(address, safe="#=&,.")]
    done = subprocess.run(run, check=True, capture_output=True, text=True, timeout=120)
    shown = re.findall(r'class="probability">([\d.]+)<', done.stdout)
    expected = polysoftmax.softmax(np.asarray(logits, dtype=float), temperature=temperature)
    assert [float(one) for one in shown] == pytest.approx(expected.tolist(), abs=6e-5)
    assert "without JavaScript" not in done.stdout


def test_the_table_for_readers_without_javascript_is_right() -> None:
    text = (DOCS / "sliders.md").read_text(encoding="utf-8")
    logits, shown = (
        [float(one) for one in re.findall(r"-?[\d.]+", line)]
        for line in re.findall(r"^\| (?:logit|probability) \|(.+)$", text, re.MULTILINE)
    )
    assert 'data-logits="' + " ".join(f"{one:g}" for one in logits) + '"' in text
    assert shown == polysoftmax.softmax(np.asarray(logits)).round(4).tolist()
