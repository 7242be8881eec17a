"""Log-probabilities of tokens by CUDA kernels, thread by thread on the host: one token of a row, and several."""

from __future__ import annotations

import math

import numpy as np
import pytest

import polysoftmax as ps
from tests.host_gpu import device, folder, logits, needs_compiler, portable

__all__ = ["device", "folder"]  # fixtures

# What the host's NumPy warns of, the libraries of a GPU compute in silence.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in subtract:RuntimeWarning")

N = 1003
OPTIONS = {
    "plain": ({}, ["cross_entropy"]),
    "top_k": ({"top_k": 40}, ["truncate", "cross_entropy"]),
    "temperature": ({"temperature": 0.5}, ["log_prob"]),
    "mask": ({"where": True}, ["log_prob"]),
    "all": ({"temperature": 2.0, "where": True, "top_k": 300, "top_p": 0.9}, ["truncate", "log_prob"]),
}


def options_of(name, rng, shape):
    given = dict(OPTIONS[name][0])
    if "where" in given:
        given["where"] = rng.random(shape) < 0.8
        given["where"][0] = False
    return given


def assert_same_bits(y, expected):
    bits, other = (np.where(np.isnan(one), 0, one.view(np.int32)) for one in (y, expected))
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    np.testing.assert_array_equal(bits, other)


def formulas(device):
    return [plan.formula for plan in device.plans]


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_token_has_the_same_bits_alone_and_among_several(device, name, dtype):
    rng = np.random.default_rng(3)
    x = logits(rng, dtype, (9, N), special=True)
    options = options_of(name, rng, x.shape)
    tokens = rng.integers(0, N, (9, 4))
    tokens[:, 1] = x.astype(np.float32).argmax(-1)
    tokens[7, 2] = -1
    several = ps.log_prob(x, tokens, **options)
    assert several.dtype == np.float32
    assert formulas(device) == OPTIONS[name][1]
    alone = np.stack([ps.log_prob(x, tokens[:, i], **options) for i in range(4)], axis=-1)
    assert_same_bits(several, alone)
    wide = {key: one for key, one in options.items() if key not in ("top_k", "top_p")}
    left = portable(ps.truncate, x, dtype=None, **options) if len(wide) < len(options) and name != "all" else x
    if name != "all":  # what top_p leaves in float32 and in float64 need not be the same
        expected = portable(ps.log_prob, left, tokens, **wide)
        np.testing.assert_allclose(several, expected, rtol=1e-5, atol=1e-5)
    assert math.isnan(several[7, 2])


@needs_compiler
@pytest.mark.parametrize("rows", [np.s_[:, :300], np.s_[:, ::3]])
def test_the_bits_are_the_same_of_rows_that_no_kernel_takes(device, rows):
    x = logits(np.random.default_rng(5), "float32", (6, N))[rows]
    tokens = np.arange(18).reshape(6, 3)
    several = ps.log_prob(x, tokens)
    assert_same_bits(several[:, 1].copy(), ps.log_prob(x, tokens[:, 1]))


@needs_compiler
def test_several_tokens_keep_the_digits_of_a_confident_row(device):
    x = np.full((2, 300), -1e4, np.float32)
    x[:, 0], x[:, 7] = 0.0, [-40.0, -60.0]
    # -log(1 + exp(-40)) and so on, to more digits than float32 has.
    expected = -np.asarray([4.248354255291589e-18, 8.75651076269652e-27])
    found = ps.log_prob(x, np.asarray([[0, 7]] * 2))
    np.testing.assert_allclose(found[:, 0], expected, rtol=(16 + math.log2(300) + 60) * 2.0**-24)
    np.testing.assert_array_equal(found[:, 1], np.asarray([-40.0, -60.0], np.float32))
    assert formulas(device) == ["cross_entropy"]


@needs_compiler
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_greatest_tokens_of_a_row_and_their_log_probabilities(device, dtype, masked):
    rng = np.random.default_rng(7)
    x = logits(rng, dtype, (9, N), special=True)
    x[8] = np.round(x[8])  # many equal logits
    options = {"where": rng.random(x.shape) < 0.8} if masked else {}
    values, tokens = ps.top_log_probs(x, 20, **options)
    assert formulas(device) == ["sample_leading", "log_prob" if masked else "cross_entropy"]
    expected, order = portable(ps.top_log_probs, x, 20, dtype=None, **options)
    np.testing.assert_array_equal(tokens, order)
    assert tokens.dtype == order.dtype
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)
    assert_same_bits(values, ps.log_prob(x, tokens, **options))


@needs_compiler
def test_more_tokens_than_the_kernel_lists_are_found_by_the_formula(device):
    x = logits(np.random.default_rng(8), "float32", (2, 2000))
    _, tokens = ps.top_log_probs(x, 1500)
    np.testing.assert_array_equal(tokens, np.argsort(-x, axis=-1, kind="stable")[:, :1500])
    assert formulas(device) == ["cross_entropy"]


@needs_compiler
@pytest.mark.parametrize("options", [{}, {"top_k": 5}])
def test_draws_and_their_log_probabilities(device, options):
    x = logits(np.random.default_rng(9), "float32", (3, 400))
    tokens, logprobs = ps.sample(x, 11, draws=4, return_logprobs=True, **options)
    assert formulas(device)[-1] == "cross_entropy"
    expected, _ = portable(ps.sample, x, 11, dtype=None, draws=4, return_logprobs=True, **options)
    np.testing.assert_array_equal(tokens, expected)
    assert_same_bits(logprobs, ps.log_prob(x, tokens, **options))


@needs_compiler
def test_speculation_takes_the_kernels_of_the_draw(device):
    x = logits(np.random.default_rng(10), "float32", (2, 4, 300))
    drafts = portable(ps.sample, x, 5, dtype=None)[:, :3]
    tokens, accepted = ps.speculate(drafts, x, 5)
    expected, count = portable(ps.speculate, drafts, x, 5, dtype=None)
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_array_equal(accepted, count)
    assert {"sample_masses", "sample_draw"} <= set(formulas(device))


def test_what_explain_says_of_log_probabilities(device):
    x = np.zeros((8, N), np.float32)
    assert ps.explain(x, "top_log_probs").engine == "cuda"
    found = ps.explain(x, "log_prob")
    assert found.engine == "cuda"
