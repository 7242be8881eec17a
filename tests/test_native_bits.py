"""The C++ kernels' bits: 16 of them rounded once, the same in any batch and memory; and elementary functions."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import mpmath
import numpy as np
import pytest

from tests.native_cases import DTYPES, Value, library, needs_library, rows, run

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax._arrays import Array

pytestmark = needs_library


@pytest.mark.parametrize("dtype", [*(np.dtype(f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)), np.float64])
@pytest.mark.parametrize("n", [5, 100])
def test_dtypes_are_converted(dtype: Any, n: int) -> None:
    x = np.random.default_rng(8).integers(0, 100, (9, n)).astype(dtype)
    ours, plain = np.empty((9, n), np.float32), np.empty((9, n), np.float32)
    run(0, x, None, None, ours)
    run(0, x.astype(np.float32), None, None, plain)
    np.testing.assert_array_equal(ours, plain)


def to_bfloat16(x: Array) -> Array:
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def of_bfloat16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("n", [1, 3, 10, 64, 65, 100, 1000])
@pytest.mark.parametrize("kernel", [0, 1])
@pytest.mark.parametrize("compute", DTYPES)
@pytest.mark.parametrize("axis", [0, 1])
def test_16_bits_are_rounded_once(n: int, kernel: int, compute: Any, axis: int) -> None:
    x = rows(np.float32, n)
    x[13] *= 1e-6
    narrow = x.astype(np.float16)
    wide, half = np.empty(x.shape, compute), np.empty_like(narrow)

    def laid(array: Array) -> Array:
        return np.asfortranarray(array) if axis == 0 else array

    narrow, half = laid(narrow), laid(half)
    run(kernel, narrow, None, None, half, compute=compute)
    run(kernel, narrow.astype(compute), None, None, wide, compute=compute)
    np.testing.assert_array_equal(half, wide.astype(np.float16))
    brain = laid(to_bfloat16(x))
    answer = laid(np.empty(x.shape, np.uint16))
    run(kernel, brain, None, None, answer, compute=compute, bfloat16=(brain, answer))
    run(kernel, of_bfloat16(brain).astype(compute), None, None, wide, compute=compute)
    if compute is np.float32:
        np.testing.assert_array_equal(answer, to_bfloat16(wide))


def test_every_half_is_widened_and_rounded() -> None:
    x = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256).view(np.float16)
    # Where one class alone is possible, the push of log_softmax returns the tangents of the others as they are.
    logits = np.full((256, 257), -np.inf, np.float32)
    logits[:, -1] = 0.0
    tangent = np.zeros((256, 257), np.float16)
    tangent[:, :-1] = x
    answer = np.empty((256, 257), np.float32)
    run(6, logits, None, None, tangent, answer)
    np.testing.assert_array_equal(answer[:, :-1], x.astype(np.float32))
    rounded = np.empty((256, 257), np.float16)
    run(6, logits, None, None, tangent, rounded)
    np.testing.assert_array_equal(rounded[:, :-1], x)


# The same bits


def everywhere(kernel: int, x: Array, t: Array, answers: Callable[[Array, Array], None]) -> None:
    """Call ``answers`` with rows as they lie in every way in memory, and what the kernel makes of them."""
    n = x.shape[1]
    whole = np.empty_like(x)

    def call(rows: Array, t: Array, y: Array) -> Array:
        run(kernel, rows, Value(t), None, y, compute=x.dtype.type)
        return y

    call(x, t, whole)
    for i in (0, 5, len(x) - 1):
        answers(call(x[i : i + 1], t[i : i + 1], np.empty((1, n), x.dtype)), whole[i : i + 1])
    order = np.random.default_rng(9).permutation(len(x))
    answers(call(x[order], t[order], np.empty_like(x)), whole[order])
    answers(call(np.asfortranarray(x), t, np.asfortranarray(np.empty_like(x))), whole)
    apart = np.zeros((2 * len(x), 3 * n), x.dtype)[::2, ::3]
    apart[:] = x
    answers(call(apart, t, np.empty_like(x)), whole)
    answers(call(x[::-1], t[::-1], np.empty_like(x)), whole[::-1])
    backwards = np.ascontiguousarray(x[:, ::-1])[:, ::-1]
    answers(call(backwards, t, np.empty((len(x), 2 * n), x.dtype)[:, ::2]), whole)
    loose = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    loose[:] = x
    answers(call(loose, t, np.empty_like(x)), whole)
    for threads in (2, 3, 8):
        library.set_num_threads(threads)
        answers(call(x, t, np.empty_like(x)), whole)
        answers(call(np.asfortranarray(x), t, np.empty_like(x)), whole)
    library.set_num_threads(1)


@pytest.fixture
def one_thread() -> Any:
    assert library is not None
    before = library.num_threads
    library.set_num_threads(1)
    yield
    library.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2000, 1), (3000, 3), (300, 10), (300, 63), (300, 65), (333, 1000), (7, 200_001)])
@pytest.mark.parametrize("kernel", [0, 1])
@pytest.mark.parametrize("hot", [False, True])
def test_bits_depend_on_the_row_alone(dtype: Any, shape: tuple[int, int], kernel: int, hot: bool) -> None:
    rng = np.random.default_rng(10)
    x = (rng.standard_normal(shape) * 5).astype(dtype)
    t = (rng.random(shape[0]) + 0.5 if hot else np.ones(shape[0])).astype(dtype)
    everywhere(kernel, x, t, np.testing.assert_array_equal)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("n", [3, 10, 100, 150_000])
def test_bits_of_sums_do_not_depend_on_threads_or_batch(n: int) -> None:
    x = np.random.default_rng(11).standard_normal((200_000 // n + 2, n)).astype(np.float32)
    y, other = np.empty(len(x), np.float32), np.empty(len(x), np.float32)
    run(2, x, None, None, Value(y))
    for threads in (2, 5):
        library.set_num_threads(threads)
        run(2, x, None, None, Value(other))
        np.testing.assert_array_equal(y, other)
    one = np.empty(1, np.float32)
    for i in range(0, len(x), 1 + len(x) // 7):
        run(2, x[i : i + 1], None, None, Value(one))
        assert one[0] == y[i]


def test_dimensions_of_any_order_and_broadcast() -> None:
    x = np.random.default_rng(12).standard_normal((4, 1, 5, 6, 7)).astype(np.float32)
    plain, y = np.empty_like(x), np.empty_like(x)
    run(0, x, None, None, plain)
    for order in ((3, 0, 2, 1), (1, 2, 3, 0), (2, 3, 0, 1)):
        run(0, np.transpose(x, (*order, 4)), None, None, np.transpose(y, (*order, 4)))
        np.testing.assert_array_equal(y, plain)
    run(0, np.broadcast_to(x[:1, :, :1], x.shape), None, None, y)
    run(0, np.ascontiguousarray(np.broadcast_to(x[:1, :, :1], x.shape)), None, None, plain)
    np.testing.assert_array_equal(y, plain)


def test_nothing_to_do() -> None:
    for shape in ((0, 5), (3, 0), (0, 0)):
        x, y = np.empty(shape, np.float32), np.full(shape[0], 7, np.float32)
        run(2, x, None, None, Value(y))
        assert (y == -np.inf).all()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_has_threads_of_its_own() -> None:
    x = np.random.default_rng(13).standard_normal((300, 1000)).astype(np.float32)
    y, again = np.empty_like(x), np.empty_like(x)
    assert library is not None
    before = library.num_threads
    library.set_num_threads(4)
    run(0, x, None, None, y)
    child = os.fork()
    if child == 0:
        run(0, x, None, None, again)
        os._exit(0 if (y == again).all() and library.num_threads == 4 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    library.set_num_threads(before)


# Accuracy of the exponential and the logarithms, seen through formulas of one or two entries


def ulps(ours: Array, exact: list[Any]) -> float:
    """Return the greatest distance in units of the last place of the exact answer."""
    worst = mpmath.mpf(0)
    for got, true in zip(ours.tolist(), exact, strict=True):
        unit = np.spacing(ours.dtype.type(abs(true))) if true else np.finfo(ours.dtype).smallest_subnormal
        worst = max(worst, abs(mpmath.mpf(got) - true) / mpmath.mpf(float(unit)))
    return float(worst)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exponential_is_within_an_ulp(dtype: Any) -> None:
    lowest = -103 if dtype is np.float32 else -744
    z = np.random.default_rng(14).uniform(lowest, 0, 3000).astype(dtype)
    z[:1000] /= 100
    # The pull of log_softmax is g - exp(y)·Σ g: 0 - exp(y)·1 where all of g stands at an entry of probability 0.
    y = np.stack([z, np.full_like(z, -np.inf)], axis=1)
    g = np.zeros_like(y)
    g[:, 1] = 1.0
    gx = np.empty_like(y)
    run(4, y, None, None, y, g, gx, Value(None), compute=dtype)
    with mpmath.workdps(40):
        assert ulps(-gx[:, 0], [mpmath.exp(mpmath.mpf(float(v))) for v in z]) < 1.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_logarithms_are_within_an_ulp(dtype: Any) -> None:
    tiny = np.finfo(dtype).tiny
    w = np.exp(np.random.default_rng(15).uniform(np.log(float(tiny)), 80, 3000)).astype(dtype)
    w[:1000] = np.random.default_rng(16).uniform(0.5, 2.0, 1000)
    w[:3] = tiny / 8, tiny, np.finfo(dtype).max
    x, y = np.zeros((len(w), 1), dtype), np.empty(len(w), dtype)
    run(2, x, w[:, None], None, Value(y), compute=dtype)
    with mpmath.workdps(40):
        assert ulps(y, [mpmath.log(mpmath.mpf(float(v))) for v in w]) < 1.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_logarithms_of_1_plus_are_within_an_ulp(dtype: Any) -> None:
    info, rng = np.finfo(dtype), np.random.default_rng(17)
    sizes = np.exp(rng.uniform(np.log(float(info.tiny)), np.log(float(info.max)), 2000))
    next_to_minus_1 = float(info.epsneg) * np.exp(rng.uniform(0, 10, 500)) - 1
    z = np.concatenate([sizes, -sizes, next_to_minus_1, rng.uniform(-1, 2, 4000)]).astype(dtype)
    z = z[(z > -1) & (z != 0)]
    # Of two entries with the weights 1 and z, the first is the maximum, and the exponential of the other rounds to 1.
    x, y = np.zeros((len(z), 2), dtype), np.empty(len(z), dtype)
    x[:, 1] = -1e-30
    run(2, x, np.stack([np.ones_like(z), z], axis=1), None, Value(y), compute=dtype)
    with mpmath.workdps(60):
        assert ulps(y, [mpmath.log1p(mpmath.mpf(float(v))) for v in z]) < 1.0
