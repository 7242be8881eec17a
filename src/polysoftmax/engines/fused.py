"""Formulas that have a fused kernel: which calls the kernels cover, and how blocks of rows get into and out of them."""

from __future__ import annotations

import importlib
import importlib.util
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from polysoftmax.engines import _blocks, chosen
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
        and chosen() == "auto"
        and abs(x.strides[axis]) > min(map(abs, x.strides))
        and not _is_across(call, operands)
    ):
        return f"the kernel of {name} takes rows that are contiguous in memory"
    return found


_ACROSS = {"softmax": False, "log_softmax": True}
"""Formulas with a kernel along other axes than the last; whether it answers the logarithm."""

_ACROSS_BYTES = 4096
"""Length of the lines that it works on: shorter ones cost a miss in the translation of addresses each."""


def _is_across(call: Call, operands: tuple[Array, ...]) -> bool:
    x = operands[0]
    return (
        call.formula.name in _ACROSS
        and call.options["axis"] < x.ndim - 1
        and x.flags.c_contiguous
        and x.dtype == call.compute == call.result
        and all(one is None for one in operands[1:])
    )


def _run_across(call: Call, x: Array, threads: int) -> Array:
    axis, kernels, answer = call.options["axis"], _kernels(), np.empty_like(x)
    three = (math.prod(x.shape[:axis]), x.shape[axis], math.prod(x.shape[axis + 1 :]))
    rows, out = x.reshape(three), answer.reshape(three)
    step = max(1, _ACROSS_BYTES // x.itemsize)
    pieces = [(outer, first) for outer in range(three[0]) for first in range(0, three[2], step)]

    def work(i: int) -> None:
        outer, first = pieces[i]
        last = min(first + step, three[2])
        kernels.softmax_across(rows, outer, first, last, _ACROSS[call.formula.name], out)  # type: ignore[union-attr]

    parallel(work, len(pieces), threads)
    return answer


def run(call: Call, operands: tuple[Array, ...], blocks: list[_blocks.Piece], threads: int) -> Array:
    """Run a call in its kernel, block by block."""
    if _is_across(call, operands):
        return _run_across(call, operands[0], threads)
    if call.formula.name in _DRAWS:
        return _run_draws(call, operands, blocks, threads)
    x, axis = operands[0], call.options["axis"]
    kernels = _kernels()
    function, keeps_length = _FORMULAS[call.formula.name]
    answer = _blocks.like(x, axis, x.shape[axis] if keeps_length else 1, call.result)

    def work(i: int) -> None:
        parts, target = operands, answer
        if len(blocks) > 1:
            parts, target = _blocks.cut(operands, blocks[i]), answer[blocks[i]]
        block = _Block(kernels, call, parts)
        target = _last(target, axis)
        if target.dtype == block.dtype and target.flags.c_contiguous:
            function(kernels, block, target.reshape(-1, target.shape[-1]))
        else:
            out = np.empty((len(block.x), target.shape[-1]), block.dtype)
            function(kernels, block, out)
            target[...] = _converted(kernels, out, target.dtype).reshape(target.shape)

    parallel(work, len(blocks), threads)
    return answer


BFLOAT16_BITS = np.dtype("V2")
"""How arrays of bfloat16 are given where ml_dtypes, which adds the dtype to NumPy, is not at hand."""


def _narrow_name(dtype: np.dtype[Any]) -> str:
    if dtype == np.float16:
        return "float16"
    return "bfloat16" if dtype.kind == "V" and dtype.itemsize == 2 else ""


def _converted(kernels: Any, x: Array, dtype: np.dtype[Any]) -> Array:
    """Return ``x``, C-contiguous, in ``dtype``; NumPy's own conversions from and to 16 bits are slow."""
    if dtype == np.float32 and (name := _narrow_name(x.dtype)):
        out = np.empty(x.shape, dtype)
        getattr(kernels, f"widen_{name}")(np.ascontiguousarray(x).view(np.uint16).reshape(-1), out.reshape(-1))
        return out
    if x.dtype == np.float32 and (name := _narrow_name(dtype)):
        out = np.empty(x.shape, dtype)
        getattr(kernels, f"narrow_{name}")(np.ascontiguousarray(x).reshape(-1), out.view(np.uint16).reshape(-1))
        return out
    with np.errstate(over="ignore"):  # what is too large for 16 bits is inf
        return np.ascontiguousarray(x, dtype)


def _last(x: Array, axis: int) -> Array:
    return x if axis == x.ndim - 1 else np.moveaxis(x, axis, -1)


class _Block:
    """The operands of a block in the form that kernels take: C-contiguous rows in the compute dtype."""

    __slots__ = ("axis", "dtype", "kernels", "operands", "options", "shape", "x")

    def __init__(self, kernels: Any, call: Call, operands: tuple[Array, ...]) -> None:
        self.kernels = kernels
        self.axis: int = call.options["axis"]
        self.options = call.options
        self.shape = operands[0].shape
        self.operands = operands
        self.dtype = np.dtype(call.compute)
        self.x = self.rows(0)

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
        if isinstance(one, float):
            return np.full(len(self.x), one, dtype or self.dtype)
        kept = (*self.shape[: self.axis], 1, *self.shape[self.axis + 1 :])
        one = np.broadcast_to(np.asarray(one), kept).reshape(-1)
        return _converted(self.kernels, one, dtype or self._dtype_of(one))

    def _dtype_of(self, one: Array) -> np.dtype[Any]:
        return one.dtype if one.dtype.kind in "biu" else self.dtype


_SHORT_BYTES = 192
"""Size of a row up to which many rows are done at a time, each on its own lane."""


def _is_short(x: Array) -> bool:
    return x.shape[1] * x.itemsize <= _SHORT_BYTES  # type: ignore[no-any-return]


def _probabilities(kernels: Any, x: Array, temperature: Array | None, where: Array | None, out: Array) -> None:
    if temperature is None and where is None and _is_short(x):
        kernels.softmax_short(x, out)
    else:
        kernels.softmax(x, temperature, where, None, out)


def _log_probabilities(kernels: Any, x: Array, temperature: Array | None, where: Array | None, out: Array) -> None:
    if temperature is None and where is None and _is_short(x):
        kernels.log_softmax_short(x, out)
    else:
        kernels.log_softmax(x, temperature, where, out)


def _log_total(kernels: Any, x: Array, where: Array | None) -> tuple[Array, Array]:
    """Return the maximum of every row, and log Σ exp(x - maximum); NaN for a row with NaN."""
    top, most, rest = np.empty((3, len(x)), x.dtype)
    if where is None and _is_short(x):
        kernels.apart_short(x, top, most, rest)
    else:
        kernels.apart(x, where, top, most, rest)
    # As in the formula, the terms at the maximum enter apart. There are none where the maximum is NaN.
    return top, np.log(most) + np.log1p(rest / most)


def _softmax(kernels: Any, block: _Block, out: Array) -> None:
    _probabilities(kernels, block.x, block.per_row(1), block.rows(2), out)


def _log_softmax(kernels: Any, block: _Block, out: Array) -> None:
    _log_probabilities(kernels, block.x, block.per_row(1), block.rows(2), out)


def _softmax_vjp(kernels: Any, block: _Block, out: Array) -> None:
    y, temperature = np.empty_like(block.x), block.per_row(2)
    _probabilities(kernels, block.x, temperature, block.rows(3), y)
    kernels.softmax_slope(y, block.rows(1), temperature, out)


def _log_softmax_vjp(kernels: Any, block: _Block, out: Array) -> None:
    y, temperature, where = np.empty_like(block.x), block.per_row(2), block.rows(3)
    _log_probabilities(kernels, block.x, temperature, where, y)
    kernels.log_softmax_slope(y, block.rows(1), temperature, where, out)


@np.errstate(all="ignore")
def _logsumexp(kernels: Any, block: _Block, out: Array) -> None:
    top, log_total = _log_total(kernels, block.x, block.rows(2))
    out[:, 0] = top + log_total


@np.errstate(all="ignore")
def _cross_entropy(kernels: Any, block: _Block, out: Array) -> None:
    x, targets = block.x, block.per_row(1)
    ignore_index, z_loss = block.options["ignore_index"], block.options["z_loss"]
    top, log_total = _log_total(kernels, x, None)
    top = np.where(np.isfinite(top), top, np.nan)
    known = (targets >= 0) & (targets < x.shape[1])
    index = np.where(known, targets, 0)
    y = log_total + (top - x[np.arange(len(x)), index])
    if block.operands[2] is not None:
        weight = block.rows(2)[np.arange(len(x)), index]
        y = np.where((weight == 0) & (y == np.inf), 0.0, weight * y)
    y = np.where(known, y, np.nan)
    if z_loss:
        y = y + z_loss * (top + log_total) ** 2
    out[:, 0] = y if ignore_index is None else np.where(targets == ignore_index, 0.0, y)


def _softmax_pullback(kernels: Any, block: _Block, out: Array) -> None:
    kernels.softmax_slope(block.rows(3), block.rows(4), block.per_row(1), out)


def _log_softmax_pullback(kernels: Any, block: _Block, out: Array) -> None:
    kernels.log_softmax_slope(block.rows(3), block.rows(4), block.per_row(1), block.rows(2), out)


@np.errstate(all="ignore")
def _logsumexp_pullback(kernels: Any, block: _Block, out: Array) -> None:
    where, y, g = block.rows(2), block.per_row(3), block.per_row(4)
    kernels.softmax(block.x, None, where, g, out)
    odd = np.isinf(y)  # a row that sums to 0 or to inf has no maximum to subtract
    if odd.any():
        terms = np.exp(block.x[odd] if where is None else np.where(where[odd], block.x[odd], -np.inf))
        total = np.sum(terms, axis=1, keepdims=True)
        out[odd] = terms / np.where(total == 0, 1.0, total) * g[odd, None]


@np.errstate(all="ignore")
def _cross_entropy_pullback(kernels: Any, block: _Block, out: Array) -> None:
    x, targets, g = block.x, block.per_row(1), block.per_row(4)
    ignore_index, z_loss = block.options["ignore_index"], block.options["z_loss"]
    ignored = np.zeros(len(x), bool) if ignore_index is None else targets == ignore_index
    at_target = np.arange(len(x)), np.where(ignored, 0, targets)
    weight = g if block.operands[2] is None else g * block.rows(2)[at_target]
    factor = weight
    if z_loss:
        top, log_total = _log_total(kernels, x, None)
        factor = weight + 2.0 * z_loss * (top + log_total) * g
    kernels.softmax(x, None, None, factor, out)
    out[at_target] -= weight
    out[ignored] = 0.0


_OFF = (1.0, 0.0, 1.0, 0.0)
"""The temperature, top_k, top_p and min_p that change nothing."""


def _run_draws(call: Call, operands: tuple[Array, ...], blocks: list[_blocks.Piece], threads: int) -> tuple[Array, ...]:
    from polysoftmax.engines import _draws

    x, keys, temperature, where, *filters = operands
    top_k, axis = call.options["top_k"], call.options["axis"]
    if top_k is not None:
        filters[0] = float(top_k)
    is_filtered = any(one is not None for one in filters)
    if is_filtered:
        temperature, *filters = (
            off if one is None else one for one, off in zip((temperature, *filters), _OFF, strict=True)
        )
    if call.options["is_one_key"]:
        key = keys.reshape(2)
        keys = np.empty((*x.shape[:axis], 2), np.int32)
        _draws.fold(key, keys.reshape(-1, 2))
    operands = (x, keys, temperature, where, *filters)
    answers = [_blocks.like(x, axis, keys.shape[axis] // 2, dtype) for dtype in (np.int64, call.compute)]

    def work(i: int) -> None:
        block = _Block(_kernels(), call, _blocks.cut(operands, blocks[i]))
        keys, temperature = np.ascontiguousarray(block.operands[1]), block.per_row(2)
        keys = keys.reshape(-1, keys.shape[-1])
        rows = block.x if where is None else np.where(block.rows(3), block.x, -math.inf)
        tokens, logprobs = (np.empty((len(rows), keys.shape[1] // 2), one.dtype) for one in answers)
        size = call.options["size"]
        if is_filtered:
            # The target of top_p is a number of float64 in the formula, too.
            k, p, min_p = block.per_row(4), block.per_row(5, np.dtype(np.float64)), block.per_row(6)
            _draws.draw_filtered(rows, keys, temperature, k, p, min_p, size, tokens, logprobs)
        else:
            _draws.draw(rows, keys, temperature, size, tokens, logprobs)
        for answer, one in zip(answers, (tokens, logprobs), strict=True):
            target = answer[blocks[i]]
            target[...] = one.reshape(target.shape)

    parallel(work, len(blocks), threads)
    return tuple(answers if call.options["logprobs"] else answers[:1])


_FORMULAS: dict[str, tuple[Callable[[Any, _Block, Array], None], bool]] = {
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

_DRAWS = ("sample",)
"""Formulas whose kernels stand in a file of their own."""
