"""Sphinx: the guide in Markdown, the reference from the docstrings. The built pages need no network."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))

import polysoftmax  # noqa: E402 (after the folder of the extensions)

project = "polysoftmax"
author = "The polysoftmax developers"
project_copyright = f"2026, {author}"
release = polysoftmax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "mathml", "inline_svg"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
default_role = "code"
autodoc_typehints = "none"
napoleon_google_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = "polysoftmax"
html_static_path = ["_static"]
html_css_files = ["guide.css"]
pygments_dark_style = "github-dark"  # without underlined names, which look like links


def setup(app):
    """Say which pages are in Japanese: browsers choose fonts, and screen readers a voice, by it."""
    app.connect("html-page-context", _set_language)


def _set_language(app, name, template, context, doctree):
    if name.endswith("-ja"):
        context["language"] = "ja"
