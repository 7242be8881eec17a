"""The C++ kernels of softmax, logsumexp and the losses: the answers of the formulas, and the same bits everywhere."""

from __future__ import annotations

import itertools
import os
import struct
from typing import TYPE_CHECKING, Any

import mpmath
import numpy as np
import pytest

from polysoftmax import _losses
from polysoftmax._formula import words
from polysoftmax._softmax import LOG_SOFTMAX, LOGSUMEXP, SOFTMAX
from polysoftmax.engines import _library

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax._arrays import Array

library = _library.load()
pytestmark = [
    pytest.mark.skipif(library is None, reason=f"no C++ library: {_library.reason()}"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of NumPy, for NaN and inf in the formulas
]

NAMES = ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
CODES = {name: code for code, name in enumerate((*NAMES, "float16", "bfloat16", "float32", "float64"))}
DTYPES = (np.float32, np.float64)
OPS = words(np.empty(0), 1)
LENGTHS = (1, 3, 10, 64, 65, 100, 1000, 2500)
TOLERANCE = {np.float32: 4e-6, np.float64: 2e-14}
ABSENT = None


class Value:
    """An operand with one entry a row."""

    def __init__(self, array: Array | None) -> None:
        self.array = array


def operand(given: Array | Value | None, dimensions: int, bfloat16: frozenset[int]) -> tuple[int, list[int]]:
    """Return an operand's address, and the words that describe it."""
    row = not isinstance(given, Value)
    array = given if row else given.array
    if array is None:
        return 0, [0, CODES["float32"], 0, *[0] * dimensions]
    code = CODES["bfloat16"] if id(array) in bfloat16 else CODES[array.dtype.name]
    step, strides = (array.strides[-1], array.strides[:-1]) if row else (0, array.strides)
    return array.ctypes.data, [1, code, step, *strides]


def run(
    kernel: int,
    x: Array,
    *operands: Array | Value | None,
    options: tuple[float, ...] = (),
    compute: type = np.float32,
    bfloat16: tuple[Array, ...] = (),
) -> None:
    """Run a kernel on rows along the last axis of ``x``."""
    assert library is not None
    batch, n = x.shape[:-1], x.shape[-1]
    bits = [struct.unpack("q", struct.pack("d", o))[0] if isinstance(o, float) else int(o) for o in options]
    head = [kernel, len(batch), n, 1 + len(operands), CODES[np.dtype(compute).name]]
    words = [*head, *bits, *[0] * (8 - len(bits)), *batch]
    narrow = frozenset(map(id, bfloat16))
    addresses = []
    for one in (x, *operands):
        address, description = operand(one, len(batch), narrow)
        addresses.append(address)
        words += description
    library.run(struct.pack(f"{len(words)}q", *words), struct.pack(f"{len(addresses)}q", *addresses))


def rows(dtype: Any, n: int, seed: int = 0) -> Array:
    """Return rows of logits, most of them with values that are handled apart."""
    x = (np.random.default_rng((seed, n)).standard_normal((37, n)) * 4).astype(dtype)
    x[1] = -np.inf
    x[2, 0] = np.nan
    x[3, -1] = np.inf
    x[4] = np.inf
    x[5, 0] = -np.inf
    x[6], x[7], x[8], x[9] = 1e30, -1e30, 0.0, -3e38
    x[8, 0] = 50.0
    x[10, ::2] = -np.inf
    x[11] = np.nan
    x[12, 0], x[12, -1] = np.inf, np.nan
    return x


def temperatures(dtype: Any) -> Array:
    t = np.abs(np.random.default_rng(1).standard_normal(37)).astype(dtype) + dtype(0.1)
    t[[8, 10, 13]] = 0.0
    t[[7, 14]] = np.inf
    t[15], t[16], t[17] = np.nan, -1.0, 1e-30
    return t


def masks(n: int) -> Array:
    mask = np.random.default_rng(2).random((37, n)) < 0.6
    mask[[0, 1]], mask[13] = False, True
    return mask


def assert_close(ours: Array, formula: Array, tolerance: float) -> None:
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(formula))
    np.testing.assert_allclose(ours, formula, rtol=tolerance, atol=tolerance / 10)


cases = pytest.mark.parametrize(
    ("dtype", "n", "masked", "hot"), list(itertools.product(DTYPES, LENGTHS, (False, True), (False, True)))
)


class Setting:
    """Rows with a temperature and a mask, or without, and cotangents for them."""

    def __init__(self, dtype: Any, n: int, masked: bool, hot: bool) -> None:
        self.dtype, self.tolerance, self.hot = dtype, TOLERANCE[dtype], hot
        self.x = rows(dtype, n)
        self.mask = masks(n) if masked else None
        self.t = temperatures(dtype) if hot else None
        self.t_column = None if self.t is None else self.t[:, None]
        self.g = np.random.default_rng(3).standard_normal(self.x.shape).astype(dtype)
        self.g_row = np.ascontiguousarray(self.g[:, 0])

    def row(self) -> Array:
        return np.full(self.x.shape[0], 7, self.dtype)

    def like(self) -> Array:
        return np.full_like(self.x, 7)

    def run(self, kernel: int, *operands: Array | Value | None, **options: Any) -> None:
        run(kernel, self.x, *operands, compute=self.dtype, **options)


@cases
@pytest.mark.parametrize(("kernel", "formula"), [(0, SOFTMAX), (1, LOG_SOFTMAX)])
def test_softmax(dtype: Any, n: int, masked: bool, hot: bool, kernel: int, formula: Any) -> None:
    s = Setting(dtype, n, masked, hot)
    y = s.like()
    s.run(kernel, Value(s.t), s.mask, y)
    expected = formula.function(OPS, s.x.copy(), s.t_column, s.mask)
    assert_close(y, expected, 4 * s.tolerance)

    pushed = s.like()
    s.run(kernel + 5, Value(s.t), s.mask, s.g, pushed)
    assert_close(pushed, formula.jvp(OPS, (s.x, s.t_column, s.mask), (s.g, None, None), expected), 100 * s.tolerance)

    wanted = (True, hot, False)
    slopes = formula.vjp(OPS, (s.x, s.t_column, s.mask), expected, s.g, wanted)
    for answer in (expected, ABSENT):
        gx, gt = s.like(), s.row()
        s.run(kernel + 3, Value(s.t), s.mask, answer, s.g, gx, Value(gt if hot else None))
        assert_close(gx, slopes[0], 100 * s.tolerance)
        if hot:
            assert_close(gt[:, None], slopes[1], 1e4 * s.tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_logsumexp(dtype: Any, n: int, masked: bool, weighted: bool) -> None:
    s = Setting(dtype, n, masked, hot=False)
    rng = np.random.default_rng(4)
    weights = (rng.random(s.x.shape) * (rng.random(s.x.shape) < 0.8)).astype(dtype) if weighted else None
    y, gx, gw = s.row(), s.like(), s.like()
    s.run(2, weights, s.mask, Value(y))
    expected = LOGSUMEXP.function(OPS, s.x.copy(), weights, s.mask)
    assert_close(y[:, None], expected, s.tolerance)
    s.run(7, weights, s.mask, Value(s.g_row), gx, gw if weighted else None)
    operands = (s.x, weights, s.mask)
    slopes = LOGSUMEXP.vjp(OPS, operands, expected, s.g_row[:, None], (True, weighted, False))
    assert_close(gx, slopes[0], 30 * s.tolerance)
    if weighted:
        assert_close(gw, slopes[1], 30 * s.tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("low", "high"), [(-40, -10), (-10, -1)])
def test_a_logsumexp_close_to_0_keeps_its_digits(dtype: Any, low: int, high: int) -> None:
    x = np.random.default_rng(5).uniform(low, high, (8, 300)).astype(dtype)
    x[:, 17] = 0.0
    y = np.empty(8, dtype)
    run(2, x, None, None, Value(y), compute=dtype)
    with mpmath.workdps(60):
        expected = [float(mpmath.log(mpmath.fsum(mpmath.exp(mpmath.mpf(float(v))) for v in row))) for row in x]
    np.testing.assert_allclose(y, expected, rtol=8 * float(np.finfo(dtype).eps))


@cases
def test_entropy_and_divergence(dtype: Any, n: int, masked: bool, hot: bool) -> None:
    s = Setting(dtype, n, masked, hot)
    y, gx, gt, gother = s.row(), s.like(), s.row(), s.like()
    given, g = (s.x, s.t_column, s.mask), s.g_row[:, None]
    s.run(10, Value(s.t), s.mask, Value(y))
    expected = _losses.ENTROPY.function(OPS, s.x.copy(), s.t_column, s.mask)
    assert_close(y[:, None], expected, 4 * s.tolerance)
    s.run(11, Value(s.t), s.mask, Value(s.g_row), gx, Value(gt if hot else None))
    slopes = _losses.ENTROPY.vjp(OPS, given, expected, g, (True, hot, False))
    assert_close(gx, slopes[0], 100 * s.tolerance)
    if hot:
        assert_close(gt[:, None], slopes[1], 1e4 * s.tolerance)

    other = np.random.default_rng(6).standard_normal(s.x.shape).astype(dtype)
    other[14, 0], other[15, 0], other[20] = -np.inf, np.nan, -np.inf
    s.run(12, other, Value(s.t), s.mask, Value(y))
    expected = _losses.KL_DIVERGENCE.function(OPS, s.x.copy(), other.copy(), s.t_column, s.mask)
    assert_close(y[:, None], expected, 10 * s.tolerance)
    s.run(13, other, Value(s.t), s.mask, Value(s.g_row), gx, gother, Value(gt if hot else None))
    operands = (s.x, other, s.t_column, s.mask)
    slopes = _losses.KL_DIVERGENCE.vjp(OPS, operands, expected, g, (True, True, hot, False))
    assert_close(gx, slopes[0], 1000 * s.tolerance)
    assert_close(gother, slopes[1], 100 * s.tolerance)
    if hot:
        assert_close(gt[:, None], slopes[2], 1e5 * s.tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("targets", ["classes", "ignored", "probabilities"])
def test_cross_entropy(dtype: Any, n: int, smoothing: float, z_loss: float, weighted: bool, targets: str) -> None:
    s = Setting(dtype, n, masked=False, hot=False)
    rng = np.random.default_rng(7)
    weight = (rng.random(n) * (rng.random(n) < 0.8)).astype(dtype) if weighted else None
    if targets == "probabilities":
        q: Array = rng.random(s.x.shape).astype(dtype)
        q[10, ::2] = 0.0
        given: Array | Value = q
    else:
        q = rng.integers(0, n, (37, 1))
        q[17], q[18] = n + 3, -1
        given = Value(q[:, 0])
    ignored = 0 if targets == "ignored" else None
    options = (int(ignored is not None), ignored or 0, smoothing, z_loss)
    each = None if weight is None else np.broadcast_to(weight, s.x.shape)
    column = None if weight is None else weight[None, :]
    y, gx = s.row(), s.like()
    named = {"ignore_index": ignored, "label_smoothing": smoothing, "z_loss": z_loss}
    s.run(8, given, each, Value(y), options=options)
    assert_close(y[:, None], _losses.CROSS_ENTROPY.function(OPS, s.x.copy(), q, column, **named), 8 * s.tolerance)
    s.run(9, given, each, Value(s.g_row), gx, options=options)
    operands = (s.x.copy(), q, column)
    slopes = _losses.CROSS_ENTROPY.vjp(OPS, operands, None, s.g_row[:, None], (True, False, False), **named)
    assert_close(gx, slopes[0], 100 * s.tolerance)


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
