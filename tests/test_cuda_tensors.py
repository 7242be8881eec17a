"""The CUDA kernels under PyTorch, thread by thread on the host: derivatives, and compiled code."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest

import polysoftmax as ps
from polysoftmax._formula import Call
from polysoftmax._probability import LOG_PROB
from polysoftmax._sampling import SAMPLE
from polysoftmax._softmax import SOFTMAX
from tests.host_gpu import device, folder, logits, needs_compiler, portable

__all__ = ["device", "folder"]  # fixtures


@pytest.fixture
def tensors(device, monkeypatch):
    """PyTorch, whose tensors are on a GPU as far as the library can see, and compiled code is new."""
    torch = pytest.importorskip("torch")
    for question in ("is_cuda", "is_on_gpu"):
        monkeypatch.setattr(f"polysoftmax.engines.torch.{question}", lambda _: True)
    operator = pytest.importorskip("polysoftmax.engines._operator")
    engine_for = operator._engine
    monkeypatch.setattr(operator, "_engine", torch.compiler.assume_constant_result(lambda *_: engine_for("cuda", 0)))
    torch._dynamo.reset()
    yield torch
    torch._dynamo.reset()


def losses(torch, dtype):
    """Functions of logits to be differentiated, and the kernels that they take there and back."""
    rng = np.random.default_rng(3)
    g = torch.from_numpy(rng.normal(size=(5, 200))).to(dtype)
    where, weight = torch.from_numpy(rng.random((5, 200)) < 0.8), torch.from_numpy(rng.random(200)).float()
    t, classes = torch.tensor([0.5, 1.0, 2.0, 0.0, math.inf]), torch.tensor([0, -1, 199, 7, 7])
    options = {"ignore_index": -1, "weight": weight, "z_loss": 0.01}
    both = ["cross_entropy", "cross_entropy_slope"]
    return {
        "softmax": (lambda x: (ps.softmax(x, temperature=t, where=where) * g.to(x.dtype)).sum(), "softmax"),
        "log_softmax": (lambda x: (ps.log_softmax(x, temperature=0.5) * g.to(x.dtype)).sum(), "log_softmax"),
        "cross_entropy": (lambda x: ps.cross_entropy(x, classes, **options), both),
    }


@needs_compiler
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "cross_entropy"])
def test_derivatives_of_tensors(tensors, device, dtype, name, compiled):
    dtype = getattr(tensors, dtype)
    function, kernels = losses(tensors, dtype)[name]
    if isinstance(kernels, str):
        # What was rounded is of no use: the gradient then follows from the rows.
        kernels = [kernels, f"{kernels}_{'pullback' if dtype == tensors.float32 else 'vjp'}"]
    x = tensors.randn(5, 200, generator=tensors.Generator().manual_seed(1)).to(dtype).requires_grad_()
    reference = x.detach().double().requires_grad_()
    with ps.engine("portable"):
        function(reference).backward()
    run = tensors.compile(function, backend="aot_eager", fullgraph=True) if compiled else function
    run(x).backward()
    assert [plan.formula for plan in device.plans] == kernels
    assert x.grad.dtype == dtype
    unit = 2.0**-24 if dtype == tensors.float32 else 2.0**-8
    tensors.testing.assert_close(x.grad.double(), reference.grad, rtol=40 * unit, atol=40 * unit)


@needs_compiler
def test_derivatives_on_another_thread_take_the_kernels_too(tensors, device):
    x = tensors.zeros(4, 100, requires_grad=True)
    y = ps.softmax(x)
    thread = threading.Thread(target=y.backward, args=(tensors.randn(4, 100),))
    thread.start()
    thread.join()
    assert [plan.formula for plan in device.plans] == ["softmax", "softmax_pullback"]


@needs_compiler
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.9, "temperature": 0.7}])
def test_compiled_code_draws_the_same_tokens(tensors, device, options):
    x = tensors.from_numpy(logits(np.random.default_rng(9), "float32", (8, 300), special=True))
    key = ps.random.key(3, xp=tensors)
    expected, logprobs = portable(ps.sample, x.numpy(), 3, dtype=None, return_logprobs=True, **options)
    run = tensors.compile(
        lambda x: ps.sample(x, key, return_logprobs=True, **options), backend="aot_eager", fullgraph=True
    )
    tokens, found = run(x)
    assert device.plans
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_allclose(found, logprobs, rtol=1e-5, atol=1e-5)


def test_compiled_code_takes_the_operator_where_there_is_a_kernel(tensors):
    seen = []

    def backend(graph, _):
        seen.append([str(node.target) for node in graph.graph.nodes if "polysoftmax" in str(node.target)])
        return graph.forward

    x = tensors.zeros(4, 100)
    for name, function in (("cuda", ps.softmax), ("cuda", lambda x: ps.kl_divergence(x, x)), ("auto", ps.log_softmax)):
        with ps.engine(name):
            tensors.compile(function, backend=backend, fullgraph=True)(x)
    assert seen == [["polysoftmax.formula.default"], [], []]


def test_the_operator_answers_on_the_device_of_fake_tensors():
    torch = pytest.importorskip("torch")
    operator = pytest.importorskip("polysoftmax.engines._operator")
    from torch._subclasses.fake_tensor import FakeTensorMode

    def answer(formula, result, *operands, **options):
        call = Call(formula, options, 1, torch.float32, result)
        return operator.formula(*operator.arguments_of("cuda", call, operands))

    with FakeTensorMode():
        x = torch.empty(6, 1000, device="cuda:0", dtype=torch.bfloat16)
        (y,) = answer(SOFTMAX, torch.bfloat16, x, None, None)
        assert (y.device, y.dtype, y.shape) == (x.device, x.dtype, x.shape)
        (dx,) = answer(SOFTMAX.pullback((True, False, False)), torch.float32, x, None, None, y, y)
        assert (dx.device, dx.dtype, dx.shape) == (x.device, torch.float32, x.shape)
        key = torch.empty(6, 2, device="cuda:0", dtype=torch.int32)
        nothing = (None,) * 5
        options = {"top_k": None, "is_one_key": False, "draws": 2, "replace": True}
        (tokens,) = answer(SAMPLE, torch.int64, x, key, *nothing, **options)
        (logprobs,) = answer(LOG_PROB, torch.float32, x, tokens, *nothing, top_k=None)
    assert (tokens.device, tokens.dtype, tokens.shape) == (x.device, torch.int64, (6, 2))
    assert (logprobs.dtype, logprobs.shape) == (torch.float32, (6, 2))
