"""Every smoke case on the GPU: fresh random inputs, poisoned answers, and the formula in float64 beside them."""

from __future__ import annotations

import math
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

from tools.gpu.cases import Case, choose, smoke_cases
from tools.gpu.worker import in_brief, new_kernels

if TYPE_CHECKING:
    from collections.abc import Callable

    from tools.gpu.asked import Asked

POISON, POISONED_TOKEN = math.nan, -77
LARGEST_DRY = 170_000
"""Entries of a case that a dry run still takes: every layout's lengths, but few rows."""

UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
TEMPERATURES = (0.7, 0.0, math.inf, 1.0, 2.0)
CLOSE_LOGPROBS = 1e-5


class Arguments(NamedTuple):
    """The arrays of a call; ``options`` are those of the function."""

    x: Any
    cotangent: Any
    targets: Any
    options: dict[str, Any]

    def double(self) -> Arguments:
        options = {key: one.double() if key == "temperature" else one for key, one in self.options.items()}
        return Arguments(self.x.double(), self.cotangent.double(), self.targets, options)


def names(asked: Asked) -> list[str]:
    fits = (case.name for case in smoke_cases() if not asked.dry or case.entries <= LARGEST_DRY)
    return choose(list(fits), asked.case, asked.every)


def start(asked: Asked) -> Callable[[str], dict[str, Any]]:
    """Return what runs a case by its name: on the GPU, or in a dry run the formula on the CPU."""
    import torch

    from polysoftmax.engines.cuda import _devices

    cases = {case.name: case for case in smoke_cases()}
    launched: list[str] = []
    if not asked.dry:
        new_kernels()
        watch(_devices._TorchDevice, launched)

    def run(name: str) -> dict[str, Any]:
        launched.clear()
        found = check(torch, cases[name], asked.seed, dry=asked.dry)
        if not asked.dry:
            found = by_kernels(found, launched)
        if not found["ok"]:
            found["kernels"] = list(launched)
            print(f"FAILED {name} --seed {asked.seed}: {_words(found)}", flush=True)
        return found if asked.dry else {**found, **new_kernels().since_last()}

    return run


def by_kernels(found: dict[str, Any], launched: list[str]) -> dict[str, Any]:
    """Fail a case that no kernel answered: the formula in its place is right, and not what is to be tested."""
    return found if launched or "error" in found else {**found, "ok": False, "error": "no kernel ran"}


def watch(kind: type, launched: list[str]) -> None:
    """Poison what a kernel has to write, so that an entry it leaves out is seen, and list the kernels launched."""
    empty, launch = kind.empty, kind.launch  # type: ignore[attr-defined]

    def poisoned(self: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        y = empty(self, shape, dtype)
        return y.fill_(POISON if y.is_floating_point() else POISONED_TOKEN)

    def noted(self: Any, plan: Any, arguments: Any) -> None:
        launched.append(plan.kernel.name)
        launch(self, plan, arguments)

    kind.empty, kind.launch = poisoned, noted  # type: ignore[attr-defined]


def check(torch: Any, case: Case, seed: int, *, dry: bool) -> dict[str, Any]:
    """Run a case, and say whether its answer is within the bounds, and what was found."""
    try:
        given = arguments(torch, case, seed, "cpu" if dry else "cuda")
        y, expected = answer(case, given, seed, "portable" if dry else "cuda"), reference(case, given, seed)
        found = compare(torch, case, given.x, y, expected)
        if not dry:
            torch.cuda.synchronize()
    except Exception as error:  # a case that raises is a result, and the next one is to be tried
        found = {"ok": False, "error": in_brief(error), "restart": not dry and _is_dead(torch)}
    return found


def _is_dead(torch: Any) -> bool:
    """Whether an error has ended the process's CUDA context, so that every later call would fail too."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def seed_of(case: Case, seed: int) -> int:
    """Return a seed that depends on the name, so that a case alone repeats what it was in the whole run."""
    return zlib.crc32(f"{seed} {case.name}".encode())


def arguments(torch: Any, case: Case, seed: int, device: str, normal: Any = None) -> Arguments:
    """Make the arrays of a case; ``normal`` makes memory in place of random numbers where no value matters."""
    generator = torch.Generator().manual_seed(seed_of(case, seed))
    if normal is None:

        def normal(rows: int, n: int, dtype: Any) -> Any:
            return (4 * torch.randn(rows, n, generator=generator)).to(dtype)

    x, cotangent = (normal(case.rows, case.n, dtype=getattr(torch, case.dtype)) for _ in range(2))
    if case.rows > 4 and case.n > 2 and not (case.is_derivative or case.base == "cross_entropy"):
        x[1, ::2], x[2], x[3, -1], x[4, 0] = -math.inf, -math.inf, math.nan, math.inf
    options = dict(case.options)
    if "where" in options:
        options["where"] = (torch.rand(case.rows, case.n, generator=generator) < 0.8).to(device)
    if "temperature" in options:
        t = torch.tensor(TEMPERATURES).repeat(case.rows // len(TEMPERATURES) + 1)[: case.rows]
        options["temperature"] = t.to(device, torch.float64 if case.dtype == "float64" else torch.float32)
    targets = torch.arange(case.rows, device=device) % case.n
    return Arguments(x.to(device), cotangent.to(device), targets, options)


def answer(case: Case, given: Arguments, seed: int, engine: str) -> Any:
    import polysoftmax as ps

    with ps.engine(engine):
        return _gradient(case, given) if case.function.endswith("_gradient") else _call(case, given, given.x, seed)


def reference(case: Case, given: Arguments, seed: int) -> Any:
    """Return the formula's answer, in float64; what is drawn and what is removed follow from the logits' own dtype."""
    is_exact = case.base in ("sample", "truncate")
    return answer(case, given if is_exact else given.double(), seed, "portable")


def _call(case: Case, given: Arguments, x: Any, seed: int = 0) -> Any:
    import polysoftmax as ps

    if case.base == "cross_entropy":
        return ps.cross_entropy(x, given.targets, reduction="none", z_loss=1e-3, **given.options)
    if case.base.endswith("vjp"):
        return getattr(ps, case.base)(x, given.cotangent)
    if case.base == "log_prob":
        return ps.log_prob(x, given.targets, **given.options)
    if case.base == "sample":
        return ps.sample(x, seed_of(case, seed), **given.options)
    return getattr(ps, case.base)(x, **given.options)


def _gradient(case: Case, given: Arguments) -> Any:
    leaf = given.x.clone().requires_grad_()
    y = _call(case, given, leaf)
    weights = given.cotangent.double() if y.ndim == given.cotangent.ndim else 1.0
    (y.double() * weights).sum().backward()
    return leaf.grad


def compare(torch: Any, case: Case, x: Any, y: Any, expected: Any) -> dict[str, Any]:
    """Say whether an answer is right: by the entries that differ, or by its errors as a share of the bound."""
    if case.base == "sample":
        return _compare_draws(torch, y, expected)
    if case.base == "truncate":
        # Where the mass of a prefix lies within rounding of top_p, one token more or less may stay.
        wrong = int(((y != expected) & ~(y.isnan() & expected.isnan())).sum())
        return {"ok": wrong <= case.rows // 50 + 1, "entries": wrong}
    if y.shape != expected.shape:
        return {"ok": False, "error": f"the answer has shape {tuple(y.shape)} and not {tuple(expected.shape)}"}
    own = UNIT[str(y.dtype).removeprefix("torch.")]
    y, expected = y.double(), expected.double()
    wrong = int((y.isnan() != expected.isnan()).sum())
    if wrong:
        return {"ok": False, "nan": wrong}
    share = torch.where((y == expected) | y.isnan(), 0.0, (y - expected).abs() / _bound(case, x, expected, own))
    if case.dtype == "float16":
        share = torch.where(y.isinf() & (expected.abs() > 65504), 0.0, share)
    worst = float(share.max()) if share.numel() else 0.0
    return {"ok": worst <= 1, "share_of_bound": round(worst, 3)}


def _compare_draws(torch: Any, y: Any, expected: Any) -> dict[str, Any]:
    y, expected = (one if isinstance(one, tuple) else (one,) for one in (y, expected))
    same = y[0] == expected[0]
    # Two scores within rounding of each other may be taken either way: at most in one row here.
    found = {"ok": int((~same).sum()) <= 1, "tokens": int((~same).sum())}
    if len(y) > 1:
        close = torch.isclose(y[1], expected[1], rtol=CLOSE_LOGPROBS, atol=CLOSE_LOGPROBS, equal_nan=True)
        found["logprobs"] = int((same & ~close).sum())
        found["ok"] = found["ok"] and not found["logprobs"]
    return found


def _bound(case: Case, x: Any, expected: Any, own: float) -> Any:
    """Return the bound of docs/numerics.md in units of the compute dtype, and a rounding to the answer's."""
    unit, length = min(UNIT[case.dtype], UNIT["float32"]), max(case.n, 2)
    reach: Any = 100.0
    if x.shape == expected.shape:
        z = x.double()
        reach = (z.amax(-1, keepdim=True) - z).clamp(0, 200).nan_to_num(0)
    if "temperature" in case.options:
        reach = reach / min(t for t in TEMPERATURES if t)
    reach = reach + 16 + math.log2(length) + math.log(length)
    scale = expected.abs()
    if case.function != "softmax":
        # A derivative is a difference of terms that may each be much larger than itself.
        scale = scale.clamp_min(1) * (32 if case.is_derivative else 1)
    least = 2.0**-24 if case.dtype == "float16" else 2.0**-126
    return reach * unit * scale + own * expected.abs() + least


def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    worst: dict[str, float] = {}
    for one in records:
        function, dtype = one["name"].split("-")[:2]
        key = f"{function}/{dtype}"
        worst[key] = max(worst.get(key, 0.0), one.get("share_of_bound", 0.0))
    failed = [one["name"] for one in records if not one["ok"]]
    return {"cases": len(records), "failed": failed, "worst": worst, "compiled": sum(r.get("new", 0) for r in records)}


def lines(summary: dict[str, Any]) -> list[str]:
    worst = "  ".join(f"{key} {value:.2f}" for key, value in summary["worst"].items() if value)
    return [
        f"{summary['cases']} cases, {len(summary['failed'])} failed, {summary['compiled']} kernels compiled meanwhile",
        f"worst error as a share of its bound: {worst}",
    ]


def _words(found: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in found.items() if key not in ("ok", "restart") and value)
