"""Every transformation of PyTorch on every function that it can differentiate, for logits and for parameters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.torch_cases import CASES, expected, places

if TYPE_CHECKING:
    from collections.abc import Callable

torch = pytest.importorskip("torch")
functional = torch.autograd.functional


@dataclass
class Setting:
    """Where a function is differentiated, with which cotangent and in which direction; and two such places."""

    v: Any
    c: Any
    d: Any
    both: Any

    def leaf(self) -> Any:
        return self.v.clone().requires_grad_()


def batched(f: Any, s: Any) -> Any:
    y = f(s.leaf())
    eye = torch.eye(y.numel(), dtype=y.dtype).reshape(-1, *y.shape)
    leaf = s.leaf()
    (found,) = torch.autograd.grad(f(leaf), leaf, eye, is_grads_batched=True)
    return found


def twice(m: Any, s: Any) -> Any:
    leaf = s.leaf()
    (g,) = torch.autograd.grad(m(leaf), leaf, create_graph=True)
    (found,) = torch.autograd.grad((g * s.d).sum(), leaf) if g.requires_grad else (torch.zeros_like(s.d),)
    return found


def dual(f: Any, s: Any) -> Any:
    with torch.autograd.forward_ad.dual_level():
        y = f(torch.autograd.forward_ad.make_dual(s.v, s.d))
        return torch.autograd.forward_ad.unpack_dual(y).tangent


class Holder(torch.nn.Module):
    def __init__(self, m: Any, v: Any) -> None:
        super().__init__()
        self.m, self.v = m, torch.nn.Parameter(v)

    def forward(self, factor: Any) -> Any:
        return self.m(self.v * factor)


def of_module(m: Any, s: Any) -> Any:
    module = Holder(m, torch.zeros_like(s.v))
    return torch.func.grad(lambda v: torch.func.functional_call(module, {"v": v}, (1.0,)))(s.v)


def checkpointed(m: Any, s: Any, *, use_reentrant: bool) -> Any:
    leaf = s.leaf()
    torch.utils.checkpoint.checkpoint(m, leaf, use_reentrant=use_reentrant).backward()
    return leaf.grad


F = torch.func
TRANSFORMS: dict[str, tuple[str, Callable[..., Any]]] = {
    "jacobian": ("J", lambda f, m, s: functional.jacobian(f, s.v)),
    "jacobian, vectorized": ("J", lambda f, m, s: functional.jacobian(f, s.v, vectorize=True)),
    "jacobian, forward": ("J", lambda f, m, s: functional.jacobian(f, s.v, vectorize=True, strategy="forward-mode")),
    "hessian": ("H", lambda f, m, s: functional.hessian(m, s.v)),
    "hessian, vectorized": ("H", lambda f, m, s: functional.hessian(m, s.v, vectorize=True)),
    "hessian, forward": (
        "H",
        lambda f, m, s: functional.hessian(m, s.v, vectorize=True, outer_jacobian_strategy="forward-mode"),
    ),
    "is_grads_batched": ("J", lambda f, m, s: batched(f, s)),
    "grad of grad": ("Hd", lambda f, m, s: twice(m, s)),
    "forward_ad": ("Jd", lambda f, m, s: dual(f, s)),
    "func.grad": ("g", lambda f, m, s: F.grad(m)(s.v)),
    "func.vjp": ("g", lambda f, m, s: F.vjp(f, s.v)[1](s.c.reshape(f(s.v).shape))[0]),
    "func.jvp": ("Jd", lambda f, m, s: F.jvp(f, (s.v,), (s.d,))[1]),
    "func.jacfwd": ("J", lambda f, m, s: F.jacfwd(f)(s.v)),
    "func.jacrev": ("J", lambda f, m, s: F.jacrev(f)(s.v)),
    "func.hessian": ("H", lambda f, m, s: F.hessian(m)(s.v)),
    "jacfwd of jacfwd": ("H", lambda f, m, s: F.jacfwd(F.jacfwd(m))(s.v)),
    "jacrev of jacfwd": ("H", lambda f, m, s: F.jacrev(F.jacfwd(m))(s.v)),
    "jacrev of jacrev": ("H", lambda f, m, s: F.jacrev(F.jacrev(m))(s.v)),
    "jvp of grad": ("Hd", lambda f, m, s: F.jvp(F.grad(m), (s.v,), (s.d,))[1]),
    "grad of jvp": ("Hd", lambda f, m, s: F.grad(lambda v: F.jvp(m, (v,), (s.d,))[1])(s.v)),
    "vmap": ("y", lambda f, m, s: F.vmap(f)(s.both)),
    "vmap of grad": ("gs", lambda f, m, s: F.vmap(F.grad(m))(s.both)),
    "grad of vmap": ("gs", lambda f, m, s: F.grad(lambda v: F.vmap(m)(v).sum())(s.both)),
    "functional_call": ("g", lambda f, m, s: of_module(m, s)),
    "checkpoint": ("g", lambda f, m, s: checkpointed(m, s, use_reentrant=False)),
    "checkpoint, reentrant": ("g", lambda f, m, s: checkpointed(m, s, use_reentrant=True)),
}


def setting(name: str) -> tuple[Any, Any, Any]:
    one, want = CASES[name], expected(name)
    c, d = torch.from_numpy(want["c"]), torch.from_numpy(want["d"])
    v, u = map(torch.from_numpy, places(one))

    def moment(x: Any) -> Any:
        return (one.function(x).reshape(-1) * c).sum()

    return one.function, moment, Setting(v, c, d, torch.stack([v, u]))


def close(found: Any, want: Any) -> None:
    np.testing.assert_allclose(found.numpy(force=True).reshape(-1), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", CASES)
def test_transformations_of_functions(name: str, transform: str) -> None:
    kind, run = TRANSFORMS[transform]
    close(run(*setting(name)), expected(name)[kind])


COMPILED = (
    "softmax by T",
    "logsumexp by weights",
    "cross_entropy, options",
    "cross_entropy by probabilities",
    "kl_divergence by T",
    "entropy",
    "truncate",
    "sample, top_k",
)


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_gradients(name: str) -> None:
    _, moment, s = setting(name)
    leaf = s.leaf()
    torch.compile(moment, fullgraph=True, backend="aot_eager", dynamic=False)(leaf).backward()
    close(leaf.grad, expected(name)["g"])


@pytest.mark.parametrize("name", ["cross_entropy, options", "entropy by T"])
@pytest.mark.parametrize("transform", ["func.grad", "vmap of grad", "func.jacfwd"])
def test_compiled_transformations(name: str, transform: str) -> None:
    kind, run = TRANSFORMS[transform]
    f, m, s = setting(name)
    program = torch.compile(lambda v, both: run(f, m, replace(s, v=v, both=both)), fullgraph=True, backend="aot_eager")
    close(program(s.v, s.both), expected(name)[kind])
