"""Rows in chunks: one pass answers what the whole rows have, and draws the same tokens."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from typing import TYPE_CHECKING, Any

import mpmath
import numpy as np
import pytest

import polysoftmax as ps
from polysoftmax import streaming
from polysoftmax.testing import FORMATS

if TYPE_CHECKING:
    from pathlib import Path

    from polysoftmax.testing import Adapter

INF = math.inf
N = 700
CUTS = (0, 175, 350, 525, N)
"""Chunks of one length, so that JAX compiles once; the blocks of a draw, of 32 tokens, are cut in their midst."""

X = np.random.default_rng(0).normal(size=(5, N), scale=3.0)
X[1, ::3] = -INF
X[2] = np.round(X[2])
X[3, 600] = 50.0
X[4] = -INF
TEMPERATURES = np.asarray([0.5, 2.0, 0.0, 1.0, 1.0])
TOKENS = np.asarray([0, 699, 3, 600, 2])


def cut(x: Any) -> list[Any]:
    return [x[..., a:b] for a, b in itertools.pairwise(CUTS)]


def exact(row: Any, token: int, t: float) -> tuple[float, float]:
    """log Σ exp(x / T) and the log-probability of a token, by mpmath."""
    with mpmath.workdps(40):
        total = mpmath.log(mpmath.fsum(mpmath.exp(mpmath.mpf(x) / t) for x in row if x > -INF))
        return float(total), float(row[token] / mpmath.mpf(t) - total)


@pytest.mark.enough(lambda can: not can.traced)
def test_values(lib: Adapter) -> None:
    x = np.float32(X[[0, 1, 3]])
    t, tokens = TEMPERATURES[[0, 1, 3]], TOKENS[[0, 1, 3]]
    want = np.asarray([exact(row.tolist(), token, heat) for row, token, heat in zip(x, tokens, t, strict=True)])
    heats, indices = lib.asarray(t, "float32"), lib.asarray(tokens, lib.can.default_index)

    def call(x: Any) -> tuple[Any, ...]:
        return (
            streaming.logsumexp(cut(x), temperature=heats),
            streaming.log_prob(cut(x), indices, temperature=heats),
            streaming.cross_entropy(cut(x), indices, z_loss=0.25, reduction="none"),
            streaming.cross_entropy(cut(x), indices, ignore_index=699),
        )

    lse, log_p, losses, mean = lib.call(call, lib.asarray(x, "float32"))
    lib.require(lse, (3,), "float32")
    unit = 64 * FORMATS["float32"].compute.unit
    np.testing.assert_allclose(lib.values(lse), want[:, 0], rtol=unit)
    np.testing.assert_allclose(lib.values(log_p), want[:, 1], rtol=unit, atol=unit)
    plain = np.asarray([exact(row.tolist(), token, 1.0) for row, token in zip(x, tokens, strict=True)])
    np.testing.assert_allclose(lib.values(losses), 0.25 * plain[:, 0] ** 2 - plain[:, 1], rtol=unit)
    np.testing.assert_allclose(lib.values(mean), -plain[[0, 2], 1].mean(), rtol=unit)


@pytest.mark.enough(lambda can: not can.traced)
@pytest.mark.parametrize("t", [1.0, 0.0, INF, TEMPERATURES], ids=["1", "0", "inf", "each"])
def test_the_token_is_that_of_the_unchunked_draw(lib: Adapter, t: Any) -> None:
    x = np.float32(X)
    want, log_p = ps.sample(x, 7, temperature=t, return_logprobs=True)
    heat = lib.asarray(t, "float32") if isinstance(t, np.ndarray) else t

    def call(x: Any) -> Any:
        return streaming.sample(cut(x), 7, N, temperature=heat, return_logprobs=True)

    tokens, found = lib.call(call, lib.asarray(x, "float32"))
    assert lib.values(tokens).tolist() == want.tolist()
    np.testing.assert_allclose(lib.values(found), log_p, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 5, 256, 257, 1000, 70_000])
def test_any_length_and_any_cut(n: int) -> None:
    generator = np.random.default_rng(n)
    x = generator.normal(size=(2, 3, n)).astype(np.float32)
    keys = ps.random.split(n, 6).reshape(2, 3, 2)
    want = ps.sample(x, keys)
    for _ in range(5):
        cuts = np.sort(generator.integers(0, n + 1, 4))
        assert (streaming.sample(np.split(x, cuts, axis=-1), keys, n) == want).all()
        moved = np.split(np.moveaxis(x, -1, 0), cuts)
        assert (streaming.sample((one for one in moved), keys, n, axis=0) == want).all()


def test_bad_rows_have_no_token() -> None:
    x = np.zeros((4, N), np.float32)
    x[0, 5], x[1, 650], x[2] = np.nan, INF, -INF
    tokens, log_p = streaming.sample(cut(x), 0, N, return_logprobs=True)
    assert (tokens >= 0).tolist() == np.isfinite(log_p).tolist() == [False, False, False, True]
    assert np.isnan(streaming.log_prob(cut(x), np.asarray([0, 0, 0, N]))).all()
    assert np.isnan(streaming.log_prob(cut(x), np.asarray([0, 0, 0, -1]))[3])


def test_derivatives_are_those_of_the_whole() -> None:
    torch = pytest.importorskip("torch")
    x = torch.tensor(X[:2, :12], requires_grad=True)
    targets = torch.tensor([0, 11])
    streaming.cross_entropy(x.split(5, dim=-1), targets).backward()
    with mpmath.workdps(40):
        for row, gradient, target in zip(X[:2, :12], x.grad.numpy(), targets.tolist(), strict=True):
            terms = [mpmath.exp(one) if one > -INF else 0 for one in row]
            want = [(float(one / mpmath.fsum(terms)) - (i == target)) / 2 for i, one in enumerate(terms)]
            np.testing.assert_allclose(gradient, want, atol=1e-15)


@pytest.mark.parametrize("memory", [1, 4 * 64, 4 * 2500, 1 << 20])
@pytest.mark.parametrize("shape", [(1000,), (5, 1000), (2, 3, 500), (0, 7), (3, 0)])
def test_softmax_from_a_file_to_a_file(tmp_path: Path, shape: tuple[int, ...], memory: int) -> None:
    if math.prod(shape):
        x = np.memmap(tmp_path / "x", np.float32, "w+", shape=shape)
        y = np.memmap(tmp_path / "y", np.float32, "w+", shape=shape)
    else:
        x = y = np.zeros(shape, np.float32)
    x[...] = np.random.default_rng(0).normal(size=shape)
    want = ps.softmax(np.asarray(x), temperature=0.7)
    if memory == 1 and x.size > 1000:
        pytest.skip("one entry at a time is shown by fewer")
    assert streaming.softmax(x, y, temperature=0.7, memory=memory) is y
    np.testing.assert_allclose(y, want, rtol=1e-6)
    streaming.softmax(x, x, temperature=0.7, memory=memory)  # in its own place
    np.testing.assert_array_equal(x, y)


def test_softmax_holds_no_more_than_it_may(tmp_path: Path) -> None:
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=(200, 10_000))
    y = np.memmap(tmp_path / "y", np.float32, "w+", shape=(200, 10_000))
    for memory in (1 << 14, 1 << 18):
        streaming.softmax(x, y, memory=memory)
        tracemalloc.start()
        streaming.softmax(x, y, memory=memory)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 * memory + 100_000


def test_a_bar_is_shown_where_asked(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    want = streaming.logsumexp(cut(X))
    assert capsys.readouterr().out == ""
    np.testing.assert_array_equal(streaming.logsumexp(cut(X), progress=True), want)
    assert "logsumexp" in capsys.readouterr().out


def test_a_bar_needs_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rich.progress", None)
    with pytest.raises(ImportError, match="needs rich"):
        streaming.logsumexp(cut(X), progress=True)


def test_errors() -> None:
    for call in (
        lambda: streaming.logsumexp([]),
        lambda: streaming.log_prob([], TOKENS),
        lambda: streaming.sample([], 0, N),
    ):
        with pytest.raises(ValueError, match="there is no chunk"):
            call()
    with pytest.raises(ValueError, match="have 700 tokens, and not n=701"):
        streaming.sample(cut(X), 0, 701)
    with pytest.raises(ValueError, match="n, the number of tokens of all chunks, must be 1 or greater, got 0"):
        streaming.sample(cut(X), 0, 0)
    with pytest.raises(ValueError, match=r"chunks differ in shape beside the axis: \(4,\) after \(5,\)"):
        streaming.sample([X, X[:4]], 0, 2 * N)
    with pytest.raises(ValueError, match=r"keys of shape \(3, 2\) do not match rows of shape \(5,\)"):
        streaming.sample(cut(X), ps.random.split(0, 3), N)
    with pytest.raises(TypeError, match="must be integers, got dtype float64"):
        streaming.log_prob(cut(X), np.zeros(5))
    with pytest.raises(ValueError, match=r"has the shape of a chunk without its axis, \(5,\), got \(4,\)"):
        streaming.log_prob(cut(X), TOKENS[:4])
    with pytest.raises(ValueError, match='reduction must be "none", "sum" or "mean"'):
        streaming.cross_entropy(cut(X), TOKENS, reduction="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="z_loss must be a number, 0 or greater, got -1"):
        streaming.cross_entropy(cut(X), TOKENS, z_loss=-1)
    with pytest.raises(ValueError, match=r"out must have the shape of x, .* got \(5,\)"):
        streaming.softmax(X, np.empty(5))
    with pytest.raises(ValueError, match="memory must be 1 byte or more, got 0"):
        streaming.softmax(X, X, memory=0)
