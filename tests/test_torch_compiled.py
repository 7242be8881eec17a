"""Compiled and exported programs of PyTorch: kernels in an operator on the CPU, and any number and length of rows."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import polysoftmax as ps
from polysoftmax import _arrays, _formula, _ops
from polysoftmax._formula import Call
from polysoftmax._losses import CROSS_ENTROPY, ENTROPY, KL_DIVERGENCE
from polysoftmax._probability import LOG_PROB
from polysoftmax._sampling import SAMPLE
from polysoftmax._softmax import LOG_SOFTMAX, LOGSUMEXP, SOFTMAX
from polysoftmax._truncation import TRUNCATE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from polysoftmax._formula import RowFormula

torch = pytest.importorskip("torch")
testing = pytest.importorskip("torch._dynamo.testing")

EVERYTHING = os.environ.get("POLYSOFTMAX_TEST_WORK") == "all"
OPERATOR, WORDS = "polysoftmax.formula.default", "polysoftmax.words.default"


def has_kernels() -> bool:
    return ps.explain(np.zeros(3), "softmax").engine == "native"


needs_kernels = pytest.mark.skipif(not has_kernels(), reason="the native library is not there")


@pytest.fixture(autouse=True)
def new_programs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def logits(batch: int = 4, n: int = 33, dtype: Any = torch.float32) -> Any:
    return 3 * torch.randn(batch, n, generator=torch.Generator().manual_seed(batch * n)).to(dtype)


def classes(x: Any) -> Any:
    return torch.arange(x.shape[0]) % 3


def temperatures(x: Any) -> Any:
    return 1 + torch.cos(x[:, 0]) / 2


SAMPLES: dict[str, Callable[[Any], Any]] = {
    "sample": lambda x: ps.sample(x, 7),
    "sample, top_k": lambda x: ps.sample(x, 7, top_k=2, temperature=0.7),
    "sample, top_p": lambda x: ps.sample(x, 7, top_p=0.8, temperature=temperatures(x)),
    "sample, log-probabilities": lambda x: ps.sample(x, 7, return_logprobs=True),
}
FAMILY: dict[str, Callable[[Any], Any]] = {
    "softmax": ps.softmax,
    "softmax, T": lambda x: ps.softmax(x, temperature=temperatures(x), where=x > -2),
    "log_softmax": ps.log_softmax,
    "logsumexp": ps.logsumexp,
    "logsumexp, weights": lambda x: ps.logsumexp(x, weights=torch.cos(x), axis=0),
    "softmax_jvp": lambda x: ps.softmax_jvp(x, torch.cos(x)),
    "softmax_vjp": lambda x: ps.softmax_vjp(x, torch.cos(x)),
    "log_softmax_jvp": lambda x: ps.log_softmax_jvp(x, torch.cos(x)),
    "log_softmax_vjp": lambda x: ps.log_softmax_vjp(x, torch.cos(x), temperature=temperatures(x)),
    "softmax_jacobian": ps.softmax_jacobian,
    "log_softmax_jacobian": ps.log_softmax_jacobian,
}
LOSSES_AND_DRAWS: dict[str, Callable[[Any], Any]] = {
    "cross_entropy": lambda x: ps.cross_entropy(x, classes(x)),
    "cross_entropy, options": lambda x: ps.cross_entropy(
        x, classes(x), weight=torch.ones(x.shape[-1]), label_smoothing=0.1, z_loss=1e-3, ignore_index=0
    ),
    "cross_entropy, probabilities": lambda x: ps.cross_entropy(x, torch.softmax(x, -1), reduction="none"),
    "entropy": lambda x: ps.entropy(x, temperature=temperatures(x)),
    "kl_divergence": lambda x: ps.kl_divergence(x, -x),
    "truncate, top_k": lambda x: ps.truncate(x, top_k=3),
    "truncate, top_p": lambda x: ps.truncate(x, top_p=0.7),
    "truncate, min_p": lambda x: ps.truncate(x, min_p=0.1, temperature=0.5),
    "log_prob, top_k": lambda x: ps.log_prob(x, classes(x), top_k=3, temperature=temperatures(x)),
    **SAMPLES,
}
FUNCTIONS = {**FAMILY, **LOSSES_AND_DRAWS}
LESS = ("softmax", "softmax_vjp", "log_softmax_jvp", "softmax_jacobian", "cross_entropy", "sample", "sample, top_k")
MOST = [name for name in FUNCTIONS if name not in LESS]
"""Without those whose steps are those of another with more options, or of its twin in the other of two formulas."""


def same(found: Any, want: Any) -> None:
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6, equal_nan=True)


# Any number and length of rows


class Graphs:
    """A backend that runs what PyTorch captures, and remembers which operators of this package each graph has."""

    def __init__(self) -> None:
        self.operators: list[list[str]] = []

    def __call__(self, graph: Any, _: Any) -> Any:
        self.operators.append([str(node.target) for node in graph.graph.nodes if "polysoftmax" in str(node.target)])
        return graph.forward


def operators_of(name: str) -> list[str]:
    """Return what a function calls: a kernel, one more for log-probabilities, and the words of a seed."""
    return [WORDS] * (name in SAMPLES) + [OPERATOR] * (1 + (name == "sample, log-probabilities"))


def all_of(names: Iterable[str]) -> Callable[[Any], list[Any]]:
    """Return a function of a tensor for each name: PyTorch captures many in half the time that one by one takes."""
    return lambda tensors: [FUNCTIONS[name](x) for name, x in zip(names, tensors, strict=True)]


def same_of_each(names: Iterable[str], found: list[Any], want: list[Any], **tolerances: float) -> None:
    for name, y, expected in zip(names, found, want, strict=True):
        message = f"{name}: {{}}".format
        torch.testing.assert_close(y, expected, equal_nan=True, msg=message, **tolerances)


GROUPS = {
    "auto": [[name for name in MOST if name in part] for part in (FAMILY, LOSSES_AND_DRAWS)],
    "portable": [["cross_entropy", "truncate, top_k"]],
}


@pytest.mark.parametrize(
    ("engine", "names"),
    [(engine, names) for engine, groups in GROUPS.items() for names in groups],
    ids=["the family", "losses and draws", "portable"],
)
def test_few_programs_serve_every_shape(engine: str, names: list[str]) -> None:
    """One for the first shape, and one for all others: PyTorch takes a length for dynamic as soon as it changes."""
    graphs, function = Graphs(), all_of(names)
    with ps.engine(engine):
        program = torch.compile(lambda x: function([x] * len(names)), fullgraph=True, backend=graphs)
        for i in range(10 if engine == "auto" else 4):
            x = logits(4 + i, 40 + i)
            same_of_each(names, program(x), function([x] * len(names)), rtol=1e-5, atol=1e-6)
    assert len(graphs.operators) <= 2
    expected = [one for name in names for one in operators_of(name)] if engine == "auto" and has_kernels() else []
    assert graphs.operators == [expected] * len(graphs.operators)


@pytest.mark.parametrize("name", ["softmax", "cross_entropy", "sample, top_k"])
def test_a_second_call_compiles_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the first call of the process is a compiled one: what is kept between calls must not be a guard."""
    for module, table in ((_arrays, "_LIBRARIES"), (_arrays, "_FLOAT_BITS"), (_formula, "_RUNNERS"), (_ops, "_OPS")):
        monkeypatch.setattr(module, table, {})
    count = testing.CompileCounter()
    program = torch.compile(FUNCTIONS[name], fullgraph=True, backend=count)
    for _ in range(3):
        program(logits())
    assert count.frame_count == 1


def test_dtypes_of_other_libraries_that_were_seen_before() -> None:
    """torch.compile cannot compare a dtype of ml_dtypes with another."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for one in ("float8_e4m3fn", "float8_e5m2", "int4", "uint4", "bfloat16"):
        _arrays.float_bits(np, np.dtype(getattr(ml_dtypes, one)))
    program = torch.compile(FUNCTIONS["truncate, top_p"], fullgraph=True, backend="eager")
    same(program(logits()), FUNCTIONS["truncate, top_p"](logits()))


class Exported(torch.nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)


# What a draw's log-probabilities add to it is in the case of log_prob, and both in tests/test_exported.py.
@pytest.mark.parametrize("name", [name for name in MOST if EVERYTHING or name != "sample, log-probabilities"])
def test_exported_programs_take_any_number_and_length_of_rows(name: str) -> None:
    # The draw is cut into blocks whose length follows from that of the rows: 8 from 17 to 64.
    least = 17 if name in SAMPLES else 4
    shapes = {0: torch.export.Dim("rows", min=2), 1: torch.export.Dim("n", min=least, max=64)}
    program = torch.export.export(Exported(FUNCTIONS[name]), (logits(),), dynamic_shapes={"x": shapes})
    assert OPERATOR not in str(program.graph)
    for batch, n in ((4, 33), (9, 20), (2, 64)):
        x = logits(batch, n)
        same(program.module()(x), FUNCTIONS[name](x))


# The operator


# What is special of 16 bits is in the operator, which each formula calls in the same way.
NARROW = ("cross_entropy", "truncate, top_p", "sample, log-probabilities")


@needs_kernels
def test_what_has_a_derivative_calls_a_kernel_where_gradients_are_recorded() -> None:
    names, graphs = [name for name in FAMILY if name in MOST], Graphs()
    function = all_of(names)
    program = torch.compile(lambda x: function([x] * len(names)), backend=graphs, fullgraph=True)
    program(logits().requires_grad_())
    assert graphs.operators == [[OPERATOR] * sum(not any(word in name for word in ("jvp", "vjp")) for name in names)]


@needs_kernels
def test_a_program_that_samples_is_one_kernel_and_has_nothing_to_compile() -> None:
    from torch._dynamo.backends.common import aot_autograd

    steps: list[str] = []

    def compiler(graph: Any, _: Any) -> Any:
        steps.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch.compile(SAMPLES["sample"], backend=aot_autograd(fw_compiler=compiler), fullgraph=True)(logits())
    assert [step for step in steps if step != "aten.detach.default"] == [
        WORDS,
        "polysoftmax.kernel.default",
        "<built-in function getitem>",
    ]


NUMBERS: dict[str, tuple[Callable[[Any, Any], Any], tuple[Any, ...], int]] = {
    "seed": (ps.sample, (7, 8, 9), 2),
    "step": (
        lambda x, step: ps.sample(x, ps.random.fold_in(torch.tensor([0, 7], dtype=torch.int32), step)),
        (1, 2, 3),
        2,
    ),
    "top_k": (lambda x, k: ps.sample(x, 7, top_k=k), (5, 6, 9), 2),
    "seed and top_k": (lambda x, i: ps.sample(x, i, top_k=i), (5, 6, 9), 2),
    "ignore_index": (lambda x, i: ps.cross_entropy(x, classes(x), ignore_index=i), (0, 1, 2), 2),
    "axes": (lambda x, axis: ps.softmax(x, axis=(axis,)), (0, 1, -1), 3),
    "top_p": (lambda x, p: ps.truncate(x, top_p=p), (0.5, 0.6, 0.7), 3),
    "temperature": (lambda x, t: ps.sample(x, 7, temperature=t), (0.5, 0.6, 0.7), 3),
}
"""Functions of a number, values of it, and the most programs that these may take."""


# PyTorch takes many seconds to capture a draw's formula: one of them is enough, with two numbers.
IN_FORMULAS = ("seed and top_k", "ignore_index", "axes", "top_p")


@pytest.mark.parametrize(
    ("name", "engine"),
    [(name, "auto") for name in NUMBERS if name != "seed and top_k"] + [(name, "portable") for name in IN_FORMULAS],
)
def test_numbers_that_change(name: str, engine: str) -> None:
    """From its second value on PyTorch has a symbol for a number: it may ask it for nothing but arithmetic."""
    function, values, most = NUMBERS[name]
    count = testing.CompileCounter()
    with ps.engine(engine):
        program = torch.compile(function, fullgraph=True, backend=count)
        for value in values:
            same(program(logits(), value), function(logits(), value))
    assert count.frame_count <= most


@needs_kernels
@pytest.mark.parametrize(
    ("names", "dtype"), [(tuple(FUNCTIONS), "float32"), (NARROW, "bfloat16")], ids=["float32", "bfloat16"]
)
def test_compiled_code_has_the_bits_of_eager_code(names: tuple[str, ...], dtype: str) -> None:
    x = logits(12, dtype=getattr(torch, dtype))
    x[1, 0], x[2, 0], x[3, ::2], x[4], x[5] = torch.nan, torch.inf, -torch.inf, -torch.inf, 0.5
    function, given = all_of(names), [x] * len(names)
    program = torch.compile(function, fullgraph=True, backend="aot_eager")
    same_of_each(names, program(given), function(given), rtol=0, atol=0)


DIFFERENTIABLE = (*(name for name in MOST if "sample" not in name), "sample, log-probabilities")


@needs_kernels
@pytest.mark.parametrize(
    ("names", "dtype"), [(DIFFERENTIABLE, "float32"), (NARROW, "bfloat16")], ids=["float32", "bfloat16"]
)
def test_compiled_gradients_are_those_of_eager_code(names: tuple[str, ...], dtype: str) -> None:
    """Each function has logits of its own, so that one backward pass has the gradients of all."""
    function = all_of(names)

    def moment(tensors: list[Any]) -> Any:
        total = 0.0
        for answer in function(tensors):
            y = answer[1] if isinstance(answer, tuple) else torch.where(answer > -torch.inf, answer, 0.0)
            total = total + (y.double() * torch.cos(torch.arange(y.numel())).reshape(y.shape)).sum()
        return total

    slopes = []
    for run in (moment, torch.compile(moment, fullgraph=True, backend="aot_eager")):
        given = [logits(dtype=getattr(torch, dtype)).requires_grad_() for _ in names]
        run(given).backward()
        slopes.append([x.grad for x in given])
    unit = torch.finfo(slopes[0][0].dtype).eps
    same_of_each(names, *slopes, rtol=4 * unit, atol=1e-6)


@needs_kernels
def test_transformed_values_in_compiled_code_take_the_formula() -> None:
    vmapped = torch.func.vmap(ps.entropy)
    sloped = torch.func.grad(lambda x: ps.entropy(x).sum())
    for function in (vmapped, sloped):
        graphs = Graphs()
        torch.compile(function, backend=graphs, fullgraph=True)(logits())
        assert graphs.operators == [[]]


@needs_kernels
def test_a_learned_temperature_in_compiled_code() -> None:
    found = []
    for compiled in (False, True):
        t = torch.tensor(0.8, requires_grad=True)
        x = logits().requires_grad_()

        def objective(x: Any, t: Any) -> Any:
            _, log_p = ps.sample(x, 7, temperature=t, top_k=5, return_logprobs=True)
            return log_p.sum() + ps.entropy(x, temperature=t).mean()

        run = torch.compile(objective, fullgraph=True, backend="aot_eager") if compiled else objective
        run(x, t).backward()
        found.append((x.grad, t.grad))
    torch.testing.assert_close(*found)


@needs_kernels
def test_second_derivatives_of_the_operator() -> None:
    """In code that PyTorch captures and runs as it is; what it compiles in two directions has no second ones."""
    x = logits(2, 5, torch.float64)
    program = torch.compile(ps.entropy, fullgraph=True, backend="eager")
    assert torch.autograd.gradgradcheck(program, x.clone().requires_grad_())
    assert torch.autograd.gradcheck(program, x.clone().requires_grad_())


_LOGITS = (True, False, False)
OPERATED: dict[RowFormula, tuple[tuple[Any, ...], dict[str, Any]]] = {
    CROSS_ENTROPY: (
        (torch.tensor([[1], [0], [2], [3]]), None),
        {"ignore_index": None, "label_smoothing": 0.0, "z_loss": 0.25},
    ),
    ENTROPY: ((None, None), {}),
    KL_DIVERGENCE: ((torch.ones(4, 33), 0.5, None), {}),
    TRUNCATE: ((None, None, None, 0.5, None), {"top_k": None}),
    SAMPLE: (
        (torch.zeros(2, dtype=torch.int32), None, None, None, None, None),
        {"top_k": 3, "is_one_key": True, "draws": 2, "replace": True},
    ),
    LOG_PROB: ((torch.tensor([[1], [0], [2], [3]]), None, None, None, None, None), {"top_k": None}),
    SOFTMAX: ((None, None), {}),
    LOGSUMEXP: ((None, None), {}),
    LOG_SOFTMAX.pullback(_LOGITS): ((0.5, None, None, torch.ones(4, 33)), {}),
    ENTROPY.pullback(_LOGITS): ((None, None, None, torch.ones(4, 1)), {}),
    KL_DIVERGENCE.pullback((True, *_LOGITS)): ((torch.ones(4, 33), None, None, None, torch.ones(4, 1)), {}),
}


@pytest.mark.parametrize("engine", ["native", "cuda"])  # without a GPU the formulas answer in place of CUDA kernels
@pytest.mark.parametrize("formula", OPERATED, ids=lambda formula: formula.name)
def test_the_operator_keeps_the_rules_of_operators(formula: RowFormula, engine: str) -> None:
    """Its schema, its shapes under fake and dynamic tensors, its derivative when traced."""
    from polysoftmax.engines import _operator

    x = logits().requires_grad_(formula.vjp is not None)
    others, options = OPERATED[formula]
    call = Call(formula, options, 1, x.dtype, torch.int64 if formula is SAMPLE else x.dtype)
    torch.library.opcheck(_operator.formula, _operator.arguments_of(engine, call, (x, *others)))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
@needs_kernels
def test_inductor_calls_the_operator() -> None:
    config = pytest.importorskip("torch._inductor.config")

    def drawn(x: Any) -> Any:
        return ps.sample(x * 0.73, 7, top_k=5), ps.cross_entropy(x * 0.73, classes(x))

    x = logits(8, 1000).requires_grad_()
    # Whether the C++ compiler knows the CPU's vectors would be asked of it by compiling a file for each kind of them.
    with config.patch({"cpp.vec_isa_ok": True}):
        found = torch.compile(drawn, fullgraph=True)(x)
        tokens, loss = drawn(x)
        assert torch.equal(found[0], tokens)
        torch.testing.assert_close(found[1], loss)
        torch.testing.assert_close(torch.autograd.grad(found[1], x), torch.autograd.grad(loss, x))
