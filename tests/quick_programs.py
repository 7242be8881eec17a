"""How JAX compiles programs whose speed is not tested: most of the time of most tests is spent in its compiler."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

QUICKLY = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
"""XLA's own operations, without what LLVM and MLIR do for their speed: a fifth of the time."""

if find_spec("jaxlib") and tuple(map(int, version("jaxlib").split(".")[:3])) < (0, 11, 1):
    QUICKLY["xla_cpu_use_fusion_emitters"] = False  # later versions have no others, and refuse the option

FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICKLY.items())
"""The same as XLA_FLAGS of a subprocess; a process reads them once."""


def run_once(function: Callable[..., Any], *arrays: Any) -> Any:
    """Run a function of JAX's arrays as one program: eagerly, each of its steps would be one to compile."""
    import jax

    return jax.jit(function).lower(*arrays).compile(compiler_options=QUICKLY)(*arrays)


def compile_quickly(patch: pytest.MonkeyPatch) -> None:
    """Compile every program of JAX in this way; its configuration has a name for the first two options alone."""
    from jax._src import compiler

    options_of = compiler.get_compile_options

    def get_compile_options(*args: Any, env_options_overrides: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        return options_of(*args, env_options_overrides={**QUICKLY, **(env_options_overrides or {})}, **kwargs)

    patch.setattr(compiler, "get_compile_options", get_compile_options)
