"""NumPy: large inputs in blocks of rows on threads, by fused kernels where Numba is installed.

A formula makes about eight passes over its rows. In blocks that fit the cache only one of them reads from memory,
and NumPy releases the interpreter lock, so the blocks run on all CPUs. Short rows are run transposed: a reduction
of n numbers has a cost of its own however small n is, along the other axis it is done for whole vectors of rows.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from polysoftmax.engines import FORCED, FORMULAS, _blocks, chosen, fused
from polysoftmax.engines._threads import num_threads

if TYPE_CHECKING:
    from polysoftmax._arrays import Array
    from polysoftmax.engines import Call

SMALL = 10_000
SMALL_DRAW = 1000
"""Entries below which a formula runs as it stands; the draw takes so many small steps that its kernel pays sooner."""

_BLOCK_BYTES = 1 << 20
_LEAST_BYTES = 1 << 17
_PIECES = 8
"""Greatest and least size of a block, and how many there should be in between.

Blocks of 256 KB fit a second-level cache with all temporaries, but two threads then spend what they save on waiting for
the interpreter lock between the steps: softmax of 64 × 50257 took 4.0 ms instead of 1.9.
"""

_MOST_PIECES = 32
_PER_PIECES = 1 << 19
"""Most pieces where nothing has to fit the cache, and the entries that double their number."""

_SHORT = 32
"""Rows up to this length are run transposed."""

_ACROSS = 1024
"""Rows that are given together at least where the axis is not the contiguous one: shorter lines miss too often."""

_MANY_STEPS = 16
"""Rows that a formula of many small steps is given at least, so that the steps are worth their calls."""

_PARALLEL = 1 << 19
_PARALLEL_FUSED = 1 << 17
"""Entries below which waking another thread costs more than it saves."""


class Plan(NamedTuple):
    """How a formula will be run, and why."""

    engine: str
    reason: str
    layout: str = ""
    block: int = 0
    threads: int = 1


def run(call: Call, operands: tuple[Array, ...]) -> Any:
    """Run a formula. NaN and inf are answers here, documented and tested, and no reason to warn."""
    x = operands[0]
    engine = chosen()
    is_small = x.size < (SMALL_DRAW if call.formula.composed else SMALL)
    if (is_small and engine not in FORCED) or engine == "portable" or type(x) is not np.ndarray:
        return _evaluate(call, operands)
    axis = call.options["axis"]
    if not x.size or not _blocks.fits(x, axis, operands):
        return _evaluate(call, operands)
    plan = _plan(x, axis, call.formula.name, fused.obstacle(call, operands), np.dtype(call.compute))
    if call.formula.many_steps:
        plan = plan._replace(layout="as they stand", block=max(plan.block, _MANY_STEPS))
    if plan.engine == "portable" or (call.formula.composed and plan.engine == "blocks"):
        return _evaluate(call, operands)
    blocks = _blocks.pieces(x, axis, plan.block)
    rows = call._replace(squeeze=False)
    if plan.engine == "fused":
        y = fused.run(rows, operands, blocks, plan.threads)
    else:
        evaluate = _evaluate_transposed if plan.layout == "transposed" else _evaluate
        y = _blocks.run_in_blocks(partial(evaluate, rows), operands, axis, blocks, plan.threads)
    return np.squeeze(y, axis) if call.squeeze else y


def describe(x: Array, name: str) -> tuple[str, str]:
    """Name the engine for a formula along the last axis of ``x``, and why it was chosen."""
    if type(x) is not np.ndarray:
        return "portable", "the array API formula as it stands: the array is not NumPy's own"
    least = SMALL_DRAW if FORMULAS[name].composed else SMALL
    if not x.size or not x.ndim or (x.size < least and chosen() not in FORCED):
        return "portable", f"the array API formula as it stands: fewer than {least} entries"
    compute = np.dtype(np.float32 if x.dtype.itemsize == 2 and x.dtype.kind in "fV" else np.float64)
    if x.dtype.kind == "f" and x.dtype.itemsize > 2:
        compute = x.dtype
    plan = _plan(x, x.ndim - 1, name, fused.obstacle_by_name(name, compute), compute)
    if plan.engine == "portable":
        return plan.engine, plan.reason
    rows = f"blocks of {plan.block} rows of {x.shape[-1]}, {plan.layout}"
    return plan.engine, f"{rows}, {plan.threads} thread{'s' * (plan.threads > 1)}: {plan.reason}"


@np.errstate(all="ignore")
def _evaluate(call: Call, operands: tuple[Array, ...]) -> Any:
    return call.evaluate(operands)


@np.errstate(all="ignore")
def _evaluate_transposed(call: Call, operands: tuple[Array, ...]) -> Any:
    axis = call.options["axis"]
    turned = tuple(
        np.ascontiguousarray(np.moveaxis(one, axis, 0)) if isinstance(one, np.ndarray) and one.ndim else one
        for one in operands
    )
    y = call._replace(options={**call.options, "axis": 0}).evaluate(turned)
    return tuple(np.moveaxis(one, 0, axis) for one in y) if isinstance(y, tuple) else np.moveaxis(y, 0, axis)


def _plan(x: Array, axis: int, name: str, obstacle: str, compute: np.dtype[Any]) -> Plan:
    """Decide how to run a formula; the size of a block follows from the array alone, never from the threads."""
    n = x.shape[axis]
    rows = x.size // n
    size = min(_BLOCK_BYTES, max(_LEAST_BYTES, x.size * compute.itemsize // _PIECES))
    block = max(1, size // (n * compute.itemsize))
    along = abs(x.strides[axis]) <= min(map(abs, x.strides))
    if not obstacle:
        threads = num_threads() if x.size >= _PARALLEL_FUSED else 1
        if x.flags.c_contiguous and axis == x.ndim - 1 and x.dtype == compute and not name.endswith("_vjp"):
            # Nothing is copied, so nothing has to fit the cache: pieces only serve the threads, and cost Python's time.
            pieces = 1 if x.size < _PARALLEL_FUSED else 2 << (x.size // _PER_PIECES).bit_length()
            block = math.ceil(rows / min(pieces, _MOST_PIECES))
        return Plan("fused", "a fused kernel does a row in two or three passes", "row by row", block, threads)
    threads = num_threads() if x.size >= _PARALLEL else 1
    if along and n <= _SHORT:
        return Plan("blocks", obstacle, "transposed", block, threads)
    block = block if along else max(block, _ACROSS)
    if rows <= block or (x.size < _PARALLEL and chosen() not in FORCED):
        return Plan("portable", f"{obstacle}, and too little to share out: the array API formula as it stands")
    return Plan("blocks", obstacle, "as they stand", block, threads)
