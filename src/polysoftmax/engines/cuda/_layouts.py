"""The layouts that rows are shared out in: few enough to compile them all, and to look at each.

A row takes the first layout that holds it. Each costs a kernel for every dtype of a formula, so there are many where
speed was asked for (softmax and log_softmax of 16 and 32 bits, aligned, without a mask or a temperature), and elsewhere
what loses a part of it: float64, rows without a common alignment, and answers in float32 from rows of 16 bits.
"""

from __future__ import annotations

from typing import Final, NamedTuple

TWO_INPUTS: Final = frozenset({"softmax_vjp", "log_softmax_vjp", "softmax_pullback", "log_softmax_pullback"})
REDUCTIONS: Final = frozenset({"logsumexp", "cross_entropy"})
LOSSES: Final = frozenset({"cross_entropy", "cross_entropy_slope"})

FEW_PACKS: Final = 4
"""Accesses under way that hide the latency of memory."""


class Layout(NamedTuple):
    """How a row is shared out; see rows.cuh for the words."""

    threads: int
    packs: int
    cluster: int = 1
    staged: int = 0
    held: bool = True

    @property
    def capacity(self) -> int:
        """Accesses that it holds."""
        return self.threads * self.cluster * (self.packs + self.staged)


_OF_A_WARP = (Layout(16, 2), Layout(32, 2), Layout(32, 4))
_OF_A_BLOCK = tuple(Layout(threads, 4) for threads in (64, 128, 256, 512))
_IN_A_CLUSTER = (Layout(512, 4, 8),)

# Registers alone hold as much as these only in large blocks, two to a multiprocessor: in clusters, these wait for each
# other. Where shared memory takes most of a long row, small blocks leave room for several.
_STAGED = (
    *(Layout(256, 4, 2, 12), Layout(256, 4, 4, 12)),
    *(Layout(256, 4, 8, 8), Layout(256, 4, 8, 12), Layout(512, 4, 8, 12)),
)

# What reads only, and has no answer of that size to write, is done sooner with fewer threads and more under way.
_READING = (*(Layout(threads, 8) for threads in (64, 128, 256, 512)), Layout(512, 16))

# In a cluster, and with 8 accesses, a thread has more than its 64 registers to keep.
_SLOPE_OF_A_LOSS = (*_OF_A_BLOCK, Layout(512, 8), Layout(512, 4, 4), Layout(512, 4, 8))
_TWO_INPUTS = (
    *(Layout(32, 4), Layout(128, 2), Layout(256, 2), Layout(512, 2)),
    *(Layout(512, 4), Layout(512, 4, 2), Layout(512, 4, 8)),
)

_USUAL: Final = {
    "softmax": (*_OF_A_WARP, *_OF_A_BLOCK, Layout(512, 8), *_STAGED, *_IN_A_CLUSTER),
    "log_softmax": (*_OF_A_WARP, *_OF_A_BLOCK, Layout(512, 8), *_STAGED, *_IN_A_CLUSTER),
    "logsumexp": (*_OF_A_WARP, *_READING),
    "cross_entropy": (Layout(32, 4), *_READING),
    "cross_entropy_slope": (Layout(32, 4), *_SLOPE_OF_A_LOSS),
    **dict.fromkeys(TWO_INPUTS, _TWO_INPUTS),
}
"""Rows of 16 and 32 bits in whole accesses."""

_GENERAL: Final = {
    "softmax": (Layout(32, 4), *_OF_A_BLOCK, *_IN_A_CLUSTER),
    "log_softmax": (Layout(32, 4), *_OF_A_BLOCK, *_IN_A_CLUSTER),
    "logsumexp": (Layout(32, 4), Layout(128, 4)),
    **dict.fromkeys(TWO_INPUTS, (Layout(32, 4), Layout(512, 2))),
}
"""The same with a mask or a temperature: beside a row of many accesses a thread has no registers for them."""

_WIDENED: Final = {
    "softmax": (Layout(32, 4), Layout(512, 4)),
    "log_softmax": (Layout(32, 4), Layout(512, 4)),
    "logsumexp": (Layout(32, 4),),
}
"""Rows of 16 bits that are answered in float32."""

_NARROW: Final = (Layout(32, 2), Layout(32, 4))
"""Rows of single entries: short ones, and those whose operands do not share an alignment."""

_SHORTEST: Final = Layout(4, 1)
"""Several rows in a warp."""


def layouts(formula: str, *, width: int, general: bool, widened: bool) -> tuple[Layout, ...]:
    """Return the layouts that hold a row of accesses of ``width`` entries, in the order of choice."""
    if width == 1:
        has_shortest = not (widened or formula in LOSSES or formula in TWO_INPUTS)
        return (_SHORTEST, *_NARROW) if has_shortest else _NARROW
    return (_WIDENED if widened else _GENERAL if general else _USUAL)[formula]


def streamed(formula: str) -> tuple[Layout, ...]:
    """Return the layouts for a row that none holds, those of most blocks first."""
    packs = FEW_PACKS >> (formula in TWO_INPUTS)
    clusters = (8, 2, 1) if formula in REDUCTIONS else (8, 1) if formula in _GENERAL and packs == FEW_PACKS else (1,)
    return tuple(Layout(512, packs, cluster, held=False) for cluster in clusters)
