"""Launches through the driver, and of CuPy's own; each kernel is loaded once."""

from __future__ import annotations

import ctypes
import struct
import threading
from typing import TYPE_CHECKING, Any

from polysoftmax.engines.cuda import _cache, _compile
from polysoftmax.engines.cuda._plan import USUAL_SHARED
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


def launch(plan: Plan, arch: int, ordinal: int, stream: int, arguments: list[int | float]) -> None:
    """Launch a kernel on a stream of a device, both of the caller's library. The caller's context stays current."""
    key = (plan.kernel, arch, ordinal)
    found = _loaded.get(key) or _load(key, lambda: _Launcher(*key))
    found.launch(plan, stream, arguments)


class _Launcher:
    """A kernel in the memory of a device, and what it takes to launch it.

    Through the driver and not through ``cuda.core``, which makes the configuration and the arguments' memory anew for
    each launch.
    """

    def __init__(self, kernel: Kernel, arch: int, ordinal: int) -> None:
        from cuda.bindings import driver
        from cuda.core import Device, ObjectCode

        self.driver, self.kernel, self.ordinal = driver, kernel, ordinal
        self.follows = kernel.follows and arch >= _compile.CLUSTERS_SINCE
        before = self._current()
        Device(ordinal).set_current()
        try:
            # Kept, since the driver unloads the kernel with it.
            self.loaded = ObjectCode.from_cubin(_cache.machine_code(kernel, arch)).get_kernel(kernel.name)
            self.function = driver.CUfunction(int(self.loaded.handle))
            self.context = self._current()
        finally:
            driver.cuCtxSetCurrent(before)
        self.address = int(self.context)
        self.unused: list[_Frame] = []
        self.shared = USUAL_SHARED

    def launch(self, plan: Plan, stream: int, arguments: list[int | float]) -> None:
        """Launch the kernel with its arguments, each of which takes eight bytes."""
        before = self._current()
        if int(before) == self.address:
            self._launch(plan, stream, arguments)
            return
        self._check(self.driver.cuCtxSetCurrent(self.context)[0], "make a context current")
        try:
            self._launch(plan, stream, arguments)
        finally:
            # Not the device that was current: the context may be another one on it.
            self.driver.cuCtxSetCurrent(before)

    def _launch(self, plan: Plan, stream: int, arguments: list[int | float]) -> None:
        try:
            frame = self.unused.pop()
        except IndexError:  # the first launch, or others are being made
            frame = _Frame(self.driver, self.kernel, arguments, follows=self.follows)
        if plan.shared > self.shared:
            self._allow(plan.shared)
        frame.set(plan, stream, arguments)
        (status,) = self.driver.cuLaunchKernelEx(frame.config, self.function, frame.pointers, 0)
        self.unused.append(frame)
        if status:
            self._check(status, f"launch {self.kernel.name}")

    def _allow(self, shared: int) -> None:
        """Let a block have more shared memory than it may without asking."""
        kind = self.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        kernel, device = self.driver.CUkernel(int(self.loaded.handle)), self.driver.CUdevice(self.ordinal)
        (status,) = self.driver.cuKernelSetAttribute(kind, shared, kernel, device)
        self._check(status, f"give a block of {self.kernel.name} {shared} bytes of shared memory")
        self.shared = shared

    def _current(self) -> Any:
        status, context = self.driver.cuCtxGetCurrent()
        if status:
            self._check(status, "tell the current context")
        return context

    def _check(self, status: Any, what: str) -> None:
        """Raise an exception with the driver's name for an error."""
        if status:
            _, name = self.driver.cuGetErrorName(status)
            msg = f"the driver could not {what}: {name.decode() if name else status}"
            raise RuntimeError(msg)


class _Frame:
    """Memory for one launch at a time: the arguments, their addresses and the configuration."""

    def __init__(self, driver: Any, kernel: Kernel, arguments: list[int | float], *, follows: bool) -> None:
        self.pack = struct.Struct("".join(["d" if isinstance(one, float) else "q" for one in arguments])).pack_into
        self.words = ctypes.create_string_buffer(8 * len(arguments))
        start = ctypes.addressof(self.words)
        self.addresses = (ctypes.c_void_p * len(arguments))(*range(start, start + 8 * len(arguments), 8))
        self.pointers = ctypes.addressof(self.addresses)
        self.plan: Plan | None = None
        self.stream: int | None = None
        self.config = config = driver.CUlaunchConfig()
        config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
        kinds = driver.CUlaunchAttributeID
        self.cluster: Any = None
        if kernel.cluster:
            self.cluster = driver.CUlaunchAttribute()
            self.cluster.id = kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        elif follows:
            attribute = driver.CUlaunchAttribute()
            attribute.id = kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs, config.numAttrs = [attribute], 1

    def set(self, plan: Plan, stream: int, arguments: list[int | float]) -> None:
        """Say what is launched now."""
        self.pack(self.words, 0, *arguments)
        if plan is not self.plan:
            self.plan = plan
            self.config.gridDimX = plan.grid * plan.cluster  # the driver counts blocks, and a plan clusters
            self.config.blockDimX = plan.block
            self.config.sharedMemBytes = plan.shared
            if self.cluster is not None:
                size = self.cluster.value.clusterDim
                size.x, size.y, size.z = plan.cluster, 1, 1
                self.config.attrs, self.config.numAttrs = [self.cluster], 1
        if stream != self.stream:
            self.config.hStream = self.stream = stream


def raw_kernel(cupy: Any, kernel: Kernel, ordinal: int) -> Any:
    """Return a kernel that CuPy compiles, and keeps on disk, itself."""

    def load() -> Any:
        module = cupy.RawModule(code=source(kernel), options=_compile.OPTIONS, backend="nvrtc")
        return module.get_function(kernel.name)

    return _load(("cupy", kernel, ordinal), load)
