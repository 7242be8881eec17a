"""Formulas that have a fused kernel: which calls the kernels cover, and how blocks of rows get into and out of them."""

from __future__ import annotations

import importlib
import importlib.util
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from polysoftmax._arrays import accurate_sum
from polysoftmax.engines import FORCED, _blocks, _threads, chosen
from polysoftmax.engines._threads import parallel

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from polysoftmax._arrays import Array
    from polysoftmax.engines import Call


def installed() -> bool:
    """Whether Numba is there to be imported, without importing it."""
    return importlib.util.find_spec("numba") is not None


_loaded: ModuleType | str | None = None


def _kernels() -> ModuleType | str:
    """Return the kernels, or why there are none; the first call imports Numba."""
    global _loaded
    if _loaded is None:
        try:
            _loaded = importlib.import_module("polysoftmax.engines._kernels")
            _threads.wait_in_loops(importlib.import_module("polysoftmax.engines._spin"))
        except ImportError as error:
            _loaded = f"no fused kernels without polysoftmax[fast]: {error}"
    return _loaded


def obstacle_by_name(name: str, compute: np.dtype[Any]) -> str:
    """Return why a formula has no kernel to run it in ``compute``; nothing if it has."""
    if chosen() == "blocks":
        return 'asked for by engine("blocks") or POLYSOFTMAX_ENGINE'
    if name not in _FORMULAS and name not in _DRAWS:
        return f"there is no fused kernel for {name}"
    if compute not in (np.float32, np.float64):
        return f"there is no fused kernel in {compute}"
    kernels = _kernels()
    return kernels if isinstance(kernels, str) else ""


def obstacle(call: Call, operands: tuple[Array, ...]) -> str:
    """Return why a call cannot run in a kernel; nothing if it can."""
    name = call.formula.name
    if name.endswith("logsumexp") and operands[1] is not None:
        return "the kernel of logsumexp takes no weights"
    if name.endswith("cross_entropy") and (operands[1].dtype.kind not in "iu" or call.options["label_smoothing"]):
        return "the kernel of cross_entropy takes classes, without smoothing"
    found = obstacle_by_name(name, np.dtype(call.compute))
    x, axis = operands[0], call.options["axis"]
    if (
        not found
        and chosen() not in FORCED
        and abs(x.strides[axis]) > min(map(abs, x.strides))
        and not _is_across(call, operands)
    ):
        return f"the kernel of {name} takes rows that are contiguous in memory"
    return found


_ACROSS = ("softmax", "log_softmax", "logsumexp")
"""Formulas with a kernel along other axes than the last."""

_ACROSS_BYTES = 1 << 14
"""Least length of the lines that it works on: memory is read ahead to the end of a page, and each line has a cost."""

_ACROSS_LENGTH = 2048
"""Length of columns up to which they are not cut: some hundred are read again and again."""

_ACROSS_COLUMNS = 256
"""Columns that a thread is given at least."""

_ACROSS_PIECE = 1 << 18
"""Entries that a thread does at a time: they are read for the maximum, and again for the total."""


def _is_across(call: Call, operands: tuple[Array, ...]) -> bool:
    x = operands[0]
    return (
        call.formula.name in _ACROSS
        and call.options["axis"] < x.ndim - 1
        and x.flags.c_contiguous
        and x.dtype == call.compute == call.result
        and all(one is None for one in operands[1:])
    )


def _columns(count: int, step: int) -> list[tuple[int, int]]:
    return [(first, min(first + step, count)) for first in range(0, count, step)]


def _run_across(call: Call, x: Array, threads: int) -> Array:
    kernels: Any = _kernels()
    axis, name = call.options["axis"], call.formula.name
    outer, n, inner = math.prod(x.shape[:axis]), x.shape[axis], math.prod(x.shape[axis + 1 :])
    rows = x.reshape(outer, n, inner)
    answer = _blocks.like(x, axis, n if name != "logsumexp" else 1, call.result)
    count = _blocks.shares(x.size)
    step = max(math.ceil(outer * inner / count), _ACROSS_COLUMNS)
    if name != "logsumexp" and n <= _ACROSS_LENGTH and (outer * inner > step or count == 1):
        out, shares = answer.reshape(rows.shape), _columns(outer * inner, step)
        parallel(lambda k: kernels.softmax_across(rows, *shares[k], name == "log_softmax", out), len(shares), threads)
        return answer
    step = _ACROSS_BYTES // x.itemsize
    columns = _columns(inner, step)
    length = max(_ACROSS_PIECE // min(step, inner), 1)
    starts = range(0, n, length)
    pieces = [(i, j, first, last) for i in range(outer) for j in range(len(starts)) for first, last in columns]
    found = np.empty((3 if name == "logsumexp" else 2, outer, len(starts), inner), x.dtype)
    look_at = kernels.apart_across if name == "logsumexp" else kernels.total_across

    def look(k: int) -> None:
        i, j, first, last = pieces[k]
        look_at(rows[i, starts[j] : starts[j] + length], first, last, *found[:, i, j, first:last])

    parallel(look, len(pieces), threads)
    if name == "logsumexp":
        with np.errstate(all="ignore"):
            whole = _together(found)
        kernels.logsumexp_apart(*(part.reshape(-1) for part in whole), answer.reshape(-1))
        return answer
    top, scale = np.empty((2, outer, inner), x.dtype)
    for i in range(outer):
        kernels.scales_across(found[0, i], found[1, i], name == "log_softmax", top[i], scale[i])
    out = answer.reshape(rows.shape)

    def finish(k: int) -> None:
        i, j, first, last = pieces[k]
        part, column = slice(starts[j], starts[j] + length), slice(first, last)
        logarithm = name == "log_softmax"
        kernels.finish_across(rows[i, part], first, last, logarithm, top[i, column], scale[i, column], out[i, part])

    parallel(finish, len(pieces), threads)
    return answer


def _together(found: Array) -> tuple[Array, Array, Array]:
    """Bring together what is known of the pieces of rows: maximum, its number, and Σ exp(x - maximum) over the rest."""
    tops, most, rest = found
    if tops.shape[1] == 1:
        return tops[:, 0], most[:, 0], rest[:, 0]
    top = np.max(tops, axis=1)
    at_top = tops == top[:, None]
    factor = np.where(at_top, 1.0, np.exp(tops - top[:, None]))
    rest = accurate_sum(rest * factor + np.where(at_top, 0.0, most * factor), 1)[:, 0]
    return top, np.sum(np.where(at_top, most, 0.0), axis=1), rest


_PIECE = 1 << 17
"""Entries of a long row that are done at a time: they and their answers fit a second-level cache."""

_LONG = 2 * _PIECE


def _is_long(call: Call, operands: tuple[Array, ...]) -> bool:
    """Whether rows are to be cut into pieces, for more threads than there are rows."""
    x, name = operands[0], call.formula.name
    if name not in _IN_PIECES or call.options["axis"] != x.ndim - 1 or x.shape[-1] < _LONG or not x.flags.c_contiguous:
        return False
    if name == "cross_entropy":
        return x.dtype == call.compute or bool(_narrow_name(x.dtype))
    scaled = isinstance(operands[1], float) and name != "logsumexp"
    same = x.dtype == call.compute == call.result
    return (operands[1] is None or scaled) and operands[2] is None and (same or _stays_narrow(call, x))


def _run_long(call: Call, operands: tuple[Array, ...], threads: int) -> Array:
    """Run a call in two passes over the pieces of its rows: totals, which are brought together, and the answer."""
    kernels: Any = _kernels()
    x, axis, name = operands[0], call.options["axis"], call.formula.name
    keeps_length = _FORMULAS[name][1]
    answer = _blocks.like(x, axis, x.shape[axis] if keeps_length else 1, call.result)
    rows, out = _as_bits(x.reshape(-1, x.shape[axis])), _as_bits(answer.reshape(-1, answer.shape[axis]))
    count = math.ceil(rows.shape[1] / _PIECE)
    found = np.empty((3, len(rows), count), call.compute)
    temperature = None if not keeps_length or operands[1] is None else found.dtype.type(operands[1])
    # What is rounded to 16 bits at the end cannot wait there.
    space = out if name == "softmax" and out.dtype == found.dtype else None
    step = math.ceil(len(rows) * count / _blocks.shares(x.size))
    shares = [(first, min(first + step, len(rows) * count)) for first in range(0, len(rows) * count, step)]

    def look(k: int) -> None:
        if keeps_length:
            kernels.totals_of_pieces(rows, _PIECE, *shares[k], temperature, space, found[0], found[1])
        else:
            kernels.apart_of_pieces(rows, _PIECE, *shares[k], *found)

    parallel(look, len(shares), threads)
    top = np.max(found[0], axis=1)
    with np.errstate(all="ignore"):
        if not keeps_length:
            top, most, rest = _together(found)
            log_total = np.log(most) + np.log1p(rest / most)
            if name == "logsumexp":
                answer[...] = _converted(kernels, top + log_total, answer.dtype).reshape(answer.shape)
            else:
                of_loss = _of_loss(_Block(kernels, call, operands))
                kernels.cross_entropy_from_totals(rows, *of_loss, top, log_total, answer.reshape(-1))
            return answer
        distance = found[0] - top[:, None]
        factor = np.exp(distance if temperature is None else distance / temperature)
        total = np.sum(found[1] * factor, axis=1)
        log_total, factor = np.log(total), factor / total[:, None]

    def finish(k: int) -> None:
        if space is not None:
            kernels.scale_pieces(factor, _PIECE, *shares[k], out)
        elif name == "softmax":
            kernels.softmax_of_pieces(rows, _PIECE, *shares[k], temperature, top, total, out)
        else:
            kernels.log_softmax_of_pieces(rows, _PIECE, *shares[k], temperature, top, log_total, out)

    parallel(finish, len(shares), threads)
    return answer


def run(call: Call, operands: tuple[Array, ...], block: int, threads: int) -> Any:
    """Run a call in its kernel, in blocks of so many rows."""
    x, axis, name = operands[0], call.options["axis"], call.formula.name
    if name in _DRAWS:
        return _DRAWS[name](call, operands, _blocks.pieces(x, axis, block), threads)
    if axis < x.ndim - 1 and _is_across(call, operands):
        return _run_across(call, x, threads)
    if x.shape[axis] >= _LONG and _is_long(call, operands):
        return _run_long(call, operands, threads)
    keeps_length = _FORMULAS[name][1]
    length, rounds = x.shape[axis] if keeps_length else 1, keeps_length and _stays_narrow(call, x)
    dtype = call.result if keeps_length else call.compute
    if axis == x.ndim - 1 and (rounds or dtype == call.compute) and _lies_ready(call, operands):
        answer = _blocks.like(x, axis, length, dtype)
        _run_in_place(call, operands, answer, block, threads)
        return answer if dtype == call.result else _converted(_kernels(), answer, call.result)
    answer = _blocks.like(x, axis, length, call.result)
    _run_with_copies(call, operands, answer, block, threads, rounds)
    return answer


def _lies_ready(call: Call, operands: tuple[Array, ...]) -> bool:
    """Whether the kernel can take the rows, and all that is as large, from where they are."""
    x, compute = operands[0], call.compute
    for one in operands:
        if one is None or isinstance(one, float) or one.size < x.size:
            continue
        is_known = one.dtype == compute or one.dtype.kind in "biu"
        if one is x:
            is_known = x.dtype == compute or (call.formula.name in _IN_PIECES and bool(_narrow_name(x.dtype)))
        if not (is_known and one.flags.c_contiguous):
            return False
    return True


def _run_in_place(call: Call, operands: tuple[Array, ...], answer: Array, block: int, threads: int) -> None:
    kernels, function = _kernels(), _FORMULAS[call.formula.name][0]
    whole = _Block(kernels, call, operands)
    out = _as_bits(answer.reshape(-1, answer.shape[-1]))
    if block >= len(out):
        function(kernels, whole, out)
        return

    def work(i: int) -> None:
        part = slice(i * block, (i + 1) * block)
        function(kernels, _Part(whole, part), out[part])

    parallel(work, math.ceil(len(out) / block), threads)


def _run_with_copies(
    call: Call, operands: tuple[Array, ...], answer: Array, block: int, threads: int, rounds: bool
) -> None:
    x, axis = operands[0], call.options["axis"]
    kernels, function = _kernels(), _FORMULAS[call.formula.name][0]
    blocks = _blocks.pieces(x, axis, block)

    def work(i: int) -> None:
        parts, target = operands, answer
        if len(blocks) > 1:
            parts, target = _blocks.cut(operands, blocks[i]), answer[blocks[i]]
        part = _Block(kernels, call, parts)
        target = _last(target, axis)
        if (target.dtype == part.dtype or rounds) and target.flags.c_contiguous:
            function(kernels, part, _as_bits(target.reshape(-1, target.shape[-1])))
        else:
            out = np.empty((len(part.x), target.shape[-1]), part.dtype)
            function(kernels, part, out)
            target[...] = _converted(kernels, out, target.dtype).reshape(target.shape)

    parallel(work, len(blocks), threads)


BFLOAT16_BITS = np.dtype("V2")
"""How arrays of bfloat16 are given where ml_dtypes, which adds the dtype to NumPy, is not at hand."""


def _narrow_name(dtype: np.dtype[Any]) -> str:
    if dtype.itemsize != 2:
        return ""
    return {"f": "float16", "V": "bfloat16"}.get(dtype.kind, "")


def _as_bits(x: Array) -> Array:
    """Give what is 16 bits wide the form in which kernels take it; the rest stays."""
    name = _narrow_name(x.dtype)
    return x.view(np.uint16 if name == "float16" else np.int16) if name else x


def _stays_narrow(call: Call, x: Array) -> bool:
    """Whether the kernel itself widens the rows and rounds its answer."""
    name = call.formula.name in _IN_PIECES and _narrow_name(x.dtype)
    return bool(name) and call.result == x.dtype and call.compute == np.float32


def _converted(kernels: Any, x: Array, dtype: np.dtype[Any]) -> Array:
    """Return ``x``, C-contiguous, in ``dtype``; NumPy's own conversions from and to 16 bits are slow."""
    if x.dtype == dtype:
        return np.ascontiguousarray(x)
    if dtype == np.float32 and (name := _narrow_name(x.dtype)):
        out = np.empty(x.shape, dtype)
        getattr(kernels, f"widen_{name}")(_as_bits(np.ascontiguousarray(x)).reshape(-1), out.reshape(-1))
        return out
    if x.dtype == np.float32 and (name := _narrow_name(dtype)):
        out = np.empty(x.shape, dtype)
        getattr(kernels, f"narrow_{name}")(np.ascontiguousarray(x).reshape(-1), _as_bits(out).reshape(-1))
        return out
    with np.errstate(over="ignore"):  # what is too large for 16 bits is inf
        return np.ascontiguousarray(x, dtype)


def _last(x: Array, axis: int) -> Array:
    return x if axis == x.ndim - 1 else np.moveaxis(x, axis, -1)


class _Block:
    """The operands of a block in the form that kernels take: C-contiguous rows in the compute dtype."""

    __slots__ = ("axis", "dtype", "kernels", "operands", "options", "shape")

    def __init__(self, kernels: Any, call: Call, operands: tuple[Array, ...]) -> None:
        self.kernels = kernels
        self.axis: int = call.options["axis"]
        self.options = call.options
        self.shape = operands[0].shape
        self.operands = operands
        self.dtype = np.dtype(call.compute)

    @property
    def x(self) -> Array:
        return self.rows(0)

    @property
    def raw(self) -> Array:
        """The rows for a kernel that takes 16 bits as they are."""
        x = self.operands[0]
        if not _narrow_name(x.dtype) or self.dtype != np.float32:
            return self.x
        x = _last(x, self.axis)
        return _as_bits(np.ascontiguousarray(x.reshape(-1, x.shape[-1])))

    def rows(self, i: int) -> Array:
        """Return an operand that has an entry for each of ``x``; None stays None."""
        one = self.operands[i]
        if one is None:
            return None
        if one.shape != self.shape:
            one = np.broadcast_to(one, self.shape)
        one = _last(one, self.axis)
        one = one.reshape(-1, one.shape[-1])
        # The rows themselves may be integers; other integers are classes.
        return _converted(self.kernels, one, self.dtype if i == 0 else self._dtype_of(one))

    def per_row(self, i: int, dtype: np.dtype[Any] | None = None) -> Array:
        """Return an operand that has one entry a row, or a number for all rows."""
        one = self.operands[i]
        if one is None:
            return None
        kept = (*self.shape[: self.axis], 1, *self.shape[self.axis + 1 :])
        if isinstance(one, float):
            return np.full(math.prod(kept), one, dtype or self.dtype)
        one = np.asarray(one)
        if one.shape != kept:
            one = np.broadcast_to(one, kept)
        one = one.reshape(-1)
        return _converted(self.kernels, one, dtype or self._dtype_of(one))

    def per_class(self, i: int) -> Array:
        """Return an operand that has one entry a class."""
        one = self.operands[i]
        return None if one is None else _converted(self.kernels, one.reshape(-1), self.dtype)

    def _dtype_of(self, one: Array) -> np.dtype[Any]:
        return one.dtype if one.dtype.kind in "biu" else self.dtype


class _Part:
    """Some of the rows of a block whose operands need no copy."""

    __slots__ = ("dtype", "options", "part", "whole")

    def __init__(self, whole: _Block, part: slice) -> None:
        self.whole = whole
        self.part = part
        self.dtype = whole.dtype
        self.options = whole.options

    @property
    def x(self) -> Array:
        return self.whole.x[self.part]

    @property
    def raw(self) -> Array:
        return self.whole.raw[self.part]

    def rows(self, i: int) -> Array:
        one = self.whole.rows(i)
        return None if one is None else one[self.part]

    def per_row(self, i: int) -> Array:
        one = self.whole.per_row(i)
        return None if one is None else one[self.part]

    def per_class(self, i: int) -> Array:
        return self.whole.per_class(i)


_SHORT_BYTES = 384
"""Length of rows, as they are computed with, below which many are done at a time, each on its own lane."""


def _is_short(x: Array) -> bool:
    return x.shape[1] * max(x.itemsize, 4) < _SHORT_BYTES  # type: ignore[no-any-return]


def _probabilities(kernels: Any, x: Array, temperature: Array | None, where: Array | None, out: Array) -> None:
    if temperature is None and where is None and _is_short(x):
        kernels.softmax_short(x, None, out)
    else:
        kernels.softmax(x, temperature, where, None, out)


def _log_probabilities(kernels: Any, x: Array, temperature: Array | None, where: Array | None, out: Array) -> None:
    if temperature is None and where is None and _is_short(x):
        kernels.log_softmax_short(x, out)
    else:
        kernels.log_softmax(x, temperature, where, out)


def _weighted(kernels: Any, x: Array, where: Array | None, factor: Array, out: Array) -> None:
    """Write the softmax of every row, times its factor."""
    if where is None and _is_short(x):
        kernels.softmax_short(x, factor, out)
    else:
        kernels.softmax(x, None, where, factor, out)


def _log_total(kernels: Any, x: Array, where: Array | None, dtype: Any) -> tuple[Array, Array]:
    """Return the maximum of every row, and log Σ exp(x - maximum); NaN for a row with NaN."""
    top, log_total = np.empty((2, len(x)), dtype)
    if where is None and _is_short(x):
        kernels.log_total_short(x, top, log_total)
    else:
        kernels.log_total(x, where, top, log_total)
    return top, log_total


def _softmax(kernels: Any, block: _Block | _Part, out: Array) -> None:
    _probabilities(kernels, block.raw, block.per_row(1), block.rows(2), out)


def _log_softmax(kernels: Any, block: _Block | _Part, out: Array) -> None:
    _log_probabilities(kernels, block.raw, block.per_row(1), block.rows(2), out)


def _softmax_vjp(kernels: Any, block: _Block | _Part, out: Array) -> None:
    x, temperature = block.x, block.per_row(2)
    y = np.empty_like(x)
    _probabilities(kernels, x, temperature, block.rows(3), y)
    kernels.softmax_slope(y, block.rows(1), temperature, out)


def _log_softmax_vjp(kernels: Any, block: _Block | _Part, out: Array) -> None:
    x, temperature, where = block.x, block.per_row(2), block.rows(3)
    y = np.empty_like(x)
    _log_probabilities(kernels, x, temperature, where, y)
    kernels.log_softmax_slope(y, block.rows(1), temperature, where, out)


@np.errstate(all="ignore")
def _logsumexp(kernels: Any, block: _Block | _Part, out: Array) -> None:
    top, log_total = _log_total(kernels, block.raw, block.rows(2), block.dtype)
    np.add(top, log_total, out=out[:, 0])


def _cross_entropy(kernels: Any, block: _Block | _Part, out: Array) -> None:
    x = block.raw
    kernel = kernels.cross_entropy_short if _is_short(x) else kernels.cross_entropy
    kernel(x, *_of_loss(block), out[:, 0])


def _of_loss(block: _Block | _Part) -> tuple[Array, Array | None, int | None, Any]:
    """Return the targets, the weights of the classes, the target that does not count, and z_loss."""
    z_loss = block.dtype.type(block.options["z_loss"])
    return block.per_row(1), block.per_class(2), block.options["ignore_index"], z_loss


def _softmax_pullback(kernels: Any, block: _Block | _Part, out: Array) -> None:
    kernels.softmax_slope(block.rows(3), block.rows(4), block.per_row(1), out)


def _log_softmax_pullback(kernels: Any, block: _Block | _Part, out: Array) -> None:
    kernels.log_softmax_slope(block.rows(3), block.rows(4), block.per_row(1), block.rows(2), out)


@np.errstate(all="ignore")
def _logsumexp_pullback(kernels: Any, block: _Block | _Part, out: Array) -> None:
    x, where, y, g = block.x, block.rows(2), block.per_row(3), block.per_row(4)
    _weighted(kernels, x, where, g, out)
    odd = np.isinf(y)  # a row that sums to 0 or to inf has no maximum to subtract
    if odd.any():
        terms = np.exp(x[odd] if where is None else np.where(where[odd], x[odd], -np.inf))
        total = np.sum(terms, axis=1, keepdims=True)
        out[odd] = terms / np.where(total == 0, 1.0, total) * g[odd, None]


def _cross_entropy_pullback(kernels: Any, block: _Block | _Part, out: Array) -> None:
    x, g = block.x, block.per_row(4)
    targets, weight, ignored, z_loss = _of_loss(block)
    value = None
    if z_loss:
        top, log_total = _log_total(kernels, x, None, block.dtype)
        with np.errstate(all="ignore"):
            value = top + log_total
    at_target, factor = np.empty((2, len(x)), block.dtype)
    kernels.slopes_of_loss(targets, weight, z_loss, value, g, at_target, factor)
    _weighted(kernels, x, None, factor, out)
    kernels.subtract_at_targets(targets, at_target, ignored, out)


_OFF = (1.0, 0.0, 1.0, 0.0)
"""The temperature, top_k, top_p and min_p that change nothing."""


def _parameters(call: Call, temperature: Array, k: Array, p: Array, min_p: Array) -> list[Array]:
    top_k = call.options["top_k"]
    given = (temperature, k if top_k is None else float(top_k), p, min_p)
    return [off if one is None else one for one, off in zip(given, _OFF, strict=True)]


def _run_truncate(call: Call, operands: tuple[Array, ...], blocks: list[_blocks.Piece], threads: int) -> Array:
    """Run the filters of a draw, without one."""
    from polysoftmax.engines import _draws

    x, temperature, where, *filters = operands
    axis = call.options["axis"]
    operands = (x, where, *_parameters(call, temperature, *filters))
    answer = _blocks.like(x, axis, x.shape[axis], call.result)

    def work(i: int) -> None:
        parts, target = operands, answer
        if len(blocks) > 1:
            parts, target = _blocks.cut(operands, blocks[i]), answer[blocks[i]]
        block = _Block(_kernels(), call, parts)
        rows = block.x if where is None else np.where(block.rows(1), block.x, -math.inf)
        no_words, no_tokens = (np.empty((len(rows), 0), dtype) for dtype in (np.int32, np.int64))
        target = _last(target, axis)
        ready = target.dtype == rows.dtype and target.flags.c_contiguous
        out = target.reshape(rows.shape) if ready else np.empty_like(rows)
        parameters = map(block.per_row, (2, 3, 4, 5))
        _draws.filter_and_draw(rows, no_words, *parameters, 2, no_tokens, np.empty((len(rows), 0), rows.dtype), out)
        if not ready:
            target[...] = _converted(block.kernels, out, target.dtype).reshape(target.shape)

    parallel(work, len(blocks), threads)
    return answer


def _run_draws(call: Call, operands: tuple[Array, ...], blocks: list[_blocks.Piece], threads: int) -> tuple[Array, ...]:
    from polysoftmax.engines import _draws

    x, keys, temperature, where, *filters = operands
    axis = call.options["axis"]
    is_filtered = call.options["top_k"] is not None or any(one is not None for one in filters)
    if is_filtered:
        temperature, *filters = _parameters(call, temperature, *filters)
    if call.options["is_one_key"]:
        key = keys.reshape(2)
        keys = np.empty((*x.shape[:axis], 2), np.int32)
        _draws.fold(key, keys.reshape(-1, 2))
    operands = (x, keys, temperature, where, *filters)
    answers = [_blocks.like(x, axis, keys.shape[axis] // 2, dtype) for dtype in (np.int64, call.compute)]

    def work(i: int) -> None:
        parts, targets = operands, answers
        if len(blocks) > 1:
            parts, targets = _blocks.cut(operands, blocks[i]), [answer[blocks[i]] for answer in answers]
        block = _Block(_kernels(), call, parts)
        keys, temperature = np.ascontiguousarray(block.operands[1]), block.per_row(2)
        keys = keys.reshape(-1, keys.shape[-1])
        rows = block.x if where is None else np.where(block.rows(3), block.x, -math.inf)
        tokens, logprobs = [np.empty((len(rows), keys.shape[1] // 2), one.dtype) for one in answers]
        size = call.options["size"]
        if is_filtered:
            parameters = temperature, *map(block.per_row, (4, 5, 6))
            nothing = np.empty((len(rows), 0), rows.dtype)
            _draws.filter_and_draw(rows, keys, *parameters, size, tokens, logprobs, nothing)
        else:
            _draws.draw(rows, keys, temperature, size, tokens, logprobs)
        for target, one in zip(targets, (tokens, logprobs), strict=True):
            target[...] = one.reshape(target.shape)

    parallel(work, len(blocks), threads)
    return tuple(answers if call.options["logprobs"] else answers[:1])


_IN_PIECES = ("softmax", "log_softmax", "logsumexp", "cross_entropy")
"""Formulas whose kernels take 16 bits as they are, and the pieces of long rows."""

_FORMULAS: dict[str, tuple[Callable[[Any, _Block | _Part, Array], None], bool]] = {
    "softmax": (_softmax, True),
    "log_softmax": (_log_softmax, True),
    "softmax_vjp": (_softmax_vjp, True),
    "log_softmax_vjp": (_log_softmax_vjp, True),
    "logsumexp": (_logsumexp, False),
    "cross_entropy": (_cross_entropy, False),
    "pullback of softmax": (_softmax_pullback, True),
    "pullback of log_softmax": (_log_softmax_pullback, True),
    "pullback of logsumexp": (_logsumexp_pullback, True),
    "pullback of cross_entropy": (_cross_entropy_pullback, True),
}
"""Each formula's kernel, and whether its answer has the length of the rows (else 1)."""

_DRAWS: dict[str, Callable[..., Any]] = {"sample": _run_draws, "truncate": _run_truncate}
"""Formulas whose kernels stand in a file of their own."""
