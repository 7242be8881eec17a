"""MLX: its namespace as the standard has it, and its words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import mlx.core

from polysoftmax._ops import Ops

if TYPE_CHECKING:
    from polysoftmax._arrays import Array


class _Namespace:
    """MLX's functions; those that make arrays take a device, as the standard has it, though no array is on one."""

    __name__ = mlx.core.__name__

    def __getattr__(self, name: str) -> Any:
        return getattr(mlx.core, "bool_" if name == "bool" else name)

    @staticmethod
    def iinfo(dtype: Any) -> SimpleNamespace:
        found = mlx.core.iinfo(dtype)
        return SimpleNamespace(bits=8 * dtype.size, min=found.min, max=found.max, dtype=dtype)

    @staticmethod
    def arange(
        start: float, stop: float | None = None, step: float = 1, *, dtype: Any = None, device: Any = None
    ) -> Array:
        del device
        return mlx.core.arange(*((0, start) if stop is None else (start, stop)), step, dtype)

    @staticmethod
    def asarray(x: Any, *, dtype: Any = None, device: Any = None, copy: bool | None = None) -> Array:
        del device
        return mlx.core.asarray(x, dtype, copy=copy)

    @staticmethod
    def empty(shape: int | tuple[int, ...], *, dtype: Any = None, device: Any = None) -> Array:
        del device
        return mlx.core.zeros(shape, dtype or mlx.core.float32)

    @staticmethod
    def full(shape: int | tuple[int, ...], value: Any, *, dtype: Any = None, device: Any = None) -> Array:
        del device
        return mlx.core.full(shape, value, dtype)

    @staticmethod
    def eye(n: int, *, dtype: Any = None, device: Any = None) -> Array:
        del device
        return mlx.core.eye(n, dtype=dtype or mlx.core.float32)


xp = _Namespace()


class MlxOps(Ops):
    """The words of MLX, which sorts in ascending order, equal entries by their indices."""

    def argmax(self, x: Array) -> Array:
        # MLX refuses to look for the maximum of no rows, and answers in unsigned numbers.
        return self.astype(super().argmax(x) if x.size else self.part(x, 0, 1), self.index_dtype)

    def descending(self, x: Array) -> Array:
        return self.xp.sort(x, axis=-1)[..., ::-1]

    def descending_indices(self, x: Array) -> Array:
        last = x.shape[-1] - 1
        return last - self.astype(self.xp.argsort(x[..., ::-1], axis=-1)[..., ::-1], self.index_dtype)

    def top_k_indices(self, x: Array, k: int) -> Array:
        return self.xp.sort(self.descending_indices(x)[..., :k], axis=-1)
