"""Machine code on disk, so that a process need not compile what another has compiled.

The cache is a convenience: whatever is wrong with it costs a compilation, and no call fails for it.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from polysoftmax.engines.cuda import _compile
from polysoftmax.engines.cuda._source import source

if TYPE_CHECKING:
    from polysoftmax.engines.cuda._plan import Kernel

_DIGEST: Final = hashlib.sha256().digest_size


def cache_folder() -> Path | None:
    """Return the folder that keeps compiled kernels: ``POLYSOFTMAX_CACHE_DIR``, or one in the user's cache folder.

    None for a user without a home, as containers have them.
    """
    asked = os.environ.get("POLYSOFTMAX_CACHE_DIR")
    if asked:
        return Path(asked)
    variable, usual = ("LOCALAPPDATA", "AppData/Local") if sys.platform == "win32" else ("XDG_CACHE_HOME", ".cache")
    given = os.environ.get(variable)
    try:
        base = Path(given) if given else Path.home() / usual
    except RuntimeError:  # what pathlib says of a user without a home
        return None
    return base / "polysoftmax" / "cuda"


def place_of(kernel: Kernel, arch: int) -> Path | None:
    """Return the file that keeps the machine code of a kernel; None for a user without a cache."""
    folder = cache_folder()
    return folder and folder / f"{kernel.name}-sm_{arch}-{_fingerprint(kernel)}.cubin"


def machine_code(kernel: Kernel, arch: int) -> bytes:
    """Return the machine code of a kernel, from the disk if it has been compiled before."""
    path = place_of(kernel, arch)
    code = _read(path) if path else None
    if code is None:
        code = _compile.compile_kernel(kernel, arch).code
        if path:
            _write(path, code)
    return code


def _read(path: Path) -> bytes | None:
    """Return the machine code in a file; None where there is none, or not what was once written."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    code, digest = content[:-_DIGEST], content[-_DIGEST:]
    return code if hashlib.sha256(code).digest() == digest else None


def _write(path: Path, code: bytes) -> None:
    """Put machine code and its checksum into a file, which appears at once and whole: others may be reading it."""
    # Opened by name, as tempfile would not: the file then has the mode that the user's umask gives.
    unfinished = path.with_name(f"{secrets.token_hex(8)}.unfinished")
    with suppress(OSError):  # a folder that cannot be written to costs the next process a compilation
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            unfinished.write_bytes(code + hashlib.sha256(code).digest())
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)


def _fingerprint(kernel: Kernel) -> str:
    """Tell sources and compilers apart."""
    told = "\0".join([source(kernel), *_compile.OPTIONS, _compile.compiler()])
    return hashlib.sha256(told.encode()).hexdigest()[:16]
