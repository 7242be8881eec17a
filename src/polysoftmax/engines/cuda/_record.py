"""The GPUs on which every smoke case has passed, and so the ones whose tensors "auto" gives to the kernels."""

from __future__ import annotations

from typing import Final, NamedTuple


class Passed(NamedTuple):
    """A run of ``tools/gpu_session.py`` in which no smoke case failed."""

    gpu: str
    results: str
    """Its folder in ``benchmarks/results``, which begins with the date."""


PASSED: Final = {90: Passed("NVIDIA H200", "2026-11-27-gpu-nvidia-h200")}
"""The runs on record, by compute capability.

Devices of one capability run the same machine code: what was right on an H200 is right on an H100, which differs in its
memory. Another capability has instructions, and an assembler's choices, of its own.
"""


def reason_against(arch: int) -> str:
    """Return why "auto" leaves the kernels off on a compute capability such as 90; empty if it does not."""
    if arch in PASSED:
        return ""
    return f'the kernels have not been tested on compute capability {arch / 10}: engine("cuda") turns them on'


def reason_for(arch: int) -> str:
    """Return why "auto" runs the kernels on a compute capability on record."""
    gpu, results = PASSED[arch]
    return f"all smoke cases passed on an {gpu}, of the same compute capability, on {results[:10]}"
