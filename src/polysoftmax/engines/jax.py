"""JAX: derivative rules as ``custom_jvp``, and ``jax.jit`` around eager calls."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.custom_derivatives import SymbolicZero

from polysoftmax._arrays import cast
from polysoftmax.engines import portable

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax._arrays import Array
    from polysoftmax.engines import Call

_ARRAY = object()
"""Stands in a template for an operand that is an array; anything else in it is the operand itself."""

_Template = tuple[Any, ...]


def run(call: Call, operands: tuple[Array, ...]) -> Array:
    """Run a formula: compiled if the call is eager, as it stands under the caller's own ``jit``."""
    traced = any(isinstance(one, jax.core.Tracer) for one in operands)
    if not traced and not portable():
        # A number that is traced as an array does not make jit compile anew for each of its values.
        scalar = np.dtype(call.compute).type
        operands = tuple(scalar(one) if isinstance(one, float) else one for one in operands)
        compiled = _compiled
    else:
        compiled = _differentiable
    template = tuple(one if one is None or isinstance(one, float) else _ARRAY for one in operands)
    key = call._replace(options=tuple(call.options.items()))  # type: ignore[arg-type]  # hashable
    return compiled(key, template)(*[one for one in operands if one is not None and not isinstance(one, float)])


def describe(x: Array) -> tuple[str, str]:
    """Name the engine for ``x``, and why it was chosen."""
    if isinstance(x, jax.core.Tracer):
        return "portable", "the formula is traced into the caller's own jit, grad or vmap"
    return "jit", "an eager call is compiled by jax.jit, once for each shape and dtype"


def _fill(template: _Template, arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    left = iter(arrays)
    return tuple(next(left) if one is _ARRAY else one for one in template)


@functools.lru_cache(maxsize=4096)
def _differentiable(key: Call, template: _Template) -> Callable[..., Array]:
    call = key._replace(options=dict(key.options))
    formula = call.formula

    def evaluate(*arrays: Array) -> Array:
        return call.evaluate(_fill(template, arrays))

    if formula.jvp is None:
        return evaluate
    # Without checkpoint, what the rule computes from the input would be kept for the backward pass.
    jvp = jax.checkpoint(functools.partial(formula.jvp, **call.options))
    function = jax.custom_jvp(evaluate)

    def rule(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
        nonzero = tuple(None if isinstance(one, SymbolicZero) else one for one in tangents)
        by_operand = _fill(template, nonzero)
        moved = {
            i for i, (one, t) in enumerate(zip(template, by_operand, strict=True)) if one is _ARRAY and t is not None
        }
        if not moved <= set(formula.differentiated):
            dense = tuple(_dense(x, t) for x, t in zip(primals, nonzero, strict=True))
            y, dy = jax.jvp(evaluate, primals, dense)
            return y, dy
        wide = key._replace(result=call.compute)
        y = _differentiable(wide, template)(*primals)
        tangent_of = tuple(t if i in moved else None for i, t in enumerate(by_operand))
        widened = tuple(None if t is None else cast(t, call.compute) for t in tangent_of)
        dy = jvp(call.widen(_fill(template, primals)), widened, y)
        return cast(y, call.result), cast(dy, call.result)

    function.defjvp(rule, symbolic_zeros=True)
    return function  # type: ignore[no-any-return]


def _dense(x: Array, tangent: Array | None) -> Array:
    if tangent is not None:
        return tangent
    x = jax.numpy.asarray(x)
    return np.zeros(x.shape, x.dtype if jax.numpy.issubdtype(x.dtype, np.inexact) else jax.dtypes.float0)


@functools.lru_cache(maxsize=4096)
def _compiled(key: Call, template: _Template) -> Callable[..., Array]:
    return jax.jit(_differentiable(key, template))  # type: ignore[no-any-return]
