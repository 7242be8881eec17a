"""Linear heads as two operators of PyTorch, which compiled code calls without looking inside.

Traced, the loop over chunks of rows would be as many copies of its body, and Inductor would keep their logits.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence  # noqa: TC003  # PyTorch reads the annotations of operators
from functools import cache
from typing import Any

import torch
from torch import Tensor

from polysoftmax._linear import Head, Heads, gradients
from polysoftmax._losses import CROSS_ENTROPY
from polysoftmax._probability import LOG_PROB
from polysoftmax.engines import chosen, using

_FORMULAS = {one.name: one for one in (CROSS_ENTROPY, LOG_PROB)}
"""An operator takes no objects, so it is given the name of the formula."""


def run(head: Head, arrays: tuple[Any, ...]) -> Tensor:
    """Put a head into the graph that is being made."""
    kinds = "".join(["-" if one is None else "f" if isinstance(one, float) else "t" for one in arrays])
    text = f"{_chosen()!r}, {kinds!r}, {head.formula.name!r}, {head.options!r}, {tuple(head[2:])!r}"
    tensors = [one for one in arrays if isinstance(one, Tensor)]
    return _answers(text, tensors, [one for one in arrays if isinstance(one, float)])


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _chosen() -> str:
    """Return the engine of compiled code; what is chosen while torch.compile traces stays in it."""
    return chosen()


@cache  # there are as many texts as heads in the code that was compiled
def _read(text: str) -> tuple[str, str, Head]:
    engine, kinds, name, options, fixed = ast.literal_eval(text)
    return engine, kinds, Head(_FORMULAS[name], options, *fixed)


def _arrays(kinds: str, tensors: Sequence[Tensor], numbers: Sequence[float]) -> tuple[Any, ...]:
    given = {"t": iter(tensors), "f": iter(numbers)}
    return tuple(None if kind == "-" else next(given[kind]) for kind in kinds)


@torch.library.custom_op("polysoftmax::head", mutates_args=())  # type: ignore[untyped-decorator]
def _answers(text: str, tensors: Sequence[Tensor], numbers: Sequence[float]) -> Tensor:
    engine, kinds, head = _read(text)
    with using(engine):
        return Heads().answers(head, *_arrays(kinds, tensors, numbers))


@torch.library.custom_op("polysoftmax::head_gradients", mutates_args=())  # type: ignore[untyped-decorator]
def _gradients(
    text: str, tensors: Sequence[Tensor], numbers: Sequence[float], cotangent: Tensor, wanted: Sequence[bool]
) -> list[Tensor]:
    engine, kinds, head = _read(text)
    asked = iter(wanted)
    with using(engine):
        found = gradients(
            head, cotangent, _arrays(kinds, tensors, numbers), tuple(kind == "t" and next(asked) for kind in kinds)
        )
    return [one for one in found if one is not None]


@_answers.register_fake  # type: ignore[untyped-decorator]
def _(text: str, tensors: Sequence[Tensor], numbers: Sequence[float]) -> Tensor:
    del numbers
    _, kinds, head = _read(text)
    hidden, indices = tensors[0], tensors[2 if kinds[2] == "-" else 3]
    shape = (hidden.shape[0],) if head.squeeze else (hidden.shape[0], indices.shape[-1])
    return hidden.new_empty(shape, dtype=torch.promote_types(hidden.dtype, torch.float32))


@_gradients.register_fake  # type: ignore[untyped-decorator]
def _(
    text: str, tensors: Sequence[Tensor], numbers: Sequence[float], cotangent: Tensor, wanted: Sequence[bool]
) -> list[Tensor]:
    del text, numbers, cotangent
    return [torch.empty_like(one) for one, asked in zip(tensors, wanted, strict=True) if asked]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    text, tensors, numbers = inputs
    ctx.kept = text, list(numbers)
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, cotangent: Tensor) -> tuple[Any, ...]:
    text, numbers = ctx.kept
    wanted = list(ctx.needs_input_grad[1])
    found = iter(_gradients(text, list(ctx.saved_tensors), numbers, cotangent, wanted))
    return None, [next(found) if asked else None for asked in wanted], [None] * len(numbers)


_answers.register_autograd(_backward, setup_context=_keep)
