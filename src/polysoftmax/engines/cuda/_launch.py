"""Launches through ``cuda.core``, and of CuPy's own; each kernel is loaded once."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from polysoftmax.engines.cuda import _cache, _compile
from polysoftmax.engines.cuda._source import source

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax.engines.cuda._plan import Kernel, Plan

_loaded: dict[tuple[Any, ...], Any] = {}
_locks: dict[tuple[Any, ...], threading.Lock] = {}


def _load(key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """Return what was made for ``key``. Threads that need the same wait for one; no other thread waits."""
    found = _loaded.get(key)
    if found is None:
        with _locks.setdefault(key, threading.Lock()):
            found = _loaded.get(key)
            if found is None:
                found = _loaded[key] = make()
    return found


def launch(plan: Plan, arch: int, ordinal: int, stream: int, arguments: tuple[int | float, ...]) -> None:
    """Launch a kernel on a stream of a device, both of the caller's library. The caller's context stays current."""
    from cuda.bindings import driver
    from cuda.core import Device, LaunchConfig, ObjectCode, Stream
    from cuda.core import launch as launch_now

    kernel = plan.kernel

    def load() -> Any:
        return ObjectCode.from_cubin(_cache.machine_code(kernel, arch)).get_kernel(kernel.name)

    _, before = driver.cuCtxGetCurrent()
    Device(ordinal).set_current()
    try:
        loaded = _load((kernel, arch, ordinal), load)
        # To make a stream costs more than the launch. Its handle may come back for another device's stream.
        on = _load(("stream", ordinal, stream), lambda: Stream.from_handle(stream))
        # With a cluster, the grid counts clusters.
        cluster = kernel.cluster if kernel.cluster > 1 else None
        config = LaunchConfig(grid=plan.grid, cluster=cluster, block=kernel.block, shmem_size=plan.shared)
        launch_now(on, config, loaded, *arguments)
    finally:
        # Not the device that was current: the context may be another one on it.
        driver.cuCtxSetCurrent(before)


def raw_kernel(cupy: Any, kernel: Kernel, ordinal: int) -> Any:
    """Return a kernel that CuPy compiles, and keeps on disk, itself."""

    def load() -> Any:
        module = cupy.RawModule(code=source(kernel), options=_compile.OPTIONS, backend="nvrtc")
        return module.get_function(kernel.name)

    return _load(("cupy", kernel, ordinal), load)
