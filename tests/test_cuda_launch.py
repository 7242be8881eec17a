"""Launches of CUDA kernels where there is no GPU: what cuda.core and CuPy are given, and in which order."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from polysoftmax.engines.cuda import _cache, _compile, _devices, _launch, _source
from polysoftmax.engines.cuda._plan import Machine, Plan, plan_rows

KERNEL = plan_rows(
    "softmax", "float32", "float32", 8, 4096, aligned=True, general=False, machine=Machine(132, clusters=True)
).kernel
PLAN = Plan(KERNEL, 7, 2304)


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


class FakeCore:
    """The parts of ``cuda.core`` and the driver that a launch takes, remembering what they were given."""

    def __init__(self):
        self.said, self.streams = [], []
        self.context = "of the caller"
        self.driver = SimpleNamespace(cuCtxGetCurrent=lambda: (0, self.context), cuCtxSetCurrent=self.make_current)

    def make_current(self, context):
        self.context = context

    def Device(self, ordinal):
        return SimpleNamespace(set_current=lambda: self.make_current(f"of device {ordinal}"))

    @property
    def ObjectCode(self):
        return SimpleNamespace(from_cubin=lambda code: SimpleNamespace(get_kernel=lambda name: (code, name)))

    @property
    def Stream(self):
        return SimpleNamespace(from_handle=lambda handle: self.streams.append(handle) or ("stream", handle))

    def LaunchConfig(self, **options):
        return options

    def launch(self, *what):
        self.said.append((self.context, *what))


@pytest.fixture
def core(monkeypatch):
    found = FakeCore()
    monkeypatch.setitem(sys.modules, "cuda.core", found)
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=found.driver))
    monkeypatch.setattr(_cache, "machine_code", lambda kernel, arch: (kernel.cluster, arch))
    return found


def test_a_launch_goes_to_the_stream_and_device_of_the_caller(core):
    cluster = PLAN._replace(kernel=replace(KERNEL, cluster=4))
    for plan in (PLAN, PLAN, cluster):
        _launch.launch(plan, 90, 1, 1234, (5, 1.5))
    assert core.streams == [1234]
    config = {"grid": 7, "cluster": None, "block": KERNEL.block, "shmem_size": 2304}
    assert core.said[0] == ("of device 1", ("stream", 1234), config, ((1, 90), KERNEL.name), 5, 1.5)
    assert core.said[2][2]["cluster"] == 4


@pytest.mark.parametrize("fails", [False, True])
def test_the_context_of_the_caller_stays_current(core, monkeypatch, fails):
    if fails:
        monkeypatch.setattr(core, "launch", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            _launch.launch(PLAN, 90, 1, 1234, ())
    else:
        _launch.launch(PLAN, 90, 1, 1234, ())
    assert core.context == "of the caller"


class FakeDevice:
    """CuPy's, whose ``with`` remembers that it was entered."""

    compute_capability = "90"
    attributes = {"MultiProcessorCount": 132}  # noqa: RUF012
    id = 1

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
    assert launches == [(KERNEL.name, ((7,), (KERNEL.block,), (one, 1.5)), {"shared_mem": 2304}) for one in (5, 6)]
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
    found.launch(PLAN, (5,))
    assert core.said[0][:2] == ("of device 1", ("stream", 1001))
    assert core.said[0][3] == ((1, 87), KERNEL.name)
    assert not cupy.said
    assert cupy.device.entered == 0


def test_tensors_are_launched_on_without_changing_the_device_of_torch(core, monkeypatch):
    """``torch.cuda.device`` would put back the device, and not the context that the caller made current on it."""
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    streams = SimpleNamespace(cuda_stream=1234)
    torch = SimpleNamespace(
        version=SimpleNamespace(cuda="13.0"),
        cuda=SimpleNamespace(get_device_properties=lambda ordinal: properties, current_stream=lambda ordinal: streams),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(_devices, "has_cuda_core", lambda: True)
    monkeypatch.setattr(_compile, "target_of", lambda arch: arch)
    _devices._TorchDevice(1).launch(PLAN, (5,))
    assert core.said[0][:2] == ("of device 1", ("stream", 1234))
    assert core.context == "of the caller"


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
