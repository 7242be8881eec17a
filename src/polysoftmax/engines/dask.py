"""Dask: where chunks hold whole rows, each is computed by itself; elsewhere formulas become a graph of Dask's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import dask.array
import numpy as np
from dask.base import tokenize

from polysoftmax import _formula
from polysoftmax._arrays import is_unknown, library, require_known_shape
from polysoftmax._linear import WholeHeads
from polysoftmax._ops import ops_of
from polysoftmax._sampling import SAMPLE
from polysoftmax._threefry import fold
from polysoftmax.engines import native, portable
from polysoftmax.engines._chunked import ChunkedOps

if TYPE_CHECKING:
    from polysoftmax._arrays import Array
    from polysoftmax._formula import Call, RowFormula
    from polysoftmax._ops import Ops


class DaskOps(ChunkedOps):
    """The words of Dask, which computes nothing before it is asked for values."""

    no_order = (
        "Dask cannot order rows lazily that are spread over chunks, as top_k and top_p need: "
        "bring whole rows into a chunk first, logits.rechunk({axis: -1})"
    )

    def mean(self, x: Array) -> Array:
        # The number of entries may be unknown before they are computed.
        return self.total(x) / self.xp.maximum(self.total(self.xp.ones_like(x)), 1.0)

    def block_sums(self, terms: Array, size: int) -> Array:
        require_known_shape(terms)
        return super().block_sums(terms, size)


heads = WholeHeads()

_OPEN = ...
"""Stands in a template for an operand that comes in chunks; the same object in every process."""


def words(x: Array, axis: int) -> Ops:
    """Return Dask's words for rows of ``x``."""
    return ops_of(DaskOps, library(x).xp, axis)


def run(call: Call, operands: tuple[Array, ...]) -> Any:
    """Run a formula on each chunk, or as it stands where rows are spread over chunks."""
    if call.reduction is not None:
        return call.in_steps(run, operands)
    answer = None if portable() else _answer(call, operands)
    if answer is None:
        return call.evaluate(words(operands[0], call.axis), operands)
    return _by_chunks(call, operands, answer)


def _answer(call: Call, operands: tuple[Array, ...]) -> native.Answer | None:
    """Return what the formula answers for each row of chunks that hold whole ones; None where it cannot be told."""
    kernel, x = native.KERNELS.get(call.formula), operands[0]
    if kernel is None or x.numblocks[call.axis] != 1:
        return None
    if any(is_unknown(n) for one in operands for n in getattr(one, "shape", ())):
        return None
    answers = [one for one in kernel.answers(call, operands) if one.length != 0]
    return answers[0] if len(answers) == 1 else None


def _by_chunks(call: Call, operands: tuple[Array, ...], answer: native.Answer) -> Array:
    """Run a formula chunk by chunk, in the engine of what the chunks are, which is NumPy's as a rule."""
    x, axis = operands[0], call.axis
    folds = call.formula is SAMPLE and call.options["is_one_key"]
    if folds:  # a chunk does not know which rows are its own
        call = call._replace(options={**call.options, "is_one_key": False})
        operands = (*operands, words(x, axis).row_numbers(x))
    given: list[Any] = []
    for place, one in enumerate(operands):
        if one is None or isinstance(one, float):
            continue
        labels = list(range(x.ndim - one.ndim, x.ndim))
        if axis in labels:
            along = labels.index(axis)
            if one.shape[along] not in (1, x.shape[axis]):
                labels[along] = x.ndim + 1 + place  # several tokens a row, or its key
            one = one.rechunk({along: -1})  # noqa: PLW2901
        given += (one, labels)
    length = x.shape[axis] if answer.length is None else answer.length
    label = axis if length == x.shape[axis] else x.ndim
    out = [*range(axis), *(() if call.squeeze else (label,)), *range(axis + 1, x.ndim)]
    dtype = np.dtype(answer.dtype)
    names = [one.name for one in given[::2]]
    template = tuple(one if one is None or isinstance(one, float) else _OPEN for one in operands)
    numbers = [one for one in template if one is not _OPEN]
    return dask.array.blockwise(
        _run_chunk,
        out,
        *given,
        name=f"{call.formula.name}-{tokenize(names, numbers, str(call))}",
        new_axes={label: length} if label in out and label == x.ndim else None,
        concatenate=True,
        dtype=dtype,
        meta=np.empty((0,) * len(out), dtype),
        call=call,
        template=template,
        folds=folds,
    )


def _run_chunk(*chunks: Array, call: Call, template: tuple[Any, ...], folds: bool) -> Array:
    left = iter(chunks)
    operands = [np.asarray(next(left)) if one is _OPEN else one for one in template]
    if folds:
        numbers = operands.pop()
        operands[1] = fold(operands[1], numbers)
    return _formula.runner(operands[0]).run(call, tuple(operands))


def explain(x: Array, formula: RowFormula) -> tuple[str, str]:
    """Return the engine for a formula along the last axis of ``x``, and why."""
    if formula in native.KERNELS and x.ndim and x.numblocks[-1] == 1 and not portable():
        engine, why = native.explain(x, formula)
        return engine, f"{why}, for each chunk"
    return "portable", "the array API formula as it stands, in Dask's graph: rows are spread over chunks"
