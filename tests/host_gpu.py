"""A stand-in for a GPU: CUDA kernels compiled for the host, which runs them thread by thread."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import polysoftmax as ps
from polysoftmax import _formula, engines
from polysoftmax.engines import cuda
from polysoftmax.engines import numpy as numpy_engine
from polysoftmax.engines.cuda import _devices, _source
from polysoftmax.engines.cuda._plan import Kernel, Machine

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")

_ENTRY = """
using polysoftmax::Index;
extern "C" int run(Index grid, int cluster, int block, int shared_bytes, {parameters}) {{
    return polysoftmax::launch_all(grid, cluster, block, shared_bytes, [=](char* shared) {{ {call} }});
}}
"""


_FOLDERS = []


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Return the one folder of a process: pytest takes a fixture for another in each file that imports it."""
    if not _FOLDERS:
        _FOLDERS.append(tmp_path_factory.mktemp("kernels"))
    return _FOLDERS[0]


COMMAND = [COMPILER, "-std=c++17", "-O1", "-fPIC", "-w", "-U_FORTIFY_SOURCE"]  # which forbids jumps between stacks


def build(kernel: Kernel, folder: Path) -> ctypes.CDLL:
    """Compile a kernel with the host in place of the GPU; what all kernels share is compiled once."""
    shared = folder / "kernels.hpp"
    if not shared.exists():
        machine = (HERE / "host_machine.hpp").read_text("utf-8")
        parts = [machine if name == "cuda/machine.cuh" else _source.part(name) for name in _source.PARTS]
        shared.write_text("\n".join(["#include <stdint.h>", *parts]), "utf-8")
        subprocess.run([*COMMAND, "-x", "c++-header", shared, "-o", f"{shared}.gch"], check=True)
        machine = folder / "machine.so"
        subprocess.run([*COMMAND, "-DMACHINE", "-shared", "-x", "c++", shared, "-o", machine], check=True)
        ctypes.CDLL(str(machine), ctypes.RTLD_GLOBAL)
    stem = folder / kernel.name
    if not stem.with_suffix(".so").exists():
        parameters, call = _source.body(kernel)
        entry = _ENTRY.format(parameters=parameters, call=call)
        stem.with_suffix(".cpp").write_text(f'#include "kernels.hpp"\n{kernel.declaration()}{entry}', "utf-8")
        subprocess.run([*COMMAND, "-shared", f"{stem}.cpp", "-o", f"{stem}.so"], check=True)
    return ctypes.CDLL(f"{stem}.so")


class HostDevice:
    """A stand-in for a GPU whose memory is NumPy's: it runs kernels thread by thread."""

    def __init__(self, folder: Path, *, processors: int = 1, clusters: bool = True) -> None:
        self.folder = folder
        self.machine, self.arch, self.by_cuda_core = Machine(processors, clusters), 90, True
        self.plans = []
        self.xp = np

    def of(self, x):
        self.xp = np if isinstance(x, np.ndarray) else sys.modules["torch"]
        return self

    def view(self, x):
        if self.xp is not np:
            return _devices._TorchDevice.view(self, x)
        size, pointer = x.dtype.itemsize, x.ctypes.data
        return pointer, (x.dtype, x.shape, tuple(one // size for one in x.strides), pointer % 16)

    def pointer(self, x):
        return x.data_ptr() if self.xp is not np else x.ctypes.data

    def empty(self, shape, dtype):
        if self.xp is not np and isinstance(dtype, str):
            dtype = getattr(self.xp, dtype)
        size = dtype.itemsize if self.xp is not np else np.dtype(dtype).itemsize
        raw = np.full(math.prod(shape) * size + 16, 0xA5, np.uint8)
        start = -raw.ctypes.data % 16
        raw = raw[start : len(raw) - 16 + start]
        return (raw if self.xp is np else self.xp.from_numpy(raw)).view(dtype).reshape(shape)

    def copied(self, x):
        made = self.empty(tuple(x.shape), x.dtype)
        made[...] = x
        return made

    def launch(self, plan, arguments):
        self.plans.append(plan)
        kinds = [ctypes.c_double if isinstance(one, float) else ctypes.c_longlong for one in arguments]
        run = build(plan.kernel, self.folder).run
        run.argtypes = [ctypes.c_longlong, ctypes.c_int, ctypes.c_int, ctypes.c_int, *kinds]
        found = run(plan.grid, plan.cluster, plan.block, plan.shared, *arguments)
        assert found == 0, "1: threads wait for each other; 2: a misaligned access"


@pytest.fixture
def device(monkeypatch, folder):
    """NumPy arrays are on a GPU, as far as the library can see."""
    found = HostDevice(folder)
    monkeypatch.setattr(_devices, "device_of", found.of)
    monkeypatch.setitem(_formula._RUNNERS, np.ndarray, cuda)
    monkeypatch.setattr(cuda, "words", numpy_engine.words)  # for what runs as it stands
    token = engines._CHOICE.set("cuda")
    yield found
    engines._CHOICE.reset(token)


def portable(function, *arrays, dtype=np.float64, **options):
    """What the array API formulas answer, in float64 if not otherwise asked."""
    wide = [one.astype(dtype) if dtype and one.dtype.kind in "fV" else one for one in arrays]
    found, _formula._RUNNERS[np.ndarray] = _formula._RUNNERS[np.ndarray], numpy_engine
    try:
        with ps.engine("portable"):
            return function(*wide, **options)
    finally:
        _formula._RUNNERS[np.ndarray] = found


def dtype_of(name: str):
    return np.dtype(name if name != "bfloat16" else pytest.importorskip("ml_dtypes").bfloat16)


BITS = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}


def assert_close(y, expected, x, *, temperature=1.0, cotangent=1.0, floor=0.0):
    """Hold an answer to the bound of the contract, in units of the compute dtype, and one rounding to its own."""
    assert y.shape == expected.shape
    np.testing.assert_array_equal(np.isnan(y.astype(np.float64)), np.isnan(expected))
    own, unit = 2.0 ** -BITS[str(y.dtype)], 2.0 ** -max(BITS[str(x.dtype)], 24)
    with np.errstate(all="ignore"):
        wide = np.where(np.isfinite(x.astype(np.float64)), x.astype(np.float64), np.nan)
        d = (np.nanmax(wide, axis=-1, keepdims=True, initial=-1e300) - wide) / temperature
        d = np.where((expected != 0) & np.isfinite(d), d, 0.0) if y.shape == x.shape else 0.0
        scale = np.maximum(np.abs(expected), floor) * cotangent
        # D, the mean of d under the softmax, is never above log n.
        bound = (16 + math.log2(x.shape[-1]) + d + math.log(x.shape[-1])) * unit * scale + own * np.abs(expected)
        smallest = 2.0**-24 if y.dtype == np.float16 else np.finfo(np.float32).tiny
        wrong = np.abs(y.astype(np.float64) - expected) > bound + smallest
    exact = (y.astype(np.float64) == expected) | np.isnan(expected)
    # A finite number may be too large for 16 bits.
    overflow = np.isinf(y.astype(np.float64)) & (np.abs(expected) > float(np.finfo(np.float16).max))
    assert not (wrong & ~exact & ~overflow).any()


def logits(rng, dtype, shape, *, special=False):
    x = rng.normal(scale=4.0, size=shape).astype(dtype_of(dtype))
    if special:
        rows = x.reshape(-1, shape[-1])
        rows[1, ::2] = -np.inf
        rows[2] = -np.inf
        rows[3, -1] = np.nan
        rows[4, 0] = np.inf
        rows[5] = 1.5
    return x
