"""Figures as SVG files: transparent, and with text in the colour of the page, light or dark.

A file records what it shows, so a test can tell that it is up to date whatever the version of matplotlib.
"""

from __future__ import annotations

import hashlib
import io
import json
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure

INK = "#010203"  # becomes currentColor
COLOURS = BLUE, ORANGE, GREEN, PURPLE, *_ = ("#2f86c8", "#d9822b", "#3a9d5d", "#b05fb8", "#b39b2d", "#5cb6c9")
"""Colours that are seen on a light page and on a dark one."""

STYLE = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    **dict.fromkeys(("axes.labelsize", "xtick.labelsize", "ytick.labelsize"), 10),
    "axes.titlesize": 11,
    "svg.fonttype": "none",
    "svg.hashsalt": "polysoftmax",
    "figure.constrained_layout.use": True,
}

# A file that is looked at by itself, as on a code host, follows the preference of the reader's system.
SCHEME = "<style>svg { color: #1f2328; } @media (prefers-color-scheme: dark) { svg { color: #e6edf3; } }</style>"


def draw(function: Callable[[], Figure]) -> str:
    """Return a figure as the text of an SVG file."""
    with mpl.rc_context(STYLE):
        figure = function()
        file = io.StringIO()
        metadata = {"Date": None, "Creator": None, "Description": digest(figure)}
        figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    head, _, rest = file.getvalue().replace(INK, "currentColor").partition("<metadata>")
    return "\n".join(line.rstrip() for line in f"{head}{SCHEME}<metadata>{rest}".splitlines()) + "\n"


def digest(figure: Figure) -> str:
    """Return a hash of the numbers and words of a figure, not of how matplotlib draws them."""
    shown: list[Any] = []
    for panel in figure.axes:
        words = [panel.get_title(), panel.get_xlabel(), panel.get_ylabel(), *(one.get_text() for one in panel.texts)]
        heights = [one.get_height() for one in panel.patches]
        curves = [one.get_xydata() for one in panel.lines]
        cells = [one.get_array() for one in panel.collections if one.get_array() is not None]
        numbers = [[round(float(one), 5) + 0.0 for one in np.ravel(values)] for values in (heights, *curves, *cells)]
        shown.append([words, numbers])
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()
