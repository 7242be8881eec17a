"""What users would have called instead, measured on the same cases, and what it answers wrongly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

import polysoftmax
from polysoftmax.testing._check import reference
from polysoftmax.testing._checks import CHECKS
from polysoftmax.testing._formats import FORMATS, rounded
from polysoftmax.testing._jax import x64

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from polysoftmax.testing._cases import Case

OPS = ("softmax", "log_softmax", "logsumexp")
INF = math.inf


def plain_cases(op: str) -> list[Case]:
    """Return the cases that every peer can be asked, and means the same by: no options, a finite maximum a row."""
    alone = [one for one in CHECKS[op].cases if set(one.given) == {"x"} and np.ndim(one.operand("x"))]
    return [one for one in alone if np.isfinite(one.operand("x").max(axis=-1)).all()]


def _scipy(op: str, x: Any, dtype: str) -> Any:
    from scipy import special

    return getattr(special, op)(x.astype(dtype), axis=-1)


def _jax(op: str, x: Any, dtype: str) -> Any:
    import jax

    function = jax.scipy.special.logsumexp if op == "logsumexp" else getattr(jax.nn, op)
    with x64(enabled=dtype == "float64"):
        return function(jax.numpy.asarray(x, dtype=dtype), axis=-1)


def _torch(op: str, x: Any, dtype: str) -> Any:
    import torch

    return getattr(torch, op)(torch.as_tensor(x).to(getattr(torch, dtype)), -1).double().numpy()


@dataclass(frozen=True)
class Peer:
    """What users would have called instead."""

    name: str
    module: str
    call: Callable[[str, Any, str], Any]
    dtypes: tuple[str, ...] = tuple(FORMATS)


PEERS = (
    Peer("scipy", "scipy", _scipy, ("float16", "float32", "float64")),
    Peer("jax.nn", "jax", _jax),
    Peer("torch", "torch", _torch),
)


@dataclass(frozen=True)
class Distance:
    """The largest error of one function in one dtype, on the cases that every peer can be asked."""

    function: str
    dtype: str
    by: str
    ulps: float


def distances() -> Iterator[Distance]:
    """Measure polysoftmax on NumPy, or PyTorch for bfloat16, and the peers that are installed."""
    own = Peer("polysoftmax", "numpy", _own)
    for peer in (own, *PEERS):
        if find_spec(peer.module) is None:
            continue
        for op in OPS:
            for dtype in peer.dtypes:
                if peer is own and dtype == "bfloat16" and find_spec("torch") is None:
                    continue
                yield Distance(op, dtype, peer.name, max(_ulps(peer, case, op, dtype) for case in plain_cases(op)))


def _own(op: str, x: Any, dtype: str) -> Any:
    function = getattr(polysoftmax, op)
    if dtype != "bfloat16":
        return function(x.astype(dtype))
    import torch

    return function(torch.as_tensor(x).to(torch.bfloat16)).double().numpy()


def _ulps(peer: Peer, case: Case, op: str, dtype: str) -> float:
    want = reference(CHECKS[op], case, dtype)[0]
    with np.errstate(all="ignore"):
        answer = np.asarray(peer.call(op, rounded(case.operand("x"), dtype), dtype)).astype(np.float64)
        return float(np.max(want.ulps(answer, relative=op == "softmax")))


# What they answer wrongly: each line is asked here and now


@dataclass(frozen=True)
class Fault:
    """A question, what peers and polysoftmax answer, and what is right."""

    question: str
    by: str
    answer: str
    ours: str
    right: str


def _shown(value: Any) -> str:
    values = np.atleast_1d(np.asarray(value, dtype=np.float64))
    each = [f"{one:.3g}" for one in values.tolist()]
    return each[0] if len(each) == 1 else f"[{', '.join(each)}]"


def faults() -> Iterator[Fault]:
    """Ask the peers that are installed what the guide says they answer wrongly."""
    for question, right, ours, peers in _QUESTIONS:
        for by, ask in peers.items():
            needed = {*by.split(" on "), *(("torch",) if "gradient" in question else ())}
            if all(map(find_spec, needed)):
                with np.errstate(all="ignore"):
                    yield Fault(question, by, _shown(ask()), _shown(ours()), right)


def _int8() -> Any:
    return np.asarray([-128, 127], np.int8)


def _zeros() -> Any:
    return np.zeros(70_000, np.float16)


def _jax_of(function: Callable[[Any, Any], Any]) -> Any:
    import jax

    return function(jax, jax.numpy)


def _slope_of(logsumexp: Callable[[Any], Any], x: list[float]) -> Any:
    import torch

    leaf = torch.tensor(x, requires_grad=True)
    logsumexp(leaf).backward()
    return leaf.grad


def _torch_slope(x: list[float]) -> Any:
    return _slope_of(polysoftmax.logsumexp, x)


def _scipy_on_torch() -> Any:
    import os
    import subprocess
    import sys

    # SciPy reads the variable when it is imported, so it is asked in a process of its own.
    program = (
        "import torch; from scipy.special import logsumexp; x = torch.tensor([1000.0, 0.0], requires_grad=True);"
        "logsumexp(x).backward(); print(*x.grad.tolist())"
    )
    environment = {**os.environ, "SCIPY_ARRAY_API": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return [float(one) for one in done.stdout.split()]


def _torch_loss(*, ignored: bool, ours: bool) -> Any:
    import torch

    function = polysoftmax.cross_entropy if ours else torch.nn.functional.cross_entropy
    if ignored:
        return function(torch.tensor([[1.0, 2.0]]), torch.tensor([-1]), ignore_index=-1)
    return function(torch.tensor([[1.0, -INF]]), torch.tensor([[1.0, 0.0]]))


def _torch_second_draw() -> Any:
    import torch

    return torch.multinomial(torch.tensor([1.0, 0.0, 0.0]), 2)[1]


def _jax_draw() -> Any:
    rows = [[-INF, -INF, -INF], [0.0, math.nan, 0.0]]
    return _jax_of(lambda jax, jnp: jax.random.categorical(jax.random.key(0), jnp.asarray(rows)))


def _scipy_softmax(x: Any) -> Any:
    from scipy import special

    return special.softmax(x)


_QUESTIONS: tuple[tuple[str, str, Callable[[], Any], dict[str, Callable[[], Any]]], ...] = (
    (
        "softmax of int8 [-128, 127]",
        "[0, 1]",
        lambda: polysoftmax.softmax(_int8(), dtype=np.float32),
        {
            "scipy": lambda: _scipy_softmax(_int8()),
            "jax": lambda: _jax_of(lambda jax, jnp: jax.nn.softmax(jnp.asarray(_int8()))),
        },
    ),
    (
        "softmax of 70,000 zeros in float16",
        "1.43e-05",
        lambda: polysoftmax.softmax(_zeros())[0],
        {
            "scipy": lambda: _scipy_softmax(_zeros())[0],
            "jax": lambda: _jax_of(lambda jax, jnp: jax.nn.softmax(jnp.asarray(_zeros()))[0]),
        },
    ),
    (
        "gradient of logsumexp at [1000, 0]",
        "[1, 0]",
        lambda: _torch_slope([1000.0, 0.0]),
        {"scipy on torch": _scipy_on_torch},
    ),
    (
        "gradient of logsumexp at a row of -inf",
        "[0, 0]",
        lambda: _torch_slope([-INF, -INF]),
        {
            "jax": lambda: _jax_of(
                lambda jax, jnp: jax.grad(jax.scipy.special.logsumexp)(jnp.asarray([-INF, -INF], jnp.float32))
            ),
            "torch": lambda: _slope_of(lambda x: x.logsumexp(-1), [-INF, -INF]),
        },
    ),
    (
        "cross_entropy, probability 0 on a logit of -inf",
        "0",
        lambda: _torch_loss(ignored=False, ours=True),
        {"torch": lambda: _torch_loss(ignored=False, ours=False)},
    ),
    (
        "cross_entropy, every target ignored",
        "0",
        lambda: _torch_loss(ignored=True, ours=True),
        {"torch": lambda: _torch_loss(ignored=True, ours=False)},
    ),
    (
        "a second draw without replacement from [1, 0, 0]",
        "-1",
        lambda: polysoftmax.sample(np.asarray([0.0, -INF, -INF]), 0, draws=2, replace=False)[1],
        {"torch": _torch_second_draw},
    ),
    (
        "draws from a row of -inf, and from [0, nan, 0]",
        "[-1, -1]",
        lambda: polysoftmax.sample(np.asarray([[-INF, -INF, -INF], [0.0, math.nan, 0.0]]), 0),
        {"jax": _jax_draw},
    ),
)
