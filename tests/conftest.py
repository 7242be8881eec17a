"""The one fixture of the test matrix: a backend, a way of running it, an engine; and which of them run where."""

from __future__ import annotations

import ctypes
import functools
import gc
import itertools
import os
import sys
import tempfile
from typing import TYPE_CHECKING

import pytest

# JAX would take three quarters of a GPU's memory with its first array, and leave the others too little.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from polysoftmax.testing import Adapter, Backend, missing, open_backend, reference
from polysoftmax.testing._libraries import forget_programs
from tests.quick_programs import compile_quickly

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_ASKED = "POLYSOFTMAX_TEST_BACKENDS"

_CONTRACT = "test_contract"
"""The one file of tests that runs everywhere: each backend in each engine and dtype."""

_EVERYTHING = os.environ.get("POLYSOFTMAX_TEST_WORK") == "all"
"""Whether every backend runs in every file and dtype, which takes hours."""

_FUNCTIONS = (
    "derivatives",
    "edges",
    "log_prob",
    "loss_derivatives",
    "losses",
    "sampling",
    "sampling_calls",
    "truncation",
)

_FILES = {
    # The same calls as in 2024.12, whose standard has fewer functions.
    Backend.STRICT_2025: {_CONTRACT},
    # A write to an input is found on every backend; here, memory that is taken to be writable.
    Backend.NUMPY_READONLY: {_CONTRACT, "test_losses", "test_sampling", "test_sampling_calls", "test_truncation"},
    # All but laws and peers, which are about the formulas' numbers; these are those of NumPy, a graph for each call.
    Backend.DASK: {_CONTRACT, "test_accuracy", "test_dtypes", *(f"test_{name}" for name in _FUNCTIONS)},
    # Each call plans and writes files; the words are Dask's, without an order.
    Backend.CUBED: {_CONTRACT},
    Backend.MLX: {_CONTRACT, "test_accuracy", "test_random", *(f"test_{name}" for name in _FUNCTIONS)},
    # The programs of `jax` in float64, whose second derivatives have tests of their own, and 64-bit integers.
    Backend.JAX_X64: {_CONTRACT, "test_accuracy", "test_random", "test_sampling"},
    # As for Dask; the numbers are those of eager PyTorch, to the bit, as test_torch_compiled.py has it.
    Backend.TORCH_COMPILE: {_CONTRACT, "test_random", *(f"test_{name}" for name in _FUNCTIONS)},
}
"""The files of tests that a backend runs in, where another backend runs the same code in the rest."""

_DTYPES = {
    # In both dtypes the graph is of NumPy's operations.
    Backend.DASK: ("float32",),
    Backend.CUBED: ("float32",),
    # 16 bits where a compiler may leave their roundings out; for PyTorch's, see test_torch_programs.py.
    Backend.JAX: ("float32",),
    Backend.JAX_FUSED: ("bfloat16",),
    Backend.JAX_X64: ("float64",),
    Backend.TORCH_COMPILE: ("float32",),
}
"""The dtypes of a test outside the contract, where each is a graph or a compilation of a second or more.

A test that takes no dtype takes the default, float32.
"""

_AS_USERS_RUN_THEM = {
    _CONTRACT,
    "test_accuracy",
    "test_confident",
    "test_work_before",
}
"""The files whose JAX programs are compiled as users' are: they test numbers, and what a compiler makes of them.

Elsewhere shapes, rules and errors are tested, and JAX's programs do without what LLVM does for their speed.
"""

_FUSED_DTYPES = {"test_accuracy": ("float32", "bfloat16"), "test_confident": ("float32",)}
"""Where float32 matters, as a product is contracted with what follows."""


_OPTIONAL = {Backend.CUBED, Backend.MLX}
"""Backends that `make test` does not install."""


def _is_left_out(backend: Backend) -> bool:
    return (backend.capability.gpu or backend in _OPTIONAL) and missing(backend) is not None


def _runs_in(backend: Backend, engine: str, file: str, *, op_by_op: bool) -> bool:
    # A library that compiles compiles a formula whole; one operation after another, each is a compilation.
    if backend.capability.compiles and engine == "portable":
        return file == _CONTRACT and (op_by_op or _EVERYTHING)
    return _EVERYTHING or file in _FILES.get(backend, {file})


def _dtypes_in(backend: Backend, file: str) -> tuple[str, ...]:
    if _EVERYTHING or file == _CONTRACT:
        return backend.capability.dtypes
    if backend is Backend.JAX_FUSED and file in _FUSED_DTYPES:
        return _FUSED_DTYPES[file]
    return _DTYPES.get(backend, backend.capability.dtypes)


def _asked() -> list[Backend]:
    names = [name.strip() for name in os.environ.get(_ASKED, "").split(",") if name.strip()]
    known = {one.value: one for one in Backend}
    unknown = sorted(set(names) - set(known))
    if unknown:
        msg = f"{_ASKED} names {', '.join(unknown)}: choose from {', '.join(known)}"
        raise pytest.UsageError(msg)
    return [known[name] for name in names]


@functools.cache
def _backends() -> list[Backend]:
    """Return what is asked for, or else every backend but those of a GPU or a library that is not here."""
    return _asked() or [one for one in Backend if not _is_left_out(one)]


def _share_programs_of_jax(config: pytest.Config) -> None:
    """Keep JAX's programs in a folder that workers and subprocesses share, as each worker forgets its own with a file.

    They are XLA's own, read back: nothing is computed in another way. The folder goes with the run, but for one that
    JAX_COMPILATION_CACHE_DIR names.
    """
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = tempfile.TemporaryDirectory(prefix="polysoftmax-tests-", ignore_cleanup_errors=True)
    config.add_cleanup(folder.cleanup)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "backends(keep): on which backends a test runs, as a function of Capability")
    config.addinivalue_line("markers", "enough(keep): where it need not run, as another test runs the same code there")
    config.addinivalue_line("markers", "op_by_op: also where each operation is a compilation: on JAX without an engine")
    _share_programs_of_jax(config)
    asked = _asked()
    if asked and all(one.capability.gpu for one in asked):
        absent = list(filter(None, map(missing, asked)))
        if len(absent) == len(asked):
            pytest.exit(f"these tests need a GPU: {'; '.join(absent)}", 2)


def pytest_report_header() -> str | None:
    absent = [one for one in Backend if _is_left_out(one)]
    return None if _asked() or not absent else f"no tests of: {'; '.join(map(str, map(missing, absent)))}"


def pytest_collection_finish() -> None:
    _collect_garbage()
    # Tracers make so many objects that looking for garbage among them would take a twentieth of the time.
    gc.set_threshold(100_000, 20, 50)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave the tests of the kernels on a GPU out where there is none; named on the command line, they are skipped."""
    has_gpu = collection_path.name != "test_gpu.py" or any(one.capability.gpu for one in _backends())
    return None if has_gpu else True


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test that takes `lib` each backend in each of its engines, and one that takes `dtype` its dtypes."""
    if "lib" not in metafunc.fixturenames:
        return
    names = ("backends",) if _EVERYTHING else ("backends", "enough")
    keep = [mark.args[0] for name in names for mark in metafunc.definition.iter_markers(name)]
    op_by_op = metafunc.definition.get_closest_marker("op_by_op") is not None
    with_dtype = "dtype" in metafunc.fixturenames
    file = metafunc.module.__name__.rpartition(".")[2]
    params = []
    for backend in _backends():
        can = backend.capability
        if not all(one(can) for one in keep):
            continue
        marks = [pytest.mark.gpu] if can.gpu else []
        dtypes = _dtypes_in(backend, file)
        for engine in can.engines:
            if not _runs_in(backend, engine, file, op_by_op=op_by_op):
                continue
            for dtype in dtypes if with_dtype else ("",):
                values = ((backend, engine), dtype) if with_dtype else ((backend, engine),)
                name = "-".join(filter(None, (backend.value, engine, dtype)))
                params.append(pytest.param(*values, id=name, marks=marks))
    metafunc.parametrize(("lib", "dtype") if with_dtype else ("lib",), params, indirect=["lib"])


def _collect_garbage() -> None:
    gc.collect()
    # What is left is as good as the modules of PyTorch and JAX alone, to look through which takes half a second.
    gc.freeze()


def _forget_compiled_code() -> None:
    forget_programs()
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
    _collect_garbage()
    if sys.platform == "linux":
        # The C library would keep what was freed; musl has no such function.
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)


@pytest.fixture(autouse=True, scope="module")
def _programs_of_a_file(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let programs go with the file that they were compiled for: all of them take 5 GB."""
    file = request.module.__name__.rpartition(".")[2]
    # A part of the suite may import JAX later, with its first test.
    has_jax = "jax" in sys.modules or any(one.library == "jax" and not missing(one) for one in _backends())
    with pytest.MonkeyPatch.context() as patch:
        if has_jax and not _EVERYTHING and file not in _AS_USERS_RUN_THEM:
            compile_quickly(patch)
        yield
    reference.cache_clear()
    _forget_compiled_code()


@pytest.fixture(scope="session")
def everything() -> bool:
    """Whether tests shall do what another test has shown of the same code, too."""
    return _EVERYTHING


_COMPILING = itertools.count(1)


@pytest.fixture
def lib(request: pytest.FixtureRequest) -> Iterator[Adapter]:
    """An open backend, in an engine. Keep to those that can do what a test needs with ``@pytest.mark.backends``.

    The mark takes a function of `polysoftmax.testing.Capability`. So does ``@pytest.mark.enough``, for the sake of time
    alone: POLYSOFTMAX_TEST_WORK=all runs the test on the other backends, too.
    """
    backend, engine = request.param
    absent = missing(backend, engine)
    if absent and backend in _asked():
        pytest.fail(f"{_ASKED} asks for {backend.value}: {absent}")
    if absent:
        pytest.skip(absent)
    with open_backend(backend, engine) as adapter:
        yield adapter
    if backend.capability.compiles and next(_COMPILING) % 16 == 0:  # each may take 50 MB
        _forget_compiled_code()
