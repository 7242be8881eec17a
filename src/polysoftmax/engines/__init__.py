"""How a row formula is run.

A *row formula* is a pure function of rows, written in array API calls, that stands in one of the formula
files. It never knows how it is run: as it stands, under a compiler, or by a kernel registered for it. What
a library needs for that is one file here.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from polysoftmax._arrays import Array, DType, Rows, cast, float_bits, library, namespace
from polysoftmax.engines._threads import set_num_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["Call", "Explanation", "RowFormula", "engine", "explain", "portable", "set_num_threads"]

ENGINES = ("auto", "portable", "blocks", "fused", "cuda")

FORCED = ("blocks", "fused")
"""Engines on the CPU that run whatever the size; the others leave the CPU to what is fastest."""


class RowFormula:
    """A pure function of rows, with its derivative rules.

    ``function(x, *others, axis, **options)`` takes operands that broadcast against the rows ``x`` (None where
    absent), all floating ones in the compute dtype, and returns something of the shape of ``x`` or with length
    1 along ``axis``, or a tuple of such arrays in dtypes of their own.

    ``jvp(operands, tangents, y, **options)`` and ``vjp(operands, y, cotangent, wanted, **options)`` are its
    derivative rules, for all floating operands; a tangent is None where it is zero. ``from_output`` says that the
    gradient for the rows follows from y, so that they need not be kept for it. ``many_steps`` says that it
    makes many small steps along the last axis, so that several rows should be run together, and never transposed.
    ``composed`` says that it calls other row formulas, each of which is run in a way of its own. ``promotes`` says
    that it combines its rows with nothing that is not wider, so that JAX, which then widens, may give it 16-bit rows.
    """

    __slots__ = ("composed", "from_output", "function", "jvp", "many_steps", "name", "promotes", "vjp")

    def __init__(
        self,
        name: str,
        function: Callable[..., Array],
        *,
        jvp: Callable[..., Array] | None = None,
        vjp: Callable[..., tuple[Array | None, ...]] | None = None,
        from_output: bool = False,
        many_steps: bool = False,
        composed: bool = False,
        promotes: bool = False,
    ) -> None:
        self.name = name
        self.function = function
        self.jvp = jvp
        self.vjp = vjp
        self.from_output = from_output
        self.many_steps = many_steps
        self.composed = composed
        self.promotes = promotes
        FORMULAS[name] = self

    def __call__(
        self, rows: Rows, *operands: Array, result: DType = None, squeeze: bool = False, **options: Any
    ) -> Array:
        """Run the formula on ``rows`` in the way that suits their library; ``squeeze`` drops the axis, of length 1."""
        options["axis"] = rows.axis
        call = Call(self, options, rows.compute, result or rows.result, squeeze)
        return (_RUNNERS.get(type(rows.x)) or _runner(rows.x)).run(call, operands)

    def __repr__(self) -> str:
        return f"<row formula {self.name}>"


FORMULAS: dict[str, RowFormula] = {}


class Call(NamedTuple):
    """A row formula with everything fixed but the arrays."""

    formula: RowFormula
    options: dict[str, Any]
    compute: DType
    result: DType
    squeeze: bool = False

    def widen(self, operands: Sequence[Array]) -> Sequence[Array]:
        """Bring the rows, and every floating array beside them, to the compute dtype."""
        compute = self.compute
        for i, one in enumerate(operands):
            if one is None or isinstance(one, float) or one.dtype == compute:
                continue
            if i == 0 or float_bits(namespace(one), one.dtype):
                operands = [*operands[:i], cast(one, compute), *operands[i + 1 :]]
        return operands

    def evaluate(self, operands: tuple[Array, ...]) -> Any:
        """Run the formula as it stands: the portable engine, and the definition of every other."""
        formula = self.formula
        y = formula.function(*(operands if formula.composed else self.widen(operands)), **self.options)
        # Tiny calls count each step, and as a rule there is nothing to bring.
        is_done = isinstance(y, tuple) or (y.dtype == self.result and not self.squeeze)
        return y if is_done else self.answer(y)

    def answer(self, y: Array) -> Array:
        """Bring what the formula computed to the dtype and shape that were asked for."""
        y = cast(y, self.result)
        return namespace(y).squeeze(y, self.options["axis"]) if self.squeeze else y


class _Runner(Protocol):
    def run(self, call: Call, operands: tuple[Array, ...]) -> Array: ...

    def describe(self, x: Array, name: str) -> tuple[str, str]: ...


class _Portable:
    """Any library of the standard: formulas run as they stand."""

    @staticmethod
    def run(call: Call, operands: tuple[Array, ...]) -> Array:
        return call.evaluate(operands)

    @staticmethod
    def describe(x: Array, name: str) -> tuple[str, str]:
        del name
        return (
            "portable",
            f"the array API formula as it stands; there is no other engine for {library(x).name}",
        )


_RUNNERS: dict[type, _Runner] = {}


def _runner(x: Array) -> _Runner:
    found = _RUNNERS.get(type(x))
    if found is None:
        found = _RUNNERS[type(x)] = _load(library(x).name)
    return found


def _load(name: str) -> _Runner:
    # The caller holds an array of the library, so importing its engine imports no backend anew. Import statements
    # and not importlib, because torch.compile follows these.
    if name in ("numpy", "array_api_strict"):
        from polysoftmax.engines import numpy as numpy_engine

        return numpy_engine
    if name == "jax":
        from polysoftmax.engines import jax as jax_engine

        return jax_engine
    if name == "torch":
        from polysoftmax.engines import torch as torch_engine

        return torch_engine
    if name == "cupy":
        from polysoftmax.engines import cuda as cuda_engine

        return cuda_engine
    return _Portable()


def has_cuda_core() -> bool:
    """Whether ``cuda.core`` is installed, without importing it."""
    return importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.core") is not None


def _known(name: str) -> str:
    if name not in ENGINES:
        msg = f"unknown engine {name!r}: choose one of {', '.join(ENGINES)}"
        raise ValueError(msg)
    if name == "fused" and importlib.util.find_spec("numba") is None:
        msg = 'the engine "fused" needs Numba: pip install polysoftmax[fast]'
        raise ImportError(msg)
    if name == "cuda" and not (has_cuda_core() or importlib.util.find_spec("cupy") is not None):
        msg = 'the engine "cuda" needs cuda.core: pip install polysoftmax[cuda]'
        raise ImportError(msg)
    return name


_FROM_ENVIRONMENT: Final = _known(os.environ.get("POLYSOFTMAX_ENGINE") or "auto")
_CHOICE: ContextVar[str] = ContextVar("polysoftmax.engine", default=_FROM_ENVIRONMENT)


chosen = _CHOICE.get
"""Return the name of the engine that was asked for."""


def portable() -> bool:
    """Whether the caller asked for formulas to run as they stand."""
    return chosen() == "portable"


class chosen_before:  # noqa: N801  # it stands in a ``with`` as a function would
    """Choose an engine again that has been chosen before, inside a ``with`` block."""

    __slots__ = ("name", "token")  # a generator would take twice as long, in every backward pass

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        self.token = _CHOICE.set(self.name)

    def __exit__(self, *_: object) -> None:
        _CHOICE.reset(self.token)


@contextmanager
def engine(name: str) -> Iterator[None]:
    """Choose the engine for the calls inside a ``with`` block.

    Parameters
    ----------
    name : str
        ``"auto"`` picks the fastest engine that meets the accuracy bounds; ``"portable"`` runs the array API
        formulas as they stand. On the CPU, for NumPy and PyTorch, ``"blocks"`` runs them in blocks of rows on
        threads, and ``"fused"`` in Numba kernels as far as there are any, whatever the size; for other libraries
        these two mean "auto". ``"cuda"`` runs PyTorch's CUDA tensors and CuPy's arrays in CUDA kernels, which have not
        yet run on a GPU, as far as there are any; elsewhere it means "auto". The environment variable
        ``POLYSOFTMAX_ENGINE`` sets the choice outside any block.

    Raises
    ------
    ValueError
        If there is no engine of that name.
    ImportError
        If ``"fused"`` is asked for and Numba is not installed, or ``"cuda"`` and neither cuda.core nor CuPy is.

    Notes
    -----
    The choice is a context variable: threads and asynchronous tasks do not see each other's. An engine is
    an optimisation and nothing else; answers agree to the bounds of the numerics page.

    Examples
    --------
    >>> import numpy as np
    >>> import polysoftmax
    >>> with polysoftmax.engine("portable"):
    ...     polysoftmax.softmax(np.zeros(4))
    array([0.25, 0.25, 0.25, 0.25])
    """
    with chosen_before(_known(name)):
        yield


@dataclass(frozen=True)
class Explanation:
    """Which engine would run an operation on an array, and why."""

    op: str
    library: str
    dtype: str
    shape: tuple[int, ...]
    engine: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op} of a {self.library} array, {self.dtype}{list(self.shape)}: {self.engine} ({self.reason})"


def explain(x: Array, op: str) -> Explanation:
    """Say which engine would run an operation on an array, and why.

    Parameters
    ----------
    x : array
        The input, of any shape. It is not computed with.
    op : str
        Name of a row formula, such as ``"softmax"`` or ``"cross_entropy"``.

    Returns
    -------
    Explanation
        Its fields are ``op``, ``library``, ``dtype``, ``shape``, ``engine`` and ``reason``; ``str`` of it is
        one line to read.

    Raises
    ------
    ValueError
        If there is no such operation.
    TypeError
        If ``x`` is not an array.

    Examples
    --------
    >>> import numpy as np
    >>> import polysoftmax
    >>> polysoftmax.explain(np.zeros((2, 3)), "softmax").engine
    'portable'
    """
    found = library(x)
    if op not in FORMULAS:
        msg = f"unknown operation {op!r}: choose one of {', '.join(sorted(FORMULAS))}"
        raise ValueError(msg)
    name, reason = _runner(x).describe(x, op)
    if portable() and name != "portable":
        name, reason = "portable", 'asked for by engine("portable") or POLYSOFTMAX_ENGINE'
    return Explanation(op, found.name, str(x.dtype), tuple(x.shape), name, reason)
