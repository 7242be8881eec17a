"""CUDA kernels for PyTorch and CuPy: each formula in one read of its input and one write of its answer.

**The kernels have not yet run on a GPU.** Off one they have been compiled for each architecture, and run thread by
thread on a host against the formulas. Until they have, ``engine("cuda")`` alone turns them on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polysoftmax.engines import chosen
from polysoftmax.engines.cuda._calls import Launch, example, prepare

if TYPE_CHECKING:
    from polysoftmax._arrays import Array
    from polysoftmax.engines import Call

__all__ = ["describe", "run"]


def run(call: Call, operands: tuple[Array, ...]) -> Any:
    """Run a call in its kernel, on the caller's device and stream, or as it stands where no kernel covers it."""
    if chosen() != "cuda":
        return call.evaluate(operands)
    if call.formula.composed:
        call = call._replace(options={**call.options, "in_kernels": True})
    found = prepare(call, operands)
    return found.run() if isinstance(found, Launch) else call.evaluate(operands)


def describe(x: Array, name: str) -> tuple[str, str]:
    """Name the engine for a formula along the last axis of ``x``, and why it was chosen."""
    found: Launch | str = 'only engine("cuda") turns the CUDA kernels on'
    if chosen() == "cuda":
        found = example(x, name)
    if isinstance(found, Launch):
        return "cuda", found.plan.kernel.layout
    return "portable", f"the array API formula as it stands: {found}"
