"""The draw of a token a row, of rows that come in pieces."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from polysoftmax._arrays import device_for
from polysoftmax._formula import words
from polysoftmax._rows import Rows, rows
from polysoftmax._sampling import block_length
from polysoftmax._stream import RACE, WINNER
from polysoftmax.random import as_key

if TYPE_CHECKING:
    from polysoftmax._arrays import Array
    from polysoftmax._rows import Number


def no_chunk() -> ValueError:
    """Return the error of a stream in which nothing comes."""
    return ValueError("there is no chunk: an iterator that was read before is empty")


class Race:
    """The draw of a token a row, from the entries of rows that come one after another along the last axis."""

    def __init__(self, key: Any, n: int, temperature: Array | Number) -> None:
        if n < 1:
            msg = f"n, the number of tokens of all chunks, must be 1 or greater, got {n}"
            raise ValueError(msg)
        self._key, self._n, self._temperature = key, n, temperature
        self._size, self._come = block_length(n), 0
        self._rows: Rows | None = None
        self._top: Array
        self._of_best: list[Array]
        self._best: Array
        self._rest: Array

    def add(self, chunk: Array) -> None:
        """Let the blocks run that are whole now."""
        r = rows(chunk, -1)
        if self._rows is None:
            self._start(r)
        elif r.reduced_shape != self._rows.reduced_shape:
            msg = f"chunks differ in shape beside the axis: {r.reduced_shape} after {self._rows.reduced_shape}"
            raise ValueError(msg)
        self._come += r.length
        xp, ops = r.xp, words(r.x)
        few = xp.reshape(ops.constant(xp.astype(r.x, r.compute)), (self._best.shape[0], r.length))
        x = xp.concat([self._rest, few], axis=-1)
        if self._come == self._n:
            ends = [xp.full_like(self._top, -math.inf)] * (-x.shape[-1] % self._size)
            x = xp.concat([x, *ends], axis=-1)
        whole = x.shape[-1] // self._size * self._size
        self._rest = x[:, whole:]
        if whole:
            x = x[:, :whole]
            first = xp.full((1, 1), self._first, dtype=xp.int32, device=device_for(x))
            state = (self._top, *self._of_best, self._best)
            self._top, *self._of_best, self._best = RACE(
                rows(x, -1), x, *state, self._keys, first, self._t, is_one_key=self._is_one_key
            )
            self._first += whole // self._size

    def _start(self, r: Rows) -> None:
        self._rows, xp, batch, count = r, r.xp, r.reduced_shape, math.prod(r.reduced_shape)
        keys = as_key(self._key, like=r.x)
        self._is_one_key = keys.ndim == 1 and bool(batch)
        if keys.ndim > 1 and tuple(keys.shape[:-1]) != batch:
            msg = f"keys of shape {tuple(keys.shape)} do not match rows of shape {batch}: give one, or one a row"
            raise ValueError(msg)
        self._keys = keys if keys.ndim == 1 else xp.reshape(keys, (count, 2))
        t = r.temperature(self._temperature)
        if t is not None and not isinstance(t, float):
            t = words(r.x).constant(xp.astype(t, r.compute))
            t = xp.reshape(xp.broadcast_to(t, (*batch, 1)), (count, 1)) if t.ndim else t
        self._t, self._first = t, 0
        where = {"device": device_for(r.x)}
        self._top = xp.full((count, 1), -math.inf, dtype=r.compute, **where)
        self._of_best = [self._top, self._top, xp.zeros_like(self._top), xp.zeros((count, 1), dtype=xp.int32, **where)]
        self._best = xp.full((count, self._size), -math.inf, dtype=r.compute, **where)
        self._rest = self._best[:, :0]

    def finish(self) -> tuple[Array, Array]:
        """Return the tokens, and their logits."""
        if self._rows is None:
            raise no_chunk()
        if self._come != self._n:
            msg = f"the chunks have {self._come} tokens, and not n={self._n}, which the draw depends on"
            raise ValueError(msg)
        r = rows(self._best, -1)
        block = self._of_best[-1]
        found = WINNER(r, self._best, self._top, block, self._keys, self._t, is_one_key=self._is_one_key)
        tokens, logits = (r.xp.reshape(one, self._rows.reduced_shape) for one in found)
        return tokens, logits
