"""Where arrays are: their memory as kernels see it, new arrays beside them, and launches on the caller's stream."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from polysoftmax._arrays import library
from polysoftmax.engines import CUDA_REMEDY, has_cuda_core
from polysoftmax.engines.cuda import _compile, _launch
from polysoftmax.engines.cuda._plan import USUAL_SHARED

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from polysoftmax._arrays import Array, DType
    from polysoftmax.engines.cuda._plan import Machine, Plan


class Uncovered(Exception):  # noqa: N818 - control flow that ends in _calls.prepare
    """The reason why no kernel covers a call."""


class Scattered(Uncovered):
    """A call that kernels cover once the operand at ``place`` has been copied without gaps."""

    def __init__(self, reason: str, place: int) -> None:
        super().__init__(reason)
        self.place = place


Seen: TypeAlias = "tuple[DType, tuple[int, ...], tuple[int, ...], int]"
"""What a launch depends on of an array: dtype, shape, strides in entries, and the address modulo 16."""


class Device(Protocol):
    """One GPU as one library uses it."""

    machine: Machine
    arch: int
    """Compute capability, such as 90."""
    by_cuda_core: bool
    """Whether cuda.core compiles and launches, and not CuPy."""

    def view(self, x: Array) -> tuple[int, Seen]:
        """Return the address of an array, and the rest that there is to know of it."""

    def pointer(self, x: Array) -> int:
        """Return the address of an array."""

    def empty(self, shape: tuple[int, ...], dtype: DType | str) -> Array:
        """Return a new array without gaps."""

    def copied(self, x: Array) -> Array:
        """Return a copy without gaps."""

    def launch(self, plan: Plan, arguments: list[int | float]) -> None:
        """Launch a kernel on the current stream."""


def dtype_name(dtype: DType) -> str:
    """Return the name of a dtype, or of the class that stands for one, such as "float32"."""
    return str(dtype).rpartition(".")[2].removesuffix("'>")


_devices: dict[tuple[type, int], Device | str] = {}
"""What was found for a type of arrays, or of devices, and a device's number."""

_numbers: dict[type, Callable[[Array], int]] = {}
"""How the number of an array's device is told, by its type: in the way that takes least of a call's time."""


def device_of(x: Array) -> Device | str:
    """Return the GPU that an array is on, or why there is none that kernels can use."""
    kind = type(x)
    number = _numbers.get(kind)
    if number is not None:
        found = _devices.get((kind, number(x)))
        if found is not None:
            return found
    return _open(x)


def _open(x: Array) -> Device | str:
    name = library(x).name
    if name == "torch":
        if x.device.type != "cuda":
            return f"the tensor is on {x.device}"
        number, found = type(x).get_device, torch_device(x.device.index or 0)
    elif name == "cupy":
        number, found = _number_of_cupy, _opened(_CupyDevice, x.device.id)
    else:
        return f"{name} runs on the GPU in its own way"
    _numbers[type(x)] = number
    _devices[type(x), number(x)] = found
    return found


def _number_of_cupy(x: Array) -> int:
    return x.device.id  # type: ignore[no-any-return]


def torch_device(ordinal: int) -> Device | str:
    """Return PyTorch's GPU of this number, or why kernels cannot use it."""
    return _opened(_TorchDevice, ordinal)


def _opened(kind: type[_TorchDevice | _CupyDevice], ordinal: int) -> Device | str:
    found = _devices.get((kind, ordinal))
    if found is None:
        try:
            found = kind(ordinal)
        except ImportError as error:
            found = f"no CUDA kernels here: {error}"
        _devices[kind, ordinal] = found
    return found


def _streams_of(torch: Any) -> Callable[[int], int]:
    """Return PyTorch's function from a device's number to its current stream, as the driver knows it."""
    # The public way makes an object, which takes as long as the rest of a launch. Triton calls this one, too.
    raw: Callable[[int], int] | None = getattr(getattr(torch, "_C", None), "_cuda_getCurrentRawStream", None)
    return raw or (lambda ordinal: torch.cuda.current_stream(ordinal).cuda_stream)


class _TorchDevice:
    by_cuda_core = True

    def __init__(self, ordinal: int) -> None:
        import torch

        if torch.version.cuda is None:
            msg = "this PyTorch is not built for CUDA"
            raise ImportError(msg)
        if not has_cuda_core():
            msg = f"cuda.core is not installed: {CUDA_REMEDY}"
            raise ImportError(msg)
        found = torch.cuda.get_device_properties(ordinal)
        self.arch = found.major * 10 + found.minor
        self.torch = torch
        self.ordinal = ordinal
        self.device = torch.device("cuda", ordinal)
        # Older PyTorch does not say what a block may ask for.
        shared = getattr(found, "shared_memory_per_block_optin", USUAL_SHARED)
        self.machine = _compile.machine_of(self.arch, found.multi_processor_count, shared, clusters=True)
        self.target = _compile.target_of(self.arch)
        self.stream = _streams_of(torch)

    def view(self, x: Array) -> tuple[int, Seen]:
        pointer = x.data_ptr()
        return pointer, (x.dtype, x.shape, x.stride(), pointer % 16)

    def pointer(self, x: Array) -> int:
        return x.data_ptr()  # type: ignore[no-any-return]

    def empty(self, shape: tuple[int, ...], dtype: DType | str) -> Array:
        if isinstance(dtype, str):
            dtype = getattr(self.torch, dtype)
        return self.torch.empty(shape, dtype=dtype, device=self.device)

    def copied(self, x: Array) -> Array:
        return x.clone(memory_format=self.torch.contiguous_format)

    def launch(self, plan: Plan, arguments: list[int | float]) -> None:
        _launch.launch(plan, self.target, self.ordinal, self.stream(self.ordinal), arguments)


class _CupyDevice:
    def __init__(self, ordinal: int) -> None:
        import cupy

        if not cupy.cuda.is_available():
            msg = "CuPy finds no CUDA device: is there one, and is its driver installed?"
            raise ImportError(msg)
        self.cupy = cupy
        self.device = cupy.cuda.Device(ordinal)
        self.arch = int(self.device.compute_capability)
        self.by_cuda_core = core = has_cuda_core()
        processors = self.device.attributes["MultiProcessorCount"]
        # CuPy's own launches know no clusters.
        shared = self.device.attributes.get("MaxSharedMemoryPerBlockOptin", USUAL_SHARED)
        self.machine = _compile.machine_of(self.arch, processors, shared, clusters=core)
        self.target = _compile.target_of(self.arch) if core else None

    def view(self, x: Array) -> tuple[int, Seen]:
        pointer, size = x.data.ptr, x.dtype.itemsize
        if pointer % size or any(one % size for one in x.strides):
            raise Uncovered("the entries do not lie at multiples of their size")  # a field of a structured array
        return pointer, (x.dtype, x.shape, tuple([one // size for one in x.strides]), pointer % 16)

    def pointer(self, x: Array) -> int:
        return x.data.ptr  # type: ignore[no-any-return]

    def empty(self, shape: tuple[int, ...], dtype: DType | str) -> Array:
        with self.current():
            return self.cupy.empty(shape, dtype)

    def copied(self, x: Array) -> Array:
        with self.current():
            return x.copy(order="C")

    def launch(self, plan: Plan, arguments: list[int | float]) -> None:
        if self.target is not None:
            stream = self.cupy.cuda.get_current_stream(self.device.id).ptr
            _launch.launch(plan, self.target, self.device.id, stream, arguments)
            return
        with self.current():
            kernel = _launch.raw_kernel(self.cupy, plan.kernel, self.device.id)
            kernel((plan.grid,), (plan.block,), tuple(arguments), shared_mem=plan.shared)

    def current(self) -> AbstractContextManager[Any]:
        """Make the device current, unless it is: at its end, CuPy's own ``with`` replaces the caller's context."""
        is_current = self.cupy.cuda.runtime.getDevice() == self.device.id
        return nullcontext() if is_current else self.device
