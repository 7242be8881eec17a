"""What is called: ours, written once for every library, and each library's own ways beside it."""

from __future__ import annotations

from functools import lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

import polysoftmax
from benchmarks.cases import MANY

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.cases import Case

Array = Any
TOP_K = 50
TOP_P = 0.9
SEED = 7
OURS = "polysoftmax"


def installed(backend: str) -> bool:
    return find_spec(backend) is not None


def library(backend: str) -> Any:
    """Return the module with a library's peers.

    It has ``PEERS``, and where a library is measured on the CPU ``asarray(x, dtype)``, ``key()``, ``gradient(loss)``,
    ``pullback(function)`` and ``stopwatch()``; ``jit`` where the library has one.
    """
    return import_module(f"benchmarks.peers.{backend}")


def set_threads(number: int) -> None:
    """Tell ours and PyTorch how many threads to use; JAX takes all CPUs that the process has."""
    if hasattr(polysoftmax, "set_num_threads"):
        polysoftmax.set_num_threads(number)
    if installed("torch"):
        import torch

        torch.set_num_threads(number)


def logits(shape: tuple[int, ...]) -> np.ndarray:
    """Return normal logits of deviation 3; large inputs repeat a million of them."""
    return np.resize(_pool(), shape)


@lru_cache(maxsize=1)
def _pool() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(1_000_003, dtype=np.float32) * 3


def operands(case: Case) -> tuple[Array, ...]:
    """Return the arguments that ours and the peers are called with."""
    lib = library(case.backend)
    base = logits(case.shape)
    x = lib.asarray(base, case.dtype)
    if case.op == "softmax_vjp":
        return x, lib.asarray(base[..., ::-1].copy(), case.dtype)
    if case.op.startswith("cross_entropy") or case.op == "log_prob":
        targets = np.asarray(np.random.default_rng(1).integers(0, case.length, size=case.shape[:-1]))
        return x, lib.asarray(targets, "int32" if case.backend == "jax" else "int64")
    return (x, lib.key()) if case.op.startswith("sample") else (x,)


def contestants(case: Case, arguments: tuple[Array, ...], *, compiled: bool = False) -> dict[str, Callable[[], Array]]:
    """Return ours and every peer of the case as calls without arguments, ours first."""
    lib = library(case.backend)
    found = {OURS: ours(case, lib), **lib.PEERS[case.op]}
    if case.op == MANY:
        found = {name: partial(function, draws=case.draws) for name, function in found.items()}
    if compiled and case.backend == "torch":
        found |= lib.compiled(case.op)
    bound = {name: partial(function, axis=case.axis) for name, function in found.items()}
    if case.mode == "jit":
        bound = {name: lib.jit(function) for name, function in bound.items()}
    return {name: partial(function, *arguments) for name, function in bound.items()}


def ours(case: Case, lib: Any) -> Callable[..., Array]:
    if case.op == "cross_entropy_grad":
        return lib.gradient(_cross_entropy) if lib.gradient else _closed_form_gradient
    if case.op == "softmax_vjp":
        return lib.pullback(polysoftmax.softmax) if lib.pullback else polysoftmax.softmax_vjp
    options = {"sample_top_k": {"top_k": TOP_K}, "sample_top_p": {"top_p": TOP_P}}.get(case.op, {})
    name = "sample" if case.op.startswith("sample") else case.op
    return partial(getattr(polysoftmax, name), **options)


def _cross_entropy(x: Array, targets: Array, *, axis: int) -> Array:
    return polysoftmax.cross_entropy(x, targets, axis=axis)


def _closed_form_gradient(x: Array, targets: Array, *, axis: int) -> Array:
    return from_probabilities(polysoftmax.softmax(x, axis=axis), targets)


def from_probabilities(y: Array, targets: Array) -> Array:
    """Turn probabilities into the gradient of the mean cross-entropy, in place, for libraries without autodiff."""
    rows = y.reshape(-1, y.shape[-1])
    rows[np.arange(len(rows)), targets.reshape(-1)] -= 1
    rows *= 1 / len(rows)
    return y
