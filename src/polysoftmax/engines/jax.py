"""JAX: derivative rules as ``custom_jvp``, and ``jax.jit`` around eager calls."""

from __future__ import annotations

import functools
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero

from polysoftmax._arrays import cast, float_bits, namespace
from polysoftmax.engines import Call, portable

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax._arrays import Array, DType


_IN_MEMORY: ContextVar[bool] = ContextVar("polysoftmax.jax.in_memory", default=False)
"""Whether the rows of the formula that is being traced are arguments of its program, and nothing is computed anew."""


def below(x: Array, top: Array) -> Array:
    """Return ``x - top`` for a bound ``top``, exactly 0 where they are equal, whatever the compiler makes of ``x``."""
    is_rounded = _IN_MEMORY.get() or _is_narrow(x)  # 16 bits are, behind a barrier
    return x - top if is_rounded else _below_computed(x, top)


@jax.custom_jvp  # type: ignore[untyped-decorator]
def _below_computed(x: Array, top: Array) -> Array:
    # Two copies, or XLA on the CPU writes the bound out for every entry (JAX 0.10.2).
    bound, shift = lax.optimization_barrier((top, top))
    return jnp.minimum(x, bound) - shift


@_below_computed.defjvp  # type: ignore[untyped-decorator]
def _(operands: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    # That of a minimum would be 1/2 at the maximum.
    return _below_computed(*operands), tangents[0] - tangents[1]


def as_rounded(x: Array) -> Array:
    """Return 16-bit numbers as the program says they are; XLA computes in 32 bits, and leaves roundings out."""
    return lax.optimization_barrier(x) if isinstance(x, Tracer) and not _IN_MEMORY.get() else x


_ARRAY = object()
"""Stands in a template for an operand that is an array; anything else in it is the operand itself."""

_Template = tuple[Any, ...]


def run(call: Call, operands: tuple[Array, ...]) -> Array:
    """Run a formula: compiled if the call is eager, as it stands under the caller's own ``jit``."""
    eager = not portable()
    for one in operands:
        if isinstance(one, Tracer):
            eager = False
    template: list[Any] = []
    arrays: list[Array] = []
    for one in operands:
        if one is None or (isinstance(one, float) and not eager):
            template.append(one)
            continue
        # A number that is traced as an array does not make jit compile anew for each of its values.
        arrays.append(np.dtype(call.compute).type(one) if isinstance(one, float) else one)
        template.append(_ARRAY)
    compiled = _compiled if eager else _differentiable
    options = tuple(call.options.items())
    hashable = Call(call.formula, options, call.compute, call.result, call.squeeze)  # type: ignore[arg-type]
    return compiled(hashable, tuple(template))(*arrays)


def describe(x: Array, name: str) -> tuple[str, str]:
    """Name the engine for a formula of ``x``, and why it was chosen."""
    del name
    if isinstance(x, Tracer):
        return "portable", "the formula is traced into the caller's own jit, grad or vmap"
    return "jit", "an eager call is compiled by jax.jit, once for each shape and dtype"


def _is_narrow(x: Array) -> bool:
    return float_bits(namespace(x), x.dtype) == 16


def _fill(template: _Template, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    left = iter(arrays)
    return tuple(next(left) if one is _ARRAY else one for one in template)


def _tangents(template: _Template, arrays: tuple[Array, ...], dtype: DType) -> tuple[Array | None, ...]:
    """Return the tangent of each operand, None where it is zero or there is nothing to move."""
    given = iter(arrays)
    each = (next(given) if one is _ARRAY else None for one in template)
    return tuple(None if one is None or isinstance(one, SymbolicZero) else cast(one, dtype) for one in each)


@functools.lru_cache(maxsize=4096)
def _differentiable(key: Call, template: _Template) -> Callable[..., Array]:
    call = key._replace(options=dict(key.options))
    formula = call.formula

    def evaluate(*arrays: Array) -> Array:
        x, *others = operands = _fill(template, arrays)
        if not (formula.promotes and _is_narrow(x) and call.compute == np.float32):
            return call.evaluate(operands)
        # XLA on the CPU keeps rows that are widened before the maximum as an array of their own.
        return call.answer(formula.function(as_rounded(x), *call.widen((None, *others))[1:], **call.options))

    if formula.jvp is None:
        return evaluate
    # Without a checkpoint what the rule computes, masks and zeros among it, would be kept for the backward pass.
    jvp = jax.checkpoint(functools.partial(formula.jvp, **call.options))
    function = jax.custom_jvp(evaluate)

    def rule(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
        moved = _tangents(template, tangents, call.compute)
        y = _differentiable(key._replace(result=call.compute, squeeze=False), template)(*primals)
        dy = jvp(call.widen(_fill(template, primals)), moved, y)
        dy = call.answer(dy)
        return call.answer(y), as_rounded(dy) if _is_narrow(dy) else dy  # transposed, this rounds the cotangent

    function.defjvp(rule, symbolic_zeros=True)
    return function  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=4096)
def _compiled(key: Call, template: _Template) -> Callable[..., Array]:
    function = _differentiable(key, template)

    def in_memory(*arrays: Array) -> Array:
        token = _IN_MEMORY.set(True)
        try:
            return function(*arrays)
        finally:
            _IN_MEMORY.reset(token)

    return jax.jit(in_memory)  # type: ignore[no-any-return]
