"""PyTorch's DTensor. Rows that are whole on each device are computed there, and nothing is sent.

Rows that are spread are a graph of DTensor's own operations, in which indices are DTensors, too.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from polysoftmax._sampling import SAMPLE
from polysoftmax._threefry import fold
from polysoftmax.engines._torch_words import DifferentiatedOps, TorchOps

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax._arrays import Array, DType
    from polysoftmax._formula import Call


def has_whole_rows(x: DTensor, axis: int) -> bool:
    """Whether rows are whole on each device, and the numbers in them final."""
    return all(one.is_replicate() or (one.is_shard() and one.dim != axis) for one in x.placements)


def run(call: Call, operands: tuple[Array, ...], run_local: Callable[[Call, tuple[Array, ...]], Any]) -> Any:
    """Run a call on the rows of each device."""
    x, axis = operands[0], call.axis
    if call.reduction is not None:
        return call.in_steps(lambda call, operands: run(call, operands, run_local), operands)
    local = [_on_this_device(one, x) for one in operands]
    if call.formula is SAMPLE and call.options["is_one_key"]:
        # A device does not know which rows are its own.
        numbers = torch.arange(math.prod(x.shape[:-1]), dtype=torch.int32, device=x.device)
        local[1] = fold(local[1], _on_this_device(numbers.reshape(*x.shape[:-1], 1), x))
        call = call._replace(options={**call.options, "is_one_key": False})
    y = run_local(call, tuple(local))
    several = y if isinstance(y, tuple) else (y,)
    answers = tuple([_everywhere(one, x, axis, squeezed=call.squeeze) for one in several])
    return answers if isinstance(y, tuple) else answers[0]


def _on_this_device(one: Any, x: DTensor) -> Any:
    """Return the part of an operand that belongs to this device's rows of ``x``."""
    if not isinstance(one, torch.Tensor):
        return one
    if not isinstance(one, DTensor):  # every device has all of it
        one = _replicated(one, x)
    missing = x.ndim - one.ndim
    places = [
        Shard(p.dim - missing)
        if p.is_shard() and p.dim >= missing and one.shape[p.dim - missing] == x.shape[p.dim]
        else Replicate()
        for p in x.placements
    ]
    return one.redistribute(x.device_mesh, places).to_local()


def _everywhere(y: Array, x: DTensor, axis: int, *, squeezed: bool) -> DTensor:
    """Return this device's answers as a part of those of all."""
    shape = list(x.shape)
    if squeezed:
        del shape[axis]
    else:
        shape[axis] = y.shape[axis]
    places = [Shard(p.dim - (squeezed and p.dim > axis)) if p.is_shard() else p for p in x.placements]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(y, x.device_mesh, places, run_check=False, shape=torch.Size(shape), stride=stride)


class ShardedOps(TorchOps):
    """The words of PyTorch for DTensors: indices that are DTensors, and no gather along an axis that is spread."""

    def indices(self, x: Array, dtype: DType = None) -> Array:
        axis = self.axis % x.ndim
        places = [p if p.is_shard(axis) else Replicate() for p in x.placements]
        return _replicated(super().indices(x, dtype), x).redistribute(x.device_mesh, places)

    def take(self, x: Array, index: Array) -> Array:
        if index.shape[self.axis] != 1 or has_whole_rows(x, self.axis % x.ndim):
            return super().take(x, index)
        return torch.where(self.indices(x, index.dtype) == index, x, 0.0).sum(self.axis, keepdim=True).to(x.dtype)

    # What a draw and a filter are made of goes from place to place in a row.

    def row_numbers(self, x: Array) -> Array:
        raise _spread()

    def block_of(self, x: Array, block: Array, size: int) -> tuple[Array, Array]:
        raise _spread()

    def end_of_prefix(
        self, x: Array, mass_of: Callable[[Array], Array], target_of: Callable[[Array], Array]
    ) -> tuple[Array, Array]:
        raise _spread()

    def ranked(self, x: Array, rank: Array, greatest: int | None) -> Array:
        raise _spread()

    def kth_greatest(self, x: Array, k: int) -> Array:
        raise _spread()

    def top_k_indices(self, x: Array, k: int) -> Array:
        raise _spread()


def _spread() -> NotImplementedError:
    msg = (
        "a DTensor whose rows are spread over devices cannot be drawn from, nor its tokens ordered: "
        "bring whole rows to each device first, logits.redistribute(placements=[Shard(0)])"
    )
    return NotImplementedError(msg)


def _replicated(one: Array, x: DTensor) -> DTensor:
    return DTensor.from_local(one, x.device_mesh, [Replicate()] * x.device_mesh.ndim, run_check=False)


def kind(*, differentiates: bool) -> type[TorchOps]:
    """Return the words for DTensors."""
    return ShardedDifferentiatedOps if differentiates else ShardedOps


class ShardedDifferentiatedOps(ShardedOps, DifferentiatedOps):
    """The words of PyTorch for DTensors, where it differentiates the formula itself."""
