"""Which kernel runs a call, and how it is launched: from the formula, the types, shapes and alignment alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from polysoftmax._sampling import block_length
from polysoftmax.engines.cuda._layouts import (
    ALWAYS_GENERAL,
    FEW_PACKS,
    IN_GENERAL,
    KINDS,
    LARGEST_CLUSTER,
    MOST_THREADS,
    PROBABILITIES,
    REDUCTIONS,
    TWO_INPUTS,
    Layout,
    layouts,
    streamed,
)

SIZES: Final = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

FILTERS: Final = ("truncate", "sample_leading")


class Family(NamedTuple):
    """Kernels of one function of the source: the names of its parameters and its own."""

    parameters: str
    function: str


_ROWS: Final = Family("ROW", "run_rows")
_FAMILIES: Final = {
    "sample_masses": Family("MASS", "run_masses"),
    "sample_draw": Family("DRAW", "run_draw"),
    "sample_draw_leading": Family("LEADING", "run_leading"),
    "sample_leading": Family("FILTER", "run_filter"),
    "truncate": Family("FILTER", "run_filter"),
}

ANSWERS_SEVERAL: Final = frozenset({"sample_masses", "sample_leading"})
"""Formulas that answer a tuple."""

_C_TYPES: Final = {
    "float16": "polysoftmax::Half",
    "bfloat16": "polysoftmax::BFloat",
    "float32": "float",
    "float64": "double",
}

_SCRATCH = 2304
"""Bytes of shared memory for merging in one block, as merges.cuh says."""

_SLOT = 32
"""Bytes of shared memory that a warp's value takes in a merge, as merges.cuh says."""

_ROOM_FOR_MASSES = 16 << 10
"""Bytes of shared memory that the masses of blocks of tokens may take, as sample.cuh says."""

_LARGEST_SIZE = block_length(1 << 20)
"""Tokens of a block in long rows."""

_BINS = 2048
_LISTED = 2048
_BOARD = 320
MOST_LEADING: Final = 1024
"""Sums and tokens that fit the shared memory of a filter, bytes beside them, leading tokens, as truncate.cuh says."""

USUAL_SHARED: Final = 48 << 10
"""Bytes of shared memory that a block may have without asking."""

_SMALL_BLOCK = 128
"""Threads of a block that several short rows share."""

_SHORT = 128
"""Entries of a row that is not worth whole accesses."""

_LIGHT = 32
"""Registers that a thread may fill with its row and still do with 64."""


class Machine(NamedTuple):
    """What a layout depends on: multiprocessors, clusters of blocks, and the shared memory that a block may ask for."""

    processors: int
    clusters: bool
    shared: int = USUAL_SHARED


@dataclass(frozen=True)
class Kernel:
    """A specialisation: everything that is fixed when a kernel is compiled. See rows.cuh for the words.

    ``kind`` is the name of the formula, or of what formulas that share a kernel have in common. More ``threads`` than a
    warp has are all of a block, of up to ``block`` threads. ``lanes`` is 0 where the launch says how many.
    """

    kind: str
    x: str
    width: int
    threads: int
    block: int
    packs: int
    cluster: bool = False
    held: bool = True
    general: bool = False
    lanes: int = 0
    staged: bool = False

    @property
    def compute(self) -> str:
        """The dtype that it computes in."""
        return compute_of(self.x)

    @property
    def family(self) -> Family:
        """What its formula shares with others."""
        return _FAMILIES.get(self.kind, _ROWS)

    @property
    def name(self) -> str:
        """Name of the kernel, and of its file in the cache."""
        marks = {"cluster": self.cluster, "streamed": not self.held, "staged": self.staged, "general": self.general}
        layout = [f"w{self.width}", f"t{self.threads}", f"b{self.block}", f"p{self.packs}"]
        layout += [f"l{self.lanes}"] if self.lanes else []
        return "_".join([self.kind, self.x, *layout, *(mark for mark, is_on in marks.items() if is_on)])

    @property
    def resident(self) -> int:
        """Blocks that a multiprocessor has at once, at least: of its 65,536 registers, a thread has 64, or 128."""
        words = self.packs * self.width * SIZES[self.x] // 4 * (2 if self.kind in TWO_INPUTS else 1)
        # A division by the temperature takes more registers than a row, and so does a search.
        is_light = words <= _LIGHT and self.compute == "float32" and not (self.general or self.kind in FILTERS)
        return max(1, (1024 if is_light else 512) // self.block)

    @property
    def follows(self) -> bool:
        """Whether it waits for the launch before it, which lets it begin, and not the device."""
        return self.kind.startswith("sample_draw")

    def declaration(self) -> str:
        """Return the C++ type that tells a kernel what it is."""
        numbers = {"WIDTH": self.width, "THREADS": self.threads, "BLOCK": self.block, "PACKS": self.packs}
        numbers |= {"LANES": self.lanes}
        marks = {"CLUSTER": self.cluster, "HELD": self.held, "STAGED": self.staged, "GENERAL": self.general}
        lines = [
            f"using X = {_C_TYPES[self.x]};",
            f"using C = {_C_TYPES[self.compute]};",
            *(f"static constexpr int {name} = {value};" for name, value in numbers.items()),
            *(f"static constexpr bool {name} = {str(is_on).lower()};" for name, is_on in marks.items()),
        ]
        if self.family is _ROWS or self.kind in FILTERS:
            lines.append(f"static constexpr polysoftmax::Kind KIND = polysoftmax::{self.kind.upper()};")
        return f"struct S_{self.name} {{\n    " + "\n    ".join(lines) + "\n};\n"


class Plan(NamedTuple):
    """A launch: of which formula by which kernel, of how many clusters of blocks, with how much shared memory."""

    formula: str
    kernel: Kernel
    grid: int
    shared: int
    block: int
    cluster: int = 1
    staged: int = 0
    lanes: int = 0

    @property
    def layout(self) -> str:
        """The layout in words."""
        kernel = self.kernel
        if self.cluster > 1:
            team = f"a cluster of {self.cluster} blocks of {self.block} threads"
        elif kernel.threads > 32 or self.lanes:
            team = f"a block of {self.block} threads"
        else:
            team = f"{kernel.threads} lanes of a warp"
        kept = "" if kernel.held or kernel.kind == REDUCTIONS else ", read twice"
        kept = ", most of them in shared memory" if self.staged else kept
        width = "1 entry" if kernel.width == 1 else f"{kernel.width} entries"
        return f"{team} a row, {width} an access{kept}"


def answers(formula: str, x: str) -> tuple[str, ...]:
    """Return the dtypes that a formula answers rows of ``x`` in."""
    compute = compute_of(x)
    if formula in ("cross_entropy", "log_prob"):
        return (compute,)
    if formula.endswith("pullback"):
        return (x,) if x == compute else ()  # an answer that was rounded to 16 bits has not the digits
    return (x, compute) if x != compute and formula in _IN_FLOAT32 else (x,)


_IN_FLOAT32 = frozenset({"softmax", "log_softmax", "logsumexp", "entropy"})
"""What answers rows of 16 bits in float32 where that is asked for."""


def compute_of(x: str) -> str:
    """Return the dtype that rows of ``x`` are computed in."""
    return "float64" if x == "float64" else "float32"


def plan_rows(
    formula: str, x: str, y: str, rows: int, n: int, *, aligned: bool, general: bool, machine: Machine
) -> Plan:
    """Choose the layout of a row formula.

    ``aligned`` says that the arrays of a row share an alignment, so that whole accesses of one are those of the other.
    """
    kind = KINDS[formula]
    width = 16 // SIZES[x] if aligned and n > _SHORT and x != "float64" else 1
    widens = y != x and kind != REDUCTIONS
    general = general or width == 1 or widens or formula in ALWAYS_GENERAL
    layout = None if general else _held(layouts(kind, width=width, general=False), kind, rows, _over(n, width), machine)
    if layout is None and not (kind == REDUCTIONS and not general):
        # What few calls need, longer rows too, is asked of kernels that ask for everything.
        kind, general = IN_GENERAL.get(kind, kind), True
        layout = _held(layouts(kind, width=width, general=True), kind, rows, _over(n, width), machine)
    if layout is None:
        layout = _streamed(streamed(kind, width=width, general=general), rows, machine)
    block = _SMALL_BLOCK if layout.threads <= 32 else layout.threads
    kernel = Kernel(
        *(kind, x, width, *_threads_of(layout.threads)),
        packs=layout.packs,
        cluster=layout.cluster > 1,
        held=layout.held,
        general=general,
        staged=layout.cluster > 1 and kind == PROBABILITIES and not general,
    )
    grid = _over(rows, block // layout.threads)
    return Plan(formula, kernel, grid, _shared_of(layout), block, layout.cluster, layout.staged)


def _threads_of(threads: int) -> tuple[int, int]:
    """Return the threads that share a row, and the most of a block, of the kernel for rows of so many threads."""
    return (threads, _SMALL_BLOCK) if threads <= 32 else (MOST_THREADS, MOST_THREADS)


def _held(held: tuple[Layout, ...], kind: str, rows: int, units: int, machine: Machine) -> Layout | None:
    """Return the first layout that holds a row of so many accesses."""
    found = [
        one
        for one in held
        if one.capacity >= units and (machine.clusters or one.cluster == 1) and _shared_of(one) <= machine.shared
    ]
    # Few rows leave multiprocessors without work, unless each takes many blocks.
    if units >= MOST_THREADS * LARGEST_CLUSTER and LARGEST_CLUSTER * rows <= machine.processors:
        in_clusters = [one for one in found if one.cluster == LARGEST_CLUSTER and not one.staged]
        found = in_clusters if in_clusters or kind == REDUCTIONS else found
    return found[0] if found else None


def _streamed(choices: tuple[Layout, ...], rows: int, machine: Machine) -> Layout:
    """Return the layout of most blocks that leaves none of them without a multiprocessor for long."""
    *of_many_blocks, alone = choices
    for one in of_many_blocks:
        if machine.clusters and one.cluster * rows <= 4 * machine.processors:
            return one
    return alone


def _shared_of(layout: Layout) -> int:
    """Return the bytes of shared memory that a block takes: two merges, and what is staged."""
    return 2 * _slots(layout.threads, layout.cluster) + 16 * layout.threads * layout.staged


def plan_masses(x: str, rows: int, n: int, *, general: bool, machine: Machine) -> Plan | str:
    """Choose the layout of the masses of blocks of tokens, or say why there is none."""
    size = block_length(n)
    width, packs, lanes, is_long = 16 // SIZES[x], 2, 0, size == _LARGEST_SIZE
    if is_long:
        lanes = 16 if x == "float64" else 8
        packs = size // (lanes * width)
    elif size < packs * width:
        width = packs = 1
    of_a_block = size // (width * packs)
    count = _over(n, size)
    # For as many blocks of tokens as rows have that are cut into blocks of this size.
    threads = min(MOST_THREADS, max(32, size * of_a_block))
    groups = threads // of_a_block
    cluster = 1
    while machine.clusters and is_long and cluster < LARGEST_CLUSTER and count >= 2 * cluster * groups:
        enough = 2 * cluster * rows > machine.processors
        if enough and _masses_shared(count, cluster, threads, groups, x) <= USUAL_SHARED:
            break
        cluster *= 2
    shared = _masses_shared(count, cluster, threads, groups, x)
    if shared > USUAL_SHARED:
        return f"rows of {n} have more blocks of tokens than fit shared memory"
    general = general or not is_long or x == "float64"
    kernel = Kernel(
        "sample_masses", x, width, MOST_THREADS, MOST_THREADS, packs, cluster > 1, general=general, lanes=lanes
    )
    return Plan("sample_masses", kernel, rows, shared, threads, cluster, lanes=of_a_block)


def plan_draw(x: str, rows: int, n: int, *, general: bool, machine: Machine) -> Plan:
    """Choose the layout of a draw from given masses."""
    size = block_length(n)
    in_a_warp = max(size, _over(n, size)) <= 2 * 32
    # Blocks begin early, where there is room for them: many small ones would crowd on few multiprocessors.
    block = _SMALL_BLOCK if in_a_warp or rows >= 2 * machine.processors else MOST_THREADS
    kernel = Kernel(
        *("sample_draw", x, 1, *_threads_of(32 if in_a_warp else block), 1),
        general=general or in_a_warp or x == "float64",
    )
    return Plan("sample_draw", kernel, _over(rows, block // 32) if in_a_warp else rows, _SCRATCH, block)


def plan_filter(formula: str, x: str, rows: int, n: int, *, aligned: bool) -> Plan:
    """Choose the layout of a search for the tokens that filters leave.

    ``aligned`` says that whole accesses of a row are those of its answer.
    """
    is_double = x == "float64"
    width = 16 // SIZES[x] if aligned else 1
    is_short = aligned and n <= _SMALL_BLOCK * width * FEW_PACKS and not is_double
    threads = _SMALL_BLOCK if is_short else MOST_THREADS
    kernel = Kernel(formula, x, width, threads, threads, FEW_PACKS // 2 if is_double else FEW_PACKS)
    shared = _SCRATCH + 8 * _BINS + (4 + max(4, SIZES[x])) * _LISTED + _BOARD
    return Plan(formula, kernel, rows, shared, threads)


def plan_draw_leading(compute: str, rows: int, k: int) -> Plan:
    """Choose the layout of a draw from few tokens."""
    kernel = Kernel("sample_draw_leading", compute, 1, _SMALL_BLOCK, _SMALL_BLOCK, 1)
    return Plan("sample_draw_leading", kernel, rows, _SCRATCH + (2 * SIZES[compute] + 4) * k, _SMALL_BLOCK)


def _masses_shared(count: int, cluster: int, threads: int, groups: int, x: str) -> int:
    tops = _over(count, cluster * groups) * groups * SIZES[compute_of(x)]
    return _slots(threads, cluster) + (2 * tops if tops <= _ROOM_FOR_MASSES else tops)


def _slots(threads: int, cluster: int) -> int:
    """Return the bytes of shared memory that a merge takes."""
    return _SLOT * max(1, threads // 32) * cluster


def _over(m: int, n: int) -> int:
    return -(-m // n)
