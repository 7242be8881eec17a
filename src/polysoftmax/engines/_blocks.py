"""Rows in blocks: which parts of an array of any layout are run together, and where their answers go."""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from polysoftmax._arrays import lent
from polysoftmax.engines._threads import parallel

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax._arrays import Array

Piece = tuple[slice, ...]

PARALLEL = 1 << 19
"""Entries below which waking another thread, and waiting for it, costs more than it saves."""

_MOST_SHARES = 32


def shares(size: int) -> int:
    """Return into how many shares so many entries are cut for threads where nothing has to fit the cache."""
    return min(2 << (size // PARALLEL).bit_length(), _MOST_SHARES) if size >= PARALLEL else 1


def pieces(x: Array, axis: int, rows: int) -> list[Piece]:
    """Cut ``x`` into blocks of about ``rows`` whole rows, each as close together in memory as can be.

    The blocks follow from the array alone and never from the number of threads, so that answers do not either.
    """
    cuts: list[list[slice]] = [[slice(None)]] * x.ndim
    if rows * x.shape[axis] >= x.size:
        return [(slice(None),) * x.ndim]
    for d in sorted(range(x.ndim), key=lambda d: (abs(x.strides[d]), -d)):
        if d == axis:
            continue
        length = x.shape[d]
        count = -(-length // max(1, min(rows, length)))
        step = -(-length // count)
        cuts[d] = [slice(start, start + step) for start in range(0, length, step)]
        rows = rows // length if count == 1 else 1
    return list(itertools.product(*cuts))


def fits(x: Array, axis: int, operands: tuple[Array, ...]) -> bool:
    """Whether every operand can be cut along with ``x``: of its number of dimensions, and no larger than it."""
    shape, ndim = x.shape, x.ndim
    for one in operands:  # loops and no generators: tiny calls come here
        if one is x or not isinstance(one, np.ndarray) or not one.ndim:
            continue
        if one.ndim != ndim:
            return False
        for d, n in enumerate(one.shape):
            if d != axis and n != 1 and n != shape[d]:
                return False
    return True


def cut(operands: tuple[Array, ...], piece: Piece) -> tuple[Array, ...]:
    """Return the parts of the operands that belong to a block."""
    shape = operands[0].shape

    def part(one: Array) -> Array:
        if not isinstance(one, np.ndarray) or not one.ndim:
            return one
        if one.shape == shape:
            return one[piece]
        return one[tuple(s if n > 1 else slice(None) for s, n in zip(piece, one.shape, strict=True))]

    return tuple(map(part, operands))


def like(x: Array, axis: int, length: int, dtype: Any) -> Array:
    """Return an empty array with the shape and memory order of ``x``, but for its length along ``axis``."""
    shape = (*x.shape[:axis], length, *x.shape[axis + 1 :])
    return np.empty_like(x, dtype=dtype, shape=shape)


class _Answers:
    """The arrays that blocks put their answers into, made when the first block is done and shows their kind."""

    def __init__(self, x: Array, axis: int, whole: Array | None) -> None:
        self.x, self.axis = x, axis
        self.lock = threading.Lock()
        self.arrays: tuple[Array, ...] | None = None if whole is None else (whole,)
        self.several = False

    def put(self, piece: Piece, y: Array | tuple[Array, ...]) -> None:
        parts = y if isinstance(y, tuple) else (y,)
        if self.arrays is None:
            with self.lock:
                if self.arrays is None:
                    self.several = isinstance(y, tuple)
                    self.arrays = tuple(like(self.x, self.axis, p.shape[self.axis], p.dtype) for p in parts)
        for whole, part in zip(self.arrays, parts, strict=True):
            whole[piece] = part  # which NumPy leaves out if it stands there

    def all(self) -> Any:
        assert self.arrays is not None
        return self.arrays if self.several else self.arrays[0]


def run_in_blocks(
    evaluate: Callable[[tuple[Array, ...]], Any],
    operands: tuple[Array, ...],
    axis: int,
    blocks: list[Piece],
    threads: int,
    whole: Array | None = None,
) -> Any:
    """Call ``evaluate`` with the operands of every block, and put its answers, one or a tuple, into whole arrays.

    A ``whole`` array that is known before the first answer is lent to the blocks as memory to compute in, where they
    are contiguous: steps from line to line, each on a page of its own, would cost more than the copy.
    """
    answers = _Answers(operands[0], axis, whole)

    def work(i: int) -> None:
        room = None if whole is None else whole[blocks[i]]
        with lent(room if room is not None and room.flags.forc else None):
            answers.put(blocks[i], evaluate(cut(operands, blocks[i])))

    parallel(work, len(blocks), threads)
    return answers.all()
