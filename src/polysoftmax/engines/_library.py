"""The C++ library: found, loaded and called through ctypes."""

from __future__ import annotations

import os
import sys
import warnings
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import ctypes

_CPU = "POLYSOFTMAX_CPU"
_THREADS = "POLYSOFTMAX_NUM_THREADS"
_NONE = "none"

LEVELS: Final = {"x86-64-v3": 3, "x86-64-v4": 4, "aarch64": 8}
"""The levels of CPU that the library may be compiled for, by the numbers it gives them."""

_FOLDER = os.path.join(os.path.dirname(os.path.dirname(__file__)), "native")
_FILE = os.path.join(_FOLDER, "libpolysoftmax.so")


def _checked(n: object, name: str) -> int:
    if isinstance(n, bool) or not isinstance(n, int):
        msg = f"{name} must be an int, got {type(n).__name__}"
        raise TypeError(msg)
    if n < 1:
        msg = f"{name} must be 1 or greater, got {n}"
        raise ValueError(msg)
    return n


def _from_environment() -> int | None:
    value = os.environ.get(_THREADS)
    if not value:
        return None
    try:
        return _checked(int(value), _THREADS)
    except ValueError as error:
        msg = f"{_THREADS} must be a whole number of threads, 1 or greater, got {value!r}"
        raise ValueError(msg) from error


_asked: int | None = _from_environment()


def set_num_threads(n: int) -> None:
    """Set how many threads a call may use on the CPU, including the caller's.

    Parameters
    ----------
    n : int
        Number of threads, 1 or greater, for every later call in this process. The default is the environment
        variable ``POLYSOFTMAX_NUM_THREADS``, or else the number of CPUs that the process may run on.

    Raises
    ------
    TypeError
        If ``n`` is not an int.
    ValueError
        If ``n`` is less than 1.

    Notes
    -----
    Results do not depend on the number of threads, to the last bit. JAX has threads of its own, which this function
    does not control.

    Examples
    --------
    >>> import polysoftmax
    >>> polysoftmax.set_num_threads(2)
    """
    global _asked
    _asked = _checked(n, "n")
    if _found is not None:
        _found.set_num_threads(_asked)


def num_threads() -> int:
    """Return how many threads a call may use."""
    if _asked is not None:
        return _asked
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def failure(status: int, problem: bytes) -> Exception:
    """Return the exception for a status that is not 0."""
    if status == 1:
        return MemoryError()
    return RuntimeError(f"internal error: the C++ library rejects a problem of {len(problem)} bytes")


class Library:
    """The loaded library, set to one level of CPU."""

    __slots__ = ("_library", "level", "solve")

    def __init__(self, library: ctypes.CDLL, level: str) -> None:
        self.level = level
        self._library = library
        self.solve = library.polysoftmax_run
        """Solve a problem with its addresses, both in 8-byte words, without the interpreter lock; 0 if all is well."""
        # Without argtypes, which take time: ctypes passes the address of a bytes object as it is, zero bytes included.

    def run(self, problem: bytes, addresses: bytes) -> None:
        """Solve a problem, or raise an exception."""
        status = self.solve(problem, addresses)
        if status:
            raise failure(status, problem)

    def set_num_threads(self, n: int) -> None:
        """Set how many threads a problem may use, including the caller's."""
        self._library.polysoftmax_set_threads(n)

    @property
    def compiler(self) -> str:
        """Name and version of the compiler that made the library."""
        import ctypes

        said = self._library.polysoftmax_compiler
        said.restype = ctypes.c_char_p
        return str(said().decode())

    @property
    def num_threads(self) -> int:
        """How many threads a problem may use."""
        return int(self._library.polysoftmax_threads())


_found: Library | None = None
_reason: str | None = None


def load() -> Library | None:
    """Return the library, loaded on the first call, or None; then `reason` says why.

    Raises
    ------
    ValueError
        If ``POLYSOFTMAX_CPU`` names no level, or one that this CPU cannot run.
    OSError
        If there is a library that cannot be loaded.
    """
    global _found, _reason
    # No lock, which a fork could leave locked: threads that get here together load the same library twice, and
    # _reason, which says that all is done, is set last.
    if _reason is None:
        _found, _reason = _look()
    return _found


def reason() -> str:
    """Return why `load` returns None, or an empty string where it returns a library."""
    load()
    return _reason or ""


def _look() -> tuple[Library | None, str]:
    asked = _level_asked_for()
    if asked == _NONE:
        return None, f"{_CPU} is {_NONE!r}"
    if not os.path.exists(_FILE):
        return None, _why_absent()
    if _is_stale():
        _rebuild()
    import ctypes

    library = ctypes.CDLL(_FILE)
    if asked:
        library.polysoftmax_set_level(LEVELS[asked])
    number = library.polysoftmax_level()
    if asked and number != LEVELS[asked]:
        msg = f"{_CPU} is {asked!r}, which this CPU cannot run: leave it unset, or choose a lesser level or {_NONE!r}"
        raise ValueError(msg)
    if not number:
        return None, "this CPU lacks AVX2, FMA or BMI2, which x86-64-v3 means"
    level = next(name for name, value in LEVELS.items() if value == number)
    found = Library(library, level)
    found.set_num_threads(num_threads())
    return found, ""


def _level_asked_for() -> str | None:
    asked = os.environ.get(_CPU) or None
    if asked is not None and asked not in (*LEVELS, _NONE):
        msg = f"{_CPU} must be one of {', '.join((*LEVELS, _NONE))}, got {asked!r}"
        raise ValueError(msg)
    return asked


def _has_sources() -> bool:
    """Whether this is a source tree; wheels hold the headers alone."""
    return os.path.exists(os.path.join(_FOLDER, "kernels.cpp"))


def _why_absent() -> str:
    if _has_sources():
        return "the C++ library is not built in this source tree: `pip install -e .` builds it, given a C++ compiler"
    return "there was no C++ compiler that could build the library when polysoftmax was installed"


def _is_stale() -> bool:
    """Whether the library stands in a source tree and a source is newer."""
    if not _has_sources():
        return False
    sources = (one for one in os.scandir(_FOLDER) if one.name.endswith((".cpp", ".hpp")))
    return max(one.stat().st_mtime_ns for one in sources) > os.stat(_FILE).st_mtime_ns


def _rebuild() -> None:
    """Compile what has changed; an editable installation leaves behind a loader that can."""
    import subprocess

    loader: Any = sys.modules["polysoftmax"].__loader__
    try:
        loader.rebuild()
    except (AttributeError, OSError, subprocess.SubprocessError) as error:  # no such loader, no CMake, bad sources
        msg = f"the C++ library is older than its sources, and was not rebuilt ({error}): pip install -e ."
        warnings.warn(msg, RuntimeWarning, stacklevel=2)
    else:
        os.utime(_FILE)  # nothing was compiled if the newer source is one that the library does not include
