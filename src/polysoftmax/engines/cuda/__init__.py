"""CUDA kernels for PyTorch and CuPy: each formula in one read of its input and one write of its answer.

**The kernels have not yet run on a GPU.** Off one they have been compiled for each architecture, and run thread by
thread on a host against the formulas. Until they have, ``engine("cuda")`` alone turns them on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polysoftmax.engines import chosen
from polysoftmax.engines.cuda import _devices
from polysoftmax.engines.cuda._calls import FORMULAS, Launch, prepare
from polysoftmax.engines.cuda._plan import SIZES, Plan, plan_draw, plan_masses, plan_rows

if TYPE_CHECKING:
    from polysoftmax._arrays import Array
    from polysoftmax.engines import Call

__all__ = ["covers", "describe", "run"]


def covers(call: Call, operands: tuple[Array, ...]) -> str | None:
    """Return why the kernels do not cover a call; None if they do."""
    found = prepare(call, operands)
    return found if isinstance(found, str) else None


def run(call: Call, operands: tuple[Array, ...]) -> Any:
    """Run a call in its kernel, on the caller's device and stream, or as it stands where no kernel covers it."""
    if chosen() != "cuda":
        return call.evaluate(operands)
    found = prepare(call, operands)
    return found.run() if isinstance(found, Launch) else call.evaluate(operands)


def describe(x: Array, name: str) -> tuple[str, str]:
    """Name the engine for a formula along the last axis of ``x``, and why it was chosen."""
    if chosen() != "cuda":
        return "portable", 'the array API formula as it stands: only engine("cuda") turns the CUDA kernels on'
    device = _devices.device_of(x)
    if isinstance(device, str):
        return "portable", f"the array API formula as it stands: {device}"
    dtype = _devices.dtype_name(x.dtype)
    if name not in FORMULAS:
        return "portable", f"the array API formula as it stands: there is no CUDA kernel for {name}"
    if dtype not in SIZES or not x.ndim or 0 in x.shape:
        return "portable", f"the array API formula as it stands: no CUDA kernel takes {dtype}{list(x.shape)}"
    n, rows = x.shape[-1], device.view(x).size // x.shape[-1]
    plan: Plan | str
    if name == "sample_masses":
        plan = plan_masses(dtype, rows, n, aligned=True, general=False, machine=device.machine)
    elif name == "sample_draw":
        plan = plan_draw(dtype, rows, n, general=False)
    else:
        plan = plan_rows(name, dtype, dtype, rows, n, aligned=True, general=False, machine=device.machine)
    if isinstance(plan, str):
        return "portable", f"the array API formula as it stands: {plan}"
    return "cuda", f"{plan.kernel.layout}: one read of the input, one write of the answer"
