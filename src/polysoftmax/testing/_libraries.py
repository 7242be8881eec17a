"""The libraries of the test matrix, opened by name."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from polysoftmax.engines import engine as choose_engine
from polysoftmax.testing._adapters import Adapter, widened
from polysoftmax.testing._backends import Backend
from polysoftmax.testing._jax import JaxAdapter
from polysoftmax.testing._torch import TorchAdapter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Array = Any


class _NumPy(Adapter):
    @functools.cached_property
    def xp(self) -> Any:
        import array_api_compat.numpy as xp

        return xp

    def dtype(self, name: str) -> Any:
        if name == "bfloat16":
            import ml_dtypes

            return np.dtype(ml_dtypes.bfloat16)
        return np.dtype(name)

    def make(self, exact: NDArray[Any], dtype: str) -> Array:
        y = exact.astype(self.dtype(dtype))
        if self.name == Backend.NUMPY_READONLY.value:
            y.flags.writeable = False
        return y


class _Strict(Adapter):
    @property
    def xp(self) -> Any:
        import array_api_strict

        return array_api_strict

    def setting(self) -> Any:
        return self.xp.ArrayAPIStrictFlags(
            api_version=self.backend.way or "2024.12",
            boolean_indexing=False,
            data_dependent_shapes=False,
            enabled_extensions=(),
        )


def _refuse(*_: Any, **__: Any) -> Any:
    msg = "something was computed before the values were asked for"
    raise AssertionError(msg)


class _Dask(Adapter):
    @functools.cached_property
    def xp(self) -> Any:
        import array_api_compat.dask.array as xp

        return xp

    def setting(self) -> Any:
        import dask

        return dask.config.set(scheduler=_refuse)

    def make(self, exact: NDArray[Any], dtype: str) -> Array:
        import dask.array

        # Two or more chunks on every axis that has two entries.
        chunks = tuple(max(1, (n + 1) // 2) for n in exact.shape)
        return dask.array.from_array(exact.astype(dtype), chunks=chunks)

    def values(self, y: Array) -> NDArray[Any]:
        with np.errstate(all="ignore"):
            return widened(np.asarray(y.compute(scheduler="sync")))


class _Cubed(Adapter):
    @functools.cached_property
    def xp(self) -> Any:
        import cubed.array_api as xp

        return xp

    def make(self, exact: NDArray[Any], dtype: str) -> Array:
        import cubed

        # Two or more chunks, all of one length: others Cubed does not reshape.
        chunks = tuple(next((c for c in range(n // 2, 0, -1) if n % c == 0), 1) for n in exact.shape)
        return cubed.from_array(exact.astype(dtype), chunks=chunks)

    def values(self, y: Array) -> NDArray[Any]:
        with np.errstate(all="ignore"):
            return widened(np.asarray(y.compute(executor=self._executor)))

    @functools.cached_property
    def _executor(self) -> Any:
        from cubed.runtime.create import create_executor

        return create_executor("single-threaded")


class _Mlx(Adapter):
    @functools.cached_property
    def xp(self) -> Any:
        import mlx.core as xp

        return xp

    def setting(self) -> Any:
        return self.xp.stream(self.xp.cpu)

    def make(self, exact: NDArray[Any], dtype: str) -> Array:
        return self.xp.array(exact.astype(np.float32) if dtype == "bfloat16" else exact).astype(self.dtype(dtype))

    def dtype(self, name: str) -> Any:
        return getattr(self.xp, {"bool": "bool_"}.get(name, name))

    def values(self, y: Array) -> NDArray[Any]:
        return np.asarray(y.astype(self.xp.float64) if self.xp.issubdtype(y.dtype, self.xp.floating) else y)

    def device(self, y: Array) -> Any:
        del y  # an operation has a device, an array has none


class _CuPy(Adapter):
    @functools.cached_property
    def xp(self) -> Any:
        import array_api_compat.cupy as xp

        return xp

    def values(self, y: Array) -> NDArray[Any]:
        return widened(np.asarray(y.get()))


_ADAPTERS: dict[str, type[Adapter]] = {
    "numpy": _NumPy,
    "array_api_strict": _Strict,
    "dask": _Dask,
    "cubed": _Cubed,
    "mlx": _Mlx,
    "jax": JaxAdapter,
    "torch": TorchAdapter,
    "cupy": _CuPy,
}

_SOURCES = {
    Backend.NUMPY: "import array_api_compat.numpy as xp",
    Backend.STRICT: "import array_api_strict as xp",
    Backend.JAX: "import jax.numpy as xp",
    Backend.TORCH: "import array_api_compat.torch as xp",
}


@functools.cache
def _adapter(backend: Backend, engine: str) -> Adapter:
    # One for each engine, because compiled calls are kept and the engine is chosen while they are traced.
    del engine
    found = _ADAPTERS[backend.library](backend.value, backend.capability)
    found.source = _SOURCES.get(backend)
    return found


def forget_programs() -> None:
    """Let go of what was compiled for calls until now."""
    JaxAdapter._compiled.cache_clear()
    TorchAdapter._compiled.cache_clear()


@contextmanager
def open_backend(backend: Backend | str | Adapter, engine: str = "auto") -> Iterator[Adapter]:
    """Open a backend of the matrix, or another library, in an engine for the length of a ``with`` block.

    Parameters
    ----------
    backend : Backend, str or Adapter
        A `Backend` or its name, such as ``"torch:compile"``; or the adapter of any other library.
    engine : str
        As for `polysoftmax.engine`.
    """
    adapter = backend if isinstance(backend, Adapter) else _adapter(Backend(backend), engine)
    with adapter.setting(), choose_engine(engine):
        yield adapter
