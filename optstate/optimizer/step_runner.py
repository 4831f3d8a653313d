"""Running steps: what `Optimizer.step` and the hooks of a fused backward pass both hold, and neither goes around."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from optstate import kernels
from optstate.distributed.agreement import Agreement, LostProcessError, describe_difference, reason_of
from optstate.distributed.placement import here
from optstate.distributed.sums import run_together
from optstate.kernels import Scalar
from optstate.kernels.backend import run_with_loops
from optstate.optimizer import alike
from optstate.optimizer.broken_step import Consistency, InconsistentStateError
from optstate.optimizer.chain_step import context, run_chain
from optstate.optimizer.device_clock import DeviceClock
from optstate.optimizer.fused_hooks import FusedHooks
from optstate.optimizer.joined_updates import update_joined
from optstate.optimizer.param_groups import UsedValues, checked_gradient
from optstate.optimizer.parameters import Leaf, batches
from optstate.optimizer.small_steps import Member, SmallSteps
from optstate.optimizer.small_updates import update_alone, update_together
from optstate.optimizer.tracked_parameters import Changes, TrackedParameters
from optstate.optimizer.whole_steps.triton_tables import TritonTables
from optstate.stores import DeferredFlags, Guard, NonFiniteGradientError, Requests, run_alone
from optstate.updates import Context
from optstate.weights import QuantizedWeight

__all__ = ["StepRunner", "UpdateOne"]

UpdateOne = Callable[[Leaf, Tensor, Scalar], None]
"""Updates one parameter from its gradient, which is scaled by a number: the coefficient of a global norm clip."""


_NOTHING: Mapping[str, Tensor] = {}


class StepRunner:
    """Updates parameters, one by one or together where devices share them, and knows how far the step at hand is.

    The optimizer holds its runner, and the runner holds the hooks of a fused backward pass; in the other direction
    references are weak, so that an optimizer that is deleted is gone at once, and its hooks with it.

    parameters: the optimizer's parameters and their plans. consistency: the marks of the step at hand. flags: those of
    gradients on accelerators. tables: of parameters there that share launches. clock: counts steps on a device; None
    while the host alone counts. hooks: what updates inside the backward pass; None while updates happen in `step()`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: TrackedParameters, broken: str = "") -> None:
        self._optimizer = weakref.ref(optimizer)
        self.parameters = parameters
        self.consistency = Consistency(broken)
        self.flags = DeferredFlags()
        self.tables = TritonTables()
        self.clock: DeviceClock | None = None
        self.hooks: FusedHooks | None = None
        self.replaced_by: weakref.ref[Any] | None = None
        """The hooks of a newer optimizer that took gradients of this one over."""
        self.clip_of_original: float | None = None
        """The norm by which the optimizer clipped that this one is a copy of, until it is fused itself."""
        self.around: Callable[[UpdateOne, Leaf, Tensor, Scalar], None] | None = None
        """Called in the place of every update of one parameter, with what makes the update: to watch or repeat it."""
        self._agreement = Agreement()
        self._values = UsedValues()
        self._is_alike = False
        self._small = SmallSteps(optimizer)

    @property
    def optimizer(self) -> Any:
        """The optimizer whose steps these are."""
        optimizer = self._optimizer()
        if optimizer is None:
            raise ReferenceError("the optimizer of these hooks was deleted")
        return optimizer

    @property
    def clip_grad_norm(self) -> float | None:
        """The norm by which a fused backward pass clips; None where nothing does."""
        return None if self.hooks is None else self.hooks.clip_grad_norm

    def params(self) -> list[Tensor]:
        """Return every parameter in the order of the groups."""
        found: list[Tensor] = []
        for group in self.optimizer.param_groups:
            found += group["params"]
        return found

    def leaf(self, param: Tensor) -> Leaf:
        """Return what is known of a parameter.

        Raises:
            RuntimeError: if it was put into the groups after the optimizer was built.
        """
        leaf = self.parameters.leaves.get(param)
        if leaf is None:
            self.follow()
            leaf = self.parameters.leaves.get(param)
        if leaf is None:
            raise RuntimeError(
                f"a parameter of shape {tuple(param.shape)} was put into the optimizer's groups after it was built; "
                "shard, wrap and cast the model first, then build the optimizer"
            )
        return leaf

    def name(self, param: Tensor) -> str:
        """Return the name of a parameter, or what stands for one."""
        return self.leaf(param).name

    def state_of(self, param: Tensor) -> dict[str, Any]:
        """Return the state of one parameter, made if it just began to train, moved if the model was."""
        all_state = self._optimizer().state  # type: ignore[union-attr]
        state: dict[str, Any] = all_state.get(param) or self.parameters.allocate(param, all_state)
        device = param.device
        for key, value in state.items():
            if isinstance(value, Tensor) and value.device != device:
                with torch.inference_mode(False):
                    state[key] = torch.empty_like(value, device=device)
                state[key].copy_(value)
        return state

    # --- before a step ----------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Take over parameters that were replaced or moved in the param groups; see `TrackedParameters.follow`."""
        optimizer = self._optimizer()
        assert optimizer is not None
        self.parameters.follow(optimizer.param_groups, optimizer.state, self._take_note)

    def _take_note(self, changes: Changes) -> None:
        """Adapt to parameters that were replaced or moved."""
        if changes.other_chains:
            self._values = UsedValues()
        if changes.replaced or changes.gone or changes.regrouped:
            self._is_alike = False
        if self.hooks is not None and (changes.replaced or changes.gone):
            self.hooks.follow(changes.replaced, changes.gone)

    def ask_again(self) -> None:
        """Have processes compare what they train once more before the next step: something was added or loaded."""
        self._is_alike = False

    def forget_flags(self) -> None:
        """Forget what is not known yet of earlier gradients and steps: other state was loaded."""
        self.flags = DeferredFlags()
        if self.clock is not None:
            self.clock.read()

    def require_ready(self) -> None:
        """Raise unless a step can begin now. The parameters in the groups are followed first.

        Raises:
            TypeError, ValueError: for hyper-parameters that were changed to what no step can use.
            RuntimeError: if processes that share parameters, split or replicated, do not hold the same recipe,
                hyper-parameters and steps, naming the first difference. They ask each other once: before the first step
                after building, loading or sharding.
            InconsistentStateError: if another process does not answer.
        """
        self.follow()
        self._values.require(self._optimizer().param_groups, self.parameters.chains)  # type: ignore[union-attr]
        if not self._is_alike and not kernels.rehearsing():
            self._require_alike()

    def _require_alike(self) -> None:
        optimizer = self.optimizer
        try:
            found = describe_difference(
                self.views(optimizer.param_groups, {p: s["step"] for p, s in optimizer.state.items()})
            )
        except LostProcessError as error:
            raise self.lost(list(self.parameters.leaves), error) from error.__cause__
        if found:
            raise RuntimeError(
                f"{found}, but processes that share parameters must train them alike: build the optimizer in the same "
                "way on all ranks, and load the same file"
            )
        self._is_alike = True

    def views(self, groups: Sequence[Mapping[str, Any]], steps: Mapping[Tensor, int]) -> dict[Any, Any]:
        """Return what must be the same on the processes that share parameters, for each set of processes."""
        order = self.params()
        by_place = {i: int(steps[p]) for i, p in enumerate(order) if p in steps}
        return alike.views([self.leaf(p) for p in order], groups, by_place, clip_grad_norm=self.clip_grad_norm)

    def require_agreement(self, params: Sequence[Tensor], all_groups: bool = False) -> None:
        """Raise unless all devices are about to step the same split parameters.

        all_groups: agree with all devices that share a parameter with this one, also on stepping none of theirs.
        """
        everything = self.parameters.leaves.values()
        if kernels.rehearsing() or all(leaf.placement is None for leaf in everything):
            return
        leaves = [leaf for leaf in map(self.leaf, params) if leaf.is_split]
        shared = everything if all_groups else leaves
        chosen: dict[Any, list[str]] = {leaf.processes: [] for leaf in shared if leaf.is_split}
        for leaf in leaves:
            chosen[leaf.processes].append(leaf.name)
        try:
            found = self._agreement.difference(chosen)
        except LostProcessError as error:
            raise self.lost(params, error) from error.__cause__
        if found:
            if self.consistency.written:
                self.consistency.disagreed(found)
            raise RuntimeError(
                f"{found}, but parameters that are split among devices are stepped by all together: give them "
                "zeros where they have none (p.grad = torch.zeros_like(p)), or none anywhere"
            )

    # --- a step -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update_all(self, params: Iterable[Tensor], grad_scale: Scalar) -> None:
        """Update parameters: one by one, or together where they are split among devices."""
        numbers: dict[Any, Any] = {}
        leaves = self.parameters.leaves
        params = list(params)
        if params and (params[0].device.type != "cpu" or self.parameters.in_triton) and self.around is None:
            params = update_joined(self.tables, self, params, grad_scale)
        for batch in batches((leaves.get(param) or self.leaf(param), param) for param in params):
            leaf, param = batch[0]
            if len(batch) == 1:
                self.update(leaf, param, grad_scale)
            elif leaf.is_split:
                self.update_together([param for _, param in batch], grad_scale)
            else:
                self.update_small(
                    [Member(*each, each[1].grad) for each in batch if each[1].grad is not None], grad_scale, numbers
                )

    def update_small(
        self, members: Sequence[Member], grad_scale: Scalar, numbers: dict[Any, Any] | None = None
    ) -> None:
        """Update small parameters from gradients that are all there, with the result of updating each alone.

        numbers: what was made of the groups in this step already, while nobody could change them; more joins it.
        """
        with_others = len(members) > 1 and self.around is None and not kernels.rehearsing()
        if torch.is_grad_enabled():
            with torch.no_grad():
                self.update_small(members, grad_scale, numbers)
        elif with_others:
            update_together(self._small, self, members, grad_scale, {} if numbers is None else numbers)
        else:
            for member in members:
                update_alone(self, member, grad_scale)

    def update(self, leaf: Leaf, param: Tensor, grad_scale: Scalar, watched: bool = True) -> None:
        """Update one parameter from its gradient: the only step there is, called by `step()` and by backward hooks.

        grad_scale: coefficient of a global norm clip. watched: whether `around` is to know.
        """
        if (watched and self.around is not None) or leaf.is_split or torch.is_grad_enabled():
            self._update_otherwise(leaf, param, grad_scale, watched)
            return
        try:
            requests, state, ctx = self.begin_step(leaf, param, grad_scale)
            asked = next(requests, None)
            if asked is not None:
                run_alone(requests, asked)
            self.finish_step(param, state, ctx)
        except BaseException as error:
            self.remember([param], error)
            raise

    def _update_otherwise(self, leaf: Leaf, param: Tensor, grad_scale: Scalar, watched: bool) -> None:
        """Update one parameter that is watched, is split among devices, or comes where gradients are recorded."""
        if watched and self.around is not None:
            self.around(partial(self.update, watched=False), leaf, param, grad_scale)
            return
        with torch.no_grad():
            if leaf.is_split:
                self.update_together([param], grad_scale)
            else:
                self.update(leaf, param, grad_scale, watched=False)

    def update_together(self, params: list[Tensor], grad_scale: Scalar) -> None:
        """Update parameters of which this device has parts."""
        leaves = [self.leaf(param) for param in params]
        names = [leaf.name for leaf in leaves]
        steps = [
            (leaf.on_devices, self.requests(param, grad_scale)) for leaf, param in zip(leaves, params, strict=True)
        ]
        try:
            run_together(steps, before=lambda: self.consistency.begin_asking(names))
        except BaseException as error:
            self.remember(params, error)
            raise

    def requests(self, param: Tensor, grad_scale: Scalar = 1.0) -> Requests[None]:
        """One parameter's update as a computation that asks for sums over the whole parameter. Call under no_grad."""
        leaf = self.leaf(param)
        requests, state, ctx = self.begin_step(leaf, param, grad_scale)
        yield from requests
        self.finish_step(param, state, ctx)

    def begin_step(
        self, leaf: Leaf, param: Tensor, grad_scale: Scalar
    ) -> tuple[Requests[None], dict[str, Any], Context]:
        """Check a gradient; return the computation of the update, not begun, the state, and what the update sees."""
        plan, spec, placement = leaf.plan, leaf.plan.spec, leaf.placement
        grad = checked_gradient(param, spec, placement)
        state = whole_state = self.state_of(param)
        part, beside = param, _NOTHING
        if isinstance(param, QuantizedWeight):
            part, beside = param.codes, {"scales": param.scales}
        elif placement is not None:
            part = here(param)
            state = {key: here(value) if isinstance(value, Tensor) else value for key, value in whole_state.items()}
        group = self._optimizer().param_groups[leaf.group]  # type: ignore[union-attr]
        guard = Guard(spec.name, grad, before_write=partial(self._before_write, spec.name, param, part, whole_state))
        last = leaf.last_found  # asked here first, as every call counts in a small step
        known = last is not None and last[0] is plan and last[1] == part.device.type
        found = (last[2] if known else leaf.found_step(part.device)).step  # type: ignore[index]
        read_again = spec.region is None and found is None and plan.guards and grad.dtype != spec.accumulator
        if read_again and grad.numel() <= 1.5 * kernels.chunk_elements(grad.device):
            grad = grad.to(spec.accumulator)  # a small one is converted once; several would wait for sums together
        step = whole_state["step"] + 1
        clock = None if self.clock is None else self.clock.number(step)
        ctx = context(plan, state, part, grad, group, step, guard, grad_scale, beside, clock)
        requests = run_chain(plan, state, ctx, found)
        return requests if leaf.backend == "auto" else run_with_loops(leaf.backend, requests), whole_state, ctx

    def _before_write(self, name: str, param: Tensor, part: Tensor, state: Mapping[str, Any]) -> None:
        """Mark a parameter as being written, and tell autograd, which must refuse graphs that need the old values.

        This is the one place that does so for every way of writing: kernels of PyTorch's fused optimizers do not, and
        what is written in a part of a distributed tensor is not seen at the whole.
        """
        self.consistency.begin_writing(name)
        written = [param]
        for value in state.values():
            if isinstance(value, Tensor):
                written.append(value)
        if part is not param:
            written += [here(each) for each in written]
        increment_version(written)

    def finish_step(self, param: Tensor, state: dict[str, Any], ctx: Context) -> None:
        """Count an update that was made."""
        if self.clock is not None:
            self.clock.note(param, ctx.guard.finite)
        elif ctx.guard.finite is not None:
            self.flags.add(param, ctx.guard.finite)
        name = ctx.spec.name
        self.consistency.begin_writing(name)
        state["step"] = ctx.step
        self.consistency.finish(name)

    # --- a step that breaks off -------------------------------------------------------------------------------------

    def remember(self, params: list[Tensor], error: BaseException) -> None:
        """Say what broke off a step, if the step may have changed something; the mark itself was set beforehand."""
        late = [param for param in params if self.name(param) not in self.consistency.updated]
        if isinstance(error, LostProcessError):
            raise self.lost(late, error) from error.__cause__
        if isinstance(error, NonFiniteGradientError):
            self.consistency.refused_everywhere()
        if self.consistency.written:
            self.consistency.broke_off(self.name((late or params)[0]), reason_of(error))

    def lost(self, params: Sequence[Tensor], error: LostProcessError) -> InconsistentStateError:
        """Return what to raise when a collective failed: others may have got its result, and gone on with this step."""
        step = 1 + max((self.state_of(param)["step"] for param in params), default=0)
        return self.consistency.lost([self.name(param) for param in params], step, error)

    def refuse_bad_flags(self, wait: bool) -> None:
        """Raise if a gradient on an accelerator turned out not to be finite; its update was a step of size zero."""
        bad = self.flags.bad(wait)
        if bad:
            names = ", ".join(self.name(param) for param in bad[:3])
            self.consistency.reason = (
                f"the gradients of {len(bad)} parameters were not finite ({names}); these were not updated"
            )
            for param in bad:
                self.optimizer.state[param]["step"] -= 1
            raise NonFiniteGradientError(self.consistency.reason)

    def drop_gradients(self, broken: bool) -> None:
        """Drop the gradients that a fused backward was collecting, or that a step used which then broke off."""
        if self.hooks is not None:
            self.hooks.abandon()
        elif broken:
            for param in self.parameters.leaves:
                param.grad = None
