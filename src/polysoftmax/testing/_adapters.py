"""An array library as the kit uses it: how arrays are made, called with, and read back."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import array_api_compat
import numpy as np

from polysoftmax._arrays import default_index
from polysoftmax.testing._backends import Backend, Capability
from polysoftmax.testing._formats import FORMATS, rounded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import ArrayLike, NDArray

    Array = Any

T = TypeVar("T")


class Call(NamedTuple):
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
_DTYPES = ("bool", "int8", "uint8", "int32", "int64", "uint32", "float16", "bfloat16", "float32", "float64")


class Adapter:
    """An array library as the kit uses it: how arrays are made, called with, and read back.

    Parameters
    ----------
    name : str
        What the library is called in tables and messages.
    can : Capability
        What it can do.
    xp : namespace, optional
        Its array API namespace. A library that is not eager, or has other ways to make and read arrays than the
        standard's ``asarray`` and NumPy's, gets a subclass with `make` and `values` of its own.
    """

    source: str | None = None
    """The statement that imports ``xp`` where a plain call with its arrays is what runs; else None."""

    def __init__(self, name: str, can: Capability, xp: Any = None) -> None:
        self.name = name
        self.can = can
        self._xp = xp
        if xp is not None:
            self.source = f"import {xp.__name__} as xp" if isinstance(xp, ModuleType) else f"xp = ...  # {xp!r}"

    def __repr__(self) -> str:
        return f"<{self.name}>"

    @property
    def backend(self) -> Backend:
        """The backend of the matrix that this is."""
        return Backend(self.name)

    @property
    def xp(self) -> Any:
        """The array API namespace."""
        return self._xp

    def setting(self) -> Any:
        """Return the context manager that the backend's arrays live in."""
        return ExitStack()

    def dtype(self, name: str) -> Any:
        """Return the library's dtype of a name."""
        return getattr(self.xp, name)

    def dtype_name(self, y: Array) -> str:
        """Return the name of an array's dtype."""
        xp = self.xp
        found = (name for name in _DTYPES if hasattr(xp, name) and y.dtype == getattr(xp, name))
        return next(found, str(y.dtype).rpartition(".")[2])

    def asarray(self, values: ArrayLike, dtype: str = "float64") -> Array:
        """Make an array of a dtype, rounding the values to it first."""
        if dtype in FORMATS:
            return self.make(rounded(values, dtype), dtype)
        return self.make(np.asarray(values, dtype=dtype), dtype)

    def make(self, exact: NDArray[Any], dtype: str) -> Array:
        """Make an array of a dtype from a NumPy array of values that it holds, in float64 if they are floating."""
        given = exact if dtype == "bfloat16" else exact.astype(dtype)
        return self.xp.asarray(given, dtype=self.dtype(dtype))

    def values(self, y: Array) -> NDArray[Any]:
        """Return an array's values in NumPy, floating ones as float64, which is exact."""
        found = np.asarray(y)
        return widened(np.from_dlpack(y) if found.dtype == object else found)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function in the backend's way, and see that it writes to none of its arrays."""
        arrays = [one for one in (*args, *kwargs.values()) if _is_array(one)]
        spec = Call(
            function,
            tuple(_ARRAY if _is_array(one) else one for one in args),
            tuple((name, _ARRAY if _is_array(one) else one) for name, one in kwargs.items()),
        )
        before = [self.values(one).copy() for one in arrays] if self.can.mutable else []
        y = self._run(spec, arrays)
        for one, values in zip(arrays, before, strict=False):
            np.testing.assert_array_equal(self.values(one), values, err_msg=f"{function.__name__} wrote to its input")
        return y

    def _run(self, spec: Call, arrays: list[Array]) -> Any:
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


def widened(y: NDArray[Any]) -> NDArray[Any]:
    """Return floating values as float64."""
    exact = y.dtype.kind in "fV" or y.dtype.name == "bfloat16"
    return y.astype(np.float64) if exact else y


def adapt(xp: Any, name: str = "") -> Adapter:
    """Return an adapter of an eager array API namespace, whose dtypes and defaults are looked up in it."""
    floats = tuple(one for one in FORMATS if hasattr(xp, one))
    integers = tuple(one for one in ("int8", "int32", "int64", "uint8") if hasattr(xp, one))
    can = Capability("eager", floats, integers, "", "", mutable=True)
    found = Adapter(name or getattr(xp, "__name__", repr(xp)), can, xp)
    default = found.dtype_name(xp.asarray([0.5]))
    index = found.dtype_name(xp.asarray([0], dtype=default_index(xp)))
    found.can = replace(can, default_float=default, default_index=index)
    return found
