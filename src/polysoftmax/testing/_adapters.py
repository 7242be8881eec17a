"""One small class a library: how arrays are made, called with, and read back."""

from __future__ import annotations

import functools
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import array_api_compat
import numpy as np

from polysoftmax.engines import engine as choose_engine
from polysoftmax.testing._backends import Backend
from polysoftmax.testing._formats import FORMATS, rounded
from polysoftmax.testing._work import unmultiplied

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import ArrayLike, NDArray

    Array = Any

T = TypeVar("T")


class _Call(NamedTuple):
    """A function and everything about a call to it but the arrays; hashable, so that compiled calls are kept."""

    function: Callable[..., Any]
    positional: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]

    def __call__(self, *arrays: Array) -> Any:
        left = iter(arrays)
        positional = [next(left) if one is _ARRAY else one for one in self.positional]
        keywords = {name: next(left) if one is _ARRAY else one for name, one in self.keywords}
        return self.function(*positional, **keywords)


_ARRAY = "<array>"


class Adapter:
    """A backend that is open: the subclass says how its library is used."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.can = backend.capability

    def __repr__(self) -> str:
        return f"<{self.backend.value}>"

    @property
    def xp(self) -> Any:
        """The array API namespace."""
        return array_api_compat.array_namespace(self.asarray([0.0], "float32"))

    def setting(self) -> Any:
        """Return the context manager that the backend's arrays live in."""
        return ExitStack()

    def dtype(self, name: str) -> Any:
        """Return the library's dtype of a name."""
        return getattr(self.xp, name)

    def dtype_name(self, y: Array) -> str:
        """Return the name of an array's dtype."""
        return str(y.dtype).rpartition(".")[2]

    def asarray(self, values: ArrayLike, dtype: str = "float64") -> Array:
        """Make an array of a dtype, rounding the values to it first."""
        if dtype in FORMATS:
            return self._make(rounded(values, dtype), dtype)
        return self._make(np.asarray(values, dtype=dtype), dtype)

    def _make(self, exact: NDArray[Any], dtype: str) -> Array:
        raise NotImplementedError

    def values(self, y: Array) -> NDArray[Any]:
        """Return an array's values in NumPy, floating ones as float64, which is exact."""
        raise NotImplementedError

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function in the backend's way, and see that it writes to none of its arrays."""
        arrays = [one for one in (*args, *kwargs.values()) if _is_array(one)]
        spec = _Call(
            function,
            tuple(_ARRAY if _is_array(one) else one for one in args),
            tuple((name, _ARRAY if _is_array(one) else one) for name, one in kwargs.items()),
        )
        before = [self.values(one).copy() for one in arrays] if self.can.mutable else []
        y = self._run(spec, arrays)
        for one, values in zip(arrays, before, strict=False):
            np.testing.assert_array_equal(self.values(one), values, err_msg=f"{function.__name__} wrote to its input")
        return y

    def _run(self, spec: _Call, arrays: list[Array]) -> Any:
        return spec(*arrays)

    def some(self, choices: Sequence[T]) -> Sequence[T]:
        """Return all choices, or the first and the last where each of them costs a compilation or a graph."""
        return [choices[0], *choices[1:][-1:]] if self.can.compiles or self.can.lazy else choices

    def program(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of nested tuples of arrays as the backend runs it."""
        return function

    def require(self, y: Array, shape: tuple[int, ...], dtype: str) -> None:
        """Raise ``AssertionError`` unless an answer has the namespace, dtype, shape and device it should."""
        like = self.asarray([0.0], "float32")
        assert type(y) is type(like), f"{type(y).__name__}, not {type(like).__name__}"
        assert self.dtype_name(y) == dtype, f"dtype {self.dtype_name(y)}, not {dtype}"
        assert tuple(y.shape) == shape, f"shape {tuple(y.shape)}, not {shape}"
        assert self.device(y) == self.device(like)

    def device(self, y: Array) -> Any:
        """Return an array's device; None where there is one memory for all."""
        return array_api_compat.device(y)


def _is_array(value: Any) -> bool:
    return not isinstance(value, type | np.generic) and array_api_compat.is_array_api_obj(value)


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

    def _make(self, exact: NDArray[Any], dtype: str) -> Array:
        y = exact.astype(self.dtype(dtype))
        if self.backend is Backend.NUMPY_READONLY:
            y.flags.writeable = False
        return y

    def values(self, y: Array) -> NDArray[Any]:
        return _widened(np.asarray(y))


def _widened(y: NDArray[Any]) -> NDArray[Any]:
    exact = y.dtype.kind in "fV" or y.dtype.name == "bfloat16"
    return y.astype(np.float64) if exact else y


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

    def _make(self, exact: NDArray[Any], dtype: str) -> Array:
        return self.xp.asarray(exact, dtype=self.dtype(dtype))

    def values(self, y: Array) -> NDArray[Any]:
        return _widened(np.asarray(y))


def _refuse(*_: Any, **__: Any) -> Any:
    msg = "something was computed before the values were asked for"
    raise AssertionError(msg)


class _Dask(Adapter):
    def setting(self) -> Any:
        import dask

        return dask.config.set(scheduler=_refuse)

    def _make(self, exact: NDArray[Any], dtype: str) -> Array:
        import dask.array

        # Two or more chunks on every axis that has two entries.
        chunks = tuple(max(1, (n + 1) // 2) for n in exact.shape)
        return dask.array.from_array(exact.astype(dtype), chunks=chunks)

    def values(self, y: Array) -> NDArray[Any]:
        with np.errstate(all="ignore"):
            return _widened(np.asarray(y.compute(scheduler="sync")))


class _Cubed(Adapter):
    def _make(self, exact: NDArray[Any], dtype: str) -> Array:
        import cubed

        # Two or more chunks, all of one length: others Cubed does not reshape.
        chunks = tuple(next((c for c in range(n // 2, 0, -1) if n % c == 0), 1) for n in exact.shape)
        return cubed.from_array(exact.astype(dtype), chunks=chunks)

    def values(self, y: Array) -> NDArray[Any]:
        with np.errstate(all="ignore"):
            return _widened(np.asarray(y.compute(executor=self._executor)))

    @functools.cached_property
    def _executor(self) -> Any:
        from cubed.runtime.create import create_executor

        return create_executor("single-threaded")


class _Mlx(Adapter):
    def setting(self) -> Any:
        import mlx.core

        return mlx.core.stream(mlx.core.cpu)

    def _make(self, exact: NDArray[Any], dtype: str) -> Array:
        import mlx.core

        return mlx.core.array(exact.astype(np.float32) if dtype == "bfloat16" else exact).astype(self.dtype(dtype))

    def dtype(self, name: str) -> Any:
        import mlx.core

        return getattr(mlx.core, {"bool": "bool_"}.get(name, name))

    def values(self, y: Array) -> NDArray[Any]:
        import mlx.core

        return np.asarray(y.astype(mlx.core.float64) if mlx.core.issubdtype(y.dtype, mlx.core.floating) else y)

    def device(self, y: Array) -> Any:
        del y  # an operation has a device, an array has none


def x64(*, enabled: bool) -> Any:
    """Return JAX's context with or without 64-bit types, which older versions have in another place."""
    import jax

    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(enabled)
    from jax.experimental import enable_x64

    return enable_x64(enabled)


class _Jax(Adapter):
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

    def _make(self, exact: NDArray[Any], dtype: str) -> Array:
        return self.xp.asarray(exact.astype(self.xp.dtype(dtype)))

    def values(self, y: Array) -> NDArray[Any]:
        return _widened(np.asarray(y))

    def require(self, y: Array, shape: tuple[int, ...], dtype: str) -> None:
        super().require(y, shape, dtype)
        assert not getattr(y, "weak_type", False), "the answer is weakly typed"

    def _run(self, spec: _Call, arrays: list[Array]) -> Any:
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
        return self._make(v, dtype), c if isinstance(c, float) else self._make(c, dtype)

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


class _Torch(Adapter):
    @functools.cached_property
    def xp(self) -> Any:
        import array_api_compat.torch as xp

        return xp

    @contextmanager
    def setting(self) -> Iterator[None]:
        if self.backend is not Backend.TORCH_COMPILE:
            yield
            return
        import torch._dynamo

        # Every shape and option of the matrix is a program of its own.
        with torch._dynamo.config.patch(recompile_limit=10_000, accumulated_recompile_limit=10_000):
            yield

    def dtype(self, name: str) -> Any:
        import torch

        return getattr(torch, name)

    def _make(self, exact: NDArray[Any], dtype: str) -> Array:
        import torch

        return torch.as_tensor(exact.copy(), device="cuda" if self.can.gpu else "cpu").to(self.dtype(dtype))

    def values(self, y: Array) -> NDArray[Any]:
        import torch

        y = y.detach().cpu()
        return np.asarray((y.to(torch.float64) if y.is_floating_point() else y).numpy())

    def _run(self, spec: _Call, arrays: list[Array]) -> Any:
        import torch

        if self.backend is Backend.TORCH_COMPILE:
            return self._compiled(spec)(*arrays)
        floating = [one.is_floating_point() for one in arrays]
        if not any(floating) or self.backend not in (Backend.TORCH_FUNC, Backend.TORCH_AUTOGRAD):
            return spec(*arrays)
        if self.backend is Backend.TORCH_AUTOGRAD:
            leaves = [one.clone().requires_grad_() if real else one for one, real in zip(arrays, floating, strict=True)]
            return _detached(spec(*leaves))

        def of_floating(*moved: Array) -> Any:
            left = iter(moved)
            return spec(*[next(left) if real else one for one, real in zip(arrays, floating, strict=True)])

        return torch.func.vjp(of_floating, *[one for one, real in zip(arrays, floating, strict=True) if real])[0]

    @functools.cache  # noqa: B019 (adapters live as long as the process)
    def _compiled(self, spec: _Call) -> Callable[..., Any]:
        import torch

        program: Callable[..., Any] = torch.compile(
            lambda *arrays: spec(*arrays),  # noqa: PLW0108 (as above)
            fullgraph=True,
            dynamic=False,
            backend="aot_eager",
        )
        return program


def _detached(y: Any) -> Any:
    if isinstance(y, tuple):
        return tuple(map(_detached, y))
    assert y.requires_grad or not y.is_floating_point(), "autograd lost the answer"
    return y.detach()


class _CuPy(Adapter):
    @functools.cached_property
    def xp(self) -> Any:
        import array_api_compat.cupy as xp

        return xp

    def _make(self, exact: NDArray[Any], dtype: str) -> Array:
        return self.xp.asarray(exact.astype(dtype))

    def values(self, y: Array) -> NDArray[Any]:
        return _widened(np.asarray(y.get()))


_ADAPTERS: dict[str, type[Adapter]] = {
    "numpy": _NumPy,
    "array_api_strict": _Strict,
    "dask": _Dask,
    "cubed": _Cubed,
    "mlx": _Mlx,
    "jax": _Jax,
    "torch": _Torch,
    "cupy": _CuPy,
}


@functools.cache
def _adapter(backend: Backend, engine: str) -> Adapter:
    # One for each engine, because compiled calls are kept and the engine is chosen while they are traced.
    del engine
    return _ADAPTERS[backend.library](backend)


def forget_programs() -> None:
    """Let go of what was compiled for calls until now."""
    _Jax._compiled.cache_clear()
    _Torch._compiled.cache_clear()


@contextmanager
def open_backend(backend: Backend, engine: str = "auto") -> Iterator[Adapter]:
    """Open a backend, in an engine, for the length of a ``with`` block."""
    adapter = _adapter(backend, engine)
    with adapter.setting(), choose_engine(engine):
        yield adapter
