"""The backends of the test matrix, ways of running included, and what each of them can do."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from importlib.util import find_spec

from polysoftmax.engines import has_cuda_core

_FLOATS = ("float32", "float64")
_ALL = ("float16", "bfloat16", "float32", "float64")
_NARROW = ("float16", "bfloat16", "float32")


class Backend(Enum):
    """A library, and a way of running it."""

    NUMPY = "numpy"
    NUMPY_READONLY = "numpy:readonly"
    STRICT = "array_api_strict"
    STRICT_2025 = "array_api_strict:2025.12"
    DASK = "dask"
    CUBED = "cubed"
    MLX = "mlx"
    JAX = "jax"
    JAX_FUSED = "jax:fused"
    JAX_X64 = "jax:x64"
    TORCH = "torch"
    TORCH_AUTOGRAD = "torch:autograd"
    TORCH_FUNC = "torch:func"
    TORCH_COMPILE = "torch:compile"
    CUPY = "cupy"
    TORCH_CUDA = "torch:cuda"
    JAX_CUDA = "jax:cuda"

    @property
    def library(self) -> str:
        """Name of the library, the part before the colon."""
        return self.value.partition(":")[0]

    @property
    def way(self) -> str:
        """Name of the way of running, the part after the colon; empty for the usual one."""
        return self.value.partition(":")[2]

    @property
    def capability(self) -> Capability:
        """What the backend can do."""
        return CAPABILITIES[self]


@dataclass(frozen=True)
class Capability:
    """What a backend can do. The choice of tests and the support table of the documentation come from here.

    ``traced``: a function never sees values. ``compiles``: a new shape or option costs a compilation. ``lazy``:
    nothing is computed before the values are asked for. ``mutable``: arrays could be written to.
    """

    how: str
    dtypes: tuple[str, ...]
    integers: tuple[str, ...]
    default_float: str
    default_index: str
    engines: tuple[str, ...] = ("auto", "portable")
    autodiff: bool = False
    traced: bool = False
    compiles: bool = False
    lazy: bool = False
    gpu: bool = False
    mutable: bool = False


def _numpy(how: str, engines: tuple[str, ...] = ("auto", "portable")) -> Capability:
    return Capability(how, _ALL, ("int8", "int32", "int64", "uint8"), "float64", "int64", engines, mutable=True)


def _strict(how: str) -> Capability:
    return Capability(how, _FLOATS, ("int8", "int32", "int64", "uint8"), "float64", "int64", ("auto",), mutable=True)


def _jax(
    how: str,
    *,
    engines: tuple[str, ...] = ("auto", "portable"),
    traced: bool = False,
    x64: bool = False,
    gpu: bool = False,
) -> Capability:
    integers = ("int8", "int64", "uint8") if x64 else ("int8", "int32", "uint8")
    default, index = ("float64", "int64") if x64 else ("float32", "int32")
    dtypes = _FLOATS if x64 else _NARROW
    return Capability(
        how, dtypes, integers, default, index, engines, autodiff=True, traced=traced, compiles=True, gpu=gpu
    )


def _torch(
    how: str,
    *,
    engines: tuple[str, ...] = ("auto", "portable"),
    traced: bool = False,
    compiles: bool = False,
    gpu: bool = False,
) -> Capability:
    return Capability(
        how,
        _ALL,
        ("int8", "int32", "int64", "uint8"),
        "float32",
        "int64",
        engines,
        autodiff=True,
        traced=traced,
        compiles=compiles,
        gpu=gpu,
        mutable=True,
    )


CAPABILITIES = {
    Backend.NUMPY: _numpy("eager"),
    Backend.NUMPY_READONLY: _numpy("arrays that cannot be written to", ("auto",)),
    Backend.STRICT: _strict("standard 2024.12, no extension and nothing whose shape depends on values"),
    Backend.STRICT_2025: _strict("standard 2025.12, no extension and nothing whose shape depends on values"),
    Backend.DASK: Capability(
        "lazily, in chunks", _FLOATS, ("int8", "int32", "int64", "uint8"), "float64", "int64", ("auto",), lazy=True
    ),
    Backend.CUBED: Capability(
        "lazily, in chunks; without top_k, top_p and top_log_probs, which need an order",
        _FLOATS,
        ("int8", "int32", "int64", "uint8"),
        "float64",
        "int64",
        ("auto",),
        lazy=True,
    ),
    Backend.MLX: Capability("on the CPU", _NARROW, ("int8", "int32", "uint8"), "float32", "int32", ("auto",)),
    Backend.JAX: _jax("eager"),
    Backend.JAX_FUSED: _jax("under jax.jit, which computes the arrays too", engines=("auto",), traced=True),
    Backend.JAX_X64: _jax("eager, with 64-bit types", engines=("auto",), x64=True),
    Backend.TORCH: _torch("eager"),
    Backend.TORCH_AUTOGRAD: _torch("eager, recorded by autograd"),
    Backend.TORCH_FUNC: _torch("under torch.func.vjp", engines=("auto",), traced=True),
    Backend.TORCH_COMPILE: _torch("under torch.compile(fullgraph=True)", engines=("auto",), traced=True, compiles=True),
    Backend.CUPY: Capability(
        "eager",
        ("float16", "float32", "float64"),
        ("int8", "int32", "int64", "uint8"),
        "float64",
        "int64",
        ("portable", "cuda"),  # "auto" is one of the two, by the GPU
        gpu=True,
        mutable=True,
    ),
    Backend.TORCH_CUDA: _torch("eager, on CUDA", engines=("portable", "cuda"), gpu=True),
    Backend.JAX_CUDA: _jax("eager, on CUDA", gpu=True),
}


def missing(backend: Backend, engine: str = "auto") -> str | None:
    """Say why a backend cannot be opened here in an engine; None if it can."""
    if find_spec(backend.library) is None:
        return f"{backend.library} is not installed"
    if backend is Backend.CUPY:
        import cupy

        try:
            cupy.cuda.runtime.getDeviceCount()
        except cupy.cuda.runtime.CUDARuntimeError as error:
            return f"cupy finds no device: {error}"
    if backend is Backend.TORCH_CUDA:
        import torch

        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
        if engine == "cuda" and not has_cuda_core():
            return "cuda.core is not installed"
    if backend is Backend.JAX_CUDA:
        import jax

        try:
            jax.devices("cuda")
        except RuntimeError as error:
            return f"jax finds no CUDA device: {error}"
    return None
