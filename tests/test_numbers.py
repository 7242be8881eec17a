"""Integers and numbers at the ends of their ranges, and arrays of as many dimensions as there can be."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import polysoftmax

if TYPE_CHECKING:
    from polysoftmax.testing import Adapter

HUGE = 10**400

integers = pytest.mark.backends(lambda can: "func" not in can.how and not can.traced)


# Unsigned targets that are too large for an index


@integers
@pytest.mark.parametrize(("kind", "bits"), [("uint32", 32), ("uint64", 64)])
def test_no_unsigned_target_is_taken_for_a_negative_one(lib: Adapter, kind: str, bits: int) -> None:
    if bits == 64 and lib.backend.library == "jax":
        pytest.skip("the backend has no 64-bit integers")
    x = lib.asarray(np.zeros((3, 4)), "float32")
    targets = lib.asarray([1, 2**bits - 100, 2**bits - 1], kind)
    if lib.backend.library in ("numpy", "torch"):
        with pytest.raises(IndexError, match=rf"target {2**bits - 100} is out of range for 4 classes"):
            polysoftmax.cross_entropy(x, targets, ignore_index=-100)
        return
    y = lib.values(polysoftmax.cross_entropy(x, targets, ignore_index=-100, reduction="none"))
    np.testing.assert_allclose(y, [math.log(4), math.nan, math.nan], rtol=1e-6)
    assert np.isnan(lib.values(polysoftmax.cross_entropy(x, targets, ignore_index=-1)))


@integers
@pytest.mark.parametrize("kind", ["uint8", "uint32"])
def test_unsigned_targets(lib: Adapter, kind: str) -> None:
    """An index that is ignored may be the number of classes, or any other that fits."""
    x = lib.asarray(np.zeros((3, 4)), "float32")
    for ignored in (4, 255):
        targets = lib.asarray([1, ignored, 3], kind)
        y = lib.values(polysoftmax.cross_entropy(x, targets, ignore_index=ignored, reduction="none"))
        np.testing.assert_allclose(y, [math.log(4), 0.0, math.log(4)], rtol=1e-6)


def test_what_is_no_class_is_not_the_ignored_number_of_classes() -> None:
    with pytest.raises(IndexError, match=f"target {2**64 - 100} is out of range"):
        polysoftmax.cross_entropy(np.zeros((1, 4)), np.asarray([2**64 - 100], np.uint64), ignore_index=4)


# Numbers that no float can hold


@pytest.mark.parametrize(
    ("name", "engine"),
    [("numpy", "auto"), ("numpy", "portable"), ("torch", "auto"), ("torch", "portable"), ("jax.numpy", "auto")],
)
def test_an_int_too_large_for_a_float_is_infinite(name: str, engine: str) -> None:
    xp = pytest.importorskip(name)
    x = xp.asarray(np.asarray([0.0, 1.0, -math.inf, 3.0], np.float32))
    with polysoftmax.engine(engine):
        y = np.asarray(polysoftmax.softmax(x, temperature=HUGE))
        assert polysoftmax.sample(x, 7, temperature=HUGE) == polysoftmax.sample(x, 7, temperature=math.inf)
        assert (polysoftmax.truncate(x, top_k=HUGE) == x).all()
        loss = polysoftmax.cross_entropy(x, xp.asarray(3), z_loss=HUGE)
    np.testing.assert_allclose(y, [1 / 3, 1 / 3, 0, 1 / 3], rtol=1e-6)
    assert loss == math.inf


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -HUGE}, "temperature must be 0 or greater, got -inf"),
        ({"top_p": HUGE}, r"top_p must lie in \[0, 1\], got inf"),
        ({"min_p": -HUGE}, r"min_p must lie in \[0, 1\], got -inf"),
        ({"top_k": -HUGE}, "top_k must be 0"),
    ],
)
def test_numbers_out_of_range(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        polysoftmax.sample(np.zeros(3), 7, **options)


@pytest.mark.parametrize("name", ["label_smoothing", "z_loss"])
@pytest.mark.parametrize("value", [HUGE, -HUGE])
def test_numbers_of_a_loss_out_of_range(name: str, value: int) -> None:
    if (name, value) == ("z_loss", HUGE):
        return
    with pytest.raises(ValueError, match=rf"{name} must lie in \[0, (1|inf)\], got -?inf"):
        polysoftmax.cross_entropy(np.zeros((1, 3)), np.asarray([1]), **{name: value})


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "top_k"])
def test_fractions_are_refused_by_name(name: str) -> None:
    message = f"{name} must be an int, a float or an array of the logits' library, got Fraction"
    with pytest.raises(TypeError, match=message):
        polysoftmax.sample(np.zeros(3), 7, **{name: Fraction(1, 2)})


# Dimensions


@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"top_p": 0.5}, {"axis": 5}, {"temperature": 0}], ids=str)
@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_a_draw_from_many_dimensions(name: str, options: dict[str, Any]) -> None:
    xp = pytest.importorskip(name)
    most = xp.asarray(np.zeros((1,) * 63 + (2,), np.float32))
    with pytest.raises(ValueError, match="sample takes at most 63 dimensions, got 64"):
        polysoftmax.sample(most, 7, **options)
    most = most[0]
    shape = most.shape[:5] + most.shape[6:] if "axis" in options else most.shape[:-1]
    assert polysoftmax.sample(most, 7, **options).shape == shape
