"""partial, merge and merge_outputs: what is merged of parts is what the whole row has."""

from __future__ import annotations

import functools
import itertools
import math
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import polysoftmax as ps

if TYPE_CHECKING:
    from polysoftmax.testing import Adapter

INF = math.inf
NOTHING = ps.Partial(-INF, 0.0, 0.0)

HARD = np.asarray(
    [
        [0.0, -40.0, -41.0, -60.0, -39.0, -80.0],  # the digits of what lies far below the maximum
        [3.0, 1.0, 3.0, 3.0, -2.0, 3.0],
        [-INF, -INF, -INF, 2.0, -INF, -INF],
        [1e30, -1e30, 0.0, 1e30, 5.0, -5.0],
        [88.0, 89.0, 90.0, -90.0, 200.0, 1.0],
    ]
)
"""Rows that stand alone in an order that has each maximum in another part."""

CUTS = ((0, 3, 6), (0, 1, 2, 3, 4, 5, 6), (0, 6), (0, 2, 2, 6))


def whole(parts: list[Any]) -> Any:
    return functools.reduce(ps.merge, parts)


def exact_logsumexp(row: Any, t: float = 1.0) -> float:
    """Return log Σ exp(x / T) by mpmath."""
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(60):
        total = mpmath.fsum(mpmath.exp(mpmath.mpf(float(x)) / t) for x in row if x > -INF)
        return float(mpmath.log(total)) if total else -INF


@pytest.mark.parametrize("cuts", CUTS)
def test_merged_parts_are_the_whole(lib: Adapter, cuts: tuple[int, ...]) -> None:
    x = lib.asarray(HARD, "float32")
    expected = np.asarray([exact_logsumexp(row) for row in HARD])[:, None]

    def finish(x: Any) -> tuple[Any, ...]:
        merged = whole([ps.partial(x[:, a:b]) for a, b in itertools.pairwise(cuts)])
        return merged.logsumexp(), merged.softmax(x), merged.log_prob(x), merged.count

    lse, p, log_p, count = lib.call(finish, x)
    lib.require(lse, (5, 1), "float32")
    np.testing.assert_allclose(lib.values(lse), expected, rtol=3e-6)
    assert lib.values(lse)[0, 0] == pytest.approx(expected[0, 0], rel=1e-5)
    with np.errstate(over="ignore"):
        exact = HARD - expected
    exact[3] = [-math.log(2), -INF, -1e30, -math.log(2), -1e30, -1e30]
    exact[3, 1] = -2e30
    np.testing.assert_allclose(lib.values(log_p), exact, rtol=3e-6, atol=1e-6)
    np.testing.assert_allclose(lib.values(p), np.exp(exact), rtol=2e-5, atol=1e-37)
    np.testing.assert_array_equal(lib.values(count), [[1], [4], [1], [2], [1]])


def test_temperature_axis_and_mask(lib: Adapter) -> None:
    rows = np.random.default_rng(0).normal(size=(4, 3, 5)) * 3
    where = np.random.default_rng(1).random((4, 3, 5)) < 0.7
    where[:, 0] = False
    x, mask, t = lib.asarray(rows, "float32"), lib.asarray(where, "bool"), lib.asarray([0.5, 2.0, 0.0], "float32")

    def finish(x: Any, mask: Any, t: Any) -> tuple[Any, ...]:
        parts = [ps.partial(x[a:b, ...], axis=(0, 2), where=mask[a:b, ...], temperature=t) for a, b in ((0, 1), (1, 4))]
        merged = whole(parts)
        return merged.softmax(x, where=mask), merged.log_prob(x, where=mask)

    for found, function in zip(lib.call(finish, x, mask, t), (ps.softmax, ps.log_softmax), strict=True):
        want = function(rows, axis=(0, 2), where=where, temperature=np.asarray([0.5, 2.0, 0.0]))
        np.testing.assert_allclose(lib.values(found), want, rtol=1e-5, atol=1e-6)


def test_rows_without_an_answer(lib: Adapter) -> None:
    """-inf alone is NaN, as in a softmax without a mask; a row without entries is 0; NaN and +inf stay."""
    rows = np.asarray([[-INF, -INF], [-INF, -INF], [math.nan, 1.0], [INF, 1.0]])
    where = np.asarray([[True, True], [False, False], [True, True], [True, True]])
    x, mask = lib.asarray(rows, "float32"), lib.asarray(where, "bool")

    def finish(x: Any, mask: Any) -> tuple[Any, ...]:
        merged = whole([ps.partial(x[:, i : i + 1], where=mask[:, i : i + 1]) for i in (0, 1)])
        return merged.count, merged.logsumexp(), merged.softmax(x, where=mask), merged.log_prob(x, where=mask)

    count, lse, p, log_p = map(lib.values, lib.call(finish, x, mask))
    np.testing.assert_array_equal(count[:, 0], [2, 0, 0, 1])
    np.testing.assert_array_equal(lse[:, 0], [-INF, -INF, math.nan, INF])
    np.testing.assert_array_equal(np.isnan(p), [[True, True], [False, False], [True, True], [True, True]])
    np.testing.assert_array_equal(p[1], [0, 0])
    np.testing.assert_array_equal(log_p[1], [-INF, -INF])


def test_the_identity_changes_nothing(lib: Adapter) -> None:
    x = lib.asarray(HARD, "float32")

    def finish(x: Any) -> tuple[Any, ...]:
        part = ps.partial(x, temperature=0.5)
        empty = ps.partial(x[:, :0], temperature=0.5)
        parts = part, ps.merge(NOTHING, part), ps.merge(part, empty)
        return tuple((one.count, one.rest, one.logsumexp()) for one in parts)

    part, *others = [tuple(map(lib.values, one)) for one in lib.call(finish, x)]
    for other in others:
        for found, want in zip(other, part, strict=True):
            np.testing.assert_array_equal(found, want)


def test_a_part_of_another_dtype_is_float32(lib: Adapter) -> None:
    part = lib.call(lambda x: ps.partial(x)[:3], lib.asarray([[1, 2, 3]], lib.backend.capability.integers[0]))
    for one in part:
        lib.require(one, (1, 1), lib.backend.capability.default_float)


def test_a_row_has_the_same_bits_in_any_batch_and_layout() -> None:
    """As its logsumexp has, from NumPy and PyTorch."""
    if ps.explain(HARD, "softmax").engine != "native":
        pytest.skip("no native kernels")
    for n in (5, 33, 300, 5000):
        x = np.random.default_rng(n).normal(size=(40, n)).astype(np.float32)
        want = ps.partial(x)[:3]
        for i in (0, 17):
            ways = ps.partial(x[i]), ps.partial(np.asfortranarray(x)[i : i + 2]), ps.partial(x.T[:, i : i + 1], axis=0)
            for found in ways:
                assert [one.reshape(-1)[0] for one in found[:3]] == [one[i, 0] for one in want]
        if torch := sys.modules.get("torch"):
            for tensor, other in zip(ps.partial(torch.asarray(x))[:3], want, strict=True):
                np.testing.assert_array_equal(tensor.numpy(), other)


def test_errors() -> None:
    x, y = np.asarray([[1.0, 2.0]]), np.asarray([[1.0, 2.0], [3.0, 4.0]])
    with pytest.raises(TypeError, match=r"merge takes two of polysoftmax.Partial, got ndarray"):
        ps.merge(x, ps.partial(x))
    with pytest.raises(TypeError, match="both parts hold numbers"):
        ps.merge(NOTHING, NOTHING)
    with pytest.raises(ValueError, match=r"under two temperatures, 1.0 and 2.0"):
        ps.merge(ps.partial(x), ps.partial(x, temperature=2.0))
    with pytest.raises(ValueError, match=r"shape \(2, 1\)"):
        ps.merge(ps.partial(x), ps.partial(y))
    with pytest.raises(ValueError, match=r"maximum has shape \(2, 1\), which does not broadcast against \(3, 4\)"):
        ps.partial(y).softmax(np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"needs a logsumexp of shape \(2,\), got \(1,\)"):
        ps.merge_outputs((np.zeros(1), y), (np.zeros(1), y))


# Derivatives: of first and second order, those of the whole


def halves(function: Any, t: Any) -> Any:
    def of_parts(x: Any) -> Any:
        return function(ps.merge(ps.partial(x[:, :2], temperature=t), ps.partial(x[:, 2:], temperature=t)), x)

    return of_parts


SMOOTH = np.asarray([[0.3, -1.0, 2.0, 0.5], [2.0, 2.0, -INF, 2.0], [-1e30, 0.0, 1.0, 3.0]])


def test_gradients_with_jax() -> None:
    jax = pytest.importorskip("jax")
    x, weights = jax.numpy.asarray(SMOOTH), np.arange(12.0, dtype=np.float32).reshape(3, 4)
    for ours, peer in (
        (lambda part, x: part.softmax(x), lambda x: ps.softmax(x, temperature=0.5)),
        (lambda part, x: 0 * x + part.logsumexp(), lambda x: 0 * x + ps.logsumexp(2 * x, keepdims=True)),
    ):
        mine = jax.jit(lambda x, ours=ours: (weights * jax.numpy.nan_to_num(halves(ours, 0.5)(x))).sum())
        want = jax.jit(lambda x, peer=peer: (weights * jax.numpy.nan_to_num(peer(x))).sum())
        np.testing.assert_allclose(jax.grad(mine)(x), jax.grad(want)(x), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(jax.hessian(mine)(x), jax.hessian(want)(x), rtol=1e-4, atol=1e-4)


def test_a_part_is_carried_through_a_scan_of_jax() -> None:
    jax = pytest.importorskip("jax")
    chunks = jax.numpy.asarray(np.random.default_rng(0).normal(size=(6, 3, 5)), "float32")

    def step(carried: Any, chunk: Any) -> Any:
        return ps.merge(carried, ps.partial(chunk)), None

    merged, _ = jax.jit(lambda chunks: jax.lax.scan(step, ps.partial(chunks[0]), chunks[1:]))(chunks)
    want = ps.logsumexp(np.asarray(chunks), axis=(0, 2))
    np.testing.assert_allclose(merged.logsumexp()[:, 0], want, rtol=1e-6)


def test_gradients_with_torch() -> None:
    torch = pytest.importorskip("torch")
    x = torch.tensor(SMOOTH[[0, 2]], requires_grad=True)
    t = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    weights = torch.arange(8.0, dtype=torch.float64).reshape(2, 4)

    def mine(x: Any, t: Any) -> Any:
        return (weights * halves(lambda part, x: part.softmax(x), t)(x)).sum()

    def want(x: Any, t: Any) -> Any:
        return (weights * ps.softmax(x, temperature=t)).sum()

    for found, expected in zip(
        torch.autograd.grad(mine(x, t), (x, t)), torch.autograd.grad(want(x, t), (x, t)), strict=True
    ):
        torch.testing.assert_close(found, expected)
    small = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(mine, (small, t))
    assert torch.autograd.gradgradcheck(mine, (small, t))


# Attention over parts of the keys


def attend(q: Any, k: Any, v: Any, where: Any) -> tuple[Any, Any]:
    scores = q @ np.swapaxes(k, -1, -2) / math.sqrt(q.shape[-1])
    return ps.logsumexp(scores, where=where), ps.softmax(scores, where=where) @ v


def test_outputs_of_parts_are_the_output_of_the_whole(lib: Adapter) -> None:
    source = np.random.default_rng(0)
    q, k, v = (source.normal(size=(2, 7, 4)) for _ in range(3))
    causal = np.tril(np.ones((7, 7), bool))
    lse, out = attend(q, k, v, causal)
    parts = [attend(q, k[:, a:b], v[:, a:b], causal[:, a:b]) for a, b in ((0, 3), (3, 5), (5, 7))]
    parts[1] = (parts[1][0], np.where(np.isinf(parts[1][0])[..., None], math.nan, parts[1][1]))  # 0/0 does not leak
    given = [lib.asarray(one, "float32") for part in parts for one in part]

    def finish(*given: Any) -> Any:
        pairs = list(zip(given[::2], given[1::2], strict=True))
        return functools.reduce(ps.merge_outputs, pairs)

    found = lib.call(finish, *given)
    lib.require(found[0], (2, 7), "float32")
    np.testing.assert_allclose(lib.values(found[0]), lse, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lib.values(found[1]), out, rtol=1e-5, atol=1e-6)


def test_a_sink_takes_its_share_and_has_no_value() -> None:
    lse, out = ps.merge_outputs((np.log(np.asarray(3.0)), np.asarray([1.0, 2.0])), (np.asarray(0.0), np.zeros(2)))
    assert float(lse) == pytest.approx(math.log(4))
    np.testing.assert_allclose(out, [0.75, 1.5])
    nothing = ps.merge_outputs((np.asarray(-INF), np.asarray([math.nan])), (np.asarray(-INF), np.asarray([1.0])))
    assert float(nothing[0]) == -INF
    assert nothing[1].tolist() == [0.0]


def test_gradients_of_merged_outputs() -> None:
    torch = pytest.importorskip("torch")
    source = torch.Generator().manual_seed(0)
    given = [torch.randn(2, 3, *more, dtype=torch.float64, generator=source) for more in ((), (4,), (), (4,))]
    given[2][0] = given[0][0]
    given = [one.requires_grad_() for one in given]
    assert torch.autograd.gradcheck(lambda a, x, b, y: ps.merge_outputs((a, x), (b, y)), given)
    assert torch.autograd.gradgradcheck(lambda a, x, b, y: ps.merge_outputs((a, x), (b, y)), given)
    lse = torch.tensor([-INF, 0.0], dtype=torch.float64, requires_grad=True)
    out = torch.tensor([[math.nan], [1.0]], dtype=torch.float64)
    merged = ps.merge_outputs((lse, out), (torch.zeros(2, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)))
    assert torch.autograd.grad(merged[0].sum() + merged[1].sum(), lse)[0].tolist() == [0.0, 0.5]
