"""The layouts that rows are shared out in, and the kernels that serve them: few enough to compile and look at each.

A row takes the first layout that holds it. How many threads a block has and how many blocks a cluster is for the launch
to say, and a formula of few calls shares a kernel with others, so what costs a kernel is the number of accesses of a
thread. There are many where speed was asked for (rows of 16 and 32 bits, aligned, without a mask or a temperature), and
elsewhere what loses a part of it: float64, and rows without a common alignment.
"""

from __future__ import annotations

from typing import Final, NamedTuple

PROBABILITIES, REDUCTIONS, LOSS_SLOPES = "probabilities", "reductions", "loss_slopes"
PULLBACKS, SOFTMAX_PULLBACKS, LOG_SOFTMAX_PULLBACKS = "pullbacks", "softmax_pullbacks", "log_softmax_pullbacks"
"""Kinds of formulas: those of one kind share their kernels."""

KINDS: Final = {
    "softmax": PROBABILITIES,
    "log_softmax": PROBABILITIES,
    "logsumexp_slope": PROBABILITIES,
    "cross_entropy_slope": LOSS_SLOPES,
    "log_prob_slope": LOSS_SLOPES,
    "entropy_slope": PROBABILITIES,
    "logsumexp": REDUCTIONS,
    "cross_entropy": REDUCTIONS,
    "log_prob": REDUCTIONS,
    "entropy": REDUCTIONS,
    "softmax_vjp": SOFTMAX_PULLBACKS,
    "log_softmax_vjp": LOG_SOFTMAX_PULLBACKS,
    "softmax_pullback": SOFTMAX_PULLBACKS,
    "log_softmax_pullback": LOG_SOFTMAX_PULLBACKS,
}
"""The kind of each formula of rows, in the order in which rows.cuh numbers them."""

IN_GENERAL: Final = {
    LOSS_SLOPES: PROBABILITIES,
    SOFTMAX_PULLBACKS: PULLBACKS,
    LOG_SOFTMAX_PULLBACKS: PULLBACKS,
}
"""The kind whose general kernels serve another, too."""

TWO_INPUTS: Final = frozenset({PULLBACKS, SOFTMAX_PULLBACKS, LOG_SOFTMAX_PULLBACKS})

ALWAYS_GENERAL: Final = frozenset({"log_prob", "entropy", "entropy_slope"})
"""Formulas of few calls, for which only the kernels have room that serve masks and temperatures, too."""

FEW_PACKS: Final = 4
"""Accesses under way that hide the latency of memory."""

MOST_THREADS: Final = 512
"""Threads of a block: more would have fewer than 128 registers each."""

LARGEST_CLUSTER: Final = 8
"""Blocks of a cluster that every device with clusters can hold."""


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


def _blocks(packs: int) -> tuple[Layout, ...]:
    return tuple(Layout(threads, packs) for threads in (64, 128, 256, 512))


_IN_A_CLUSTER = Layout(512, 4, 8)

# Registers alone hold as much as these only in large blocks, two to a multiprocessor: in clusters, these wait for each
# other. Where shared memory takes most of a long row, small blocks leave room for several.
_STAGED = (
    *(Layout(256, 4, 2, 12), Layout(256, 4, 4, 12)),
    *(Layout(256, 4, 8, 8), Layout(256, 4, 8, 12), Layout(512, 4, 8, 12)),
)

_TWO_INPUTS = (Layout(32, 4), *_blocks(2)[1:], Layout(512, 4), Layout(512, 4, 2), _IN_A_CLUSTER)

_USUAL: Final = {
    PROBABILITIES: (
        *(Layout(16, 2), Layout(32, 2), Layout(32, 4)),
        *(*_blocks(4), Layout(512, 8), *_STAGED, _IN_A_CLUSTER),
    ),
    # What reads only, and has no answer of that size to write, is done sooner with fewer threads and more under way.
    REDUCTIONS: (Layout(16, 2), Layout(32, 4), *_blocks(8), Layout(512, 16)),
    # In a cluster, and with 8 accesses, a thread has more than its 64 registers to keep.
    LOSS_SLOPES: (Layout(32, 4), *_blocks(4), Layout(512, 8), Layout(512, 4, 4), _IN_A_CLUSTER),
    **dict.fromkeys((SOFTMAX_PULLBACKS, LOG_SOFTMAX_PULLBACKS), _TWO_INPUTS),
}
"""Rows of 16 and 32 bits in whole accesses."""

_GENERAL: Final = {
    PROBABILITIES: (Layout(32, 4), *_blocks(4), _IN_A_CLUSTER),
    REDUCTIONS: (Layout(32, 4), *_blocks(4)),
    PULLBACKS: (Layout(32, 4), *_blocks(2)),
}
"""The same with a mask or a temperature: beside a row of many accesses a thread has no registers for them."""

_NARROW: Final = Layout(32, 4)
"""Rows of single entries: short ones, and those whose operands do not share an alignment."""

_SHORTEST: Final = Layout(4, 1)
"""Several rows in a warp."""


def layouts(kind: str, *, width: int, general: bool) -> tuple[Layout, ...]:
    """Return the layouts that hold a row of accesses of ``width`` entries, in the order of choice."""
    if width == 1:
        return (_NARROW,) if kind == PULLBACKS else (_SHORTEST, _NARROW)
    return (_GENERAL if general else _USUAL)[kind]


def streamed(kind: str, *, width: int, general: bool) -> tuple[Layout, ...]:
    """Return the layouts for a row that none holds, those of most blocks first."""
    packs = FEW_PACKS >> (kind == PULLBACKS)
    clusters: tuple[int, ...] = (1,)
    if width > 1 and kind == PROBABILITIES:
        clusters = (8, 1)
    elif width > 1 and kind == REDUCTIONS and not general:
        clusters = (8, 2, 1)
    return tuple(Layout(512, packs, cluster, held=False) for cluster in clusters)
