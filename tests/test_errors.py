"""Bad input: the class of the error, and a message that says what was got and what to do."""

from __future__ import annotations

import math
import re
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
    lambda x: polysoftmax.top_log_probs(x, 1)[0],
    lambda x: polysoftmax.gumbel_softmax(x, 0),
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
        (np.asarray(["a"]), "real numbers.*dtype <U1.*convert"),
        (np.rec.array([(1.0, 2)], dtype=[("a", "f8"), ("b", "i4")]), "real numbers.*dtype .*'a'.*convert"),
        (np.zeros(2, "M8[s]"), r"real numbers.*dtype datetime64\[s\].*convert"),
        (np.zeros(2, object), "real numbers.*dtype object.*convert"),
    ],
    ids=["list", "str", "float", "None", "masked", "bool", "complex", "text", "records", "dates", "objects"],
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
        (np.asarray([0, 1]), TypeError, r"axis must be an int, a tuple of ints, or None, got array\(\[0, 1\]\)"),
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
        ({"temperature": [1.0]}, TypeError, "temperature must be an int, a float or an array .*got list"),
        ({"temperature": True}, TypeError, "got bool"),
        ({"temperature": 1j}, TypeError, "got complex"),
        ({"temperature": np.ones(4)}, ValueError, r"shape \(4,\); .*\(3, 4\).* \(\), \(3,\) or \(3, 1\)"),
        ({"temperature": np.ones((3, 4))}, ValueError, r"shape \(3, 4\); for an input of shape \(3, 4\)"),
        ({"temperature": np.asarray([True] * 3)}, TypeError, "temperature must hold real numbers.*got dtype bool"),
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
    with pytest.raises(TypeError, match=r"weights must hold real numbers.*got dtype bool"):
        polysoftmax.logsumexp(X, weights=np.ones((3, 4), bool))
    for shape in ((3,), (4, 3), (2, 4, 4)):
        with pytest.raises(ValueError, match=rf"weights has shape {re.escape(str(shape))}.*\(3, 4\)"):
            polysoftmax.logsumexp(X, weights=np.ones(shape))


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


def test_two_devices_of_the_standard() -> None:
    xp = pytest.importorskip("array_api_strict")
    there = xp.Device("device1")
    x, targets = xp.ones((3, 4), device=there), xp.zeros(3, dtype=xp.int64, device=there)
    with pytest.raises(TypeError, match=r"input is on device .*device1.* and where on .*CPU_DEVICE.*: move one"):
        polysoftmax.softmax(x, where=xp.ones((3, 4), dtype=xp.bool))
    for function in FUNCTIONS:
        y = function(x)
        assert y.device == there
    for y in (
        polysoftmax.softmax(x, temperature=0, where=x > 0),
        polysoftmax.logsumexp(x, weights=x),
        polysoftmax.cross_entropy(x, targets, label_smoothing=0.1),
        polysoftmax.truncate(x, top_k=2, top_p=0.5),
        *polysoftmax.sample(x, polysoftmax.random.key(1, xp=xp), top_k=1, return_logprobs=True),
        *polysoftmax.log_prob(x, targets, top_k=1, return_rank=True),
    ):
        assert y.device == there


def test_numbers_of_8_bits() -> None:
    """They hold no probabilities, so nothing is answered in them."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for name in ("float8_e4m3fn", "float8_e5m2", "int4"):
        narrow = X.astype(getattr(ml_dtypes, name))
        for function in FUNCTIONS:
            with pytest.raises(TypeError, match=f"floats of 16 bits or more.*dtype {name}: convert it"):
                function(narrow)
        for call in (
            lambda one: polysoftmax.softmax(X, temperature=one[:, 0]),
            lambda one: polysoftmax.softmax_jvp(X, one),
            lambda one: polysoftmax.logsumexp(X, weights=one),
            lambda one: polysoftmax.cross_entropy(X, one),
        ):
            with pytest.raises(TypeError, match=f"16 bits or more.*dtype {name}"):
                call(narrow)
    with pytest.raises(TypeError, match=r"dtype must be real floating, of 16 bits or more, got .*float8_e5m2"):
        polysoftmax.softmax(X, dtype=ml_dtypes.float8_e5m2)


@pytest.mark.parametrize("engine", ["auto", "portable"])
def test_numbers_of_8_bits_in_other_libraries(engine: str) -> None:
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    for xp, dtype in ((torch, torch.float8_e4m3fn), (jax.numpy, jax.numpy.float8_e4m3fn)):
        x = xp.zeros((3, 4), dtype=dtype)
        with polysoftmax.engine(engine):
            for function in FUNCTIONS:
                with pytest.raises(TypeError, match=r"floats of 16 bits or more.*float8_e4m3fn: convert it"):
                    function(x)


@pytest.mark.skipif(not hasattr(np.dtypes, "StringDType"), reason="NumPy 2.0 and later")
def test_strings() -> None:
    text = np.asarray(["a"], dtype=np.dtypes.StringDType())
    for function in FUNCTIONS:
        with pytest.raises(TypeError, match=r"real numbers.*StringDType.*convert"):
            function(text)
    with pytest.raises(TypeError, match=r"temperature must hold real numbers.*StringDType"):
        polysoftmax.softmax(X, temperature=text)
    with pytest.raises(TypeError, match=r"where must be a boolean array.*StringDType"):
        polysoftmax.softmax(X, where=text)


def test_keys_are_no_logits() -> None:
    jax = pytest.importorskip("jax")
    for function in FUNCTIONS:
        with pytest.raises(TypeError, match=r"real numbers.*dtype key<fry>"):
            function(jax.random.key(0))


@pytest.mark.parametrize("index", [2**31, -(2**31) - 1, 2**63, 2**200])
def test_an_index_that_no_target_can_be_ignores_none(index: int) -> None:
    for name in ("numpy", "jax.numpy", "torch"):
        xp = pytest.importorskip(name)
        x, targets = xp.zeros((2, 4)), xp.asarray([1, 3])
        for reduction in ("mean", "none"):
            y = polysoftmax.cross_entropy(x, targets, ignore_index=index, reduction=reduction)
            np.testing.assert_allclose(y, math.log(4), rtol=1e-6)


class Metres(np.ndarray):
    """As astropy's and unyt's arrays do it: every operation of NumPy's goes through its own method."""

    def __array_ufunc__(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("the unit is lost")


def test_units() -> None:
    x = X.view(Metres)
    for function in FUNCTIONS:
        with pytest.raises(TypeError, match=r"got a .*Metres, .*units.*: pass its plain numbers, numpy\.asarray\(x\)"):
            function(x)
    for keywords in ({"temperature": x[:, 0]}, {"where": x}):
        with pytest.raises(TypeError, match="pass its plain numbers"):
            polysoftmax.softmax(X, **keywords)


class Named(np.ndarray):
    """Arithmetic is NumPy's own, so nothing is lost."""


def test_subclasses_with_the_arithmetic_of_numpy() -> None:
    assert type(polysoftmax.softmax(X.view(Named))) is np.ndarray


class Hostile:
    """Says that it is an array, and of no library."""

    def __array_namespace__(self, api_version: str | None = None) -> None:
        del api_version


def test_an_array_of_no_library() -> None:
    for function in FUNCTIONS:
        with pytest.raises(TypeError, match=r"__array_namespace__ of .*Hostile returns no .*: convert the array"):
            function(Hostile())
    with pytest.raises(TypeError, match="Hostile returns no array API namespace"):
        polysoftmax.softmax(X, where=Hostile())


def test_types_are_not_kept_for_ever() -> None:
    from polysoftmax import _arrays, _formula

    for _ in range(2 * _arrays.MOST_TYPES):
        polysoftmax.softmax(X.view(type("Subclass", (np.ndarray,), {})))
        assert len(_arrays._LIBRARIES) <= _arrays.MOST_TYPES
        assert len(_formula._RUNNERS) <= _arrays.MOST_TYPES


@pytest.mark.filterwarnings("ignore::UserWarning")  # prototypes and betas, PyTorch says of each
@pytest.mark.parametrize("engine", ["auto", "portable"])
def test_tensors_that_are_no_grid_of_numbers(engine: str) -> None:
    torch = pytest.importorskip("torch")
    x = torch.ones(3, 4)
    pieces = [torch.ones(2), torch.ones(4)]
    given = (
        (x.to_sparse(), r"layout torch\.sparse_coo: pass x\.to_dense\(\)"),
        (x.to_sparse_csr(), r"layout torch\.sparse_csr: pass x\.to_dense\(\)"),
        (x.to_mkldnn(), r"layout torch\._mkldnn: pass x\.to_dense\(\)"),
        (torch.masked.masked_tensor(x, x > 0), r"MaskedTensor.*pass x\.get_data\(\) together with where="),
        (torch.nested.nested_tensor(pieces), r"nested tensor.*torch\.nested\.to_padded_tensor"),
        (torch.nested.nested_tensor(pieces, layout=torch.jagged), r"nested tensor.*to_padded_tensor"),
    )
    with polysoftmax.engine(engine):
        for one, message in given:
            for function in FUNCTIONS:
                with pytest.raises(TypeError, match=message):
                    function(one)
        with pytest.raises(TypeError, match=r"layout torch\.sparse_coo"):
            polysoftmax.softmax(x, where=(x > 0).to_sparse())
        with pytest.raises(TypeError, match=r"layout torch\.sparse_coo"):
            polysoftmax.softmax(x, axis=None, temperature=x[:1, :1].to_sparse())
