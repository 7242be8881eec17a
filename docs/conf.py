"""Sphinx: the guide in Markdown, the reference from the docstrings, figures and the table of backends made anew."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import figures  # noqa: E402 (it stands beside this file)

import polysoftmax  # noqa: E402
from polysoftmax.testing import CAPABILITIES  # noqa: E402

project = "polysoftmax"
author = "The polysoftmax developers"
project_copyright = f"2026, {author}"
release = polysoftmax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "polysoftmax"
default_role = "code"
autodoc_typehints = "none"
napoleon_google_docstring = False
napoleon_use_rtype = False


def setup(app):
    """Draw the figures, and write the table of backends from what the tests go by."""
    app.connect("builder-inited", lambda app: figures.draw_all(HERE / "_build" / "figures"))
    app.connect("source-read", _fill_in_backends)


def _fill_in_backends(app, name, source):
    if name == "backends":
        source[0] = source[0].replace("{{ capabilities }}", _capabilities())


def _capabilities():
    rows = ["| backend | runs | dtypes | derivatives |", "|---|---|---|---|"]
    for backend, can in CAPABILITIES.items():
        derivatives = "yes" if can.autodiff else "–"
        rows.append(f"| `{backend.value}` | {can.how} | {', '.join(can.dtypes)} | {derivatives} |")
    return "\n".join(rows)
