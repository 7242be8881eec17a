"""JAX as the kit uses it: eagerly, or in a program that computes its arrays by a product."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from polysoftmax.testing._adapters import Adapter, widened
from polysoftmax.testing._backends import Backend
from polysoftmax.testing._formats import FORMATS
from polysoftmax.testing._work import unmultiplied

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from polysoftmax.testing._adapters import Call

    Array = Any


def x64(*, enabled: bool) -> Any:
    """Return JAX's context with or without 64-bit types, which older versions have in another place."""
    import jax

    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(enabled)
    from jax.experimental import enable_x64

    return enable_x64(enabled)


class JaxAdapter(Adapter):
    """One device of JAX, with or without 64-bit types."""

    @functools.cached_property
    def xp(self) -> Any:
        import jax.numpy

        return jax.numpy

    @contextmanager
    def setting(self) -> Iterator[None]:
        import jax

        device = jax.devices("cuda" if self.can.gpu else "cpu")[0]
        with x64(enabled=self.backend is Backend.JAX_X64), jax.default_device(device):
            yield

    def make(self, exact: NDArray[Any], dtype: str) -> Array:
        return self.xp.asarray(exact.astype(self.xp.dtype(dtype)))

    def values(self, y: Array) -> NDArray[Any]:
        return widened(np.asarray(y))

    def require(self, y: Array, shape: tuple[int, ...], dtype: str) -> None:
        super().require(y, shape, dtype)
        assert not getattr(y, "weak_type", False), "the answer is weakly typed"

    def _run(self, spec: Call, arrays: list[Array]) -> Any:
        function: Any = spec
        return self.program(function)(*arrays)

    def program(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(self._run_fused, function) if self.backend is Backend.JAX_FUSED else function

    def _run_fused(self, function: Callable[..., Any], *arrays: Any) -> Any:
        """Call a function in a program that computes its arrays by a product."""
        import jax

        leaves, structure = jax.tree.flatten(arrays)
        before, factors, constants = [], [], []
        for one in leaves:
            v, c = self._unmultiplied(one)
            constant = c if isinstance(c, float) else None
            before.append(v)
            constants.append(constant)
            factors.append(None if constant else c)
        return self._compiled(function, tuple(constants), structure)(before, factors)

    def _unmultiplied(self, x: Array) -> tuple[Array, Any]:
        """Return an array and its factor: a number, another array, or None."""
        dtype = self.dtype_name(x)
        if dtype not in FORMATS:
            return x, None
        v, c = unmultiplied(self.values(x), dtype)
        return self.make(v, dtype), c if isinstance(c, float) else self.make(c, dtype)

    @functools.cache  # noqa: B019 (adapters live as long as the process)
    def _compiled(
        self, function: Callable[..., Any], constants: tuple[float | None, ...], structure: Any
    ) -> Callable[..., Any]:
        import jax

        def multiplied(before: list[Array], factors: list[Array | None]) -> Any:
            each = [
                self.xp.asarray(constant, v.dtype) if constant else factor
                for v, factor, constant in zip(before, factors, constants, strict=True)
            ]
            arrays = [v if c is None else v * c for v, c in zip(before, each, strict=True)]
            return function(*jax.tree.unflatten(structure, arrays))

        return jax.jit(multiplied)  # type: ignore[no-any-return]
