"""The CUDA kernels on a GPU: fresh random inputs in every run, poisoned answers, and NumPy in float64 beside them.

The conformance matrix runs there too, by `POLYSOFTMAX_TEST_BACKENDS=torch:cuda,cupy,jax:cuda`.
"""

from __future__ import annotations

import math
import os
import threading

import numpy as np
import pytest

import polysoftmax as ps
from polysoftmax._softmax import SOFTMAX
from polysoftmax.engines import cuda
from polysoftmax.engines.cuda import _devices

pytestmark = pytest.mark.gpu

SEED = int(os.environ.get("POLYSOFTMAX_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))


class Torch:
    name = "torch"

    def __init__(self):
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("PyTorch finds no CUDA device")
        self.xp = torch

    def array(self, x, dtype=None):
        return self.xp.asarray(np.ascontiguousarray(x)).to("cuda", getattr(self.xp, dtype) if dtype else None)

    def host(self, x):
        return x.double().cpu().numpy() if x.is_floating_point() else x.cpu().numpy()

    def poison(self, x):
        return x.fill_(math.nan if x.is_floating_point() else -77)


class Cupy:
    name = "cupy"

    def __init__(self):
        cupy = pytest.importorskip("cupy")
        if not cupy.cuda.is_available():
            pytest.skip("CuPy finds no CUDA device")
        if "POLYSOFTMAX_SANITIZED" in os.environ:
            cupy.cuda.set_allocator(None)  # without its pool, allocations end where the arrays do
        self.xp = cupy

    def array(self, x, dtype=None):
        if dtype == "bfloat16":
            if int(self.xp.__version__.split(".")[0]) < 14:
                pytest.skip("CuPy has bfloat16 from version 14 on")
            dtype = pytest.importorskip("ml_dtypes").bfloat16
        return self.xp.asarray(np.asarray(x, dtype))

    def host(self, x):
        return x.get().astype(np.float64) if x.dtype.kind in "fV" else x.get()

    def poison(self, x):
        x.fill(math.nan if x.dtype.kind in "fV" else -77)
        return x


@pytest.fixture(params=[Torch, Cupy], ids=["torch", "cupy"])
def gpu(request, monkeypatch):
    """A library on the GPU with the kernels on; `launched` counts them."""
    found = request.param()
    kind = type(_devices.device_of(found.array(np.zeros(1, np.float32))))
    assert kind is not str, "the CUDA kernels need cuda.core and NVRTC"
    empty, launch = kind.empty, kind.launch
    found.launched = []
    monkeypatch.setattr(kind, "empty", lambda self, *how: found.poison(empty(self, *how)))
    monkeypatch.setattr(kind, "launch", lambda self, *how: (found.launched.append(how[0]), launch(self, *how))[1])
    with ps.engine("cuda"):
        yield found


def logits(rows, n, *, special=True):
    x = np.random.default_rng([SEED, rows, n]).normal(scale=4.0, size=(rows, n)).astype(np.float32)
    if special and rows > 4:
        x[1, ::2], x[2], x[3, -1], x[4, 0] = -np.inf, -np.inf, np.nan, np.inf
    return x


def portable(function, *arrays, **options):
    with ps.engine("portable"), np.errstate(all="ignore"):
        return function(*arrays, **options)


UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}


def assert_close(gpu, y, expected, n, dtype, *, reach=64.0, absolute=1e-30):
    """Hold an answer to (16 + log2 n + reach) units of the compute dtype and one rounding; `reach` bounds d + D."""
    found = gpu.host(y)
    assert found.shape == expected.shape
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected), err_msg=f"seed {SEED}")
    compute = min(UNIT[dtype], 2.0**-24)
    rtol = (16 + math.log2(n) + reach) * compute + UNIT[dtype]
    if dtype == "float16":
        absolute = max(absolute, 2.0**-24)
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=absolute, err_msg=f"seed {SEED}")


LENGTHS = [1, 2, 3, 17, 32, 33, 100, 128, 129, 1000, 1024, 4097, 16384, 50257, 131072, 262144, 1 << 20]
DTYPES = ["float16", "bfloat16", "float32", "float64"]


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("general", [False, True])
def test_forward(gpu, n, dtype, general):
    rows = 9 if n > 5000 else 37
    x = gpu.array(logits(rows, n), dtype)
    wide = gpu.host(x)
    options, expected_options = {}, {}
    if general:
        where = np.random.default_rng([SEED, n]).random((rows, n)) < 0.8
        options, expected_options = {"where": gpu.array(where)}, {"where": where}
    for function in (ps.softmax, ps.log_softmax, ps.logsumexp):
        expected = portable(function, wide, **expected_options)
        floor = 1e-30 if function is ps.softmax else 100 * min(UNIT[dtype], 2.0**-24)
        assert_close(gpu, function(x, **options), expected, n, dtype, absolute=floor)
    assert [plan.formula for plan in gpu.launched] == ["softmax", "log_softmax", "logsumexp"]


@pytest.mark.parametrize("n", [3, 129, 4097, 50257, 300_000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_temperatures_from_0_to_inf(gpu, n, dtype):
    x = gpu.array(logits(9, n), dtype)
    t = np.asarray([0.0, 0.5, np.inf, 1.0, 2.0, 0.0, -1.0, np.nan, 10.0])
    found = ps.softmax(x, temperature=gpu.array(t, "float64" if dtype == "float64" else "float32"))
    assert_close(gpu, found, portable(ps.softmax, gpu.host(x), temperature=t), n, dtype, reach=200.0)
    assert len(gpu.launched) == 1


@pytest.mark.parametrize("n", [3, 129, 4097, 50257, 300_000])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", [ps.softmax_vjp, ps.log_softmax_vjp])
def test_vjp(gpu, n, dtype, function):
    x, g = (gpu.array(logits(7, n + i, special=False)[:, :n], dtype) for i in (0, 1))
    expected = portable(function, gpu.host(x), gpu.host(g))
    unit = min(UNIT[dtype], 2.0**-24)
    assert_close(gpu, function(x, g), expected, n, dtype, absolute=2000 * unit)
    assert len(gpu.launched) == 1


@pytest.mark.parametrize("n", [3, 129, 50257])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_and_its_gradient(gpu, n, dtype):
    targets = np.random.default_rng([SEED, n]).integers(0, n, 9)
    targets[2] = -1
    x = gpu.array(logits(9, n, special=False), dtype)
    options = {"ignore_index": -1, "reduction": "none", "z_loss": 1e-3}
    expected = portable(ps.cross_entropy, gpu.host(x), targets, **options)
    wide = "float64" if dtype == "float64" else "float32"
    assert_close(gpu, ps.cross_entropy(x, gpu.array(targets), **options), expected, n, wide)
    if gpu.name != "torch":
        return
    x.requires_grad_()
    ps.cross_entropy(x, gpu.array(targets), **options).sum().backward()
    reference = x.detach().double().cpu().requires_grad_()
    with ps.engine("portable"):
        ps.cross_entropy(reference, gpu.xp.asarray(targets), **options).sum().backward()
    assert_close(gpu, x.grad, reference.grad.numpy(), n, dtype, absolute=200 * min(UNIT[dtype], 2.0**-24))
    assert gpu.launched[-1].formula == "cross_entropy_slope"


@pytest.mark.parametrize(("rows", "n"), [(500, 3), (200, 1000), (64, 50257), (8, 128256), (1, 1 << 20)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True])
def test_sample_draws_the_tokens_that_numpy_draws(gpu, rows, n, dtype, masked):
    x = gpu.array(logits(rows, n), dtype)
    wide = gpu.host(x).astype(np.float64 if dtype == "float64" else np.float32)
    rng = np.random.default_rng([SEED, n])
    given = {"temperature": rng.choice([0.0, 0.5, 1.0, 1.5], rows).astype(wide.dtype)}
    if masked:
        given["where"] = rng.random((rows, n)) < 0.8
    options = {name: gpu.array(one) for name, one in given.items()}
    tokens, logprobs = ps.sample(x, SEED, return_logprobs=True, **options)
    expected, expected_logprobs = portable(ps.sample, wide, SEED, return_logprobs=True, **given)
    # Two scores within rounding of each other may be taken either way: at most one row here.
    assert (gpu.host(tokens) != expected).sum() <= 1, f"seed {SEED}"
    same = gpu.host(tokens) == expected
    np.testing.assert_allclose(gpu.host(logprobs)[same], expected_logprobs[same], rtol=1e-5, atol=1e-5)
    assert [plan.formula for plan in gpu.launched] == ["sample_masses", "sample_draw"]


@pytest.mark.parametrize(("rows", "n"), [(200, 1000), (64, 50257), (8, 128256)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 400, "top_p": 0.8}])
def test_filters_leave_the_tokens_that_numpy_leaves(gpu, rows, n, dtype, options):
    x = gpu.array(logits(rows, n), dtype)
    wide = gpu.host(x).astype(np.float64 if dtype == "float64" else np.float32)
    kept = gpu.host(ps.truncate(x, temperature=0.8, **options))
    expected = portable(ps.truncate, wide, temperature=0.8, **options)
    # Where the mass of a prefix lies within rounding of top_p, one token more or less may stay.
    assert ((kept != expected) & (kept == kept)).sum() <= rows // 50 + 1, f"seed {SEED}"
    tokens = gpu.host(ps.sample(x, SEED, temperature=0.8, **options))
    assert (tokens != portable(ps.sample, wide, SEED, temperature=0.8, **options)).sum() <= 1, f"seed {SEED}"
    few = 2 * options.get("top_k", n) ** 2 <= n
    drawn = ["sample_leading", "sample_draw_leading"] if few else ["truncate", "sample_masses", "sample_draw"]
    assert [plan.formula for plan in gpu.launched] == ["truncate", *drawn]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_compiled_code_keeps_the_kernels(gpu, dtype):
    if gpu.name != "torch":
        pytest.skip("PyTorch's compiler")
    x, g = (gpu.array(logits(9, 1000 + i, special=False)[:, :1000], dtype) for i in (0, 1))
    slopes = []
    for run in (ps.softmax, gpu.xp.compile(ps.softmax, fullgraph=True)):
        own = x.clone().requires_grad_()
        (run(own) * g).sum().backward()
        slopes.append(own.grad)
    assert [plan.formula for plan in gpu.launched].count("softmax") >= 2
    gpu.xp.testing.assert_close(*slopes)


@pytest.mark.parametrize("shift", [0, 1, 3])
def test_rows_with_gaps_and_rows_that_start_anywhere(gpu, shift):
    whole = gpu.array(logits(7, 5000), "float32")
    x = whole[:, shift : shift + 4097]
    assert_close(gpu, ps.softmax(x), portable(ps.softmax, gpu.host(x)), 4097, "float32")
    assert len(gpu.launched) == 1


def test_attention_scores_under_a_causal_mask(gpu):
    scores = logits(2 * 3 * 65, 65, special=False).reshape(2, 3, 65, 65)
    where = np.tri(65, dtype=bool)
    found = ps.softmax(gpu.array(scores), where=gpu.array(where))
    expected = portable(ps.softmax, scores.astype(np.float64), where=where)
    assert_close(gpu, found, expected, 65, "float32")
    assert len(gpu.launched) == 1


def test_millions_of_rows(gpu):
    x = gpu.array(logits(3_000_000, 3, special=False))
    assert_close(gpu, ps.softmax(x), portable(ps.softmax, gpu.host(x)), 3, "float32")


def test_more_entries_than_an_int_counts(gpu):
    if gpu.name != "torch" or gpu.xp.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs PyTorch, and 12 GiB of a GPU's memory")
    x = gpu.xp.zeros(70_000, 1 << 15, device="cuda", dtype=gpu.xp.bfloat16)
    ends = gpu.array(logits(2, 1 << 15, special=False), "bfloat16")
    x[0], x[-1] = ends
    y = ps.softmax(x)
    assert len(gpu.launched) == 1
    found = gpu.xp.stack([y[0], y[-1]])
    assert_close(gpu, found, portable(ps.softmax, gpu.host(ends)), 1 << 15, "bfloat16")
    assert (y[1:-1] == 2.0**-15).all()


def test_threads_and_streams(gpu):
    """Eight threads, each on its own stream, compile and launch at once."""
    x = [gpu.array(logits(16, 3000 + i, special=False)) for i in range(8)]
    found = [None] * 8
    gpu.xp.cuda.synchronize() if gpu.name == "torch" else gpu.xp.cuda.Device().synchronize()

    def work(i):
        stream = gpu.xp.cuda.Stream()
        with gpu.xp.cuda.stream(stream) if gpu.name == "torch" else stream, ps.engine("cuda"):
            for _ in range(10):
                found[i] = ps.softmax(x[i])
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    for i in range(8):
        assert_close(gpu, found[i], portable(ps.softmax, gpu.host(x[i])), 3000 + i, "float32")


def test_graph_capture_after_the_first_call(gpu):
    if gpu.name != "torch":
        pytest.skip("one library's graphs show it")
    torch = gpu.xp
    x, key = gpu.array(logits(64, 4096, special=False)), ps.random.key(1, xp=torch, device="cuda")
    where = gpu.array(np.random.default_rng(SEED).random((64, 4096)) < 0.8)

    def work():
        return (
            ps.softmax(x, where=where),
            ps.log_softmax(x, temperature=0.0),
            ps.truncate(x, top_k=20, min_p=0.01),
            ps.sample(x, key, where=where),
        )

    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work()
    x.copy_(gpu.array(logits(64, 4096)[::-1].copy()))
    graph.replay()
    torch.cuda.synchronize()
    expected = portable(ps.softmax, gpu.host(x), where=gpu.host(where))
    assert_close(gpu, found[0], expected, 4096, "float32")
    torch.testing.assert_close(found, work(), rtol=0.0, atol=0.0, equal_nan=True)


def test_a_device_that_is_not_the_current_one(gpu):
    if gpu.name != "torch" or gpu.xp.cuda.device_count() < 2:
        pytest.skip("needs two GPUs, and PyTorch")
    x = gpu.array(logits(9, 4096)).to("cuda:1")
    assert ps.softmax(x).device == x.device
    assert_close(gpu, ps.softmax(x), portable(ps.softmax, gpu.host(x)), 4096, "float32")


def test_explain(gpu):
    assert cuda.explain(gpu.array(logits(9, 4096)), SOFTMAX)[0] == "cuda"
