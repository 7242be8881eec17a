"""The GPUs on which every smoke case has passed, and so the ones whose tensors "auto" gives to the kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from polysoftmax.engines.cuda._devices import Device


class Passed(NamedTuple):
    """A run of ``tools/gpu_session.py`` in which no smoke case failed."""

    gpu: str
    results: str
    """Its folder in ``benchmarks/results``, which begins with the date."""


PASSED: Final[dict[int, Passed]] = {}
"""The runs on record, by compute capability; none yet.

The H200 that passed on 2026-11-27 ran the kernels before today's. Devices of one capability run
the same machine code: what is right on an H200 is right on an H100, which differs in its memory. Another capability has
instructions, and an assembler's choices, of its own.
"""


def has_passed(device: Device) -> bool:
    """Whether a run on record has shown the kernels right on such a device."""
    return device.by_cuda_core and device.arch in PASSED


def reason_against(device: Device) -> str:
    """Return why "auto" leaves the kernels off on a device; empty if it does not."""
    if has_passed(device):
        return ""
    where = f"on compute capability {device.arch / 10}" if device.by_cuda_core else "without cuda.core"
    return f'the kernels have not been tested {where}: engine("cuda") turns them on'


def reason_for(device: Device) -> str:
    """Return why "auto" runs the kernels on a device."""
    gpu, results = PASSED[device.arch]
    return f"all smoke cases passed on an {gpu}, of the same compute capability, on {results[:10]}"
