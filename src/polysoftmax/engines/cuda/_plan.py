"""Which kernel runs a call: the types, the formula and the layout, from shapes and alignment alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from polysoftmax._sampling import block_length
from polysoftmax.engines.cuda._layouts import (
    FEW_PACKS,
    LOSSES,
    REDUCTIONS,
    TWO_INPUTS,
    Layout,
    layouts,
    streamed,
)

SIZES: Final = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

ROW_FORMULAS: Final = (
    "softmax",
    "log_softmax",
    "logsumexp",
    "softmax_vjp",
    "log_softmax_vjp",
    "softmax_pullback",
    "log_softmax_pullback",
    "cross_entropy",
    "cross_entropy_slope",
)
FILTERS: Final = ("truncate", "sample_leading")


class Family(NamedTuple):
    """Kernels of one function of the source: the names of its parameters and its own, and what a call answers."""

    parameters: str
    function: str
    is_tuple: bool


_ROWS: Final = Family("ROW", "run_rows", is_tuple=False)
_FAMILIES: Final = {
    "sample_masses": Family("MASS", "run_masses", is_tuple=True),
    "sample_draw": Family("DRAW", "run_draw", is_tuple=False),
    "sample_draw_leading": Family("LEADING", "run_leading", is_tuple=False),
    "sample_leading": Family("FILTER", "run_filter", is_tuple=True),
    "truncate": Family("FILTER", "run_filter", is_tuple=False),
}

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

_LARGEST_CLUSTER = 8
"""Blocks of a cluster that every device with clusters can hold."""

_SMALL_BLOCK = 128
"""Threads of a block that several short rows share."""

_SHORT = 128
"""Entries of a row that is not worth whole accesses."""

_MOST_THREADS = 512
"""Threads of a block: more would have fewer than 128 registers each."""

_LIGHT = 32
"""Registers that a thread may fill with its row and still do with 64."""


class Machine(NamedTuple):
    """What a layout depends on: multiprocessors, clusters of blocks, and the shared memory that a block may ask for."""

    processors: int
    clusters: bool
    shared: int = USUAL_SHARED


@dataclass(frozen=True)
class Kernel:
    """A specialisation: everything that is fixed when a kernel is compiled. See rows.cuh for the words."""

    formula: str
    x: str
    y: str
    compute: str
    width: int
    threads: int
    block: int
    packs: int
    cluster: int = 1
    held: bool = True
    general: bool = False
    lanes: int = 0
    staged: int = 0

    @property
    def family(self) -> Family:
        """What its formula shares with others."""
        return _FAMILIES.get(self.formula, _ROWS)

    @property
    def name(self) -> str:
        """Name of the kernel, and of its file in the cache."""
        how = f"l{self.lanes}" if self.lanes else ("held" if self.held else "streamed")
        how += f"_s{self.staged}" if self.staged else ""
        layout = f"w{self.width}_t{self.threads}_b{self.block}_p{self.packs}_c{self.cluster}_{how}{'_g' * self.general}"
        return f"{self.formula}_{self.x}_{self.y}_{self.compute}_{layout}"

    @property
    def resident(self) -> int:
        """Blocks that a multiprocessor has at once, at least: of its 65,536 registers, a thread has 64, or 128."""
        words = self.packs * self.width * SIZES[self.x] // 4 * (2 if self.formula in TWO_INPUTS else 1)
        # A division by the temperature takes more registers than a row, and so does a search.
        is_light = words <= _LIGHT and self.compute == "float32" and not (self.general or self.formula in FILTERS)
        return max(1, (1024 if is_light else 512) // self.block)

    @property
    def follows(self) -> bool:
        """Whether it waits for the launch before it, which lets it begin, and not the device."""
        return self.formula.startswith("sample_draw")

    @property
    def layout(self) -> str:
        """The layout in words."""
        if self.cluster > 1:
            team = f"a cluster of {self.cluster} blocks of {self.threads} threads"
        elif self.threads > 32 or self.lanes:
            team = f"a block of {self.threads} threads"
        else:
            team = f"{self.threads} lanes of a warp"
        kept = "" if self.held or self.formula in REDUCTIONS else ", read twice"
        kept = ", most of them in shared memory" if self.staged else kept
        width = "1 entry" if self.width == 1 else f"{self.width} entries"
        return f"{team} a row, {width} an access{kept}"

    def declaration(self) -> str:
        """Return the C++ type that tells a kernel what it is."""
        numbers = {"WIDTH": self.width, "THREADS": self.threads, "BLOCK": self.block, "PACKS": self.packs}
        numbers |= {"CLUSTER": self.cluster, "LANES": self.lanes, "STAGED": self.staged}
        lines = [
            f"using X = {_C_TYPES[self.x]};",
            f"using Y = {_C_TYPES[self.y]};",
            f"using C = {_C_TYPES[self.compute]};",
            *(f"static constexpr int {name} = {value};" for name, value in numbers.items()),
            f"static constexpr bool HELD = {str(self.held).lower()}, GENERAL = {str(self.general).lower()};",
        ]
        if self.formula in (*ROW_FORMULAS, *FILTERS):
            lines.append(f"static constexpr polysoftmax::Formula FORMULA = polysoftmax::{self.formula.upper()};")
        return f"struct S_{self.name} {{\n    " + "\n    ".join(lines) + "\n};\n"


class Plan(NamedTuple):
    """A kernel, and how many clusters of it to launch with how much shared memory."""

    kernel: Kernel
    grid: int
    shared: int


def answers(formula: str, x: str) -> tuple[str, ...]:
    """Return the dtypes that a formula answers rows of ``x`` in."""
    compute = compute_of(x)
    if formula == "cross_entropy":
        return (compute,)
    if formula.endswith("pullback"):
        return (x,) if x == compute else ()  # an answer that was rounded to 16 bits has not the digits
    return (x, compute) if x != compute and formula in _IN_FLOAT32 else (x,)


_IN_FLOAT32 = frozenset({"softmax", "log_softmax", "logsumexp"})
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
    width = 16 // SIZES[x] if aligned and n > _SHORT and x != "float64" else 1
    # Kernels that ask for a mask and a temperature serve calls without them, too, where a kernel less is worth more.
    widened = formula in _IN_FLOAT32 and x != y
    general = formula not in LOSSES and (general or width == 1 or widened)
    held = layouts(formula, width=width, general=general, widened=widened)
    layout = _layout_of(formula, held, width, general, rows, _over(n, width), machine)
    block = max(layout.threads, _SMALL_BLOCK) if layout.threads <= 32 else layout.threads
    kernel = Kernel(
        *(formula, x, y, compute_of(x), width, layout.threads, block, layout.packs, layout.cluster, layout.held),
        general=general,
        staged=layout.staged,
    )
    return Plan(kernel, _over(rows, block // layout.threads), _shared_of(layout))


def _layout_of(
    formula: str, held: tuple[Layout, ...], width: int, general: bool, rows: int, units: int, machine: Machine
) -> Layout:
    """Return the first layout that holds a row of so many accesses, or one that streams it."""
    found = [
        one
        for one in held
        if one.capacity >= units and (machine.clusters or one.cluster == 1) and _shared_of(one) <= machine.shared
    ]
    # Few rows leave multiprocessors without work, unless each takes many blocks.
    if units >= _MOST_THREADS * _LARGEST_CLUSTER and _LARGEST_CLUSTER * rows <= machine.processors:
        in_clusters = [one for one in found if one.cluster == _LARGEST_CLUSTER and not one.staged]
        found = in_clusters if in_clusters or formula in REDUCTIONS else found
    if found:
        return found[0]
    *of_many_blocks, alone = streamed(formula)
    for one in of_many_blocks:
        if machine.clusters and width > 1 and not general and one.cluster * rows <= 4 * machine.processors:
            return one
    return alone


def _shared_of(layout: Layout) -> int:
    """Return the bytes of shared memory that a block takes: two merges, and what is staged."""
    return 2 * _slots(layout.threads, layout.cluster) + 16 * layout.threads * layout.staged


def plan_masses(x: str, rows: int, n: int, *, general: bool, machine: Machine) -> Plan | str:
    """Choose the layout of the masses of blocks of tokens, or say why there is none."""
    compute = compute_of(x)
    size = block_length(n)
    width = 16 // SIZES[x]
    if size < width:
        width = 1
    lanes = min(size // width, 16 if compute == "float64" else 8)
    packs = size // (lanes * width)
    count = _over(n, size)
    # For as many blocks of tokens as rows have that are cut into blocks of this size.
    threads = min(_MOST_THREADS, max(32, size * lanes))
    groups = threads // lanes
    cluster = 1
    while machine.clusters and size == _LARGEST_SIZE and cluster < _LARGEST_CLUSTER and count >= 2 * cluster * groups:
        enough = 2 * cluster * rows > machine.processors
        if enough and _masses_shared(count, cluster, threads, groups, compute) <= USUAL_SHARED:
            break
        cluster *= 2
    shared = _masses_shared(count, cluster, threads, groups, compute)
    if shared > USUAL_SHARED:
        return f"rows of {n} have more blocks of tokens than fit shared memory"
    general = general or size < _LARGEST_SIZE or compute == "float64"
    kernel = Kernel("sample_masses", x, compute, compute, width, threads, threads, packs, cluster, True, general, lanes)
    return Plan(kernel, rows, shared)


def plan_draw(x: str, rows: int, n: int, *, general: bool, machine: Machine) -> Plan:
    """Choose the layout of a draw from given masses."""
    compute = compute_of(x)
    size = block_length(n)
    threads = 32 if max(size, _over(n, size)) <= 2 * 32 else _SMALL_BLOCK
    # Blocks begin early, where there is room for them: many small ones would crowd on few multiprocessors.
    if threads == _SMALL_BLOCK and rows < 2 * machine.processors:
        threads = _MOST_THREADS
    block = max(threads, _SMALL_BLOCK)
    general = general or threads < _SMALL_BLOCK or compute == "float64"
    kernel = Kernel("sample_draw", x, compute, compute, 1, threads, block, 1, general=general)
    return Plan(kernel, _over(rows, block // threads), _SCRATCH)


def plan_filter(formula: str, x: str, rows: int, n: int, *, aligned: bool) -> Plan:
    """Choose the layout of a search for the tokens that filters leave.

    ``aligned`` says that whole accesses of a row are those of its answer.
    """
    compute = compute_of(x)
    width = 16 // SIZES[x] if aligned else 1
    is_short = aligned and n <= _SMALL_BLOCK * width * FEW_PACKS and compute == "float32"
    threads = _SMALL_BLOCK if is_short else _MOST_THREADS
    y = compute if formula == "sample_leading" else x
    packs = FEW_PACKS if compute == "float32" else FEW_PACKS // 2
    kernel = Kernel(formula, x, y, compute, width, threads, threads, packs)
    return Plan(kernel, rows, _SCRATCH + 8 * _BINS + (4 + max(4, SIZES[x])) * _LISTED + _BOARD)


def plan_draw_leading(compute: str, rows: int, k: int) -> Plan:
    """Choose the layout of a draw from few tokens."""
    kernel = Kernel("sample_draw_leading", compute, compute, compute, 1, _SMALL_BLOCK, _SMALL_BLOCK, 1)
    return Plan(kernel, rows, _SCRATCH + (2 * SIZES[compute] + 4) * k)


def _masses_shared(count: int, cluster: int, threads: int, groups: int, compute: str) -> int:
    tops = _over(count, cluster * groups) * groups * SIZES[compute]
    return _slots(threads, cluster) + (2 * tops if tops <= _ROOM_FOR_MASSES else tops)


def _slots(threads: int, cluster: int) -> int:
    """Return the bytes of shared memory that a merge takes."""
    return _SLOT * max(1, threads // 32) * cluster


def _over(m: int, n: int) -> int:
    return -(-m // n)


def _power(n: int) -> int:
    """Return the least power of two that is not below n."""
    return 1 << (n - 1).bit_length()
