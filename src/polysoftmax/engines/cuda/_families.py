"""The launch of each family of kernels: its plan, and the arguments that its kernels get."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from polysoftmax._losses import CROSS_ENTROPY, ENTROPY
from polysoftmax._probability import LOG_PROB
from polysoftmax._sampling import DRAW, DRAW_LEADING, LEADING, MASSES, block_length
from polysoftmax._softmax import LOG_SOFTMAX, LOGSUMEXP, SOFTMAX
from polysoftmax._truncation import TRUNCATE
from polysoftmax.engines.cuda import _devices
from polysoftmax.engines.cuda._devices import Uncovered
from polysoftmax.engines.cuda._kind import Launch
from polysoftmax.engines.cuda._layouts import KINDS, REDUCTIONS
from polysoftmax.engines.cuda._operands import ONE, Argument, Batch, Given, View
from polysoftmax.engines.cuda._plan import (
    MOST_LEADING,
    SIZES,
    answers,
    plan_draw,
    plan_draw_leading,
    plan_filter,
    plan_masses,
    plan_rows,
)

if TYPE_CHECKING:
    from polysoftmax._formula import Call
    from polysoftmax.engines.cuda._devices import Device


class Roles(NamedTuple):
    """Which operand of a formula is what to its kernel, where the formula may have another name."""

    name: str
    x: int = 0
    y_or_cotangent: int | None = None
    temperature: int | None = None
    where: int | None = None
    targets: int | None = None
    weight: int | None = None
    cotangent: int | None = None


LOGITS = (True, False, False)
"""Of a formula of three operands, the gradient for the first."""

ROLES = {
    SOFTMAX: Roles("softmax", temperature=1, where=2),
    LOG_SOFTMAX: Roles("log_softmax", temperature=1, where=2),
    LOGSUMEXP: Roles("logsumexp", where=2),
    LOGSUMEXP.pullback(LOGITS): Roles("logsumexp_slope", where=2, cotangent=4),
    SOFTMAX.pullback(LOGITS): Roles("softmax_pullback", x=3, y_or_cotangent=4, temperature=1, where=2),
    LOG_SOFTMAX.pullback(LOGITS): Roles("log_softmax_pullback", x=3, y_or_cotangent=4, temperature=1, where=2),
    CROSS_ENTROPY: Roles("cross_entropy", targets=1, weight=2),
    CROSS_ENTROPY.pullback(LOGITS): Roles("cross_entropy_slope", targets=1, weight=2, cotangent=4),
    LOG_PROB: Roles("log_prob", targets=1, temperature=2, where=3),
    LOG_PROB.pullback((*LOGITS, *[False] * 4)): Roles("log_prob_slope", targets=1, temperature=2, where=3, cotangent=8),
    ENTROPY: Roles("entropy", temperature=1, where=2),
    ENTROPY.pullback(LOGITS): Roles("entropy_slope", temperature=1, where=2, cotangent=4),
}


def rows_launch(call: Call, operands: tuple[Any, ...], device: Device) -> Launch:
    roles = ROLES[call.formula]
    if roles.name.endswith("pullback") and operands[roles.x] is None:
        roles = roles._replace(name=roles.name.replace("pullback", "vjp"), x=0)
    if roles.name.startswith("logsumexp") and operands[1] is not None:
        raise Uncovered("the kernel of logsumexp takes no weights")
    smooths = bool(call.options.get("label_smoothing"))
    if smooths and operands[2] is not None:
        raise Uncovered("the kernel of cross_entropy takes class weights or smoothing, not both")
    if roles.name.startswith("log_prob") and (call.options["top_k"] is not None or operands[4:7] != (None,) * 3):
        raise Uncovered("the kernels of log_prob take no filters")
    reduces = KINDS[roles.name] == REDUCTIONS
    batch = Batch(call, operands[roles.x], device)
    x = batch.x
    stride = batch.row_stride(x)
    second: Argument = 0
    second_stride = 0
    aligned = reduces or _shares_alignment(batch, x, stride)
    if roles.y_or_cotangent is not None:
        view = operands[roles.y_or_cotangent]
        if view.dtype != x.dtype:
            raise Uncovered(f"the rows are {x.dtype} and the cotangent is {view.dtype}")
        second, second_stride = view.pointer, batch.row_stride(view)
        aligned = aligned and _shares_alignment(batch, view, second_stride)
    temperature = None if roles.temperature is None else operands[roles.temperature]
    where = None if roles.where is None else operands[roles.where]
    result = _devices.dtype_name(call.result)
    if result not in answers(roles.name, x.dtype):
        raise Uncovered(f"the kernels do not answer {x.dtype} in {result}")
    plan = plan_rows(
        roles.name,
        x.dtype,
        result,
        batch.rows,
        batch.n,
        aligned=aligned,
        general=temperature is not None or where is not None or smooths,
        machine=device.machine,
    )
    after = (
        *(batch.n, batch.rows, stride, second_stride),
        *batch.parameter(temperature),
        *batch.mask(where),
        *_loss_arguments(batch, call, operands, roles),
        *(list(KINDS).index(roles.name), plan.staged, int(result == batch.compute)),
    )
    length = () if call.squeeze else (1 if reduces else batch.n,)
    shape = (*batch.batch, *length)
    return Launch(device, plan, (x.pointer, second), ((shape, call.result),), after)


def _shares_alignment(batch: Batch, view: View, stride: int) -> bool:
    """Whether the rows of an operand share the alignment of the answer's, which starts at 16 bytes and has no gaps."""
    width = 16 // SIZES[view.dtype]
    return view.offset == 0 and (batch.rows == 1 or (stride - batch.n) % width == 0)


def _loss_arguments(batch: Batch, call: Call, operands: tuple[Any, ...], roles: Roles) -> tuple[Argument, ...]:
    cotangent: tuple[Argument, ...] = (0, *ONE)
    if roles.cotangent is not None:
        cotangent = batch.per_row(operands[roles.cotangent], batch.compute, "the cotangent")
    if roles.targets is None:
        return (0, *ONE, 0, *cotangent, 0, 0, 0, 0.0, 0.0)
    pointer: Argument = 0
    along = 0
    weight = None if roles.weight is None else operands[roles.weight]
    if weight is not None:
        pointer, *rows = batch.per_row(weight, batch.compute, "weight")
        if rows[2] != 0:
            raise Uncovered("the class weights differ from row to row")
        along = weight.strides[-1]
    ignore_index = call.options.get("ignore_index")
    options, targets = list(call.options), operands[roles.targets]
    if targets is not None and targets.dtype == "int64" and targets.shape and targets.shape[-1] > 1:
        raise Uncovered("the kernel takes one token a row")
    return (
        *batch.per_row(targets, "int64", "targets"),
        pointer,
        *cotangent,
        along,
        int(ignore_index is not None),
        ignore_index or 0,
        *(
            Given(len(operands) + options.index(name)) if name in options else 0.0
            for name in ("label_smoothing", "z_loss")
        ),
    )


def _masses_launch(call: Call, operands: tuple[Any, ...], device: Device) -> Launch:
    x, temperature, where, *_ = operands
    batch = Batch(call, x, device)
    stride = batch.row_stride(batch.x)
    general = temperature is not None or where is not None
    plan = plan_masses(batch.x.dtype, batch.rows, batch.n, general=general, machine=device.machine)
    if isinstance(plan, str):
        raise Uncovered(plan)
    after = (batch.n, batch.rows, stride, *batch.parameter(temperature), *batch.mask(where), plan.lanes)
    blocks = -(-batch.n // block_length(batch.n))
    answers = tuple(((*batch.batch, length), call.compute) for length in (1, blocks))
    return Launch(device, plan, (batch.x.pointer,), answers, after)


def _draw_launch(call: Call, operands: tuple[Any, ...], device: Device) -> Launch:
    mass, x, top, keys, temperature, where = operands
    batch = Batch(call, mass, device)
    if x.dtype not in SIZES or batch.x.dtype != batch.compute:
        raise Uncovered(f"the kernels do not draw from {x.dtype} with masses in {batch.x.dtype}")
    n = x.shape[-1]
    for one in (batch.x, x):
        if one.shape[-1] > 1 and one.strides[-1] != 1:
            raise Uncovered("the entries of a row do not lie side by side")
    after = (
        *(batch.x.pointer, *batch.map(batch.x), x.pointer, *batch.map(x)),
        *(n, batch.rows, call.options["size"]),
        *batch.per_row(top, batch.compute, "the maximum"),
        *batch.keys(keys, call.options["is_one_key"]),
        *batch.parameter(temperature),
        *batch.mask(where),
    )
    general = temperature is not None or where is not None
    plan = plan_draw(x.dtype, batch.rows, n, general=general, machine=device.machine)
    return Launch(device, plan, (), _drawn(batch), after)


def _truncate_launch(call: Call, operands: tuple[Any, ...], device: Device) -> Launch:
    x, temperature, where, k, p, min_p, *_ = operands
    batch = Batch(call, x, device)
    if _devices.dtype_name(call.result) != batch.x.dtype:
        raise Uncovered(f"the kernels do not answer {batch.x.dtype} in {_devices.dtype_name(call.result)}")
    top_k = call.options["top_k"]
    parameters = (temperature, 1.0), (k if top_k is None else float(top_k), 0.0), (p, 1.0), (min_p, 0.0)
    answer = ((*batch.batch, batch.n), call.result)
    return _filter(batch, call, where, parameters, (answer,), beside=(0,))


def _leading_launch(call: Call, operands: tuple[Any, ...], device: Device) -> Launch:
    x, where, *_ = operands
    batch = Batch(call, x, device)
    top_k = call.options["top_k"]
    if top_k > MOST_LEADING:
        raise Uncovered(f"the kernels find up to {MOST_LEADING} leading tokens, not {top_k}")
    parameters = (None, 1.0), (float(top_k), 0.0), (None, 1.0), (None, 0.0)
    kept = (*batch.batch, top_k)
    answers = (((*batch.batch, 1), call.compute), (kept, call.compute), (kept, "int32"))
    return _filter(batch, call, where, parameters, answers)


def _filter(
    batch: Batch,
    call: Call,
    where: View | None,
    parameters: tuple[tuple[View | Given | float | None, float], ...],
    answers: tuple[tuple[tuple[int, ...], Any], ...],
    beside: tuple[Argument, ...] = (),
) -> Launch:
    """Return the launch of a search; ``beside`` stands for the arrays before its answers, and after, that it lacks."""
    stride = batch.row_stride(batch.x)
    plan = plan_filter(
        call.formula.name,
        batch.x.dtype,
        batch.rows,
        batch.n,
        aligned=call.formula is LEADING or _shares_alignment(batch, batch.x, stride),
    )
    numbers = [number for one in parameters for number in batch.parameter(*one)]
    before = (batch.x.pointer, *batch.mask(where), *beside)
    return Launch(batch.device, plan, before, answers, (*beside, batch.n, batch.rows, stride, *numbers))


def _draw_leading_launch(call: Call, operands: tuple[Any, ...], device: Device) -> Launch:
    x, index, top, keys, temperature, p, min_p = operands
    batch = Batch(call, x, device)
    for one in (batch.x, index):
        if one.shape[-1] > 1 and one.strides[-1] != 1:
            raise Uncovered("the entries of a row do not lie side by side")
    if batch.x.dtype != batch.compute or batch.n > MOST_LEADING:
        raise Uncovered(f"the kernels do not draw from {batch.n} leading tokens in {batch.x.dtype}")
    after = (
        *(batch.x.pointer, *batch.map(batch.x), *batch.per_row(index, "int32", "the index")),
        *(batch.n, batch.rows, call.options["size"]),
        *batch.per_row(top, batch.compute, "the maximum"),
        *batch.keys(keys, call.options["is_one_key"]),
        *(*batch.parameter(temperature), *batch.parameter(p), *batch.parameter(min_p, 0.0)),
    )
    plan = plan_draw_leading(batch.compute, batch.rows, batch.n)
    return Launch(device, plan, (), _drawn(batch), after)


def _drawn(batch: Batch) -> tuple[tuple[tuple[int, ...], Any], ...]:
    """Return what the answer of a draw is: tokens."""
    return (((*batch.batch, 1), "int64"),)


SAMPLING = {
    TRUNCATE: _truncate_launch,
    MASSES: _masses_launch,
    DRAW: _draw_launch,
    LEADING: _leading_launch,
    DRAW_LEADING: _draw_leading_launch,
}
