"""Logits that are computed in the caller's own program: the answers are those for the same logits in memory.

A compiler computes such logits anew for each use, contracts a product with the subtraction of the maximum, and leaves
roundings to 16 bits out. Each function is tested after one kind of work; ``POLYSOFTMAX_TEST_WORK=all`` runs every
function after every kind, in every dtype and many lengths, in some hours.
"""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import cycle, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import polysoftmax as ps
from polysoftmax.testing import FORMATS, rounded
from tests.quick_programs import FLAGS, run_once
from tests.test_edges import P, rows_at_the_edge

if TYPE_CHECKING:
    from collections.abc import Callable

jax = pytest.importorskip("jax")
jnp = jax.numpy

ROWS = 12
TARGET = 1
ENOUGH_FOR_A_JACOBIAN = 16

# What an operation before the call makes of v, a vector b and a square matrix m.
WORK: dict[str, Callable[..., Any]] = {
    "product": lambda v, b, m: v * 0.73,
    "quotient": lambda v, b, m: v / 1.37,
    "softcap": lambda v, b, m: 30 * jnp.tanh(v / 30),
    "bias": lambda v, b, m: v + b,
    "layer": lambda v, b, m: (v @ m) * 0.37 + b,
}

TEMPERATURES = np.resize([0.0, 1e-9, 1.0, 0.7, np.inf], (ROWS, 1))
MASK = np.resize([True, True, False, True, True, True, True], (ROWS, 1))


def heats(x: Any) -> Any:
    return jnp.asarray(TEMPERATURES, jnp.promote_types(x.dtype, jnp.float32))


def slopes_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient of a function for the logits, by reverse mode."""

    def moment(x: Any) -> Any:
        return jnp.sum(function(x).astype(jnp.float32) * jnp.cos(jnp.arange(ROWS))[:, None])

    return jax.grad(moment)


def column(y: Any) -> Any:
    return y[:, None]


def targets() -> Any:
    return jnp.full(ROWS, TARGET)


def probabilities(x: Any) -> Any:
    return jnp.broadcast_to(jnp.asarray(1 / x.shape[-1], x.dtype), x.shape)


def losses(x: Any, **options: Any) -> Any:
    return ps.cross_entropy(x, targets(), reduction="none", **options)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "softmax": ps.softmax,
    "softmax, T": lambda x: ps.softmax(x, temperature=0.7),
    "softmax, T = 0": lambda x: ps.softmax(x, temperature=0),
    "softmax, T = 1e-9": lambda x: ps.softmax(x, temperature=1e-9),
    "softmax, temperatures": lambda x: ps.softmax(x, temperature=heats(x)),
    "softmax, mask": lambda x: ps.softmax(x, where=jnp.asarray(MASK)),
    "log_softmax": ps.log_softmax,
    "log_softmax, T = 0": lambda x: ps.log_softmax(x, temperature=0),
    "log_softmax, temperatures": lambda x: ps.log_softmax(x, temperature=heats(x)),
    "logsumexp": ps.logsumexp,
    "logsumexp, weights": lambda x: ps.logsumexp(x, weights=probabilities(x)),
    "softmax_jvp": lambda x: ps.softmax_jvp(x, jnp.cos(x), temperature=0.7),
    "log_softmax_vjp": lambda x: ps.log_softmax_vjp(x, jnp.cos(x), temperature=heats(x)),
    "softmax_jacobian": lambda x: ps.softmax_jacobian(x[..., :ENOUGH_FOR_A_JACOBIAN]),
    "cross_entropy": losses,
    "cross_entropy, smoothing": lambda x: losses(x, label_smoothing=0.1, z_loss=1e-3),
    "cross_entropy, probabilities": lambda x: ps.cross_entropy(x, probabilities(x), reduction="none"),
    "entropy": ps.entropy,
    "entropy, temperatures": lambda x: ps.entropy(x, temperature=heats(x)),
    "kl_divergence": lambda x: ps.kl_divergence(x, -x),
    "truncate, top_k": lambda x: ps.truncate(x, top_k=2),
    "truncate, top_p at T = 0": lambda x: ps.truncate(x, top_p=0.9, temperature=0),
    "truncate, min_p": lambda x: ps.truncate(x, min_p=1.0),
    "sample": lambda x: ps.sample(x, 7, return_logprobs=True),
    "sample, T = 0": lambda x: ps.sample(x, 7, temperature=0),
    "sample, temperatures": lambda x: ps.sample(x, 7, temperature=heats(x)),
    "sample, top_k": lambda x: ps.sample(x, 7, temperature=0, top_k=2, return_logprobs=True),
    "sample, top_p": lambda x: ps.sample(x, 7, temperature=1e-9, top_p=0.9),
    "gradient of softmax": slopes_of(lambda x: ps.softmax(x, temperature=0.7)),
    "gradient of log_softmax": slopes_of(lambda x: ps.log_softmax(x, temperature=heats(x))),
    "gradient of logsumexp": slopes_of(lambda x: column(ps.logsumexp(x))),
    "gradient of cross_entropy": slopes_of(lambda x: column(losses(x))),
    "gradient of entropy": slopes_of(lambda x: column(ps.entropy(x))),
    "Hessian of logsumexp": lambda x: jax.vmap(jax.hessian(ps.logsumexp))(x[..., :ENOUGH_FOR_A_JACOBIAN]),
    "vmap of cross_entropy": jax.vmap(lambda z: ps.cross_entropy(z, jnp.asarray(TARGET))),
    "scan of logsumexp": lambda x: jax.lax.scan(lambda carry, z: (carry, ps.logsumexp(z * 0.73)), 0.0, x)[1],
}

LENGTHS = (2, 4, 10, 16, 100, 1000, 32_000)
DTYPES = ("float32", "float64", "bfloat16", "float16")
FEW = (
    ("product", "float32", 10),
    ("quotient", "float32", 1000),
    ("softcap", "float32", 2),
    ("layer", "float32", 100),
    ("product", "float64", 16),
    ("softcap", "bfloat16", 10),
    ("bias", "bfloat16", 100),
    ("bias", "float16", 4),
)
EVERY = tuple(one for one in product(WORK, DTYPES, LENGTHS) if one[0] != "layer" or one[2] <= 1000)


def before(dtype: str, n: int) -> tuple[Any, Any, Any]:
    """Rows that are confident, with a logit that stands out by 12 to 45, in which products round."""
    rng = np.random.default_rng([n, *dtype.encode()])
    v = rng.normal(size=(ROWS, n))
    v[:, TARGET] += np.linspace(12, 45, ROWS)
    m = np.eye(n if n <= 1000 else 0)
    return tuple(jnp.asarray(rounded(one, dtype).astype(jnp.dtype(dtype))) for one in (v, rng.normal(size=n), m))


def close(found: Any, want: Any, dtype: str, *, absolute: bool) -> None:
    """Hold what is near 0 to its own size: losses of 1e-12 are what these logits are made for."""
    found, want = np.asarray(found), np.asarray(want)
    assert found.shape == want.shape
    if found.dtype.kind in "ib":
        np.testing.assert_array_equal(found, want)
        return
    compute = FORMATS[dtype].compute.unit
    unit = FORMATS[dtype].unit if found.dtype.itemsize == 2 else compute
    least = 64 * compute if absolute else 64 * compute**2
    # Two programs may take other exponentials, each within d + D + 16 + log2 n roundings, where d is up to 45 / 0.7.
    np.testing.assert_allclose(found.astype(np.float64), want.astype(np.float64), rtol=128 * unit, atol=least)


CANCELS = frozenset({"softmax_jvp", "gradient of softmax", "gradient of cross_entropy"})
"""Where the winner's derivative, y·(g - Σ y·g) or p - 1, is a difference of close numbers, and has few digits."""


def compare(name: str, work: str, dtype: str, given: tuple[Any, ...], x: Any) -> None:
    """Compare a function of work, in one program, with the function of what another program has computed."""
    function = FUNCTIONS[name]
    found = jax.jit(lambda *a: function(WORK[work](*a)))(*given)
    # The other one is compiled without what a compiler makes of a product and what follows.
    jax.tree.map(lambda a, b: close(a, b, dtype, absolute=name in CANCELS), found, run_once(function, x))


LESS = frozenset({"softmax, T", "softmax, T = 1e-9", "log_softmax, T = 0", "entropy", "vmap of cross_entropy"})
"""Functions whose temperatures are among those of another, and one that is another's program for a row."""


def cases() -> list[Any]:
    """Nearly every function after the kinds of work in turn, or all after all."""
    everything = os.environ.get("POLYSOFTMAX_TEST_WORK") == "all"
    each = [pair for pair in zip(FUNCTIONS, cycle(FEW), strict=False) if pair[0] not in LESS]
    pairs = product(FUNCTIONS, EVERY) if everything else each
    return [pytest.param(name, *case, id=f"{name}-{'-'.join(map(str, case))}") for name, case in pairs]


@pytest.mark.parametrize(("name", "work", "dtype", "n"), cases())
def test_answers_are_those_for_logits_in_memory(name: str, work: str, dtype: str, n: int) -> None:
    with jax.enable_x64(dtype == "float64"):
        given = before(dtype, n)
        compare(name, work, dtype, given, jax.jit(WORK[work])(*given))


def test_logits_past_the_integers_of_their_dtype() -> None:
    """Their products are rounded by more than an exponential can bear."""
    x = jnp.asarray([[6e9, 6e9, 1.0], [-7e9, -8e9, -9e9], [3e30, 1e30, 3e30]])
    y = jax.jit(lambda v: ps.softmax(v * 0.73))(x)
    assert y.tolist() == [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.5, 0.0, 0.5]]


@pytest.mark.parametrize("top_k", [0, 12])
def test_what_is_left_is_what_is_drawn_from(top_k: int) -> None:
    """Where the mass of a prefix lies within rounding of p, and the logits may be computed anew for each use."""
    rows = jnp.asarray(rows_at_the_edge(300, "float32", top_k=top_k) * np.float32(0.7))
    keys, options = ps.random.split(4, len(rows)), {"top_k": top_k, "top_p": P, "temperature": 1.1}

    def both(x: Any) -> Any:
        x = x / np.float32(0.7) * np.float32(1.1) + np.float32(0.3)
        left = ps.truncate(x, **options)
        return ps.sample(x, keys, **options), ps.sample(left, keys, temperature=1.1), left

    drawn, after, left = jax.jit(both)(rows)
    np.testing.assert_array_equal(drawn, after)
    assert (np.take_along_axis(np.asarray(left), np.asarray(drawn)[:, None], axis=-1) > -np.inf).all()


SHARDED = """
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tests import test_work_before as tests

mesh = jax.make_mesh((2, 2), ("rows", "tokens"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
SPECS = ("rows", None), (None, "tokens"), ("rows", "tokens")
for work, dtype, n, specs in (("product", "float32", 100, SPECS), ("softcap", "bfloat16", 16, SPECS[2:])):
    given = tests.before(dtype, n)
    x = jax.jit(tests.WORK[work])(*given)
    for spec in specs:
        sharded = jax.device_put(given[0], NamedSharding(mesh, PartitionSpec(*spec)))
        for name in {names!r} if spec == SPECS[-1] else {names!r}[1::2]:
            tests.compare(name, work, dtype, (sharded, *given[1:]), x)
print("compared")
"""


def test_sharded_work_before_a_call() -> None:
    """On four devices, in a process of its own, as their number is fixed when JAX starts.

    What is special is how XLA splits a program; what LLVM makes of a product is tested above.
    """
    names = ["softmax, temperatures", "logsumexp", "cross_entropy", "sample, T = 0", "gradient of cross_entropy"]
    code, root = SHARDED.format(names=names), Path(__file__).parents[1]
    environment = {**os.environ, "XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count=4"}
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert found.stdout == "compared\n", found.stderr
