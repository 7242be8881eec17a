"""The CUDA kernels that filter and draw, thread by thread on the host: token for token as the formulas do."""

from __future__ import annotations

import itertools
import math
import os

import numpy as np
import pytest

import polysoftmax as ps
from polysoftmax.engines.cuda._plan import Machine
from tests.host_gpu import device, dtype_of, folder, logits, needs_compiler, portable

__all__ = ["device", "folder"]  # fixtures


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
    of_logprobs = "log_prob" if general else "cross_entropy"
    assert [plan.formula for plan in device.plans] == ["sample_masses", "sample_draw", of_logprobs]
    assert (device.plans[0].cluster > 1) == (processors > 1)
    assert tokens.dtype == np.int64
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_allclose(found, logprobs, rtol=1e-5, atol=1e-5)


@needs_compiler
def test_a_million_tokens_of_float64_without_clusters(device):
    device.machine = Machine(108, clusters=False)
    x = logits(np.random.default_rng(6), "float64", (1, 1 << 20))
    np.testing.assert_array_equal(ps.sample(x, 11), portable(ps.sample, x, 11, dtype=None))
    assert [plan.formula for plan in device.plans] == ["sample_masses", "sample_draw"]


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
    assert [plan.formula for plan in device.plans] == ["truncate"]
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
    of_logprobs = ["truncate", "log_prob" if masked or "temperature" in options else "cross_entropy"]
    assert [plan.formula for plan in device.plans] == [*kernels, *of_logprobs]
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
    found = [plan.formula for plan in device.plans]
    each = len(found) // 3
    assert found == 3 * found[:each]
    assert found[each - 1] == "log_prob"


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
