"""How row formulas are run: one file a library, with its words and its ways, and the choice among engines.

"auto" runs native kernels on the CPU for NumPy and PyTorch, CUDA kernels on the GPUs where they have been tested,
``jax.jit`` around eager calls of JAX, and everything else as it stands. Formulas know nothing of this.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import warnings
from contextlib import ContextDecorator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

from polysoftmax import _formula
from polysoftmax._arrays import Array, library
from polysoftmax._linear import Heads, WholeHeads
from polysoftmax._losses import CROSS_ENTROPY, ENTROPY, KL_DIVERGENCE
from polysoftmax._ops import Ops, ops_of
from polysoftmax._probability import LOG_PROB, TOP_LOG_PROBS
from polysoftmax._sampling import GUMBEL_SOFTMAX, SAMPLE
from polysoftmax._softmax import LOG_SOFTMAX, LOGSUMEXP, SOFTMAX
from polysoftmax._truncation import TRUNCATE
from polysoftmax.engines import _library
from polysoftmax.engines._library import set_num_threads

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax._formula import Call, RowFormula, Runner

__all__ = ["Explanation", "engine", "explain", "portable", "set_num_threads"]

ENGINES = ("auto", "portable", "native", "cuda")

FORMULAS: Final = {
    one.name: one
    for one in (
        *(SOFTMAX, LOG_SOFTMAX, LOGSUMEXP, CROSS_ENTROPY, ENTROPY, KL_DIVERGENCE),
        *(TRUNCATE, SAMPLE, LOG_PROB, TOP_LOG_PROBS, GUMBEL_SOFTMAX),
    )
} | {
    f"{one.name}_{product}": derive((True, False, False))
    for one in (SOFTMAX, LOG_SOFTMAX)
    for product, derive in (("jvp", one.pushforward), ("vjp", one.pullback))
}
"""What `explain` knows, by the names of the public functions."""


@dataclass(frozen=True)
class _Portable:
    """A library of the standard whose formulas run as they stand, in words of its own if it has some."""

    kind: type[Ops] = Ops
    heads: Heads = field(default_factory=Heads)

    def words(self, x: Array, axis: int) -> Ops:
        return ops_of(self.kind, library(x).xp, axis)

    def run(self, call: Call, operands: tuple[Array, ...]) -> Any:
        return call.evaluate(self.words(operands[0], call.axis), operands)

    @staticmethod
    def explain(x: Array, formula: RowFormula) -> tuple[str, str]:
        del formula
        return "portable", f"the array API formula as it stands; there is no other engine for {library(x).name}"


def _load(x: Array) -> Runner:
    # The caller holds an array of the library, so importing its engine imports no backend anew. Import statements
    # and not importlib, because torch.compile follows these.
    name = library(x).name
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
    if name == "dask":
        from polysoftmax.engines import dask as dask_engine

        return dask_engine
    if name == "cubed":
        from polysoftmax.engines.cubed import CubedOps

        return _Portable(CubedOps, WholeHeads())
    if name == "mlx":
        from polysoftmax.engines.mlx import MlxOps

        return _Portable(MlxOps)
    if name == "ndonnx":
        from polysoftmax.engines.ndonnx import NdonnxOps

        return _Portable(NdonnxOps, WholeHeads())
    return _Portable()


_formula.use(_load)


CUDA_REMEDY: Final = "pip install 'cuda-core<2' 'cuda-bindings<14' 'nvidia-cuda-nvrtc<14'"


def has_cuda_core() -> bool:
    """Whether ``cuda.core`` is installed, without importing it."""
    return importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.core") is not None


@functools.cache  # the look takes far longer than a call
def _can_launch() -> bool:
    return has_cuda_core() or importlib.util.find_spec("cupy") is not None


def _known(name: str) -> str:
    if name not in ENGINES:
        msg = f"unknown engine {name!r}: choose one of {', '.join(ENGINES)}"
        raise ValueError(msg)
    if name == "native" and _library.load() is None:
        msg = f'the engine "native" cannot run: {_library.reason()}'
        raise ImportError(msg)
    if name == "cuda" and not _can_launch():
        msg = f'the engine "cuda" needs cuda.core: {CUDA_REMEDY}'
        raise ImportError(msg)
    return name


_VARIABLE: Final = "POLYSOFTMAX_ENGINE"


def _from_environment() -> str:
    try:
        return _known(os.environ.get(_VARIABLE) or "auto")
    except (ValueError, ImportError) as error:
        msg = f"{_VARIABLE} is set to {os.environ[_VARIABLE]!r}: {error}"
        raise type(error)(msg) from None


_FROM_ENVIRONMENT: Final = _from_environment()
_CHOICE: ContextVar[str] = ContextVar("polysoftmax.engine", default=_FROM_ENVIRONMENT)


chosen = _CHOICE.get
"""Return the name of the engine that was asked for."""


def portable() -> bool:
    """Whether the caller asked for formulas to run as they stand."""
    return chosen() == "portable"


class using:  # noqa: N801  # it stands in a ``with`` as a function would
    """Set the engine inside a ``with`` block of this package's own, which ends before any that it stands in."""

    __slots__ = ("before", "name")  # a generator would take twice as long, in every backward pass

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        self.before = chosen()
        _CHOICE.set(self.name)

    def __exit__(self, *_: object) -> None:
        _CHOICE.set(self.before)


_OPEN: ContextVar[tuple[_Block, ...]] = ContextVar("polysoftmax.engines", default=())
"""The blocks of callers that have not ended, the innermost last."""

Function = TypeVar("Function", bound="Callable[..., Any]")

_GENERATOR_OR_COROUTINE = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR


class _Block(ContextDecorator):
    """A choice of the caller's, for a ``with`` block or for the calls of a function.

    Blocks in generators and exit stacks may end in any order: the last to begin of those that are left decides.
    """

    __slots__ = ("before", "is_used", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_used = False
        self.before = ""  # the choice without this block, of the one that began first

    def __call__(self, function: Function) -> Function:
        self.is_used = True
        if getattr(getattr(function, "__code__", None), "co_flags", 0) & _GENERATOR_OR_COROUTINE:
            msg = f"{function.__name__} only runs after the call, outside the engine: use a `with` block inside it"
            raise TypeError(msg)
        return super().__call__(function)

    def _recreate_cm(self) -> _Block:
        return _Block(self.name)  # a function that is decorated may call itself

    def __enter__(self) -> None:
        self.is_used = True
        blocks = _OPEN.get()
        if not blocks:
            self.before = chosen()
        _OPEN.set((*blocks, self))
        _CHOICE.set(self.name)

    def __exit__(self, *_: object) -> None:
        blocks = _OPEN.get()
        if blocks == (self,):
            _OPEN.set(())
            _CHOICE.set(self.before)
        elif self in blocks:  # another context, such as that of a thread, has blocks of its own
            at = len(blocks) - 1 - blocks[::-1].index(self)
            left = blocks[:at] + blocks[at + 1 :]
            if left and at == 0:
                left[0].before = self.before
            _OPEN.set(left)
            _CHOICE.set(left[-1].name if left else self.before)

    def __del__(self) -> None:
        if not self.is_used:
            msg = f'engine("{self.name}") chooses nothing by itself: use it in a `with` statement, or as a decorator'
            warnings.warn(msg, RuntimeWarning, stacklevel=2)


def engine(name: str) -> _Block:
    """Choose the engine for the calls inside a ``with`` block.

    Parameters
    ----------
    name : str
        ``"auto"`` picks the fastest engine that meets the accuracy bounds. ``"portable"`` runs the array API formulas
        as they stand. ``"native"`` is what "auto" picks for NumPy and for PyTorch on the CPU, and an error where there
        is no native library. ``"cuda"`` runs PyTorch's CUDA tensors and CuPy's arrays in CUDA kernels, as far as there
        are any, on GPUs on which they have not been tested, too; elsewhere it means "auto". The environment variable
        ``POLYSOFTMAX_ENGINE`` sets the choice outside any block.

    Raises
    ------
    ValueError
        If there is no engine of that name.
    ImportError
        If ``"native"`` is asked for and there is no native library, or ``"cuda"`` and neither cuda.core nor CuPy.

    Notes
    -----
    The choice is a context variable: threads and asynchronous tasks do not see each other's. Blocks may end in any
    order. A generator has no context of its own: while it waits inside a block, its caller has the same choice, so let
    the block end before each ``yield``. `engine` is also a decorator of functions, and chooses nothing by itself, which
    is a ``RuntimeWarning``. An engine is an optimisation and nothing else; answers agree to the bounds of the numerics
    page.

    Examples
    --------
    >>> import numpy as np
    >>> import polysoftmax
    >>> with polysoftmax.engine("portable"):
    ...     polysoftmax.softmax(np.zeros(4))
    array([0.25, 0.25, 0.25, 0.25])
    """
    return _Block(_known(name))


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
        Name of a function, such as ``"softmax"`` or ``"cross_entropy"``.

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
    >>> with polysoftmax.engine("portable"):
    ...     polysoftmax.explain(np.zeros((2, 3)), "softmax").engine
    'portable'
    """
    found = library(x)
    if op not in FORMULAS:
        msg = f"unknown operation {op!r}: choose one of {', '.join(sorted(FORMULAS))}"
        raise ValueError(msg)
    name, reason = _formula.runner(x).explain(x, FORMULAS[op])
    if portable() and name != "portable":
        name, reason = "portable", 'asked for by engine("portable") or POLYSOFTMAX_ENGINE'
    return Explanation(op, found.name, str(x.dtype), tuple(x.shape), name, reason)
