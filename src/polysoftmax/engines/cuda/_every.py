"""Every kernel that a plan can choose, found by planning for every kind of call."""

from __future__ import annotations

import functools
from itertools import product
from typing import TYPE_CHECKING

from polysoftmax.engines.cuda._compile import CLUSTERS_SINCE
from polysoftmax.engines.cuda._layouts import KINDS
from polysoftmax.engines.cuda._plan import (
    SIZES,
    Kernel,
    Machine,
    answers,
    compute_of,
    plan_draw,
    plan_draw_leading,
    plan_filter,
    plan_masses,
    plan_rows,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

_LENGTHS = sorted({m for i in range(21) for m in (1 << i, 3 << i) if m <= 3 << 19})
_ROWS = (1, 8, 30, 10_000)
_ARCHITECTURES = {"float16": 80, "bfloat16": 90, "float32": 100, "float64": 90}
_MACHINES = (Machine(132, clusters=True, shared=227 << 10), Machine(108, clusters=False))


@functools.cache
def every_kernel() -> dict[Kernel, bool]:
    """Return every kernel; the value says whether it also runs on devices without clusters."""
    found: dict[Kernel, bool] = {}
    for machine in _MACHINES:
        for kernel in _chosen(machine):
            found[kernel] = found.get(kernel, False) or not machine.clusters
    return found


def heaviest_kernels() -> list[tuple[Kernel, int]]:
    """Return the kernel that holds most, and is first to spill, of each kind and dtype, with an architecture."""
    heaviest: dict[tuple[str, str], tuple[Kernel, int]] = {}
    for kernel, without_clusters in every_kernel().items():
        arch = _ARCHITECTURES[kernel.x]
        if arch < CLUSTERS_SINCE and not without_clusters:
            continue
        other, _ = heaviest.setdefault((kernel.kind, kernel.x), (kernel, arch))
        if _weight(kernel) > _weight(other):
            heaviest[kernel.kind, kernel.x] = kernel, arch
    return list(heaviest.values())


def _weight(kernel: Kernel) -> tuple[bool, bool, int, int]:
    # A thread of a large block has the fewest registers.
    return kernel.general, kernel.width > 1, kernel.block, kernel.packs * kernel.width


def _chosen(machine: Machine) -> Iterator[Kernel]:
    for x, n, rows, aligned in product(SIZES, _LENGTHS, _ROWS, (True, False)):
        for formula, general in product(KINDS, (False, True)):
            for y in answers(formula, x):
                plan = plan_rows(formula, x, y, rows, n, aligned=aligned, general=general, machine=machine)
                yield plan.kernel
        for general in (False, True):
            masses = plan_masses(x, rows, n, general=general, machine=machine)
            if not isinstance(masses, str):
                yield masses.kernel
            yield plan_draw(x, rows, n, general=general, machine=machine).kernel
        yield plan_draw_leading(compute_of(x), rows, 1).kernel
        yield plan_filter("truncate", x, rows, n, aligned=aligned).kernel
        yield plan_filter("sample_leading", x, rows, n, aligned=True).kernel
