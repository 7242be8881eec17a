"""What was found here: versions, devices, engines and the reasons against them, as it goes into a report of a bug."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import polysoftmax
from polysoftmax._demo.backends import NAMES, Missing, look_for
from polysoftmax.engines import CUDA_REMEDY, FORMULAS, _library, chosen, has_cuda_core
from polysoftmax.engines._library import num_threads

if TYPE_CHECKING:
    from collections.abc import Iterator

_PACKAGES = (
    *("array-api-compat", "numpy", "ml-dtypes", "jax", "jaxlib", "torch", "cupy", "cupy-cuda12x", "cupy-cuda13x"),
    *("scipy", "dask", "array-api-strict", "ndonnx", "cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc"),
    *("mpmath", "rich", "matplotlib", "pytest"),
)
_VARIABLES = (
    *("POLYSOFTMAX_ENGINE", "POLYSOFTMAX_CPU", "POLYSOFTMAX_NUM_THREADS", "POLYSOFTMAX_CACHE_DIR"),
    *("OMP_NUM_THREADS", "JAX_PLATFORMS", "JAX_ENABLE_X64", "CUDA_VISIBLE_DEVICES", "SCIPY_ARRAY_API"),
)


def lines() -> Iterator[tuple[str, str]]:
    """Yield labels and what was found; an empty label continues the line before."""
    yield "polysoftmax", f"{polysoftmax.__version__}, {Path(polysoftmax.__file__).parent}"
    yield "Python", f"{platform.python_version()}, {sys.executable}"
    yield "system", f"{platform.platform()}, {_processor()}"
    yield "threads", f"{num_threads()} of {os.cpu_count()} CPUs"
    for name in _VARIABLES:
        if name in os.environ:
            yield name, os.environ[name]
    yield from _packages()
    yield from _engines()
    yield from _backends()


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        named = (line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("model name"))
        return next(named, platform.machine()).partition(":")[2].strip() or platform.machine()
    return platform.processor() or platform.machine()


def _packages() -> Iterator[tuple[str, str]]:
    absent = []
    for name in _PACKAGES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            absent.append(name)
    if absent:
        yield "not installed", ", ".join(absent)


def _engines() -> Iterator[tuple[str, str]]:
    """Yield the choice, and each engine with what it has or lacks."""
    from polysoftmax.engines.cuda._cache import cache_folder

    yield "engine", f"{chosen()}, from POLYSOFTMAX_ENGINE" if os.environ.get("POLYSOFTMAX_ENGINE") else chosen()
    library = _library.load()
    said = f"kernels for {library.level}, compiled by {library.compiler}" if library else f"none: {_library.reason()}"
    yield "engine native", said
    yield "engine cuda", "cuda.core is installed" if has_cuda_core() else f"cuda.core is not installed: {CUDA_REMEDY}"
    yield "CUDA cache", str(cache_folder() or "none: this user has no home")


def _backends() -> Iterator[tuple[str, str]]:
    for one in map(look_for, NAMES):
        if isinstance(one, Missing):
            yield one.name, f"{one.reason} ({one.remedy})"
            continue
        yield one.name, f"{one.version}, {one.device}"
        x = one.floats([[0.0] * 1000] * 64)
        reasons: dict[tuple[str, str], list[str]] = {}
        for name in FORMULAS:
            found = polysoftmax.explain(x, name)
            reasons.setdefault((found.engine, found.reason), []).append(name)
        usual = max(reasons, key=lambda key: len(reasons[key]))
        for (engine, reason), names in reasons.items():
            which = "most" if (engine, reason) == usual and len(reasons) > 1 else ", ".join(names)
            yield "", f"{engine}: {'all' if len(reasons) == 1 else which} ({reason})"


def show() -> None:
    """Print it."""
    found = list(lines())
    width = max(len(label) for label, _ in found) + 2
    for label, value in found:
        print(f"{label:{width}}{value}")
