"""The CUDA kernels of rows thread by thread on the host, held to the array API formulas in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest

import polysoftmax as ps
from polysoftmax import _formula, engines
from polysoftmax._formula import Call
from polysoftmax.engines import cuda
from polysoftmax.engines.cuda._plan import Machine, plan_rows
from tests.host_gpu import assert_close, device, dtype_of, folder, logits, needs_compiler, portable

__all__ = ["device", "folder"]  # fixtures

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


STAGED = [("bfloat16", 40_000, 2, 12), ("float32", 33_001, 4, 12), ("float16", 140_001, 8, 8)]


@needs_compiler
@pytest.mark.parametrize("function", [ps.softmax, ps.log_softmax])
@pytest.mark.parametrize(("dtype", "n", "blocks", "staged"), STAGED)
def test_long_rows_stay_in_shared_memory(device, function, dtype, n, blocks, staged):
    device.machine = Machine(1, clusters=True, shared=227 << 10)
    x = logits(np.random.default_rng(n), dtype, (3, n))
    x[1] = -np.inf
    x[1, n - 1] = 2.0
    assert_close(function(x), portable(function, x), x)
    plan = device.plans[-1]
    assert (plan.cluster, plan.block, plan.staged) == (blocks, 256, staged)


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
    (kernel,) = [plan.kernel for plan in device.plans]
    assert kernel.general == (general or kernel.width == 1 or not kernel.held)
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
        seen.add((kernel.threads > 32, kernel.cluster, kernel.held, kernel.width > 1))
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
    assert device.plans[0].formula == f"{name}_pullback"
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
    slope = call._replace(formula=formula.pullback((True, False, False)), result=x.dtype)
    g = rng.normal(size=(11, 1)).astype(np.float32)
    y = cuda.run(call, (x, targets, weight))
    dx = cuda.run(slope, (x, targets, weight, y, g))
    assert [plan.formula for plan in device.plans] == ["cross_entropy", "cross_entropy_slope"]
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
