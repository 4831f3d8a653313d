"""One parameter's way through its chain: whole where sums over it are needed, slice by slice where they are not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from torch import Tensor

from optstate import kernels
from optstate.kernels import Noise, Piece
from optstate.optimizer.plan import ParamPlan, SlotPlan
from optstate.optimizer.whole_steps import WholeStep
from optstate.spec import ParamSpec
from optstate.stores import Guard, MovedStatistic, Requests, Statistic, together
from optstate.updates import Chain, Context, Update, run_transform

__all__ = ["context", "run_chain"]


def context(
    plan: ParamPlan,
    state: Mapping[str, Any],
    param: Tensor,
    grad: Tensor,
    group: Mapping[str, Any],
    step: int,
    guard: Guard,
    grad_scale: float | Tensor = 1.0,
    beside: Mapping[str, Tensor] = {},
    clock: Tensor | None = None,
) -> Context:
    """Return what the transforms of one step see, with the parameter's own way of being read and written.

    beside: tensors that the parameter itself keeps beside `param`, if it is of several tensors.
    """
    fields = {field: state[key] for field, key in plan.weight_keys.items()} if plan.weight_keys else beside
    codec = plan.weights.codec(plan.spec, step, fields)
    return Context(
        plan.spec, param, grad, group, step, guard, grad_scale, codec, is_whole=plan.spec.region is None, clock=clock
    )


def run_chain(
    plan: ParamPlan, state: Mapping[str, Any], ctx: Context, whole_step: WholeStep | None = None
) -> Requests[None]:
    """Refuse a gradient that is not finite, run the chain, write the parameter, then the statistics.

    A whole step that was found for the parameter is taken in the place of the transforms, where it can be.
    Where a part of the chain can run slice by slice, and the parameter is larger than a slice, temporaries stay as
    small as one. What comes before that part runs on the whole parameter, with the update still on paper.

    The loop over the transforms stands here, and not in a function of its own, as every function between the step and
    a kernel costs more than the kernel does where parameters are small.
    """
    if not ctx.spec.numel:
        return
    is_split = ctx.spec.region is not None
    if whole_step is not None and whole_step.checks_gradient and whole_step.run(state, ctx):
        return
    if not (plan.guards or ctx.guard.checked):
        yield from ctx.check_finite(kernels.all_finite(ctx.grad, plan.largest_gradient(ctx.group)))
    if whole_step is not None and not whole_step.checks_gradient and whole_step.run(state, ctx):
        return
    if ctx.clock is not None:
        raise RuntimeError(
            f"{ctx.spec.name!r} has no step whose numbers a device can make, as print(optimizer.plan()) tells; without "
            "count_on_device() it is stepped as usual"
        )
    statistics: dict[str, Statistic] = {}
    for name, slot in plan.slots.items():
        fields = {}
        for field, key in slot.keys.items():
            fields[field] = state[key]
        if slot.of is not None:
            statistics[name] = _statistic_of_another(slot, slot.of, fields, ctx)
            continue
        noise = Noise(f"{ctx.spec.name}/{name}", ctx.step, region=ctx.spec.region)
        statistics[name] = Statistic(slot.store, fields, ctx.spec, ctx.guard, ctx.param.shape, noise)
    is_sliced = plan.first_sliced is not None and plan.is_sliced(ctx.param.device)
    chain = plan.before_slices if is_sliced else plan.chain
    update = Update(ctx.grad, scale=ctx.grad_scale)
    if is_split and chain.reads_param:
        update = yield from _with_param_squares(chain, update, statistics, ctx)
    else:
        for transform in chain.transforms:
            if is_split:
                update = yield from run_transform(transform, update, statistics, ctx)
            else:
                result = transform(update, statistics, ctx)
                update = result if isinstance(result, Update) else (yield from result)
    if is_sliced:
        yield from _run_slices(plan, update, statistics, ctx)
    else:
        _write(plan, update, ctx)
    if is_split:
        yield from together([statistic.commit_part() for statistic in statistics.values()])
    else:
        for statistic in statistics.values():
            statistic.commit()


def _statistic_of_another(slot: SlotPlan, of: ParamSpec, fields: Mapping[str, Tensor], ctx: Context) -> Statistic:
    """Return a statistic of another tensor than the parameter."""
    noise = Noise(f"{ctx.spec.name}/{slot.name}", ctx.step, region=of.region)
    return Statistic(slot.store, fields, of.renamed(ctx.spec.name, ctx.spec.given), ctx.guard, of.local_shape, noise)


def _run_slices(plan: ParamPlan, update: Update, statistics: dict[str, Statistic], ctx: Context) -> Requests[None]:
    """Run the sliced part of the chain. Leaves in `statistics` only those that are still to be committed."""
    names = plan.in_slices.slots(plan.spec, {})
    independent = {name: statistics.pop(name) for name in names if plan.slots[name].store.elementwise}
    moved = {name: statistics[name] for name in names if name in statistics}
    param, grad, is_gradient = ctx.param.detach(), ctx.grad, update.is_gradient(ctx)
    if moved:
        yield from plan.in_slices.transforms[0].prepare(update, moved, ctx)
    elif not update.factors and all(t.is_contiguous() for t in (param, grad, update.dense)):
        param, grad, update = param.view(-1), grad.view(-1), replace(update, dense=update.dense.view(-1))
    factors = {name: statistic.factors() for name, statistic in moved.items()}
    room = kernels.hold_room(param, plan.slice_elements(param.device))
    pieces = kernels.cut_into_pieces(param.shape, plan.slice_elements(param.device), plan.alignment)
    for piece in kernels.worth_running(pieces, lambda piece: piece.stop - piece.start):
        of_update, of_param = update.piece(piece), piece.of(param)
        of_grad = of_update.dense if is_gradient else piece.of(grad)
        here = replace(ctx, param=of_param, grad=of_grad, start=piece.start, is_whole=False)
        slices = {name: _slice_of(s, plan.slots[name], piece, of_param) for name, s in independent.items()}
        for name, statistic in moved.items():
            slices[name] = MovedStatistic(statistic, tuple(map(piece.of, factors[name])), of_param.shape)
        _write(plan, _without_sums(plan, plan.in_slices(of_update, slices, here)), here)
        piece.write_back(param, of_param)
        for statistic in slices.values():
            statistic.commit()
    del room


def _without_sums(plan: ParamPlan, requests: Requests[Update]) -> Update:
    """Run a chain on a slice, where no transform may ask for a sum over the whole parameter."""
    try:
        next(requests)
    except StopIteration as stop:
        return cast(Update, stop.value)
    raise TypeError(
        f"a transform of the chain {plan.in_slices} asked for a sum over the whole parameter while it ran on a slice: "
        "its class must declare elementwise = False"
    )


def _write(plan: ParamPlan, update: Update, ctx: Context) -> None:
    """Apply the finished update to the parameter, or to the slice at hand."""
    if not plan.chain.applies_lr:
        update = update.scaled(ctx.group["lr"])
    if ctx.guard.finite is not None:
        masked = ctx.guard.masked
        update = replace(update, scale=masked(update.scale), decay=masked(update.decay), finite=ctx.guard.finite)
    ctx.guard.begin_writing()
    kernels.apply_update(ctx.param, update, update.decay, ctx.codec, ctx.start)


def _slice_of(whole: Statistic, slot: SlotPlan, piece: Piece, param: Tensor) -> Statistic:
    """Return a slice of a statistic whose store keeps elements, or blocks of them, independently."""
    fields = {name: piece.of_field(field, slot.fields[name].per) for name, field in whole.fields.items()}
    return Statistic(whole.store, fields, whole.spec, whole.guard, param.shape, whole.noise.at(piece.start))


def _with_param_squares(
    chain: Chain, update: Update, statistics: Mapping[str, Statistic], ctx: Context
) -> Requests[Update]:
    """Run a chain of a split parameter; ask for the parameter's own sum of squares in the first round."""
    requests = chain(update, statistics, ctx)
    try:
        request = next(requests)
        squares = kernels.weight_sum_of_squares(ctx.param.detach(), ctx.codec)
        reply, ctx.param_squares = yield request, squares
        while True:
            request = requests.send(reply)
            reply = yield request
    except StopIteration as stop:
        return cast(Update, stop.value)
