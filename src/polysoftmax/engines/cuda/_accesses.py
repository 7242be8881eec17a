"""Whether a kernel reads and writes memory in accesses as wide as its plan says, by the PTX that became of it."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Final

from polysoftmax.engines.cuda._layouts import PROBABILITIES, REDUCTIONS, TWO_INPUTS
from polysoftmax.engines.cuda._plan import SIZES

if TYPE_CHECKING:
    from polysoftmax.engines.cuda._plan import Kernel

WIDE: Final = 16
"""Bytes of the widest access."""

_ACCESS: Final = re.compile(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[a-z](\d+)\s")


def narrow_accesses(kernel: Kernel, ptx: str) -> list[str]:
    """Return what is wrong with the accesses of a kernel that has whole ones: parts of them, and too few.

    Single entries are right beside the whole accesses, before the first and after the last.
    """
    if kernel.width == 1:
        return []
    found = Counter(
        (kind, int(count or 1), int(count or 1) * int(bits) // 8) for kind, count, bits in _ACCESS.findall(ptx)
    )
    wrong = [
        f"{times} × {kind} of {size} bytes"
        for (kind, count, size), times in sorted(found.items())
        if count > 1 and size not in (WIDE, SIZES[kernel.x])
    ]
    for kind, least in (("ld", _loads(kernel)), ("st", _stores(kernel))):
        whole = sum(times for (other, _, size), times in found.items() if (other, size) == (kind, WIDE))
        if whole < least:
            wrong.append(f"{whole} × {kind} of {WIDE} bytes, and not {least}")
    return wrong


def _loads(kernel: Kernel) -> int:
    return kernel.packs * (2 if kernel.kind in TWO_INPUTS else 1)


def _stores(kernel: Kernel) -> int:
    if kernel.kind == REDUCTIONS or kernel.kind.startswith("sample"):
        return 0
    # Rows of 16 bits may be answered in float32, too.
    widens = kernel.kind == PROBABILITIES and kernel.general and SIZES[kernel.x] == 2
    return kernel.packs * (3 if widens else 1)
