"""A row has one answer: the same bits alone and in any batch, memory, number of threads, library, and level of CPU."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import itertools
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pytest

import polysoftmax as ps
from polysoftmax import random
from polysoftmax.engines import _library

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    Arrays = NDArray[Any]
    Batch = dict[str, Arrays]

library = _library.load()
pytestmark = [
    pytest.mark.skipif(library is None, reason=f"no C++ library: {_library.reason()}"),
    pytest.mark.usefixtures("_threads"),
]

DTYPES = ("float32", "float64", "float16", "bfloat16")
# Lengths, and the most rows of a batch: 5000 short ones, and a few long ones, which several threads share.
ROWS = {1: 5000, 3: 5000, 10: 5000, 33: 64, 100: 64, 257: 64, 1000: 64, 5000: 12, 70_000: 2}
LIKE_LOGITS = ("x", "other", "g", "q")
THREADS = (3, 8)  # numbers beside one


def loss(x: Any, targets: Any, **options: Any) -> Any:
    return ps.cross_entropy(x, targets, reduction="none", **options)


def slope(x: Any, targets: Any, g: Any, **options: Any) -> Any:
    """The gradient of losses for the logits, by PyTorch's autograd."""
    x = x.detach().requires_grad_()
    y = loss(x, targets, **options)
    y.backward(g.to(y.dtype))
    return x.grad


def slope_of_log_prob(x: Any, tokens: Any, **options: Any) -> Any:
    """The gradient of log-probabilities for the logits, by PyTorch's autograd."""
    x = x.detach().requires_grad_()
    y = ps.log_prob(x, tokens, **options)
    y.backward(y.isfinite().to(y.dtype))
    return x.grad


def several(b: Batch, axis: int, **options: Any) -> Any:
    """Three draws of each row, laid along its axis."""
    y = ps.sample(b["x"], b["key"], axis=axis, draws=3, **options)
    return y if axis == -1 else y.T


MASKS, HEAT = ("temperature", "where"), ("temperature",)
# Functions of a batch, and the options that each is called with and without.
FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "softmax": (lambda b, **o: ps.softmax(b["x"], **o), MASKS),
    "log_softmax": (lambda b, **o: ps.log_softmax(b["x"], **o), MASKS),
    "logsumexp": (lambda b, **o: ps.logsumexp(b["x"], **o), ("where",)),
    "logsumexp, weights": (lambda b, **o: ps.logsumexp(b["x"], weights=b["other"], **o), ("where",)),
    "softmax_vjp": (lambda b, **o: ps.softmax_vjp(b["x"], b["g"], **o), MASKS),
    "softmax_jvp": (lambda b, **o: ps.softmax_jvp(b["x"], b["g"], **o), MASKS),
    "log_softmax_vjp": (lambda b, **o: ps.log_softmax_vjp(b["x"], b["g"], **o), MASKS),
    "log_softmax_jvp": (lambda b, **o: ps.log_softmax_jvp(b["x"], b["g"], **o), MASKS),
    "cross_entropy": (lambda b, **o: loss(b["x"], b["class"], **o), ()),
    "cross_entropy, more": (lambda b, **o: loss(b["x"], b["class"], label_smoothing=0.1, z_loss=1e-3, **o), ()),
    "cross_entropy, probabilities": (lambda b, **o: loss(b["x"], b["q"], **o), ()),
    "gradient of cross_entropy": (lambda b, **o: slope(b["x"], b["class"], b["temperature"], **o), ()),
    "gradient for probabilities": (lambda b, **o: slope(b["x"], b["q"], b["temperature"], **o), ()),
    "entropy": (lambda b, **o: ps.entropy(b["x"], **o), MASKS),
    "kl_divergence": (lambda b, **o: ps.kl_divergence(b["x"], b["other"], **o), MASKS),
    "truncate, top_k": (lambda b, **o: ps.truncate(b["x"], top_k=7, **o), HEAT),
    "truncate, top_p": (lambda b, **o: ps.truncate(b["x"], top_p=0.8, **o), HEAT),
    "truncate, min_p": (lambda b, **o: ps.truncate(b["x"], min_p=0.05, **o), HEAT),
    "sample": (lambda b, **o: ps.sample(b["x"], b["key"], return_logprobs=True, **o), MASKS),
    "sample, top_k": (lambda b, **o: ps.sample(b["x"], b["key"], top_k=7, return_logprobs=True, **o), MASKS),
    "sample, top_p": (lambda b, **o: ps.sample(b["x"], b["key"], top_p=0.8, return_logprobs=True, **o), MASKS),
    "sample, min_p": (lambda b, **o: ps.sample(b["x"], b["key"], min_p=0.05, return_logprobs=True, **o), MASKS),
    "sample, draws": (several, MASKS),
    "sample, distinct": (lambda b, **o: several(b, replace=False, **o), MASKS),
    "log_prob": (lambda b, **o: ps.log_prob(b["x"], b["class"], **o), MASKS),
    "log_prob, top_p": (lambda b, **o: ps.log_prob(b["x"], b["class"], top_p=0.8, return_rank=True, **o), MASKS),
    "gradient of log_prob": (lambda b, **o: slope_of_log_prob(b["x"], b["class"], **o), MASKS),
    "gradient of log_prob, top_k": (lambda b, **o: slope_of_log_prob(b["x"], b["class"], top_k=7, **o), MASKS),
    "top_log_probs": (lambda b, **o: ps.top_log_probs(b["x"], min(3, b["x"].shape[o["axis"]]), **o), MASKS),
}


@functools.cache
def batch(n: int, dtype: str) -> Batch:
    """Rows of every kind, and what belongs to each of them. NumPy holds bfloat16 as whole numbers."""
    rows, rng = ROWS[n], np.random.default_rng([n, *dtype.encode()])
    x, other, g = (4 * rng.standard_normal((rows, n)) for _ in range(3))
    x[1::7] = np.round(x[1::7])  # ties
    x[2::7, 0] += 30  # confident
    x[3::7, ::2] = -np.inf
    x[5::7, -1], x[6::7] = np.nan, -np.inf
    q = rng.random((rows, n))
    real = {"x": x, "other": other, "g": g, "q": q / q.sum(axis=1, keepdims=True)}
    if dtype == "bfloat16":
        torch = pytest.importorskip("torch")
        real = {name: torch.asarray(y).bfloat16().view(torch.int16).numpy() for name, y in real.items()}
    else:
        real = {name: y.astype(dtype) for name, y in real.items()}
    temperatures = rng.choice([0.0, 0.3, 1.0, 1.7, np.inf], rows).astype("float64" if dtype == "float64" else "float32")
    mask, targets = rng.random((rows, n)) < 0.7, rng.integers(0, n, rows)
    return real | {"temperature": temperatures, "where": mask, "class": targets, "key": random.split(n, rows)}


LAYOUTS = ("columns first", "every second row and column", "along axis 0", "backwards")


def laid_out(y: Arrays, how: str, *, is_matrix: bool) -> Arrays:
    if how == "every second row and column":
        y, given = np.zeros([2 * one for one in y.shape], y.dtype)[(slice(None, None, 2),) * y.ndim], y
        y[...] = given
    if how == "backwards":
        return np.flip(np.flip(y).copy())
    if how == "along axis 0":
        return np.ascontiguousarray(y.T) if is_matrix else y
    return np.asfortranarray(y) if how == "columns first" else y


class Call(NamedTuple):
    """Rows of a batch as they are given to a function. Which rows, and in what order, is in ``index``."""

    how: str
    rows: Batch
    index: Any
    library: str
    axis: int = -1
    threads: int = 1

    def bits(self, function: Callable[..., Any], options: tuple[str, ...], dtype: str) -> list[Arrays]:
        """Return what a function answers, one line of whole numbers a row."""
        rows: Any = self.rows
        if self.library == "torch":
            torch = pytest.importorskip("torch")
            rows = {name: torch.asarray(y) for name, y in rows.items()}
            rows |= {name: rows[name].view(getattr(torch, dtype)) for name in LIKE_LOGITS}
        ps.set_num_threads(self.threads)
        y = function(rows, axis=self.axis, **{name: rows[name] for name in options})
        return [self._lines(one) for one in (y if isinstance(y, tuple) else (y,))]

    def _lines(self, y: Any) -> Arrays:
        # NaN is one value: which of its bits are set depends on the CPU, and on who was the first of two operands.
        if self.library == "torch":
            y = y.masked_fill(y.isnan(), np.nan) if y.is_floating_point() else y
            y = (y.view(y.short().dtype) if y.element_size() == 2 else y).numpy()
        elif y.dtype.kind == "f":
            y = np.where(np.isnan(y), y.dtype.type(np.nan), y)
        y = np.moveaxis(y, self.axis, -1) if np.ndim(y) == 2 else np.asarray(y)
        return np.ascontiguousarray(y).view(f"u{y.itemsize}").reshape(len(self.index), -1)


def calls(n: int, dtype: str, library: str) -> Iterator[Call]:
    """First all rows, then the same ones in every other way."""
    whole = batch(n, dtype)
    everything, order = np.arange(ROWS[n]), np.random.default_rng(n).permutation(ROWS[n])
    yield Call("whole", whole, everything, library)
    for i in range(min(7, ROWS[n])):
        yield Call("alone", {name: y[i, ...] for name, y in whole.items()}, [i], library)
    for size in (1, 2, 7, 64, ROWS[n]):
        index = order[:size]
        yield Call(f"{size} in another order", {name: y[index] for name, y in whole.items()}, index, library)
    for how in LAYOUTS[: 4 if library == "numpy" else 3]:  # PyTorch has no negative strides
        rows = {name: laid_out(y, how, is_matrix=name in (*LIKE_LOGITS, "where")) for name, y in whole.items()}
        yield Call(how, rows, everything, library, axis=0 if how == "along axis 0" else -1)
    for threads in THREADS:
        yield Call(f"{threads} threads", whole, everything, library, threads=threads)


def differ(found: list[Arrays], want: list[Arrays], index: Any) -> bool:
    return any((a != b[index]).any() for a, b in zip(found, want, strict=True))


@pytest.fixture
def _threads() -> Iterator[None]:
    before = _library._asked
    yield
    _library._asked = before
    _library.load().set_num_threads(_library.num_threads())  # type: ignore[union-attr]


def cases() -> Iterator[tuple[int, str]]:
    """Yield lengths and dtypes, those of 16 bits in turn: kernels widen either to float32, and round at the end."""
    everything = os.environ.get("POLYSOFTMAX_TEST_WORK") == "all"
    for n, left_out in zip(ROWS, itertools.cycle(DTYPES[2:])):
        yield from ((n, dtype) for dtype in DTYPES if everything or dtype != left_out)


@pytest.mark.parametrize(("n", "dtype"), list(cases()))
def test_a_row_has_one_answer(n: int, dtype: str) -> None:
    every = [] if dtype == "bfloat16" else list(calls(n, dtype, "numpy"))
    of_torch = list(calls(n, dtype, "torch")) if importlib.util.find_spec("torch") else []
    if not every and not of_torch:
        pytest.skip("torch is not installed")
    # What the same kernels do with threads is seen once, and with long rows of every layout.
    every += of_torch[: 8 if n >= 1000 else -len(THREADS)] if every else of_torch
    wrong = []
    for name, (function, options) in FUNCTIONS.items():
        each = of_torch if name.startswith("gradient") else every
        if not each:
            continue  # gradients are PyTorch's
        first, *others = each
        for given in sorted({(), options}):
            want = first.bits(function, given, dtype)
            found = ((one, one.bits(function, given, dtype)) for one in others)
            wrong += [(name, given, one.library, one.how) for one, bits in found if differ(bits, want, one.index)]
    assert not wrong


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rows", [1, 63, 65, 300_001])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_reduced_loss_depends_on_its_losses_alone(reduction: Literal["sum", "mean"], rows: int, dtype: str) -> None:
    rng = np.random.default_rng(rows)
    x, targets = rng.normal(scale=3, size=(rows, 3)).astype(dtype), rng.integers(3, size=rows)
    ps.set_num_threads(1)
    want = ps.cross_entropy(x, targets, reduction=reduction)
    each = ps.cross_entropy(x, targets, reduction="none").astype(np.float64)
    np.testing.assert_allclose(want, getattr(each, reduction)(), rtol=64 * np.finfo(dtype).eps)
    found = [ps.cross_entropy(np.asfortranarray(x), targets, reduction=reduction)]
    ps.set_num_threads(3)
    found.append(ps.cross_entropy(x, targets, reduction=reduction))
    if importlib.util.find_spec("torch"):
        torch = pytest.importorskip("torch")
        found.append(ps.cross_entropy(torch.asarray(x), torch.asarray(targets), reduction=reduction).numpy())
    assert {one.tobytes() for one in found} == {want.tobytes()}
    assert all((one.dtype, one.shape) == (np.dtype(dtype), ()) for one in (want, *found))


def digest() -> str:
    """Return a hash of all answers of NumPy."""
    found = hashlib.sha256()
    for dtype, n in itertools.product(DTYPES[:3], (3, 33, 257, 1000)):
        whole = next(calls(n, dtype, "numpy"))
        for name, (function, options) in FUNCTIONS.items():
            if not name.startswith("gradient"):
                for bits in whole.bits(function, options, dtype):
                    found.update(bits.tobytes())
    return found.hexdigest()


def test_a_lesser_cpu_has_the_same_answers() -> None:
    assert library is not None
    if library.level != "x86-64-v4":
        pytest.skip(f"this CPU runs {library.level} alone")
    code = "import test_same_bits as tests; print(tests.library.level, tests.digest())"
    environment = {**os.environ, "POLYSOFTMAX_CPU": "x86-64-v3"}
    folder = os.path.dirname(__file__)
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.stdout.split() == ["x86-64-v3", digest()], ran.stderr


def test_kernels_answer_and_one_wrong_bit_is_seen() -> None:
    whole = next(calls(33, "float32", "numpy"))
    assert ps.explain(whole.rows["x"], "softmax").engine == "native"
    want = whole.bits(*FUNCTIONS["softmax"], "float32")
    wrong = [one.copy() for one in want]
    assert not differ(wrong, want, whole.index)
    wrong[0][-1, -1] ^= 1
    assert differ(wrong, want, whole.index)
