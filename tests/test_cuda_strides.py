"""Rows that lie anywhere: other axes, strides and broadcast cotangents, whose rows are copied for the CUDA kernels."""

from __future__ import annotations

import numpy as np
import pytest

import polysoftmax as ps
from tests.host_gpu import assert_close, device, folder, logits, needs_compiler, portable
from tools.gpu.fake import fake_gpu

__all__ = ["device", "folder"]  # fixtures

X = logits(np.random.default_rng(1), "float32", (6, 5, 140))
VIEWS = {
    "another axis": (X, 0),
    "the one in the middle": (X, 1),
    "several axes": (X, (0, 2)),
    "transposed": (X.T, -1),
    "turned around": (X[:, :, ::-1], -1),
    "every third entry": (X[:, :, ::3], -1),
    "rows at two distances": (X[:, :3, :7], -1),
}


@needs_compiler
@pytest.mark.parametrize("name", VIEWS)
def test_rows_that_lie_anywhere_take_the_kernels(device, name):
    x, axis = VIEWS[name]
    before = x.copy()
    where = np.random.default_rng(2).random(x.shape) < 0.8
    for function, options in ((ps.softmax, {"where": where, "temperature": 0.5}), (ps.log_softmax, {})):
        y = function(x, axis=axis, **options)
        expected = portable(function, x, axis=axis, **options)
        assert y.shape == x.shape
        np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(ps.logsumexp(x, axis=axis), portable(ps.logsumexp, x, axis=axis), rtol=1e-6, atol=1e-6)
    assert [plan.formula for plan in device.plans] == ["softmax", "log_softmax", "logsumexp"]
    np.testing.assert_array_equal(x, before)


@needs_compiler
def test_a_row_has_the_same_bits_wherever_it_lies(device):
    x = logits(np.random.default_rng(3), "float32", (9, 130), special=True)
    expected = ps.softmax(x)
    for y in (ps.softmax(x.T, axis=0).T, ps.softmax(np.repeat(x, 2, axis=1)[:, ::2])):
        np.testing.assert_array_equal(y, expected)
    assert_close(expected, portable(ps.softmax, x), x)


@needs_compiler
def test_classes_in_the_middle_as_in_the_segmentation_of_images(device):
    rng = np.random.default_rng(4)
    x, targets = logits(rng, "float32", (2, 7, 5, 6)), rng.integers(0, 7, (2, 5, 6))
    weight = rng.random(7).astype(np.float32)
    options = {"axis": 1, "weight": weight, "ignore_index": 3, "reduction": "none"}
    y = ps.cross_entropy(x, targets, **options)
    np.testing.assert_allclose(y, portable(ps.cross_entropy, x, targets, **options), rtol=1e-5, atol=1e-6)
    found = ps.cross_entropy(x, targets, axis=1)
    np.testing.assert_allclose(found, portable(ps.cross_entropy, x, targets, axis=1), rtol=1e-6)
    assert [plan.formula for plan in device.plans] == ["cross_entropy"] * 2


@needs_compiler
def test_draws_from_logits_with_strides(device):
    x = logits(np.random.default_rng(5), "float32", (300, 8)).T
    for _ in range(2):
        np.testing.assert_array_equal(ps.sample(x, 11), portable(ps.sample, x, 11, dtype=None))
    assert device.plans[0].formula == "sample_masses"


def test_a_cotangent_that_was_broadcast_takes_the_kernel_of_the_gradient():
    torch = pytest.importorskip("torch")
    launched = []
    with fake_gpu(lambda plan: launched.append(plan.formula)):
        x = torch.zeros(4, 100, requires_grad=True)
        ps.softmax(x).sum().backward()
        y = torch.zeros(4, 7, 5, requires_grad=True)
        found = ps.softmax(y, axis=1)
        found.backward(torch.ones(4, 7, 5))
    assert launched == ["softmax", "softmax_pullback"] * 2
    assert found.is_contiguous()
    assert y.grad.shape == y.shape
