"""Kernels compiled by NVRTC: for which devices, with which options, and what the compiler says of them.

Nothing here needs a driver but `target_of`.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Final, NamedTuple

from polysoftmax.engines import CUDA_REMEDY
from polysoftmax.engines.cuda._plan import Machine
from polysoftmax.engines.cuda._source import source

if TYPE_CHECKING:
    from polysoftmax.engines.cuda._plan import Kernel

CLUSTERS_SINCE: Final = 90
"""Compute capability that first had thread block clusters, and launches that begin before the last has ended."""

OLDEST: Final = 80
"""Compute capability that first rounded to bfloat16 in an instruction."""

OPTIONS: Final = ("--std=c++17", "--device-as-default-execution-space", "--diag-suppress=128", "--diag-suppress=177")
"""What NVRTC is told, whoever calls it. Without the second, NVRTC 13.0 and 13.1 take lambdas for code of the host.

The suppressed remarks: a loop of no steps, and a constant that one kernel has no use for.
"""


def machine_of(arch: int, processors: int, shared: int, *, clusters: bool) -> Machine:
    """Return what layouts depend on for a compute capability; ``clusters`` says whether they can be launched."""
    if arch < OLDEST:
        msg = f"the device has compute capability {arch / 10}, and the kernels need {OLDEST / 10}"
        raise ImportError(msg)
    return Machine(processors, clusters and arch >= CLUSTERS_SINCE, shared)


def target_of(arch: int) -> int:
    """Return the compute capability to compile for on a device: its own, or the newest before it in its family.

    Parameters
    ----------
    arch : int
        Compute capability of the device, such as 90.

    Raises
    ------
    ImportError
        With the reason, where nothing could be compiled for the device, or its driver would refuse the machine code.
    """
    try:
        import cuda.core  # noqa: F401 - the launches need it: an installation in pieces is found here
        from cuda.bindings import driver, nvrtc
    except ImportError as error:
        msg = f"cuda.core cannot be imported ({error}): {CUDA_REMEDY}"
        raise ImportError(msg) from error
    try:
        _, major, minor = nvrtc.nvrtcVersion()
        _, known = nvrtc.nvrtcGetSupportedArchs()
        _, version = driver.cuDriverGetVersion()
    except RuntimeError as error:  # what the bindings raise where a library, or a function of it, is missing
        msg = f"{str(error).splitlines()[0].rstrip(': .')}: {CUDA_REMEDY}"
        raise ImportError(msg) from error
    if version // 1000 < major:
        theirs = f"this one is for CUDA {version // 1000}.{version % 1000 // 10}"
        msg = f"NVRTC {major}.{minor} needs a driver for CUDA {major}, and {theirs}: update the driver"
        raise ImportError(msg)
    # Machine code runs on later members of its family, and nowhere else.
    family: list[int] = [one for one in known if one // 10 == arch // 10 and one <= arch]
    if not family:
        msg = f"NVRTC {major}.{minor} does not know compute capability {arch / 10}: pip install -U nvidia-cuda-nvrtc"
        raise ImportError(msg)
    return max(family)


def targets_present() -> list[int]:
    """Return the compute capabilities to compile for on the GPUs of this machine.

    Raises
    ------
    ImportError
        With the reason, where nothing could be compiled for one of them.
    """
    from cuda.bindings import driver

    kinds = driver.CUdevice_attribute
    major, minor = (
        kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
        kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
    )
    try:
        driver.cuInit(0)
        status, count = driver.cuDeviceGetCount()
    except RuntimeError:  # what the bindings raise where there is no driver
        return []
    if status:
        return []
    found = {
        10 * driver.cuDeviceGetAttribute(major, i)[1] + driver.cuDeviceGetAttribute(minor, i)[1] for i in range(count)
    }
    return sorted({target_of(arch) for arch in found})


class Compiled(NamedTuple):
    """Machine code, the PTX that it was assembled from, and what the assembler says of it."""

    code: bytes
    ptx: str
    registers: int
    spilled: int


def compile_kernel(kernel: Kernel, arch: int) -> Compiled:
    """Compile a kernel for a compute capability such as 90."""
    from cuda.bindings import nvrtc
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        arch=f"sm_{arch}",
        std="c++17",
        device_as_default_execution_space=True,
        diag_suppress=[128, 177],
        ptxas_options=["-v"],
    )
    log = io.StringIO()
    program = Program(source(kernel), "c++", options)
    code = program.compile("cubin", logs=log).code
    ptx = b" " * nvrtc.nvrtcGetPTXSize(program.handle)[1]
    nvrtc.nvrtcGetPTX(program.handle, ptx)
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", log.getvalue())))
    registers = max(map(int, re.findall(r"Used (\d+) registers", log.getvalue())), default=0)
    return Compiled(bytes(code), ptx.decode().rstrip("\0"), registers, spilled)


def compiler() -> str:
    """Return the name and version of the compiler."""
    from cuda.bindings import nvrtc

    return "NVRTC {1}.{2}".format(*nvrtc.nvrtcVersion())
