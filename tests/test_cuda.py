"""The CUDA engine where there is no GPU: machine code, the cache, which calls are covered, what a launch is given."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

import polysoftmax as ps
from polysoftmax import _arrays, _sampling, engines
from polysoftmax.engines import Call, cuda
from polysoftmax.engines.cuda import _calls, _compile, _devices, _source
from polysoftmax.engines.cuda._every import every_kernel
from polysoftmax.engines.cuda._plan import Kernel, Machine, Plan, plan_masses, plan_rows

H100 = Machine(132, clusters=True)

needs_compiler = pytest.mark.skipif(not engines.has_cuda_core(), reason="cuda.core is not installed")


def representative() -> list[tuple[Kernel, int]]:
    """The kernel that holds most, and is first to spill, of each formula for each architecture.

    In float64 for two of them, and in float32 for one. ``python -m polysoftmax.engines.cuda`` compiles them all.
    """
    heaviest: dict[tuple[str, int], Kernel] = {}
    for kernel, without_clusters in every_kernel().items():
        for arch in (80, 90, 100):
            if (arch == 80 and not without_clusters) or (kernel.compute == "float64") == (arch == 90):
                continue
            other = heaviest.setdefault((kernel.formula, arch), kernel)
            if (kernel.general, kernel.packs * kernel.width) > (other.general, other.packs * other.width):
                heaviest[kernel.formula, arch] = kernel
    return [(kernel, arch) for (_, arch), kernel in heaviest.items()]


@needs_compiler
@pytest.mark.parametrize(
    ("kernel", "arch"), [pytest.param(*job, id=f"{job[0].name}-{job[1]}") for job in representative()]
)
def test_kernels_compile_and_keep_everything_in_registers(kernel, arch):
    compiled = _compile.compile_kernel(kernel, arch)
    assert compiled.code.startswith(b"\x7fELF")
    assert kernel.name.encode() in compiled.code
    assert compiled.spilled == 0
    assert compiled.registers * kernel.block <= 65536


@needs_compiler
def test_wide_accesses_are_wide():
    from cuda.bindings import nvrtc

    kernel = plan_rows("softmax", "bfloat16", "bfloat16", 8, 4096, aligned=True, general=False, machine=H100).kernel
    _, program = nvrtc.nvrtcCreateProgram(_source.source(kernel).encode(), b"k.cu", 0, [], [])
    nvrtc.nvrtcCompileProgram(program, 2, [b"--std=c++17", b"--gpu-architecture=compute_90"])
    text = b" " * nvrtc.nvrtcGetPTXSize(program)[1]
    nvrtc.nvrtcGetPTX(program, text)
    assert len(re.findall(rb"ld\.global(\.nc)?\.v4", text)) >= kernel.packs
    assert text.count(b"st.global.v4") >= kernel.packs


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """A compiler that counts, and an empty cache."""
    made = []

    def compile_kernel(kernel, arch):
        made.append((kernel, arch))
        return _compile.Compiled(f"{kernel.name} {arch}".encode(), 32, 0)

    monkeypatch.setattr(_compile, "compile_kernel", compile_kernel)
    monkeypatch.setattr(_compile, "_compiler", lambda: "nvrtc 13.0")
    monkeypatch.setenv("POLYSOFTMAX_CACHE_DIR", str(tmp_path / "cache"))
    return SimpleNamespace(made=made, folder=tmp_path / "cache")


KERNEL = plan_rows("softmax", "float32", "float32", 8, 4096, aligned=True, general=False, machine=H100).kernel


def test_machine_code_is_made_once_for_each_architecture_and_compiler(counted, monkeypatch):
    codes = [_compile.machine_code(KERNEL, arch) for arch in (90, 90, 80, 90)]
    assert codes == [f"{KERNEL.name} {arch}".encode() for arch in (90, 90, 80, 90)]
    assert [arch for _, arch in counted.made] == [90, 80]
    assert len(list(counted.folder.iterdir())) == 2
    monkeypatch.setattr(_compile, "_compiler", lambda: "nvrtc 13.1")
    _compile.machine_code(KERNEL, 90)
    assert len(counted.made) == 3


def test_a_cache_that_cannot_be_written_to_costs_a_compilation(counted, monkeypatch, tmp_path):
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    monkeypatch.setenv("POLYSOFTMAX_CACHE_DIR", str(in_the_way))
    assert _compile.machine_code(KERNEL, 90) == _compile.machine_code(KERNEL, 90)
    assert len(counted.made) == 2


def test_threads_load_a_kernel_once():
    made, key = [], ("a key of this test", object())
    started = threading.Barrier(16)

    def load():
        started.wait()
        found.append(_compile._load(key, lambda: made.append(1) or object()))

    found = []
    threads = [threading.Thread(target=load) for _ in range(16)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(made) == 1
    assert len(set(map(id, found))) == 1


class FakeDevice:
    """A GPU that remembers what was launched."""

    machine = H100

    def __init__(self):
        self.launched = []

    def view(self, x):
        return _devices.View(x.ctypes.data, x.shape, tuple(one // x.itemsize for one in x.strides), str(x.dtype))

    def empty(self, shape, dtype):
        return np.empty(shape, dtype)

    def launch(self, plan, arguments):
        self.launched.append((plan, arguments))


@pytest.fixture
def device(monkeypatch):
    found = FakeDevice()
    monkeypatch.setattr(_devices, "device_of", lambda _: found)
    monkeypatch.setitem(engines._RUNNERS, np.ndarray, cuda)
    token = engines._CHOICE.set("cuda")
    yield found
    engines._CHOICE.reset(token)


def parameters(family: str) -> list[str]:
    """The parameters of a kernel, read from its source, one word each: their names."""
    text = "".join(map(_source.part, _source.PARTS)).replace("\\\n", " ")
    line, mask = (re.search(rf"#define {name}_PARAMETERS (.*)", text).group(1) for name in (family, "MASK"))
    line = line.replace("MASK_PARAMETERS", mask)
    line = re.sub(r"GIVEN_PARAMETERS\((\w+)\)", r"const void *\1, double \1_value, MAP_PARAMETERS(\1_row)", line)
    line = re.sub(r"MAP_PARAMETERS\((\w+)\)", r"Index \1_inner, Index \1_period, Index \1_stride", line)
    return [one.split()[-1].lstrip("*") for one in line.split(",")]


def named(family: str, arguments: tuple[float, ...]) -> dict[str, float]:
    return dict(zip(parameters(family), arguments, strict=True))


def test_arguments_stand_where_the_kernel_looks_for_them(device):
    x = np.zeros((6, 5, 128 + 512), np.float32)[:, :, :512]
    x, where = x[:, ::1], np.ones((5, 512), bool)
    temperature = np.ones((6, 5), np.float32)
    y = ps.softmax(x, temperature=temperature, where=where)
    (plan, arguments), *_ = device.launched
    given = named("ROW", arguments)
    assert all(isinstance(one, float) == (name in ("temperature_value", "z_loss")) for name, one in given.items())
    assert (given["x"], given["out"]) == (x.ctypes.data, y.ctypes.data)
    assert (given["n"], given["rows"], given["x_stride"]) == (512, 30, 640)
    assert given["temperature"] == temperature.ctypes.data
    assert [given[f"temperature_row_{one}"] for one in ("inner", "period", "stride")] == [1, 30, 1]
    assert given["where"] == where.ctypes.data
    assert [given[f"where_row_{one}"] for one in ("inner", "period", "stride")] == [1, 5, 512]
    assert given["where_stride"] == 1
    assert given["targets"] == given["second"] == given["weight"] == 0
    assert plan.grid == -(-30 // (plan.kernel.block // plan.kernel.threads))


def test_arguments_of_a_loss_and_of_a_draw(device):
    x = np.zeros((4, 1000), np.float16)
    weight = np.ones(1000, np.float32)
    ps.cross_entropy(x, np.zeros(4, np.int64), ignore_index=-1, weight=weight, z_loss=0.5, reduction="none")
    given = named("ROW", device.launched[0][1])
    assert (given["ignores"], given["ignore_index"], given["z_loss"], given["weight_stride"]) == (1, -1, 0.5, 1)
    assert [given[f"targets_row_{one}"] for one in ("inner", "period", "stride")] == [1, 4, 1]
    ps.sample(x, 3, temperature=0.5, return_logprobs=True)
    masses, draw = device.launched[1:]
    assert named("MASS", masses[1])["temperature_value"] == 0.5
    given = named("DRAW", draw[1])
    assert (given["n"], given["rows"], given["size"]) == (1000, 4, 32)
    # One key, from which the kernel makes those of the rows.
    assert [given[f"keys_{one}"] for one in ("row_inner", "row_period", "row_stride", "stride")] == [1, 1, 0, 1]
    assert given["folds"] == 1
    assert given["logprobs"] != 0
    where = np.ones((4, 1000), bool)
    ps.sample(x, ps.random.split(3, 4), where=where)
    masses, draw = (named(*one) for one in zip(("MASS", "DRAW"), (one[1] for one in device.launched[3:]), strict=True))
    assert (draw["keys_row_stride"], draw["keys_stride"], draw["folds"]) == (2, 1, 0)
    for one in (masses, draw):
        assert (one["where"], one["where_row_stride"], one["where_stride"]) == (where.ctypes.data, 1000, 1)
        assert one["x"] == x.ctypes.data  # no copy of it under the mask


def test_arguments_of_filters(device):
    x, k = np.zeros((4, 1000), np.float32), np.asarray([1, 2, 3, 4], np.float32)
    y = ps.truncate(x, temperature=0.5, top_k=k, top_p=0.25)
    given = named("FILTER", device.launched[0][1])
    assert (given["x"], given["out"], given["index"], given["top"]) == (x.ctypes.data, y.ctypes.data, 0, 0)
    assert (given["k"], given["k_row_stride"]) == (k.ctypes.data, 1)
    assert (given["temperature_value"], given["p_value"], given["min_p_value"]) == (0.5, 0.25, 0.0)
    ps.sample(x, 3, top_k=7, min_p=0.125)
    leading, draw = (
        named(*one) for one in zip(("FILTER", "LEADING"), (one[1] for one in device.launched[1:]), strict=True)
    )
    assert (leading["k"], leading["k_value"], draw["k"], draw["size"]) == (0, 7.0, 7, 32)
    assert (draw["x"], draw["index"], draw["top"]) == (leading["out"], leading["index"], leading["top"])
    assert (draw["p_value"], draw["min_p_value"]) == (1.0, 0.125)


def test_row_maps_are_what_broadcasting_means():
    cases = [
        ((2, 3, 4), (2, 3, 4), None),
        ((2, 3, 4), (4,), None),
        ((2, 3, 4), (1, 3, 4), None),
        ((2, 3, 4), (2, 1, 1), None),
        ((2, 3, 4), (1, 3, 1), None),
        ((2, 3, 4), (), None),
        ((2, 3, 4), (2, 1, 4), "none"),
        ((1, 5), (1, 5), None),
    ]
    for batch, shape, absent in cases:
        values = np.arange(np.prod(shape, dtype=int)).reshape(shape)
        strides = tuple(one // values.itemsize for one in values.strides)
        found = _calls.row_map(shape, strides, batch)
        if absent:
            assert found is None
            continue
        inner, period, stride = found
        rows = np.arange(np.prod(batch))
        expected = np.broadcast_to(values, batch).ravel()
        np.testing.assert_array_equal(values.ravel()[rows // inner % period * stride], expected)


X, WIDE = np.zeros((4, 64), np.float32), np.zeros((1, 1 << 12), np.float32)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda: ps.softmax(X, axis=0), "the last axis"),
        (lambda: ps.softmax(X.T), "do not lie side by side"),
        (lambda: ps.softmax(X.reshape(4, 8, 8)[:, :3]), "do not lie at one distance"),
        (lambda: ps.softmax(X.astype(int)), "not int64"),
        (lambda: ps.softmax(X, dtype=np.float64), "do not compute float32 in float64"),
        (lambda: ps.softmax(X[:0]), "there are 0 rows"),
        (lambda: ps.logsumexp(X, weights=X + 1), "no weights"),
        (lambda: ps.cross_entropy(X, np.zeros(4, int), label_smoothing=0.1), "no smoothing"),
        (lambda: ps.cross_entropy(X, X), "targets has dtype float32"),
        (lambda: ps.cross_entropy(X, np.zeros(4, int), weight=np.ones(64)), None),
        (lambda: ps.softmax_vjp(X, X.astype(np.float16)), "the cotangent is float16"),
        (lambda: ps.entropy(X), "no CUDA kernel for entropy"),
        (lambda: ps.truncate(X.astype(int), top_k=3), "not int64"),
        (
            lambda: _sampling.LEADING(_arrays.rows(WIDE, -1), WIDE, None, top_k=1025),
            "up to 1024 leading tokens, not 1025",
        ),
        (lambda: ps.softmax(X.reshape(2, 2, 64), where=np.ones((2, 1, 64), bool)), None),
        (lambda: ps.softmax(np.zeros((2, 3, 2, 4)), where=np.ones((2, 1, 2, 4), bool)), "no pattern"),
    ],
)
def test_what_the_kernels_do_not_cover_runs_as_it_stands(device, monkeypatch, function, reason):
    reasons = []

    def prepare(call: Call, operands):
        found = _calls.prepare(call, operands)
        reasons.append(found if isinstance(found, str) else None)
        return found

    monkeypatch.setattr(cuda, "prepare", prepare)
    answer = function()
    if reason is None:
        assert reasons == [None]
        assert device.launched
    else:
        assert len(reasons) == 1
        assert reason in reasons[0]
        assert not device.launched
        assert not np.isnan(answer[0] if isinstance(answer, tuple) else answer).any()


def test_rows_longer_than_an_int_are_not_covered(device):
    x = np.broadcast_to(np.float32(0), (2, 1 << 31))
    call = Call(engines.FORMULAS["logsumexp"], {"axis": 1}, np.float32, np.float32)
    assert _calls.prepare(call, (x, None, None)) == "there are 2 rows of 2147483648"


def test_explanations(device):
    engine, reason = cuda.describe(np.zeros((4096, 50257), np.float32), "softmax")
    assert (engine, "cluster of 2 blocks" in reason) == ("cuda", True)
    assert "1 lane of a warp" in cuda.describe(np.zeros((8, 1), np.float32), "softmax")[1]
    assert ps.explain(np.zeros((8, 3), np.float32), "sample").engine == "cuda"
    assert not device.launched


@pytest.mark.parametrize(
    ("x", "name", "reason"),
    [
        (np.zeros((8, 3), np.float32), "entropy", "there is no CUDA kernel for entropy"),
        (np.zeros((8, 3), int), "softmax", "the kernels take floats of 16, 32 and 64 bits, not int64"),
        (np.zeros((3, 8), np.float32).T, "softmax_vjp", "the entries of a row do not lie side by side"),
        (np.zeros((0, 8), np.float32), "cross_entropy", "there are 0 rows of 8"),
    ],
)
def test_explanations_of_what_is_not_covered(device, x, name, reason):
    found = ps.explain(x, name)
    assert (found.engine, found.reason) == ("portable", f"the array API formula as it stands: {reason}")


def test_arrays_on_the_cpu_are_not_covered():
    assert _devices.device_of(np.zeros(3)) == "numpy runs on the GPU in its own way"
    torch = pytest.importorskip("torch")
    assert _devices.device_of(torch.zeros(3)) == "the tensor is on cpu"
    call = Call(engines.FORMULAS["softmax"], {"axis": 0}, torch.float32, torch.float32)
    assert _calls.prepare(call, (torch.zeros(3), None, None)) == "the tensor is on cpu"
    with ps.engine("cuda"):
        np.testing.assert_allclose(ps.softmax(torch.zeros(4)), 0.25)
        assert ps.explain(torch.zeros(4), "softmax").engine == "torch"
        assert ps.explain(np.zeros((1000, 1000)), "softmax").engine in ("fused", "blocks", "portable")


def test_the_kernels_are_off_unless_asked_for(device):
    x = np.zeros((8, 300), np.float32)
    with ps.engine("auto"):
        np.testing.assert_allclose(ps.softmax(x), 1 / 300, rtol=1e-6)
        engine, reason = cuda.describe(x, "softmax")
    assert not device.launched
    assert (engine, 'engine("cuda")' in reason) == ("portable", True)


def test_without_cuda_core_the_reason_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"pip install polysoftmax\[cuda\]"), ps.engine("cuda"):
        pass


def test_cupy_arrays_go_to_the_kernels():
    assert engines._load("cupy") is cuda


def test_tensors_on_a_gpu_that_are_none_run_as_they_stand():
    """Fake tensors have a device, and no memory."""
    torch = pytest.importorskip("torch")
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), ps.engine("cuda"):
        x = torch.empty(3, 4, device="cuda:0")
        found = ps.explain(x, "softmax")
        assert ps.softmax(x).shape == (3, 4)
    assert (found.engine, "for a FakeTensor on cuda:0" in found.reason) == ("portable", True)


def test_a_library_without_a_device_is_told_so(monkeypatch):
    absent = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "cupy", absent)
    with pytest.raises(ImportError, match="CuPy finds no CUDA device"):
        _devices._CupyDevice(0)
    torch = pytest.importorskip("torch")
    if torch.version.cuda is None:
        with pytest.raises(ImportError, match="this PyTorch is not built for CUDA"):
            _devices._TorchDevice(0)


@pytest.mark.parametrize(("arch", "clusters"), [(75, None), (80, False), (89, False), (90, True), (120, True)])
def test_what_a_compute_capability_can_do(arch, clusters):
    if clusters is None:
        with pytest.raises(ImportError, match=r"compute capability 7\.5, and the kernels need 8\.0"):
            _compile.machine_of(arch, 40, clusters=True)
    else:
        assert _compile.machine_of(arch, 40, clusters=True) == Machine(40, clusters)
        assert not _compile.machine_of(arch, 40, clusters=False).clusters


def test_limits_of_the_temperature_are_made_on_the_device():
    """As a CUDA graph has it, whose capture takes no copy from the host; torch.full is no such copy."""
    torch = pytest.importorskip("torch")
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    names = []
    with Seen(), ps.engine("portable"):
        y = ps.softmax(torch.zeros(3, 4), temperature=0.0)
    torch.testing.assert_close(y, torch.full((3, 4), 0.25))
    assert "aten.full.default" in names
    assert not [one for one in names if "lift_fresh" in one or "_to_copy" in one]


PLAN = Plan(KERNEL, 7, 2304)


class FakeCore:
    """The parts of ``cuda.core`` that a launch takes, remembering what they were given."""

    def __init__(self):
        self.said, self.streams = [], []

    def Device(self, ordinal):
        return SimpleNamespace(set_current=lambda: self.said.append(("device", ordinal)))

    @property
    def ObjectCode(self):
        return SimpleNamespace(from_cubin=lambda code: SimpleNamespace(get_kernel=lambda name: (code, name)))

    @property
    def Stream(self):
        return SimpleNamespace(from_handle=lambda handle: self.streams.append(handle) or ("stream", handle))

    def LaunchConfig(self, **options):
        return options

    def launch(self, *what):
        self.said.append(what)


def test_a_launch_goes_to_the_stream_and_device_of_the_caller(counted, monkeypatch):
    core = FakeCore()
    monkeypatch.setitem(sys.modules, "cuda.core", core)
    monkeypatch.setattr(_compile, "_loaded", {})
    cluster = PLAN._replace(kernel=replace(KERNEL, cluster=4))
    for plan in (PLAN, PLAN, cluster):
        _compile.launch(plan, 90, 1, 1234, (5, 1.5))
    code = f"{KERNEL.name} 90".encode()
    assert len(core.streams) == 1
    config = {"grid": 7, "cluster": None, "block": KERNEL.block, "shmem_size": 2304}
    assert core.said[:2] == [("device", 1), (("stream", 1234), config, (code, KERNEL.name), 5, 1.5)]
    assert core.said[5][1]["cluster"] == 4
    assert len(counted.made) == 2


def test_cupy_alone_compiles_and_launches_the_same_source(monkeypatch):
    said = []

    class RawModule:
        def __init__(self, **options):
            said.append(options)

        def get_function(self, name):
            return lambda *what, **options: said.append((name, what, options))

    device = SimpleNamespace(compute_capability="90", attributes={"MultiProcessorCount": 132}, id=0)
    inside = nullcontext(device)
    for name in ("compute_capability", "attributes", "id"):
        setattr(inside, name, getattr(device, name))
    fake = SimpleNamespace(
        RawModule=RawModule, cuda=SimpleNamespace(is_available=lambda: True, Device=lambda ordinal: inside)
    )
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(_devices, "has_cuda_core", lambda: False)
    monkeypatch.setattr(_compile, "_loaded", {})
    found = _devices._CupyDevice(0)
    assert found.machine == Machine(132, clusters=False)
    found.launch(PLAN, (5, 1.5))
    found.launch(PLAN, (6, 1.5))
    assert said[0]["code"] == _source.source(KERNEL)
    assert said[0]["backend"] == "nvrtc"
    assert said[1:] == [(KERNEL.name, ((7,), (KERNEL.block,), (one, 1.5)), {"shared_mem": 2304}) for one in (5, 6)]


def test_fields_of_structured_arrays_are_not_covered():
    field = np.zeros(5, "i2, f4")["f1"]  # as CuPy has them since version 14, in a row of 6 bytes each
    x = SimpleNamespace(data=SimpleNamespace(ptr=512 + 2), shape=field.shape, strides=field.strides, dtype=field.dtype)
    for pointer in (512 + 2, 512):
        x.data.ptr = pointer
        with pytest.raises(_devices.Uncovered, match="multiples of their size"):
            _devices._CupyDevice.view(None, x)
    x.strides = (8,)
    assert _devices._CupyDevice.view(None, x) == (512, (5,), (2,), "float32")


def test_every_length_has_a_layout():
    lengths = [1, 2, 3, 31, 32, 33, 127, 128, 129, 1000, 50257, 131072, 1 << 20]
    for x, n, rows, clusters in product(("bfloat16", "float64"), lengths, (1, 10_000_000), (True, False)):
        machine = Machine(100, clusters)
        for formula, general in product(("softmax", "logsumexp", "softmax_vjp"), (False, True)):
            plan = plan_rows(formula, x, x, rows, n, aligned=True, general=general, machine=machine)
            kernel = plan.kernel
            assert plan.grid * (kernel.block // kernel.threads) >= rows
            assert kernel.cluster == 1 or (clusters and kernel.cluster in (2, 4, 8))
            if kernel.held and formula == "softmax":
                assert kernel.width * kernel.threads * kernel.packs * kernel.cluster >= n
        masses = plan_masses(x, rows, n, aligned=True, general=False, machine=machine)
        assert isinstance(masses, Plan)


def test_importing_the_engine_imports_neither_cuda_nor_a_backend():
    code = (
        "import sys, polysoftmax.engines.cuda as c\n"
        "print([n for n in ('cuda', 'cuda.core', 'torch', 'cupy', 'jax') if n in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_benchmark_says_that_it_needs_a_gpu():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    root = os.path.dirname(os.path.dirname(__file__))
    command = [sys.executable, "-m", "benchmarks.gpu"]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == "benchmarks.gpu needs a CUDA device, and PyTorch finds none\n"


def test_the_tests_on_a_gpu_say_that_they_need_one():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    root = os.path.dirname(os.path.dirname(__file__))
    environment = {**os.environ, "POLYSOFTMAX_TEST_BACKENDS": "torch:cuda"}
    command = [sys.executable, "-m", "pytest", "-m", "gpu"]
    found = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == "Exit: these tests need a GPU: torch finds no CUDA device\n"


def test_the_benchmark_races_the_same_operation(monkeypatch):
    """On the CPU with fewer rows: what each contender answers, but for those that need a GPU or a compiler."""
    gpu, torch = pytest.importorskip("benchmarks.gpu"), pytest.importorskip("torch")
    monkeypatch.setattr(gpu, "WORKING_SET", 1 << 16)
    monkeypatch.setattr(gpu, "find_spec", lambda _: None)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert {one.n for one in gpu.cases(quick=False)} == {*gpu.LENGTHS, 128256, 50257}
    seen = set()
    for case in gpu.cases(quick=False):
        if case.n not in (1024, 50257) or case.dtype != "bfloat16":
            continue
        calls = gpu.contenders(torch, replace(case, rows=2), "cpu")
        with ps.engine("portable"):
            ours, theirs = (calls[name]() for name in (gpu.OURS, "torch"))
        seen.add(case.op)
        calls[gpu.COPY](), calls[gpu.READ]()
        assert ours.shape == theirs.reshape(ours.shape).shape
        if not case.op.startswith("sample"):
            torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    assert len(seen) == 7


def test_the_benchmark_measures_nothing_in_place_of_the_kernels(monkeypatch):
    gpu, torch = pytest.importorskip("benchmarks.gpu"), pytest.importorskip("torch")
    assert "torch's own kernel" in gpu.without_kernels(torch, "cpu")
    with monkeypatch.context() as changed:
        changed.setattr(ps, "explain", lambda x, op: SimpleNamespace(engine="cuda"))
        assert gpu.without_kernels(torch, "cpu") == ""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "pip install polysoftmax[cuda]" in gpu.without_kernels(torch, "cpu")


def test_the_benchmark_queues_calls_before_the_first_runs():
    gpu, said = pytest.importorskip("benchmarks.gpu"), []

    class Event:
        def __init__(self, **options):
            assert options == {"enable_timing": True}

        def record(self):
            said.append("event")

        def synchronize(self):
            said.append("wait")

        def elapsed_time(self, end):
            return 3.0

    torch = SimpleNamespace(cuda=SimpleNamespace(Event=Event, _sleep=said.append))
    seconds = gpu.stopwatch(torch)(lambda: said.append("call"), 1000)
    assert said == [gpu.HEAD_START, "event", *["call"] * gpu.QUEUED, "event", "wait"]
    assert seconds == pytest.approx(3e-3 / gpu.QUEUED)


def test_the_benchmark_reports_and_draws(tmp_path):
    """With times that are made up, since there is nothing to take them from: 1 ms, and 2 ms for the peers."""
    gpu = pytest.importorskip("benchmarks.gpu")
    results = []
    for case in gpu.cases(quick=True):
        size = case.rows * case.n * (4 if case.dtype == "float32" else 2)
        assert case.op.startswith("sample") or size == gpu.WORKING_SET // 2
        times = {gpu.OURS: 1e-3, gpu.COPY: 0.9e-3, gpu.READ: 0.5e-3, "torch": 2e-3}
        seconds = {name: {"median": one, "low": one, "high": one} for name, one in times.items()}
        results.append({"case": vars(case), "bytes": case.traffic * size, "seconds": seconds})
    line = gpu.line(results[0])
    assert ("268 GB/s" in line, "90% of the limit" in line, "torch 2.00x" in line) == (True, True, True)
    gpu.plot(results, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
