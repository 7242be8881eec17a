"""What is JAX's own: what is compiled and kept, strict modes, symbolic shapes, subnormal numbers, and devices."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import polysoftmax as ps
from polysoftmax._formula import words
from polysoftmax._losses import CROSS_ENTROPY
from polysoftmax._sampling import SAMPLE
from polysoftmax._truncation import TRUNCATE
from tests.quick_programs import FLAGS

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax._formula import RowFormula

jax = pytest.importorskip("jax")
jnp = jax.numpy
INF = float("inf")


def logits(*shape: int, dtype: Any = np.float32) -> Any:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


# What is compiled, and kept


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> Callable[[RowFormula], list[Any]]:
    """Return a function that watches a formula, and returns the list of its traces, one for each program."""

    def watch(formula: RowFormula) -> list[Any]:
        function, seen = formula.function, []

        def watched(ops: Any, x: Any, *operands: Any, **options: Any) -> Any:
            seen.append(x.shape)
            return function(ops, x, *operands, **options)

        monkeypatch.setattr(formula, "function", watched)
        return seen

    return watch


def test_new_numbers_of_a_loss_compile_nothing(traces: Callable[[RowFormula], list[Any]]) -> None:
    x, targets, seen = logits(3, 11), jnp.asarray([1, 5, 2]), traces(CROSS_ENTROPY)
    for ignored, smoothing, z_loss in ((1, 0.1, 1e-4), (5, 0.2, 1e-3), (-100, 1.0, 2.0)):
        options = {"ignore_index": ignored, "label_smoothing": smoothing, "z_loss": z_loss, "reduction": "none"}
        y = ps.cross_entropy(x, targets, **options)
        assert len(seen) == 1
        np.testing.assert_allclose(y, ps.cross_entropy(np.asarray(x), np.asarray(targets), **options), rtol=1e-5)


@pytest.mark.parametrize(("n", "options"), [(13, {}), (701, {"top_p": 0.9, "temperature": 0.7})], ids=str)
def test_a_number_top_k_compiles_once_for_a_power_of_two(
    n: int, options: dict[str, float], traces: Callable[[RowFormula], list[Any]]
) -> None:
    x, truncations, draws = logits(3, n), traces(TRUNCATE), traces(SAMPLE)
    for k in (5, 6, 7, 8):
        ps.truncate(x, top_k=k, **options)
    assert len(truncations) == 1
    for k in (5, 6, 7, 8):
        ps.sample(x, 7, top_k=k, return_logprobs=True, **options)
    assert len(draws) == 1
    for k in (5, 6, 7, 8):
        y, theirs = (ps.truncate(one, top_k=k, **options) for one in (x, np.asarray(x)))
        np.testing.assert_array_equal(y, theirs)
        found, want = (ps.sample(one, 7, top_k=k, return_logprobs=True, **options) for one in (x, np.asarray(x)))
        np.testing.assert_array_equal(found[0], want[0])
        np.testing.assert_allclose(found[1], want[1], rtol=1e-5, atol=1e-6)


def test_programs_are_kept_up_to_a_bound() -> None:
    """What is dropped takes along all that JAX keeps for it."""
    from polysoftmax.engines import jax as jax_engine

    def programs() -> int:
        gc.collect()
        return len(jax.devices()[0].client.live_executables())

    assert jax_engine._compiled.cache_parameters()["maxsize"] == 128
    ps.softmax(logits(2, 19))  # the first call of all compiles more than its own
    jax_engine._compiled.cache_clear()
    arrays = [logits(2, n) for n in range(20, 23)]
    before = programs()
    for x in arrays:
        ps.softmax(x)
    assert jax_engine._compiled.cache_info().currsize == len(arrays)
    assert programs() == before + len(arrays)
    jax_engine._compiled.cache_clear()
    assert programs() == before


# Strict modes

N = 300  # top_k = 3 is few of them, and 100 are not


def arguments(dtype: str) -> dict[str, Any]:
    """Return what a strict mode is to be entered with."""
    wide = "float64" if dtype == "float64" else "float32"
    x = logits(2, 3, N, dtype=dtype)
    return {
        "x": x,
        "other": x[..., ::-1],
        "t": jnp.asarray([[0.5, 1.0, 0.0], [2.0, 0.3, 0.7]], wide),
        "where": jnp.arange(N) % 3 > 0,
        "targets": jnp.asarray([[1, 2, 3], [4, 5, 6]]),
        "weights": jnp.asarray(np.arange(N) % 4, dtype),
        "counts": jnp.asarray([[0, 5, 6], [7, 8, 900]]),
        "seeds": jnp.asarray([[1, 2, 3], [4, 5, 6]]),
    }


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "softmax": lambda a: ps.softmax(a["x"], temperature=a["t"], where=a["where"]),
    "softmax of two axes": lambda a: ps.softmax(a["x"], axis=(0, 1)),
    "log_softmax": lambda a: ps.log_softmax(a["x"], temperature=0.5),
    "logsumexp": lambda a: ps.logsumexp(a["x"], weights=a["weights"], where=a["where"]),
    "logsumexp of short rows": lambda a: ps.logsumexp(a["x"][..., :5]),
    "softmax_jacobian": lambda a: ps.softmax_jacobian(a["x"][..., :5], temperature=a["t"]),
    "log_softmax_jacobian": lambda a: ps.log_softmax_jacobian(a["x"][..., :5]),
    "softmax_jvp": lambda a: ps.softmax_jvp(a["x"], a["other"], temperature=a["t"], where=a["where"]),
    "log_softmax_vjp": lambda a: ps.log_softmax_vjp(a["x"], a["other"], temperature=a["t"], where=a["where"]),
    "cross_entropy": lambda a: ps.cross_entropy(a["x"], a["targets"], ignore_index=3, weight=a["weights"], z_loss=0.1),
    "cross_entropy, smoothed": lambda a: ps.cross_entropy(a["x"], a["targets"], label_smoothing=0.1),
    "cross_entropy of probabilities": lambda a: ps.cross_entropy(
        a["x"], jnp.full_like(a["x"], 1 / N), weight=a["weights"]
    ),
    "entropy": lambda a: ps.entropy(a["x"], temperature=a["t"], where=a["where"]),
    "kl_divergence": lambda a: ps.kl_divergence(a["x"], a["other"], temperature=a["t"], where=a["where"]),
    "truncate": lambda a: ps.truncate(a["x"], top_k=100),
    "truncate by rows": lambda a: ps.truncate(a["x"], top_k=a["counts"], temperature=a["t"]),
    "truncate to few": lambda a: ps.truncate(a["x"], top_k=3, top_p=0.9, min_p=0.1),
    "sample": lambda a: ps.sample(a["x"], 7, temperature=a["t"], where=a["where"], return_logprobs=True),
    "sample few": lambda a: ps.sample(a["x"], 7, top_k=3, top_p=0.9, return_logprobs=True),
    "sample by rows": lambda a: ps.sample(a["x"], ps.random.key(a["seeds"]), top_k=a["counts"], top_p=0.9),
    "sample often": lambda a: ps.sample(a["x"][0, 0], ps.random.key(a["seeds"])),
    "random": lambda a: ps.random.gumbel(ps.random.split(ps.random.key(a["seeds"]), 2), (2, 3)),
    "fold_in": lambda a: ps.random.fold_in(ps.random.key(a["seeds"]), jnp.arange(3)),
}


def slopes(name: str) -> Callable[[dict[str, Any]], Any]:
    """Return the gradient of a function for the logits."""

    def moment(x: Any, rest: dict[str, Any]) -> Any:
        y = jax.tree.leaves(FUNCTIONS[name]({**rest, "x": x}))[-1]
        return jnp.where(jnp.isfinite(y), y, 0.0).astype(jnp.float32).sum()

    return lambda a: jax.grad(moment)(a["x"], {key: one for key, one in a.items() if key != "x"})


WITHOUT_SLOPES = {"truncate by rows", "sample by rows", "sample often", "random", "fold_in"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_nothing_is_promoted_silently(dtype: str) -> None:
    """Neither dtypes nor ranks, in the functions and in their gradients."""
    with ExitStack() as modes:
        modes.enter_context(jax.enable_x64(dtype == "float64"))
        given = arguments(dtype)
        modes.enter_context(jax.numpy_dtype_promotion("strict"))
        modes.enter_context(jax.numpy_rank_promotion("raise"))
        for name, function in FUNCTIONS.items():
            jax.eval_shape(function, given)
            if name not in WITHOUT_SLOPES:
                jax.eval_shape(slopes(name), given)


@pytest.mark.parametrize("name", ["softmax_jacobian", "logsumexp", "truncate to few"])
def test_eager_calls_promote_nothing_silently(name: str) -> None:
    given = arguments("bfloat16")
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        FUNCTIONS[name](given)


@pytest.mark.parametrize("name", ["truncate by rows", "sample few"])
def test_without_jit(name: str) -> None:
    given = arguments("float32")
    want = FUNCTIONS[name](given)
    with jax.disable_jit():
        found = FUNCTIONS[name](given)
    jax.tree.map(lambda y, z: np.testing.assert_allclose(y, z, rtol=1e-5, atol=1e-6), found, want)


@pytest.mark.parametrize("name", ["softmax", "logsumexp"])
def test_no_infinity_is_to_be_seen(name: str) -> None:
    """Masked entries and weights of 0 are -inf inside, and no business of jax_debug_infs."""
    given = arguments("float32")
    with jax.debug_infs(True):
        FUNCTIONS[name](given)
        slopes(name)(given)


# Shapes that jax.export leaves open

ANY_ROWS: dict[str, Callable[..., Any]] = {
    "softmax": lambda x, i: ps.softmax(x, where=x > -1.0),
    "first axis": lambda x, i: ps.softmax(x, axis=0),
    "all axes": lambda x, i: ps.entropy(x, axis=None),
    "logsumexp": lambda x, i: ps.logsumexp(x),
    "cross_entropy": lambda x, i: ps.cross_entropy(x, i, ignore_index=2, z_loss=0.1),
    "gradient": lambda x, i: jax.grad(lambda x: ps.cross_entropy(x, i, label_smoothing=0.1))(x),
    "kl_divergence": lambda x, i: ps.kl_divergence(x, x * 2),
    "softmax_jacobian": lambda x, i: ps.softmax_jacobian(x),
    "log_softmax_jvp": lambda x, i: ps.log_softmax_jvp(x, x),
    "truncate": lambda x, i: ps.truncate(x, top_k=3, top_p=0.7),
    "truncate by rows": lambda x, i: ps.truncate(x, top_k=i),
    "sample": lambda x, i: ps.sample(x, 7, top_p=0.9),
    "sample by rows": lambda x, i: ps.sample(x, ps.random.key(i), temperature=i),
}


@pytest.mark.parametrize("shape", ["b, 9", "b, n"])
def test_lengths_may_be_symbols(shape: str) -> None:
    """The number of rows everywhere, and that of tokens where nothing is ordered or drawn."""
    from jax import export

    b = export.symbolic_shape(shape)
    kinds = jax.ShapeDtypeStruct(b, "float32"), jax.ShapeDtypeStruct(b[:1], "int32")
    names = [one for one in ANY_ROWS if shape == "b, 9" or not one.startswith(("truncate", "sample"))]

    def all_of_them(x: Any, i: Any) -> list[Any]:
        return [ANY_ROWS[name](x, i) for name in names]

    exported = export.export(jax.jit(all_of_them))(*kinds)
    x, i = logits(5, 9), jnp.asarray([0, 1, 2, 3, 4], jnp.int32)
    for y, want in zip(exported.call(x, i), jax.jit(all_of_them)(x, i), strict=True):
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)


# Numbers that XLA flushes, and NaN


def test_a_subnormal_temperature_is_0() -> None:
    x = jnp.asarray([[1.0, 2.0, 3.0], [3.0, 3.0, 1.0]])
    for t in (jnp.float32(1e-39), jnp.asarray([1e-39, 1.17e-38], jnp.float32), 1e-39):
        assert ps.softmax(x, temperature=t).tolist() == [[0, 0, 1], [0.5, 0.5, 0]]
        assert ps.sample(x, 7, temperature=t).tolist() == [2, 0]
        assert ps.truncate(x, top_p=0.5, temperature=t).tolist() == [[-INF, -INF, 3], [3, -INF, -INF]]
        assert ps.softmax_jvp(x, x, temperature=t).tolist() == [[0, 0, 0]] * 2


@pytest.mark.parametrize("row", [[1e-40, 0.0, 2e-40], [-0.0, 0.0, 0.0]])
def test_what_xla_compares_as_equal_is_tied(row: list[float]) -> None:
    """The lowest index comes first, in every function."""
    if jax.default_backend() != "cpu":
        pytest.skip("subnormal numbers are flushed on the CPU alone")
    x = jnp.asarray(row, jnp.float32)
    assert ps.softmax(x, temperature=0).tolist() == [pytest.approx(1 / 3)] * 3
    for options in ({"top_k": 1}, {"top_k": jnp.asarray(1)}, {"top_k": 1, "top_p": 0.9}):
        assert (ps.truncate(x, **options) > -INF).tolist() == [True, False, False]
        assert int(ps.sample(x, 7, **options)) == 0
    assert int(ps.sample(x, 7, temperature=0)) == 0


def test_the_index_of_nan_is_one_of_the_row() -> None:
    x = jnp.asarray([[np.nan] * 3, [0.0, np.nan, 2.0], [1.0, 2.0, 2.0]])
    index = words(x).argmax(x).ravel().tolist()
    assert all(0 <= one < 3 for one in index)
    assert index[2] == 1


# Devices

DEVICES = """
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import polysoftmax as ps

mesh = jax.make_mesh((2, 2), ("rows", "tokens"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def put(x, *spec):
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))


x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)), jnp.float32)
targets, heats, seeds = jnp.asarray([1, 2, 3, 4]), jnp.asarray([1.0, 0.5, 0.0, 2.0]), jnp.asarray([5, 6, 7, 8])
losses, tokens = ps.cross_entropy(x, targets, reduction="none"), ps.sample(x, ps.random.key(seeds), temperature=heats)
first, *_, last = jax.devices()

sharded = put(x, "rows", "tokens")
for there in (targets, put(targets, "rows"), put(targets, "tokens"), put(targets)):
    np.testing.assert_allclose(ps.cross_entropy(sharded, there, reduction="none"), losses, rtol=1e-6)
keys = ps.random.key(seeds)
for key in (keys, put(keys, "rows", None), jax.device_put(keys, last), np.asarray(keys)):
    assert ps.sample(sharded, key, temperature=put(heats, "rows")).tolist() == tokens.tolist()

on_last = jax.device_put(x, last)
np.testing.assert_array_equal(ps.cross_entropy(on_last, targets, reduction="none"), losses)  # targets are put nowhere
for one, other in ((on_last, jax.device_put(targets, first)), (sharded, jax.device_put(targets, last))):
    try:
        ps.cross_entropy(one, other)
    except TypeError as error:
        assert "the input is on device" in str(error) and "move one of them" in str(error)
    else:
        raise AssertionError("arrays on different devices met")
print("done")
"""


def test_arrays_meet_on_one_set_of_devices() -> None:
    """In a process of its own, as the number of devices is fixed when JAX starts."""
    environment = {**os.environ, "XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", DEVICES]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.stdout == "done\n", found.stderr


def test_the_greatest_of_a_long_row_are_searched_in_groups_of_groups() -> None:
    """With ties within groups and between them, the lowest index first."""
    x = np.round(2 * np.random.default_rng(0).normal(size=(4, 20_001))).astype(np.float32)
    x[3, :] = x[3, 0]
    for k in (1, 3, 60):
        np.testing.assert_array_equal(ps.top_log_probs(jnp.asarray(x), k)[1], ps.top_log_probs(x, k)[1])
