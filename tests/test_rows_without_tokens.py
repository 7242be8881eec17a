"""A row that answers -1 moves nothing: a loss that leaves it out has a gradient of 0 there, and no NaN."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import polysoftmax

if TYPE_CHECKING:
    from collections.abc import Callable

INF, NAN = math.inf, math.nan

N = 9
ROWS = np.random.default_rng(5).normal(size=(7, N)).astype(np.float32)
"""The first two have tokens; the last is masked."""
ROWS[1, ::2] = -INF
ROWS[2] = -INF
ROWS[3, 4] = NAN
ROWS[4, 4] = INF
ROWS[5] = INF
GOOD = 2
WHERE = np.ones(ROWS.shape, bool)
WHERE[6] = False
T = np.full(7, 0.75, np.float32)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "few": {"top_k": 2},
    "many": {"top_k": 5},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.1},
    "all of few": {"top_k": 2, "top_p": 0.99, "min_p": 0.01},
    "all of many": {"top_k": 5, "top_p": 0.99, "min_p": 0.01},
}


def by_torch(loss: Callable[[Any, Any], Any], x: np.ndarray, t: np.ndarray) -> tuple[Any, ...]:
    torch = pytest.importorskip("torch")
    leaves = [torch.tensor(one, requires_grad=True) for one in (x, t)]
    return tuple(one.numpy() for one in torch.autograd.grad(loss(*leaves), leaves))


def by_torch_func(loss: Callable[[Any, Any], Any], x: np.ndarray, t: np.ndarray) -> tuple[Any, ...]:
    torch = pytest.importorskip("torch")
    found = torch.func.grad(loss, argnums=(0, 1))(torch.asarray(x), torch.asarray(t))
    return tuple(one.numpy() for one in found)


def by_torch_compile(loss: Callable[[Any, Any], Any], x: np.ndarray, t: np.ndarray) -> tuple[Any, ...]:
    torch = pytest.importorskip("torch")
    return by_torch(torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False), x, t)


def by_jax(loss: Callable[[Any, Any], Any], x: np.ndarray, t: np.ndarray) -> tuple[Any, ...]:
    jax = pytest.importorskip("jax")
    return tuple(map(np.asarray, jax.grad(loss, argnums=(0, 1))(jax.numpy.asarray(x), jax.numpy.asarray(t))))


def by_jit(loss: Callable[[Any, Any], Any], x: np.ndarray, t: np.ndarray) -> tuple[Any, ...]:
    jax = pytest.importorskip("jax")
    return by_jax(jax.jit(loss), x, t)


def by_work_before(loss: Callable[[Any, Any], Any], x: np.ndarray, t: np.ndarray) -> tuple[Any, ...]:
    """Compute the logits in the same program."""
    gx, gt = by_jit(lambda x, t: loss(x * np.float32(2.0), t), x / 2, t)
    return gx / 2, gt


WAYS = {one.__name__: one for one in (by_torch, by_torch_func, by_torch_compile, by_jax, by_jit, by_work_before)}


def masked_loss(where: Any = None, **options: Any) -> Callable[[Any, Any], Any]:
    """Return the sum of the log-probabilities of what was drawn, as a function of logits and temperature."""

    def loss(x: Any, t: Any) -> Any:
        token, logprob = polysoftmax.sample(x, 7, temperature=t, where=where, return_logprobs=True, **options)
        xp = polysoftmax._arrays.namespace(x)
        return xp.sum(xp.where(token >= 0, logprob, 0.0))

    return loss


def expected(x: np.ndarray, t: np.ndarray, options: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return (1 at the token - p) / T, and -(x_token - Σ p·x) / T², of what the filters leave."""
    token = polysoftmax.sample(x, 7, temperature=t, **options)
    left = polysoftmax.truncate(x, temperature=t, **options).astype(np.float64)
    p = np.exp((left - left.max(axis=1, keepdims=True)) / t[:, None])
    p /= p.sum(axis=1, keepdims=True)
    mean = (p * np.where(p > 0, x, 0.0)).sum(axis=1)
    drawn = np.eye(x.shape[1])[token]
    return (drawn - p) / t[:, None], (mean - x[np.arange(len(x)), token]) / t**2


WORTH = {"by_torch_compile": ("all of few",), "by_jax": ("plain",), "by_work_before": ("all of few",)}
WORTH["by_jit"] = ("plain", "all of few", "all of many")
"""The options that are enough where each is a compilation of many seconds."""

CASES = [
    (way, engine, name)
    for way in WAYS
    for engine in (("auto", "portable") if way in ("by_torch", "by_torch_func") else ("auto",))
    for name in WORTH.get(way, OPTIONS)
]


@pytest.mark.parametrize(("way", "engine", "name"), CASES)
def test_nothing_moves_in_a_row_without_a_token(way: str, engine: str, name: str) -> None:
    options = OPTIONS[name]
    xp = pytest.importorskip("torch" if "torch" in way else "jax.numpy")
    with polysoftmax.engine(engine):
        gx, gt = WAYS[way](masked_loss(xp.asarray(WHERE), **options), ROWS, T)
    wanted_x, wanted_t = expected(ROWS[:GOOD], T[:GOOD], options)
    np.testing.assert_allclose(gx[:GOOD], wanted_x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gt[:GOOD], wanted_t, rtol=1e-4, atol=1e-5)
    assert (gx[GOOD:] == 0).all()
    assert (gt[GOOD:] == 0).all()


BAD = {"temperature": [NAN, -1.0], "top_k": [NAN, -1.0], "top_p": [1.5, NAN], "min_p": [-0.1, NAN]}


RUNS = [("by_torch", "auto"), ("by_torch", "portable"), ("by_torch_func", "auto"), ("by_jit", "auto")]


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize(("way", "engine"), RUNS[:-1])
def test_nothing_moves_in_a_row_with_a_bad_parameter(way: str, engine: str, name: str, few: bool) -> None:
    if few and name == "top_k":
        pytest.skip("a number and an array at once")
    x = np.stack([ROWS[0]] * 3)
    xp = pytest.importorskip("torch" if "torch" in way else "jax.numpy")
    values = np.asarray([*BAD[name], 1.0], np.float32)
    options: dict[str, Any] = {"top_k": 2} if few else {}
    t = np.full(3, 0.75, np.float32)
    if name == "temperature":
        t = values
    else:
        options[name] = xp.asarray(values)
    with polysoftmax.engine(engine):
        gx, gt = WAYS[way](masked_loss(**options), x, t)
    assert (gx[:2] == 0).all()
    assert (gt[:2] == 0).all()
    assert np.isfinite(gx[2]).all()
    assert np.isfinite(gt[2])


@pytest.mark.parametrize("few", [False, True])
def test_nothing_moves_in_a_row_with_one_bad_parameter_among_four_on_jax(few: bool) -> None:
    """Each parameter is bad in two rows of its own, in which the others are good: one program."""
    jnp = pytest.importorskip("jax.numpy")
    values = {name: np.ones(9, np.float32) for name in BAD}
    for i, (name, bad) in enumerate(BAD.items()):
        values[name][2 * i : 2 * i + 2] = bad
    t = values.pop("temperature")
    options: dict[str, Any] = {name: jnp.asarray(value) for name, value in values.items()}
    if few:  # a number in place of the array, which is good everywhere
        options["top_k"] = 2
    gx, gt = by_jit(masked_loss(**options), np.stack([ROWS[0]] * 9), t)
    wrong = np.arange(9) < 8 if not few else np.isin(np.arange(9), (0, 1, 4, 5, 6, 7))
    assert (gx[wrong] == 0).all()
    assert (gt[wrong] == 0).all()
    assert np.isfinite(gx[~wrong]).all()
    assert np.isfinite(gt[~wrong]).all()


@pytest.mark.parametrize("first", [0.0, INF])
@pytest.mark.parametrize(("way", "engine"), RUNS)
def test_at_the_limits_of_temperature_nothing_moves_at_all(way: str, engine: str, first: float) -> None:
    if way == "by_jit" and first:
        pytest.skip("the rows change places, in a program of five seconds")
    t = np.resize(np.float32([first, INF if first == 0 else 0]), 7)
    with polysoftmax.engine(engine):
        gx, gt = WAYS[way](masked_loss(), ROWS, t)
    assert (gx == 0).all()
    assert (gt == 0).all()
