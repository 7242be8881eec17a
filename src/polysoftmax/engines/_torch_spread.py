"""The words of PyTorch for DTensors whose rows may be spread over devices.

What reduces a row is merged over the devices at once, so that it is sent once, however often it is used. Logits are
never gathered: each device looks at its own, and a few words a row are added up.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate

from polysoftmax._truncation import is_among_greatest
from polysoftmax.engines._torch_sharded import beside, beside_each_other, from_parts, has_whole_rows, replicated
from polysoftmax.engines._torch_words import DifferentiatedOps, TorchOps, words

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax._arrays import Array, DType
    from polysoftmax._formula import Call

_DIGIT = 4
"""Bits of a limit that one all-reduce finds."""


def evaluate_spread(call: Call, operands: tuple[Array, ...]) -> Any:
    """Run a formula of DTensors as it stands."""
    if torch.is_inference_mode_enabled():
        # There `&` and `|` of DTensors return what stands on their left (seen with PyTorch 2.13).
        with torch.inference_mode(mode=False), torch.no_grad():
            return evaluate_spread(call, operands)
    operands = beside_each_other(operands)
    return call.evaluate(words(operands[0], call.axis), operands)


class SpreadOps(TorchOps):
    """The words of PyTorch for DTensors."""

    def max(self, x: Array) -> Array:
        x = self.constant(x)
        return super().max(x) if self._is_whole(x) else self._extreme(x, "max")

    def min(self, x: Array) -> Array:
        return super().min(x) if self._is_whole(x) else self._extreme(x, "min")

    def sum(self, x: Array) -> Array:
        return _everywhere(super().sum(x))

    def count(self, flags: Array) -> Array:
        return _everywhere(super().count(flags))

    def any_of(self, flags: Array) -> Array:
        return super().any_of(flags) if self._is_whole(flags) else self.max(flags.to(torch.int8)) > 0

    def argmax(self, x: Array) -> Array:
        if self._is_whole(x):
            return super().argmax(x)
        return self.min(torch.where(x < self.max(x), x.shape[self.axis] - 1, self.indices(x, self.index_dtype)))

    def arange(self, n: int, dtype: DType, like: Array) -> Array:
        return replicated(super().arange(n, dtype, like), like)

    def indices(self, x: Array, dtype: DType = None) -> Array:
        axis = self.axis % x.ndim
        start, length = _span(x, axis)
        shape = [1] * x.ndim
        shape[axis] = length
        along = torch.arange(start, start + length, dtype=dtype or torch.int32, device=x.device).reshape(shape)
        shape[axis] = x.shape[axis]
        return from_parts(along, x, tuple(shape), [p if p.is_shard(axis) else Replicate() for p in x.placements])

    def row_numbers(self, x: Array) -> Array:
        return beside(super().row_numbers(x), x)

    def broadcast_like(self, x: Array, like: Array) -> Array:
        return super().broadcast_like(x, like).redistribute(like.device_mesh, like.placements)

    def take(self, x: Array, index: Array) -> Array:
        if self._is_whole(x):
            return super().take(x, index)
        if index.shape[self.axis] == 1:
            return self.sum(torch.where(self.indices(x, index.dtype) == index, x, 0.0)).to(x.dtype)
        entries, is_here = self._entries_here(x, index)
        found = torch.where(is_here, entries, 0)
        return self._merged(found.to(torch.int8) if x.dtype == torch.bool else found, x, "sum").to(x.dtype)

    def block_of(self, x: Array, block: Array, size: int) -> tuple[Array, Array]:
        """Return a block for each device, one after another: what the device has of it, and -inf for the rest."""
        if self._is_whole(x):
            return super().block_of(x, block, size)
        index = block.to(torch.int32) * size + self.arange(size, torch.int32, x)
        entries, is_here = self._entries_here(x, index)
        entries = torch.where(is_here, entries, -math.inf if self.is_floating(x) else False)
        shape = (*_shape_of_all(entries, x, x.ndim - 1)[:-1], size * _parts(x, x.ndim - 1))
        along = self._here(index, x).expand(entries.shape)
        return from_parts(entries, x, shape, x.placements), from_parts(along, x, shape, x.placements)

    def block_sums(self, terms: Array, size: int) -> Array:
        if self._is_whole(terms):
            return super().block_sums(terms, size)
        local, (start, length) = terms.to_local(), _span(terms, terms.ndim - 1)
        sums = local.new_zeros((*local.shape[:-1], -(-terms.shape[-1] // size)))
        if length:
            # Filled up to whole blocks, so that one that is not cut has the sum that it has on one device.
            blocks = torch.nn.functional.pad(local, (start % size, -(start + length) % size)).unflatten(-1, (-1, size))
            first = start // size
            sums[..., first : first + blocks.shape[-2]] = blocks.sum(-1)
        return self._merged(sums, terms, "sum")

    # Order, along the last axis alone

    def kth_greatest(self, x: Array, k: int) -> Array:
        return super().kth_greatest(x, k) if self._is_whole(x) else self.ranked(x, self._number(k, x), k)

    def ranked(self, x: Array, rank: Array, greatest: int | None) -> Array:
        if self._is_whole(x):
            return super().ranked(x, rank, greatest)
        return self._limit(x, torch.ones_like(x, dtype=torch.int64), rank)[0]

    def top_k_indices(self, x: Array, k: int) -> Array:
        if self._is_whole(x):
            return super().top_k_indices(x, k)
        is_kept = is_among_greatest(self, torch.where(x == x, x, math.inf), k)  # a NaN belongs to what is taken
        slot = torch.where(is_kept, self.running_sum(is_kept, torch.int64) - 1, k).clamp(max=k).to_local()
        found = slot.new_zeros((*slot.shape[:-1], k + 1))
        found.scatter_(-1, slot, self.indices(x, torch.int64).to_local().expand(slot.shape))
        return self._merged(found[..., :k], x, "sum")

    def keep_first(self, flags: Array, room: Array) -> Array:
        if self._is_whole(flags):
            return super().keep_first(flags, room)
        return flags & (self.running_sum(flags, torch.int64) <= room)

    def end_of_prefix(
        self, x: Array, mass_of: Callable[[Array], Array], target_of: Callable[[Array], Array]
    ) -> tuple[Array, Array]:
        if self._is_whole(x):
            return super().end_of_prefix(x, mass_of, target_of)
        mass = mass_of(x).to(torch.float64)
        target = target_of(self.sum(mass))
        end, above = self._limit(x, mass, target)
        return end, torch.ceil((target - above) / mass_of(end)).clamp(min=1.0)

    def running_sum(self, x: Array, dtype: DType) -> Array:
        if self._is_whole(x):
            return super().running_sum(x, dtype)
        local, axis = x.to_local(), x.ndim - 1
        sums = local.cumsum(-1, dtype=dtype)
        totals = from_parts(local.sum(-1, True, dtype=dtype), x, (*x.shape[:-1], _parts(x, axis)), x.placements)
        place, _ = _span(totals, axis)
        before = self._here(totals, x)[..., :place].sum(-1, True)
        return from_parts(sums + before, x, tuple(x.shape), x.placements)

    def _limit(self, x: Array, mass: Array, target: Array) -> tuple[Array, Array]:
        """Return the last value of the shortest prefix whose mass reaches the target, and the mass above that value.

        The value is found digit by digit, from the mass that lies at or above each of the values of a digit.
        """
        ordered, place = _order_of(x.to_local()).sort(-1)
        whole = torch.iinfo(ordered.dtype)
        below = mass.to_local().gather(-1, place)
        from_each = torch.nn.functional.pad(below.flip(-1).cumsum(-1).flip(-1), (0, 1))
        target = self._here(target, x).expand(*ordered.shape[:-1], 1)

        def mass_from(ends: Array) -> Array:
            return self._merged(from_each.gather(-1, torch.searchsorted(ordered, ends)), x, "sum").to_local()

        end = torch.full_like(target, whole.min, dtype=ordered.dtype)
        digits = torch.arange(1, 1 << _DIGIT, dtype=ordered.dtype, device=x.device)
        for shift in range(whole.bits - _DIGIT, -1, -_DIGIT):
            reached = mass_from(end + (digits << shift))
            end = end + (((reached >= target) & (reached > 0)).sum(-1, True).to(end.dtype) << shift)
        above = mass_from(end + 1)
        value = torch.where(end == whole.min, -math.inf, _number_of(end, x.dtype))
        shape = (*x.shape[:-1], 1)
        places = [Replicate() if p.is_shard(x.ndim - 1) else p for p in x.placements]
        return from_parts(value, x, shape, places), from_parts(above, x, shape, places)

    # Parts of rows

    def _is_whole(self, x: Array) -> bool:
        return has_whole_rows(x, self.axis % x.ndim)

    def _number(self, number: int, x: Array) -> DTensor:
        return replicated(torch.full((1,) * x.ndim, number, device=x.device), x)

    def _here(self, one: Array, x: Array) -> Array:
        """Return all of an array along the axis, for this device's rows of ``x``."""
        axis = self.axis % x.ndim
        places = [
            p if p.is_shard() and p.dim != axis and one.shape[p.dim] == x.shape[p.dim] else Replicate()
            for p in x.placements
        ]
        return one.redistribute(x.device_mesh, places).to_local()

    def _extreme(self, x: Array, how: str) -> DTensor:
        local, axis = x.to_local(), self.axis % x.ndim
        if not local.shape[axis]:  # there are more devices than entries
            shape = [1 if i == axis else n for i, n in enumerate(local.shape)]
            lowest, highest = (-math.inf, math.inf) if self.is_floating(x) else _range(x.dtype)
            local = local.new_full(shape, lowest if how == "max" else highest)
        found = (torch.amax if how == "max" else torch.amin)(local, axis, True)
        if not self.is_floating(x):
            return self._merged(found, x, how)
        # As integers, because a collective may lose a NaN among numbers.
        merged = self._merged(_order_of(found), x, how)
        return from_parts(_number_of(merged.to_local(), x.dtype), x, tuple(merged.shape), merged.placements)

    def _merged(self, local: Array, x: Array, how: str) -> DTensor:
        """Reduce what the devices have found in their parts of the rows of ``x``."""
        axis = self.axis % x.ndim
        shape = _shape_of_all(local, x, axis)
        return _everywhere(from_parts(local, x, shape, [Partial(how) if p.is_shard(axis) else p for p in x.placements]))

    def _entries_here(self, x: Array, index: Array) -> tuple[Array, Array]:
        """Return the entries at an index where they are on this device, any others elsewhere, and which are here."""
        axis, local = self.axis % x.ndim, x.to_local()
        start, length = _span(x, axis)
        at = self._here(index, x) - start
        is_here = (at >= 0) & (at < length)
        if not length:
            return torch.zeros_like(at, dtype=x.dtype), is_here
        return super().take(local, at.clamp(0, length - 1).to(torch.int64)), is_here


def _everywhere(y: DTensor) -> DTensor:
    """Merge what is known in parts, once for all of its uses."""
    if not any(p.is_partial() for p in y.placements):
        return y
    return y.redistribute(y.device_mesh, [Replicate() if p.is_partial() else p for p in y.placements])


def _shape_of_all(local: Array, x: DTensor, axis: int) -> tuple[int, ...]:
    """Return the shape of what the devices have found for their rows of ``x``, with this length along the axis."""
    spread = {p.dim for p in x.placements if p.is_shard()} - {axis}
    return tuple(x.shape[i] if i in spread else n for i, n in enumerate(local.shape))


def _order_of(x: Array) -> Array:
    """Return integers in the order of floats: -0 is no less than 0, and NaN is the greatest."""
    x = torch.where(x == 0, 0.0, torch.where(x == x, x, math.nan))
    return _flipped(x.view(torch.int64 if x.dtype == torch.float64 else torch.int32))


def _number_of(order: Array, dtype: DType) -> Array:
    return _flipped(order).view(dtype)


def _flipped(number: Array) -> Array:
    """Give integers the order of the numbers whose bits they are, or the other way round."""
    whole = torch.iinfo(number.dtype)
    return number ^ ((number >> (whole.bits - 1)) & whole.max)


def _range(dtype: DType) -> tuple[int, int]:
    info = torch.iinfo(dtype)
    return info.min, info.max


def _parts(x: DTensor, axis: int) -> int:
    """Return the number of devices that an axis is spread over."""
    sizes = zip(x.placements, x.device_mesh.shape, strict=True)
    return math.prod(size for place, size in sizes if place.is_shard(axis))


def _span(x: DTensor, axis: int) -> tuple[int, int]:
    """Return where this device's part of an axis begins, and its length."""
    start, length = 0, x.shape[axis]
    for place, size, number in zip(x.placements, x.device_mesh.shape, x.device_mesh.get_coordinate(), strict=True):
        if place.is_shard(axis):
            each = -(-length // size)
            skipped = min(number * each, length)
            start, length = start + skipped, min(each, length - skipped)
    return start, length


def kind(*, differentiates: bool) -> type[TorchOps]:
    """Return the words for DTensors."""
    return SpreadDifferentiatedOps if differentiates else SpreadOps


class SpreadDifferentiatedOps(SpreadOps, DifferentiatedOps):
    """The words of PyTorch for DTensors, where it differentiates the formula itself."""
