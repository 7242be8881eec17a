"""The CUDA kernels thread by thread on the host, held to the array API formulas in float64."""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import polysoftmax as ps
from polysoftmax import _formula, engines
from polysoftmax._formula import Call
from polysoftmax._probability import LOG_PROB
from polysoftmax._sampling import SAMPLE
from polysoftmax._softmax import SOFTMAX
from polysoftmax.engines import cuda
from polysoftmax.engines import numpy as numpy_engine
from polysoftmax.engines.cuda import _devices, _source
from polysoftmax.engines.cuda._plan import Kernel, Machine, plan_rows

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")

_ENTRY = """
using polysoftmax::Index;
extern "C" int run(Index grid, int shared_bytes, {parameters}) {{
    using S = S_{name};
    return polysoftmax::launch_all(grid, S::CLUSTER, S::BLOCK, shared_bytes, [=](char* shared) {{ {call} }});
}}
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kernels")


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
        entry = _ENTRY.format(name=kernel.name, parameters=parameters, call=call)
        stem.with_suffix(".cpp").write_text(f'#include "kernels.hpp"\n{kernel.declaration()}{entry}', "utf-8")
        subprocess.run([*COMMAND, "-shared", f"{stem}.cpp", "-o", f"{stem}.so"], check=True)
    return ctypes.CDLL(f"{stem}.so")


class HostDevice:
    """A stand-in for a GPU whose memory is NumPy's: it runs kernels thread by thread."""

    def __init__(self, folder: Path, *, processors: int = 1, clusters: bool = True) -> None:
        self.folder = folder
        self.machine = Machine(processors, clusters)
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

    def launch(self, plan, arguments):
        self.plans.append(plan)
        kinds = [ctypes.c_double if isinstance(one, float) else ctypes.c_longlong for one in arguments]
        run = build(plan.kernel, self.folder).run
        run.argtypes = [ctypes.c_longlong, ctypes.c_int, *kinds]
        assert run(plan.grid, plan.shared, *arguments) == 0, "1: threads wait for each other; 2: a misaligned access"


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


LAYOUTS = [
    # dtype, rows, n, processors, clusters
    ("float32", 9, 1, 1, True),
    ("float16", 33, 3, 1, True),
    ("float64", 7, 32, 1, True),
    ("bfloat16", 9, 100, 1, True),
    ("float16", 9, 129, 1, True),  # more entries before and after whole accesses than half a warp has lanes
    ("float32", 9, 131, 1, True),
    ("bfloat16", 7, 1000, 1, True),
    ("float16", 7, 4097, 1, True),
    ("float32", 2, 20001, 8, True),
    ("float32", 2, 40000, 1, False),
    ("float64", 1, 140_001, 1, True),
]


STAGED = [("bfloat16", 40_000, 2), ("float16", 33_001, 2), ("float32", 33_001, 4)]


@needs_compiler
@pytest.mark.parametrize("function", [ps.softmax, ps.log_softmax])
@pytest.mark.parametrize(("dtype", "n", "blocks"), STAGED)
def test_long_rows_stay_in_shared_memory(device, function, dtype, n, blocks):
    device.machine = Machine(1, clusters=True, shared=227 << 10)
    x = logits(np.random.default_rng(n), dtype, (3, n))
    x[1] = -np.inf
    x[1, n - 1] = 2.0
    assert_close(function(x), portable(function, x), x)
    kernel = device.plans[-1].kernel
    assert (kernel.cluster, kernel.threads, kernel.staged) == (blocks, 256, 8)


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
        kernel = plan_rows(
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


ROW_CASES = [("float16", 9, 3), ("float32", 9, 131), ("bfloat16", 8, 1000), ("float32", 2, 20001)]


@needs_compiler
@pytest.mark.parametrize(("dtype", "rows", "n"), [*ROW_CASES, ("float32", 7, 40_001)])  # the last is read in chunks
@pytest.mark.parametrize("masked", [False, True])
def test_log_softmax_and_logsumexp(device, dtype, rows, n, masked):
    device.machine = Machine(8, clusters=True)
    rng = np.random.default_rng(n)
    x = logits(rng, dtype, (rows, n), special=rows > 6)
    options = {"where": rng.random((rows, n)) < 0.8} if masked else {}
    if masked:
        options["where"][0] = False
    assert_close(ps.log_softmax(x, **options), portable(ps.log_softmax, x, **options), x, floor=1.0)
    expected = portable(ps.logsumexp, x, keepdims=True, **options)
    assert_close(ps.logsumexp(x, keepdims=True, **options), expected, x, floor=1.0)
    assert len(device.plans) == 2


@needs_compiler
def test_logsumexp_close_to_zero_keeps_its_digits(device):
    x = np.full((2, 300), -1e4, np.float32)
    x[:, 0], x[:, 7] = 0.0, [-40.0, -60.0]
    # exp(-40) and exp(-60), as log(1 + e) = e to more digits than float32 has.
    expected = np.asarray([4.248354255291589e-18, 8.75651076269652e-27])
    np.testing.assert_allclose(ps.logsumexp(x), expected, rtol=(16 + math.log2(300) + 60) * 2.0**-24)
    assert device.plans


@needs_compiler
@pytest.mark.parametrize(("dtype", "rows", "n"), ROW_CASES)
@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("function", [ps.softmax_vjp, ps.log_softmax_vjp])
def test_vjp(device, dtype, rows, n, general, function):
    device.machine = Machine(8, clusters=True)
    rng = np.random.default_rng(n)
    x, g = logits(rng, dtype, (rows, n), special=rows > 6), logits(rng, dtype, (rows, n))
    options = {"temperature": 0.5, "where": rng.random((rows, n)) < 0.8} if general else {}
    expected = portable(function, x, g, **options)
    y = function(x, g, **options)
    assert len(device.plans) == 1
    assert_close(y, expected, x, floor=1.0, cotangent=np.abs(g.astype(float)).max() * 8)


@needs_compiler
@pytest.mark.parametrize("n", [131, 4001])
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize("temperature", [None, 0.5])
def test_the_pullback_of_an_answer(device, n, name, temperature):
    rng = np.random.default_rng(n)
    x, g = logits(rng, "float32", (9, n), special=True), logits(rng, "float32", (9, n))
    formula, ops = engines.FORMULAS[name], _formula.words(x, 1)
    with np.errstate(all="ignore"):
        y = formula.function(ops, x, temperature, None)
    call = Call(formula.pullback((True, False, False)), {}, 1, np.float32, np.float32)
    wide = [y.astype(float), temperature, None, y.astype(float), g.astype(float)]
    with np.errstate(all="ignore"):
        expected = call._replace(compute=np.float64, result=np.float64).evaluate(ops, tuple(wide))
    found = cuda.run(call, (y, temperature, None, y, g))
    assert device.plans[0].kernel.formula == f"{name}_pullback"
    assert_close(found, expected, x, floor=1.0, cotangent=np.abs(g).max() * 16)


@needs_compiler
@pytest.mark.parametrize(("dtype", "n"), [("float16", 3), ("float32", 131), ("bfloat16", 1000)])
@pytest.mark.parametrize("plain", [False, True])
def test_cross_entropy_and_its_slope(device, dtype, n, plain):
    rng = np.random.default_rng(n)
    x = logits(rng, dtype, (11, n), special=True)
    targets = rng.integers(0, n, (11, 1))
    targets[7:] = [[-1], [n], [-7], [0]]
    x[10, 0] = -np.inf
    weight, options = None, {"ignore_index": None, "label_smoothing": 0.0, "z_loss": 0.0}
    if not plain:
        weight = np.broadcast_to(rng.random(n).astype(np.float32), (11, n))
        options |= {"ignore_index": -1, "z_loss": 1e-3}
    formula = engines.FORMULAS["cross_entropy"]
    call = Call(formula, options, 1, np.float32, np.float32)
    slope = call._replace(formula=formula.pullback((True, False, False)))
    g = rng.normal(size=(11, 1)).astype(np.float32)
    y = cuda.run(call, (x, targets, weight))
    dx = cuda.run(slope, (x, targets, weight, y, g))
    assert [plan.kernel.formula for plan in device.plans] == ["cross_entropy", "cross_entropy_slope"]
    wide = (x.astype(float), targets, None if weight is None else weight.astype(float))
    to_float64, ops = {"compute": np.float64, "result": np.float64}, _formula.words(x, 1)
    with np.errstate(all="ignore"):
        loss = call._replace(**to_float64).evaluate(ops, wide)
        gradient = slope._replace(**to_float64).evaluate(ops, (*wide, loss, g.astype(float)))
    # The row with +inf: NaN, as the contract has it, for any target.
    assert np.isnan(y[4, 0])
    y[4] = loss[4] = 0.0
    assert_close(y, loss, x, floor=1.0)
    assert_close(dx, gradient, x, floor=1.0, cotangent=np.abs(g).max() * 4)


@needs_compiler
def test_a_confident_row_keeps_the_digits_of_its_slopes(device):
    """1 - p of a class that is all but certain is the sum of what the others have."""
    gaps = np.asarray([12.0, 17.0, 60.0])
    x = np.full((3, 300), -1e4, np.float32)
    x[:, 7], x[:, 11] = gaps, 0.0
    rest = 1 / (1 + np.exp(gaps))  # exact to float64: that of two classes
    rtol = (32 + 2 * gaps.max()) * 2.0**-24
    sure = np.zeros_like(x)
    sure[:, 7] = 1.0
    for function, slope in ((ps.softmax_vjp, rest * (1 - rest)), (ps.log_softmax_vjp, rest)):
        np.testing.assert_allclose(function(x, sure)[:, 7], slope, rtol=rtol)
    formula, one = engines.FORMULAS["cross_entropy"], np.ones((3, 1), np.float32)
    options = {"ignore_index": None, "label_smoothing": 0.0, "z_loss": 0.0}
    call = Call(formula.pullback((True, False, False)), options, 1, np.float32, np.float32)
    targets = np.full((3, 1), 7)
    np.testing.assert_allclose(cuda.run(call, (x, targets, None, one, one))[:, 7], -rest, rtol=rtol)
    for name, slope in (("softmax", rest * (1 - rest)), ("log_softmax", rest)):
        y = getattr(ps, name)(x)
        call = Call(engines.FORMULAS[name].pullback((True, False, False)), {}, 1, np.float32, np.float32)
        np.testing.assert_allclose(cuda.run(call, (y, None, None, y, sure))[:, 7], slope, rtol=rtol)
    assert len(device.plans) == 7


@needs_compiler
@pytest.mark.parametrize("shift", [0, 1])
def test_rows_with_gaps_and_rows_that_start_anywhere(device, shift):
    """Where the rows of input and answer do not share an alignment, entries are accessed one by one."""
    whole = logits(np.random.default_rng(1), "float32", (5, 1030))
    x = whole[:, shift : 1025 + shift]
    assert_close(ps.softmax(x), portable(ps.softmax, x), x)
    assert device.plans[0].kernel.width == 1
    aligned = whole[:, :1026]  # the gap is a whole access
    assert_close(ps.softmax(aligned), portable(ps.softmax, aligned), aligned)
    assert device.plans[1].kernel.width == 4


@needs_compiler
def test_attention_scores_under_a_causal_mask(device):
    scores = logits(np.random.default_rng(2), "float32", (2, 3, 7, 7))
    for where in (np.tri(7, dtype=bool), np.arange(7) < np.asarray([4, 7])[:, None, None, None]):
        assert_close(ps.softmax(scores, where=where), portable(ps.softmax, scores, where=where), scores)
    assert len(device.plans) == 2


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "rows", "n", "processors"),
    [
        ("float32", 130, 3, 1),
        ("float32", 52, 1000, 1),
        ("bfloat16", 20, 4096, 1),
        ("float64", 9, 5001, 1),
        ("float32", 2, 50257, 8),
    ],
)
@pytest.mark.parametrize("general", [False, True])
def test_sample_draws_the_same_tokens(device, dtype, rows, n, processors, general):
    device.machine = Machine(processors, clusters=True)
    rng = np.random.default_rng(n)
    x = logits(rng, dtype, (rows, n))
    if rows > 50:
        x[1, ::2], x[2], x[3, -1], x[4, 0] = -np.inf, -np.inf, np.nan, np.inf
    options = {"return_logprobs": True}
    if general:
        temperature = rng.uniform(0.3, 2.0, rows)
        temperature[: min(rows, 9)] = [0.0, 0.7, 0.0, 1.0, 1.0, np.inf, 0.0, np.nan, -1.0][:rows]
        options["temperature"] = temperature.astype(dtype_of("float64" if dtype == "float64" else "float32"))
        options["where"] = rng.random((rows, n)) < 0.7
    # In the dtype itself, since the draw depends on its rounding; 16 bits are computed in float32.
    expected, logprobs = portable(ps.sample, x, 11, dtype=None, **options)
    with np.errstate(all="ignore"):
        tokens, found = ps.sample(x, 11, **options)
    assert [plan.kernel.formula for plan in device.plans] == ["sample_masses", "sample_draw"]
    assert (device.plans[0].kernel.cluster > 1) == (processors > 1)
    assert tokens.dtype == np.int64
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_allclose(found, logprobs, rtol=1e-5, atol=1e-5)


@needs_compiler
def test_a_million_tokens_of_float64_without_clusters(device):
    device.machine = Machine(108, clusters=False)
    x = logits(np.random.default_rng(6), "float64", (1, 1 << 20))
    np.testing.assert_array_equal(ps.sample(x, 11), portable(ps.sample, x, 11, dtype=None))
    assert [plan.kernel.formula for plan in device.plans] == ["sample_masses", "sample_draw"]


def hard_rows(rng, dtype, n):
    """Rows with ties, without answers, and with whatever else a search by digits may trip over."""
    x = rng.normal(scale=3.0, size=(12, n))
    x[1] = np.round(x[1])
    x[2] = 0.5
    x[3] = np.where(rng.random(n) < 0.5, 0.0, -0.0)
    x[4, ::2] = -np.inf
    x[5] = -np.inf
    x[6, n // 2] = np.nan
    x[7, 0] = np.inf
    x[8] = np.sign(x[8]) * (6e4 if dtype == "float16" else 1e30)
    x[9] *= 1e-40 if dtype in ("float32", "bfloat16") else 1e-7  # subnormal numbers
    x[10] = -np.inf
    x[10, n - 1] = 1.0
    x[11] = np.sort(x[11])
    return x.astype(dtype_of(dtype))


FILTERS = {
    "k": {"top_k": 3},
    "many": {"top_k": 0.9},
    "half of few": {"top_k": 4, "top_p": 0.5},
    "p": {"top_p": 0.9},
    "no p": {"top_p": 0.0},
    "half": {"top_p": 0.5, "temperature": 0.7},
    "almost all": {"top_p": 0.9999},
    "min p": {"min_p": 0.1},
    "all": {"top_k": 37, "top_p": 0.8, "min_p": 0.02, "temperature": 1.5},
    "frozen": {"top_k": 3, "top_p": 0.5, "temperature": 0.0},
    "melted": {"top_k": 7, "top_p": 0.5, "temperature": math.inf},
    "k of rows": {"top_k": [0, 1, 2, 3, 4, 5, 6, 7, math.inf, -1, math.nan, 2.5]},
    "p of rows": {"top_p": [0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 1.0, 0.0, -0.1, math.nan]},
    "min p of rows": {"min_p": [0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 1.0, 0.0, 1.5, math.nan], "top_p": 0.9},
    "temperature of rows": {"temperature": [0.0, 1, 2, 0, 0.5, 1, 1, 1, math.inf, 0.1, -1, math.nan], "top_p": 0.6},
}


def filters_of(name, dtype, n):
    compute = "float64" if dtype == "float64" else "float32"
    given = {key: np.asarray(one, compute) if isinstance(one, list) else one for key, one in FILTERS[name].items()}
    if name == "many":
        given["top_k"] = int(given["top_k"] * n)
    return given


# Each filter in float32 and in one other dtype, in turn: the kernel searches by digits of 11 bits, and a dtype has only
# its number of digits and a way to bring them in order. POLYSOFTMAX_TEST_WORK=all runs each filter in each.
OTHER_ROWS = [("bfloat16", 5000), ("float16", 77), ("float64", 300)]
TRUNCATED = [(name, "float32", 1003) for name in FILTERS] + (
    [(name, *rows) for name, rows in itertools.product(FILTERS, OTHER_ROWS)]
    if os.environ.get("POLYSOFTMAX_TEST_WORK") == "all"
    else [(name, *rows) for name, rows in zip(FILTERS, itertools.cycle(OTHER_ROWS), strict=False)]
)


@needs_compiler
@pytest.mark.parametrize(("name", "dtype", "n"), TRUNCATED)
def test_truncate(device, dtype, n, name):
    x, options = hard_rows(np.random.default_rng(n), dtype, n), filters_of(name, dtype, n)
    y = ps.truncate(x, **options)
    assert [plan.kernel.formula for plan in device.plans] == ["truncate"]
    assert y.dtype == x.dtype
    # In the dtype itself: what stays keeps every bit.
    expected = portable(ps.truncate, x, dtype=None, **options)
    np.testing.assert_array_equal(y.astype(np.float64), expected.astype(np.float64))


@needs_compiler
def test_the_number_of_tokens_that_filters_leave(device):
    x = np.full((3, 257), 2.0, np.float32)
    assert np.isfinite(ps.truncate(x, top_p=0.5)).sum(-1).tolist() == [129] * 3
    kept = np.isfinite(ps.truncate(x, top_k=np.asarray([1.0, 256.0, 257.0], np.float32)))
    np.testing.assert_array_equal(kept, np.arange(257) < np.asarray([[1], [256], [257]]))
    assert len(device.plans) == 2


@needs_compiler
@pytest.mark.parametrize(("dtype", "n", "masked"), [("float32", 1003, False), ("float16", 77, True)])
@pytest.mark.parametrize("name", FILTERS)
def test_sample_draws_the_same_tokens_from_what_filters_leave(device, dtype, n, name, masked):
    rng = np.random.default_rng(n)
    x, options = hard_rows(rng, dtype, n), filters_of(name, dtype, n)
    if masked:
        options["where"] = rng.random((12, n)) < 0.7
    expected, logprobs = portable(ps.sample, x, 5, dtype=None, return_logprobs=True, **options)
    with np.errstate(all="ignore"):
        tokens, found = ps.sample(x, 5, return_logprobs=True, **options)
    few = isinstance(options.get("top_k"), int) and 2 * options["top_k"] ** 2 <= n
    kernels = ["sample_leading", "sample_draw_leading"] if few else ["truncate", "sample_masses", "sample_draw"]
    assert [plan.kernel.formula for plan in device.plans] == kernels
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_allclose(found, logprobs, rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("options", [{}, {"top_p": 0.75}, {"top_k": 5}, {"top_k": 400, "min_p": 0.01}])
def test_draws_after_the_first(device, options):
    """The first is composed by its formula. Later ones are its launches, sharing an array for what is in between."""
    rng = np.random.default_rng(7)
    for seed in range(3):
        x, t = logits(rng, "float32", (9, 1003)), rng.uniform(0.5, 2.0)
        given = {**options, "temperature": t, "return_logprobs": True}
        tokens, found = ps.sample(x, seed, **given)
        expected, logprobs = portable(ps.sample, x, seed, dtype=None, **given)
        np.testing.assert_array_equal(tokens, expected)
        np.testing.assert_allclose(found, logprobs, rtol=1e-5, atol=1e-5)
    assert len(device.plans) == 3 * len({plan.kernel.formula for plan in device.plans})


@needs_compiler
def test_masks_and_keys_that_kernels_take_as_they_are(device):
    """A mask of padding, draws of each row by several keys under it, and a mask that no kernel can follow."""
    rng = np.random.default_rng(4)
    x, where = logits(rng, "float32", (3, 2, 300)), np.arange(300) < np.asarray([300, 7, 0])[:, None, None]
    keys = ps.random.split(5, 4)[:, None, None]
    for key, launches in ((11, 2), (keys, 4)):
        np.testing.assert_array_equal(
            ps.sample(x, key, where=where), portable(ps.sample, x, key, dtype=None, where=where)
        )
        assert len(device.plans) == launches
    x, where = logits(rng, "float32", (2, 3, 2, 300)), rng.random((2, 1, 2, 300)) < 0.5
    np.testing.assert_array_equal(ps.sample(x, 11, where=where), portable(ps.sample, x, 11, dtype=None, where=where))
    assert len(device.plans) == 4


@needs_compiler
def test_one_row_drawn_from_with_many_keys(device):
    x = np.log(np.asarray([0.2, 0.5, 0.3], np.float32))
    keys = ps.random.split(5, 1000)
    tokens = ps.sample(x, keys)
    assert device.plans
    # Three standard deviations of a count among 1000.
    np.testing.assert_allclose(np.bincount(tokens, minlength=3) / 1000, [0.2, 0.5, 0.3], atol=0.048)
    np.testing.assert_array_equal(ps.sample(x, keys, top_k=1), np.full(1000, 1))


@pytest.fixture
def tensors(device, monkeypatch):
    """PyTorch, whose tensors are on a GPU as far as the library can see, and compiled code is new."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr("polysoftmax.engines.torch.is_on_gpu", lambda _: True)
    operator = pytest.importorskip("polysoftmax.engines._operator")
    engine_for = operator._engine
    monkeypatch.setattr(operator, "_engine", torch.compiler.assume_constant_result(lambda _: engine_for("cuda")))
    torch._dynamo.reset()
    yield torch
    torch._dynamo.reset()


def losses(torch, dtype):
    """Functions of logits to be differentiated, and the kernels that they take there and back."""
    rng = np.random.default_rng(3)
    g = torch.from_numpy(rng.normal(size=(5, 200))).to(dtype)
    where, weight = torch.from_numpy(rng.random((5, 200)) < 0.8), torch.from_numpy(rng.random(200)).float()
    t, classes = torch.tensor([0.5, 1.0, 2.0, 0.0, math.inf]), torch.tensor([0, -1, 199, 7, 7])
    options = {"ignore_index": -1, "weight": weight, "z_loss": 0.01}
    both = ["cross_entropy", "cross_entropy_slope"]
    return {
        "softmax": (lambda x: (ps.softmax(x, temperature=t, where=where) * g.to(x.dtype)).sum(), "softmax"),
        "log_softmax": (lambda x: (ps.log_softmax(x, temperature=0.5) * g.to(x.dtype)).sum(), "log_softmax"),
        "cross_entropy": (lambda x: ps.cross_entropy(x, classes, **options), both),
    }


@needs_compiler
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "cross_entropy"])
def test_derivatives_of_tensors(tensors, device, dtype, name, compiled):
    dtype = getattr(tensors, dtype)
    function, kernels = losses(tensors, dtype)[name]
    if isinstance(kernels, str):
        # What was rounded is of no use: the gradient then follows from the rows.
        kernels = [kernels, f"{kernels}_{'pullback' if dtype == tensors.float32 else 'vjp'}"]
    x = tensors.randn(5, 200, generator=tensors.Generator().manual_seed(1)).to(dtype).requires_grad_()
    reference = x.detach().double().requires_grad_()
    with ps.engine("portable"):
        function(reference).backward()
    run = tensors.compile(function, backend="aot_eager", fullgraph=True) if compiled else function
    run(x).backward()
    assert [plan.kernel.formula for plan in device.plans] == kernels
    assert x.grad.dtype == dtype
    assert device.plans[1].kernel.y == str(dtype).removeprefix("torch.")
    unit = 2.0**-24 if dtype == tensors.float32 else 2.0**-8
    tensors.testing.assert_close(x.grad.double(), reference.grad, rtol=40 * unit, atol=40 * unit)


@needs_compiler
def test_derivatives_on_another_thread_take_the_kernels_too(tensors, device):
    x = tensors.zeros(4, 100, requires_grad=True)
    y = ps.softmax(x)
    thread = threading.Thread(target=y.backward, args=(tensors.randn(4, 100),))
    thread.start()
    thread.join()
    assert [plan.kernel.formula for plan in device.plans] == ["softmax", "softmax_pullback"]


@needs_compiler
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.9, "temperature": 0.7}])
def test_compiled_code_draws_the_same_tokens(tensors, device, options):
    x = tensors.from_numpy(logits(np.random.default_rng(9), "float32", (8, 300), special=True))
    key = ps.random.key(3, xp=tensors)
    expected, logprobs = portable(ps.sample, x.numpy(), 3, dtype=None, return_logprobs=True, **options)
    run = tensors.compile(
        lambda x: ps.sample(x, key, return_logprobs=True, **options), backend="aot_eager", fullgraph=True
    )
    tokens, found = run(x)
    assert device.plans
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_allclose(found, logprobs, rtol=1e-5, atol=1e-5)


def test_compiled_code_takes_the_operator_where_there_is_a_kernel(tensors):
    seen = []

    def backend(graph, _):
        seen.append([str(node.target) for node in graph.graph.nodes if "polysoftmax" in str(node.target)])
        return graph.forward

    x = tensors.zeros(4, 100)
    for name, function in (("cuda", ps.softmax), ("cuda", ps.entropy), ("auto", ps.log_softmax)):
        with ps.engine(name):
            tensors.compile(function, backend=backend, fullgraph=True)(x)
    assert seen == [["polysoftmax.formula.default"], [], []]


def test_the_operator_answers_on_the_device_of_fake_tensors():
    torch = pytest.importorskip("torch")
    operator = pytest.importorskip("polysoftmax.engines._operator")
    from torch._subclasses.fake_tensor import FakeTensorMode

    def answer(formula, result, *operands, **options):
        call = Call(formula, options, 1, torch.float32, result)
        return operator.formula(*operator.arguments_of("cuda", call, operands))

    with FakeTensorMode():
        x = torch.empty(6, 1000, device="cuda:0", dtype=torch.bfloat16)
        (y,) = answer(SOFTMAX, torch.bfloat16, x, None, None)
        assert (y.device, y.dtype, y.shape) == (x.device, x.dtype, x.shape)
        (dx,) = answer(SOFTMAX.pullback((True, False, False)), torch.float32, x, None, None, y, y)
        assert (dx.device, dx.dtype, dx.shape) == (x.device, torch.float32, x.shape)
        key = torch.empty(6, 2, device="cuda:0", dtype=torch.int32)
        nothing = (None,) * 5
        options = {"top_k": None, "is_one_key": False, "draws": 2, "replace": True}
        (tokens,) = answer(SAMPLE, torch.int64, x, key, *nothing, **options)
        (logprobs,) = answer(LOG_PROB, torch.float32, x, tokens, *nothing, top_k=None)
    assert (tokens.device, tokens.dtype, tokens.shape) == (x.device, torch.int64, (6, 2))
    assert (logprobs.dtype, logprobs.shape) == (torch.float32, (6, 2))
