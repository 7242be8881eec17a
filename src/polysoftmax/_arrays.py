"""What an array library is: its namespace, dtypes and devices.

This file, ``_refused.py`` and ``engines/`` are the only places where a library's name may stand.
"""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import array_api_compat
from array_api_compat import device

from polysoftmax._refused import require_plain

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
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

MOST_TYPES = 256
"""Types of arrays that are remembered."""


def library(x: Array) -> Library:
    """Return the library of ``x``; ``TypeError`` for anything that is not an array."""
    try:
        return _LIBRARIES[type(x)]
    except KeyError:
        return _identify(x)


def _identify(x: Array) -> Library:
    kind = type(x)
    require_plain(x)
    numpy = sys.modules.get("numpy")
    if _is_tensor(x):
        import array_api_compat.torch as xp
    elif numpy is not None and isinstance(x, numpy.ndarray | numpy.generic):
        xp = standard_numpy()
    elif kind.__module__ == "mlx.core":
        from polysoftmax.engines.mlx import xp
    elif array_api_compat.is_array_api_obj(x):
        try:
            xp = array_api_compat.array_namespace(x)
        except AttributeError as error:  # it asks what it is given for a name
            msg = (
                f"__array_namespace__ of {kind.__module__}.{kind.__qualname__} returns no array API namespace: "
                "convert the array to one of NumPy, JAX, PyTorch or CuPy"
            )
            raise TypeError(msg) from error
    else:
        msg = (
            f"expected an array of NumPy, JAX, PyTorch, CuPy or another array API library, got {kind.__name__}: "
            f"wrap it first, for example numpy.asarray({'x' if not isinstance(x, list | tuple) else '[...]'})"
        )
        raise TypeError(msg)
    name = xp.__name__.removeprefix("array_api_compat.").split(".")[0]
    found = Library(name, xp, converts=name == "numpy" and kind is not xp.ndarray)
    if may_keep():
        keep(_LIBRARIES, kind, found, MOST_TYPES)
    return found


def may_keep() -> bool:
    """Whether what was found may be kept for later calls.

    What torch.compile has traced is compiled anew where a dictionary that it has seen is another than before.
    """
    torch = sys.modules.get("torch")
    return torch is None or not torch.compiler.is_compiling()


def keep(table: dict[Any, Any], key: Any, found: Any, most: int) -> None:
    """Keep what was found for later calls, in a table that starts anew when it is full.

    A program whose keys, such as types or shapes, are always new would fill the memory.
    """
    if len(table) >= most:
        table.clear()
    table[key] = found


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


def is_whole(value: object) -> bool:
    """Whether ``value`` is a whole number, of Python, NumPy or any other kind; not for arrays, which may seem so."""
    # What torch.compile holds as a symbol is an int to it, and has no attributes.
    return not isinstance(value, bool) and (isinstance(value, int) or hasattr(value, "__index__"))


def as_int(value: object, name: str, what: str = "an int") -> int:
    """Return a number as an int; ``TypeError`` for anything that is not whole, an array of it among them."""
    if not (is_number(value) and is_whole(value)):
        msg = f"{name} must be {what}, got {type(value).__name__}"
        raise TypeError(msg)
    return int(value)  # type: ignore[call-overload,no-any-return]


def as_float(value: float) -> float:
    """Return a number as a float, inf where it is an int too large to be one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def is_array(value: object) -> bool:
    """Whether ``value`` is an array of some library."""
    return type(value) in _LIBRARIES or _is_tensor(value) or array_api_compat.is_array_api_obj(value)


def _is_tensor(value: object) -> bool:
    # torch.compile cannot follow array-api-compat's way of telling.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


_FLOAT_BITS: dict[str, dict[DType, int]] = {}
"""By library: array-api-strict warns when its dtypes meet NumPy's, and torch.compile cannot compare foreign ones."""


def float_bits(xp: Any, dtype: DType) -> int:
    """Width of a real floating dtype in bits; 0 for every dtype that is not computed with.

    Such are floats of 8 bits, which hold no probabilities, and of the other order of bytes: see `in_native_order`.
    """
    known = _FLOAT_BITS.get(xp.__name__)
    bits = None if known is None else known.get(dtype)
    if bits is None:
        # NumPy does not count ml_dtypes.bfloat16 as floating, so it is known by its name.
        if str(dtype).endswith("bfloat16"):
            bits = 16
        else:
            bits = xp.finfo(dtype).bits if is_kind(xp, dtype, "real floating") else 0
        if bits < 16 or not getattr(dtype, "isnative", True):
            bits = 0
        if may_keep():
            _FLOAT_BITS.setdefault(xp.__name__, {})[dtype] = bits
    return bits


def is_kind(xp: Any, dtype: DType, kind: str) -> bool:
    """Whether a dtype is of a kind that the standard names."""
    try:
        return bool(xp.isdtype(dtype, kind))
    except TypeError:  # NumPy's answer for text, records, and dtypes of other packages
        return False


def in_native_order(x: Array) -> Array:
    """Return ``x`` in the machine's order of bytes, itself if it is: NumPy's arrays may have the other one."""
    if library(x).name not in _SWAPPED or x.dtype.isnative:
        return x
    return x.astype(x.dtype.newbyteorder("="))


_SWAPPED = frozenset({"numpy", "dask"})
"""Libraries whose dtypes may have the other order of bytes."""


_LEAST_NORMAL: dict[tuple[str, DType], float] = {}


def least_normal(x: Array) -> float:
    """Return the smallest normal number of a floating array's dtype."""
    xp = namespace(x)
    least = _LEAST_NORMAL.get((xp.__name__, x.dtype))
    if least is None:
        least = float(xp.finfo(x.dtype).smallest_normal)
        if may_keep():
            _LEAST_NORMAL[xp.__name__, x.dtype] = least
    return least


def default_float(xp: Any) -> DType:
    """Return the library's default real floating dtype."""
    return xp.__array_namespace_info__().default_dtypes()["real floating"]


def default_index(xp: Any) -> DType:
    """Return the library's default dtype for indices."""
    return xp.__array_namespace_info__().default_dtypes()["indexing"]


def promotion(x: Array, found: Library, dtype: DType | None) -> tuple[DType, DType]:
    """Return the dtypes to compute in and to answer in, for an array in native order.

    Everything narrower than float32 is computed in float32. Integers become floating before anything
    is subtracted: the difference of two int8 wraps.
    """
    xp = found.xp
    own_bits = float_bits(xp, x.dtype)
    if not own_bits and not is_kind(xp, x.dtype, "integral"):
        msg = (
            f"expected real numbers, integers or floats of 16 bits or more, got an array of dtype {x.dtype}: "
            "convert it to one of these, such as float32"
        )
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
        found = in_native_order(xp.empty(0, dtype=named)).dtype
        known = float_bits(xp, found)
    except (TypeError, ValueError, AttributeError) as error:
        msg = f"dtype={dtype!r} is not a dtype of {xp.__name__.removeprefix('array_api_compat.')}"
        raise TypeError(msg) from error
    if not known:
        msg = f"dtype must be real floating, of 16 bits or more, got {dtype!r}"
        raise TypeError(msg)
    return found


def cast(x: Array, dtype: DType) -> Array:
    """Return ``x`` in ``dtype``, itself if it has it."""
    if x.dtype == dtype:
        return x
    found = library(x)
    with quietly(x):  # what is too large for 16 bits is inf, and what is too small is 0
        # NumPy's function refuses the scalars that its operators make of arrays without axes.
        return x.astype(dtype) if found.name == "numpy" else found.xp.astype(x, dtype)


def with_axis(x: Array, axis: int) -> Array:
    """Return ``x`` with one more axis, of length 1, in front of one that is counted from 0."""
    found = library(x)
    if found.name not in _INDEXED:
        return found.xp.expand_dims(x, axis=axis)
    return x[(slice(None),) * axis + (None,)]


_INDEXED = frozenset({"numpy", "dask"})
"""Libraries that do better by an index: NumPy's function takes ten times as long, and Dask's has to know lengths."""


def is_open(length: int | None) -> bool:
    """Whether a length is None, as where a model of ONNX leaves it open."""
    return length is None


def is_unknown(length: int | None) -> bool:
    """Whether a length is open, or NaN, as Dask has it for what it has not computed."""
    return is_open(length) or length != length


def require_known_shape(x: Array) -> None:
    """Raise ``ValueError`` for an array with lengths that are not known, which cannot be rearranged."""
    if any(map(is_unknown, x.shape)):
        how = (
            "fix these in the model"
            if any(map(is_open, x.shape))
            else "call the compute_chunk_sizes() of the input first"
        )
        msg = f"cannot rearrange an array of shape {tuple(x.shape)}: {how}"
        raise ValueError(msg)


def quietly(x: Array) -> AbstractContextManager[Any]:
    """Return a context in which NumPy computes NaN, inf and 0 without a word, whatever ``numpy.seterr`` says."""
    return sys.modules["numpy"].errstate(all="ignore") if library(x).name in _NUMPYS else nullcontext()


_NUMPYS = frozenset({"numpy", "array_api_strict"})
"""Libraries that compute in NumPy at once."""


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
    if mine.name in _ONE_DEVICE or (mine.name == "jax" and not are_apart(x, other)):
        return
    here, there = (x.device, other.device) if mine.name == "torch" else (device(x), device(other))
    if here != there:
        msg = f"the input is on device {here} and {name} on {there}: move one of them"
        raise TypeError(msg)


def are_apart(x: Array, other: Array) -> bool:
    """Whether nothing can be computed from two arrays of JAX, which the caller has put on different devices.

    Arrays that are sharded in two ways over the same devices may meet, and what has been put nowhere is moved.
    """
    if is_tracer(x) or is_tracer(other) or not (x.committed and other.committed):
        return False
    return bool(x.sharding.device_set != other.sharding.device_set)


_ONE_DEVICE = frozenset({"numpy", "dask", "mlx"})


def is_tracer(x: Array) -> bool:
    """Whether one of JAX's arrays stands for a value that is not known yet, and has no device."""
    import jax

    return isinstance(x, jax.core.Tracer)


def device_for(x: Array) -> Any:
    """Return the ``device=`` that creates an array beside ``x``; JAX moves what was made without one."""
    return None if library(x).name in ("jax", "mlx") else _device(x)


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
