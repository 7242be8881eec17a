"""Ours and what its users would have called instead, on the same memory of the GPU."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from itertools import cycle
from typing import TYPE_CHECKING, Any

from benchmarks.cases import GPU_WORKING_SET, Case
from benchmarks.peers import OURS, SEED, library, ours
from tools.gpu.clocks import CLOCK, EVENTS, Contender

if TYPE_CHECKING:
    from collections.abc import Callable

COPY, READ = "copy", "read"
COMPILED, LIGER, QUACK = "torch.compile", "liger", "quack"


def enough(case: Case) -> int:
    """Return how many inputs no cache holds together, and at least two."""
    return max(2, -(-GPU_WORKING_SET // case.nbytes))


def inputs(torch: Any, case: Case, device: str, count: int) -> list[Any]:
    dtype = getattr(torch, case.dtype)
    return [(3 * torch.randn(case.shape, device=device)).to(dtype) for _ in range(count)]


def arena(torch: Any, case: Case, xs: list[Any]) -> dict[str, Contender]:
    """Return the contenders of every case: ours, the limits of the device, and PyTorch's own ways."""
    device, targets = xs[0].device, _targets(torch, case, xs[0].device)
    buffer = torch.empty_like(xs[0])
    # Flat and as words, since adding up 16-bit entries costs more than reading them; a row may have an odd number.
    words = [one.view(-1).view(torch.int32) for one in xs]
    found = {
        OURS: Contender(_rotated(_ours(torch, case, targets, device), xs)),
        COPY: Contender(_rotated(buffer.copy_, xs)),
        READ: Contender(_rotated(lambda one: one.amax(), words)),
    }
    if case.op == "cross_entropy":
        by_row = partial(torch.nn.functional.cross_entropy, target=targets, reduction="none")
        return found | {"torch": Contender(_rotated(by_row, xs))}
    second = _second(case, targets)
    for name, function in library("torch").PEERS[case.op].items():
        found[name] = Contender(_rotated(partial(_with, function, second), xs))
    return found


def peers(torch: Any, case: Case, xs: list[Any]) -> dict[str, Callable[[], Contender]]:
    """Return what makes the contenders of other libraries, those that are installed and know the operation."""
    targets = _targets(torch, case, xs[0].device)
    makers = {
        COMPILED: partial(_compiled, torch),
        "cupyx": partial(_cupyx, torch),
        "jax": partial(_jax, torch),
        LIGER: partial(_liger, torch),
        QUACK: _quack,
    }
    chosen = [name for name in makers if case.op in KNOWN[name] and _installed(name) and _takes(name, case.dtype)]
    return {name: partial(makers[name], case=case, xs=xs, targets=targets) for name in chosen}


KNOWN = {
    COMPILED: ("softmax",),
    "cupyx": ("softmax", "log_softmax", "logsumexp"),
    "jax": ("softmax", "log_softmax", "logsumexp", "cross_entropy_grad", "sample"),
    LIGER: ("softmax", "cross_entropy_grad"),
    QUACK: ("softmax", "cross_entropy"),
}
_PACKAGE = {COMPILED: "triton", LIGER: "liger_kernel"}


def _installed(name: str) -> bool:
    return find_spec(_PACKAGE.get(name, name)) is not None


def _takes(name: str, dtype: str) -> bool:
    # NumPy, and so CuPy, has no bfloat16 of its own.
    return not (name == "cupyx" and dtype == "bfloat16")


def call_ours_once(torch: Any, case: Case) -> None:
    """Call ours for the kernels it takes: the values are not looked at, and so take no memory."""
    x = torch.empty(case.shape, dtype=getattr(torch, case.dtype))
    _ours(torch, case, _targets(torch, case, x.device), x.device)(x)


def _targets(torch: Any, case: Case, device: Any) -> Any:
    return torch.arange(case.shape[0], device=device) * 7919 % case.length


def _second(case: Case, targets: Any) -> tuple[Any, ...]:
    if case.op.startswith("sample"):
        return (SEED,)
    return (targets,) if case.op == "cross_entropy_grad" else ()


def _with(function: Callable[..., Any], second: tuple[Any, ...], x: Any) -> Any:
    return function(x, *second, axis=-1)


def _rotated(function: Callable[[Any], Any], arrays: list[Any]) -> Callable[[], Any]:
    turn = cycle(arrays)
    return lambda: function(next(turn))


def _ours(torch: Any, case: Case, targets: Any, device: Any) -> Callable[[Any], Any]:
    import polysoftmax as ps

    if case.op == "cross_entropy":
        return lambda x: ps.cross_entropy(x, targets, reduction="none")
    # An int seed would be copied from the host, which no graph can hold.
    is_draw = case.op.startswith("sample")
    second = (ps.random.key(SEED, xp=torch, device=device),) if is_draw else _second(case, targets)
    return partial(_with, ours(case, library("torch")), second)


def _compiled(torch: Any, case: Case, xs: list[Any], targets: Any) -> Contender:
    del case, targets
    torch.compiler.reset()  # which compiles a function for eight sizes, and runs it as it stands for any other
    return Contender(_rotated(torch.compile(lambda x: torch.softmax(x, -1), dynamic=False), xs))


def _cupyx(torch: Any, case: Case, xs: list[Any], targets: Any) -> Contender:
    import cupy

    del targets
    function = library("cupy").PEERS[case.op]["cupyx"]
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)

    def call(x: Any) -> Any:
        with stream:
            return function(x, axis=-1)

    # By events: in a capture CuPy would ask the driver for memory, which ends it.
    return Contender(_rotated(call, [cupy.from_dlpack(one) for one in xs]), EVENTS)


def _jax(torch: Any, case: Case, xs: list[Any], targets: Any) -> Contender:
    import jax

    module = library("jax")
    if xs[0].is_cuda and not module.has_gpu():
        msg = f"JAX finds no GPU, only {jax.devices()}"
        raise RuntimeError(msg)
    if xs[0].is_cuda:
        torch.cuda.synchronize()  # JAX does not wait for PyTorch's stream
    second: tuple[Any, ...] = (module.key(),) if case.op.startswith("sample") else ()
    if case.op == "cross_entropy_grad":
        second = (jax.dlpack.from_dlpack(targets.int()),)
    function = jax.jit(partial(module.PEERS[case.op]["jax"], axis=-1))
    arrays = [jax.dlpack.from_dlpack(one) for one in xs]
    # By the clock: JAX has a stream of its own, and neither events nor graphs to time it.
    return Contender(_rotated(lambda x: function(x, *second), arrays), CLOCK, jax.block_until_ready)


def _liger(torch: Any, case: Case, xs: list[Any], targets: Any) -> Contender:
    if case.op == "softmax":
        from liger_kernel.ops.softmax import LigerSoftmaxFunction

        return Contender(_rotated(LigerSoftmaxFunction.apply, xs))
    from liger_kernel.transformers import LigerCrossEntropyLoss

    loss = LigerCrossEntropyLoss()

    def call(leaf: Any) -> Any:
        return torch.autograd.grad(loss(leaf, targets), leaf)

    # On copies, since it writes the gradient over the logits.
    return Contender(_rotated(call, [one.clone().requires_grad_() for one in xs]))


def _quack(case: Case, xs: list[Any], targets: Any) -> Contender:
    import quack

    if case.op == "softmax":
        return Contender(_rotated(quack.softmax, xs))
    return Contender(_rotated(lambda x: quack.cross_entropy(x, targets, reduction="none"), xs))
