"""What the CUDA kernels of a table of calls come to, without a GPU: instructions an entry, registers, accesses, blocks.

    python tools/cuda_instructions.py --nvdisasm FOLDER > table.md

The compiler is the NVRTC of the project, or that of ``--nvrtc FOLDER``. The disassembler is nvdisasm, in the path or in
the folder where ``pip install --target FOLDER nvidia-cuda-nvdisasm`` has put it.

How instructions are counted: in the disassembled code of one thread, up to its end, without the subroutines behind it.
What is unrolled counts as it stands, and a loop over accesses as often as it runs; that is divided by the entries that
the thread has of a row that fills the layout. A row that is read in chunks counts its loops alone. Left out are the
second look at rows that are close to their maximum, entries outside whole accesses, masks, and what the kernel has for
other formulas. All other branches count, those too that a whole row does not take, so the figures are above what is
executed.

The predicted share of the bandwidth of a copy is what 80 % of the instructions that a multiprocessor can issue, and all
the exponentials that it can compute, leave of it. It does not know of latencies.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from polysoftmax.engines.cuda import _compile, _source  # noqa: E402
from polysoftmax.engines.cuda._layouts import KINDS, REDUCTIONS  # noqa: E402
from polysoftmax.engines.cuda._plan import SIZES, Machine, Plan, answers, plan_masses, plan_rows  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from polysoftmax.engines.cuda._plan import Kernel

LENGTHS = (256, 1024, 4096, 32_768, 131_072, 262_144)
FORMULAS = ("softmax", "log_softmax", "logsumexp", "cross_entropy", "sample_masses")
DTYPES = ("bfloat16", "float32")
BYTES = 1 << 27
"""Of the rows of a call, as in the benchmarks: so many that clusters do not grow."""

ISSUE = 0.8
_REGISTERS, _THREADS, _BLOCKS, _SHARED = 65_536, 2048, 32, 228 << 10
"""What a multiprocessor has, of compute capability 9.0 and 10.0."""

_RESERVED = 1 << 10
"""Bytes of shared memory that the driver takes of each block."""


class Gpu(NamedTuple):
    """A GPU to predict for."""

    name: str
    processors: int
    clock: float
    copy: float
    """Bytes a second, read and written."""


GPUS = {90: Gpu("H200", 132, 1.98e9, 4.07e12), 100: Gpu("B200", 148, 1.965e9, 6.8e12)}
"""The copy of the H200 as measured; that of the B200 is the same share, 85 %, of its memory's 8 TB/s."""

LEFT_OUT = {
    "bool close = finite(total.top) && total.sum < 2;": "bool close = false;",
    "return W > 1 && member < extra;": "return false;",
    "if (!S::GENERAL || !mask.where || !there) return;": "return;",
    "if (!S::GENERAL || !mask.where) return;": "return;",
}
"""Lines of the source, and what stands in their place while instructions are counted."""


class Instruction(NamedTuple):
    address: int
    text: str
    target: int | None
    """Where a branch goes."""

    def has(self, pattern: str) -> bool:
        return re.search(rf"(?:^|\s){pattern}\b", self.text) is not None


def parse(sass: str) -> list[Instruction]:
    """Return the instructions of the kernel in a disassembly, without the subroutines that it calls."""
    found: list[tuple[int, str]] = []
    labels: dict[str, int] = {}
    waiting: list[str] = []
    for line in sass.splitlines():
        label = re.match(r"(\.L_\S+):", line)
        code = re.match(r"\s*/\*([0-9a-f]+)\*/\s+(.*?)\s*;", line)
        if line.startswith("$"):
            break
        if label:
            waiting.append(label[1])
        elif code:
            address = int(code[1], 16)
            labels |= dict.fromkeys(waiting, address)
            waiting.clear()
            found.append((address, code[2]))
    end = max((i for i, (_, text) in enumerate(found) if re.search(r"(?:^|\s)EXIT$", text)), default=len(found))
    branches = [re.search(r"\bBRA.*?`\((\.L_\w+)\)", text) for _, text in found]
    return [
        Instruction(address, text, labels.get(branch[1]) if branch else None)
        for (address, text), branch in zip(found[: end + 1], branches, strict=False)
    ]


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Return the loops of a kernel that have no other inside."""
    spans = [(one.target, one.address) for one in code if one.target is not None and one.target < one.address]
    inner = [span for span in spans if not any(o != span and span[0] <= o[0] and o[1] <= span[1] for o in spans)]
    return [[one for one in code if start <= one.address <= end] for start, end in inner]


_READS, _STAGED = r"LDG\.E\.\S*", (r"LDGSTS\S*", r"LDS\.128")


def count(code: list[Instruction], plan: Plan, what: str = "") -> float:
    """Return the instructions an entry, or those of them that match."""
    kernel = plan.kernel
    of = [one for one in code if not what or one.has(what)]
    found = loops(code)
    wide = rf"LDG\.E\.\S*{min(128, 8 * kernel.width * SIZES[kernel.x])}\S*" if kernel.width > 1 else _READS
    if not kernel.held or plan.lanes:
        each = [(loop, sum(one.has(wide) for one in loop)) for loop in found]
        return sum(len([one for one in loop if one in of]) / (reads * kernel.width) for loop, reads in each if reads)
    total = float(len(of))
    for pattern in _STAGED:
        each = [(loop, reads) for loop in found if (reads := sum(one.has(pattern) for one in loop))]
        most = max((reads for _, reads in each), default=0)
        for loop, reads in each:
            # One of fewer accesses at once takes those that are left over, of which there are none.
            times = plan.staged / reads if reads == most else 0
            total += len([one for one in loop if one in of]) * (times - 1)
    return total / ((kernel.packs + plan.staged) * kernel.width)


def blocks(plan: Plan, registers: int) -> int:
    """Return the blocks that a multiprocessor has room for."""
    of_a_warp = -(-registers * 32 // 256) * 256
    return min(
        _BLOCKS,
        _THREADS // plan.block,
        _REGISTERS // (of_a_warp * (plan.block // 32)),
        _SHARED // (plan.shared + _RESERVED),
    )


def accesses(code: list[Instruction], kind: str) -> str:
    """Return the bytes of loads or stores, the most frequent first."""
    found: Counter[int] = Counter()
    for one in code:
        match = re.search(rf"(?:^|\s){kind}\.E(\S*)", one.text)
        if match:
            bits = re.search(r"\.(?:U|S)?(8|16|64|128)\b", match[1])
            found[int(bits[1]) // 8 if bits else 4] += 1
    return ", ".join(str(size) for size, _ in found.most_common()) or "–"


def row(plan: Plan, arch: int, disassemble: Callable[[bytes], str]) -> tuple[str, ...]:
    """Return a row of the table."""
    kernel, gpu = plan.kernel, GPUS[arch]
    real = _compile.compile_kernel(kernel, arch)
    with patch.object(_compile, "source", partial(_whole_rows, plan)):
        counted = parse(disassemble(_compile.compile_kernel(kernel, arch).code))
    code = parse(disassemble(real.code))
    entry, exponentials = count(counted, plan), count(counted, plan, r"MUFU\.EX2\S*")
    moved = SIZES[kernel.x] * (1 if kernel.kind == REDUCTIONS or plan.lanes else 2)
    cycles = max(entry / ISSUE, 8 * exponentials)  # a quarter of a multiprocessor takes 8 cycles for a warp's
    bound = gpu.processors * 4 * 32 * gpu.clock / cycles * moved
    loads = accesses(code, "LDG") + (f", staged {accesses(code, 'LDGSTS')}" if plan.staged else "")
    cells = (entry, real.registers, real.spilled, blocks(plan, real.registers), loads, accesses(code, "STG"))
    share = f"{min(1.0, bound / gpu.copy):.0%}"
    return (plan.layout, *(f"{one:.1f}" if isinstance(one, float) else str(one) for one in cells), share)


def _whole_rows(plan: Plan, kernel: Kernel) -> str:
    """Return the source of a kernel for one launch of it."""
    text = _source.source(kernel)
    given = {
        "(int)arguments.lanes": str(plan.lanes),
        "ONCE for (int mask = 1; mask < lanes;": "UNROLL for (int mask = 1; mask < lanes;",
    }
    if plan.formula in KINDS:
        given["(Formula)arguments.formula"] = plan.formula.upper()
    for line, other in (LEFT_OUT | given).items():
        if line not in text:
            msg = f"the source has no line {line!r} any more"
            raise ValueError(msg)
        text = text.replace(line, other)
    return text


def plans(formula: str, dtype: str, machine: Machine) -> Iterator[tuple[int, Plan]]:
    for n in LENGTHS:
        rows = BYTES // (n * SIZES[dtype])
        if formula == "sample_masses":
            plan = plan_masses(dtype, 128, n, general=False, machine=machine)
            assert isinstance(plan, Plan)
            yield n, plan
        else:
            y = answers(formula, dtype)[0]
            yield n, plan_rows(formula, dtype, y, rows, n, aligned=True, general=False, machine=machine)


COLUMNS = (
    *("formula", "dtype", "n", "layout", "instructions an entry", "registers", "bytes spilled"),
    *("blocks a multiprocessor", "bytes of loads", "of stores", "predicted share"),
)


def table(arch: int, formulas: list[str], disassemble: Callable[[bytes], str]) -> Iterator[str]:
    gpu = GPUS[arch]
    machine = Machine(gpu.processors, clusters=True, shared=227 << 10)
    yield f"## sm_{arch}, {_compile.compiler()}, predictions for a {gpu.name}\n"
    yield f"| {' | '.join(COLUMNS)} |"
    yield f"|{'---|' * len(COLUMNS)}"
    known: dict[Any, tuple[str, ...]] = {}
    for formula in formulas:
        for dtype in DTYPES:
            for n, plan in plans(formula, dtype, machine):
                how = plan._replace(grid=0)
                if how not in known:
                    known[how] = row(plan, arch, disassemble)
                yield f"| {' | '.join((formula, dtype, f'{n:,}', *known[how]))} |"
    yield ""


def disassembled(tool: str, code: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(code)
        return subprocess.run([tool, "-c", str(path)], capture_output=True, text=True, check=True).stdout


def _tool(folder: Path | None) -> str:
    found = next(iter(folder.glob("nvidia/*/bin/nvdisasm")), None) if folder else shutil.which("nvdisasm")
    if found is None:
        msg = "there is no nvdisasm: pip install --target FOLDER nvidia-cuda-nvdisasm, and name it by --nvdisasm FOLDER"
        raise SystemExit(msg)
    return str(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=list(GPUS), choices=list(GPUS))
    parser.add_argument("--formulas", nargs="+", default=list(FORMULAS), choices=FORMULAS)
    parser.add_argument("--nvdisasm", type=Path, metavar="FOLDER")
    parser.add_argument("--nvrtc", type=Path, metavar="FOLDER")
    asked = parser.parse_args()
    if asked.nvrtc:
        from polysoftmax.engines.cuda.__main__ import load_nvrtc

        load_nvrtc(asked.nvrtc)
    disassemble = partial(disassembled, _tool(asked.nvdisasm))
    for arch in asked.arch:
        for line in table(arch, asked.formulas, disassemble):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
