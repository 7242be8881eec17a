"""How each library's own keys and generators become two 32-bit words, and how words move between libraries."""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING, Any

from polysoftmax._arrays import Array, are_apart, device_for, library

if TYPE_CHECKING:
    from collections.abc import Callable


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    import jax

    return jax.jit(function)  # type: ignore[no-any-return]


def jitted(function: Callable[..., Any], *arrays: Array) -> Any:
    """Call a function of many small steps, which JAX compiles into one."""
    return (_compiled(function) if library(arrays[0]).name == "jax" else function)(*arrays)


def drawn_words(source: object) -> Array | None:
    """Draw two words from a NumPy, PyTorch or CuPy generator, as int32; None for anything else."""
    numpy, torch, cupy = (sys.modules.get(name) for name in ("numpy", "torch", "cupy"))
    if numpy is not None and isinstance(source, numpy.random.Generator):
        _require_no_trace(_trace_of_torch() or _trace_of_jax())
        return source.integers(0, 1 << 32, size=2, dtype=numpy.uint32).view(numpy.int32)
    if torch is not None and isinstance(source, torch.Generator):
        _require_no_trace(_trace_of_jax())  # PyTorch records the draws from its own
        return torch.randint(-(1 << 31), 1 << 31, (2,), generator=source, dtype=torch.int32, device=source.device)
    if cupy is not None and isinstance(source, cupy.random.Generator):
        _require_no_trace(_trace_of_torch() or _trace_of_jax())
        return source.integers(0, 1 << 32, size=2, dtype=cupy.uint32).view(cupy.int32)
    return None


def _require_no_trace(where: str) -> None:
    if where:
        msg = f"a generator would be drawn from once and for all inside {where}: pass polysoftmax.random.key(seed)"
        raise TypeError(msg)


def _trace_of_torch() -> str:
    """Return what PyTorch traces, or runs for a whole batch; an empty string where Python runs at every call."""
    torch = sys.modules.get("torch")
    if torch is None:
        return ""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return "torch.compile, torch.export or torch.jit.trace"
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return "torch.func.vmap" if torch._C._functorch.TransformType.Vmap in [one.key() for one in levels] else ""


def _trace_of_jax() -> str:
    """Return what JAX traces, or runs for a whole batch; an empty string where Python runs at every call."""
    if "jax" not in sys.modules:
        return ""
    from jax._src.core import eval_trace, trace_ctx  # JAX has no public question that vmap answers, too

    trace = trace_ctx.trace
    while type(trace).__name__ in ("JVPTrace", "LinearizeTrace"):  # derivatives run Python at every call
        trace = trace.parent_trace
    return "" if trace is eval_trace else "jax.jit, jax.vmap or another of JAX's transformations"


def words_of(numbers: list[int], xp: Any, device: Any) -> Array:
    """Return signed numbers as words."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.compiler.is_compiling() and xp.__name__ == "array_api_compat.torch":
        from polysoftmax.engines import _operator

        return _operator.words_of(numbers, device)
    return xp.asarray(numbers, dtype=xp.int32, device=device)


def key_data(key: Array) -> Array:
    """Return the words of one of JAX's typed keys; any other array as it is."""
    if library(key).name == "jax":
        import jax

        if jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
            return jax.random.key_data(key)
    return key


def to_library_of(words: Array, x: Array) -> Array:
    """Move words to the library and device of ``x``: the one place where arrays of two libraries may meet."""
    here, there = library(words), library(x)
    if here.xp is not there.xp:
        words = there.xp.asarray(_host(words, here.name), device=device_for(x))
    elif there.name == "torch" and words.device != x.device:
        words = words.to(x.device)
    elif there.name == "array_api_strict":
        words = words.to_device(x.device)
    elif there.name == "jax" and are_apart(words, x):
        words = there.xp.asarray(_host(words, here.name))
    return words


def _host(words: Array, name: str) -> Any:
    """Return words as a NumPy array."""
    import numpy as np

    if name == "torch":
        words = words.cpu().numpy()
    elif name == "cupy":
        words = words.get()
    return np.array(words)
