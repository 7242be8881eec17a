"""The CUDA filters thread by thread on the host: rows that take each way through the search, held to the formulas."""

from __future__ import annotations

import numpy as np
import pytest

import polysoftmax as ps
from polysoftmax._formula import Call
from polysoftmax._sampling import LEADING
from polysoftmax._truncation import TRUNCATE
from polysoftmax.engines import cuda
from tests.host_gpu import device, dtype_of, folder, needs_compiler, portable

__all__ = ["device", "folder"]  # fixtures


def rows_of(rng, dtype, n, threads):
    """Rows that a search by bounds, lists and bins may trip over."""
    width = 16 // dtype_of(dtype).itemsize
    of_one_thread = np.arange(n) // width % threads == 0
    largest = 6e4 if dtype == "float16" else 1e38
    rows = {
        "flat": rng.normal(scale=0.5, size=n),
        "usual": rng.normal(scale=3.0, size=n),
        "peaks": rng.normal(size=n) + 12 * (rng.random(n) < 5 / n),
        "rising": np.sort(rng.normal(size=n)),
        "falling": -np.sort(rng.normal(size=n)),
        "large logits in one thread's part": rng.normal(size=n) + 8 * of_one_thread,
        "as many in a part, equal": np.where(of_one_thread, 3.0, 1.0),
        "ties at the top": np.minimum(rng.normal(size=n), 0.25),
        "few values": rng.integers(-2, 3, n).astype(float),
        "two values": np.where(rng.random(n) < 0.5, 1.0, 0.5),
        "one value": np.full(n, -7.0),
        "zeros": np.where(rng.random(n) < 0.5, 0.0, -0.0),
        "largest": rng.choice([largest, -largest, 1.0], n),
        "tiny": rng.normal(size=n) * (1e-7 if dtype == "float16" else 1e-39),
        "steep": rng.normal(scale=100.0, size=n),
        "hidden": np.where(rng.random(n) < 30 / n, rng.normal(size=n), -np.inf),
        "one": np.where(np.arange(n) == n // 2, 1.0, -np.inf),
        "far below": np.where(np.arange(n) < min(n, 5), 10.0, rng.normal(size=n) - 1000.0),
    }
    return np.stack(list(rows.values())).astype(dtype_of(dtype))


# Rows that fit a list, rows that do not, and rows whose accesses have a head and a tail.
LENGTHS = [
    ("float32", 3),
    ("bfloat16", 300),
    ("float16", 2049),
    ("float32", 4096),
    ("bfloat16", 20_001),
    ("float64", 5000),
]


def some(values, n, everything):
    """Return every third value, which one depends on the length, where threads take the host a second for each."""
    return values if everything or n < 4096 else values[n % 3 :: 3]


def assert_same_rows(device, x, **options):
    with np.errstate(all="ignore"):
        y = ps.truncate(x, **options)
        expected = portable(ps.truncate, x, dtype=None, **options)
    assert device.plans[-1].formula == "truncate"
    wrong = (y.astype(np.float64) != expected.astype(np.float64)).any(-1)
    assert not wrong.any(), f"rows {np.nonzero(wrong)[0]} of {device.plans[-1].kernel.name} with {options}"


@needs_compiler
@pytest.mark.parametrize(("dtype", "n"), LENGTHS)
def test_top_k_of_every_size(device, dtype, n, everything):
    x = rows_of(np.random.default_rng(n), dtype, n, 512)
    for k in some(sorted({1, 2, 7, 50, 300, 1024, 2500, n // 2, n - 1, n, n + 1}), n, everything):
        if k:
            assert_same_rows(device, x, top_k=k)


@needs_compiler
@pytest.mark.parametrize(("dtype", "n"), LENGTHS)
def test_top_p_of_every_size(device, dtype, n, everything):
    x = rows_of(np.random.default_rng(n), dtype, n, 512)
    for p in some((0.0, 1e-6, 0.1234, 0.5, 0.9, 0.999, 1 - 2.0**-20, 1 - 2.0**-24), n, everything):
        assert_same_rows(device, x, top_p=p)
    for temperature in some((0.0, 1e-3, 0.5, 30.0, np.inf), n, everything):
        assert_same_rows(device, x, top_p=0.7, temperature=temperature)


@needs_compiler
@pytest.mark.parametrize(("dtype", "n"), LENGTHS)
def test_filters_one_after_another(device, dtype, n, everything):
    rng = np.random.default_rng(n)
    x = rows_of(rng, dtype, n, 512)
    for k in some((2, 60, n // 2, n - 2), n, everything):
        for options in ({"top_p": 0.8}, {"min_p": 0.3}, {"top_p": 0.413, "min_p": 0.01, "temperature": 2.0}):
            assert_same_rows(device, x, top_k=max(1, k), **options)
    assert_same_rows(device, x, min_p=0.5)


@needs_compiler
@pytest.mark.parametrize(("dtype", "n"), LENGTHS)
def test_filters_under_a_mask(device, dtype, n):
    rng = np.random.default_rng(n)
    x = rows_of(rng, dtype, n, 512)
    where, compute = rng.random(x.shape) < 0.5, np.dtype("float64" if dtype == "float64" else "float32")
    for k, p in ((2, None), (40, 0.9137), (None, 0.4571), (n - 1, None)):
        call = Call(TRUNCATE, {"top_k": k}, 1, compute, x.dtype)
        with np.errstate(all="ignore"):
            y = cuda.run(call, (x, None, where, None, p, None))
            hidden = np.where(where, x, np.asarray(-np.inf, x.dtype))
            expected = portable(ps.truncate, hidden, dtype=None, top_k=k, top_p=p)
        np.testing.assert_array_equal(y.astype(np.float64), expected.astype(np.float64))
    assert len(device.plans) == 4


@needs_compiler
@pytest.mark.parametrize(("dtype", "n"), [("float32", 3), ("bfloat16", 2048), ("float16", 20_000), ("float64", 6001)])
@pytest.mark.parametrize("masked", [False, True])
def test_leading_tokens_come_with_their_indices(device, dtype, n, masked, everything):
    rng = np.random.default_rng(n)
    x = rows_of(rng, dtype, n, 512)
    where = rng.random(x.shape) < 0.3 if masked else None
    compute = np.dtype("float64" if dtype == "float64" else "float32")
    wide = np.where(where if masked else True, x.astype(compute), -np.inf)
    for k in some((1, 3, 50, 1000, 130), n, everything):
        if k > n:
            continue
        top, values, index = cuda.run(Call(LEADING, {"top_k": k}, 1, compute, compute), (x, where))
        assert device.plans[-1].formula == "sample_leading"
        expected = np.sort(np.argsort(-wide, axis=-1, kind="stable")[:, :k], axis=-1)
        np.testing.assert_array_equal(index, expected)
        np.testing.assert_array_equal(values, np.take_along_axis(wide, expected, -1))
        np.testing.assert_array_equal(top, wide.max(-1, keepdims=True))
