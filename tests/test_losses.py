"""cross_entropy, entropy and kl_divergence against mpmath."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import mpmath
import numpy as np
import pytest

import polysoftmax
from polysoftmax.testing import FORMATS, Adapter, Backend
from tests.loss_cases import (
    CLASSES,
    INF,
    LOGITS,
    NAN,
    OPTIONS,
    OTHER,
    PROBABILITIES,
    WEIGHT,
    arrays,
    close,
    exact,
    gradient,
    index_dtype,
    log_softmax,
    numbers,
    row_divergence,
    row_entropy,
    row_loss,
    skip_one_option,
)

if TYPE_CHECKING:
    from collections.abc import Callable

MASK = ((True, True, False, True), (False, True, True, True), (False, False, False, False), (True, False, False, False))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda one: "+".join(one) or "plain")
def test_cross_entropy_of_classes_and_probabilities(
    lib: Adapter, dtype: str, options: dict[str, Any], *, everything: bool
) -> None:
    skip_one_option(lib, options)
    x = lib.asarray(LOGITS, dtype)
    keywords = arrays(lib, options, dtype)
    with mpmath.workprec(200):
        rows = exact(LOGITS, dtype)
        classes = [row_loss(row, t, **options) for row, t in zip(rows, CLASSES, strict=True)]
        probabilities = [row_loss(row, q, **options) for row, q in zip(rows, PROBABILITIES, strict=True)]
        w = [options.get("weight", (1,) * 4)[t] for t in CLASSES]
        mean = mpmath.fsum(classes) / mpmath.fsum(w)
    targets, q = lib.asarray(CLASSES, index_dtype(lib)), lib.asarray(PROBABILITIES, dtype)
    call = polysoftmax.cross_entropy
    close(lib, lib.call(call, x, targets, reduction="none", **keywords), classes, dtype)
    close(lib, lib.call(call, x, q, reduction="mean", **keywords), mpmath.fsum(probabilities) / 4, dtype)
    if lib.can.compiles and not options:
        return  # all options together have the other reductions
    close(lib, lib.call(call, x, targets, **keywords), mean, dtype)
    if "compile" in lib.can.how and not everything:
        return  # PyTorch's mean of probabilities is made of the other two reductions
    close(lib, lib.call(call, x, q, reduction="none", **keywords), probabilities, dtype)
    close(lib, lib.call(call, x, q, reduction="sum", **keywords), mpmath.fsum(probabilities), dtype)


def test_cross_entropy_along_other_axes(lib: Adapter) -> None:
    grid = np.asarray(LOGITS[0] * 6).reshape(2, 3, 4) * np.arange(1, 7).reshape(2, 3, 1)
    with mpmath.workprec(200):
        first = [row_loss(row, 1) for row in exact(grid[:, 1, :].T)]
        both = [row_loss(row, 5) for row in exact(grid.transpose(1, 0, 2).reshape(3, 8))]
    dtype = lib.can.default_float
    x = lib.asarray(grid, dtype)
    ones = lib.asarray(np.ones((3, 4)), index_dtype(lib))
    y = lib.call(polysoftmax.cross_entropy, x, ones, axis=0, reduction="none")
    close(lib, y[1, :], first, dtype)
    fives = lib.asarray(np.full(3, 5), index_dtype(lib))
    close(lib, lib.call(polysoftmax.cross_entropy, x, fives, axis=(0, 2), reduction="none"), both, dtype)


@numbers
def test_ignored_rows_leave_no_trace(lib: Adapter) -> None:
    dtype = lib.can.default_float
    x = lib.asarray((*LOGITS, (NAN, INF, 0.0, -INF)), dtype)
    targets = lib.asarray((2, -1, 3, 0, -1), index_dtype(lib))
    with mpmath.workprec(200):
        kept = [0, *(row_loss(exact(LOGITS)[i], CLASSES[i], weight=WEIGHT) for i in (0, 2, 3)), 0]
    want = [kept[1], 0, kept[2], kept[3], 0]
    weight = lib.asarray(WEIGHT, dtype)
    y = lib.call(polysoftmax.cross_entropy, x, targets, ignore_index=-1, weight=weight, reduction="none")
    close(lib, y, want, dtype)
    mean = lib.call(polysoftmax.cross_entropy, x, targets, ignore_index=-1, weight=weight)
    close(lib, mean, mpmath.fsum(want) / (WEIGHT[2] + WEIGHT[3] + WEIGHT[0]), dtype)


@numbers
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.5}, {"z_loss": 1.0}], ids=lambda one: "+".join(one) or "plain"
)
def test_every_target_ignored_is_0(lib: Adapter, options: dict[str, float]) -> None:
    dtype = lib.can.default_float
    x, targets = lib.asarray(((NAN, 1.0), (2.0, 3.0)), dtype), lib.asarray((-1, -1), index_dtype(lib))

    def loss(x: Any) -> Any:
        return polysoftmax.cross_entropy(x, targets, ignore_index=-1, **options)

    close(lib, lib.call(polysoftmax.cross_entropy, x, targets, ignore_index=-1, **options), 0.0, dtype, units=0)
    if lib.can.autodiff and lib.backend is not Backend.JAX:
        close(lib, gradient(lib, loss, x), np.zeros((2, 2)), dtype, units=0)


@numbers
def test_classes_without_weight_count_for_nothing(lib: Adapter) -> None:
    """The mean over no weight is 0, and so is its gradient."""
    dtype = lib.can.default_float
    x, targets = lib.asarray(LOGITS[:1], dtype), lib.asarray((1,), index_dtype(lib))
    weight = lib.asarray((1.0, 0.0, 1.0, 1.0), dtype)
    close(lib, lib.call(polysoftmax.cross_entropy, x, targets, weight=weight), 0.0, dtype, units=0)
    if lib.can.autodiff and lib.backend is not Backend.JAX:
        slope_ = gradient(lib, lambda x: polysoftmax.cross_entropy(x, targets, weight=weight), x)
        close(lib, slope_, np.zeros((1, 4)), dtype, units=0)


@pytest.mark.backends(lambda can: not can.compiles)
def test_entropy_and_divergence_along_other_axes(lib: Adapter) -> None:
    dtype = lib.can.default_float
    grid = np.asarray([(7 * i) % 24 / 8 for i in range(24)]).reshape(2, 3, 4)
    x, other = lib.asarray(grid, dtype), lib.asarray(grid[::-1, :, ::-1], dtype)
    for axis, axes, shape in ((0, (0,), (3, 4)), ((2, 0), (0, 2), (3,)), (None, (0, 1, 2), ())):
        kept = [i for i in range(3) if i not in axes]
        rows, others = (
            one.transpose(*kept, *axes).reshape(math.prod(shape), -1) for one in (grid, grid[::-1, :, ::-1])
        )
        with mpmath.workprec(200):
            entropies = [row_entropy(row) for row in exact(rows)]
            divergences = [row_divergence(a, b) for a, b in zip(exact(rows), exact(others), strict=True)]
        y = lib.call(polysoftmax.entropy, x, axis=axis)
        close(lib, y, np.asarray(entropies, dtype=np.float64).reshape(shape), dtype)
        y = lib.call(polysoftmax.kl_divergence, x, other, axis=axis)
        close(lib, y, np.asarray(divergences, dtype=np.float64).reshape(shape), dtype, units=256)


@numbers
def test_rows_without_an_answer_are_nan(lib: Adapter) -> None:
    rows = ((INF, 1.0), (-INF, -INF), (NAN, 0.0), (0.0, 0.0))
    x = lib.asarray(rows, lib.can.default_float)
    targets = lib.asarray((1, 0, 1, 1), index_dtype(lib))
    for target in (targets, lib.asarray(((0.0, 1.0),) * 4, lib.can.default_float)):
        y = lib.values(lib.call(polysoftmax.cross_entropy, x, target, reduction="none"))
        assert np.isnan(y).tolist() == [True, True, True, False]


def test_target_out_of_range(lib: Adapter) -> None:
    dtype = lib.can.default_float
    x = lib.asarray(LOGITS, dtype)
    looked_at = lib.backend.library == "numpy" or lib.backend in (Backend.TORCH, Backend.TORCH_AUTOGRAD)
    for wrong in (4, -1):
        targets = lib.asarray((2, wrong, 3, 0), index_dtype(lib))
        for options in ({}, {"label_smoothing": 0.25}):
            if looked_at:
                with pytest.raises(IndexError, match=rf"target {wrong} is out of range for 4 classes"):
                    lib.call(polysoftmax.cross_entropy, x, targets, reduction="none", **options)
            else:
                y = lib.call(polysoftmax.cross_entropy, x, targets, reduction="none", **options)
                assert np.isnan(lib.values(y)).tolist() == [False, True, False, False]


@numbers
def test_confident_loss_keeps_its_digits(lib: Adapter) -> None:
    x = lib.asarray(((1000.0, 960.0), (960.0, 1000.0)), "float32")
    y = lib.call(polysoftmax.cross_entropy, x, lib.asarray((0, 1), index_dtype(lib)), reduction="none")
    np.testing.assert_allclose(lib.values(y), float(mpmath.log1p(mpmath.exp(-40))), rtol=1e-6)


@numbers
def test_losses_where_the_rule_for_confident_rows_begins(lib: Adapter) -> None:
    """The probability of the target passes 1 / 1.25, and the target is or is not the maximum, in one batch."""
    dtype = lib.can.default_float
    rest = (1e-9, 0.125, 0.2499, 0.25, 0.2501, 0.5, 0.999, 1.0, 1.001)
    rows = [(7.0, 7.0 + math.log(one / 2), 7.0 + math.log(one / 2), -INF) for one in rest]
    for target in (0, 1):
        targets = lib.asarray((target,) * len(rows), index_dtype(lib))
        with mpmath.workprec(200):
            want = [-log_softmax(row)[target] for row in exact(rows, dtype)]
        y = lib.call(polysoftmax.cross_entropy, lib.asarray(rows, dtype), targets, reduction="none")
        np.testing.assert_allclose(lib.values(y), np.asarray(want, dtype=np.float64), rtol=64 * FORMATS[dtype].unit)


@numbers
def test_smoothing_leaves_impossible_classes_out(lib: Adapter) -> None:
    dtype = lib.can.default_float
    x = lib.asarray(((0.0, -INF, 0.0, -INF),), dtype)
    y = lib.call(polysoftmax.cross_entropy, x, lib.asarray((0,), index_dtype(lib)), label_smoothing=0.5)
    close(lib, y, mpmath.log(2), dtype)


@numbers
def test_entropy_and_divergence(lib: Adapter, dtype: str) -> None:
    x, other = lib.asarray(LOGITS, dtype), lib.asarray(OTHER, dtype)
    for t in lib.some((0.5, 1.0, 2.0, 0.0)):
        with mpmath.workprec(200):
            pairs = list(zip(exact(LOGITS, dtype), exact(OTHER, dtype), strict=True))
            entropies = [row_entropy(row, t) for row, _ in pairs]
            divergences = [row_divergence(row, b, t) for row, b in pairs]
        close(lib, lib.call(polysoftmax.entropy, x, temperature=t), entropies, dtype)
        # The conditioning of log p - log q is that of the logits' distance over T.
        close(lib, lib.call(polysoftmax.kl_divergence, x, other, temperature=t), divergences, dtype, units=256)


def test_masked_entropy_and_divergence(lib: Adapter) -> None:
    dtype = lib.can.default_float
    poisoned = np.where(np.asarray(MASK), np.asarray(LOGITS), NAN)
    temperature = (0.5, 1.0, 1.0, 2.0)
    with mpmath.workprec(200):
        kept = [
            [[row[i] for i in range(4) if m[i]] for row, m in zip(exact(rows), MASK, strict=True)]
            for rows in (LOGITS, OTHER)
        ]
        kept[0][1], kept[1][1] = ([one for one in row if one != mpmath.ninf] for row in (kept[0][1], kept[1][1]))
        entropies = [row_entropy(row, t) if row else 0 for row, t in zip(kept[0], temperature, strict=True)]
        divergences = [row_divergence(row, b, t) if row else 0 for row, b, t in zip(*kept, temperature, strict=True)]
    x, other = lib.asarray(poisoned, dtype), lib.asarray(np.where(np.asarray(MASK), np.asarray(OTHER), INF), dtype)
    where, t = lib.asarray(MASK, "bool"), lib.asarray(temperature, dtype)
    close(lib, lib.call(polysoftmax.entropy, x, where=where, temperature=t), entropies, dtype)
    close(lib, lib.call(polysoftmax.kl_divergence, x, other, where=where, temperature=t), divergences, dtype)


@numbers
def test_impossible_under_q(lib: Adapter) -> None:
    dtype = lib.can.default_float
    p, q = lib.asarray(((0.0, 0.0), (0.0, -INF)), dtype), lib.asarray(((0.0, -INF), (0.0, 0.0)), dtype)
    close(lib, lib.call(polysoftmax.kl_divergence, p, q), [INF, mpmath.log(2)], dtype)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, t: polysoftmax.cross_entropy(x, t, reduction="max"), ValueError, r"reduction.*'max'"),
        (lambda x, t: polysoftmax.cross_entropy(x, t[:1]), ValueError, r"\(2,\).*got \(1,\)"),
        (lambda x, t: polysoftmax.cross_entropy(x, x[:, :1]), ValueError, r"probabilities.*\(2, 3\).*\(2, 1\)"),
        (lambda x, t: polysoftmax.cross_entropy(x, t > 0), TypeError, "integers.*floating.*bool"),
        (lambda x, t: polysoftmax.cross_entropy(x, [0, 1]), TypeError, "targets must be an array of numpy.*list"),
        (lambda x, t: polysoftmax.cross_entropy(x, x, ignore_index=0), ValueError, "ignore_index=0.*integer targets"),
        (lambda x, t: polysoftmax.cross_entropy(x, t, ignore_index=1.0), TypeError, "ignore_index.*int or None.*float"),
        (lambda x, t: polysoftmax.cross_entropy(x, t, ignore_index=True), TypeError, "ignore_index.*got bool"),
        (lambda x, t: polysoftmax.cross_entropy(x, t, ignore_index=t), TypeError, "ignore_index.*got ndarray"),
        (
            lambda x, t: polysoftmax.cross_entropy(x, t, weight=[1, 2, 3]),
            TypeError,
            "weight must be an array.*got list",
        ),
        (
            lambda x, t: polysoftmax.cross_entropy(x, t, weight=x[0] > 0),
            TypeError,
            "weight must hold real numbers.*bool",
        ),
        (lambda x, t: polysoftmax.cross_entropy(x, t, label_smoothing=1.5), ValueError, r"label_smoothing.*1\.5"),
        (
            lambda x, t: polysoftmax.cross_entropy(x, t, label_smoothing=x),
            TypeError,
            "label_smoothing.*number.*ndarray",
        ),
        (lambda x, t: polysoftmax.cross_entropy(x, t, z_loss=-1), ValueError, "z_loss.*-1"),
        (lambda x, t: polysoftmax.cross_entropy(x, t, weight=x), ValueError, r"one entry a class.*\(3,\).*\(2, 3\)"),
        (lambda x, t: polysoftmax.cross_entropy(x[:, :0], t), ValueError, "at least one class"),
        (lambda x, t: polysoftmax.kl_divergence(x, x[:1]), ValueError, r"logits_q.*\(2, 3\).*\(1, 3\)"),
        (lambda x, t: polysoftmax.entropy(x, temperature=-2), ValueError, "temperature.*-2"),
        (lambda x, t: polysoftmax.entropy(x, axis=2), ValueError, "axis 2 is out of bounds.*dimension 2"),
    ],
)
def test_errors(call: Callable[[Any, Any], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(np.zeros((2, 3)), np.asarray([0, 1]))


@pytest.mark.backends(lambda can: not can.compiles)
def test_nothing_to_sum(lib: Adapter) -> None:
    dtype = lib.can.default_float
    empty = lib.asarray(np.zeros((2, 0)), dtype)
    close(lib, lib.call(polysoftmax.entropy, empty), [0.0, 0.0], dtype)
    close(lib, lib.call(polysoftmax.kl_divergence, empty, empty), [0.0, 0.0], dtype)
    if lib.can.lazy:
        return  # Dask's own maximum fails without rows
    no_rows = lib.asarray(np.zeros((0, 3)), dtype)
    close(lib, lib.call(polysoftmax.cross_entropy, no_rows, lib.asarray(np.zeros(0), index_dtype(lib))), 0.0, dtype)
    close(lib, lib.call(polysoftmax.cross_entropy, no_rows, no_rows), 0.0, dtype)
