"""Programs that leave this package behind: torch.export, jax.export, and ONNX through ndonnx.

Keys, temperature and filters are inputs, and the number of rows is open.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pytest

import polysoftmax as ps

if TYPE_CHECKING:
    from collections.abc import Callable

    Exporter = Callable[[Callable[..., Any], tuple[Any, ...]], Callable[..., Any]]

N: Final = 37


def is_by_rows(one: Any, inputs: tuple[Any, ...]) -> bool:
    return one.shape[:1] == inputs[0].shape[:1]


def by_torch(function: Callable[..., Any], inputs: tuple[Any, ...]) -> Callable[..., Any]:
    torch = pytest.importorskip("torch")

    class Program(torch.nn.Module):  # type: ignore[name-defined,misc]
        def forward(self, *given: Any) -> Any:
            return function(*given)

    rows = torch.export.Dim("rows", min=2)
    given = tuple(map(torch.asarray, inputs))
    shapes = tuple({0: rows} if is_by_rows(one, inputs) else None for one in inputs)
    program = torch.export.export(Program(), given, dynamic_shapes={"given": shapes}).module()
    return lambda *inputs: [np.asarray(y) for y in program(*map(torch.asarray, inputs))]


def by_jax(function: Callable[..., Any], inputs: tuple[Any, ...]) -> Callable[..., Any]:
    jax = pytest.importorskip("jax")
    pytest.importorskip("flatbuffers")
    from jax import export

    (rows,) = export.symbolic_shape("rows")
    kinds = [
        jax.ShapeDtypeStruct(
            (rows, *one.shape[1:]) if is_by_rows(one, inputs) else one.shape, jax.numpy.asarray(one).dtype
        )
        for one in inputs
    ]
    written = export.export(jax.jit(function))(*kinds).serialize()
    program = export.deserialize(written)
    return lambda *inputs: [np.asarray(y) for y in program.call(*map(jax.numpy.asarray, inputs))]


def by_onnx(function: Callable[..., Any], inputs: tuple[Any, ...]) -> Callable[..., Any]:
    ndonnx = pytest.importorskip("ndonnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    given = {
        f"input {i}": ndonnx.argument(
            shape=("rows", *one.shape[1:]) if is_by_rows(one, inputs) else one.shape, dtype=ndonnx.asarray(one).dtype
        )
        for i, one in enumerate(inputs)
    }
    answers = dict(enumerate(function(*given.values())))
    model = ndonnx.build(given, {f"output {i}": y for i, y in answers.items()})
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return lambda *inputs: session.run(None, dict(zip(given, map(np.asarray, inputs), strict=True)))


EXPORTERS = pytest.mark.parametrize("export", [by_torch, by_jax, by_onnx])


def logits(rows: int) -> Any:
    x = np.random.default_rng(rows).normal(scale=3.0, size=(rows, N)).astype(np.float32)
    x[0, :3] = -np.inf
    return x


def draw(x: Any, keys: Any, temperature: Any, top_k: Any, top_p: Any, min_p: Any) -> tuple[Any, Any]:
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    return ps.sample(x, keys, **options, return_logprobs=True)


def draw_inputs(rows: int) -> tuple[Any, ...]:
    options = np.random.default_rng(rows)
    keys = np.asarray(ps.random.key(options.integers(0, 2**31, rows)))
    temperature = options.choice(np.asarray([0.0, 0.5, 1.0, 2.0], np.float32), rows)
    top_p = options.choice(np.asarray([0.3, 0.9, 1.0], np.float32), rows)
    return logits(rows), keys, temperature, options.integers(0, 12, rows, dtype=np.int32), top_p, np.float32(0.01)


@EXPORTERS
def test_sample_draws_the_same_tokens(export: Exporter) -> None:
    """With each row's own key, temperature, top_k and top_p; the rows of one program may be any number."""
    program = export(draw, draw_inputs(5))
    for rows in (5, 64):
        inputs = draw_inputs(rows)
        tokens, logprobs = program(*inputs)
        want = draw(*inputs)
        np.testing.assert_array_equal(tokens, want[0])
        np.testing.assert_allclose(logprobs, want[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("export", [by_torch, by_jax])  # ONNX's is below
def test_one_key_serves_all_rows(export: Exporter) -> None:
    program = export(lambda x, key: (ps.sample(x, key),), (logits(5), np.asarray(ps.random.key(7))))
    for rows, seed in ((5, 7), (40, 8)):
        tokens = program(logits(rows), np.asarray(ps.random.key(seed)))[0]
        np.testing.assert_array_equal(tokens, ps.sample(logits(rows), seed))


def probabilities(x: Any, tokens: Any, temperature: Any) -> tuple[Any, ...]:
    return (
        ps.softmax(x, temperature=temperature),
        ps.log_softmax(x, temperature=temperature),
        ps.logsumexp(x, keepdims=True),
        ps.log_prob(x, tokens, temperature=temperature),
        ps.log_prob(x, tokens, top_k=4, top_p=0.95),
    )


@EXPORTERS
def test_probabilities(export: Exporter) -> None:
    def inputs(rows: int) -> tuple[Any, ...]:
        temperature = np.linspace(0.5, 2.0, rows, dtype=np.float32)
        return logits(rows), np.random.default_rng(rows).integers(0, N, (rows, 2), dtype=np.int32), temperature

    program = export(probabilities, inputs(5))
    for rows in (5, 9):
        x, tokens, temperature = inputs(rows)
        wide = x.astype(np.longdouble) / temperature[:, None]
        y = wide - np.log(np.sum(np.exp(wide), axis=-1, keepdims=True))
        total = np.log(np.sum(np.exp(x.astype(np.longdouble)), axis=-1, keepdims=True))
        few = ps.log_prob(x, tokens, top_k=4, top_p=0.95)
        expected = (np.exp(y), y, total, np.take_along_axis(y, tokens.astype(np.int64), axis=-1), few)
        for found, want in zip(program(x, tokens, temperature), expected, strict=True):
            np.testing.assert_allclose(found, want.astype(np.float32), rtol=2e-6, atol=2e-6)


def test_a_model_of_onnx_may_leave_the_length_of_a_row_open() -> None:
    """Where nothing is ordered or drawn; elsewhere an error says what to do."""
    ndonnx = pytest.importorskip("ndonnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    x = ndonnx.argument(shape=("batch", "time", "n"), dtype=ndonnx.float32)
    tokens = ndonnx.argument(shape=("batch", "time"), dtype=ndonnx.int64)
    nll = ps.cross_entropy(x, tokens, reduction="none")
    model = ndonnx.build(
        {"x": x, "tokens": tokens}, {"nll": nll, "log_prob": ps.log_prob(x, tokens), "p": ps.softmax(x)}
    )
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for shape in ((2, 3, 5), (1, 4, 1000)):
        given = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        at = given.argmin(axis=-1)
        wide = np.exp(given.astype(np.float64))
        p = wide / wide.sum(axis=-1, keepdims=True)
        log_p = np.log(np.take_along_axis(p, at[..., None], axis=-1)[..., 0])
        for found, want in zip(session.run(None, {"x": given, "tokens": at}), (-log_p, log_p, p), strict=True):
            np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
    for call in (lambda: ps.sample(x, 7), lambda: ps.truncate(x, top_p=0.5), lambda: ps.log_prob(x, tokens, top_k=2)):
        with pytest.raises(ValueError, match=r"must be known here, got shape \(None, None, None\): fix that length"):
            call()


def test_onnx_takes_more_than_one_open_number_of_rows() -> None:
    ndonnx = pytest.importorskip("ndonnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    x = ndonnx.argument(shape=("batch", "time", N), dtype=ndonnx.float32)
    where = ndonnx.argument(shape=("time", N), dtype=ndonnx.bool)
    key = ndonnx.argument(shape=(2,), dtype=ndonnx.int32)
    model = ndonnx.build(
        {"x": x, "where": where, "key": key}, {"tokens": ps.sample(x, key, top_p=0.9, where=where, draws=2)}
    )
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for shape, seed in (((2, 3), 7), ((4, 1), 8)):
        given = np.random.default_rng(0).normal(size=(*shape, N)).astype(np.float32)
        mask = np.random.default_rng(1).random((shape[1], N)) > 0.3
        (tokens,) = session.run(None, {"x": given, "where": mask, "key": np.asarray(ps.random.key(seed))})
        np.testing.assert_array_equal(tokens, ps.sample(given, seed, top_p=0.9, where=mask, draws=2))
