"""Bad input: the class of the error, and a message that says what was got and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import polysoftmax

if TYPE_CHECKING:
    from collections.abc import Callable

X = np.zeros((3, 4))
FUNCTIONS = (
    polysoftmax.softmax,
    polysoftmax.log_softmax,
    polysoftmax.logsumexp,
    polysoftmax.softmax_jacobian,
    polysoftmax.log_softmax_jacobian,
    polysoftmax.entropy,
    polysoftmax.truncate,
    lambda x: polysoftmax.sample(x, 0),
    lambda x: polysoftmax.softmax_jvp(x, x),
    lambda x: polysoftmax.kl_divergence(x, x),
    lambda x: polysoftmax.cross_entropy(x, x),
)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([1.0, 2.0], r"got list: wrap it first, for example numpy\.asarray\(\[\.\.\.\]\)"),
        ("logits", r"got str: wrap it first"),
        (1.0, "got float: wrap it first"),
        (None, "got NoneType: wrap it first"),
        (np.ma.masked_array([1.0, 2.0], mask=[True, False]), "MaskedArray.*pass x.data together with where="),
        (np.asarray([True, False]), "real numbers.*dtype bool.*convert"),
        (np.asarray([1j, 2.0]), "real numbers.*dtype complex128.*convert"),
        (np.asarray(["a"]), "real numbers.*dtype <U1"),
    ],
    ids=["list", "str", "float", "None", "masked", "bool", "complex", "text"],
)
def test_what_is_no_array_of_real_numbers(function: Callable[[Any], Any], x: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        function(x)


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_matrix() -> None:
    with pytest.raises(TypeError, match=r"numpy\.matrix.*pass numpy\.asarray"):
        polysoftmax.softmax(np.matrix([[1.0]]))


@pytest.mark.parametrize(
    ("axis", "error", "message"),
    [
        (2, ValueError, "axis 2 is out of bounds for an array of dimension 2"),
        (-3, IndexError, "axis -3 is out of bounds for an array of dimension 2"),
        ((0, 5), IndexError, "axis 5 is out of bounds"),
        ((0, -2), ValueError, r"axis \(0, -2\) names an axis twice"),
        (0.0, TypeError, "axis must be an int, a tuple of ints, or None, got 0.0"),
        ("0", TypeError, "axis must be an int"),
        (True, TypeError, "axis must be an int"),
    ],
)
def test_axis(axis: Any, error: type[Exception], message: str) -> None:
    for function in (polysoftmax.softmax, polysoftmax.logsumexp, polysoftmax.entropy, polysoftmax.truncate):
        with pytest.raises(error, match=message):
            function(X, axis=axis)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"temperature": -0.5}, ValueError, "temperature must be 0 or greater, got -0.5"),
        ({"temperature": float("nan")}, ValueError, "temperature must be 0 or greater, got nan"),
        ({"temperature": np.float32(-1)}, ValueError, "got -1.0"),
        ({"temperature": [1.0]}, TypeError, "temperature must be a real number or an array .*got list"),
        ({"temperature": True}, TypeError, "got bool"),
        ({"temperature": 1j}, TypeError, "got complex"),
        ({"temperature": np.ones(4)}, ValueError, r"shape \(4,\); .*\(3, 4\).* \(\), \(3,\) or \(3, 1\)"),
        ({"temperature": np.ones((3, 4))}, ValueError, r"shape \(3, 4\); for an input of shape \(3, 4\)"),
        ({"temperature": np.asarray([True] * 3)}, TypeError, "temperature must hold real numbers, got dtype bool"),
        ({"where": np.ones((3, 4))}, TypeError, "where must be a boolean array.*float64"),
        ({"where": np.ones((2, 4), bool)}, ValueError, r"where has shape \(2, 4\).*broadcast.*\(3, 4\)"),
        ({"where": np.ones((5, 3, 4), bool)}, ValueError, r"where has shape \(5, 3, 4\)"),
        ({"where": True}, TypeError, "where must be an array of numpy.*got bool"),
        ({"dtype": np.int32}, TypeError, "dtype must be real floating"),
        ({"dtype": "nonsense"}, TypeError, "'nonsense' is not a dtype of numpy"),
        ({"dtype": np.complex64}, TypeError, "dtype must be real floating"),
        ({"dtype": bool}, TypeError, "dtype must be real floating"),
    ],
)
def test_parameters(keywords: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        polysoftmax.softmax(X, **keywords)


def test_weights() -> None:
    with pytest.raises(TypeError, match="weights must hold real numbers, got dtype bool"):
        polysoftmax.logsumexp(X, weights=np.ones((3, 4), bool))
    with pytest.raises(ValueError, match=r"weights has shape \(3,\).*\(3, 4\)"):
        polysoftmax.logsumexp(X, weights=np.ones(3))


def test_tangents() -> None:
    with pytest.raises(ValueError, match=r"tangent must have the shape of the input, \(3, 4\), got \(4,\)"):
        polysoftmax.softmax_jvp(X, np.ones(4))
    with pytest.raises(TypeError, match="cotangent must be an array of numpy, as the input is, got float"):
        polysoftmax.log_softmax_vjp(X, 1.0)


def test_two_libraries() -> None:
    torch = pytest.importorskip("torch")
    for keywords in ({"temperature": np.ones(3)}, {"where": np.ones((3, 4), bool)}):
        with pytest.raises(TypeError, match=r"input is an array of torch and .* one of numpy: convert one of them"):
            polysoftmax.softmax(torch.zeros(3, 4), **keywords)
    with pytest.raises(TypeError, match="is not a dtype of torch"):
        polysoftmax.softmax(torch.zeros(3), dtype=np.float32)
    with pytest.raises(TypeError, match="dtype='nonsense' is not a dtype of torch"):
        polysoftmax.softmax(torch.zeros(3), dtype="nonsense")
    with pytest.raises(TypeError, match=r"torch.float32 is not a dtype of numpy"):
        polysoftmax.softmax(X, dtype=torch.float32)
    for call in (
        lambda: polysoftmax.softmax_vjp(torch.zeros(3), np.ones(3)),
        lambda: polysoftmax.kl_divergence(torch.zeros(3), np.ones(3)),
        lambda: polysoftmax.logsumexp(torch.zeros(3), weights=np.ones(3)),
        lambda: polysoftmax.cross_entropy(torch.zeros(3, 4), np.ones(3, np.int64)),
    ):
        with pytest.raises(TypeError, match=r"input is an array of torch and .* one of numpy: convert one of them"):
            call()


def test_two_devices() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="input is on device cpu and where on meta: move one of them"):
        polysoftmax.softmax(torch.zeros(3), where=torch.ones(3, dtype=torch.bool, device="meta"))
