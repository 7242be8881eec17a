"""Kernels from source to launch: compiled by NVRTC, kept on disk and in memory, launched through ``cuda.core``.

Nothing here needs a driver but the launch itself.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import re
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from polysoftmax.engines.cuda._plan import Machine
from polysoftmax.engines.cuda._source import source

if TYPE_CHECKING:
    from polysoftmax.engines.cuda._plan import Kernel, Plan

CLUSTERS_SINCE: Final = 90
"""Compute capability that first had thread block clusters."""

OLDEST: Final = 80
"""Compute capability that first rounded to bfloat16 in an instruction."""

_OPTIONS: Final = ("--std=c++17", "--diag-suppress=128,177")
"""The suppressed remarks: a loop of no steps, and a constant that one kernel has no use for."""


def machine_of(arch: int, processors: int, *, clusters: bool) -> Machine:
    """Return what layouts depend on for a compute capability; ``clusters`` says whether they can be launched."""
    if arch < OLDEST:
        msg = f"the device has compute capability {arch / 10}, and the kernels need {OLDEST / 10}"
        raise ImportError(msg)
    return Machine(processors, clusters and arch >= CLUSTERS_SINCE)


class Compiled(NamedTuple):
    """Machine code, and what the assembler says of it."""

    code: bytes
    registers: int
    spilled: int


def compile_kernel(kernel: Kernel, arch: int) -> Compiled:
    """Compile a kernel for a compute capability such as 90."""
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(arch=f"sm_{arch}", std="c++17", diag_suppress=[128, 177], ptxas_options=["-v"])
    log = io.StringIO()
    code = Program(source(kernel), "c++", options).compile("cubin", logs=log).code
    spilled = sum(map(int, re.findall(r"(\d+) bytes spill", log.getvalue())))
    registers = max(map(int, re.findall(r"Used (\d+) registers", log.getvalue())), default=0)
    return Compiled(bytes(code), registers, spilled)


def cache_folder() -> Path:
    """Return the folder that keeps compiled kernels: ``POLYSOFTMAX_CACHE_DIR``, or one in the user's cache folder."""
    asked = os.environ.get("POLYSOFTMAX_CACHE_DIR")
    if asked:
        return Path(asked)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "polysoftmax" / "cuda"


def machine_code(kernel: Kernel, arch: int) -> bytes:
    """Return the machine code of a kernel, from the disk if it has been compiled before."""
    path = cache_folder() / f"{kernel.name}-sm_{arch}-{_fingerprint(kernel)}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        code = compile_kernel(kernel, arch).code
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Other processes may be reading and writing: the file appears at once and whole.
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code)
        os.replace(file.name, path)
    except OSError:  # a folder that cannot be written to costs the next process a compilation
        pass
    return code


def _fingerprint(kernel: Kernel) -> str:
    """Tell sources and compilers apart."""
    return hashlib.sha256("\0".join([source(kernel), *_OPTIONS, _compiler()]).encode()).hexdigest()[:16]


@functools.cache
def _compiler() -> str:
    from cuda.bindings import nvrtc

    return "nvrtc {1}.{2}".format(*nvrtc.nvrtcVersion())


_lock = threading.Lock()
_loaded: dict[tuple[Any, ...], Any] = {}


def _load(key: tuple[Any, ...], make: Any) -> Any:
    """Return what was made for ``key``; each is made once, whatever the threads."""
    found = _loaded.get(key)
    if found is None:
        with _lock:
            found = _loaded.get(key)
            if found is None:
                found = _loaded[key] = make()
    return found


def launch(plan: Plan, arch: int, ordinal: int, stream: int, arguments: tuple[int | float, ...]) -> None:
    """Launch a kernel on a stream of a device, both of the caller's library."""
    from cuda.core import Device, LaunchConfig, ObjectCode, Stream
    from cuda.core import launch as launch_now

    Device(ordinal).set_current()
    kernel = plan.kernel

    def load() -> Any:
        return ObjectCode.from_cubin(machine_code(kernel, arch)).get_kernel(kernel.name)

    loaded = _load((kernel, arch, ordinal), load)
    # To make a stream costs more than the launch. Its handle may come back for another device's stream.
    on = _load(("stream", ordinal, stream), lambda: Stream.from_handle(stream))
    # With a cluster, the grid counts clusters.
    cluster = kernel.cluster if kernel.cluster > 1 else None
    config = LaunchConfig(grid=plan.grid, cluster=cluster, block=kernel.block, shmem_size=plan.shared)
    launch_now(on, config, loaded, *arguments)


def raw_kernel(cupy: Any, kernel: Kernel, ordinal: int) -> Any:
    """Return a kernel that CuPy compiles, and keeps on disk, itself."""

    def load() -> Any:
        return cupy.RawModule(code=source(kernel), options=_OPTIONS, backend="nvrtc").get_function(kernel.name)

    return _load(("cupy", kernel, ordinal), load)
