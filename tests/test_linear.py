"""linear_cross_entropy and linear_log_prob: chunk by chunk what the whole logits have, in little memory."""

from __future__ import annotations

import functools
import math
import tracemalloc
from typing import TYPE_CHECKING, Any

import mpmath
import numpy as np
import pytest

import polysoftmax as ps
from tests.loss_cases import WEIGHT, close, exact, gradient, index_dtype, log_softmax, row_loss

if TYPE_CHECKING:
    from collections.abc import Callable

    from polysoftmax.testing import Adapter

HIDDEN = ((0.5, -1.0, 2.0), (1.5, 0.25, -0.75), (-2.0, 1.0, 0.5), (0.0, 0.0, 0.0), (3.0, -0.5, 1.0))
HEAD = ((1.0, 0.5, -0.25), (-0.5, 2.0, 1.0), (0.75, -1.5, 0.5), (0.25, 0.125, 1.0))
BIAS = (0.5, -1.0, 0.25, 0.0)
CLASSES = (2, 0, -1, 3, 1)
TEMPERATURES = (0.5, 1.0, 2.0, 1.5, 0.75)
SOFTCAP = 3.0
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"softcap": SOFTCAP, "label_smoothing": 0.125, "z_loss": 0.25, "class_weight": WEIGHT},
)
differentiable = pytest.mark.backends(lambda can: can.autodiff and (can.traced or can.gpu or not can.compiles))


def exact_logits(hidden: Any, head: Any, bias: Any, softcap: float | None) -> list[list[Any]]:
    rows = [[mpmath.fdot(h, w) + b for w, b in zip(head, bias, strict=True)] for h in hidden]
    return rows if softcap is None else [[softcap * mpmath.tanh(x / softcap) for x in row] for row in rows]


def exact_loss(hidden: Any, head: Any, bias: Any, *, softcap: float | None = None, **options: Any) -> Any:
    """The mean of the losses, over the weights of the classes that count."""
    w = options.pop("class_weight", None)
    logits = exact_logits(hidden, head, bias, softcap)
    losses = [row_loss(row, t, weight=w, **options) for row, t in zip(logits, CLASSES, strict=True) if t >= 0]
    return mpmath.fsum(losses) / mpmath.fsum((w or (1.0,) * 4)[t] for t in CLASSES if t >= 0)


def exact_gradient(place: int, arrays: list[Any], **options: Any) -> Any:
    """The gradient of the mean for one of the arrays, by mpmath's differentiation at 200 bits."""
    with mpmath.workprec(200):
        found = np.empty(np.shape(np.asarray(arrays[place], float)))
        for index in np.ndindex(found.shape):

            def along(value: Any, index: tuple[int, ...] = index) -> Any:
                moved = np.asarray(arrays[place], dtype=object).copy()
                moved[index] = value
                return exact_loss(*[moved.tolist() if i == place else one for i, one in enumerate(arrays)], **options)

            found[index] = float(mpmath.diff(along, np.asarray(arrays[place], dtype=object)[index]))
        return found


def in_mpmath() -> list[Any]:
    return [exact(HIDDEN), exact(HEAD), exact([BIAS])[0]]


def keywords(lib: Adapter, options: dict[str, Any], dtype: str) -> dict[str, Any]:
    given = {name: lib.asarray(one, dtype) if name == "class_weight" else one for name, one in options.items()}
    return given | {"ignore_index": -1, "chunk_size": 2}


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "options"])
def test_values_and_closed_gradients(lib: Adapter, options: dict[str, Any]) -> None:
    dtype = lib.can.default_float
    arrays = [lib.asarray(one, dtype) for one in (HIDDEN, HEAD, BIAS)]
    targets = lib.asarray(CLASSES, index_dtype(lib))
    given = keywords(lib, options, dtype)
    hidden, head, bias = arrays

    def both(hidden: Any, head: Any, bias: Any) -> tuple[Any, ...]:
        value = ps.linear_cross_entropy(hidden, head, targets, bias=bias, **given)
        loss, gradients = ps.linear_cross_entropy_value_and_grad(hidden, head, targets, bias=bias, **given)
        return value, loss, *gradients

    value, loss, *gradients = lib.call(both, hidden, head, bias)
    with mpmath.workprec(200):
        want = float(exact_loss(*in_mpmath(), **options))
    close(lib, value, want, dtype)
    close(lib, loss, want, dtype)
    for place, one in enumerate(gradients):
        close(lib, one, exact_gradient(place, in_mpmath(), **options), dtype)


@differentiable
@pytest.mark.parametrize("place", [0, 1, 2], ids=["hidden", "weight", "bias"])
def test_gradients_by_the_library(lib: Adapter, place: int) -> None:
    dtype = lib.can.default_float
    arrays = [lib.asarray(one, dtype) for one in (HIDDEN, HEAD, BIAS)]
    targets = lib.asarray(CLASSES, index_dtype(lib))
    given = keywords(lib, OPTIONS[1], dtype)

    def loss(moved: Any) -> Any:
        hidden, head, bias = [moved if i == place else one for i, one in enumerate(arrays)]
        return ps.linear_cross_entropy(hidden, head, targets, bias=bias, **given)

    close(lib, gradient(lib, loss, arrays[place]), exact_gradient(place, in_mpmath(), **OPTIONS[1]), dtype)


def test_log_probabilities(lib: Adapter) -> None:
    dtype = lib.can.default_float
    hidden, head, bias = (lib.asarray(one, dtype) for one in (HIDDEN, HEAD, BIAS))
    several = np.asarray([[2, 1], [0, 3], [1, 2], [3, 0], [1, 1]])
    tokens, t = lib.asarray(several, index_dtype(lib)), lib.asarray(TEMPERATURES, dtype)
    where = lib.asarray([True, True, True, False], "bool")

    def call(hidden: Any, head: Any, bias: Any) -> Any:
        return ps.linear_log_prob(hidden, head, tokens, bias=bias, temperature=t, where=where, chunk_size=2)

    y = lib.call(call, hidden, head, bias)
    with mpmath.workprec(200):
        logits = exact_logits(*in_mpmath(), None)
        rows = [[*log_softmax(row[:3], one), mpmath.ninf] for row, one in zip(logits, TEMPERATURES, strict=True)]
    close(lib, y, [[float(row[i]) for i in tokens] for row, tokens in zip(rows, several, strict=True)], dtype)


def random_layer(n: int, d: int, v: int, dtype: Any = np.float32) -> tuple[Any, Any, Any]:
    generator = np.random.default_rng(0)
    hidden, head = generator.normal(size=(n, d)), generator.normal(size=(v, d)) / math.sqrt(d)
    return hidden.astype(dtype), head.astype(dtype), generator.integers(0, v, n)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 8, 100, None])
def test_chunks_of_any_size_answer_the_same(chunk_size: int | None) -> None:
    hidden, head, targets = random_layer(7, 4, 50, np.float64)
    whole = ps.cross_entropy(hidden @ head.T, targets, reduction="none")
    losses = ps.linear_cross_entropy(hidden, head, targets, reduction="none", chunk_size=chunk_size)
    np.testing.assert_allclose(losses, whole, rtol=1e-13)
    filters = {"temperature": 0.5 + np.arange(7.0), "top_k": 1 + np.arange(7), "top_p": 0.9}
    tokens = ps.sample(hidden @ head.T, 3, **filters)
    found = ps.linear_log_prob(hidden, head, tokens, chunk_size=chunk_size, **filters)
    np.testing.assert_allclose(found, ps.log_prob(hidden @ head.T, tokens, **filters), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 0), (2, 3)])
def test_shapes(batch: tuple[int, ...]) -> None:
    hidden, head, targets = random_layer(math.prod(batch), 4, 50)
    hidden, targets = hidden.reshape(*batch, 4), targets.reshape(batch)
    t = np.ones((*batch, 1))
    assert ps.linear_cross_entropy(hidden, head, targets, reduction="none").shape == batch
    assert ps.linear_log_prob(hidden, head, targets, temperature=t).shape == batch
    pairs = np.stack([targets, targets], axis=-1)
    masks = np.ones((*batch[-1:], 50), dtype=bool)
    assert ps.linear_log_prob(hidden, head, pairs, where=masks, chunk_size=1).shape == (*batch, 2)
    loss, (of_hidden, of_head, of_bias) = ps.linear_cross_entropy_value_and_grad(hidden, head, targets)
    assert (loss.shape, of_hidden.shape, of_head.shape, of_bias) == ((), hidden.shape, head.shape, None)


def test_rows_that_do_not_count() -> None:
    hidden, head, targets = random_layer(6, 4, 50)
    hidden[2] = np.nan
    targets[2] = -1
    loss, gradients = ps.linear_cross_entropy_value_and_grad(hidden, head, targets, ignore_index=-1, chunk_size=2)
    assert np.isfinite(loss)
    assert not gradients.hidden[2].any()
    targets[:] = -1
    loss, gradients = ps.linear_cross_entropy_value_and_grad(hidden, head, targets, ignore_index=-1)
    assert (loss, np.nansum(np.abs(gradients.hidden))) == (0, 0)


# Memory. The logits of these have 4,000,000 bytes.

N, D, V = 1000, 8, 1000
CHUNK = 32
MOST = 4 * N * V // 8


def test_numpy_takes_little_memory() -> None:
    hidden, head, targets = random_layer(N, D, V)
    calls: list[Callable[[], Any]] = [
        functools.partial(ps.linear_cross_entropy, hidden, head, targets, chunk_size=CHUNK),
        functools.partial(ps.linear_cross_entropy_value_and_grad, hidden, head, targets, chunk_size=CHUNK),
        functools.partial(ps.linear_log_prob, hidden, head, targets, top_p=0.9, chunk_size=CHUNK),
    ]
    for call in calls:
        call()
        tracemalloc.start()
        call()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MOST


def test_torch_makes_no_large_tensor() -> None:
    torch = pytest.importorskip("torch")
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):  # type: ignore[misc]
        bytes = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            del types
            y = function(*args, **(kwargs or {}))
            sizes = [one.numel() * one.itemsize for one in tree_leaves(y) if isinstance(one, torch.Tensor)]
            self.bytes = max(self.bytes, *sizes, 0)
            return y

    hidden, head, targets = map(torch.from_numpy, random_layer(N, D, V))
    hidden.requires_grad_()
    head.requires_grad_()
    with Largest() as largest:
        ps.linear_cross_entropy(hidden, head, targets, chunk_size=CHUNK).backward()
        ps.linear_log_prob(hidden, head, targets, chunk_size=CHUNK).sum().backward()
    assert 0 < largest.bytes < MOST
    with Largest() as largest:
        ps.cross_entropy(hidden @ head.mT, targets).backward()
    assert largest.bytes >= 4 * N * V  # what is looked for would be seen


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_jax_takes_little_memory(dtype: str) -> None:
    jax = pytest.importorskip("jax")
    hidden, head, targets = map(jax.numpy.asarray, random_layer(N, D, V))
    hidden, head = hidden.astype(dtype), head.astype(dtype)

    def loss(hidden: Any, head: Any) -> Any:
        return ps.linear_cross_entropy(hidden, head, targets, chunk_size=CHUNK)

    program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(hidden, head).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2 * MOST  # one array more than elsewhere


# Derivatives, beside those of the logits as a whole


@pytest.fixture(scope="module")
def of_torch() -> Any:
    torch = pytest.importorskip("torch")
    targets = torch.tensor(CLASSES)
    arrays = [torch.tensor(one, dtype=torch.float64, requires_grad=True) for one in (HIDDEN, HEAD, BIAS, WEIGHT)]

    given: dict[str, Any] = {"softcap": SOFTCAP, "ignore_index": -1, "z_loss": 0.25, "chunk_size": 2}

    def chunked(hidden: Any, head: Any, bias: Any, weight: Any) -> Any:
        return ps.linear_cross_entropy(*(hidden, head, targets), bias=bias, class_weight=weight, **given)

    return torch, chunked, arrays


def test_torch_differentiates_twice(of_torch: Any) -> None:
    torch, chunked, arrays = of_torch
    assert torch.autograd.gradcheck(chunked, arrays, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(chunked, arrays)


def test_torch_differentiates_log_probabilities(of_torch: Any) -> None:
    torch, _, (hidden, head, bias, _) = of_torch
    tokens = torch.tensor([[0, 1], [2, 3], [1, 1], [3, 0], [2, -1]])[:4]
    for t in (torch.tensor(TEMPERATURES[:4]), torch.tensor(0.5), torch.ones(1, 1)):

        def chunked(hidden: Any, head: Any, bias: Any, t: Any) -> Any:
            return ps.linear_log_prob(hidden[:4], head, tokens, bias=bias, temperature=t, chunk_size=3)

        given = [hidden, head, bias, t.double().requires_grad_()]
        assert torch.autograd.gradcheck(chunked, given, check_forward_ad=True)


def test_torch_func(of_torch: Any) -> None:
    torch, chunked, arrays = of_torch
    want = torch.autograd.grad(chunked(*arrays), arrays)
    torch.testing.assert_close(torch.func.grad(chunked, (0, 1, 2, 3))(*arrays), want)
    hidden, head, bias, weight = arrays
    several = torch.func.vmap(torch.func.grad(chunked), (None, None, 0, None))(hidden, head, bias.expand(2, 4), weight)
    torch.testing.assert_close(several, want[0].expand(2, 5, 3))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compiles_one_operator(of_torch: Any, backend: str) -> None:
    torch, chunked, arrays = of_torch
    want = chunked(*arrays)
    compiled = torch.compile(chunked, fullgraph=True, backend=backend)
    y = compiled(*arrays)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(torch.autograd.grad(y, arrays), torch.autograd.grad(want, arrays))


def test_the_weight_may_make_the_hidden_states(of_torch: Any) -> None:
    torch, chunked, (_, head, bias, weight) = of_torch
    found = []
    for function in (chunked, torch.func.functionalize(chunked)):
        tied = head[[0, 1, 2, 3, 0]] * 2
        found += torch.autograd.grad(function(tied, head, bias, weight), head)
    torch.testing.assert_close(found[0], found[1])


def test_sixteen_bits_are_added_up_in_thirty_two() -> None:
    torch = pytest.importorskip("torch")
    hidden, head, targets = map(torch.from_numpy, random_layer(2048, 4, 8))
    hidden, head = hidden.abs().bfloat16(), head.bfloat16().requires_grad_()
    ps.linear_cross_entropy(hidden, head, targets, reduction="sum", chunk_size=4).backward()
    wide = head.detach().double().requires_grad_()
    ps.cross_entropy(hidden.double() @ wide.mT, targets, reduction="sum").backward()
    error = (head.grad.double() - wide.grad).abs().max() / wide.grad.abs().max()
    assert error < 2**-7

    jax = pytest.importorskip("jax")

    def loss(head: Any) -> Any:
        of_jax = jax.numpy.asarray(hidden.float().numpy(), dtype="bfloat16")
        return ps.linear_cross_entropy(of_jax, head, jax.numpy.asarray(targets.numpy()), reduction="sum", chunk_size=4)

    of_jax = jax.jit(jax.grad(loss))(jax.numpy.asarray(head.detach().float().numpy(), dtype="bfloat16"))
    error = np.abs(np.asarray(of_jax, np.float64) - wide.grad.numpy()).max() / wide.grad.abs().max()
    assert error < 2**-7


def test_jax_transforms() -> None:
    jax = pytest.importorskip("jax")
    arrays = [jax.numpy.asarray(one, dtype="float32") for one in (HIDDEN, HEAD, BIAS)]
    targets = jax.numpy.asarray(CLASSES)

    def chunked(hidden: Any, head: Any, bias: Any) -> Any:
        return ps.linear_cross_entropy(hidden, head, targets, bias=bias, ignore_index=-1, z_loss=0.25, chunk_size=2)

    def whole(hidden: Any, head: Any, bias: Any) -> Any:
        return ps.cross_entropy(hidden @ head.T + bias, targets, ignore_index=-1, z_loss=0.25)

    def transformed(loss: Any) -> Any:
        tangents = [jax.numpy.ones_like(one) for one in arrays]
        batched = jax.vmap(jax.grad(loss), (None, None, 0))(*arrays[:2], jax.numpy.stack([arrays[2], 2 * arrays[2]]))
        return jax.jvp(loss, arrays, tangents), jax.hessian(loss, (0, 1))(*arrays), batched

    found, want = jax.jit(transformed, static_argnums=0)(chunked), jax.jit(transformed, static_argnums=0)(whole)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-6)


# Errors


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"targets": np.asarray([50, 0])}, IndexError, "target 50 is out of range for 50 classes"),
        ({"targets": np.ones((2, 50))}, TypeError, r"cross_entropy\(hidden @ weight.mT, targets\)"),
        ({"targets": np.asarray([1])}, ValueError, r"without the class axis, \(2,\), got \(1,\)"),
        ({"hidden": np.ones((2, 4), int)}, TypeError, "hidden must be floating, got dtype int64"),
        ({"hidden": np.asarray(1.0)}, ValueError, r"shape \(..., d\)"),
        ({"weight": np.ones((50, 3), np.float32)}, ValueError, r"shape \(v, 4\) for hidden states of shape \(2, 4\)"),
        ({"weight": np.ones((50, 4))}, TypeError, "float32, got float64: cast one of them"),
        ({"weight": np.ones((0, 4), np.float32)}, ValueError, "at least one class"),
        ({"bias": np.ones(49, np.float32)}, ValueError, r"bias must have one entry a class, shape \(50,\)"),
        ({"class_weight": np.ones(49)}, ValueError, "class_weight must have one entry a class"),
        ({"softcap": 0.0}, ValueError, "softcap must be above 0 and finite, got 0.0"),
        ({"softcap": "15"}, TypeError, "softcap must be a number or None, got str"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be 1 or greater, got 0"),
        ({"chunk_size": 1.5}, TypeError, "chunk_size must be an int or None, got float"),
        ({"reduction": "average"}, ValueError, 'reduction must be "none", "sum" or "mean"'),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], text: str) -> None:
    hidden, weight, targets = random_layer(2, 4, 50)
    given = {"hidden": hidden, "weight": weight, "targets": targets, **change}
    with pytest.raises(error, match=text):
        ps.linear_cross_entropy(given.pop("hidden"), given.pop("weight"), given.pop("targets"), **given)


def test_errors_of_the_others() -> None:
    hidden, weight, targets = random_layer(2, 4, 50)
    with pytest.raises(ValueError, match='"sum" or "mean" for a gradient, got \'none\''):
        ps.linear_cross_entropy_value_and_grad(hidden, weight, targets, reduction="none")  # type: ignore[arg-type]
    with pytest.raises(IndexError, match="token 50 is out of range for 50 tokens"):
        ps.linear_log_prob(hidden, weight, np.asarray([50, 0]))
    with pytest.raises(ValueError, match="temperature has shape"):
        ps.linear_log_prob(hidden, weight, targets, temperature=np.ones(3))
