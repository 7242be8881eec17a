"""What is a key and what a seed: by dtype and shape alone, never drawn once for many calls, with all of 64 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import polysoftmax
from polysoftmax import random
from polysoftmax.testing import Backend

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax.testing import Adapter

MASK = 0xFFFFFFFF
SEEDS_TO_KEYS = r"polysoftmax\.random\.key\(seeds\)"

integers = pytest.mark.backends(lambda can: "func" not in can.how and "autograd" not in can.how)  # nothing floats
untraced = pytest.mark.backends(lambda can: not can.traced)  # nothing is called in the backend's way


def widths(lib: Adapter, *names: str) -> list[str]:
    """Return the integer dtypes that a backend has, of those that are named."""
    narrow = lib.backend.library == "jax" and lib.backend is not Backend.JAX_X64
    return [one for one in names if not (narrow and one.endswith("64"))]


# A seed without axes


@integers
@pytest.mark.parametrize("kind", ["int32", "int64", "uint8"])
def test_an_array_without_axes_is_a_seed(lib: Adapter, kind: str) -> None:
    if kind not in widths(lib, kind):
        pytest.skip("the backend has no 64-bit integers")
    x, seed = lib.asarray(np.sin(np.arange(60.0)).reshape(3, 20), "float32"), lib.asarray(7, kind)
    expected = polysoftmax.sample(lib.values(x).astype(np.float32), 7).tolist()
    assert lib.values(lib.call(polysoftmax.sample, x, seed)).tolist() == expected
    for function, more in ((random.split, (3,)), (random.fold_in, (1,)), (random.bits, (4,))):
        y = lib.call(function, seed, *more)
        assert lib.dtype_name(y) == "int32"
        assert lib.values(y).tolist() == function(7, *more).tolist()


@untraced
@pytest.mark.parametrize("seed", [0, 7, -7, 127, -128])
def test_a_seed_means_the_same_in_every_dtype(lib: Adapter, seed: int) -> None:
    for kind in widths(lib, "int8", "int16", "int32", "int64"):
        assert lib.values(random.split(lib.asarray(seed, kind))).tolist() == random.split(seed).tolist()


def test_a_number_is_a_seed_inside_a_trace() -> None:
    x = np.sin(np.arange(60.0)).reshape(3, 20).astype(np.float32)
    expected = polysoftmax.sample(x, 7).tolist()
    jax, torch = pytest.importorskip("jax"), pytest.importorskip("torch")
    assert jax.jit(polysoftmax.sample)(x, 7).tolist() == expected
    keys = random.key(np.arange(6, 9)).tolist()
    assert jax.jit(jax.vmap(random.as_key))(jax.numpy.arange(6, 9)).tolist() == keys
    mapped = torch.func.vmap(polysoftmax.sample, in_dims=(None, 0))(torch.asarray(x), torch.arange(6, 9))
    assert mapped[1].tolist() == expected
    compiled = torch.compile(random.as_key, fullgraph=True, backend="aot_eager")
    assert compiled(torch.tensor(7)).tolist() == keys[1]


# Keys are told from seeds by dtype and last axis


@untraced
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("int64", (2,)),
        ("int64", (3, 2)),
        ("uint8", (2,)),
        ("int32", (1,)),
        ("int32", (3,)),
        ("int32", (6,)),
        ("int32", (4,)),
        ("uint32", (3,)),
        ("float32", (2,)),
        ("float32", ()),
    ],
)
def test_seeds_with_axes_are_no_keys(lib: Adapter, kind: str, shape: tuple[int, ...]) -> None:
    if kind not in widths(lib, kind):
        pytest.skip("the backend has no 64-bit integers")
    seeds = lib.asarray(np.ones(shape), kind)
    x = lib.asarray(np.zeros((*shape, 5)), "float32")
    message = rf"two 32-bit words along the last axis, got an array of dtype .*{kind} and shape .*{SEEDS_TO_KEYS}"
    for call in (lambda: polysoftmax.sample(x, seeds), lambda: random.split(seeds), lambda: random.fold_in(seeds, 1)):
        with pytest.raises(TypeError, match=message):
            call()


def test_seeds_of_the_shape_of_the_rows_are_no_keys() -> None:
    x, seeds = np.zeros((3, 2, 5)), np.ones((3, 2), np.int32)
    with pytest.raises(TypeError, match=rf"one seed a row, of shape \(3, 2\).*{SEEDS_TO_KEYS}"):
        polysoftmax.sample(x, seeds)
    keys = random.key(seeds)
    assert polysoftmax.sample(x, keys).shape == (3, 2)


@untraced
def test_one_key_stays_one_key_beside_any_number_of_rows(lib: Adapter) -> None:
    """Two rows among them, although a key has two words."""
    for n in (1, 2, 3):
        x = lib.asarray(np.sin(np.arange(20.0 * n)).reshape(n, 20), "float32")
        expected = lib.values(polysoftmax.sample(x, 2026)).tolist()
        for kind in ("int32", "uint32"):
            one = lib.asarray(random.key(2026), kind)
            assert lib.values(polysoftmax.sample(x, one)).tolist() == expected


@untraced
def test_keys_of_four_words_are_uint32(lib: Adapter) -> None:
    jax = pytest.importorskip("jax")
    typed = jax.random.key(7, impl="rbg")
    four = lib.asarray(np.asarray(jax.random.key_data(typed)), "uint32")
    assert lib.values(random.bits(four, 3)).tolist() == np.asarray(random.bits(typed, 3)).tolist()


# Generators


def generators() -> list[Any]:
    return [np.random.default_rng(0), pytest.importorskip("torch").Generator().manual_seed(0)]


TAKE_A_KEY: dict[str, Callable[[Any], Any]] = {
    "sample": lambda source: polysoftmax.sample(np.zeros((2, 9), np.float32), source),
    "split": random.split,
    "fold_in": lambda source: random.fold_in(source, 1),
    "bits": lambda source: random.bits(source, 3),
    "uniform": lambda source: random.uniform(source, 3),
    "gumbel": lambda source: random.gumbel(source, 3),
}


@pytest.mark.parametrize("name", TAKE_A_KEY)
def test_no_generator_is_drawn_from_once_for_many_calls_of_jax(name: str) -> None:
    """Whether or not an array of JAX is in sight."""
    jax = pytest.importorskip("jax")
    x = jax.numpy.zeros(2)
    for source in generators():

        def call(x: Any, source: Any = source) -> Any:
            TAKE_A_KEY[name](source)
            return x

        def step(x: Any, _: Any, call: Callable[[Any], Any] = call) -> Any:
            return call(x), None

        for traced in (
            jax.jit(call),
            jax.vmap(call),
            lambda x, step=step: jax.lax.scan(step, x, length=3),
            jax.jit(jax.grad(lambda x, call=call: call(x).sum())),
            jax.grad(jax.checkpoint(lambda x, call=call: call(x).sum())),
            jax.grad(lambda x, call=call: jax.vmap(call)(x).sum()),
        ):
            with pytest.raises(TypeError, match=r"once and for all inside jax.jit.*pass polysoftmax.random.key"):
                traced(x)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace", "ignore:Converting a tensor to a Python")
def test_no_generator_of_numpy_is_drawn_from_once_for_many_calls_of_torch() -> None:
    torch = pytest.importorskip("torch")
    source, x = np.random.default_rng(0), torch.zeros(4, 1000)

    class Draw(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return polysoftmax.sample(x, source)

    for traced, given in (
        (torch.func.vmap(Draw()), x),
        (torch.func.grad(lambda x: torch.func.vmap(lambda row: row + Draw()(row))(x).sum()), x),
        (lambda x: torch.jit.trace(Draw(), (x,)), x),
        (lambda x: torch.export.export(Draw(), (x,)), x),
    ):
        with pytest.raises(TypeError, match=r"once and for all inside torch\..*pass polysoftmax.random.key"):
            traced(given)


def test_torch_draws_from_its_own_generators_in_its_own_traces() -> None:
    torch = pytest.importorskip("torch")
    source, x = torch.Generator().manual_seed(0), torch.zeros(1000)
    mapped = torch.func.vmap(lambda x: polysoftmax.sample(x, source), randomness="different")(torch.zeros(4, 1000))
    assert len(set(mapped.tolist())) == 4
    differentiated = torch.func.grad(lambda x: polysoftmax.sample(x, source, return_logprobs=True)[1])
    assert len({int(differentiated(x).argmax()) for _ in range(3)}) == 3


def test_generators_are_drawn_from_at_each_call_where_jax_differentiates_alone() -> None:
    jax = pytest.importorskip("jax")
    x, source = jax.numpy.ones(()), np.random.default_rng(0)

    def times(x: Any) -> Any:
        return x * float(random.uniform(source, ()))

    drawn = [float(jax.grad(times)(x)) for _ in range(3)]
    drawn += [
        float(jax.vjp(times, x)[1](x)[0]),
        float(jax.jvp(times, (x,), (x,))[1]),
        float(jax.linearize(times, x)[0]),
    ]
    assert len(set(drawn)) == 6


# Data of 64 bits

KEYS = [(0, 7), (0xDEADBEEF, 0x12345678)]


def block(key: tuple[int, int], counter: tuple[int, int]) -> tuple[int, ...]:
    y = random.threefry2x32(np.asarray(key, np.uint32), np.asarray(counter, np.uint32))
    return tuple(y.tolist())


def folded(key: tuple[int, ...], data: int) -> list[int]:
    """Fold in the low word in domain 3, after the high word, if it counts, in domain 4."""
    high = 0 if -(2**32) <= data < 2**32 else (data >> 32) & MASK
    if high:
        key = block(key, (high, 4))
    return list(block(key, (data & MASK, 3)))


SMALL = [0, 1, 2**31, MASK, -1, -(2**31), -(2**32)]
LARGE = [2**32, 2**32 + 1, 2**40, 2**63 - 1, 0x9E3779B97F4A7C15 - 2**64, -(2**32) - 1, -(2**63)]


@pytest.mark.parametrize("data", [*SMALL, *LARGE, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15, 2**64 + 5, 10**400])
def test_no_bit_of_64_is_lost(data: int) -> None:
    for key in KEYS:
        words = np.asarray(key, np.uint32)
        expected = folded(key, data % 2**64 if data >= 2**64 else data)
        assert random.fold_in(words, data).view(np.uint32).tolist() == expected


PINNED = [[276534068, 1641862660], [-909543373, 1911103256], [-1744557623, 1624538768]]


def test_the_words_below_2_to_the_32_are_frozen() -> None:
    """What a program has drawn with 32-bit data it draws again."""
    assert [random.fold_in(7, data).tolist() for data in (0, 5, -1)] == PINNED
    assert random.fold_in(7, MASK).tolist() == PINNED[2]
    assert random.fold_in(7, 2**32).tolist() not in PINNED


@integers
def test_arrays_of_data(lib: Adapter) -> None:
    for kind in widths(lib, "int64", "uint64", "int32", "uint32"):
        limits = np.iinfo(kind)
        data = [one for one in [*SMALL, *LARGE, 2**63, 2**64 - 1] if limits.min <= one <= limits.max]
        words = lib.asarray(np.asarray(KEYS, np.uint32).view(np.int32)[:, None], "int32")
        y = lib.values(lib.call(random.fold_in, words, lib.asarray(data, kind)))
        assert y.view(np.uint32).tolist() == [[folded(key, one) for one in data] for key in KEYS]
        alone = lib.values(lib.call(random.fold_in, words, lib.asarray(data[-1], kind)))
        assert alone.view(np.uint32).tolist() == [[folded(key, data[-1])] for key in KEYS]


def test_arrays_of_data_in_jax_with_64_bits() -> None:
    jax = pytest.importorskip("jax")
    with jax.enable_x64(True):
        words, data = np.asarray(KEYS, np.uint32).view(np.int32), jax.numpy.asarray(SMALL + LARGE)
        assert data.dtype == np.int64
        for call in (random.fold_in, jax.jit(random.fold_in)):
            y = np.asarray(call(jax.numpy.asarray(words)[:, None], data)).view(np.uint32)
            assert y.tolist() == [[folded(key, one) for one in SMALL + LARGE] for key in KEYS]
        large = jax.numpy.asarray([2**63, 2**64 - 1, 5], "uint64")
        y = np.asarray(random.fold_in(jax.numpy.asarray(words[0]), large)).view(np.uint32)
        assert y.tolist() == [folded(KEYS[0], one) for one in (2**63, 2**64 - 1, 5)]


def test_seeds_beside_jax_without_64_bits() -> None:
    """There JAX has no high word, and the low one is the same."""
    jax = pytest.importorskip("jax")
    with jax.enable_x64(False):
        for seed in (0, 7, 2**31, MASK, -1, 2**40 + 3):
            ours, theirs = random.key(seed).view(np.uint32), np.asarray(jax.random.key_data(jax.random.key(seed)))
            assert theirs.tolist() == [0, ours[1]]
            assert (ours[0] == 0) == (0 <= seed <= MASK)
