"""Programs that PyTorch records or compiles: the formula is in them, whatever computes its logits before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import polysoftmax as ps

if TYPE_CHECKING:
    from collections.abc import Callable

torch = pytest.importorskip("torch")

ROWS = 8
TARGETS = torch.arange(ROWS) % 3
TEMPERATURES = torch.tensor([0.0, 1e-9, 1.0, 0.7, 2.0, torch.inf, 0.5, 0.0])

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "softmax": ps.softmax,
    "softmax along axis 0": lambda x: ps.softmax(x, axis=0),
    "softmax, T": lambda x: ps.softmax(x, temperature=0.7),
    "softmax, temperatures": lambda x: ps.softmax(x, temperature=TEMPERATURES),
    "softmax, T = 0": lambda x: ps.softmax(x, temperature=0),
    "softmax, mask": lambda x: ps.softmax(x, where=x > 0),
    "log_softmax": ps.log_softmax,
    "log_softmax, T = 0": lambda x: ps.log_softmax(x, temperature=0),
    "log_softmax, temperatures": lambda x: ps.log_softmax(x, temperature=TEMPERATURES, where=x > 0),
    "logsumexp": ps.logsumexp,
    "logsumexp, mask": lambda x: ps.logsumexp(x, where=x > 0, keepdims=True),
    "logsumexp, weights": lambda x: ps.logsumexp(x, weights=torch.cos(x)),
    "softmax_jvp": lambda x: ps.softmax_jvp(x, torch.cos(x), temperature=0.7),
    "softmax_vjp": lambda x: ps.softmax_vjp(x, torch.cos(x)),
    "log_softmax_jvp": lambda x: ps.log_softmax_jvp(x, torch.cos(x), where=x > 0),
    "log_softmax_vjp": lambda x: ps.log_softmax_vjp(x, torch.cos(x), temperature=TEMPERATURES),
    "softmax_jacobian": lambda x: ps.softmax_jacobian(x[..., :5], temperature=0.7),
    "log_softmax_jacobian": lambda x: ps.log_softmax_jacobian(x[..., :5]),
    "cross_entropy": lambda x: ps.cross_entropy(x, TARGETS, reduction="none"),
    "cross_entropy, options": lambda x: ps.cross_entropy(
        x, TARGETS, weight=torch.exp(x[0]), ignore_index=2, label_smoothing=0.1, z_loss=1e-3
    ),
    "cross_entropy, probabilities": lambda x: ps.cross_entropy(x, torch.softmax(x, -1)),
    "entropy": ps.entropy,
    "entropy, temperatures": lambda x: ps.entropy(x, temperature=TEMPERATURES, where=x > 0),
    "kl_divergence": lambda x: ps.kl_divergence(x, -x),
    "kl_divergence, temperatures": lambda x: ps.kl_divergence(x, -x, temperature=TEMPERATURES),
    "truncate, top_k": lambda x: ps.truncate(x, top_k=3),
    "truncate, top_p": lambda x: ps.truncate(x, top_p=0.7),
    "truncate, min_p": lambda x: ps.truncate(x, min_p=0.1, temperature=TEMPERATURES),
    "sample": lambda x: ps.sample(x, 7),
    "sample, T = 0": lambda x: ps.sample(x, 7, temperature=0),
    "sample, temperatures": lambda x: ps.sample(x, 7, temperature=TEMPERATURES, return_logprobs=True),
    "sample, top_k": lambda x: ps.sample(x, 7, top_k=2),
    "sample, top_p": lambda x: ps.sample(x, 7, top_p=0.7, where=x > 0),
}


def logits(seed: int, n: int, dtype: Any = torch.float32) -> Any:
    x = 4 * torch.randn(ROWS, n, generator=torch.Generator().manual_seed(seed))
    x[:, 1] += torch.linspace(0, 40, ROWS)  # the last rows are confident
    return x.to(dtype)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("n", [7, 4000])  # formulas that run as they stand, and those that have kernels
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_trace_holds_the_formula_and_not_its_answer(name: str, n: int) -> None:
    function = FUNCTIONS[name]
    program = torch.jit.trace(function, logits(1, n), check_trace=False)
    x = logits(2, n)
    torch.testing.assert_close(program(x), function(x), equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_has_gradients() -> None:
    def loss(x: Any) -> Any:
        return ps.cross_entropy(x, TARGETS)

    program = torch.jit.trace(loss, logits(1, 300), check_trace=False)
    found, want = (logits(2, 300).requires_grad_() for _ in range(2))
    program(found).backward()
    loss(want).backward()
    torch.testing.assert_close(found.grad, want.grad)


DIFFERENTIABLE = ("softmax, temperatures", "log_softmax", "logsumexp", "cross_entropy", "entropy", "kl_divergence")


@pytest.mark.parametrize("n", [7, 4000])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_batched_cotangents(name: str, n: int) -> None:
    x = logits(4, n).requires_grad_()
    y = FUNCTIONS[name](x)
    cotangents = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(5))
    (found,) = torch.autograd.grad(y, x, cotangents, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, x, one, retain_graph=True)[0] for one in cotangents]
    # The formula, and kernels that add 4000 cotangents in another order: 64 roundings of their sum, about 60.
    torch.testing.assert_close(found, torch.stack(each), rtol=0, atol=64 * 60 * 2.0**-24)


@pytest.mark.parametrize("name", ["softmax", "logsumexp", "entropy"])
def test_vectorized_hessians(name: str) -> None:
    def moment(x: Any) -> Any:
        y = FUNCTIONS[name](x)
        return (y * torch.cos(torch.arange(y.numel()).reshape(y.shape))).sum()

    x = logits(6, 3, torch.float64)
    found, want = (torch.autograd.functional.hessian(moment, x, vectorize=how) for how in (True, False))
    torch.testing.assert_close(found, want)


SOME = ("softmax, temperatures", "softmax, T = 0", "logsumexp", "cross_entropy", "entropy")


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_work_before_a_call(dtype: str) -> None:
    """Inductor computes 16 bits in 32, and would leave the rounding of the product out."""

    def answers(x: Any) -> tuple[Any, ...]:
        return tuple(FUNCTIONS[name](x) for name in SOME)

    v = logits(3, 100, getattr(torch, dtype)).requires_grad_()
    found = torch.compile(lambda v: answers(v * 0.73), fullgraph=True, dynamic=False)(v)
    x = (v.detach() * 0.73).requires_grad_()
    want = answers(x)
    for name, a, b in zip(SOME, found, want, strict=True):
        # Below float32's rounding of the logits, which a loss of a confident row does not see.
        np.testing.assert_allclose(*(y.detach().double() for y in (a, b)), rtol=2e-5, atol=1e-12, err_msg=name)
    (by_v,) = torch.autograd.grad(found[3].float().sum(), v)
    (by_x,) = torch.autograd.grad(want[3].float().sum(), x)
    unit = torch.finfo(v.dtype).eps
    np.testing.assert_allclose(by_v.double(), 0.73 * by_x.double(), rtol=4 * unit, atol=2e-7)
