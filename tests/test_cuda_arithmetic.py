"""The arithmetic of the CUDA kernels, compiled for the host, against the array API code of the library."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import polysoftmax as ps
from polysoftmax import _softmax, _threefry, random
from polysoftmax._formula import words as words_for
from polysoftmax.engines import FORMULAS

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")

# Each loops over n entries; the arrays come as pointers.
_SOURCE = """
#include <stdint.h>
namespace polysoftmax {
#include "arithmetic.hpp"
}
#include "host_machine.hpp"
namespace polysoftmax {
#include "cuda/totals.cuh"
template <int W>
Total<float> part_of(const float* x, const RowTemperature<float>& t) {
    Pack<float, W> pack;
    for (int i = 0; i < W; i++) pack.set(i, x[i]);
    Total<float> part{top_of(pack), 0};
    float terms[W], reference = finite(part.top) ? part.top : 0;
    for (int i = 0; i < W; i++) terms[i] = term_below(x[i], reference, t);
    part.sum = tree_sum<W>(terms);
    return part;
}
#define LOOP for (long long i = 0; i < n; i++)
extern "C" {
void widen_half(long long n, const unsigned short* x, float* y) { LOOP y[i] = widen(Half{x[i]}); }
void widen_bfloat(long long n, const unsigned short* x, float* y) { LOOP y[i] = widen(BFloat{x[i]}); }
void round_half(long long n, const float* x, unsigned short* y) { LOOP y[i] = rounded<Half>(x[i]).bits; }
void round_bfloat(long long n, const float* x, unsigned short* y) { LOOP y[i] = rounded<BFloat>(x[i]).bits; }
void both_words(long long n, const Words* keys, const Words* counters, Words* y) {
    LOOP y[i] = random_words(keys[i], counters[i].first, counters[i].second);
}
void order_half(long long n, const Half* x, Half* y, Word* order) {
    LOOP order[i] = order_of(x[i]), y[i] = number_of<Half>(order_of(x[i]));
}
void order_bfloat(long long n, const BFloat* x, BFloat* y, Word* order) {
    LOOP order[i] = order_of(x[i]), y[i] = number_of<BFloat>(order_of(x[i]));
}
void order_float(long long n, const float* x, float* y, Word* order) {
    LOOP order[i] = order_of(x[i]), y[i] = number_of<float>(order_of(x[i]));
}
void order_double(long long n, const double* x, double* y, Amount* order) {
    LOOP order[i] = order_of(x[i]), y[i] = number_of<double>(order_of(x[i]));
}
void amount(long long n, const float* probability, Amount* y) {
    LOOP y[i] = amount_of(probability[i], scale_of_amounts<float>(n));
}
void share(long long n, const double* p, const Amount* all, Amount* y) { LOOP y[i] = share_of(p[i], all[i]); }
void uniform(long long n, const Word* x, float* y) { LOOP y[i] = uniform_of(x[i]); }
void gumbel(long long n, const Word* x, float* y) { LOOP y[i] = gumbel_of(x[i]); }
void z_of(long long n, const float* d, const float* t, float* y) {
    LOOP y[i] = score_below(d[i], 0.0f, row_temperature(true, t[i]));
}
void term_of(long long n, const float* d, const float* t, float* y) {
    LOOP y[i] = term_below(d[i], 0.0f, row_temperature(true, t[i]));
}
void slope(long long n, const float* g, const float* t, float* y) {
    LOOP y[i] = slope_over_temperature(g[i], row_temperature(true, t[i]));
}
// A row in parts of three and of one, merged one after the other: its logsumexp, its sum under the top, a loss.
void total(long long n, const float* x, const float* t, float* y) {
    RowTemperature<float> own = row_temperature(*t != 1, *t);
    Total<float> all = no_entries<float>();
    for (long long i = 0; i < n;) {
        bool three = n - i >= 3;
        all = merge(all, three ? part_of<3>(x + i, own) : part_of<1>(x + i, own), own);
        i += three ? 3 : 1;
    }
    float log_of_sum = log(sum_of(all));
    y[0] = logsumexp_of(all, log_of_sum), y[1] = sum_of(all);
    y[2] = loss_of(all, log_of_sum, x[n / 2], 0.75f, 0.125f), y[3] = all.top;
}
void best(long long n, const float* scores, const long long* index, float* y) {
    Best<float> all{-infinity<float>(), 1000};
    LOOP all = merge(all, Best<float>{scores[i], (int)index[i]});
    y[0] = all.score, y[1] = (float)all.index;
}
void noisy(long long n, const float* scores, const float* t, float* y) {
    LOOP y[i] = noisy_score(scores[i], row_temperature(true, t[i]), Words{1, 2}, i, TOKEN_VARIATES);
}
}
}
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    path = tmp_path_factory.mktemp("arithmetic") / "host.cpp"
    path.write_text(_SOURCE, "utf-8")
    folders = (Path(ps.__file__).parent / "native", Path(__file__).parent)
    command = ["g++", "-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Werror"]
    command += [f"-I{one}" for one in folders]
    subprocess.run([*command, str(path), "-o", str(path.with_suffix(".so"))], check=True)
    library = ctypes.CDLL(str(path.with_suffix(".so")))

    def call(name, *arrays, dtype, n=None, size=None):
        y = np.zeros(size or len(arrays[0]), dtype)
        pointers = [ctypes.c_void_p(one.ctypes.data) for one in (*arrays, y)]
        getattr(library, name)(ctypes.c_longlong(n or len(arrays[0])), *pointers)
        return y

    return call


EVERY = np.arange(1 << 16, dtype=np.uint16)


@pytest.mark.parametrize("kind", ["half", "bfloat"])
def test_16_bit_formats(host, kind):
    dtype = np.float16 if kind == "half" else pytest.importorskip("ml_dtypes").bfloat16
    wide = EVERY.view(dtype).astype(np.float32)
    np.testing.assert_array_equal(host(f"widen_{kind}", EVERY, dtype=np.float32), wide)
    rng = np.random.default_rng(0)
    finite = np.sort(wide[np.isfinite(wide)])
    ties = (finite[1:].astype(np.float64) + finite[:-1]) / 2
    # Ties of bfloat16 and float16 have a bit more than the formats, and float32 holds them.
    anything = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    x = np.concatenate([wide, ties.astype(np.float32), anything])
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(dtype)
    rounded = host(f"round_{kind}", x, dtype=np.uint16).view(dtype)
    np.testing.assert_array_equal(rounded.astype(np.float32), expected.astype(np.float32))


def words(n, seed=0):
    return np.random.default_rng(seed).integers(0, 1 << 32, n, dtype=np.uint32)


@pytest.mark.parametrize("kind", ["half", "bfloat", "float", "double"])
def test_the_order_of_keys_is_that_of_numbers(host, kind):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    dtype = {"half": np.float16, "bfloat": ml_dtypes.bfloat16, "float": np.float32, "double": np.float64}[kind]
    info = ml_dtypes.finfo(dtype)
    special = [0.0, -0.0, np.inf, -np.inf, info.max, info.min, info.tiny, info.smallest_subnormal, 1.0, -1.0]
    x = np.concatenate([special, np.random.default_rng(5).normal(size=500)]).astype(dtype)
    y = np.zeros_like(x)
    order = host(f"order_{kind}", x, y, dtype=np.uint64 if kind == "double" else np.uint32)
    np.testing.assert_array_equal(x[:, None] < x, order[:, None] < order)
    np.testing.assert_array_equal(x[:, None] == x, order[:, None] == order)
    np.testing.assert_array_equal(y, x)


def test_amounts_add_up_and_are_shared(host):
    rng = np.random.default_rng(6)
    probability = np.concatenate([[1.0, 0.0, 1e-30], rng.random(997)]).astype(np.float32)
    amount = host("amount", probability, dtype=np.uint64)
    np.testing.assert_allclose(amount / np.float64(amount[0]), probability, rtol=1e-7, atol=2.0**-52)
    assert 2**60 < int(amount[0]) * 1000 <= 2**62
    p, everything = np.asarray([0.0, 1e-30, 0.5, 0.3, 0.999, 1.0]), np.full(6, 1000, np.uint64)
    assert host("share", p, everything, dtype=np.uint64).tolist() == [1, 1, 500, 300, 999, 1000]
    most = np.full(6, 2**62 - 1, np.uint64)
    assert host("share", np.ones(6), most, dtype=np.uint64).tolist() == [2**62 - 1] * 6


def test_words_are_those_of_the_random_module(host):
    keys, index = words(6, 1).reshape(3, 2), words(5000, 3)
    keys, index = np.repeat(keys, len(index), axis=0), np.tile(index, 3)
    signed = keys.view(np.int32)
    for domain in (_threefry.BLOCKS, _threefry.TOKENS, _threefry.KEYS):
        found = both_words(host, keys, np.stack([index, np.full_like(index, domain)], axis=1)).view(np.int32)
        np.testing.assert_array_equal(found[:, 0], _threefry.words(*signed.T, index.view(np.int32), domain))
    np.testing.assert_array_equal(found, random.fold_in(signed, index.view(np.int32)))


def both_words(host, keys, counters):
    return host("both_words", keys, counters, dtype=np.uint32, size=keys.size).reshape(-1, 2)


def test_known_answer_of_random123(host):
    # kat_vectors of Random123: threefry2x32 with 20 rounds.
    key = np.asarray([[0, 0], [0xFFFFFFFF, 0xFFFFFFFF], [0x13198A2E, 0x03707344]], np.uint32)
    counter = np.asarray([[0, 0], [0xFFFFFFFF, 0xFFFFFFFF], [0x243F6A88, 0x85A308D3]], np.uint32)
    expected = [[0x6B200159, 0x99BA4EFE], [0x1CB996FC, 0xBB002BE7], [0xC4923A9C, 0x483DF7A0]]
    np.testing.assert_array_equal(both_words(host, key, counter), expected)


def test_uniforms_are_equal_and_gumbels_agree(host):
    word = np.concatenate([words(100_000), np.asarray([0, 1, 0xFFFFFFFF, 0x7FFFFFFF, 0x80000000], np.uint32)])
    np.testing.assert_array_equal(host("uniform", word, dtype=np.float32), _threefry.uniform_of(word.view(np.int32)))
    found = host("gumbel", word, dtype=np.float32)
    assert np.isfinite(found).all()
    # Two logarithms, each within an ulp or two, on values of up to 22.
    np.testing.assert_allclose(found, _threefry.gumbel_of(word.view(np.int32)), rtol=1e-6, atol=1e-6)


DISTANCES = np.asarray([0.0, -1e-40, -0.5, -3.0, -90.0, -1e30, -3e38, -np.inf, np.nan], np.float32)
TEMPERATURES = np.asarray([0.0, 1e-45, 1e-38, 1e-30, 0.5, 1.0, 3.0, 1e30, np.inf, -1.0, np.nan], np.float32)
GRID = [np.ascontiguousarray(one.ravel()) for one in np.meshgrid(DISTANCES, TEMPERATURES)]


@np.errstate(all="ignore")
def test_temperature_and_its_limits(host):
    distance, t = GRID
    expected = _softmax.scores_below(words_for(distance), distance, np.zeros_like(distance), t)
    np.testing.assert_array_equal(host("z_of", *GRID, dtype=np.float32), expected)
    slope = np.where(np.isnan(GRID[0]), 2.0, GRID[0]).astype(np.float32)
    expected_slope = _softmax.over_temperature(words_for(slope), slope, t)
    np.testing.assert_array_equal(host("slope", slope, GRID[1], dtype=np.float32), expected_slope)
    # A term is exp(z), but that its exponent is rounded; a distance below 1e-37 over a T like it counts as none.
    ordinary = ~((GRID[1] > 0) & (GRID[1] < 1e-37) & (GRID[0] == np.float32(-1e-40)))
    found, term = host("term_of", *GRID, dtype=np.float32), np.exp(expected)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(term))
    np.testing.assert_allclose(found[ordinary], term[ordinary], rtol=200 * 2.0**-24, atol=1e-37)


ROWS = {
    "ordinary": np.random.default_rng(4).normal(scale=5, size=1001),
    "equal": np.full(500, 2.5),
    "far apart": [-1e30, 1e30, 0.0, 1e30],
    "some -inf": [-np.inf, 1.0, -np.inf, -np.inf, 2.0, -np.inf],
    "all -inf": [-np.inf] * 7,
    "+inf": [1.0, np.inf, 3.0, -np.inf],
    "NaN": [1.0, np.nan, 3.0],
    "NaN and +inf": [np.inf, np.nan],
    "NaN and -inf": [-np.inf, -np.inf, -np.inf, -np.inf, np.nan],
}


@np.errstate(all="ignore")
@pytest.mark.parametrize("name", ROWS)
def test_merged_parts_of_a_row(host, name):
    x = np.asarray(ROWS[name], np.float32)
    wide = x.astype(np.float64)
    logsumexp, total, loss, top = host("total", x, np.ones(1, np.float32), dtype=np.float32, size=4)
    with ps.engine("portable"):
        expected = ps.logsumexp(wide)
    np.testing.assert_allclose(logsumexp, expected, rtol=32 * 2.0**-24)
    if not np.isfinite(x.max()):
        assert np.isnan([total, loss]).all()
        return
    assert top == x.max()
    np.testing.assert_allclose(total, np.exp(wide - wide.max()).sum(), rtol=32 * 2.0**-24)
    options = {"ignore_index": None, "label_smoothing": 0.0, "z_loss": 0.125}
    weight = np.full(len(x), 0.75)
    expected = FORMULAS["cross_entropy"].function(words_for(wide), wide, np.asarray([len(x) // 2]), weight, **options)[
        0
    ]
    np.testing.assert_allclose(loss, np.float32(expected), rtol=64 * 2.0**-24)


@np.errstate(all="ignore")
@pytest.mark.parametrize("temperature", [0.0, 0.25, np.inf, -1.0])
def test_merged_parts_of_a_row_at_a_temperature(host, temperature):
    x = np.asarray([3.0, -np.inf, 1.0, 2.0, 3.0, -1.0, 2.9, 0.0], np.float32)
    t = np.asarray([temperature], np.float32)
    total = host("total", x, t, dtype=np.float32, size=4)[1]
    expected = np.exp(_softmax.scores_below(words_for(x), x, x.max(), t)).sum(dtype=np.float64)
    np.testing.assert_allclose(total, expected, rtol=32 * 2.0**-24)


def test_best_score_and_ties(host):
    scores = np.asarray([1.0, 5.0, 5.0, -np.inf, 5.0], np.float32)
    index = np.asarray([9, 7, 3, 0, 4], np.int64)
    for order in (slice(None), slice(None, None, -1)):
        found = host("best", np.ascontiguousarray(scores[order]), np.ascontiguousarray(index[order]), dtype=np.float32)
        assert found[:2].tolist() == [5.0, 3.0]


def test_scores_with_their_variates(host):
    scores = np.asarray([1.0, -np.inf, 0.0, -np.inf], np.float32)
    t = np.asarray([0.5, 0.5, 0.0, 0.0], np.float32)
    one, two = np.asarray([1], np.int32), np.asarray([2], np.int32)
    variate = _threefry.gumbel_of(_threefry.words(one, two, np.asarray([0], np.int32), _threefry.TOKENS))[0]
    found = host("noisy", scores, t, dtype=np.float32)
    np.testing.assert_allclose(found, [1.0 + variate, -np.inf, 0.0, -np.inf], rtol=1e-6)
