"""Laws that hold for every input, on every backend, looked for by hypothesis.

All batches have one shape, so that backends that compile do it once a test.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import polysoftmax
from polysoftmax.testing import FORMATS, Adapter, Backend, open_backend

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[Any]

# JAX in its programs, whose formulas its own calls run, too.
pytestmark = pytest.mark.enough(lambda can: can.traced or not can.compiles)

SHAPE = (4, 6)
LOG2_N = math.log2(SHAPE[-1])
FORMULAS = ("softmax", "log_softmax", "logsumexp")

# Derandomised: a law that holds within a bound is not to fail now and then where the bound is missed by chance.
every = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=8,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.differing_executors],
)

_wide = st.one_of(st.floats(-60, 60, width=32), st.sampled_from([-math.inf, -1e30, 0.0, 1e4, 1e30]))


def _with_support(x: Floats) -> Floats:
    x = x.astype(np.float32).astype(np.float64)  # what every dtype under test holds exactly
    x[:, 0] = np.where(np.isfinite(x).any(axis=-1), x[:, 0], 0.0)
    return x


batches = arrays(np.float64, SHAPE, elements=_wide).map(_with_support)
moderate = arrays(np.float64, SHAPE, elements=st.floats(-30, 30, width=32))
eighths = arrays(np.int64, SHAPE, elements=st.integers(-400, 400)).map(lambda x: x / 8)
vectors = arrays(np.float64, SHAPE, elements=st.floats(-8, 8, width=16))


def run(lib: Adapter, name: str, x: Floats, *others: Floats, **options: Any) -> Floats:
    """Call a function on arrays of the default float and return its values."""
    dtype = lib.can.default_float
    operands = [lib.asarray(one, dtype) for one in (x, *others)]
    keywords = {key: lib.asarray(one, "bool" if key == "where" else dtype) for key, one in options.items()}
    return lib.values(lib.call(getattr(polysoftmax, name), *operands, **keywords))


def unit(lib: Adapter) -> float:
    return FORMATS[lib.can.default_float].unit


def tiny(lib: Adapter) -> float:
    return FORMATS[lib.can.default_float].tiny


def bound(x: Floats, u: float, temperature: float = 1.0) -> tuple[Floats, Floats]:
    """Return the contract's bounds, relative for softmax and absolute for its logarithm."""
    with np.errstate(over="ignore", invalid="ignore"):
        d = (x.max(axis=-1, keepdims=True) - x) / temperature
        p = np.exp(-d)
        p = p / p.sum(axis=-1, keepdims=True)
        mean = np.where(p > 0, p * d, 0.0).sum(axis=-1, keepdims=True)
        y = d + np.log(np.exp(-d).sum(axis=-1, keepdims=True))
    common = 16 + LOG2_N + d + mean
    return np.where(p > 0, common, 0.0) * u, (common + y) * u


@every
@given(x=batches)
def test_probabilities_sum_to_one(lib: Adapter, x: Floats) -> None:
    y = run(lib, "softmax", x)
    assert (y >= 0).all()
    assert (y <= 1).all()
    # The bounds of the entries add up to 16 + log2 n + 2·D, and D is at most log n.
    np.testing.assert_allclose(y.sum(axis=-1), 1.0, rtol=0, atol=(16 + LOG2_N + 2 * math.log(6)) * unit(lib))


@every
@given(x=eighths, shift=st.integers(-4000, 4000))
def test_a_shift_changes_nothing(lib: Adapter, x: Floats, shift: int) -> None:
    np.testing.assert_array_equal(run(lib, "softmax", x + shift), run(lib, "softmax", x))
    np.testing.assert_array_equal(run(lib, "log_softmax", x + shift), run(lib, "log_softmax", x))


@every
@given(x=batches)
def test_order_is_preserved(lib: Adapter, x: Floats) -> None:
    order = np.argsort(x, axis=-1)
    y = np.take_along_axis(run(lib, "softmax", x), order, axis=-1)
    # Libraries' exponentials are monotone up to their last place.
    assert (y[:, 1:] >= y[:, :-1] * (1 - 4 * unit(lib))).all()
    log_y = np.take_along_axis(run(lib, "log_softmax", x), order, axis=-1)
    assert (log_y[:, 1:] >= log_y[:, :-1]).all()


@every
@given(x=batches, order=st.permutations(range(SHAPE[-1])))
def test_permutations_pass_through(lib: Adapter, x: Floats, order: list[int]) -> None:
    relative, absolute = bound(x[:, order], unit(lib))
    y, permuted = run(lib, "softmax", x)[:, order], run(lib, "softmax", x[:, order])
    assert _near(y, permuted, 2 * relative * y + 2 * tiny(lib))
    y, permuted = run(lib, "log_softmax", x)[:, order], run(lib, "log_softmax", x[:, order])
    assert _near(y, permuted, 2 * absolute)


def _near(a: Floats, b: Floats, allowed: Any) -> bool:
    with np.errstate(invalid="ignore"):
        return bool(((a == b) | (np.abs(a - b) <= allowed)).all())


@every
@given(x=batches)
def test_log_softmax_is_the_logarithm_of_softmax(lib: Adapter, x: Floats) -> None:
    y, log_y = run(lib, "softmax", x), run(lib, "log_softmax", x)
    relative, absolute = bound(x, unit(lib))
    normal = y >= tiny(lib)
    assert _near(np.log(y[normal]), log_y[normal], (relative + absolute)[normal])
    assert (log_y[~normal] < math.log(tiny(lib)) + 1).all()


@every
@given(x=batches)
def test_logsumexp_lies_between_the_maximum_and_log_n_above(lib: Adapter, x: Floats) -> None:
    y, top = run(lib, "logsumexp", x), x.max(axis=-1)
    top = lib.values(lib.asarray(top, lib.can.default_float))
    assert (y >= top).all()
    assert (y <= top + math.log(6) + (16 + LOG2_N + math.log(6) + np.abs(y)) * unit(lib)).all()


@every
@given(x=moderate, t=st.floats(0.125, 8, width=16))
def test_temperature_divides(lib: Adapter, x: Floats, t: float) -> None:
    u = unit(lib)
    relative, absolute = bound(x, u, t)
    # Rounding x / T moves a logit by up to u·|x / T|, and the maximum as much.
    rounding = 4 * u * np.abs(x).max() / t
    y, divided = run(lib, "softmax", x, temperature=t), run(lib, "softmax", x / t)
    assert _near(y, divided, (2 * relative + rounding) * y + 2 * tiny(lib))
    y, divided = run(lib, "log_softmax", x, temperature=t), run(lib, "log_softmax", x / t)
    assert _near(y, divided, 2 * absolute + rounding)


@every
@given(x=batches)
def test_rows_of_a_jacobian_sum_to_zero(lib: Adapter, x: Floats) -> None:
    for name in ("softmax_jacobian", "log_softmax_jacobian"):
        sums = run(lib, name, x).sum(axis=-1)
        np.testing.assert_allclose(sums, 0.0, rtol=0, atol=(20 + LOG2_N + 2 * math.log(6)) * unit(lib))


@every
@given(x=moderate, u=vectors, v=vectors, t=st.floats(0.25, 4, width=16))
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_jvp_and_vjp_are_adjoint(lib: Adapter, name: str, x: Floats, u: Floats, v: Floats, t: float) -> None:
    pushed = (u * run(lib, f"{name}_jvp", x, v, temperature=t)).sum(axis=-1)
    pulled = (v * run(lib, f"{name}_vjp", x, u, temperature=t)).sum(axis=-1)
    size = np.abs(u).sum(axis=-1) * np.abs(v).sum(axis=-1) / t
    relative, _ = bound(x, unit(lib), t)
    # Both feel the error of the probabilities; the terms' own roundings are a few units.
    assert _near(pushed, pulled, (8 + 2 * relative.max() / unit(lib)) * unit(lib) * size + tiny(lib))


@every
@given(
    x=batches,
    kept=st.permutations(range(SHAPE[-1])).map(lambda one: sorted(one[:4])),
    poison=st.sampled_from([math.nan, math.inf, -math.inf, 1e30, 0.0]),
)
@pytest.mark.parametrize("name", FORMULAS)
def test_masking_is_removing(lib: Adapter, name: str, x: Floats, kept: list[int], poison: float) -> None:
    exists = np.isin(np.arange(SHAPE[-1]), kept)
    rest = x[:, kept]
    rest[:, 0] = np.where(np.isfinite(rest).any(axis=-1), rest[:, 0], 0.0)
    x = np.full(SHAPE, poison)
    x[:, kept] = rest
    masked, removed = run(lib, name, x, where=np.broadcast_to(exists, SHAPE)), run(lib, name, rest)
    relative, absolute = bound(rest, unit(lib))
    if name == "logsumexp":
        assert _near(masked, removed, 2 * (20 + LOG2_N + np.abs(removed)) * unit(lib))
        return
    assert (masked[:, ~exists] == (0.0 if name == "softmax" else -math.inf)).all()
    allowed = 2 * absolute if name == "log_softmax" else 2 * relative * removed + 2 * tiny(lib)
    assert _near(masked[:, kept], removed, allowed)


@every
@given(x=batches)
@pytest.mark.parametrize("name", FORMULAS)
def test_backends_agree(lib: Adapter, name: str, x: Floats) -> None:
    """Each is compared with NumPy, which the accuracy tests compare with mpmath."""
    function = getattr(polysoftmax, name)
    y = lib.values(lib.call(function, lib.asarray(x, "float32")))
    with open_backend(Backend.NUMPY, "portable") as plain:
        other = plain.values(plain.call(function, plain.asarray(x, "float32")))
    u, least = FORMATS["float32"].unit, FORMATS["float32"].tiny
    relative, absolute = bound(x, u)
    if name == "softmax":
        assert _near(y, other, 2 * relative * other + 2 * least)
    else:
        sums = 2 * (16 + LOG2_N + math.log(6) + np.abs(other)) * u
        assert _near(y, other, 2 * absolute if name == "log_softmax" else sums)
