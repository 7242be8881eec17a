"""The CUDA engine where there is no GPU: which calls are covered, and what their kernels are given."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

import polysoftmax as ps
from polysoftmax import _formula, _rows, _sampling, engines
from polysoftmax._formula import Call
from polysoftmax._softmax import SOFTMAX
from polysoftmax.engines import cuda
from polysoftmax.engines import numpy as numpy_engine
from polysoftmax.engines.cuda import _calls, _devices, _operands, _source
from polysoftmax.engines.cuda._layouts import IN_GENERAL, KINDS
from polysoftmax.engines.cuda._plan import FILTERS, Machine, Plan, plan_masses, plan_rows

H100 = Machine(132, clusters=True)


class FakeDevice:
    """A GPU that remembers what was launched."""

    machine, arch, by_cuda_core = H100, 90, True

    def __init__(self):
        self.launched = []

    def view(self, x):
        pointer = x.ctypes.data
        return pointer, (x.dtype, x.shape, tuple(one // x.itemsize for one in x.strides), pointer % 16)

    def pointer(self, x):
        return x.ctypes.data

    def empty(self, shape, dtype):
        return np.empty(shape, dtype)

    def copied(self, x):
        return np.array(x, order="C")

    def launch(self, plan, arguments):
        self.launched.append((plan, arguments))


@pytest.fixture
def device(monkeypatch):
    found = FakeDevice()
    monkeypatch.setattr(_devices, "device_of", lambda _: found)
    monkeypatch.setitem(_formula._RUNNERS, np.ndarray, cuda)
    monkeypatch.setattr(cuda, "words", numpy_engine.words)  # for what runs as it stands
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
    assert all(
        isinstance(one, float) == (name in ("temperature_value", "label_smoothing", "z_loss"))
        for name, one in given.items()
    )
    assert (given["x"], given["out"]) == (x.ctypes.data, y.ctypes.data)
    assert (given["n"], given["rows"], given["x_stride"]) == (512, 30, 640)
    assert given["temperature"] == temperature.ctypes.data
    assert [given[f"temperature_row_{one}"] for one in ("inner", "period", "stride")] == [1, 30, 1]
    assert given["where"] == where.ctypes.data
    assert [given[f"where_row_{one}"] for one in ("inner", "period", "stride")] == [1, 5, 512]
    assert given["where_stride"] == 1
    assert given["targets"] == given["second"] == given["weight"] == 0
    assert (plan.grid, plan.block) == (8, 128)  # four rows in a block, one a warp


def test_formulas_are_numbered_as_the_kernels_number_them(device):
    text = _source.part("cuda/rows.cuh")
    names, kinds = (
        re.search(rf"enum {one} \{{(.*?)\}}", text, re.DOTALL).group(1).split(",") for one in ("Formula", "Kind")
    )
    assert [one.strip().lower() for one in names] == list(KINDS)
    assert {*KINDS.values(), *IN_GENERAL.values(), *FILTERS} == {one.strip().lower() for one in kinds}
    ps.log_softmax(np.zeros((4, 1000), np.float32))
    ps.entropy(np.zeros((4, 1000), np.float32))
    given = [named("ROW", arguments)["formula"] for _, arguments in device.launched]
    assert given == [list(KINDS).index("log_softmax"), list(KINDS).index("entropy")]


def test_arguments_of_a_loss_and_of_a_draw(device):
    x = np.zeros((4, 1000), np.float16)
    weight = np.ones(1000, np.float32)
    ps.cross_entropy(x, np.zeros(4, np.int64), ignore_index=-1, weight=weight, z_loss=0.5, reduction="none")
    given = named("ROW", device.launched[0][1])
    assert (given["ignores"], given["ignore_index"], given["z_loss"], given["weight_stride"]) == (1, -1, 0.5, 1)
    assert [given[f"targets_row_{one}"] for one in ("inner", "period", "stride")] == [1, 4, 1]
    ps.sample(x, 3, temperature=0.5)
    masses, draw = device.launched[1:]
    assert named("MASS", masses[1])["temperature_value"] == 0.5
    given = named("DRAW", draw[1])
    assert (given["n"], given["rows"], given["size"]) == (1000, 4, 32)
    # One key, from which the kernel makes those of the rows.
    assert [given[f"keys_{one}"] for one in ("row_inner", "row_period", "row_stride", "stride")] == [1, 1, 0, 1]
    assert given["folds"] == 1
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
        found = _operands.row_map(shape, strides, batch)
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
        (lambda: ps.softmax(X, axis=0), None),
        (lambda: ps.softmax(X.T), None),
        (lambda: ps.softmax(X.reshape(4, 8, 8)[:, :3]), None),
        (lambda: ps.kl_divergence(X, X, axis=0), "no CUDA kernel for kl_divergence"),
        (lambda: ps.softmax(X.astype(int)), "not int64"),
        (lambda: ps.softmax(X, dtype=np.float64), "do not compute float32 in float64"),
        (lambda: ps.softmax(X[:0]), "there are 0 rows"),
        (lambda: ps.logsumexp(X, weights=X + 1), "no weights"),
        (lambda: ps.cross_entropy(X, np.zeros(4, int), label_smoothing=0.1), None),
        (
            lambda: ps.cross_entropy(X, np.zeros(4, int), label_smoothing=0.1, weight=np.ones(64)),
            "class weights or smoothing, not both",
        ),
        (lambda: ps.cross_entropy(X, X), "targets has dtype float32"),
        (lambda: ps.cross_entropy(X, np.zeros(4, int), weight=np.ones(64)), None),
        (lambda: ps.softmax_vjp(X, X.astype(np.float16)), "the cotangent is float16"),
        (lambda: ps.entropy(X, axis=0), None),
        (lambda: ps.kl_divergence(X, X), "no CUDA kernel for kl_divergence"),
        (lambda: ps.truncate(X.astype(int), top_k=3), None),
        (
            lambda: _sampling.LEADING(_rows.rows(WIDE, -1), WIDE, None, top_k=1025),
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
        assert reasons[-1] is None
        assert device.launched
    else:
        assert len(reasons) == 1
        assert reason in reasons[0]
        assert not device.launched
        assert not np.isnan(answer[0] if isinstance(answer, tuple) else answer).any()


def test_rows_longer_than_an_int_are_not_covered(device):
    x = np.broadcast_to(np.float32(0), (2, 1 << 31))
    call = Call(engines.FORMULAS["logsumexp"], {}, 1, np.float32, np.float32)
    assert _calls.prepare(call, (x, None, None)) == "there are 2 rows of 2147483648"


def test_explanations(device):
    engine, reason = cuda.explain(np.zeros((4096, 50257), np.float32), SOFTMAX)
    assert (engine, "a cluster of" in reason) == ("cuda", True)
    assert "4 lanes of a warp a row, 1 entry an access" in cuda.explain(np.zeros((8, 1), np.float32), SOFTMAX)[1]
    assert ps.explain(np.zeros((8, 3), np.float32), "sample").engine == "cuda"
    assert not device.launched


def test_explanations_copy_nothing(device, monkeypatch):
    monkeypatch.delattr(FakeDevice, "copied")
    for name in ("softmax_vjp", "logsumexp", "sample"):
        found = ps.explain(np.zeros((3, 8), np.float32).T, name)
        assert (found.engine, found.reason) == ("cuda", "rows that do not lie side by side are copied first")


@pytest.mark.parametrize(
    ("x", "name", "reason"),
    [
        (np.zeros((8, 3), np.float32), "kl_divergence", "there is no CUDA kernel for kl_divergence"),
        (np.zeros((8, 3), int), "softmax", "the kernels take floats of 16, 32 and 64 bits, not int64"),
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
    call = Call(engines.FORMULAS["softmax"], {}, 0, torch.float32, torch.float32)
    assert _calls.prepare(call, (torch.zeros(3), None, None)) == "the tensor is on cpu"
    with ps.engine("cuda"):
        np.testing.assert_allclose(ps.softmax(torch.zeros(4)), 0.25)
        for x in (torch.zeros(4), np.zeros((1000, 1000))):
            assert ps.explain(x, "softmax").engine in ("native", "portable")


def test_without_cuda_core_the_reason_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(engines, "_can_launch", engines._can_launch.__wrapped__)
    with pytest.raises(ImportError, match="pip install 'cuda-core"), ps.engine("cuda"):
        pass


def test_cupy_arrays_go_to_the_kernels(monkeypatch):
    array = SimpleNamespace()
    monkeypatch.setattr(engines, "library", lambda _: SimpleNamespace(name="cupy"))
    assert engines._load(array) is cuda


def test_tensors_on_a_gpu_that_are_none_run_as_they_stand():
    """Fake tensors have a device, and no memory."""
    torch = pytest.importorskip("torch")
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), ps.engine("cuda"):
        x = torch.empty(3, 4, device="cuda:0")
        found = ps.explain(x, "softmax")
        assert ps.softmax(x).shape == (3, 4)
    assert (found.engine, "for a FakeTensor on cuda:0" in found.reason) == ("portable", True)


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


def test_fields_of_structured_arrays_are_not_covered():
    field = np.zeros(5, "i2, f4")["f1"]  # as CuPy has them since version 14, in a row of 6 bytes each
    x = SimpleNamespace(data=SimpleNamespace(ptr=512 + 2), shape=field.shape, strides=field.strides, dtype=field.dtype)
    for pointer in (512 + 2, 512):
        x.data.ptr = pointer
        with pytest.raises(_devices.Uncovered, match="multiples of their size"):
            _devices._CupyDevice.view(None, x)
    x.strides = (8,)
    assert _devices._CupyDevice.view(None, x) == (512, (np.float32, (5,), (2,), 0))


def test_every_length_has_a_layout():
    lengths = [1, 2, 3, 31, 32, 33, 127, 128, 129, 1000, 50257, 131072, 1 << 20]
    for x, n, rows, clusters in product(("bfloat16", "float64"), lengths, (1, 10_000_000), (True, False)):
        machine = Machine(100, clusters)
        for formula, general in product(("softmax", "logsumexp", "softmax_vjp"), (False, True)):
            plan = plan_rows(formula, x, x, rows, n, aligned=True, general=general, machine=machine)
            kernel = plan.kernel
            threads = min(kernel.threads, plan.block)
            assert plan.grid * (plan.block // threads) >= rows
            assert plan.block <= kernel.block
            assert kernel.cluster == (plan.cluster > 1)
            assert plan.cluster == 1 or (clusters and plan.cluster in (2, 4, 8))
            if kernel.held and formula == "softmax":
                assert kernel.width * threads * (kernel.packs + plan.staged) * plan.cluster >= n
            assert plan.shared <= machine.shared
        masses = plan_masses(x, rows, n, general=False, machine=machine)
        assert isinstance(masses, Plan)


def test_importing_the_engine_imports_neither_cuda_nor_a_backend():
    code = (
        "import sys, polysoftmax.engines.cuda as c\n"
        "print([n for n in ('cuda', 'cuda.core', 'torch', 'cupy', 'jax') if n in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


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


def test_calls_that_look_alike_share_a_launch_and_not_their_numbers(device):
    x, y = np.zeros((4, 1000), np.float32), np.ones((4, 1000), np.float32)
    ps.softmax(x, temperature=0.5)
    count = len(_calls._found)
    out = ps.softmax(y, temperature=2.0)
    assert len(_calls._found) == count
    (plan, _), (again, arguments) = device.launched
    given = named("ROW", arguments)
    assert again is plan
    assert (given["x"], given["out"], given["temperature_value"]) == (y.ctypes.data, out.ctypes.data, 2.0)
    targets = np.zeros(4, np.int64)
    for z_loss in (0.25, 0.5):
        ps.cross_entropy(x, targets, z_loss=z_loss)
    assert [named("ROW", arguments)["z_loss"] for _, arguments in device.launched[2:]] == [0.25, 0.5]
    assert len(_calls._found) == count + 1


def test_what_differs_in_a_launch_is_seen(device):
    whole = np.zeros((4, 2048), np.float32)
    for x in (whole[:, :1024], whole[:, 1:1025], whole[:2, :1024], whole[:, :1024].copy(), whole[:, :512]):
        ps.softmax(x)
        ps.logsumexp(x, where=np.ones(x.shape[-1], bool))
    given = [(plan.kernel.width, *arguments) for plan, arguments in device.launched]
    assert len(set(given)) == len(given) == 10
    assert [plan.kernel.width for plan, _ in device.launched[:4]] == [4, 4, 1, 4]


@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}, {"top_k": 5}, {"top_k": 400, "top_p": 0.5}])
def test_a_draw_is_repeated_with_the_operands_of_each_call(device, options):
    """The second call and later ones take the launches of the first, without its formula."""
    calls = [(np.zeros((4, 1000), np.float32), number) for number in (0.5, 0.75, 0.25)]
    found = []
    for x, number in calls:
        device.launched.clear()
        given = {name: number if name == "top_p" else value for name, value in options.items()}
        tokens = ps.sample(x, 3, temperature=number, **given)
        found.append([(plan.kernel, arguments) for plan, arguments in device.launched])
        first, last = device.launched[0][1], device.launched[-1][1]
        draw = named("LEADING" if options == {"top_k": 5} else "DRAW", last)
        assert x.ctypes.data in first
        assert draw["temperature_value"] == number
        assert draw["tokens"] == tokens.ctypes.data
        assert (draw["x"] == x.ctypes.data) == (not options)
        if "top_p" in options:
            filters = named("FILTER", first)
            assert (filters["temperature_value"], filters["p_value"]) == (number, number)
            assert draw["x"] == filters["out"]
    assert [[kernel for kernel, _ in one] for one in found] == [[kernel for kernel, _ in found[0]]] * 3


def test_found_launches_are_bounded_and_keep_no_array(device, monkeypatch):
    monkeypatch.setattr(_calls, "_MOST_FOUND", 8)
    for rows in range(1, 30):
        x = np.zeros((rows, 8), np.float32)
        ps.sample(x, 3, temperature=np.ones(rows, np.float32))
        assert len(_calls._found) <= 8
        assert sys.getrefcount(x) == 2
        device.launched.clear()
