"""Where the mass of a prefix lies within rounding of p: one decision, for a draw and for what is left of the row."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import polysoftmax
from polysoftmax import random
from polysoftmax.engines import portable

if TYPE_CHECKING:
    from polysoftmax.testing import Adapter

ROWS = 24
P, MIN_P = 0.9, 0.03

# Dask cannot sort, the standard's arrays are NumPy's, and what PyTorch records has a test of its own.
eager = pytest.mark.backends(lambda can: can.how in ("eager", "eager, on CUDA"))


def rows_at_the_edge(n: int, dtype: str, *, top_k: int = 0, by: str = "top_p", temperature: float = 1.0) -> np.ndarray:
    """Return rows in which the mass of a prefix, or of one token, is P or MIN_P up to the rounding of the logits.

    A few tokens of each row move for that: all those behind the prefix, which stay behind it, or the one token.
    """
    real, seed = np.dtype(dtype), [n, top_k, len(by), round(10 * temperature)]
    x = (3 * np.random.default_rng(seed).standard_normal((ROWS, n))).astype(real)
    x[::4] = np.round(2 * x[::4]) / 2  # ties
    temperature = float(real.type(temperature))
    for row in x:
        order = np.argsort(-row, kind="stable")
        order, removed = order[: top_k or n], order[top_k or n :]
        mass = np.exp((row[order].astype(float) - row[order[0]]) / temperature)
        if by == "min_p":
            at = min(int((mass >= MIN_P).sum()), len(order) - 1)
            row[order[at]] = row[order[0]] + temperature * math.log(float(real.type(MIN_P)))
            row[order[at + 1 :]] -= 1
        else:
            p = float(real.type(P))
            at = max(int((np.cumsum(mass) < p * mass.sum()).sum()), 1)
            shift = math.log(mass[:at].sum() * (1 - p) / (p * mass[at:].sum()))
            row[order[at:]] += real.type(temperature * shift)
        row[removed] -= 9  # they stay removed
    return x


def numbers_near(value: float, dtype: str) -> list[float]:
    """Return a number as it is given and as the dtype holds it, and the dtype's numbers 1 and 32 steps away from it."""
    held = np.dtype(dtype).type(value)
    return [value, *(float(held + steps * np.spacing(held)) for steps in (0, -32, -1, 1, 32))]


def forms(lib: Adapter, value: float, dtype: str) -> list[Any]:
    """Return a number as such, as a 0-d array, and as an array with one entry a row."""
    return [value, lib.asarray(value, dtype), lib.asarray(np.full(ROWS, value), dtype)]


# The top_k that leaves a few tokens, which are looked at alone, and the one that leaves more.
KEPT = {"all": lambda n: 0, "few": lambda n: math.isqrt(n // 2), "many": lambda n: n // 2}


@eager
@pytest.mark.parametrize("by", ["top_p", "min_p"])
@pytest.mark.parametrize("kept", KEPT)
# Fewer than the 1000 entries from which kernels draw, and more.
@pytest.mark.parametrize(("n", "temperature"), [(40, 0.7), (300, 1.0)])
def test_a_draw_ends_where_the_row_does(lib: Adapter, n: int, kept: str, by: str, temperature: float) -> None:
    if lib.can.compiles and (portable() or temperature != 1.0 or by == "min_p" or kept != "all"):
        pytest.skip("a compilation for each form of each number; the next test has few")
    for dtype in ("float32", "float64"):  # 16 bits are widened first
        if dtype in lib.can.dtypes:
            check_ends(lib, dtype, n, kept, by, temperature)


def check_ends(lib: Adapter, dtype: str, n: int, kept: str, by: str, temperature: float) -> None:
    top_k = KEPT[kept](n)
    x = rows_at_the_edge(n, dtype, top_k=top_k, by=by, temperature=temperature)
    rows, keys = lib.asarray(x, dtype), lib.asarray(random.split(n, ROWS), "int32")
    counts = []
    for number in numbers_near(P if by == "top_p" else MIN_P, dtype):
        answers = []
        # A number is a constant of a program: each would be compiled.
        for form in lib.some(forms(lib, number, dtype))[1 if lib.can.compiles and len(counts) > 0 else 0 :]:
            options = {by: form, "temperature": temperature} | ({"top_k": top_k} if top_k else {})
            left = lib.call(polysoftmax.truncate, rows, **options)
            drawn = lib.call(polysoftmax.sample, rows, keys, return_logprobs=True, **options)
            alone = lib.call(polysoftmax.sample, rows, keys, **options)
            after = lib.call(polysoftmax.sample, left, keys, temperature=temperature, return_logprobs=True)
            token, logprob, token_after, logprob_after = map(lib.values, (*drawn, *after))
            np.testing.assert_array_equal(token, lib.values(alone))
            np.testing.assert_array_equal(token, token_after)
            # Where the row is what is drawn from, the same code runs, at one place in each block of the row. Elsewhere
            # the masses of what is left are added in another order: two sums, each within (16 + log2 n) roundings.
            is_same = portable() and lib.backend.library != "jax" and kept != "few"
            bound = 0 if is_same else 2 * (16 + math.log2(n)) * np.finfo(dtype).eps / 2
            np.testing.assert_allclose(logprob_after, logprob, rtol=0, atol=bound)
            answers.append((lib.values(left), token, logprob))
        for answer in answers[1:]:
            for one, expected in zip(answer, answers[0], strict=True):
                np.testing.assert_array_equal(one, expected)
        counts.append((answers[0][0] > -math.inf).sum(axis=-1))
    given, held, *around = counts
    np.testing.assert_array_equal(given, held)
    larger_first = around[::-1] if by == "top_p" else around
    assert all((more >= less).all() for more, less in itertools.pairwise(larger_first))
    assert (larger_first[0] > larger_first[-1]).sum() > ROWS / 4, "the rows are not at the edge"


@pytest.mark.backends(lambda can: can.traced and "func" not in can.how)
@pytest.mark.parametrize("options", [{"top_p": P}, {"top_k": 12, "top_p": P}], ids=str)
def test_a_compiled_draw_ends_where_the_row_does(lib: Adapter, options: dict[str, Any]) -> None:
    rows = lib.asarray(rows_at_the_edge(300, "float32", top_k=options.get("top_k", 0)), "float32")
    keys = lib.asarray(random.split(3, ROWS), "int32")
    tokens = lib.values(lib.call(polysoftmax.sample, rows, keys, **options))
    top_p = forms(lib, P, "float32")["top_k" in options]  # a number, an array
    left = lib.call(polysoftmax.truncate, rows, **{**options, "top_p": top_p})
    np.testing.assert_array_equal(lib.values(lib.call(polysoftmax.sample, left, keys)), tokens)


def test_several_keys_of_a_row_draw_from_one_decision() -> None:
    """In every library, for the few that top_k leaves and for the row."""
    keys = random.split(5, 7 * ROWS).reshape(7, ROWS, 2)
    for top_k in (0, 12):
        x = rows_at_the_edge(300, "float32", top_k=top_k)
        for name in ("numpy", "jax.numpy", "torch"):
            rows = pytest.importorskip(name).asarray(x)
            for engine in ("auto", "portable"):
                if name == "jax.numpy" and engine == "portable":
                    continue  # too slow
                with polysoftmax.engine(engine):
                    left = polysoftmax.truncate(rows, top_k=top_k, top_p=P)
                    several = polysoftmax.sample(rows, keys, top_k=top_k, top_p=P)
                    np.testing.assert_array_equal(np.asarray(several), np.asarray(polysoftmax.sample(left, keys)))


@pytest.mark.parametrize("top_k", [0, 12])
def test_gradients_do_not_change_what_is_left(top_k: int) -> None:
    """PyTorch records the steps of a draw, which no kernel does then; that it records must not move the end."""
    torch = pytest.importorskip("torch")
    x = torch.asarray(rows_at_the_edge(300, "float32", top_k=top_k))
    leaf, keys = x.clone().requires_grad_(), random.split(9, ROWS)
    for p in numbers_near(P, "float32"):
        options = {"top_k": top_k, "top_p": p}
        left, tokens = polysoftmax.truncate(x, **options), polysoftmax.sample(x, keys, **options)
        moving = polysoftmax.truncate(leaf, **options)
        assert moving.requires_grad
        assert torch.equal(moving, left)
        assert torch.equal(polysoftmax.sample(leaf, keys, **options), tokens)
        recorded, logprobs = polysoftmax.sample(leaf, keys, return_logprobs=True, **options)
        assert torch.equal(recorded, tokens)
        logprobs.sum().backward()
        assert ((leaf.grad != 0) == (left > -math.inf)).all()
        (gradient,) = torch.autograd.grad(moving, leaf, torch.ones_like(moving))
        assert torch.equal(gradient, (left > -math.inf).float())
        leaf.grad = None


@pytest.mark.parametrize("engine", ["auto", "portable"])
def test_torch_compile_rounds_any_number(engine: str) -> None:
    """From its second value on, a number is a symbol to torch.compile, which would simplify a rounding away."""
    torch = pytest.importorskip("torch")
    x = torch.asarray(rows_at_the_edge(300, "float32"))
    torch._dynamo.reset()  # the engine stays that of the first program of a function
    with polysoftmax.engine(engine):
        program = torch.compile(lambda x, p: polysoftmax.truncate(x, top_p=p), fullgraph=True, backend="aot_eager")
        for p in (0.7, *numbers_near(P, "float32")):
            expected = polysoftmax.truncate(x, top_p=torch.asarray(p, dtype=torch.float32))
            assert torch.equal(program(x, p), expected)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_number_is_what_an_array_of_it_holds(dtype: type) -> None:
    """In the compute dtype, and for every parameter that is a number."""
    from polysoftmax._rows import rows

    compute = np.float64 if dtype is np.float64 else np.float32
    r = rows(np.zeros((2, 3), dtype), -1)
    generator = np.random.default_rng(1)
    halves = (2 * generator.integers(2**23, 2**24, 5000) + 1) * 2.0 ** generator.integers(-170, 100, 5000)
    given = [generator.random(5000), 10.0 ** generator.uniform(-50, 38, 5000), halves, np.nextafter(halves, math.inf)]
    below_powers = 2.0 ** generator.integers(-149, 127, 5000) * (2 - 2.0 ** -generator.integers(1, 53, 5000))
    for value in np.concatenate([*given, below_powers, [0.0, 1.0, 1e-45, 3.4028235e38]]).tolist():
        with np.errstate(under="ignore"):
            assert r.parameter(value, "top_p") == float(compute(value))
    assert r.parameter(math.inf, "temperature") == math.inf
    assert (r.temperature(1 + 1e-9) is None) == (compute is np.float32)
    x = np.asarray([3.0, 2.0, 1.0, -20.0], dtype)
    left = polysoftmax.truncate(x, top_p=1 - 1e-9)  # 1 as a float32, and so off
    assert (left[3] == x[3]) == (compute is np.float32)
    for name in ("top_p", "min_p"):
        with pytest.raises(ValueError, match=rf"{name} must lie in \[0, 1\], got 1.000000001"):
            polysoftmax.truncate(x, **{name: 1 + 1e-9})
    with pytest.raises(ValueError, match=r"temperature must be 0 or greater, got -1e-50"):
        polysoftmax.truncate(x, temperature=-1e-50)


@pytest.mark.parametrize("is_array", [False, True], ids=["number", "array"])
@pytest.mark.parametrize(
    ("name", "engine"), [("numpy", "auto"), ("numpy", "portable"), ("torch", "auto"), ("jax.numpy", "auto")]
)
def test_top_k_counts_past_what_float32_counts(name: str, engine: str, *, is_array: bool) -> None:
    """Exactly k survive of more ties than 2^24."""
    xp = pytest.importorskip(name)
    n, k = 2**24 + 512, 2**24 + 101
    with polysoftmax.engine(engine):
        y = polysoftmax.truncate(xp.zeros((1, n), dtype=xp.float32), top_k=xp.asarray([k]) if is_array else k)
    survives = np.asarray(y)[0] == 0
    assert (survives[:k].all(), survives[k:].any()) == (True, False)


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_a_subnormal_temperature_is_0(name: str) -> None:
    """In the formulas: an array of it means what the number means, and nothing moves."""
    xp = pytest.importorskip(name)
    x = xp.asarray([[1.0, 2.0, 3.0], [3.0, 3.0, 1.0]], dtype=xp.float32)
    t = xp.asarray([1.17e-38, 1e-39], dtype=xp.float32)
    with polysoftmax.engine("portable"):
        assert polysoftmax.softmax(x, temperature=t).tolist() == [[0, 0, 1], [0.5, 0.5, 0]]
        assert polysoftmax.sample(x, 7, temperature=t).tolist() == [2, 0]
        for op, way in itertools.product(("softmax", "log_softmax"), ("jvp", "vjp")):
            y = getattr(polysoftmax, f"{op}_{way}")(x, 10 * x, temperature=t)
            assert y.tolist() == [[0, 0, 0]] * 2
