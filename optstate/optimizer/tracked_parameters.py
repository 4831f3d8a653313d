"""The parameters of one optimizer: planned when they are added, followed when users or engines move or replace them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain as in_a_row
from typing import Any

import torch
from torch import Tensor

from optstate import naming
from optstate.distributed.agreement import listed
from optstate.distributed.placement import copy_part, placement_of
from optstate.integrations import engines
from optstate.kernels.backend import CHOSEN_OUTSIDE
from optstate.optimizer import param_groups
from optstate.optimizer.compiled_chain import ChainCompiler
from optstate.optimizer.parameters import Leaf, replacements
from optstate.optimizer.plan import ParamPlan, Plan
from optstate.optimizer.planner import Planner
from optstate.optimizer.whole_steps import require_backend
from optstate.updates import Chain, Route
from optstate.weights import Quantized, QuantizedWeight, Weights

__all__ = ["Changes", "TrackedParameters"]

ParamGroups = list[dict[str, Any]]
ParamStates = dict[Tensor, Any]
PlannedGroup = tuple[dict[str, Any], list[ParamPlan]]
"""A complete param group, and the plans of its parameters."""


@dataclass
class Changes:
    """What became of the parameters since somebody last looked.

    replaced: parameters of ours, and those that were put in their places. gone: parameters that are in no group any
    more. regrouped: whether some are in other groups than before. other_chains: whether groups have other chains.
    """

    replaced: dict[Tensor, Tensor] = field(default_factory=dict)
    gone: list[Tensor] = field(default_factory=list)
    regrouped: bool = False
    other_chains: bool = False


class TrackedParameters:
    """Every parameter of an optimizer with its plan, and the chain of every group; state is made here and nowhere else.

    The optimizer's `param_groups` and `state` are given to each method, as their owner may put others in their place.
    """

    def __init__(self, route: Route, weights: Weights | str, names: naming.CanonicalNames) -> None:
        self.route, self.weights, self.names = route, weights, names
        self.backend = "auto"
        self.in_triton = CHOSEN_OUTSIDE == "triton"
        self.compiler: ChainCompiler | None = None
        self._planner = Planner(route, weights)
        self.leaves: dict[Tensor, Leaf] = {}
        self.chains: dict[int, Chain] = {}
        """The chain of each group that has parameters, by the group's place."""
        self._places: list[list[int]] = []
        self.strangers: list[Tensor] = []
        """Parameters in the groups that are in the place of no others: they came after the optimizer was built."""
        self._let_go = 0

    def use_backend(self, backend: str) -> None:
        """Have the steps of all parameters made by one of `optstate.kernels.backend.BACKENDS`.

        Raises:
            ValueError: if a backend other than "auto" cannot make them. Nothing is changed then.
        """
        require_backend([(leaf.plan, param) for param, leaf in self.leaves.items()], backend)
        self.backend = backend
        self.in_triton = "triton" in (backend, CHOSEN_OUTSIDE)
        for leaf in self.leaves.values():
            leaf.use_backend(backend, self.compiler)

    def compile_with(self, compiler: ChainCompiler | None) -> None:
        """Have the steps of chains that no whole step knows compiled, or run as they are (None)."""
        self.compiler = compiler
        for leaf in self.leaves.values():
            leaf.use_backend(self.backend, compiler)

    # --- adding -----------------------------------------------------------------------------------------------------

    def split_group(
        self, given: dict[str, Any], groups: ParamGroups, defaults: Mapping[str, Any]
    ) -> list[PlannedGroup]:
        """Return one complete group for each chain that the route picks for a group's parameters; take their names.

        Raises:
            TypeError, ValueError: for what cannot be kept or stepped. Nothing is taken then.
        """
        group = param_groups.checked_group(given, self.leaves)
        as_given = param_groups.name_group(group, self.names, groups)
        canonical = group.get("param_names", [])
        made_of = dict(zip(canonical, as_given, strict=True))
        found: list[PlannedGroup] = []
        first = self._next_number
        for part in param_groups.split_by_chain(group, self.route, made_of, defaults):
            found.append((part, self._plan_group(part, {}, first, made_of)))
            require_backend(zip(found[-1][1], part["params"], strict=True), self.backend)
            first += len(part["params"])
        self.names.use(as_given, canonical)
        return found

    def name_empty_groups(self, part: dict[str, Any], groups: ParamGroups) -> None:
        """Give empty groups the empty list of names that torch wants where other groups have names."""
        if not part["params"] and self.names:
            part["param_names"] = []
        elif "param_names" in part and not self.leaves:
            for group in groups:
                group["param_names"] = []

    @property
    def _next_number(self) -> int:
        """The number in the name of the next parameter that has none of its own; no number is given twice."""
        return len(self.leaves) + self._let_go

    def adopt(
        self, index: int, groups: ParamGroups, state: ParamStates, plans: Sequence[ParamPlan] | None = None
    ) -> None:
        """Take over the parameters of one group, and make the state of those that train.

        plans: of the group's parameters in order, as `split_group` gives them; without, they are made here.
        """
        params: list[Tensor] = groups[index]["params"]
        if plans is None:  # of a copy, whose state may be of parameters that are in no group: `follow` looks
            plans = self._plan_group(groups[index], state, self._next_number)
        else:
            self._places[index:] = [list(map(id, group["params"])) for group in groups[index:]]
        have_state = set(map(id, state))
        with torch.inference_mode(False):
            for param, plan in zip(params, plans, strict=True):
                leaf = self.leaves[param] = Leaf(plan, index, placement_of(param), self.backend, self.compiler)
                if param.requires_grad and id(param) not in have_state:
                    self._allocate(param, leaf, state)
        if plans:
            self.chains.setdefault(index, plans[0].chain)

    def _plan_group(
        self, group: dict[str, Any], state: ParamStates, first: int, made_of: Mapping[str, str] = {}
    ) -> list[ParamPlan]:
        """Return the plans of a group's parameters.

        Args:
            group: with its parameters, and their names if there are any.
            state: of the optimizer. A frozen parameter that has some is planned as one that trains.
            first: the number of the group's first parameter, if they have no names.
            made_of: the given names of canonical ones that are not in use yet.
        """
        params = group["params"]
        names = group.get("param_names") or map(naming.by_place, range(first, first + len(params)))
        in_parts = all(chain.knows_no_shape for chain in self.route.chains)
        plans = []
        for name, param in zip(names, params, strict=True):
            spec = param_groups.spec_of(name, param, group, made_of.get(name) or self.names.given(name))
            engines.refuse_flat_parameter(name, param, in_parts)
            plan = self._planner.plan(spec, param.requires_grad or param in state)
            plans.append(replace(plan, weights=self._way_of(param)) if isinstance(param, QuantizedWeight) else plan)
        return plans

    def _way_of(self, param: QuantizedWeight) -> Weights:
        """Return how an 8-bit weight is written, with the seed that other weights have."""
        return Quantized(param.block, getattr(self.weights, "seed", 0))

    @torch.inference_mode(False)
    def allocate(self, param: Tensor, state: ParamStates) -> dict[str, Any]:
        """Create the state of one parameter: step 0 and zeros."""
        return self._allocate(param, self.leaves[param], state)

    def _allocate(self, param: Tensor, leaf: Leaf, state: ParamStates) -> dict[str, Any]:
        """Create the state of one parameter outside of `torch.inference_mode()`."""
        if not leaf.plan.trainable:
            leaf.plan = replace(leaf.plan, trainable=True)
        entry: dict[str, Any] = {"step": 0}
        if leaf.placement is None:
            entry.update(self._planner.zeros(leaf.plan, param.device))
        else:
            for key, layout in leaf.plan.layouts.items():
                entry[key] = leaf.placement.zeros(layout.shape, layout.dims, layout.dtype)
        state[param] = entry
        return entry

    def drop(self, param: Tensor, state: ParamStates) -> None:
        """Forget the state of a frozen parameter; new state is made when the parameter trains again."""
        del state[param]
        leaf = self.leaves[param]
        leaf.plan = replace(leaf.plan, trainable=False)

    # --- asking -----------------------------------------------------------------------------------------------------

    def plan(self, groups: ParamGroups) -> Plan:
        """Return the plans of all parameters in the order of the groups."""
        return Plan(tuple(self.leaves[param].plan for group in groups for param in group["params"]))

    def shared_defaults(self, lr: Any) -> dict[str, Any]:
        """Return the hyper-parameters that all chains in use share, which schedulers look for."""
        chains = list(dict.fromkeys(self.chains.values())) or self.route.chains
        return {"lr": lr, **param_groups.shared_defaults(chains)}

    def take_names(self, names: Iterable[str], groups: ParamGroups) -> None:
        """Give parameters that have no names these, in order."""
        names = list(names)
        self.names.use(names, names)
        unused = iter(names)
        for group in groups:
            group["param_names"] = [next(unused) for _ in group["params"]]
            for param, name in zip(group["params"], group["param_names"], strict=True):
                leaf = self.leaves[param]
                leaf.plan = replace(leaf.plan, spec=replace(leaf.plan.spec, name=name))

    # --- following --------------------------------------------------------------------------------------------------

    def follow(self, groups: ParamGroups, state: ParamStates, tell: Callable[[Changes], None]) -> None:
        """Take over parameters that were put in the place of others when the model was sharded.

        accelerate's `prepare` puts them there with FSDP2. They are planned anew and get their part of the state.
        Parameters that are in no group any more are let go.

        Args:
            groups: the optimizer's param groups.
            state: the optimizer's state.
            tell: called with the changes as soon as they are made.

        Raises:
            RuntimeError: if state that has begun to fill would have to change its format; if a group has not the
                hyper-parameters of a parameter in it, or parameters of two chains; if a parameter is in two places.
        """
        if not all(list(state.values())):  # somebody looked: `state` makes an entry for whatever it is asked for
            for param in [param for param, entry in list(state.items()) if not entry]:
                del state[param]
        places = []
        for group in groups:
            places.append(list(map(id, group["params"])))
        if places == self._places:
            self.strangers = []
            return
        order = list(in_a_row.from_iterable(group["params"] for group in groups))
        replaced = replacements(list(self.leaves), order)
        plans = {old: self._plan_again(param, old, groups, state) for old, param in replaced.items()}
        for old, plan in plans.items():  # nothing was changed before all of them could be planned
            self._replace(replaced[old], old, plan, state)
        if replaced:
            self.leaves = {param: self.leaves[param] for param in order}
            tell(Changes(replaced=replaced))
        self.strangers = [param for param in order if param not in self.leaves]
        if not self.strangers:
            tell(self._follow_moved(order, groups, state))
            self._places = places

    def _follow_moved(self, order: list[Tensor], groups: ParamGroups, state: ParamStates) -> Changes:
        """Follow parameters that users put into other groups, and let those go that are in no group any more."""
        of = {param: i for i, group in enumerate(groups) for param in group["params"]}
        if len(of) < len(order):
            twice = next(param for i, param in enumerate(order) if any(param is other for other in order[:i]))
            raise RuntimeError(f"{self.leaves[twice].name!r} is in two places of the param groups: leave it in one")
        chains = self._chains_of(of, groups)
        gone = [param for param in self.leaves if param not in of]
        regrouped = any(self.leaves[param].group != i for param, i in of.items())
        changes = Changes(gone=gone, regrouped=regrouped, other_chains=chains != self.chains)
        if gone:
            warnings.warn(
                "taken out of the param groups, so not stepped any more, and without state from now on: "
                f"{listed([self.leaves[param].name for param in gone])}",
                stacklevel=7,
            )
        for param in gone:
            self.names.free(self.leaves.pop(param).name)
        for param in [param for param in list(state) if param not in of]:
            del state[param]
        self._let_go += len(gone)
        for param, index in of.items():
            self.leaves[param].group = index
        self.leaves = {param: self.leaves[param] for param in order}
        self.chains = chains
        for group in groups:
            if self.names:
                group["param_names"] = [self.leaves[param].name for param in group["params"]]
        return changes

    def _chains_of(self, of: Mapping[Tensor, int], groups: ParamGroups) -> dict[int, Chain]:
        """Return the chain of each group, if every parameter fits into its own. of: each parameter's group."""
        chains: dict[int, Chain] = {}
        for param, index in of.items():
            leaf = self.leaves[param]
            if chains.setdefault(index, leaf.plan.chain) != leaf.plan.chain:
                raise RuntimeError(
                    f"{leaf.name!r} was put into param group {index}, whose parameters another chain steps: leave each "
                    "parameter in a group of its chain, or build the optimizer anew"
                )
            missing = sorted({"lr", *leaf.plan.chain.hyper} - set(groups[index]))
            if missing:
                raise RuntimeError(
                    f"{leaf.name!r} was put into param group {index}, which has no {missing[0]!r}: use "
                    "add_param_group(), which fills in what is missing, or give it there"
                )
        return chains

    def _plan_again(self, param: Tensor, old: Tensor, groups: ParamGroups, state: ParamStates) -> ParamPlan:
        """Return the plan of `param` in the place of `old`, if the state there is can become its state."""
        leaf = self.leaves[old]
        spec = param_groups.spec_of(leaf.name, param, groups[leaf.group], leaf.plan.spec.given)
        plan = self._planner.plan(spec, leaf.plan.trainable)
        steps = state[old]["step"] if old in state else 0
        if steps and plan.stores != leaf.plan.stores:
            raise RuntimeError(
                f"{spec.name!r} was sharded after {steps} steps, and its state would need another format: "
                "shard the model before the first step, or save, shard, build the optimizer and load"
            )
        return plan

    def _replace(self, param: Tensor, old: Tensor, plan: ParamPlan, state: ParamStates) -> None:
        """Let `param` take the place of `old`, with its state."""
        self.leaves[param] = Leaf(plan, self.leaves.pop(old).group, placement_of(param), self.backend, self.compiler)
        past = state.pop(old, None)
        if past is not None:
            entry = self.allocate(param, state)
            entry["step"] = past["step"]
            for key in plan.fields if past["step"] else ():
                copy_part(entry[key], past[key])
