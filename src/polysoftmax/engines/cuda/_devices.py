"""Where arrays are: their memory as kernels see it, new arrays beside them, and launches on the caller's stream."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from polysoftmax._arrays import library
from polysoftmax.engines import has_cuda_core
from polysoftmax.engines.cuda import _compile, _launch
from polysoftmax.engines.cuda._plan import SIZES

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from polysoftmax._arrays import Array, DType
    from polysoftmax.engines.cuda._plan import Machine, Plan


class Uncovered(Exception):  # noqa: N818 - control flow that ends in _calls.prepare
    """The reason why no kernel covers a call."""


class View(NamedTuple):
    """An array as a kernel sees it; strides count entries."""

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str


class Device(Protocol):
    """One GPU as one library uses it."""

    machine: Machine

    def view(self, x: Array) -> View: ...

    def empty(self, shape: tuple[int, ...], dtype: DType | str) -> Array: ...

    def launch(self, plan: Plan, arguments: tuple[int | float, ...]) -> None: ...


def dtype_name(dtype: DType) -> str:
    """Return the name of a dtype, or of the class that stands for one, such as "float32"."""
    return str(dtype).rpartition(".")[2].removesuffix("'>")


_devices: dict[tuple[str, int], Device | str] = {}


def device_of(x: Array) -> Device | str:
    """Return the GPU that an array is on, or why there is none that kernels can use."""
    name = library(x).name
    kind: type[_TorchDevice | _CupyDevice]
    if name == "torch":
        if x.device.type != "cuda":
            return f"the tensor is on {x.device}"
        key, kind = (name, x.device.index or 0), _TorchDevice
    elif name == "cupy":
        key, kind = (name, x.device.id), _CupyDevice
    else:
        return f"{name} runs on the GPU in its own way"
    found = _devices.get(key)
    if found is None:
        try:
            found = kind(key[1])
        except ImportError as error:
            found = f"no CUDA kernels here: {error}"
        _devices[key] = found
    return found


class _TorchDevice:
    def __init__(self, ordinal: int) -> None:
        import torch

        if torch.version.cuda is None:
            msg = "this PyTorch is not built for CUDA"
            raise ImportError(msg)
        if not has_cuda_core():
            msg = "cuda.core is not installed: pip install polysoftmax[cuda]"
            raise ImportError(msg)
        found = torch.cuda.get_device_properties(ordinal)
        arch = found.major * 10 + found.minor
        self.torch = torch
        self.ordinal = ordinal
        self.machine = _compile.machine_of(arch, found.multi_processor_count, clusters=True)
        self.target = _compile.target_of(arch)

    def view(self, x: Array) -> View:
        return View(x.data_ptr(), tuple(x.shape), tuple(x.stride()), dtype_name(x.dtype))

    def empty(self, shape: tuple[int, ...], dtype: DType | str) -> Array:
        if isinstance(dtype, str):
            dtype = getattr(self.torch, dtype)
        return self.torch.empty(shape, dtype=dtype, device=f"cuda:{self.ordinal}")

    def launch(self, plan: Plan, arguments: tuple[int | float, ...]) -> None:
        stream = self.torch.cuda.current_stream(self.ordinal).cuda_stream
        _launch.launch(plan, self.target, self.ordinal, stream, arguments)


class _CupyDevice:
    def __init__(self, ordinal: int) -> None:
        import cupy

        if not cupy.cuda.is_available():
            msg = "CuPy finds no CUDA device: is there one, and is its driver installed?"
            raise ImportError(msg)
        self.cupy = cupy
        self.device = cupy.cuda.Device(ordinal)
        arch = int(self.device.compute_capability)
        core = has_cuda_core()
        processors = self.device.attributes["MultiProcessorCount"]
        # CuPy's own launches know no clusters.
        self.machine = _compile.machine_of(arch, processors, clusters=core)
        self.target = _compile.target_of(arch) if core else None

    def view(self, x: Array) -> View:
        dtype = dtype_name(x.dtype)
        size = SIZES.get(dtype, x.dtype.itemsize)
        if x.data.ptr % size or any(one % size for one in x.strides):
            raise Uncovered("the entries do not lie at multiples of their size")  # a field of a structured array
        return View(x.data.ptr, tuple(x.shape), tuple(one // size for one in x.strides), dtype)

    def empty(self, shape: tuple[int, ...], dtype: DType | str) -> Array:
        with self.current():
            return self.cupy.empty(shape, dtype)

    def launch(self, plan: Plan, arguments: tuple[int | float, ...]) -> None:
        if self.target is not None:
            stream = self.cupy.cuda.get_current_stream(self.device.id).ptr
            _launch.launch(plan, self.target, self.device.id, stream, arguments)
            return
        with self.current():
            kernel = _launch.raw_kernel(self.cupy, plan.kernel, self.device.id)
            kernel((plan.grid,), (plan.kernel.block,), arguments, shared_mem=plan.shared)

    def current(self) -> AbstractContextManager[Any]:
        """Make the device current, unless it is: at its end, CuPy's own ``with`` replaces the caller's context."""
        is_current = self.cupy.cuda.runtime.getDevice() == self.device.id
        return nullcontext() if is_current else self.device
