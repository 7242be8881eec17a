"""CUDA kernels for PyTorch and CuPy: each formula in one read of its input and one write of its answer.

They have run on one GPU, an H200. ``engine("cuda")`` alone turns them on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polysoftmax._arrays import library
from polysoftmax._ops import Ops, ops_of
from polysoftmax._probability import LOG_PROB
from polysoftmax._sampling import SAMPLE
from polysoftmax.engines import chosen
from polysoftmax.engines.cuda import _log_prob, _steps
from polysoftmax.engines.cuda._calls import evaluate, launch_for_last_axis, prepare
from polysoftmax.engines.cuda._kind import Launch

if TYPE_CHECKING:
    from polysoftmax._arrays import Array
    from polysoftmax._formula import Call, RowFormula

__all__ = ["explain", "run", "words"]


def words(x: Array, axis: int) -> Ops:
    """Return CuPy's words for rows of ``x``, which are those of the standard."""
    return ops_of(Ops, library(x).xp, axis)


def run(call: Call, operands: tuple[Array, ...]) -> Any:
    """Run a call in its kernels if they were asked for, and else as it stands."""
    return launch(call, operands) if chosen() == "cuda" else evaluate(call, operands)


def launch(call: Call, operands: tuple[Array, ...]) -> Any:
    """Run a call in its kernels, on the caller's device and stream, or as it stands where no kernel covers it."""
    if call.reduction is not None:
        return call.in_steps(launch, operands)
    if call.formula is SAMPLE:
        return _steps.run(call, operands, launch_or_evaluate)
    if call.formula is LOG_PROB:
        return _log_prob.run(call, operands, launch_or_evaluate)
    return launch_or_evaluate(call, operands)


def launch_or_evaluate(call: Call, operands: tuple[Array, ...]) -> Any:
    """Run a call in its kernel, or as it stands where no kernel covers it."""
    found = prepare(call, operands)
    if isinstance(found, str):
        return evaluate(call, operands)
    launch, values, _kept = found
    return launch.run(values)


def explain(x: Array, formula: RowFormula) -> tuple[str, str]:
    """Return the engine for a formula along the last axis of ``x``, and why."""
    found: Launch | str = 'only engine("cuda") turns the CUDA kernels on'
    if chosen() == "cuda":
        found = launch_for_last_axis(x, formula)
    if isinstance(found, Launch):
        return "cuda", found.plan.kernel.layout
    return "portable", f"the array API formula as it stands: {found}"
