"""CUDA kernels for PyTorch and CuPy: each formula in one read of its input and one write of its answer.

"auto" runs them on the GPUs that `_record` names, and ``engine("cuda")`` on every one that can.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polysoftmax._arrays import library, namespace
from polysoftmax._formula import Call
from polysoftmax._linear import Heads
from polysoftmax._ops import Ops, ops_of
from polysoftmax._probability import LOG_PROB, TOP_LOG_PROBS
from polysoftmax._sampling import SAMPLE
from polysoftmax.engines import chosen
from polysoftmax.engines.cuda import _devices, _log_prob, _record, _steps
from polysoftmax.engines.cuda._calls import evaluate, layout_for_last_axis, prepare
from polysoftmax.engines.cuda._operands import ANOTHER_AXIS
from polysoftmax.engines.cuda._plan import MOST_LEADING

if TYPE_CHECKING:
    from polysoftmax._arrays import Array
    from polysoftmax._formula import RowFormula
    from polysoftmax.engines.cuda._devices import Device

__all__ = ["explain", "heads", "run", "words"]

heads = Heads()


def words(x: Array, axis: int) -> Ops:
    """Return CuPy's words for rows of ``x``, which are those of the standard."""
    return ops_of(Ops, library(x).xp, axis)


def run(call: Call, operands: tuple[Array, ...]) -> Any:
    """Run a call in its kernels where these are on, and else as it stands."""
    return launch(call, operands) if are_on_for(operands[0]) else evaluate(call, operands)


def are_on_for(x: Array) -> bool:
    """Whether the kernels run on the device of an array."""
    return chosen() == "cuda" or are_on(_devices.device_of(x))


def are_on(device: Device | str) -> bool:
    """Whether the kernels run on a device: by the caller's choice, or because they are on record there."""
    engine = chosen()
    return engine == "cuda" or (engine != "portable" and not isinstance(device, str) and _record.has_passed(device))


def launch(call: Call, operands: tuple[Array, ...]) -> Any:
    """Run a call in its kernels, on the caller's device and stream, or as it stands where no kernel covers it."""
    if call.reduction is not None:
        return call.in_steps(launch, operands)
    if call.formula is SAMPLE:
        return _steps.run(call, operands, launch_or_evaluate)
    if call.formula is LOG_PROB:
        return _log_prob.run(call, operands, launch_or_evaluate)
    if call.formula is TOP_LOG_PROBS:
        return _log_prob.run_leading(call, operands, launch_or_evaluate)
    return launch_or_evaluate(call, operands)


def launch_or_evaluate(call: Call, operands: tuple[Array, ...]) -> Any:
    """Run a call in its kernel, or as it stands where no kernel covers it."""
    found = prepare(call, operands)
    if isinstance(found, str):
        return (_launch_along_last_axis if found == ANOTHER_AXIS else evaluate)(call, operands)
    launch, values, _kept = found
    return launch.run(values)


def _launch_along_last_axis(call: Call, operands: tuple[Array, ...]) -> Any:
    """Run a call along another axis in its kernel, on copies of the rows and of the answer."""
    x, axis = operands[0], call.axis
    xp, device = namespace(x), _devices.device_of(x)
    assert not isinstance(device, str)

    def moved(one: Array, to: int, start: int) -> Array:
        y = xp.moveaxis(one, start, to)
        return device.copied(y) if one.shape[start] > 1 else y

    rows = tuple([moved(one, -1, axis) if getattr(one, "ndim", 0) else one for one in operands])
    y = launch_or_evaluate(Call(call.formula, call.options, x.ndim - 1, call.compute, call.result), rows)
    y = moved(y, axis, -1)  # without gaps, too: a caller may look at it in another shape
    return xp.squeeze(y, axis) if call.squeeze else y


_BESIDE = {TOP_LOG_PROBS: f"; of up to {MOST_LEADING} tokens"}
"""What else there is to say of a formula."""


def explain(x: Array, formula: RowFormula) -> tuple[str, str]:
    """Return the engine for a formula along the last axis of ``x``, and why."""
    device = _devices.device_of(x)
    by_name = chosen() == "cuda"
    found = device if isinstance(device, str) else "" if by_name else _record.reason_against(device)
    if not found and not isinstance(device, str):
        runs, found = layout_for_last_axis(x, formula, device)
        if runs:
            why = "" if by_name else f"; {_record.reason_for(device)}"
            return "cuda", found + _BESIDE.get(formula, "") + why
    return "portable", f"the array API formula as it stands: {found}"
