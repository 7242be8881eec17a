"""What an array library is: its namespace, dtypes and devices.

This file and ``engines/`` are the only places where a library's name may stand.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import array_api_compat
from array_api_compat import device

if TYPE_CHECKING:
    from types import ModuleType

Array: TypeAlias = Any
"""An array of any supported library."""

DType: TypeAlias = Any


@dataclass(frozen=True, slots=True)
class Library:
    """The array library that a type belongs to."""

    name: str
    xp: ModuleType
    converts: bool
    """Whether arrays of this type, NumPy's scalars and subclasses, are taken as the library's own."""
    promoted: dict[DType, tuple[DType, DType]] = field(default_factory=dict)
    """What `promotion` answers for floating dtypes; the look-up saves a tenth of the time of a tiny call."""


_LIBRARIES: dict[type, Library] = {}


def library(x: Array) -> Library:
    """Return the library of ``x``; ``TypeError`` for anything that is not an array."""
    try:
        return _LIBRARIES[type(x)]
    except KeyError:
        return _identify(x)


def _identify(x: Array) -> Library:
    kind = type(x)
    numpy, masked = (sys.modules.get(name) for name in ("numpy", "numpy.ma"))
    if masked is not None and isinstance(x, masked.MaskedArray):
        msg = (
            "got a numpy.ma.MaskedArray, whose mask the formulas would ignore: "
            "pass x.data together with where=~numpy.ma.getmaskarray(x)"
        )
        raise TypeError(msg)
    if numpy is not None and isinstance(x, numpy.matrix):
        msg = "got a numpy.matrix, which cannot lose a dimension: pass numpy.asarray(x)"
        raise TypeError(msg)
    if _is_tensor(x):
        import array_api_compat.torch as xp
    elif numpy is not None and isinstance(x, numpy.ndarray | numpy.generic):
        xp = standard_numpy()
    elif array_api_compat.is_array_api_obj(x):
        xp = array_api_compat.array_namespace(x)
    else:
        msg = (
            f"expected an array of NumPy, JAX, PyTorch, CuPy or another array API library, got {kind.__name__}: "
            f"wrap it first, for example numpy.asarray({'x' if not isinstance(x, list | tuple) else '[...]'})"
        )
        raise TypeError(msg)
    name = xp.__name__.removeprefix("array_api_compat.").split(".")[0]
    found = Library(name, xp, converts=name == "numpy" and kind is not xp.ndarray)
    if may_keep():
        _LIBRARIES[kind] = found
    return found


def may_keep() -> bool:
    """Whether what was found may be kept for later calls.

    What torch.compile has traced is compiled anew where a dictionary that it has seen is another than before.
    """
    torch = sys.modules.get("torch")
    return torch is None or not torch.compiler.is_compiling()


def standard_numpy() -> Any:
    """Return NumPy's namespace of the standard: its own, which array-api-compat takes long to import around."""
    import numpy as np

    if hasattr(np, "cumulative_sum"):  # 2.1, the first that has all of the standard that is used here
        return np
    import array_api_compat.numpy as xp

    return xp


def namespace(x: Array) -> Any:
    """Return the array API namespace of ``x``."""
    try:
        return _LIBRARIES[type(x)].xp
    except KeyError:
        return _identify(x).xp


def is_number(value: object) -> bool:
    """Whether ``value`` is a Python or NumPy real scalar, the only kind whose range is checked."""
    if isinstance(value, bool):
        return False
    if isinstance(value, int | float):
        return True
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.integer, numpy.floating))


def is_array(value: object) -> bool:
    """Whether ``value`` is an array of some library."""
    return type(value) in _LIBRARIES or _is_tensor(value) or array_api_compat.is_array_api_obj(value)


def _is_tensor(value: object) -> bool:
    # torch.compile cannot follow array-api-compat's way of telling.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


_FLOAT_BITS: dict[tuple[str, DType], int] = {}


def float_bits(xp: Any, dtype: DType) -> int:
    """Width of a real floating dtype in bits; 0 for every other dtype."""
    bits = _FLOAT_BITS.get((xp.__name__, dtype))  # array-api-strict warns when its dtypes meet NumPy's
    if bits is None:
        # NumPy does not count ml_dtypes.bfloat16 as floating, so it is known by its name.
        if str(dtype).endswith("bfloat16"):
            bits = 16
        else:
            bits = xp.finfo(dtype).bits if xp.isdtype(dtype, "real floating") else 0
        if may_keep():
            _FLOAT_BITS[xp.__name__, dtype] = bits
    return bits


def default_float(xp: Any) -> DType:
    """Return the library's default real floating dtype."""
    return xp.__array_namespace_info__().default_dtypes()["real floating"]


def default_index(xp: Any) -> DType:
    """Return the library's default dtype for indices."""
    return xp.__array_namespace_info__().default_dtypes()["indexing"]


def promotion(x: Array, found: Library, dtype: DType | None) -> tuple[DType, DType]:
    """Return the dtypes to compute in and to answer in.

    Everything narrower than float32 is computed in float32. Integers become floating before anything
    is subtracted: the difference of two int8 wraps.
    """
    if dtype is None and (known := found.promoted.get(x.dtype)):
        return known
    xp = found.xp
    own_bits = float_bits(xp, x.dtype)
    if not own_bits and not xp.isdtype(x.dtype, "integral"):
        msg = f"expected real numbers, got an array of dtype {x.dtype}: convert it to a real floating dtype"
        raise TypeError(msg)
    inferred = x.dtype if own_bits else default_float(xp)
    result = inferred if dtype is None else _as_dtype(xp, dtype)
    widest, bits = xp.float32, 32
    for candidate in (x.dtype, result):
        if float_bits(xp, candidate) > bits:
            widest, bits = candidate, float_bits(xp, candidate)
    if dtype is None and own_bits and may_keep():  # for integers, the library's default may change
        found.promoted[x.dtype] = (widest, result)
    return widest, result


_NAMES = ("float16", "bfloat16", "float32", "float64")


def _as_dtype(xp: Any, dtype: DType) -> DType:
    named = getattr(xp, dtype, dtype) if isinstance(dtype, str) and dtype in _NAMES else dtype  # PyTorch reads no names
    try:
        found = xp.empty(0, dtype=named).dtype
        known = float_bits(xp, found)
    except (TypeError, ValueError, AttributeError) as error:
        msg = f"dtype={dtype!r} is not a dtype of {xp.__name__.removeprefix('array_api_compat.')}"
        raise TypeError(msg) from error
    if not known:
        msg = f"dtype must be real floating, got {dtype!r}"
        raise TypeError(msg)
    return found


def cast(x: Array, dtype: DType) -> Array:
    """Return ``x`` in ``dtype``, itself if it has it."""
    if x.dtype == dtype:
        return x
    found = library(x)
    if found.name != "numpy":
        return found.xp.astype(x, dtype)
    with found.xp.errstate(over="ignore"):  # what is too large for 16 bits is inf
        return x.astype(dtype)


def require_same_library(x: Array, other: Array, name: str) -> None:
    """Raise ``TypeError`` unless ``other`` is an array of the library and device of ``x``."""
    mine = library(x)
    if type(other) not in _LIBRARIES and not is_array(other):
        msg = f"{name} must be an array of {mine.name}, as the input is, got {type(other).__name__}"
        raise TypeError(msg)
    theirs = library(other)
    if theirs.xp is not mine.xp:
        msg = f"the input is an array of {mine.name} and {name} one of {theirs.name}: convert one of them"
        raise TypeError(msg)
    if mine.name in _ONE_DEVICE or (mine.name == "jax" and (is_tracer(x) or is_tracer(other))):
        return
    here, there = (x.device, other.device) if mine.name == "torch" else (device(x), device(other))
    if here != there:
        msg = f"the input is on device {here} and {name} on {there}: move one of them"
        raise TypeError(msg)


_ONE_DEVICE = frozenset({"numpy", "dask", "array_api_strict"})


def is_tracer(x: Array) -> bool:
    """Whether one of JAX's arrays stands for a value that is not known yet, and has no device."""
    import jax

    return isinstance(x, jax.core.Tracer)


def device_for(x: Array) -> Any:
    """Return the ``device=`` that creates an array beside ``x``; JAX moves what was made without one."""
    return None if library(x).name == "jax" else _device(x)


def _device(x: Array) -> Any:
    # torch.compile cannot follow array-api-compat's question for the device.
    return x.device if library(x).name == "torch" else device(x)


def values_are_free(x: Array) -> bool:
    """Whether a look at the values of ``x`` costs no synchronisation, tracing or computation."""
    name = library(x).name
    if name != "torch":
        return name == "numpy"
    import torch

    return x.is_cpu and not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()  # something that traces, perhaps without values
        or torch._C._get_tracing_state() is not None
    )
