"""The guide: MyST pages, and a reference made from the docstrings."""

import polysoftmax

project = "polysoftmax"
author = "The polysoftmax developers"
project_copyright = f"2026, {author}"
release = polysoftmax.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "polysoftmax"
nitpicky = False
default_role = "code"
autodoc_typehints = "none"
napoleon_google_docstring = False
napoleon_use_rtype = False


def setup(app):
    """Write the table of backends from the capabilities that the tests go by."""
    app.connect("source-read", _fill_in_backends)


def _fill_in_backends(app, name, source):
    if name == "backends":
        source[0] = source[0].replace("{{ capabilities }}", _capabilities())


def _capabilities():
    from polysoftmax.testing import CAPABILITIES

    rows = ["| backend | runs | dtypes | derivatives | nothing computed early |", "|---|---|---|---|---|"]
    for backend, can in CAPABILITIES.items():
        dtypes = ", ".join(can.dtypes)
        rows.append(
            f"| `{backend.value}` | {can.how} | {dtypes} | {'yes' if can.autodiff else '–'} | {'yes' if can.lazy else '–'} |"
        )
    return "\n".join(rows)
