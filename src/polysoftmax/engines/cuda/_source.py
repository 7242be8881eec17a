"""The CUDA C++ source of a kernel, in one text: NVRTC gets no folder to include files from."""

from __future__ import annotations

import functools
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polysoftmax.engines.cuda._plan import Kernel


PARTS = (
    "arithmetic.hpp",
    "cuda/machine.cuh",
    "cuda/totals.cuh",
    "cuda/arguments.cuh",
    "cuda/merges.cuh",
    "cuda/rows.cuh",
    "cuda/sample.cuh",
    "cuda/truncate.cuh",
)


@functools.cache
def part(name: str) -> str:
    """Return the text of a file in ``native``, in the namespace of the source."""
    text = files("polysoftmax").joinpath("native", name).read_text("utf-8")
    return f"namespace polysoftmax {{\n\n{text}\n}}\n"


def body(kernel: Kernel) -> tuple[str, str]:
    """Return the parameters of a kernel and what it does, in C++."""
    parameters, function = kernel.family
    return f"{parameters}_PARAMETERS", f"polysoftmax::{function}<S_{kernel.name}>({parameters}_ARGUMENTS, shared);"


def source(kernel: Kernel) -> str:
    """Return the whole source of one kernel, which is called by its name."""
    parameters, call = body(kernel)
    entry = (
        f'using polysoftmax::Index;\nextern "C" __global__ void __launch_bounds__({kernel.block}, {kernel.resident}) '
        f"{kernel.name}({parameters}) {{\n"
        f"    extern __shared__ __align__(16) char shared[];\n    {call}\n}}\n"
    )
    return "\n".join([*map(part, PARTS), kernel.declaration(), entry])
