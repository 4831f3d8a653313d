"""One parameter's way through its chain: whole where sums over it are needed, slice by slice where they are not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from torch import Tensor

from optstate import kernels
from optstate.kernels import Noise, Piece
from optstate.optimizer.plan import ParamPlan, SlotPlan
from optstate.stores import Guard, MovedStatistic, Requests, Statistic, together
from optstate.updates import Chain, Context, Update

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
) -> Context:
    """What the transforms of one step see, with the parameter's own way of being read and written."""
    fields = {field: state[key] for field, key in plan.weight_keys.items()}
    codec = plan.weights.codec(plan.spec, step, fields)
    return Context(plan.spec, param, grad, group, step, guard, grad_scale, codec)


def run_chain(plan: ParamPlan, state: Mapping[str, Any], ctx: Context) -> Requests[None]:
    """Run the chain, write the parameter, then the statistics.

    Where a part of the chain can run slice by slice, and the parameter is larger than a slice, temporaries stay as
    small as one. What comes before that part runs on the whole parameter, with the update still on paper.
    """
    statistics = {name: _statistic(slot, state, ctx) for name, slot in plan.slots.items()}
    sliced = plan.is_sliced(ctx.param.device)
    update = Update(ctx.grad, scale=ctx.grad_scale)
    update = yield from _with_param_squares(plan.before_slices if sliced else plan.chain, update, statistics, ctx)
    if sliced:
        yield from _run_slices(plan, update, statistics, ctx)
    else:
        _write(plan, update, ctx)
    yield from together([statistic.commit_part() for statistic in statistics.values()])


def _run_slices(plan: ParamPlan, update: Update, statistics: dict[str, Statistic], ctx: Context) -> Requests[None]:
    """The sliced part of the chain. Leaves in `statistics` only those that are still to be committed."""
    names = plan.in_slices.slots(plan.spec)
    independent = {name: statistics.pop(name) for name in names if plan.slots[name].store.elementwise}
    moved = {name: statistics[name] for name in names if name in statistics}
    param, grad, is_gradient = ctx.param.detach(), ctx.grad, update.is_gradient(ctx)
    if moved:
        yield from plan.in_slices.transforms[0].prepare(update, moved, ctx)
    elif not update.factors and all(t.is_contiguous() for t in (param, grad, update.dense)):
        param, grad, update = param.view(-1), grad.view(-1), replace(update, dense=update.dense.view(-1))
    factors = {name: statistic.factors() for name, statistic in moved.items()}
    pieces = kernels.pieces(param.shape, plan.slice_elements(param.device), plan.alignment)
    for piece in kernels.worth_running(pieces, lambda piece: piece.stop - piece.start):
        of_update, of_param = update.piece(piece), piece.of(param)
        of_grad = of_update.dense if is_gradient else piece.of(grad)
        here = replace(ctx, param=of_param, grad=of_grad, start=piece.start)
        slices = {name: _slice_of(s, plan.slots[name], piece, of_param) for name, s in independent.items()}
        for name, statistic in moved.items():
            slices[name] = MovedStatistic(statistic, tuple(map(piece.of, factors[name])), of_param.shape)
        _write(plan, _without_sums(plan, plan.in_slices(of_update, slices, here)), here)
        piece.write_back(param, of_param)
        for statistic in slices.values():
            statistic.commit()


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
    kernels.apply(ctx.param, update, update.decay, ctx.codec, ctx.start)


def _statistic(slot: SlotPlan, state: Mapping[str, Any], ctx: Context) -> Statistic:
    """A statistic of the whole parameter."""
    fields = {field: state[key] for field, key in slot.keys.items()}
    noise = Noise(f"{ctx.spec.name}/{slot.name}", ctx.step, region=ctx.spec.region)
    return Statistic(slot.store, fields, ctx.spec, ctx.guard, ctx.param.shape, noise)


def _slice_of(whole: Statistic, slot: SlotPlan, piece: Piece, param: Tensor) -> Statistic:
    """A slice of a statistic whose store keeps elements, or blocks of them, independently."""
    fields = {name: piece.of_field(field, slot.fields[name].per) for name, field in whole.fields.items()}
    return Statistic(whole.store, fields, whole.spec, whole.guard, param.shape, whole.noise.at(piece.start))


def _with_param_squares(
    chain: Chain, update: Update, statistics: Mapping[str, Statistic], ctx: Context
) -> Requests[Update]:
    """Run a chain; where shards must meet, ask for the parameter's own sum of squares in the first round."""
    requests = chain(update, statistics, ctx)
    if not (chain.reads_param and ctx.spec.region is not None):
        return (yield from requests)
    try:
        request = next(requests)
        reply, ctx.param_squares = yield request, ctx.local_param_squares()
        while True:
            request = requests.send(reply)
            reply = yield request
    except StopIteration as stop:
        return cast(Update, stop.value)
