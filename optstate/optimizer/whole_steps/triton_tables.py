"""Steps of many parameters in few launches, in Triton: parameters that are stepped alike share a table.

A table holds addresses. It is kept while no tensor moves, which is looked at in every step; gradients that lie
elsewhere than in the step before are put into it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from optstate.kernels import name_key
from optstate.kernels.native import WriteKind
from optstate.kernels.rules import ElementRule, MatrixRule
from optstate.kernels.triton_steps import GradientTensor, MomentTensor
from optstate.kernels.triton_steps.tables import ALIGNMENT, RowOfTable, Table
from optstate.optimizer.plan import ParamPlan
from optstate.optimizer.whole_steps.operands import KeptMoment, WrittenWeight
from optstate.optimizer.whole_steps.triton_operands import gradient_tensor, moment_tensor, weight_tensor
from optstate.spec import ParamSpec
from optstate.updates import Context, add_decayed_weights, clip_by_value

__all__ = ["Job", "Joined", "TritonTables", "joins"]


MOST_JOINED = 1 << 19
"""Elements of a vector whose sums are made of those of its chunks, at most."""


def joins(spec: ParamSpec) -> bool:
    """Return whether a vector's sums can be made in a table."""
    return 0 < spec.numel <= MOST_JOINED and spec.region is None


@dataclass(frozen=True)
class Joined:
    """How a step of one parameter is made together with those of others.

    Attributes:
        clip, penalty: of the gradient, or None.
        weight, first, second: how the parameter and its moments are kept.
        read_rule: returns the numbers of a step; None if one is known to a device only.
        launches: of a step of any number of parameters that are alike: as many as of one.
    """

    plan: ParamPlan
    clip: clip_by_value | None
    penalty: add_decayed_weights | None
    weight: WrittenWeight
    first: KeptMoment | None
    second: KeptMoment | None
    read_rule: Callable[[Context], ElementRule | MatrixRule | None]
    launches: int

    @cached_property
    def kind(self) -> Hashable:
        """What is alike where one launch steps two parameters of one group: the chain, the formats, the dtype."""
        formats = [None if m is None else (m.slot.store, m.kind, m.block) for m in (self.first, self.second)]
        return id(self.plan.chain), self.plan.spec.dtype, self.weight.how, self.weight.seed, *formats

    @property
    def likeness(self) -> Hashable:
        """What is alike where two parameters of one group and one device come into one table: kind, and reads."""
        return self.kind, self.plan.spec.numel % ALIGNMENT == 0

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The keys of all tensors in the state."""
        moments = [m for m in (self.first, self.second) if m is not None]
        kept = [self.weight.key, *(key for m in moments for key in (m.codes, m.scale))]
        return tuple(key for key in kept if key)

    def row(self, state: Mapping[str, Any], ctx: Context, rule: ElementRule | MatrixRule) -> RowOfTable | None:
        """Return the parameter's tensors as kernels read them, with keys of names; None if kernels cannot."""
        gradient, weight = gradient_tensor(ctx, None), weight_tensor(self.weight, state, ctx)
        shares = (rule.first_share, rule.second_weight) if isinstance(rule, ElementRule) else (rule.first_weight, 1.0)
        first = moment_tensor(self.first, state, ctx, shares[0])
        second = moment_tensor(self.second, state, ctx, shares[1])
        if gradient is None or weight is None or first is None or second is None:
            return None
        name = ctx.spec.name
        key = name_key(name, self.weight.seed) if weight.how == WriteKind.STOCHASTIC else 0
        moments = [_named(m, kept, name) for m, kept in ((first, self.first), (second, self.second))]
        return RowOfTable(replace(weight, key=key), gradient.grad, *moments)


def _named(moment: MomentTensor, kept: KeptMoment | None, name: str) -> MomentTensor:
    """Return a moment with the key of its name, which is there whether or not this step rounds at random."""
    return moment if kept is None else replace(moment, key=name_key(f"{name}/{kept.slot.name}"))


class Job(NamedTuple):
    """A step of one parameter that is to be made: how, and what `WholeStep.run` is given."""

    joined: Joined
    state: Mapping[str, Any]
    ctx: Context


@dataclass
class KeptTable:
    """A table that is kept from step to step, and what shows whether it holds still.

    Attributes:
        plan: of one of the parameters; its chain is that of all.
        fixed: addresses of parameters and states, of all that were looked at.
        gradients: addresses of the gradients in the table.
        members: which of those that were looked at are in the table; the others cannot be stepped by kernels.
    """

    plan: ParamPlan
    table: Table
    fixed: list[list[int]]
    gradients: list[int]
    members: list[int]


class JoinedSteps(NamedTuple):
    """What one launch, or two, step: jobs in the order of the table, and what is the same for all of them."""

    jobs: list[Job]
    table: Table
    row: RowOfTable
    gradient: GradientTensor
    rule: ElementRule | MatrixRule


class TritonTables:
    """Steps many parameters in few launches, and keeps the tables for the next step."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, KeptTable] = {}

    def step_many(self, jobs: Sequence[Job]) -> list[Job]:
        """Step parameters that are alike together; return the jobs that remain, nothing of which was written.

        All gradients are checked before anything is written. Where the host knows at once that one is not finite,
        no parameter is written; else only those are that have a finite gradient.

        Raises:
            NonFiniteGradientError: if the host knows that a gradient is not finite. Nothing is written then.
            ValueError: if a store would round a step away.
        """
        alike: dict[tuple[Hashable, Hashable], list[Job]] = {}
        for job in jobs:
            alike.setdefault((_lasting_likeness(job), _likeness_now(job)), []).append(job)
        kept, self._kept = self._kept, {}
        batches, rest = [], []
        for (likeness, _), each in alike.items():
            batch = self._prepare(likeness, each, kept) if len(each) > 1 else None
            stepped = {id(job.ctx) for job in batch.jobs} if batch is not None else set()
            batches += [batch] if batch is not None else []
            rest += [job for job in each if id(job.ctx) not in stepped]
        flags = [_check(batch) for batch in batches]
        for batch, finite in zip(batches, flags, strict=True):
            _write(batch, finite)
        return rest

    def _prepare(self, likeness: Hashable, jobs: list[Job], kept: dict[Hashable, KeptTable]) -> JoinedSteps | None:
        """Return what steps parameters that are alike; None if fewer than two of them can be."""
        joined, state, ctx = jobs[0]
        rule = joined.read_rule(ctx)
        if rule is None:
            return None
        fixed = [_fixed_addresses(job) for job in jobs]
        key = likeness, fixed[0][0], len(jobs)
        known = kept.get(key)
        if known is None or known.fixed != fixed or not _follow_gradients(known, jobs):
            known = _tabulate(jobs, fixed, rule)
        if known is None:
            return None
        self._kept[key] = known
        members = [jobs[i] for i in known.members]
        joined, state, ctx = members[0]
        bound = None if joined.clip is None else ctx.read(joined.clip.bound)
        penalty = 0.0 if joined.penalty is None else ctx.read(joined.penalty.rate)
        row, gradient = joined.row(state, ctx, rule), gradient_tensor(ctx, bound, penalty)
        return None if row is None or gradient is None else JoinedSteps(members, known.table, row, gradient, rule)


def _lasting_likeness(job: Job) -> Hashable:
    """Return what is alike in every step where one launch can step two parameters."""
    ctx = job.ctx
    return job.joined.likeness, id(ctx.group), ctx.grad.dtype, ctx.param.device


def _likeness_now(job: Job) -> Hashable:
    """Return what must be alike in the step at hand: its number, and what scales the gradient."""
    scale = job.ctx.grad_scale
    return job.ctx.step, id(job.ctx.clock), id(scale) if isinstance(scale, Tensor) else scale


def _fixed_addresses(job: Job) -> list[int]:
    """Return the addresses that stay from step to step: of the parameter and of its state."""
    state, param = job.state, job.ctx.param
    return [param.data_ptr(), param.is_contiguous(), *(state[key].data_ptr() for key in job.joined.keys)]


def _follow_gradients(known: KeptTable, jobs: list[Job]) -> bool:
    """Put into a table where the gradients are now; return False if one cannot be read as those before."""
    found = []
    for place in known.members:
        grad = jobs[place].ctx.grad
        address = grad.data_ptr()
        if type(grad) is not Tensor or not grad.is_contiguous() or grad.is_neg() or address % ALIGNMENT:
            return False
        found.append(address)
    if found != known.gradients:
        known.table.replace_gradients(found)
        known.gradients = found
    return True


def _tabulate(jobs: list[Job], fixed: list[list[int]], rule: ElementRule | MatrixRule) -> KeptTable | None:
    """Return the table of the parameters that kernels can step together; None for fewer than two."""
    from optstate.kernels.triton_steps.many import CHUNK, SMALL_CHUNK

    rows = [job.joined.row(job.state, job.ctx, rule) for job in jobs]
    found = [(place, row) for place, row in enumerate(rows) if row is not None and row.is_aligned]
    if len(found) < 2:
        return None
    table = Table.of([row for _, row in found], CHUNK if isinstance(rule, ElementRule) else SMALL_CHUNK)
    gradients = [row.grad.data_ptr() for _, row in found]
    return KeptTable(jobs[0].joined.plan, table, fixed, gradients, [place for place, _ in found])


def _check(batch: JoinedSteps) -> Tensor:
    """Check the gradients of a batch; return a flag for each."""
    from optstate.kernels.triton_steps.many import launch_checks

    ctx = batch.jobs[0].ctx
    flags = torch.ones(len(batch.jobs), dtype=torch.bool, device=ctx.param.device)
    launch_checks(batch.table, batch.row, flags, batch.jobs[0].joined.plan.largest_gradient(ctx.group))
    for job, finite in zip(batch.jobs, flags.unbind(), strict=True):
        job.ctx.guard.check(finite)
    return flags


def _write(batch: JoinedSteps, flags: Tensor) -> None:
    """Step the parameters of a batch whose flags are set."""
    from optstate.kernels.triton_steps.many import launch_elementwise_table, launch_unfactored_table

    for job in batch.jobs:
        job.ctx.guard.begin_writing()
    ctx = batch.jobs[0].ctx
    clock = ctx.step if ctx.clock is None else ctx.clock
    if isinstance(batch.rule, ElementRule):
        launch_elementwise_table(batch.table, batch.row, batch.gradient, batch.rule, flags, clock)
    else:
        launch_unfactored_table(batch.table, batch.row, batch.gradient, batch.rule, flags, clock)
