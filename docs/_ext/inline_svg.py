"""Sphinx: a figure of the guide becomes part of its page, where `currentColor` is that of the text in either theme."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes
from sphinx.transforms import SphinxTransform

if TYPE_CHECKING:
    from sphinx.application import Sphinx


def inlined(svg: str, name: str, alt: str) -> str:
    """Return an SVG file as an element of a page that may hold others."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(style|metadata)\b.*?</\1>", "", svg, flags=re.DOTALL)  # rules for the file alone, not for a page
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return svg.replace("<svg", f'<svg class="figure" role="img" aria-label="{html.escape(alt)}"', 1)


class InlineFigures(SphinxTransform):
    """Replace the images that are SVG files of this project."""

    default_priority = 500

    def apply(self, **kwargs: Any) -> None:
        """Replace them in one document."""
        del kwargs
        for node in list(self.document.findall(nodes.image)):
            path = Path(self.env.doc2path(self.env.docname)).parent / node["uri"]
            if path.suffix == ".svg":
                self.env.note_dependency(str(path))
                figure = inlined(path.read_text(encoding="utf-8"), path.stem, node.get("alt", ""))
                node.replace_self(nodes.raw("", figure, format="html"))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the transform."""
    app.add_transform(InlineFigures)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
