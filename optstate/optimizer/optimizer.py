"""The optimizer: a chain and parameters become a plan, and the plan steps one parameter at a time."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from optstate import kernels, naming
from optstate.distributed import agreement
from optstate.distributed.agreement import (
    Agreement,
    DisagreementError,
    LostProcessError,
    difference,
    reason_of,
    together,
)
from optstate.distributed.placement import Placement, copy_part, here, placement_of
from optstate.distributed.sums import run_together
from optstate.integrations import engines
from optstate.integrations.live_objects import import_apart, without_compiler
from optstate.optimizer import alike
from optstate.optimizer import param_groups as groups
from optstate.optimizer import state_dict as resume
from optstate.optimizer.broken_step import STEP, Consistency, InconsistentStateError
from optstate.optimizer.chain_step import context, run_chain
from optstate.optimizer.fused_kernels import stepped_by_torch
from optstate.optimizer.missing_state import Gap, warn_of
from optstate.optimizer.moved_state import MovedStateError, Watch
from optstate.optimizer.parameters import Leaf, batches, replacements
from optstate.optimizer.plan import ParamPlan, Plan, plan_parameter
from optstate.spec import is_fake
from optstate.stores import DeferredFlags, Guard, NonFiniteGradientError, Requests, run_alone
from optstate.updates import Chain, Route, Transform, as_route
from optstate.weights import Weights

__all__ = ["InconsistentStateError", "Optimizer"]

Copy = Callable[[Tensor, Tensor], Any]
"""Brings the values of the second tensor into the first."""


class _Fused(Protocol):
    """What the optimizer needs of `GradientHooks`, which hook it into the backward pass."""

    clip_grad_norm: float | None

    @property
    def handle(self) -> Any: ...

    def attach(self) -> None: ...

    def abandon(self) -> None: ...

    def close_step(self) -> None: ...

    def look_again(self) -> None: ...

    def take_over(self, replaced: Mapping[Tensor, Tensor]) -> None: ...

    def let_go(self, params: Iterable[Tensor]) -> None: ...


class Optimizer(torch.optim.Optimizer):
    """Steps parameters along a chain of transforms, with each statistic kept in the store the chain names.

    Args:
        params: `model.parameters()`, `model.named_parameters()`, or param groups. Names are needed by routes that
            match names and make messages and plans readable; a name decides how a weight is rounded at random, so
            each must be there once. What wrappers put into names (`module.`, `_orig_mod.`) is left out. A group may
            be empty, and hold any hyper-parameter of the recipe, `role` and `head_size`, which declare what its
            parameters are, and keys of others' (`lr_scale`). A route splits each group by chain.
        recipe: a chain, a single transform, or a route that picks a chain per parameter.
        lr: learning rate, a number or a 0-d tensor; multiplies the whole update, weight decay included.
        weights: how new values are written: "auto" (stochastic rounding for bf16 and fp16 parameters, else plain)
            or one of `optstate.weights`.

    State is created here, for every parameter that trains; `plan()` shows it. `state[p]` holds tensors under
    `<slot>` or `<slot>.<field>`, and the plain number `step`.

    Raises:
        TypeError, ValueError: for arguments that cannot be right, naming the value and what would be.
        RuntimeError: under `torch.inference_mode()`, whose tensors cannot be updated later.
    """

    def __init__(
        self,
        params: Iterable[Any],
        recipe: Transform | Route,
        lr: float | Tensor = 1e-3,
        *,
        weights: Weights | str = "auto",
    ) -> None:
        self._route = as_route(recipe)
        self._weights = weights
        self._leaves: dict[Tensor, Leaf] = {}
        self._fused: _Fused | None = None
        self._clip_of_original: float | None = None
        self._replaced_by: weakref.ref[Any] | None = None
        self._consistency = Consistency()
        self._flags = DeferredFlags()
        self._agreement = Agreement()
        self._values = groups.UsedValues()
        groups.refuse_inference_mode("building an optimizer")
        listed = groups.checked_params(params)
        self._names = naming.Names(groups.names_in(listed))
        self._chains: dict[int, Chain] = {}
        self._built = False
        self._alike = False
        self._places: list[list[int]] = []
        self._let_go = 0
        shared = {} if self._route.rules else self._route.default.hyper
        super().__init__(listed, {"lr": lr, **shared})
        self._built = True
        self._share_defaults()
        resume.warn_if_unnamed(self.param_groups, self.plan())

    # --- parameters -------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; their state is created at once. A route makes one group for each chain it picks.

        Raises:
            TypeError, ValueError: for misspelled hyper-parameters, values out of range, names that are there already,
                and parameters that are not floating-point leaf tensors or are in a group already. Nothing is added
                then.
            RuntimeError: under `torch.inference_mode()`.
        """
        groups.refuse_inference_mode("adding parameters")
        if self._built:
            self._follow_replaced()
        group = groups.checked_group(param_group, set(self._leaves))
        given = groups.name_group(group, self._names, self.param_groups)
        canonical = group.get("param_names", [])
        made_of = dict(zip(canonical, given, strict=True))
        parts = groups.split_by_chain(group, self._route, made_of, self.defaults)
        for part in parts:  # raises for what cannot be kept, before anything is added
            self._plan_group(part, self._next_place(), made_of)
        self._names.use(given, canonical)
        for part in parts:
            self._name_empty_groups(part)
            if not all(map(is_fake, part["params"])):  # what only describes a run may do without two seconds of imports
                import_apart("torch._dynamo")
            without_compiler(super().add_param_group)(part)
            self._adopt(len(self.param_groups) - 1)
        self._alike = False
        if self._built:
            self._share_defaults()
            resume.warn_if_unnamed(self.param_groups, self.plan())
        if self._fused is not None:
            self._fused.attach()

    def _name_empty_groups(self, part: dict[str, Any]) -> None:
        """Give empty groups the empty list of names that torch wants where other groups have names."""
        if not part["params"] and self._names:
            part["param_names"] = []
        elif "param_names" in part and not self._leaves:
            for group in self.param_groups:
                group["param_names"] = []

    def _share_defaults(self) -> None:
        """Make `defaults` what all groups share, which schedulers look at, and give it to empty groups."""
        if self._route.rules:
            chains = list(dict.fromkeys(self._chains.values())) or self._route.chains
            self.defaults = {"lr": self.defaults["lr"], **groups.shared_defaults(chains)}
        for group in self.param_groups:
            if not group["params"]:
                group.update({key: value for key, value in self.defaults.items() if key not in group})

    @property
    def fused(self) -> Any:
        """The handle of `optstate.fuse_backward`, or None while updates happen in `step()`."""
        return self._fused.handle if self._fused is not None else None

    @property
    def recipe(self) -> Route:
        """The chain of each parameter, as given: pass it on to build the same optimizer for other parameters."""
        return self._route

    def _adopt(self, index: int) -> None:
        """Plan and allocate the parameters of one group."""
        group = self.param_groups[index]
        for param, plan in zip(group["params"], self._plan_group(group, self._next_place()), strict=True):
            self._chains.setdefault(index, plan.chain)
            self._leaves[param] = Leaf(plan, index, placement_of(param))
            if param.requires_grad and param not in self.state:
                self._allocate(param)

    def _next_place(self) -> int:
        """The number of the next parameter, which stands for its name where it has none: none is given twice."""
        return len(self._leaves) + self._let_go

    def _plan_group(self, group: dict[str, Any], first: int, made_of: Mapping[str, str] = {}) -> list[ParamPlan]:
        """The plans of a group's parameters, which are numbered from `first` where they have no names.

        made_of: the given names of canonical ones that are not in use yet.
        """
        plans = []
        for i, param in enumerate(group["params"]):
            name = group["param_names"][i] if "param_names" in group else naming.by_place(first + i)
            spec = groups.spec_of(name, param, group, made_of.get(name) or self._names.given(name))
            engines.refuse_flat_parameter(name, param, all(chain.knows_no_shape for chain in self._route.chains))
            plans.append(plan_parameter(spec, self._route, self._weights, param.requires_grad or param in self.state))
        return plans

    @torch.inference_mode(False)
    def _allocate(self, param: Tensor) -> dict[str, Any]:
        """Create the state of one parameter: step 0 and zeros."""
        leaf = self._leaves[param]
        leaf.plan = replace(leaf.plan, trainable=True)
        state: dict[str, Any] = {"step": 0}
        for key, field in leaf.plan.fields.items():
            if leaf.placement is not None:
                state[key] = leaf.placement.zeros(field, leaf.plan.spec)
            else:
                state[key] = torch.zeros(field.layout(leaf.plan.spec)[0], dtype=field.dtype, device=param.device)
        self.state[param] = state
        return state

    def plan(self) -> Plan:
        """Which chain, stores and bytes each parameter has, what was kept otherwise than asked, and why."""
        self._follow_replaced()
        return Plan(tuple(self._leaf(p).plan for group in self.param_groups for p in group["params"]))

    def state_nbytes(self) -> int:
        """Bytes of all state tensors that exist now on this device."""
        tensors = (here(v) for state in self.state.values() for v in state.values() if isinstance(v, Tensor))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _leaf(self, param: Tensor) -> Leaf:
        leaf = self._leaves.get(param)
        if leaf is None:
            self._follow_replaced()
            leaf = self._leaves.get(param)
        if leaf is None:
            raise RuntimeError(
                f"a parameter of shape {tuple(param.shape)} was put into the optimizer's groups after it was built; "
                "shard, wrap and cast the model first, then build the optimizer"
            )
        return leaf

    def _follow_replaced(self) -> None:
        """Take over parameters that were put in the place of others when the model was sharded (accelerate's `prepare`
        does so with FSDP2): plan them anew, give them their part of the state, and hook them if updates are fused.

        Raises:
            RuntimeError: if state that has begun to fill would have to change its format.
        """
        for param in [param for param, state in list(self.state.items()) if not state]:
            del self.state[param]  # somebody looked: `state` makes an entry for whatever it is asked for
        places = [[id(param) for param in group["params"]] for group in self.param_groups]
        if places == self._places:
            return
        order = [p for group in self.param_groups for p in group["params"]]
        replaced = replacements(list(self._leaves), order)
        plans = {old: self._plan_again(param, old) for old, param in replaced.items()}  # raises before anything changes
        for old, plan in plans.items():
            self._replace(replaced[old], old, plan)
        if replaced:
            self._leaves = {param: self._leaves[param] for param in order}
            self._alike = False
            if self._fused is not None:
                self._fused.take_over(replaced)
        if all(param in self._leaves for param in order):
            self._follow_moved(order)
            self._places = places

    def _follow_moved(self, order: list[Tensor]) -> None:
        """Follow parameters that users put into other groups, and let those go that are in no group any more.

        Raises:
            RuntimeError: if a group has not the hyper-parameters of a parameter in it, or parameters of two chains, or
                if a parameter is in two places.
        """
        of = {param: i for i, group in enumerate(self.param_groups) for param in group["params"]}
        if len(of) < len(order):
            twice = next(param for i, param in enumerate(order) if any(param is other for other in order[:i]))
            raise RuntimeError(f"{self._leaves[twice].name!r} is in two places of the param groups: leave it in one")
        chains: dict[int, Chain] = {}
        for param, index in of.items():
            leaf = self._leaves[param]
            if chains.setdefault(index, leaf.plan.chain) != leaf.plan.chain:
                raise RuntimeError(
                    f"{leaf.name!r} was put into param group {index}, whose parameters another chain steps: leave each "
                    "parameter in a group of its chain, or build the optimizer anew"
                )
            missing = sorted({"lr", *leaf.plan.chain.hyper} - set(self.param_groups[index]))
            if missing:
                raise RuntimeError(
                    f"{leaf.name!r} was put into param group {index}, which has no {missing[0]!r}: use "
                    "add_param_group(), which fills in what is missing, or give it there"
                )
        gone = [param for param in self._leaves if param not in of]
        if gone:
            warnings.warn(
                "taken out of the param groups, so not stepped any more, and without state from now on: "
                f"{agreement.listed([self._leaves[param].name for param in gone])}",
                stacklevel=4,
            )
        for param in gone:
            self._names.free(self._leaves.pop(param).name)
        for param in [param for param in list(self.state) if param not in of]:
            del self.state[param]
        self._let_go += len(gone)
        if gone and self._fused is not None:
            self._fused.let_go(gone)
        if self._leaves and (gone or any(self._leaves[param].group != i for param, i in of.items())):
            self._alike = False
        for param, index in of.items():
            self._leaves[param].group = index
        self._leaves = {param: self._leaves[param] for param in order}
        if chains != self._chains:
            self._chains, self._values = chains, groups.UsedValues()
        for group in self.param_groups:
            if self._names:
                group["param_names"] = [self._leaves[param].name for param in group["params"]]

    def _plan_again(self, param: Tensor, old: Tensor) -> ParamPlan:
        """The plan of `param` in the place of `old`, if the state there is can become its state."""
        leaf = self._leaves[old]
        spec = groups.spec_of(leaf.name, param, self.param_groups[leaf.group], leaf.plan.spec.given)
        plan = plan_parameter(spec, self._route, self._weights, leaf.plan.trainable)
        steps = self.state[old]["step"] if old in self.state else 0
        if steps and plan.stores != leaf.plan.stores:
            raise RuntimeError(
                f"{spec.name!r} was sharded after {steps} steps, and its state would need another format: "
                "shard the model before the first step, or save, shard, build the optimizer and load"
            )
        return plan

    def _replace(self, param: Tensor, old: Tensor, plan: ParamPlan) -> None:
        """Let `param` take the place of `old`, with its state."""
        self._leaves[param] = Leaf(plan, self._leaves.pop(old).group, placement_of(param))
        past = self.state.pop(old, None)
        if past is not None:
            state = self._allocate(param)
            state["step"] = past["step"]
            for key in plan.fields if past["step"] else ():
                copy_part(state[key], past[key])

    def train(self) -> None:
        """Take over parameters that were replaced in the param groups, as accelerate's `prepare` does with FSDP2.

        `step()` does so, too. Called before the first backward, the whole parameters are freed by then, and a fused
        update begins with the first gradient. Transformers' Trainer calls this before every step.
        """
        self._follow_replaced()

    # --- stepping ---------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that holds a gradient; fused, close the step that the backward pass has made.

        closure: evaluates the model again with gradients enabled and returns the loss, which is returned.

        Raises:
            NonFiniteGradientError: for an infinite or NaN gradient. The parameter it belongs to is unchanged; if
                others were already updated, the optimizer is inconsistent from then on.
            InconsistentStateError: if an earlier step broke off half-way, or if this one did as another process is
                gone, or late by more than the process group's timeout; then `__cause__` is what the backend said.
            RuntimeError: if parameters that are split among devices have a gradient on some of them only; nothing is
                changed. Fused, if no gradient arrived since the last step or hooks were lost.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._consistency.require_unbroken("step")
        self._require_its_hooks()
        self._follow_replaced()
        self._require_usable_values()
        self.require_alike()
        if self._clip_of_original is not None:
            raise RuntimeError(
                f"this is a copy of an optimizer fused with clip_grad_norm={self._clip_of_original}, but not fused: "
                "call optstate.fuse_backward(copy, ...) to say how it clips"
            )
        self._refuse_bad_flags(wait=False)
        if self._fused is not None:
            self._fused.close_step()
        else:
            params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            self._require_agreement(params, all_groups=True)
            self._consistency.begin(STEP)
            self._step_all(params, 1.0)
        self._flags.close_step()
        self._consistency.close()
        return loss

    def _require_its_hooks(self) -> None:
        """Raise RuntimeError if a newer optimizer has taken the gradients of this one over."""
        newer = self._replaced_by() if self._replaced_by is not None and self._fused is None else None
        if newer is not None and newer.active and not self._consistency.updated:  # an open step may be closed
            raise RuntimeError(
                f"a newer {type(newer.optimizer).__name__} was fused over parameters of this optimizer and frees their "
                "gradients, so this one has none to step with: use the newer one, or call optstate.fuse_backward() on "
                "this one, which takes the hooks back"
            )

    def _require_usable_values(self) -> None:
        """Raise TypeError or ValueError for hyper-parameters that were changed to what no step can use."""
        self._values.require(self.param_groups, self._chains)

    def _step_all(self, params: Iterable[Tensor], grad_scale: float | Tensor) -> None:
        """Update parameters: one by one, or together where they are split among devices."""
        for batch in self._batches(params):
            try:
                if self._leaf(batch[0]).is_split:
                    self._step_together(batch, grad_scale)
                else:
                    self.step_parameter(batch[0], grad_scale)
            except BaseException as error:
                self._remember(batch, error)
                raise

    def _remember(self, params: list[Tensor], error: BaseException) -> None:
        """Say what broke off a step, if the step may have changed something; the mark itself was set beforehand."""
        late = [param for param in params if self._name(param) not in self._consistency.updated]
        if isinstance(error, LostProcessError):
            raise self._lost(late, error) from error.__cause__
        if isinstance(error, NonFiniteGradientError):
            self._consistency.refused_everywhere()
        if self._consistency.written:
            self._consistency.broke_off(self._name((late or params)[0]), reason_of(error))

    def _batches(self, params: Iterable[Tensor]) -> Iterator[list[Tensor]]:
        return batches((param, self._leaf(param)) for param in params)

    @torch.no_grad()
    def _step_together(self, params: list[Tensor], grad_scale: float | Tensor) -> None:
        """Update parameters of which this device has parts."""
        names = [self._name(param) for param in params]
        steps = [(self._placed(param), self._requests(param, grad_scale)) for param in params]
        run_together(steps, before=lambda: self._consistency.begin_asking(names))

    def _require_agreement(self, params: Iterable[Tensor], all_groups: bool = False) -> None:
        """Raise unless all devices are about to step the same split parameters.

        all_groups: agree with all devices that share a parameter with this one, also on stepping none of theirs.
        """
        if kernels.rehearsing() or all(leaf.placement is None for leaf in self._leaves.values()):
            return
        leaves = [leaf for leaf in map(self._leaf, params) if leaf.is_split]
        shared = self._leaves.values() if all_groups else leaves
        chosen: dict[Any, list[str]] = {leaf.processes: [] for leaf in shared if leaf.is_split}
        for leaf in leaves:
            chosen[leaf.processes].append(leaf.name)
        try:
            difference = self._agreement.difference(chosen)
        except LostProcessError as error:
            raise self._lost(list(params), error) from error.__cause__
        if difference:
            if self._consistency.written:
                self._consistency.disagreed(difference)
            raise RuntimeError(
                f"{difference}, but parameters that are split among devices are stepped by all together: give them "
                "zeros where they have none (p.grad = torch.zeros_like(p)), or none anywhere"
            )

    def require_alike(self) -> None:
        """Raise unless the processes that share parameters, split or replicated, hold the same recipe, hyper-parameters
        and steps. They ask each other once: before the first step after building, loading or sharding.

        Raises:
            RuntimeError: naming the first difference. Nothing was changed.
            InconsistentStateError: if another process does not answer.
        """
        if self._alike or kernels.rehearsing():
            return
        try:
            found = difference(self._views(self.param_groups, {p: self.state[p]["step"] for p in self.state}))
        except LostProcessError as error:
            raise self._lost(list(self._leaves), error) from error.__cause__
        if found:
            raise RuntimeError(
                f"{found}, but processes that share parameters must train them alike: build the optimizer in the same "
                "way on all ranks, and load the same file"
            )
        self._alike = True

    def _views(self, param_groups: Sequence[Mapping[str, Any]], steps: Mapping[Tensor, int]) -> dict[Any, Any]:
        """What must be the same on the processes that share parameters."""
        order = [p for group in self.param_groups for p in group["params"]]
        by_place = {i: int(steps[p]) for i, p in enumerate(order) if p in steps}
        clip = self._fused.clip_grad_norm if self._fused is not None else None
        return alike.views([self._leaf(p) for p in order], param_groups, by_place, clip_grad_norm=clip)

    def _lost(self, params: list[Tensor], error: LostProcessError) -> InconsistentStateError:
        """What to raise when a collective failed: others may have got its result, and gone on with this step."""
        step = 1 + max((self._state_of(param)["step"] for param in params), default=0)
        return self._consistency.lost([self._name(param) for param in params], step, error)

    def _placed(self, param: Tensor) -> Placement:
        placement = self._leaf(param).placement
        assert placement is not None
        return placement

    @torch.no_grad()
    def step_parameter(self, param: Tensor, grad_scale: float | Tensor = 1.0) -> None:
        """Update one parameter from its gradient: the only step there is, called by `step` and by backward hooks.

        grad_scale: coefficient of a global norm clip.
        """
        if self._leaf(param).is_split:
            run_together([(self._placed(param), self._requests(param, grad_scale))])
        else:
            run_alone(self._requests(param, grad_scale))

    def _requests(self, param: Tensor, grad_scale: float | Tensor = 1.0) -> Requests[None]:
        """One parameter's update as a computation that asks for sums over the whole parameter. Call under no_grad."""
        leaf, original = self._leaf(param), param
        plan, spec = leaf.plan, leaf.plan.spec
        grad = groups.checked_gradient(param, spec, leaf.placement)
        whole_state = self._state_of(param)
        state = whole_state
        if leaf.placement is not None:
            param = here(param)
            state = {key: here(value) if isinstance(value, Tensor) else value for key, value in whole_state.items()}
        step, group = state["step"] + 1, self.param_groups[leaf.group]
        if spec.numel:
            written = [original, *(value for value in whole_state.values() if isinstance(value, Tensor))]
            if leaf.placement is not None:
                written += [param, *(value for value in state.values() if isinstance(value, Tensor))]
            guard = Guard(spec.name, grad, before_write=lambda: self._before_write(spec.name, written))
            finite = None if plan.guards else kernels.all_finite(grad, plan.largest_gradient(group))
            read_again = spec.region is None and plan.guards and grad.dtype != spec.accumulator
            if read_again and grad.numel() <= 1.5 * kernels.chunk_elements(grad.device):
                grad = grad.to(spec.accumulator)  # a small one is converted once; several would wait for sums together
            ctx = context(plan, state, param, grad, group, step, guard, grad_scale)
            if finite is not None:
                yield from ctx.check_finite(finite)
            if not stepped_by_torch(plan, state, ctx):
                yield from run_chain(plan, state, ctx)
            if guard.finite is not None:
                self._flags.add(original, guard.finite)
        self._consistency.begin_writing(spec.name)
        whole_state["step"] = step
        self._consistency.finish(spec.name)

    def _before_write(self, name: str, tensors: list[Tensor]) -> None:
        """Mark a parameter as being written, and tell autograd, which must refuse graphs that need the old values.

        This is the one place that does so for every way of writing: kernels of PyTorch's fused optimizers do not, and
        what is written in a part of a distributed tensor is not seen at the whole.
        """
        self._consistency.begin_writing(name)
        increment_version(tensors)

    def _state_of(self, param: Tensor) -> dict[str, Any]:
        """The state of one parameter, made if it just began to train, moved if the model was."""
        state: dict[str, Any] = self.state.get(param) or self._allocate(param)
        for key, value in state.items():
            if isinstance(value, Tensor) and value.device != param.device:
                with torch.inference_mode(False):
                    state[key] = torch.empty_like(value, device=param.device)
                state[key].copy_(value)
        return state

    def _name(self, param: Tensor) -> str:
        return self._leaf(param).name

    # --- saving and loading -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """torch's layout, plus the key `optstate` with the stores in use. Tensors, numbers and strings only.

        The tensors are the optimizer's own: copy or write them before the next step, in whichever thread that is.

        Raises:
            InconsistentStateError: if a step broke off half-way, or if a backward pass has updated parameters and
                `step()` did not follow.
            MovedStateError: if another thread updates a parameter meanwhile.
        """
        self._consistency.require_whole("state_dict")
        self._refuse_bad_flags(wait=True)
        unmoved = self.watch("state_dict")
        clip = self._fused.clip_grad_norm if self._fused is not None else None
        header = resume.header(self.plan(), clip)  # first, as it names a parameter that was put into the groups
        found = {**without_compiler(super().state_dict)(), resume.KEY: header}
        unmoved()
        return found

    def watch(self, action: str) -> Callable[[], None]:
        """What to call when the state has been read for `action`: it raises if a parameter was updated meanwhile.

        Raises:
            MovedStateError: by what is returned.
            InconsistentStateError: by what is returned, if a step has begun and not ended.
        """
        self._follow_replaced()
        for param in self._leaves:
            if param.requires_grad and param not in self.state:  # it was unfrozen: what trains has state
                self._allocate(param)
        watch = Watch(self.state)

        def unmoved() -> None:
            param = watch.moved()
            if param is not None:
                raise MovedStateError(
                    f"{action}() refused: {self._name(param)!r} was updated while it was read, so that its numbers are "
                    "of two steps: let no other thread step meanwhile"
                )
            self._consistency.require_whole(action)

        return unmoved

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue exactly where the saved run stopped. Strict: nothing is cast, guessed or left out.

        Values are copied into this optimizer's tensors; the dict stays untouched. A parameter that is frozen here keeps
        the state that was saved of it. One of which none was saved begins anew, with a warning, if the dict is not of
        this library's `state_dict`, which has state for all that trains; else the dict is refused if it trains here.

        Where parameters are DTensors all ranks that share them must call this; it fails on all of them or on none.

        Raises:
            ValueError: if groups, names, shapes, dtypes or stores differ, naming the parameter. Nothing is
                changed then.
            DisagreementError: if it fails on another rank, or ranks load different steps, hyper-parameters or, as far
                as they have whole tensors, numbers. Nothing is changed then, on any rank.
            RuntimeError: inside a backward pass.
            MovedStateError: if another thread steps meanwhile; the optimizer is inconsistent then.
        """

        def prepare() -> tuple[Mapping[str, Any], Copy]:
            saved = dict(state_dict)
            for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
                saved = pre_hook(self, saved) or saved
            return saved, copy_part

        self.load_prepared(prepare)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def load_prepared(
        self, prepare: Callable[[], tuple[Mapping[str, Any], Copy]], content: Callable[[], Mapping[str, str]] = dict
    ) -> None:
        """What `load_state_dict` does between its hooks, on all processes that share parameters or on none.

        prepare: gives what was saved, and what brings the values of a saved tensor into one of this optimizer's. Saved
            tensors need only shape and dtype, so that a file can be read into place.
        content: what else must be the same on them, in words; called after `prepare` where there are such processes.

        Raises:
            What `prepare` raises, and as `load_state_dict`.
            InconsistentStateError: if another process failed after this one had begun to copy.
        """
        self._follow_replaced()
        shared = alike.processes(self._leaves.values())
        with together("load", shared) as views:
            if torch._C._current_graph_task_id() != -1:
                raise RuntimeError(
                    "loading inside a backward pass is refused: gradients of the old state would meet the new one; "
                    "load before the forward pass, or after step()"
                )
            saved, copy = prepare()
            gaps = resume.check(self, self.plan(), saved)
            taken_over = resume.names_to_take_over(self, self.plan(), saved)
            if shared:
                self._note_what_is_loaded(views, saved, content())
        broken = bool(self._consistency.broken)
        # A load is written ahead: whatever ends it before its end, no step and no save follow.
        self._consistency.reason = "loading has not come to its end"
        try:
            with together("load, after reading", shared):
                self._fill(saved, gaps, copy)
        except DisagreementError as error:
            self._consistency.reason = f"loading failed elsewhere: {error}"
            raise InconsistentStateError(
                f"loading ended: {error}. Load again on all ranks before the next step"
            ) from None
        self.param_groups = resume.loaded_groups(self.param_groups, saved["param_groups"])
        self._flags = DeferredFlags()
        self._alike = False
        self._drop_gradients(broken)
        self._consistency.forget()
        if self._fused is not None:
            self._fused.look_again()  # trainers load when they take an optimizer over
        resume.warn_if_rounded_otherwise(saved, self.param_groups, self.plan(), taken_over)
        if taken_over:
            self._take_names(taken_over)
        plan = self.plan()
        of = {gap: [param.spec.name for param, each in zip(plan, gaps, strict=True) if each is gap] for gap in Gap}
        kept = {param.spec.name for param in plan if param.fields}  # where nothing is kept nothing is missing
        warn_of([name for name in of[Gap.ANEW] if name in kept], of[Gap.DROP])
        resume.warn_if_written_otherwise(saved, self.plan())
        resume.warn_if_unclipped(saved, self._fused.clip_grad_norm if self._fused is not None else None)

    def _take_names(self, names: Sequence[str]) -> None:
        """Give parameters that have no names these, in order."""
        self._names.use(names, names)
        unused = iter(names)
        for group in self.param_groups:
            group["param_names"] = [next(unused) for _ in group["params"]]
            for param, name in zip(group["params"], group["param_names"], strict=True):
                leaf = self._leaf(param)
                leaf.plan = replace(leaf.plan, spec=replace(leaf.plan.spec, name=name))

    def _note_what_is_loaded(
        self, views: dict[Any, dict[str, str]], saved: Mapping[str, Any], content: Mapping[str, str]
    ) -> None:
        """Note what processes that share parameters must load alike."""
        entries = list(resume.entries(self, saved))
        steps = {param: state["step"] for param, state in entries if state}
        for those, view in self._views(saved["param_groups"], steps).items():
            views[those] |= {**view, **content}
            for param, state in entries:
                leaf = self._leaf(param)
                if leaf.placement is not None and leaf.placement.everyone == those:
                    tensors = {f"{leaf.name}/{key}": v for key, v in state.items() if isinstance(v, Tensor) and v.ndim}
                    views[those] |= alike.content(tensors)

    def _fill(self, saved: Mapping[str, Any], gaps: Sequence[Gap], copy: Copy) -> None:
        """Bring what was saved into this optimizer's state."""
        watch = Watch(self.state)
        for (param, state), gap in zip(resume.entries(self, saved), gaps, strict=True):
            try:
                self._fill_one(param, state, gap, copy)
            except BaseException as error:
                self._consistency.reason = f"loading ended at {self._name(param)!r}: {reason_of(error)}"
                raise
            watch.renew(param)
        moved = watch.moved()
        if moved is not None:
            self._consistency.reason = f"{self._name(moved)!r} was updated while it was loaded"
            raise MovedStateError(f"{self._consistency.reason}: let no other thread step meanwhile, and load again")

    def _fill_one(self, param: Tensor, state: Mapping[str, Any], gap: Gap, copy: Copy) -> None:
        if gap is Gap.NONE:
            return
        if gap is Gap.DROP:
            del self.state[param]
            leaf = self._leaf(param)
            leaf.plan = replace(leaf.plan, trainable=False)
            return
        own = self._state_of(param)
        for key, value in own.items():
            if gap is Gap.ANEW:
                own[key] = value.zero_() if isinstance(value, Tensor) else 0
            elif isinstance(value, Tensor):
                increment_version([value, here(value)])  # a file may be read into its memory
                copy(value, state[key])
            else:
                own[key] = int(state[key])

    def accept_partial_step(self) -> None:
        """Go on after a step that broke off: parameters keep what they have, updated or not.

        Gradients that the broken step used, and those that a fused backward was collecting, are dropped.
        """
        self._drop_gradients(bool(self._consistency.broken))
        self._consistency.forget()

    def _drop_gradients(self, broken: bool) -> None:
        """Drop the gradients that a fused backward was collecting, or that a step used which then broke off."""
        if self._fused is not None:
            self._fused.abandon()
        elif broken:
            for param in self._leaves:
                param.grad = None

    def _refuse_bad_flags(self, wait: bool) -> None:
        """Raise if a gradient on an accelerator turned out not to be finite; its update was a step of size zero."""
        bad = self._flags.bad(wait)
        if bad:
            names = ", ".join(self._name(p) for p in bad[:3])
            self._consistency.reason = (
                f"the gradients of {len(bad)} parameters were not finite ({names}); these were not updated"
            )
            for param in bad:
                self.state[param]["step"] -= 1
            raise NonFiniteGradientError(self._consistency.reason)

    def __getstate__(self) -> dict[str, Any]:
        clip = self._fused.clip_grad_norm if self._fused is not None else self._clip_of_original
        own: dict[str, Any] = {"_route": self._route, "_weights": self._weights, "_names": self._names}
        own["_inconsistent"] = self._consistency.reason_of_copy
        return {**super().__getstate__(), **own, "_clip_of_original": clip}

    def __setstate__(self, state: dict[str, Any]) -> None:
        groups.refuse_inference_mode("copying an optimizer")
        state = dict(state)
        self._consistency = Consistency(state.pop("_inconsistent"))
        self._agreement, self._flags = Agreement(), DeferredFlags()
        self._names = state.pop("_names", naming.Names())
        self._values, self._chains, self._built = groups.UsedValues(), {}, True
        self._alike, self._places, self._let_go = False, [], 0
        super().__setstate__(state)
        self._leaves, self._fused, self._replaced_by = {}, None, None
        for index in range(len(self.param_groups)):
            self._adopt(index)
