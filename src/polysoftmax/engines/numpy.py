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

from polysoftmax._arrays import accurate_sum, lent
from polysoftmax.engines import FORCED, _blocks, chosen, fused
from polysoftmax.engines._threads import num_threads, parallel

if TYPE_CHECKING:
    from polysoftmax._arrays import Array
    from polysoftmax.engines import Call

SMALL = 10_000
SMALL_DRAW = 1000
"""Entries below which a formula runs as it stands; the draw takes so many small steps that its kernel pays sooner.

What is left by the filters is decided in the same place as the draw from it.
"""

_DRAWS = ("sample", "truncate")

_BLOCK_BYTES = 1 << 20
_LEAST_BYTES = 1 << 19
_PIECES = 4
"""Greatest and least size of a block, and how many there should be in between.

Blocks of 256 KB fit a second-level cache with all temporaries, but two threads then spend what they save on waiting for
the interpreter lock between the steps: softmax of 64 × 50257 took 4.0 ms instead of 1.9.
"""

_SHORT = 32
"""Rows up to this length are run transposed."""

_ACROSS = 512
"""Rows that are given together at least where the axis is not the contiguous one: shorter lines miss too often."""

_MANY_STEPS = 16
"""Rows that a formula of many small steps is given at least, so that the steps are worth their calls.

Beyond that it is given fewer than others, for its steps leave many arrays.
"""

_FUSED = "a fused kernel does a row in two or three passes"


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
    is_small = x.size < (SMALL_DRAW if call.formula.name in _DRAWS else SMALL)
    if (is_small and engine not in FORCED) or engine == "portable" or type(x) is not np.ndarray:
        return _evaluate(call, operands)
    axis = call.options["axis"]
    if not x.size or not _blocks.fits(x, axis, operands):
        return _evaluate(call, operands)
    obstacle = fused.obstacle(call, operands)
    plan = _plan(x, axis, call.formula.name, obstacle, np.dtype(call.compute), in_pieces=_is_plain(call, operands))
    if call.formula.many_steps and plan.engine != "fused":
        plan = plan._replace(layout="as they stand", block=max(plan.block // 4, _MANY_STEPS))
    if plan.engine == "portable" or (call.formula.composed and plan.engine == "blocks"):
        return _evaluate(call, operands)
    rows = call._replace(squeeze=False) if call.squeeze else call
    if plan.engine == "fused":
        y = fused.run(rows, operands, plan.block, plan.threads)
    elif plan.layout == "in pieces":
        y = _evaluate_in_pieces(rows, x, operands[1], plan)
    else:
        evaluate = _evaluate_transposed if plan.layout == "transposed" else _evaluate
        blocks = _blocks.pieces(x, axis, plan.block)
        whole = _blocks.like(x, axis, x.shape[axis], call.result) if call.formula.name in _OF_ITS_SHAPE else None
        y = _blocks.run_in_blocks(partial(evaluate, rows), operands, axis, blocks, plan.threads, whole)
    return np.squeeze(y, axis) if call.squeeze else y


def describe(x: Array, name: str) -> tuple[str, str]:
    """Name the engine for a formula along the last axis of ``x``, and why it was chosen."""
    if type(x) is not np.ndarray:
        return "portable", "the array API formula as it stands: the array is not NumPy's own"
    least = SMALL_DRAW if name in _DRAWS else SMALL
    if not x.size or not x.ndim or (x.size < least and chosen() not in FORCED):
        return "portable", f"the array API formula as it stands: fewer than {least} entries"
    compute = np.dtype(np.float32 if x.dtype.itemsize == 2 and x.dtype.kind in "fV" else np.float64)
    if x.dtype.kind == "f" and x.dtype.itemsize > 2:
        compute = x.dtype
    plan = _plan(x, x.ndim - 1, name, fused.obstacle_by_name(name, compute), compute, in_pieces=name in _IN_PIECES)
    if plan.engine == "portable":
        return plan.engine, plan.reason
    rows = f"blocks of {plan.block} rows of {x.shape[-1]}, {plan.layout}"
    if plan.layout == "in pieces":
        rows = f"rows of {x.shape[-1]} in pieces of {plan.block}"
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
    x = turned[0]
    with lent(x if x.base is None else None):  # a copy, as it is where there was anything to turn
        y = call._replace(options={**call.options, "axis": 0}).evaluate(turned)
    return tuple(np.moveaxis(one, 0, axis) for one in y) if isinstance(y, tuple) else np.moveaxis(y, 0, axis)


_OF_ITS_SHAPE = ("softmax", "log_softmax")
"""Formulas that answer an array of the shape of their rows and can compute it in the place where it has to stand."""

_IN_PIECES = ("softmax", "log_softmax", "logsumexp")
"""Formulas whose answers for the pieces of a row tell that for the row."""

_LONG_BYTES = 8 * _BLOCK_BYTES
"""Size from which contiguous rows are cut: that takes two more passes than a row as it stands."""

_LEAST_STEP = 16
"""Entries of a row in a piece at least, or there would be too much to put together again."""


def _is_plain(call: Call, operands: tuple[Array, ...]) -> bool:
    """Whether a formula is in ``_IN_PIECES`` and has rows alone, at one temperature, and nothing to convert."""
    if call.formula.name not in _IN_PIECES:
        return False
    x, temperature, *others = operands
    is_one = temperature is None or (isinstance(temperature, float) and call.formula.name != "logsumexp")
    return x.dtype == call.compute == call.result and is_one and all(one is None for one in others)


@np.errstate(all="ignore")
def _evaluate_in_pieces(call: Call, x: Array, temperature: float | None, plan: Plan) -> Array:
    """Run a formula on the pieces of long rows as if they were rows, and correct each answer for the other pieces."""
    name, axis = call.formula.name, call.options["axis"]
    n = x.shape[axis]
    rows = x.reshape(math.prod(x.shape[:axis]), n, -1)  # a view, as x is contiguous
    starts = range(0, n, plan.block)
    pieces = [(i, j, slice(start, start + plan.block)) for i in range(len(rows)) for j, start in enumerate(starts)]
    each = (len(rows), len(starts), rows.shape[2])
    alone = call._replace(options={**call.options, "axis": 1})
    if name == "logsumexp":
        values = np.empty(each, x.dtype)

        def value(k: int) -> None:
            i, j, part = pieces[k]
            values[i, j] = _evaluate(alone, (rows[i : i + 1, part], None, None))[0, 0]

        parallel(value, len(pieces), plan.threads)
        return alone.evaluate((values, None, None)).reshape(*x.shape[:axis], 1, *x.shape[axis + 1 :])
    answer = np.empty_like(rows)
    tops, greatest = np.empty((2, *each), x.dtype)

    def begin(k: int) -> None:
        i, j, part = pieces[k]
        entries, y = rows[i : i + 1, part], answer[i : i + 1, part]
        with lent(y):
            y[...] = _evaluate(alone, (entries, temperature, None))
        tops[i, j], greatest[i, j] = np.max(entries, axis=1)[0], np.max(y, axis=1)[0]

    parallel(begin, len(pieces), plan.threads)
    top = np.max(tops, axis=1, keepdims=True)
    distance = tops - top if temperature is None else (tops - top) / temperature
    # The greatest answer of a piece is 1 over the total of its exponentials, or the logarithm of that.
    log_totals = distance - (greatest if name == "log_softmax" else np.log(greatest))
    is_gone = (tops == -math.inf) & (top > -math.inf)
    log_totals[is_gone] = -math.inf
    shift = np.max(log_totals, axis=1, keepdims=True)
    log_shares = log_totals - shift - np.log(accurate_sum(np.exp(log_totals - shift), 1))
    shares = np.exp(log_shares)

    def finish(k: int) -> None:
        i, j, part = pieces[k]
        y = answer[i, part]
        if name == "log_softmax":
            y += log_shares[i, j]
        else:
            y *= shares[i, j]
        if is_gone[i, j].any():
            y[:, is_gone[i, j]] = -math.inf if name == "log_softmax" else 0.0

    parallel(finish, len(pieces), plan.threads)
    return answer.reshape(x.shape)


def _plan(x: Array, axis: int, name: str, obstacle: str, compute: np.dtype[Any], *, in_pieces: bool) -> Plan:
    """Decide how to run a formula, whose rows may be cut or not.

    The size of a block follows from the array alone, never from the threads.
    """
    n, size = x.shape[axis], x.size
    threads = num_threads() if size >= _blocks.PARALLEL else 1
    if not obstacle and x.dtype == compute and axis == x.ndim - 1 and x.flags.c_contiguous and name[-4:] != "_vjp":
        # Nothing is copied, so nothing has to fit the cache: pieces only serve the threads, and cost Python's time.
        return Plan("fused", _FUSED, "row by row", math.ceil(size // n / _blocks.shares(size)), threads)
    rows = size // n
    block_bytes = min(_BLOCK_BYTES, max(_LEAST_BYTES, size * compute.itemsize // _PIECES))
    block = max(1, block_bytes // (n * compute.itemsize))
    if not obstacle:
        return Plan("fused", _FUSED, "row by row", block, threads)
    along = abs(x.strides[axis]) <= min(map(abs, x.strides))
    if along and n <= _SHORT:
        return Plan("blocks", obstacle, "transposed", block, threads)
    if in_pieces and size >= _blocks.PARALLEL and x.flags.c_contiguous:
        line_bytes = math.prod(x.shape[axis + 1 :]) * compute.itemsize
        step = _BLOCK_BYTES // line_bytes
        is_long = n * line_bytes >= _LONG_BYTES if along else block < _ACROSS and step >= _LEAST_STEP
        if is_long:
            return Plan("blocks", obstacle, "in pieces", step, threads)
    block = block if along else max(block, _ACROSS)
    if rows <= block or (x.size < _blocks.PARALLEL and chosen() not in FORCED):
        return Plan("portable", f"{obstacle}, and too little to share out: the array API formula as it stands")
    return Plan("blocks", obstacle, "as they stand", block, threads)
