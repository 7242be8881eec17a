"""How JAX compiles a program of derivatives that runs once: nearly all of its time is spent in the compiler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""XLA's own operations, without what LLVM does for their speed."""


def run_once(function: Callable[..., Any], *arrays: Any) -> Any:
    """Run a function of JAX's arrays as one program: eagerly, each of its steps would be one to compile."""
    import jax

    return jax.jit(function).lower(*arrays).compile(compiler_options=QUICKLY)(*arrays)
