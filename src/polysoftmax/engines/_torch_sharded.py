"""PyTorch's DTensor: where arrays lie, and rows that are whole on each device, which are computed there.

Rows that are spread are a graph of DTensor's own operations, in the words of `_torch_spread.py`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from polysoftmax._sampling import SAMPLE
from polysoftmax._threefry import fold

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.distributed.tensor.placement_types import Placement

    from polysoftmax._arrays import Array
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


def beside_each_other(operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return rows as final numbers in contiguous parts, and the other operands where they meet these."""
    x = operands[0]
    places = [Shard(p.dim) if p.is_shard() else Replicate() for p in x.placements]
    x = x.redistribute(x.device_mesh, places)
    return x, *(beside(one, x) if isinstance(one, torch.Tensor) else one for one in operands[1:])


def beside(one: Array, x: DTensor) -> DTensor:
    """Return an operand where it meets the entries of ``x``; every device has all of what is no DTensor."""
    if not isinstance(one, DTensor):
        one = replicated(one, x)
    missing = x.ndim - one.ndim
    places = [
        Shard(p.dim - missing)
        if p.is_shard() and p.dim >= missing and one.shape[p.dim - missing] == x.shape[p.dim]
        else Replicate()
        for p in x.placements
    ]
    return one.redistribute(x.device_mesh, places)


def replicated(one: Array, x: DTensor) -> DTensor:
    """Return what every device has as a DTensor."""
    return DTensor.from_local(one, x.device_mesh, [Replicate()] * x.device_mesh.ndim, run_check=False)


def from_parts(local: Array, x: DTensor, shape: tuple[int, ...], places: Sequence[Placement]) -> DTensor:
    """Return what the devices of ``x`` hold as one DTensor; the parts of rows may differ in length."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, x.device_mesh, places, run_check=False, shape=torch.Size(shape), stride=stride)


def _on_this_device(one: Any, x: DTensor) -> Any:
    """Return the part of an operand that belongs to this device's rows of ``x``."""
    return beside(one, x).to_local() if isinstance(one, torch.Tensor) else one


def _everywhere(y: Array, x: DTensor, axis: int, *, squeezed: bool) -> DTensor:
    """Return this device's answers as a part of those of all."""
    shape = list(x.shape)
    if squeezed:
        del shape[axis]
    else:
        shape[axis] = y.shape[axis]
    places = [Shard(p.dim - (squeezed and p.dim > axis)) if p.is_shard() else p for p in x.placements]
    return from_parts(y, x, tuple(shape), places)
