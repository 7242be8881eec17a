"""Entropies, smoothed losses and gradients by the CUDA kernels, thread by thread on the host, held to float64."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest

import polysoftmax as ps
from polysoftmax import _formula
from polysoftmax._formula import Call
from polysoftmax._losses import CROSS_ENTROPY, ENTROPY
from polysoftmax._probability import LOG_PROB
from polysoftmax._softmax import LOG_SOFTMAX, LOGSUMEXP, SOFTMAX
from polysoftmax.engines import cuda
from polysoftmax.engines.cuda._families import LOGITS
from polysoftmax.engines.cuda._plan import Machine
from tests.host_gpu import assert_close, device, folder, logits, needs_compiler, portable
from tests.test_confident import GAPS, SURE, VECTOR, log_softmax_pull, of_rows, softmax_product
from tests.test_confident import LOGITS as CONFIDENT

__all__ = ["device", "folder"]  # fixtures

# dtype, rows, n, clusters: lanes, a block, a cluster, entries one by one, and a row that is read twice
CASES = [
    ("float16", 9, 3, True),
    ("float32", 9, 131, True),
    ("bfloat16", 8, 1000, True),
    ("float32", 2, 20_001, True),
    ("float32", 2, 40_001, False),
]


def differentiate(formula, wanted, x, others, g, options, device):
    """Return a gradient by its kernel, and by its formula in float64."""
    call = Call(formula.pullback(wanted), options, 1, np.dtype(np.float32), x.dtype)
    found = cuda.run(call, (x, *others, None, g))
    assert len(device.plans) == 1
    wide = [one.astype(float) if isinstance(one, np.ndarray) and one.dtype == np.float32 else one for one in others]
    double = call._replace(compute=np.dtype(float), result=np.dtype(float))
    x64 = x.astype(float)
    with np.errstate(all="ignore"):
        return found, double.evaluate(_formula.words(x64, 1), (x64, *wide, None, g.astype(float)))


@pytest.fixture
def given(device, request):
    dtype, rows, n, clusters = request.param
    device.machine = Machine(8, clusters)
    rng = np.random.default_rng(n)
    x = logits(rng, dtype, (rows, n), special=rows > 6)
    return rng, x, rng.normal(size=(rows, 1)).astype(np.float32)


def classes_of(rng, x):
    """A class for each row; of rows with special logits, two that do not exist and one that does."""
    found = rng.integers(0, x.shape[1], (len(x), 1))
    if len(x) > 6:
        found[5:8, 0] = [-1, x.shape[1], 0]
    return found


def temperatures(rows):
    return np.resize(np.asarray([0.7, 0.0, np.inf, 1.0, 1.0, 3.0, 2.0], np.float32), (rows, 1))


@needs_compiler
@pytest.mark.parametrize("given", CASES, indirect=True)
@pytest.mark.parametrize("general", [False, True])
def test_entropy_and_its_gradient(device, given, general):
    rng, x, g = given
    t, where = None, None
    if general:
        t, where = temperatures(len(x)), rng.random(x.shape) < 0.8
        where[0] = False
    options = {"temperature": t, "where": where} if general else {}
    y = ps.entropy(x, **options)
    expected = portable(ps.entropy, x, **options)
    assert_close(y, expected, x, floor=1.0)
    if x.dtype == np.float16:
        wide = ps.entropy(x, dtype=np.float32, **options)
        assert wide.dtype == np.float32
        assert_close(wide, expected, wide, floor=1.0)
    assert {plan.formula for plan in device.plans} == {"entropy"}
    device.plans.clear()
    found, expected = differentiate(ENTROPY, LOGITS, x, (t, where), g, {}, device)
    assert device.plans[0].formula == "entropy_slope"
    steepest = 1 / 0.7 if general else 1.0
    assert_close(found, expected, x, floor=1.0, cotangent=np.abs(g).max() * 8 * steepest)


@needs_compiler
@pytest.mark.parametrize("given", CASES, indirect=True)
@pytest.mark.parametrize("masked", [False, True])
def test_the_gradient_of_logsumexp(device, given, masked):
    rng, x, g = given
    where = rng.random(x.shape) < 0.8 if masked else None
    found, expected = differentiate(LOGSUMEXP, LOGITS, x, (None, where), g, {}, device)
    (plan,) = device.plans
    assert plan.formula == "logsumexp_slope"
    assert plan.kernel.general == (masked or plan.kernel.width == 1 or not plan.kernel.held)
    assert_close(found, expected, x, cotangent=np.abs(g).max() * 2)


@needs_compiler
@pytest.mark.parametrize("given", CASES, indirect=True)
@pytest.mark.parametrize("general", [False, True])
def test_the_gradient_of_log_prob(device, given, general):
    rng, x, g = given
    tokens = classes_of(rng, x)
    if len(x) > 6:
        x[7, 0] = -np.inf
    t, where = (temperatures(len(x)), rng.random(x.shape) < 0.8) if general else (None, None)
    options = {"top_k": None}
    found, expected = differentiate(
        LOG_PROB, (*LOGITS, *[False] * 4), x, (tokens, t, where, None, None, None), g, options, device
    )
    assert device.plans[0].formula == "log_prob_slope"
    assert_close(found, expected, x, floor=1.0, cotangent=np.abs(g).max() * (8 / 0.7 if general else 4))


@needs_compiler
@pytest.mark.parametrize("given", CASES, indirect=True)
@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_a_smoothed_loss_and_its_gradient(device, given, smoothing):
    rng, x, g = given
    targets = classes_of(rng, x)
    options = {"ignore_index": -1, "label_smoothing": smoothing, "z_loss": 1e-3}
    found, expected = differentiate(CROSS_ENTROPY, LOGITS, x, (targets, None), g, options, device)
    assert device.plans[0].formula == "cross_entropy_slope"
    assert_close(found, expected, x, floor=1.0, cotangent=np.abs(g).max() * 4)
    y = cuda.run(Call(CROSS_ENTROPY, options, 1, np.dtype(np.float32), np.dtype(np.float32)), (x, targets, None))
    with np.errstate(all="ignore"):
        call = Call(CROSS_ENTROPY, options, 1, np.dtype(float), np.dtype(float))
        loss = call.evaluate(_formula.words(x.astype(float), 1), (x.astype(float), targets, None))
    assert device.plans[1].formula == "cross_entropy"
    assert_close(y, loss, x, floor=1.0)


@needs_compiler
@pytest.mark.parametrize("shape", ["a row each", "with 300 impossible classes"])
def test_the_mean_of_a_confident_row_does_not_cancel(device, shape):
    """softmax_vjp, where almost all of the probability, and of the mean, is one class's."""
    x, v = np.asarray(CONFIDENT, np.float32), np.asarray([VECTOR] * len(GAPS), np.float32)
    if shape != "a row each":
        x = np.concatenate([x, np.full((len(GAPS), 300), -np.inf, np.float32)], axis=-1)
        v = np.concatenate([v, np.ones((len(GAPS), 300), np.float32)], axis=-1)
    want = of_rows(lambda row: softmax_product(row, VECTOR), "float32")
    allowed = (64 + 2 * np.asarray(GAPS)[:, None]) * 2.0**-24 * np.abs(want) + 2.0**-126
    assert (np.abs(ps.softmax_vjp(x, v)[:, :5] - want) <= allowed).all()
    y = ps.softmax(x)
    pullback = Call(SOFTMAX.pullback(LOGITS), {}, 1, np.dtype(np.float32), np.dtype(np.float32))
    assert (np.abs(cuda.run(pullback, (y, None, None, y, v))[:, :5] - want) <= allowed).all()


@needs_compiler
@pytest.mark.parametrize("of_an_answer", [False, True])
def test_what_is_beside_a_large_cotangent_is_not_lost(device, of_an_answer):
    """log_softmax_vjp: at the sure class (1 - p)·g - p·(the sum of the others' cotangents), far less than g."""
    x, v = np.asarray(CONFIDENT, np.float32), np.asarray([(0.5, 2e7, 0.25, 2.0, -3.0)] * len(GAPS), np.float32)
    want = of_rows(lambda row: log_softmax_pull(row, v[0].tolist()), "float32")[:, SURE]
    found = ps.log_softmax_vjp(x, v)
    if of_an_answer:
        pullback = Call(LOG_SOFTMAX.pullback(LOGITS), {}, 1, np.dtype(np.float32), np.dtype(np.float32))
        y = ps.log_softmax(x)
        found = cuda.run(pullback, (y, None, None, y, v))
    np.testing.assert_allclose(found[:, SURE], want, rtol=(64 + 2 * max(GAPS)) * 2.0**-24)


@needs_compiler
def test_the_entropy_of_a_confident_row_keeps_its_digits(device):
    x = np.full((2, 300), -1e4, np.float32)
    x[:, 0], x[:, 7] = 0.0, [-40.0, -60.0]
    with mpmath.workprec(200):
        small = [mpmath.exp(-40), mpmath.exp(-60)]
        want = [float(mpmath.log1p(e) + e / (1 + e) * d) for e, d in zip(small, (40, 60), strict=True)]
    np.testing.assert_allclose(ps.entropy(x), want, rtol=(16 + 60) * 2.0**-24)
    assert device.plans[0].formula == "entropy"
