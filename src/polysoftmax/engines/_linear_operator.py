"""Linear heads as operators of PyTorch, which compiled code calls without looking inside.

Traced, the loop over chunks of rows would be as many copies of its body, and Inductor would keep their logits.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence  # noqa: TC003  # PyTorch reads the annotations of operators
from functools import cache
from typing import Any

import torch
from torch import Tensor

from polysoftmax._linear import Head, Heads, answers_and_gradients, gradients
from polysoftmax._losses import CROSS_ENTROPY
from polysoftmax._probability import LOG_PROB
from polysoftmax.engines import chosen, using

_FORMULAS = {one.name: one for one in (CROSS_ENTROPY, LOG_PROB)}
"""An operator takes no objects, so it is given the name of the formula."""


def answers(head: Head, arrays: tuple[Any, ...]) -> Tensor:
    """Put the answers of a head into the graph that is being made."""
    return _answers(*_arguments(head, arrays))


def total(head: Head, cotangent: Tensor, arrays: tuple[Any, ...]) -> Tensor:
    """Put the sum of a head's answers, each times its cotangent, into the graph, and the gradients beside it."""
    wanted = [one.requires_grad for one in arrays if isinstance(one, Tensor)]
    return _total(*_arguments(head, arrays), cotangent, wanted)[0]


def _arguments(head: Head, arrays: tuple[Any, ...]) -> tuple[str, list[Tensor], list[float]]:
    kinds = "".join(["-" if one is None else "f" if isinstance(one, float) else "t" for one in arrays])
    text = f"{_chosen()!r}, {kinds!r}, {head.formula.name!r}, {head.options!r}, {tuple(head[2:])!r}"
    tensors = [one for one in arrays if isinstance(one, Tensor)]
    return text, tensors, [one for one in arrays if isinstance(one, float)]


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


def _of_arrays(kinds: str, wanted: Sequence[bool]) -> tuple[bool, ...]:
    asked = iter(wanted)
    return tuple(kind == "t" and next(asked) for kind in kinds)


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
    with using(engine):
        found = gradients(head, cotangent, _arrays(kinds, tensors, numbers), _of_arrays(kinds, wanted))
    return [one for one in found if one is not None]


@torch.library.custom_op("polysoftmax::head_total", mutates_args=())  # type: ignore[untyped-decorator]
def _total(
    text: str, tensors: Sequence[Tensor], numbers: Sequence[float], cotangent: Tensor, wanted: Sequence[bool]
) -> list[Tensor]:
    engine, kinds, head = _read(text)
    arrays = _arrays(kinds, tensors, numbers)
    with using(engine):
        found, of_arrays = answers_and_gradients(head, cotangent, arrays, _of_arrays(kinds, wanted))
    return [(found * cotangent).sum(), found, *(one for one in of_arrays if one is not None)]


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


@_total.register_fake  # type: ignore[untyped-decorator]
def _(
    text: str, tensors: Sequence[Tensor], numbers: Sequence[float], cotangent: Tensor, wanted: Sequence[bool]
) -> list[Tensor]:
    del text, numbers
    of_arrays = [torch.empty_like(one) for one, asked in zip(tensors, wanted, strict=True) if asked]
    return [cotangent.new_empty(()), torch.empty_like(cotangent), *of_arrays]


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


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.numbers, ctx.wanted = len(inputs[2]), list(inputs[4])
    ctx.save_for_backward(*output[1:])


def _scale(ctx: Any, cotangents: list[Tensor]) -> tuple[Any, ...]:
    of_total = cotangents[0]
    found, *of_arrays = (one * of_total for one in ctx.saved_tensors)
    given = iter(of_arrays)
    of_tensors = [next(given) if asked else None for asked in ctx.wanted]
    return None, of_tensors, [None] * ctx.numbers, found, None


_answers.register_autograd(_backward, setup_context=_keep)
_total.register_autograd(_scale, setup_context=_keep_gradients)
