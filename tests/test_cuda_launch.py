"""Launches of CUDA kernels where there is no GPU: what cuda.core and CuPy are given, and in which order."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from polysoftmax.engines.cuda import _cache, _compile, _devices, _launch, _source
from polysoftmax.engines.cuda._plan import Machine, Plan, plan_draw, plan_rows

KERNEL = plan_rows(
    "softmax", "float32", "float32", 8, 4096, aligned=True, general=False, machine=Machine(132, clusters=True)
).kernel
PLAN = Plan("softmax", KERNEL, 7, 2304, 128)


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch):
    monkeypatch.setattr(_launch, "_loaded", {})
    monkeypatch.setattr(_launch, "_locks", {})
    monkeypatch.setattr(_devices, "_devices", {})


def test_threads_load_a_kernel_once():
    made, found, started = [], [], threading.Barrier(16)

    def make():
        time.sleep(0.05)  # in which the others come to where they have to wait
        made.append(object())
        return made[-1]

    def load():
        started.wait()
        found.append(_launch._load(("a key",), make))

    threads = [threading.Thread(target=load) for _ in range(16)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert found == made * 16


def test_no_thread_waits_while_another_compiles_another_kernel():
    compiling, done = threading.Event(), threading.Event()

    def compile_slowly():
        compiling.set()
        return done.wait(10)

    slow = threading.Thread(target=_launch._load, args=(("slow",), compile_slowly))
    slow.start()
    assert compiling.wait(10)
    quick = threading.Thread(target=_launch._load, args=(("quick",), object))
    quick.start()
    quick.join(5)
    waited = quick.is_alive()
    done.set()
    slow.join()
    quick.join()
    assert not waited


def test_what_could_not_be_loaded_is_tried_again():
    def fail():
        raise OSError

    with pytest.raises(OSError, match=r"^$"):
        _launch._load(("a key",), fail)
    assert _launch._load(("a key",), lambda: 5) == 5


CALLERS, ON_DEVICE = 5000, 7000
"""Contexts: the caller's, and the primary one of the first device."""


class FakeCore:
    """The parts of ``cuda.core`` and the driver that a launch takes, remembering what they were given."""

    def __init__(self):
        self.said, self.loaded, self.made_current, self.asked = [], [], [], []
        self.context, self.status = CALLERS, 0
        self.driver = SimpleNamespace(
            cuCtxGetCurrent=lambda: (0, self.context),
            cuCtxSetCurrent=self.make_current,
            cuGetErrorName=lambda status: (0, {700: b"CUDA_ERROR_ILLEGAL_ADDRESS"}[status]),
            cuLaunchKernelEx=self.launch,
            cuKernelSetAttribute=self.set_attribute,
            CUkernel=lambda address: ("kernel", address),
            CUdevice=lambda ordinal: ("device", ordinal),
            CUfunction_attribute=SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared"),
            CUfunction=lambda address: ("function", address),
            CUlaunchConfig=SimpleNamespace,
            CUlaunchAttribute=lambda: SimpleNamespace(value=SimpleNamespace(clusterDim=SimpleNamespace())),
            CUlaunchAttributeID=SimpleNamespace(
                CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION="cluster",
                CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION="begins early",
            ),
        )

    def make_current(self, context):
        self.context = context
        self.made_current.append(context)
        return (0,)

    def set_attribute(self, *what):
        self.asked.append(what)
        return (0,)

    def Device(self, ordinal):
        return SimpleNamespace(set_current=lambda: self.make_current(ON_DEVICE + ordinal))

    @property
    def ObjectCode(self):
        return SimpleNamespace(from_cubin=lambda code: SimpleNamespace(get_kernel=lambda name: self.load(code, name)))

    def load(self, code, name):
        self.loaded.append((code, name))
        return SimpleNamespace(handle=len(self.loaded))

    def launch(self, config, function, pointers, extra):
        words = (ctypes.c_void_p * 2).from_address(pointers)
        given = (ctypes.c_longlong.from_address(words[0]).value, ctypes.c_double.from_address(words[1]).value)
        kind, number = function
        assert (kind, extra) == ("function", 0)
        self.said.append((self.context, SimpleNamespace(**vars(config)), self.loaded[number - 1], given))
        return (self.status,)


@pytest.fixture
def core(monkeypatch):
    found = FakeCore()
    monkeypatch.setitem(sys.modules, "cuda.core", found)
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=found.driver))
    monkeypatch.setattr(_cache, "machine_code", lambda kernel, arch: (kernel.cluster, arch))
    return found


def test_a_launch_goes_to_the_stream_and_device_of_the_caller(core):
    cluster = PLAN._replace(kernel=replace(KERNEL, cluster=True), cluster=4)
    plans = (PLAN, PLAN._replace(grid=9, shared=64), cluster)
    for plan, stream in zip(plans, (1234, 1234, 5678), strict=True):
        _launch.launch(plan, 90, 1, stream, [stream, 1.5])
    assert core.loaded == [((False, 90), KERNEL.name), ((True, 90), cluster.kernel.name)]
    for plan, stream, (context, config, loaded, given) in zip(plans, (1234, 1234, 5678), core.said, strict=True):
        assert (context, config.hStream, given) == (ON_DEVICE + 1, stream, (stream, 1.5))
        assert (config.gridDimX, config.gridDimY, config.gridDimZ) == (plan.grid * plan.cluster, 1, 1)
        assert (config.blockDimX, config.blockDimY, config.blockDimZ) == (plan.block, 1, 1)
        assert (config.sharedMemBytes, loaded[1]) == (plan.shared, plan.kernel.name)
    assert not hasattr(core.said[0][1], "attrs")
    (attribute,) = core.said[2][1].attrs
    size = attribute.value.clusterDim
    assert (core.said[2][1].numAttrs, attribute.id, size.x, size.y, size.z) == (1, "cluster", 4, 1, 1)


def test_a_draw_begins_before_the_masses_have_ended_where_the_device_can(core):
    draw = plan_draw("float32", 7, 1000, general=False, machine=Machine(132, clusters=True))
    for plan, arch in ((draw, 90), (draw, 80), (PLAN, 90)):
        _launch.launch(plan, arch, 1, 1234, [5, 1.5])
    (attribute,) = core.said[0][1].attrs
    assert (attribute.id, attribute.value.programmaticStreamSerializationAllowed) == ("begins early", 1)
    assert not any(hasattr(config, "attrs") for _, config, *_ in core.said[1:])


def test_a_block_asks_once_for_much_shared_memory(core):
    for shared in (48 << 10, 50 << 10, 49 << 10):
        _launch.launch(PLAN._replace(shared=shared), 90, 1, 1234, [5, 1.5])
    assert core.asked == [("shared", 50 << 10, ("kernel", 1), ("device", 1))]
    assert [config.sharedMemBytes for _, config, *_ in core.said] == [48 << 10, 50 << 10, 49 << 10]


@pytest.mark.parametrize("fails", [False, True])
def test_the_context_of_the_caller_stays_current(core, monkeypatch, fails):
    if fails:
        core.status = 700
        with pytest.raises(RuntimeError, match=f"launch {KERNEL.name}: CUDA_ERROR_ILLEGAL_ADDRESS"):
            _launch.launch(PLAN, 90, 1, 1234, [5, 1.5])
    else:
        _launch.launch(PLAN, 90, 1, 1234, [5, 1.5])
    assert core.context == CALLERS


def test_a_context_that_is_current_stays_as_it_is(core):
    _launch.launch(PLAN, 90, 1, 1234, [5, 1.5])
    core.context = ON_DEVICE + 1
    core.made_current.clear()
    _launch.launch(PLAN, 90, 1, 1234, [5, 1.5])
    assert [context for context, *_ in core.said] == [ON_DEVICE + 1] * 2
    assert not core.made_current


def test_threads_that_launch_at_once_have_memory_of_their_own(core):
    """The driver is called without the interpreter lock, and reads the arguments there."""
    launch, inside, done = core.driver.cuLaunchKernelEx, threading.Event(), threading.Event()

    def slowly(*what):
        inside.set()
        assert done.wait(10)
        return launch(*what)

    core.driver.cuLaunchKernelEx = slowly
    slow = threading.Thread(target=_launch.launch, args=(PLAN, 90, 1, 1234, [5, 1.5]))
    slow.start()
    assert inside.wait(10)
    core.driver.cuLaunchKernelEx = launch
    _launch.launch(PLAN, 90, 1, 5678, [6, 2.5])
    done.set()
    slow.join()
    assert [(config.hStream, given) for _, config, _, given in core.said] == [(5678, (6, 2.5)), (1234, (5, 1.5))]


class FakeDevice:
    """CuPy's, whose ``with`` remembers that it was entered."""

    compute_capability = "90"
    attributes = {"MultiProcessorCount": 132}  # noqa: RUF012
    id = 1
    __hash__ = None  # as CuPy's, which can be compared

    def __init__(self):
        self.entered = 0

    def __enter__(self):
        self.entered += 1

    def __exit__(self, *_):
        pass


@pytest.fixture
def cupy(monkeypatch):
    """A CuPy whose only device is the second, with the first current."""

    class RawModule:
        def __init__(self, **options):
            said.append(options)

        def get_function(self, name):
            return lambda *what, **options: said.append((name, what, options))

    said, device = [], FakeDevice()
    found = SimpleNamespace(RawModule=RawModule, said=said, device=device, empty=lambda *what: what)
    found.cuda = SimpleNamespace(
        is_available=lambda: True,
        Device=lambda ordinal: device,
        runtime=SimpleNamespace(getDevice=lambda: 0),
        get_current_stream=lambda ordinal: SimpleNamespace(ptr=1000 + ordinal),
    )
    monkeypatch.setitem(sys.modules, "cupy", found)
    monkeypatch.setattr(_devices, "has_cuda_core", lambda: False)
    return found


def test_cupy_alone_compiles_and_launches_the_same_source(cupy):
    found = _devices._CupyDevice(1)
    assert found.machine == Machine(132, clusters=False)
    found.launch(PLAN, (5, 1.5))
    found.launch(PLAN, (6, 1.5))
    options, *launches = cupy.said
    assert options == {"code": _source.source(KERNEL), "options": _compile.OPTIONS, "backend": "nvrtc"}
    assert "--device-as-default-execution-space" in _compile.OPTIONS
    assert launches == [(KERNEL.name, ((7,), (PLAN.block,), (one, 1.5)), {"shared_mem": 2304}) for one in (5, 6)]
    assert cupy.device.entered == 2
    cupy.cuda.runtime.getDevice = lambda: 1
    found.launch(PLAN, (7, 1.5))
    found.empty((3,), "int32")
    assert cupy.device.entered == 2


def test_cupy_with_cuda_core_launches_through_it(cupy, core, monkeypatch):
    monkeypatch.setattr(_devices, "has_cuda_core", lambda: True)
    monkeypatch.setattr(_compile, "target_of", lambda arch: arch - 3)
    found = _devices._CupyDevice(1)
    assert found.machine == Machine(132, clusters=True)
    found.launch(PLAN, [5, 1.5])
    context, config, loaded, _ = core.said[0]
    assert (context, config.hStream, loaded) == (ON_DEVICE + 1, 1001, ((False, 87), KERNEL.name))
    assert not cupy.said
    assert cupy.device.entered == 0


def test_tensors_are_launched_on_without_changing_the_device_of_torch(core, monkeypatch):
    """``torch.cuda.device`` would put back the device, and not the context that the caller made current on it."""
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    streams = SimpleNamespace(cuda_stream=1234)
    torch = SimpleNamespace(
        device=lambda *what: what,
        version=SimpleNamespace(cuda="13.0"),
        cuda=SimpleNamespace(get_device_properties=lambda ordinal: properties, current_stream=lambda ordinal: streams),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(_devices, "has_cuda_core", lambda: True)
    monkeypatch.setattr(_compile, "target_of", lambda arch: arch)
    _devices._TorchDevice(1).launch(PLAN, [5, 1.5])
    context, config, *_ = core.said[0]
    assert (context, config.hStream, core.context) == (ON_DEVICE + 1, 1234, CALLERS)


def test_a_device_that_kernels_cannot_be_compiled_for_has_a_reason(cupy, monkeypatch):
    asked = []

    def target_of(arch):
        asked.append(arch)
        raise ImportError("NVRTC 13.0 does not know compute capability 9.0")

    monkeypatch.setattr(_devices, "has_cuda_core", lambda: True)
    monkeypatch.setattr(_devices, "library", lambda _: SimpleNamespace(name="cupy"))
    monkeypatch.setattr(_compile, "target_of", target_of)
    x = SimpleNamespace(device=cupy.device)
    for _ in range(3):
        assert _devices.device_of(x) == "no CUDA kernels here: NVRTC 13.0 does not know compute capability 9.0"
    assert asked == [90]


def test_a_library_without_a_device_is_told_so(monkeypatch):
    absent = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "cupy", absent)
    with pytest.raises(ImportError, match="CuPy finds no CUDA device"):
        _devices._CupyDevice(0)
    torch = pytest.importorskip("torch")
    if torch.version.cuda is None:
        with pytest.raises(ImportError, match="this PyTorch is not built for CUDA"):
            _devices._TorchDevice(0)
