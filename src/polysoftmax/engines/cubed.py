"""Cubed: formulas become a plan whose tasks keep to a bound of memory, whether rows are whole in a chunk or not."""

from __future__ import annotations

from polysoftmax.engines._chunked import ChunkedOps


class CubedOps(ChunkedOps):
    """The words of Cubed, which has no sort."""

    no_order = (
        "Cubed cannot order rows, as top_k and top_p need: compute the logits first, "
        "and pass the NumPy array that logits.compute() returns"
    )
