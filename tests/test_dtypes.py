"""Dtypes: what every function answers in, and that neither the order of bytes nor the layout changes a bit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import polysoftmax
from polysoftmax import random
from polysoftmax.engines import _library
from polysoftmax.testing import FORMATS, Adapter, rounded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# The table of docs/semantics.md. Integers count as the library's default float.
OWN, WIDE, INDEX = "own", "wide", "index"
"""The dtype of the logits; the one that is computed in, float32 or wider; the library's default for indices."""

CALLS: dict[str, tuple[tuple[str, ...], Callable[[SimpleNamespace], Any]]] = {
    "softmax": ((OWN,), lambda a: polysoftmax.softmax(a.x, temperature=a.t, where=a.mask)),
    "log_softmax": ((OWN,), lambda a: polysoftmax.log_softmax(a.x)),
    "logsumexp": ((OWN,), lambda a: polysoftmax.logsumexp(a.x, where=a.mask)),
    "logsumexp with weights": ((OWN,), lambda a: polysoftmax.logsumexp(a.x, weights=a.other)),
    "softmax_jvp": ((OWN,), lambda a: polysoftmax.softmax_jvp(a.x, a.other, temperature=a.t)),
    "softmax_vjp": ((OWN,), lambda a: polysoftmax.softmax_vjp(a.x, a.other, where=a.mask)),
    "log_softmax_jvp": ((OWN,), lambda a: polysoftmax.log_softmax_jvp(a.x, a.other)),
    "log_softmax_vjp": ((OWN,), lambda a: polysoftmax.log_softmax_vjp(a.x, a.other, temperature=a.t)),
    "softmax_jacobian": ((OWN,), lambda a: polysoftmax.softmax_jacobian(a.few, temperature=a.t)),
    "log_softmax_jacobian": ((OWN,), lambda a: polysoftmax.log_softmax_jacobian(a.few)),
    "truncate": ((OWN,), lambda a: polysoftmax.truncate(a.x, top_k=3, min_p=0.01)),
    "truncate by nothing": ((OWN,), lambda a: polysoftmax.truncate(a.x)),
    "cross_entropy": (
        (WIDE,),
        lambda a: polysoftmax.cross_entropy(a.x, a.targets, weight=a.weight, ignore_index=1, reduction="none"),
    ),
    "mean cross_entropy": ((WIDE,), lambda a: polysoftmax.cross_entropy(a.x, a.targets, weight=a.weight)),
    "cross_entropy of probabilities": ((WIDE,), lambda a: polysoftmax.cross_entropy(a.x, a.probabilities)),
    "entropy": ((WIDE,), lambda a: polysoftmax.entropy(a.x, temperature=a.t)),
    "kl_divergence": ((WIDE,), lambda a: polysoftmax.kl_divergence(a.x, a.other)),
    "sample": ((INDEX,), lambda a: polysoftmax.sample(a.x, a.keys, where=a.mask)),
    "log_prob": ((WIDE,), lambda a: polysoftmax.log_prob(a.x, a.targets, top_k=4, where=a.mask)),
    "log_prob and rank": (
        (WIDE, INDEX),
        lambda a: polysoftmax.log_prob(a.x, a.targets, temperature=a.t, return_rank=True),
    ),
    "top_log_probs": ((WIDE, INDEX), lambda a: polysoftmax.top_log_probs(a.x, 3, where=a.mask)),
    "gumbel_softmax": ((OWN,), lambda a: polysoftmax.gumbel_softmax(a.x, a.keys, 0.5, where=a.mask)),
    "several draws": ((INDEX,), lambda a: polysoftmax.sample(a.x, a.keys, draws=3, replace=False)),
    "sample with log-probabilities": (
        (INDEX, WIDE),
        lambda a: polysoftmax.sample(a.x, a.keys, top_k=4, temperature=a.t, return_logprobs=True),
    ),
}

ORDERED = ("truncate", "sample with log-probabilities", "log_prob", "top_log_probs")
"""What takes the order of a row's tokens, which Dask has not."""

IN_KERNELS = [name for name in CALLS if name != "gumbel_softmax"]
"""What runs in kernels on NumPy."""

FLOATS = ("float16", "bfloat16", "float32", "float64")
INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
SHAPES = ((3, 7), (5, 300))


def answers_of(name: str, given: SimpleNamespace) -> tuple[Any, ...]:
    y = CALLS[name][1](given)
    return y if isinstance(y, tuple) else (y,)


def numbers(shape: tuple[int, int]) -> SimpleNamespace:
    """Return whole numbers for logits, which every dtype holds, and what belongs to them."""
    rows, n = shape
    generator = np.random.default_rng(n)
    x = generator.integers(0, 12, shape)
    return SimpleNamespace(
        x=x,
        few=x[:, :5],
        other=generator.integers(0, 9, shape),
        t=0.5 + generator.random(rows),
        mask=generator.random(shape) < 0.8,
        targets=generator.integers(0, n, rows),
        weight=generator.random(n),
        probabilities=np.full(shape, 1 / n),
        keys=random.split(3, rows),
    )


def given_to(lib: Adapter, dtype: str, shape: tuple[int, int] = SHAPES[0]) -> SimpleNamespace:
    """Return the arguments of a call in a library, what stands beside the logits in the compute dtype or theirs."""
    found = numbers(shape)
    real = dtype if dtype in FORMATS else lib.can.default_float
    compute = FORMATS[real].compute.name
    dtypes = {
        "x": dtype,
        "few": dtype,
        "other": real,
        "mask": "bool",
        "targets": lib.can.default_index,
        "keys": "int32",
    }
    return SimpleNamespace(
        **{name: lib.asarray(values, dtypes.get(name, compute)) for name, values in vars(found).items()}
    )


def traced(lib: Adapter, name: str, given: SimpleNamespace) -> tuple[Any, ...]:
    """Return answers, or what stands for them where a computation is a compilation."""
    if lib.backend.library != "jax":
        return answers_of(name, given)
    import jax

    return jax.eval_shape(lambda arrays: answers_of(name, SimpleNamespace(**arrays)), vars(given))


@pytest.mark.backends(lambda can: not can.traced and "autograd" not in can.how and "64" not in can.how)
def test_what_every_function_answers_in(lib: Adapter) -> None:
    dtypes = (*lib.can.dtypes, *lib.can.integers[:1])
    for dtype in lib.some(dtypes) if lib.can.lazy else dtypes:  # float32 and, by an integer, float64
        own = dtype if dtype in FORMATS else lib.can.default_float
        expected = {OWN: own, WIDE: FORMATS[own].compute.name, INDEX: lib.can.default_index}
        given = given_to(lib, dtype)
        for name, (kinds, _) in CALLS.items():
            if lib.can.lazy and name in ORDERED:
                continue  # Dask cannot sort
            found = tuple(map(lib.dtype_name, traced(lib, name, given)))
            assert found == tuple(expected[kind] for kind in kinds), f"{name} of {dtype}"


EMPTY = {
    "softmax": OWN, "log_softmax": OWN, "logsumexp": OWN, "logsumexp with weights": OWN, "truncate by nothing": OWN,
    "truncate": OWN, "softmax_jvp": OWN, "softmax_vjp": OWN, "log_softmax_jvp": OWN, "log_softmax_vjp": OWN,
    "softmax_jacobian": OWN, "log_softmax_jacobian": OWN, "entropy": WIDE, "kl_divergence": WIDE,
}  # fmt: skip


@pytest.mark.backends(lambda can: not can.compiles and not can.lazy)
@pytest.mark.parametrize("shape", [(3, 0), (0, 7)])
def test_empty_arrays_are_answered_in_the_same_dtype(lib: Adapter, dtype: str, shape: tuple[int, int]) -> None:
    given = given_to(lib, dtype)
    rows, n = (slice(length) for length in shape)
    given.x, given.other, given.mask = (one[rows, n] for one in (given.x, given.other, given.mask))
    given.few = given.x
    given.t = given.t[rows]
    for name, kind in EMPTY.items():
        (y,) = answers_of(name, given)
        assert lib.dtype_name(y) == (dtype if kind == OWN else FORMATS[dtype].compute.name), name


@pytest.mark.backends(lambda can: "compile" not in can.how)
@pytest.mark.parametrize("function", ["cross_entropy", "entropy", "kl_divergence"])
def test_losses_of_16_bits_are_those_of_float32(lib: Adapter, dtype: str, function: str) -> None:
    """Nothing is rounded but the logits, unless ``dtype=`` asks for it."""
    compute = FORMATS[dtype].compute.name

    def loss(x: Any, **options: Any) -> Any:
        beside = {"cross_entropy": targets, "kl_divergence": lib.asarray(x_values[::-1], dtype)}
        second = (beside[function],) if function in beside else ()
        return lib.call(getattr(polysoftmax, function), x, *second, **options)

    x_values = rounded(np.random.default_rng(1).normal(size=(4, 9)) * 3, dtype)
    targets = lib.asarray([1, 8, 0, 3], lib.can.default_index)
    y = loss(lib.asarray(x_values, dtype))
    lib.require(y, tuple(y.shape), compute)
    want = lib.values(loss(lib.asarray(x_values, compute)))
    np.testing.assert_allclose(lib.values(y), want, rtol=4 * FORMATS[compute].unit)
    for asked in lib.can.dtypes:
        y = loss(lib.asarray(x_values, dtype), dtype=lib.dtype(asked))
        lib.require(y, tuple(y.shape), asked)
        np.testing.assert_allclose(lib.values(y), want, rtol=4 * FORMATS[compute].unit + FORMATS[asked].unit)


def in_memory() -> Iterator[Any]:
    """Yield each library that differentiates, a way to a gradient, and one to arrays of 16 bits."""
    jax, torch = pytest.importorskip("jax"), pytest.importorskip("torch")

    def of_torch(function: Callable[[Any], Any], x: Any) -> Any:
        return torch.autograd.grad(function(x.requires_grad_()), x)[0]

    yield jax.numpy, lambda function, x: jax.grad(function)(x)
    yield torch, of_torch


@pytest.mark.parametrize("engine", ["auto", "portable"])
def test_gradients_of_losses_have_the_dtype_of_the_logits(engine: str) -> None:
    for xp, gradient in in_memory():
        for name in ("bfloat16", "float16")[: 2 if xp.__name__ == "torch" else 1]:
            x = xp.asarray(rounded(np.random.default_rng(2).normal(size=(4, 9)), name), dtype=getattr(xp, name))
            targets = xp.asarray([1, 8, 0, 3])
            losses: tuple[Callable[[Any], Any], ...] = (
                lambda x, targets=targets: polysoftmax.cross_entropy(x, targets),
                lambda x: polysoftmax.entropy(x).sum(),
                lambda x, other=x * 0.5: polysoftmax.kl_divergence(x, other).sum(),
            )
            with polysoftmax.engine(engine):
                for loss in losses if xp.__name__ == "torch" else losses[:1]:
                    narrow = gradient(loss, x + 0)
                    assert narrow.dtype == x.dtype
                    wide = np.asarray(gradient(loss, xp.asarray(x + 0, dtype=xp.float32)), np.float64)
                    got = np.asarray(xp.asarray(narrow, dtype=xp.float32), np.float64)
                    np.testing.assert_allclose(got, wide, rtol=2 * FORMATS[name].unit, atol=2.0**-24)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_loss_under_autocast_is_scaled_without_overflow(dtype: str) -> None:
    """A loss of float16 times the scaler's 65536 would be inf, and so would be every gradient."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(16, 8, generator=generator), torch.arange(16) % 5
    model = torch.nn.Linear(8, 5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    slopes = {}
    for name, function in (("ours", polysoftmax.cross_entropy), ("torch", torch.nn.functional.cross_entropy)):
        model.zero_grad()
        with torch.autocast("cpu", dtype=getattr(torch, dtype)):
            loss = function(model(inputs), targets)
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        slopes[name] = model.weight.grad / scaler.get_scale()
        assert torch.isfinite(slopes[name]).all()
    torch.testing.assert_close(slopes["ours"], slopes["torch"], rtol=0.02, atol=2e-3)


# NumPy: the order of bytes, and how an array lies in memory


def numpy_dtype(name: str) -> Any:
    return np.dtype(name if name != "bfloat16" else pytest.importorskip("ml_dtypes").bfloat16)


def swapped(x: Any) -> Any:
    """Return an array with the other order of bytes; what has one byte, or no other order, stays."""
    return x.astype(x.dtype.newbyteorder("S"))


def strided(x: Any) -> Any:
    held = np.zeros(tuple(3 * n for n in x.shape), x.dtype)
    part = held[tuple(slice(1, None, 3) for _ in x.shape)]
    part[...] = x
    return part


def unaligned(x: Any) -> Any:
    held = np.frombuffer(bytearray(x.nbytes + 1), x.dtype, offset=1).reshape(x.shape)
    held[...] = x
    return held


LAYOUTS: dict[str, Callable[[Any], Any]] = {
    "contiguous": np.ascontiguousarray,
    "strided": strided,
    "backwards": lambda x: np.ascontiguousarray(x[tuple(slice(None, None, -1) for _ in x.shape)])[
        tuple(slice(None, None, -1) for _ in x.shape)
    ],
    "Fortran": np.asfortranarray,
    "unaligned": unaligned,
}


def of_numpy(dtype: str, shape: tuple[int, int]) -> SimpleNamespace:
    found = numbers(shape)
    real = numpy_dtype(dtype)
    beside = numpy_dtype(dtype if dtype in FLOATS else "float64")
    found.x, found.few, found.other = found.x.astype(real), found.few.astype(real), found.other.astype(beside)
    found.t, found.weight, found.probabilities = (
        one.astype(beside) for one in (found.t, found.weight, found.probabilities)
    )
    return found


def is_same(name: str, y: Any, expected: Any) -> None:
    assert (y.dtype, y.shape) == (expected.dtype, expected.shape), name
    assert y.dtype.isnative, name
    if y.dtype == np.longdouble:  # it has bytes without a meaning
        np.testing.assert_array_equal(y, expected, name)
    else:
        assert y.tobytes() == expected.tobytes(), name


@pytest.mark.skipif(_library.load() is None, reason="only the kernels promise it: a library's sums follow the layout")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
def test_no_layout_and_no_order_of_bytes_changes_a_bit(dtype: str, layout: str) -> None:
    for shape in SHAPES:
        native = of_numpy(dtype, shape)
        for order in (lambda one: one, swapped):
            given = SimpleNamespace(**{key: LAYOUTS[layout](order(one)) for key, one in vars(native).items()})
            for name in IN_KERNELS:
                for y, expected in zip(answers_of(name, given), answers_of(name, native), strict=True):
                    is_same(name, y, expected)


@pytest.mark.parametrize("engine", ["auto", "portable"])
@pytest.mark.parametrize("dtype", FLOATS + INTEGERS + ("longdouble",))
def test_answers_have_the_native_order_of_bytes(dtype: str, engine: str) -> None:
    """One operand at a time, so that none is converted for another's sake."""
    native = of_numpy(dtype if dtype != "longdouble" else "float64", SHAPES[0])
    if dtype == "longdouble":
        native.x = native.x.astype(dtype)
    with polysoftmax.engine(engine):
        for name in CALLS:
            expected = answers_of(name, native)
            for key, one in vars(native).items():
                given = SimpleNamespace(**{**vars(native), key: swapped(one)})
                for y, want in zip(answers_of(name, given), expected, strict=True):
                    is_same(f"{name}, {key} swapped", y, want)


def test_dtype_asked_for_in_the_other_order_is_native() -> None:
    y = polysoftmax.softmax(np.zeros(4), dtype=np.dtype("f4").newbyteorder("S"))
    assert y.dtype == np.float32
    assert y.dtype.isnative


def test_words_and_seeds_in_the_other_order() -> None:
    seeds = np.asarray([-1, 0, 7, 2**40])
    key, data = random.key(7), np.arange(5)
    np.testing.assert_array_equal(random.key(swapped(seeds)), random.key(seeds))
    np.testing.assert_array_equal(random.key(swapped(seeds[1:3].astype(np.uint16))), random.key(seeds[1:3]))
    np.testing.assert_array_equal(random.split(swapped(key), 3), random.split(key, 3))
    np.testing.assert_array_equal(random.fold_in(key, swapped(data)), random.fold_in(key, data))
    is_same("bits", random.bits(swapped(key.astype(np.uint32)), 9), random.bits(key, 9))
    words = np.asarray([3, 4], np.uint32)
    is_same("threefry", random.threefry2x32(swapped(words), swapped(words)), random.threefry2x32(words, words))


def test_a_half_of_the_other_order_is_no_other_number() -> None:
    """Read as the machine's own, 1.0 in '>f2' would be 3.6e-6."""
    x = (np.arange(20_000).reshape(20, 1000) % 7).astype(">f2")
    y = polysoftmax.softmax(x)
    exact = np.exp(x.astype(float) - 6)
    np.testing.assert_allclose(y, exact / exact.sum(-1, keepdims=True), rtol=2.0**-10, atol=2.0**-24)
