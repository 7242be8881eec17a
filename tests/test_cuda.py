"""The CUDA engine where there is no GPU: its arithmetic, its kernels thread by thread on the host, its machine code."""

from __future__ import annotations

import ctypes
import hashlib
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import polysoftmax as ps
from polysoftmax import engines
from polysoftmax.engines import cuda
from polysoftmax.engines.cuda import _calls, _devices, _source
from polysoftmax.engines.cuda._plan import Machine

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")

_ENTRY = """
using polysoftmax::Index;
extern "C" int run(Index grid, int shared_bytes, {parameters}) {{
    using S = S_{name};
    return polysoftmax::launch(grid, S::CLUSTER, S::BLOCK, shared_bytes, [=](char* shared) {{ {call} }});
}}
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


def build(text: str, folder: Path) -> ctypes.CDLL:
    stem = folder / hashlib.sha256(text.encode()).hexdigest()
    if not stem.with_suffix(".so").exists():
        stem.with_suffix(".cpp").write_text(text, "utf-8")
        command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-w", f"{stem}.cpp", "-o", f"{stem}.so"]
        subprocess.run(command, check=True)
    return ctypes.CDLL(f"{stem}.so")


def host_source(kernel) -> str:
    """The source of a kernel with the host in place of the GPU."""
    machine = (HERE / "host_machine.hpp").read_text("utf-8")
    parts = [_source.part("arithmetic.cuh"), machine, _source.part("rows.cuh"), _source.part("sample.cuh")]
    parameters, call = _source.body(kernel)
    return "\n".join([*parts, kernel.declaration(), _ENTRY.format(name=kernel.name, parameters=parameters, call=call)])


class HostDevice:
    """A stand-in for a GPU whose memory is NumPy's: it runs kernels thread by thread."""

    def __init__(self, folder: Path, *, processors: int = 1, clusters: bool = True) -> None:
        self.folder = folder
        self.machine = Machine(processors, clusters)
        self.plans = []

    def view(self, x):
        size = x.dtype.itemsize
        return _devices.View(x.ctypes.data, x.shape, tuple(one // size for one in x.strides), str(x.dtype))

    def empty(self, shape, dtype):
        raw = np.full(math.prod(shape) * np.dtype(dtype).itemsize + 16, 0xA5, np.uint8)
        start = -raw.ctypes.data % 16
        return raw[start : len(raw) - 16 + start].view(dtype).reshape(shape)

    def launch(self, plan, arguments):
        self.plans.append(plan)
        kinds = [ctypes.c_double if isinstance(one, float) else ctypes.c_longlong for one in arguments]
        run = build(host_source(plan.kernel), self.folder).run
        run.argtypes = [ctypes.c_longlong, ctypes.c_int, *kinds]
        assert run(plan.grid, plan.shared, *arguments) == 0, "1: threads wait for each other; 2: a misaligned access"


@pytest.fixture
def device(monkeypatch, folder):
    """NumPy arrays are on a GPU, as far as the library can see."""
    found = HostDevice(folder)
    monkeypatch.setattr(_devices, "device_of", lambda _: found)
    monkeypatch.setitem(engines._RUNNERS, np.ndarray, cuda)
    return found


def portable(function, *arrays, **options):
    """What the array API formulas answer in float64."""
    wide = [one.astype(np.float64) if one.dtype.kind in "fV" else one for one in arrays]
    found, engines._RUNNERS[np.ndarray] = engines._RUNNERS[np.ndarray], engines._Portable()
    try:
        with np.errstate(all="ignore"):
            return function(*wide, **options)
    finally:
        engines._RUNNERS[np.ndarray] = found


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


LAYOUTS = [
    # dtype, rows, n, processors, clusters
    ("float32", 9, 1, 1, True),
    ("float16", 33, 3, 1, True),
    ("float64", 7, 32, 1, True),
    ("bfloat16", 9, 100, 1, True),
    ("float32", 9, 131, 1, True),
    ("bfloat16", 7, 1000, 1, True),
    ("float16", 7, 4097, 1, True),
    ("float32", 2, 20001, 8, True),
    ("float32", 2, 40000, 1, False),
    ("float64", 1, 140_001, 1, True),
]


@needs_compiler
@pytest.mark.parametrize(("dtype", "rows", "n", "processors", "clusters"), LAYOUTS)
@pytest.mark.parametrize("general", [False, True])
def test_softmax_in_every_layout(device, dtype, rows, n, processors, clusters, general):
    device.machine = Machine(processors, clusters)
    rng = np.random.default_rng(n)
    x = logits(rng, dtype, (rows, n), special=rows > 6)
    options = {}
    if general:
        temperature = rng.uniform(0.3, 3.0, rows)
        temperature[: min(rows, 7)] = [0.7, 0.0, np.inf, 1.0, 1.0, 0.0, 2.0][:rows]
        temperature = temperature.astype(dtype_of("float64" if dtype == "float64" else "float32"))
        options = {"temperature": temperature, "where": rng.random((rows, n)) < 0.8}
    expected = portable(ps.softmax, x, **options)
    y = ps.softmax(x, **options)
    assert [plan.kernel.general for plan in device.plans] == [general]
    assert y.dtype == x.dtype
    t = options.get("temperature", np.ones(rows))[:, None].astype(np.float64)
    assert_close(y, expected, x, temperature=np.where((t > 0) & (t < np.inf), t, 1.0))


def test_the_layouts_above_are_all_there_are():
    """Every way of sharing out a row is among them: lanes, a block, a cluster, and a row that is read twice."""
    seen = set()
    for dtype, rows, n, processors, clusters in LAYOUTS:
        kernel = _calls.plan_rows(
            "softmax", dtype, dtype, rows, n, aligned=True, general=False, machine=Machine(processors, clusters)
        ).kernel
        seen.add((kernel.threads > 32, kernel.cluster > 1, kernel.held, kernel.width > 1))
    assert seen >= {
        (False, False, True, False),
        (False, False, True, True),
        (True, False, True, True),
        (True, True, True, True),
        (True, False, False, True),
    }
