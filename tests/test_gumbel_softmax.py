"""gumbel_softmax: the noise of the draw, with its law, and a gradient where a token has none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from scipy import stats

import polysoftmax as ps
from polysoftmax import random
from polysoftmax.engines import portable
from polysoftmax.testing import rounded

if TYPE_CHECKING:
    from polysoftmax.testing import Adapter

here = pytest.mark.backends(lambda can: not can.lazy)


def logits(*shape: int) -> np.ndarray:
    return (2 * np.random.default_rng(0).standard_normal(shape)).astype(np.float32)


@here
def test_the_greatest_entry_is_the_token_that_is_drawn(lib: Adapter) -> None:
    if lib.backend.library == "jax" and portable():
        pytest.skip("too slow")
    for n in (300,) if lib.can.compiles else (37, 3, 300):
        rows = logits(20, n)
        where = np.random.default_rng(1).random((20, n)) < 0.8
        where[:, 0] = True
        x, mask = lib.asarray(rows, "float32"), lib.asarray(where, "bool")
        token = ps.sample(rows, 5, where=where)
        y = lib.call(ps.gumbel_softmax, x, 5, 0.5, where=mask)
        lib.require(y, (20, n), "float32")
        assert (lib.values(y).argmax(-1) == token).all()
        assert not lib.values(y)[~where].any()
        np.testing.assert_allclose(lib.values(y).sum(-1), 1, rtol=1e-5)
        hard = lib.values(lib.call(ps.gumbel_softmax, x, 5, 0.5, where=mask, hard=True))
        np.testing.assert_array_equal(hard, np.eye(n)[token])


@here
def test_in_16_bits_the_noise_is_added_to_the_logits_that_it_is_for(lib: Adapter) -> None:
    """A compiler that leaves out the rounding of a product in front of the call must do so for both, or neither."""
    if "bfloat16" not in lib.can.dtypes or (lib.backend.library == "jax" and portable()):
        pytest.skip("no bfloat16, or too slow")
    rows, keys = logits(6, 37), random.split(3, 6)
    y = lib.call(ps.gumbel_softmax, lib.asarray(rows, "bfloat16"), lib.asarray(keys, "int32"), 0.5)
    want = ps.gumbel_softmax(rounded(rows, "bfloat16"), keys, 0.5)
    np.testing.assert_allclose(lib.values(y), want, rtol=2.0**-8, atol=1e-30)


def test_the_noise_has_its_law() -> None:
    """log y = (x + g) / T - c, so differences of two variates within a row are logistic."""
    n, many = 37, 20_000
    rows = np.broadcast_to(logits(n), (many, n))
    y = ps.gumbel_softmax(rows, 3).astype(np.float64)
    noise = np.log(y) - rows
    for i, j in ((0, 1), (3, 30), (36, 8)):
        assert stats.kstest(noise[:, i] - noise[:, j], "logistic").pvalue > 1e-4
    shares = np.bincount(y.argmax(-1), minlength=n)
    expected = ps.softmax(rows[0].astype(np.float64)) * many
    often = expected > 5
    scale = shares[often].sum() / expected[often].sum()
    assert stats.chisquare(shares[often], expected[often] * scale).pvalue > 1e-4


def test_gradients_with_torch() -> None:
    torch = pytest.importorskip("torch")
    x = torch.tensor(logits(3, 5), dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    noise = (torch.log(ps.gumbel_softmax(x, 7)) - x).detach()  # up to a number in each row
    weights = torch.arange(15.0, dtype=torch.float64).reshape(3, 5)
    soft = torch.autograd.grad((weights * ps.gumbel_softmax(x, 7, t)).sum(), (x, t))
    expected = torch.autograd.grad((weights * torch.softmax((x + noise) / t[:, None], -1)).sum(), (x, t))
    torch.testing.assert_close(soft, expected)
    hard = torch.autograd.grad((weights * ps.gumbel_softmax(x, 7, t, hard=True)).sum(), (x, t))
    func = torch.func.grad(lambda x, t: (weights * ps.gumbel_softmax(x, 7, t, hard=True)).sum(), (0, 1))(x, t)
    for one, other, third in zip(soft, hard, func, strict=True):
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(one, third)


def test_gradients_with_jax() -> None:
    jax = pytest.importorskip("jax")
    x, weights = jax.numpy.asarray(logits(3, 5)), np.arange(15.0, dtype=np.float32).reshape(3, 5)

    def loss(x: object, hard: bool) -> object:
        return (weights * ps.gumbel_softmax(x, 7, 0.5, hard=hard)).sum()

    slope = jax.jit(jax.grad(loss), static_argnums=1)
    soft, hard = slope(x, False), slope(x, True)
    np.testing.assert_allclose(soft, hard, rtol=1e-5, atol=1e-5)
    forward = jax.jit(lambda x: jax.jvp(lambda x: loss(x, True), (x,), (x,))[1])(x)
    np.testing.assert_allclose(forward, (soft * x).sum(), rtol=1e-4)


def test_rows_without_a_token_and_bad_input() -> None:
    x = np.asarray([[np.nan, 1, 2], [-np.inf] * 3, [1, np.inf, 0]])
    for hard in (False, True):
        assert np.isnan(ps.gumbel_softmax(x, 3, hard=hard)).all()
        assert not ps.gumbel_softmax(x, 3, hard=hard, where=np.zeros(3, bool)).any()
    with pytest.raises(ValueError, match="keys must be one, of shape"):
        ps.gumbel_softmax(np.zeros((3, 4)), random.split(1, 2))
    with pytest.raises(ValueError, match="at least one token"):
        ps.gumbel_softmax(np.zeros((3, 0)), 3)
