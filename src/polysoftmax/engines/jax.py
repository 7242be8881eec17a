"""JAX: derivative rules as ``custom_jvp``, ``jax.jit`` around eager calls, and what XLA does better or worse."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero

from polysoftmax._arrays import cast, float_bits, library
from polysoftmax._formula import Call
from polysoftmax._losses import CROSS_ENTROPY
from polysoftmax._ops import Ops, ops_of
from polysoftmax._probability import LOG_PROB
from polysoftmax._sampling import SAMPLE
from polysoftmax._softmax import LOG_SOFTMAX, LOGSUMEXP, OUTWEIGHED, SOFTMAX, log_of_sum, nonzero, others
from polysoftmax._truncation import TRUNCATE
from polysoftmax.engines import portable
from polysoftmax.engines._jax_linear import JaxHeads
from polysoftmax.engines._jax_mesh import (
    axes_of_mesh,
    is_uneven,
    on_each_device,
    over_cut_blocks,
    spread_like,
    take_of_shards,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax._arrays import Array, DType
    from polysoftmax._formula import RowFormula

_WIDENS_LATE = frozenset({SOFTMAX, LOG_SOFTMAX, LOGSUMEXP, CROSS_ENTROPY})
"""Formulas that may be given 16-bit rows: they combine them with their maximum, which is float32, first.

XLA on the CPU keeps rows that are widened before the maximum as an array of their own.
"""

_SHORT, _SHORT_IF_WIDE, _WIDE = 8, 32, 1 << 14
"""Lengths up to which rows are reduced by whole columns: in general, and where that many numbers stand in each.

XLA on the CPU makes vectors of rows then. With columns of 100,000 numbers it takes a tenth of the time, with rows of 3
along the last axis a third; beyond these lengths up to twice as long.
"""

_ONE_BY_ONE = 16
"""Length up to which XLA adds the entries of a row one by one, so that two sums cost no more than one."""

_CACHED = 1 << 20
"""Entries that are searched together on a CPU, so that they are in its cache for all bits."""


_SHORTEST_OF_SHARED = 16
"""Length up to which groups of entries are as long on many devices as on one, where it is best for time."""


class JaxOps(Ops):
    """The words of JAX in a program of the caller's, which may compute the rows anew for each use."""

    def constant(self, x: Array) -> Array:
        return lax.stop_gradient(x)

    def cast(self, x: Array, dtype: DType) -> Array:
        return (
            x
            if x.dtype == dtype
            else x.astype(dtype)
            if float_bits(self.xp, x.dtype) != 16
            else _round(x).astype(dtype)
        )

    def max(self, x: Array) -> Array:
        x = lax.stop_gradient(x)
        if self._is_by_columns(x):
            top = self._over_columns(jnp.maximum, x)
        else:
            top = jnp.max(x, axis=self.axis, keepdims=True)
        return top.astype(jnp.float32) if float_bits(self.xp, x.dtype) == 16 else top

    def sum(self, x: Array) -> Array:
        return self._over_columns(jnp.add, x) if self._is_by_columns(x) else jnp.sum(x, axis=self.axis, keepdims=True)

    def total(self, x: Array) -> Array:
        return x.sum()

    def mean(self, x: Array) -> Array:
        return x.mean() if x.size else x.sum()  # one step to differentiate, not two

    def argmax(self, x: Array) -> Array:
        # XLA computes the entries for its argmax one by one, and for these two reductions many at once.
        is_less = x < jnp.max(x, axis=self.axis, keepdims=True)  # False for NaN, whose index is one of the row's, too
        index = jnp.where(is_less, x.shape[self.axis], self.indices(x, self.index_dtype))
        return jnp.min(index, axis=self.axis, keepdims=True)

    def _is_by_columns(self, x: Array) -> bool:
        axis = self.axis % x.ndim
        width = math.prod(x.shape[axis + 1 :])
        is_wide = _is_known(width) and width >= _WIDE
        return _is_up_to(x.shape[axis], _SHORT_IF_WIDE if is_wide else _SHORT)

    def _over_columns(self, function: Callable[[Array, Array], Array], x: Array) -> Array:
        """Reduce rows in a tree of whole columns."""
        left = [self.part(x, i, i + 1) for i in range(x.shape[self.axis])]
        while len(left) > 1:
            pairs = [function(*left[i : i + 2]) for i in range(0, len(left) - 1, 2)]
            left = pairs + left[2 * len(pairs) :]
        return left[0]

    def apply_where(
        self, mask: Array, function: Callable[..., Array], operands: tuple[Array, ...], otherwise: Array
    ) -> Array:
        return _apply_where(mask, operands, otherwise, function, self)

    def call(self, formula: RowFormula, *operands: Any, **options: Any) -> Any:
        if formula.jvp is None:
            return super().call(formula, *operands, **options)
        dtype = operands[0].dtype
        return _with_rules(Call(formula, options, self.axis, dtype, dtype), operands, type(self))

    def below(self, x: Array, top: Array) -> Array:
        # 16 bits are rounded already, behind a barrier.
        return x.astype(top.dtype) - top if float_bits(self.xp, x.dtype) == 16 else _below(x, top)

    def divide(self, x: Array, t: Array) -> Array:
        # The second factor is 1. Its derivative multiplies by the quotient and then divides by t, as the rules do;
        # x / t², which the quotient's own derivative holds, may overflow.
        fixed = lax.stop_gradient(t)
        return x / fixed * jnp.exp(jnp.log(fixed) - jnp.log(t))

    def nan_unless(self, answered: Array, y: Array, like: Array) -> Array:
        # XLA on the CPU may leave the exponential of a NaN unset that it knows when it compiles (seen with JAX 0.10.2),
        # so the NaN is computed from ``like``.
        like = lax.stop_gradient(like)
        nan = jnp.sqrt(jnp.where(answered, 1.0, -1.0 - like * like))
        return jnp.where(answered, y, cast(nan, y.dtype))

    def indices(self, x: Array, dtype: DType = None) -> Array:
        index, axis = super().indices(x, dtype), self.axis % x.ndim
        spread = axes_of_mesh(x, axis)
        return index if spread is None else spread_like(x, index, *(None,) * axis, spread)

    def take(self, x: Array, index: Array) -> Array:
        return take_of_shards(x, index, self.axis % x.ndim)

    def running_sum(self, x: Array, dtype: DType) -> Array:
        return super().running_sum(on_each_device(x), dtype)

    def block_sums(self, terms: Array, size: int) -> Array:
        return _over_blocks(terms, 0, lax.add, size)

    def kth_greatest(self, x: Array, k: int) -> Array:
        return self.ranked(x, jnp.full((*x.shape[:-1], 1), k, self.index_dtype), k)

    def ranked(self, x: Array, rank: Array, greatest: int | None) -> Array:
        candidates = x if greatest is None else _candidates(x, greatest)[0]
        if candidates is x:  # it is no small part of the row, so XLA's search would take twice as long as this one
            return _search(lax.stop_gradient(x), jnp.ones_like(x, rank.dtype), rank)
        leading = lax.top_k(candidates, greatest)[0]
        # Not one of them by its index: XLA would sort the rows for that.
        return jnp.min(jnp.where(self.indices(leading, rank.dtype) < rank, leading, jnp.inf), axis=-1, keepdims=True)

    def computed_first(self, x: Array) -> Array:
        # Keys that are made in the program: since 0.11 XLA repeats their making in every round of Threefry, in
        # programs that take minutes to compile (seen with 0.11.0 and 0.12.0.1).
        return lax.optimization_barrier(x)

    def top_k_indices(self, x: Array, k: int) -> Array:
        return _greatest(x, k)

    def end_of_prefix(
        self, x: Array, mass_of: Callable[[Array], Array], target_of: Callable[[Array], Array]
    ) -> tuple[Array, Array]:
        # Computed once: in each program XLA may compile another exponential for the sum than for the search.
        mass = lax.optimization_barrier(lax.stop_gradient(mass_of(x)))
        target = jnp.broadcast_to(target_of(self.sum(mass)), (*x.shape[:-1], 1))
        x, target = lax.stop_gradient(x), lax.stop_gradient(target)
        end = _search(x, mass, target)
        above = jnp.sum(jnp.where(x > end, mass, 0.0), axis=-1, keepdims=True)
        return end, jnp.maximum(jnp.ceil((target - above) / mass_of(end)), 1.0)


class InMemoryOps(JaxOps):
    """The words of JAX where the rows are arguments of the program, and nothing is computed anew."""

    def cast(self, x: Array, dtype: DType) -> Array:
        return x.astype(dtype)

    def below(self, x: Array, top: Array) -> Array:
        return x.astype(top.dtype) - top


def _is_known(length: int) -> bool:
    """Whether a length is a number, and no symbol of jax.export."""
    return isinstance(length, int)


def _is_up_to(length: int, bound: int) -> bool:
    """Whether a length is known, and neither 0 nor above a bound."""
    return _is_known(length) and 0 < length <= bound


@jax.custom_jvp  # type: ignore[untyped-decorator]
def _below(x: Array, top: Array) -> Array:
    # The compiler cannot look through a minimum. Two copies, or XLA on the CPU writes the bound out for every entry.
    bound, shift = lax.optimization_barrier((top, top))
    return jnp.minimum(x, bound) - shift


@_below.defjvp  # type: ignore[untyped-decorator]
def _(operands: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    # That of a minimum would be 1/2 at the maximum.
    return _below(*operands), tangents[0] - tangents[1]


def _round(x: Array) -> Array:
    """Return 16-bit numbers as the program says they are; XLA computes in 32 bits, and leaves roundings out."""
    return lax.optimization_barrier(x)


@functools.partial(jax.jit, static_argnums=(3, 4))
@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _apply_where(
    mask: Array, operands: tuple[Array, ...], otherwise: Array, function: Callable[..., Array], ops: JaxOps
) -> Array:
    def once(state: tuple[Array, Array]) -> tuple[Array, Array]:
        # Tied to what changes in the loop, or XLA would compute the answers in front of it, needed or not.
        waiting, y, tied = lax.optimization_barrier((*state, operands))
        return ~waiting, jnp.where(mask, function(ops, *tied), y)

    # Under vmap both branches of a condition are taken, and a loop still runs only if it has to.
    return lax.while_loop(lambda state: state[0], once, (jnp.any(mask), otherwise))[1]


@_apply_where.__wrapped__.defjvp  # type: ignore[untyped-decorator]
def _(function: Callable[..., Array], ops: JaxOps, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    # A loop cannot be differentiated in reverse.
    mask, operands, _ = primals
    _, moved, otherwise_moved = tangents
    _, dy = jax.jvp(lambda *given: function(ops, *given), operands, moved)
    return _apply_where(*primals, function, ops), jnp.where(mask, dy, otherwise_moved)


@JaxOps.replace(log_of_sum)
@InMemoryOps.replace(log_of_sum)
def _log_of_short_sum(
    ops: JaxOps, terms: Array, total: Array, rows: tuple[Any, ...], close: Array | None = None
) -> Array:
    """Both sums in one pass, without a derivative of its own: formulas have rules."""
    del total, rows
    if not _is_up_to(terms.shape[ops.axis], _ONE_BY_ONE):
        return NotImplemented
    arrays = terms, others(ops, terms)
    zeros = tuple(one.dtype.type(0) for one in arrays)
    axis = ops.axis % terms.ndim
    total, rest = (lax.expand_dims(one, (axis,)) for one in lax.reduce(arrays, zeros, _add_each, (axis,)))
    outweighs = total < OUTWEIGHED
    return jnp.where(outweighs if close is None else outweighs & close, jnp.log1p(rest), jnp.log(nonzero(ops, total)))


def _add_each(sums: tuple[Array, ...], entries: tuple[Array, ...]) -> tuple[Array, ...]:
    # In the module: JAX would compile for every new function that it is given.
    return tuple(a + b for a, b in zip(sums, entries, strict=True))


def _over_blocks(x: Array, start: float, combine: Callable[..., Array], size: int) -> Array:
    """Reduce every block of ``size`` entries along the last axis."""
    if is_uneven(x, size):
        return over_cut_blocks(x, start, combine, size, _over_whole_blocks)
    return _over_whole_blocks(x, start, combine, size)


def _over_whole_blocks(x: Array, start: float, combine: Callable[..., Array], size: int) -> Array:
    # A window is computed together with its entries, which are then never kept, as a reshape of whole blocks is not.
    # The barrier keeps XLA from computing it anew for each use of the answer.
    window = (1,) * (x.ndim - 1) + (size,)
    padding = ((0, 0),) * (x.ndim - 1) + ((0, -x.shape[-1] % size),)
    return lax.optimization_barrier(lax.reduce_window(x, x.dtype.type(start), combine, window, window, padding))


def _top_k(x: Array, k: int) -> Array:
    """Return the indices of the k greatest entries, the lowest among those that XLA compares as equal."""
    # Its top_k puts 0 before -0, and tells subnormal numbers apart, which its comparisons on the CPU do not.
    return lax.top_k(_one_zero(on_each_device(x)), k)[1]


def _one_zero(x: Array) -> Array:
    return jnp.where(x == 0, 0.0, x)


def _greatest(x: Array, k: int) -> Array:
    """Return the indices of the k greatest entries, the lowest ones among equals, in increasing order."""
    entries, index = _candidates(x, k)
    return jnp.take_along_axis(index, jnp.sort(_top_k(entries, k), axis=-1), axis=-1)


def _candidates(x: Array, k: int) -> tuple[Array, Array]:
    """Return few entries that the k greatest are among, and their indices in increasing order."""
    n, size = x.shape[-1], _group_length(x.shape[-1], k)
    if -(-n // size) <= 8 * k:
        return x, jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), x.shape)
    # XLA's search is slow. The k greatest entries are in the k groups with the greatest maxima: whatever stands in
    # another group is less than each of those, or equal to it and of a higher index.
    chosen = _greatest(_over_blocks(x, -jnp.inf, lax.max, size), k)
    within = lax.broadcasted_iota(chosen.dtype, (*chosen.shape, size), chosen.ndim)
    index = (chosen[..., None] * size + within).reshape(*x.shape[:-1], k * size)
    return jnp.where(index < n, take_of_shards(x, jnp.minimum(index, n - 1), x.ndim - 1), -jnp.inf), index


def _group_length(n: int, k: int) -> int:
    size = 1 << ((n // k).bit_length() // 2)
    # Devices that share a row send the groups that were chosen; their maxima, twice as many, are in groups themselves.
    return size if jax.device_count() == 1 or size <= _SHORTEST_OF_SHARED else size // 2


@jax.jit  # type: ignore[untyped-decorator]
def _search(x: Array, mass: Array, target: Array) -> Array:
    """Return the least value of the shortest prefix whose mass reaches the target."""
    return lax.platform_dependent(x, mass, target, cpu=_search_in_cache, default=_search_bits)


def _search_bits(x: Array, mass: Array, target: Array) -> Array:
    # XLA sorts slowly on a CPU. The end is found bit by bit instead, by a sum over the row for each.
    bits = jnp.finfo(x.dtype).bits
    whole = jnp.int32 if bits == 32 else jnp.int64
    least, greatest = jnp.iinfo(whole).min, jnp.iinfo(whole).max

    def flipped(number: Array) -> Array:
        """Give integers the order of the numbers whose bits they are, or the other way round."""
        return number ^ ((number >> (bits - 1)) & greatest)

    order = flipped(lax.bitcast_convert_type(_one_zero(x), whole))  # -0 is no less than 0

    def set_bit(i: Array, end: Array) -> Array:
        more = end + lax.shift_left(jnp.ones_like(end), jnp.asarray(bits - 1 - i, whole))
        reached = jnp.sum(jnp.where(order >= more, mass, 0), axis=-1, keepdims=True, dtype=mass.dtype)
        return jnp.where((reached >= target) & (reached > 0), more, end)

    # What is never less than itself makes the start vary over devices as the rows and the targets do.
    varies = jnp.any(order < least, axis=-1, keepdims=True) | (target < target)
    end = lax.fori_loop(0, bits, set_bit, jnp.where(varies, 0, jnp.asarray(least, whole)))
    return jnp.where(end == least, -jnp.inf, lax.bitcast_convert_type(flipped(end), x.dtype))


def _search_in_cache(x: Array, mass: Array, target: Array) -> Array:
    batch, n = x.shape[:-1], x.shape[-1]
    lines = math.prod(batch)
    parts = -(-lines // max(1, _CACHED // n)) if _is_known(lines) and _is_known(n) else 1
    if parts < 2:
        return _search_bits(x, mass, target)
    parts = next(divisor for divisor in range(parts, lines + 1) if lines % divisor == 0)
    # A part has every so many-th row, so that rows on several devices stay where they are.
    cut = [one.reshape(lines // parts, parts, -1) for one in (x, mass, target)]

    def search(part: Array) -> Array:
        return _search_bits(*(lax.dynamic_index_in_dim(one, part, axis=1, keepdims=False) for one in cut))

    return jnp.moveaxis(lax.map(search, jnp.arange(parts)), 0, 1).reshape(*batch, 1)


heads = JaxHeads()

_OPEN = object()
"""Stands in a template for an operand, and in a call for an option, whose value is an argument of the program.

Anything else in a template is the operand itself.
"""

_Template = tuple[Any, ...]

_KEPT = 128
"""Programs that are kept, each for one formula, its options, shapes and dtypes.

A program takes a tenth of a megabyte (a softmax) to nine (a draw with filters), so this many fit into one gigabyte even
on a server whose batches are of ever new sizes; one that pads its batches needs a few dozen.
"""


def run(call: Call, operands: tuple[Array, ...]) -> Any:
    """Run a formula: compiled if the call is eager, as it stands under the caller's own ``jit``."""
    if call.reduction is not None:
        return call.in_steps(run, operands)
    eager = not portable()
    for one in operands:
        if isinstance(one, Tracer):
            eager = False
    if not eager:
        key, template, arrays = _split(call, operands)
        function = _differentiable(key, template, JaxOps)
        # Step by step, as in an eager gradient, JAX would find the -inf that stands for what does not exist.
        return (jax.jit(function) if jax.config.jax_debug_infs else function)(*arrays)
    if call.formula in _RANKED:
        call, operands = _with_open_rank(call, operands)
    # A number that is traced as an array does not make jit compile anew for each of its values.
    number = np.dtype(call.compute).type
    operands = tuple([number(one) if type(one) is float else one for one in operands])
    options = call.options
    open_options = {name: options[name] for name in call.formula.numbers if options[name]}
    call = call._replace(options={**options, **dict.fromkeys(open_options, _OPEN)})
    key, template, arrays = _split(call, operands)
    shapes = tuple([(one.shape, one.dtype) for one in arrays])
    return _compiled(key, template, shapes)(*arrays, *open_options.values())


def _with_rules(call: Call, operands: tuple[Any, ...], kind: type[JaxOps]) -> Any:
    """Run a formula as a part of a program, which differentiates it by its own rules."""
    key, template, arrays = _split(call, operands)
    return _differentiable(key, template, kind)(*arrays)  # type: ignore[arg-type]  # classes are hashable


def _split(call: Call, operands: tuple[Any, ...]) -> tuple[Call, _Template, list[Array]]:
    """Return what a call can be found by, and its arrays."""
    template = tuple([one if one is None or type(one) is float else _OPEN for one in operands])
    arrays = [one for one in operands if one is not None and type(one) is not float]
    return call._replace(options=tuple(call.options.items())), template, arrays  # type: ignore[arg-type]


_RANKED = frozenset({TRUNCATE, SAMPLE, LOG_PROB})
"""Formulas whose last operands are filters, and that take a number ``top_k`` as an option."""


def _with_open_rank(call: Call, operands: tuple[Array, ...]) -> tuple[Call, tuple[Array, ...]]:
    """Return a call where ``top_k`` is an operand, and the option only the power of two above it."""
    top_k = call.options["top_k"]
    if top_k is None:
        return call, operands
    bound = min(1 << (top_k - 1).bit_length(), operands[0].shape[call.axis])
    call = call._replace(options={**call.options, "top_k": bound})
    return call, (*operands[:-3], jnp.asarray(top_k, jnp.int32), *operands[-2:])


def words(x: Array, axis: int) -> Ops:
    """Return JAX's words for rows of ``x``."""
    return ops_of(JaxOps, library(x).xp, axis)


def explain(x: Array, formula: RowFormula) -> tuple[str, str]:
    """Return the engine for a formula of ``x``, and why."""
    del formula
    if isinstance(x, Tracer):
        return "portable", "the formula is traced into the caller's own jit, grad or vmap"
    return "jit", "an eager call is compiled by jax.jit, once for each shape and dtype"


def _is_narrow(x: Array) -> bool:
    return float_bits(library(x).xp, x.dtype) == 16


def _fill(template: _Template, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    left = iter(arrays)
    return tuple(next(left) if one is _OPEN else one for one in template)


def _tangents(template: _Template, arrays: tuple[Array, ...], dtype: DType) -> tuple[Array | None, ...]:
    """Return the tangent of each operand, None where it is zero or there is nothing to move."""
    given = iter(arrays)
    each = (next(given) if one is _OPEN else None for one in template)
    return tuple(None if one is None or isinstance(one, SymbolicZero) else cast(one, dtype) for one in each)


@functools.lru_cache(maxsize=_KEPT)
def _differentiable(key: Call, template: _Template, kind: type[JaxOps]) -> Callable[..., Array]:
    """Return a call as a function of its open operands and then its open options."""
    formula, fixed = key.formula, dict(key.options)
    names, first = [name for name, one in fixed.items() if one is _OPEN], template.count(_OPEN)

    def options(values: tuple[Array, ...]) -> dict[str, Any]:
        return {**fixed, **dict(zip(names, values, strict=True))}

    def ops_for(x: Array) -> Ops:
        return ops_of(kind, library(x).xp, key.axis)

    def evaluate(*arrays: Array) -> Array:
        call, operands = key._replace(options=options(arrays[first:])), _fill(template, arrays)
        x, *others = operands
        ops = ops_for(arrays[0])
        if not (formula in _WIDENS_LATE and _is_narrow(x) and call.compute == np.float32):
            return call.evaluate(ops, operands)
        x = x if kind is InMemoryOps else _round(x)
        return call.answer(formula.function(ops, x, *call.widen(ops, (None, *others))[1:], **call.options))

    if formula.jvp is None:
        return evaluate

    def derivative(
        operands: tuple[Array, ...], tangents: tuple[Array | None, ...], y: Array, values: tuple[Array, ...]
    ) -> Array:
        assert formula.jvp is not None
        return formula.jvp(ops_for(y), operands, tangents, y, **options(values))

    # Without a checkpoint what the rule computes, masks and zeros among it, would be kept for the backward pass.
    jvp = jax.checkpoint(derivative)
    function = jax.custom_jvp(evaluate)

    def rule(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
        moved = _tangents(template, tangents, key.compute)
        wide = key._replace(result=key.compute, squeeze=False)
        y = _differentiable(wide, template, kind)(*primals)  # type: ignore[arg-type]  # classes are hashable
        dy = jvp(key.widen(ops_for(y), _fill(template, primals)), moved, y, primals[first:])
        dy = key.answer(dy)
        # Transposed, this rounds the cotangent.
        return key.answer(y), _round(dy) if _is_narrow(dy) and kind is JaxOps else dy

    function.defjvp(rule, symbolic_zeros=True)
    return function  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=_KEPT)
def _compiled(key: Call, template: _Template, shapes: tuple[Any, ...]) -> Callable[..., Array]:
    del shapes
    # JAX keeps what it has compiled for a function as long as that lives, so each program has one of its own.
    return jax.jit(functools.partial(_differentiable(key, template, InMemoryOps)))  # type: ignore[no-any-return]
