"""Questions to the estimate: recipes under one setting, each answered from shapes and from a traced step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from optstate.memory.errors import QuestionError
from optstate.memory.model import KINDS, BuildOptions, Model, Setting, Trace
from optstate.memory.result import ASSUMED, EXACT, TRACED, RecipeEstimate
from optstate.memory.shard import PerRank, per_rank
from optstate.memory.sources import SourceError
from optstate.memory.sources.modules import default_dtype
from optstate.memory.tracing.extrapolate import trace_model
from optstate.memory.tracing.trace import UntraceableError
from optstate.memory.verdict import Gpu
from optstate.optimizer.optimizer import Optimizer
from optstate.optimizer.plan import Plan
from optstate.recipes import registry
from optstate.roles import declare_roles
from optstate.weights import Weights

__all__ = ["Question", "Recipe", "find_recipe"]

SHAPES_TELL = ("weights_bytes", "buffer_bytes", "gradients_bytes", "state_bytes", "known_bytes")
SEEN_ON_ONE = "gradients_most_bytes"
"""The figure of a trace that does not hold where gradients are divided among devices."""
TRACES_TELL = ("activations_bytes", "logits_bytes", "scratch_bytes")
PEAK_TELLS = ("peak_bytes", "peak_phase", "at_peak")

REFUSES_FUSED = ("zero1", "zero2")
"""Ways to shard in which no hook of the backward pass sees the gradient that is used."""

Build = Callable[..., Optimizer]


@dataclass(frozen=True)
class Recipe:
    """A recipe. build: makes its optimizer from parameters. fused: whether it is made for updates in the backward."""

    name: str
    build: Build
    fused: bool


def find_recipe(recipe: str | Build) -> Recipe:
    """Return the installed recipe of a name, or one of any callable that makes an optimizer of parameters.

    Raises:
        QuestionError: if no recipe has this name, naming the nearest; if it is neither.
    """
    build: Build
    if isinstance(recipe, str):
        name = recipe
        try:
            build = registry.get(recipe)
        except registry.UnknownRecipeError as error:
            raise QuestionError(str(error.args[0])) from error
    elif callable(recipe):
        build = recipe
        inner = _inner(recipe)
        name = getattr(inner, "__name__", type(inner).__name__).lower()
    else:
        raise QuestionError(f"recipe={recipe!r} is a {type(recipe).__name__}: give a name, or what makes an optimizer")
    return Recipe(name, build, bool(getattr(_inner(build), "made_for_fused_backward", False)))


def _inner(build: Build) -> Any:
    """Return the recipe behind arguments that were given to it beforehand."""
    while isinstance(build, partial):
        build = build.func
    return build


@dataclass(frozen=True)
class Question:
    """A question to the estimate: a model, a setting, and the recipes asked about.

    Attributes:
        model: what is trained.
        setting: of the run, apart from what each recipe decides.
        weights: how weights are written, or "auto".
        fused_backward: whether recipes update inside the backward pass; None for what each recipe is made for.
        gpu: the GPU that the run should fit; None for none.
        exact: trace all layers instead of a few.
        world_size, shard: as in `optstate.memory.shard`.
        recipes: the recipes asked about.
        answered: answers so far, shared with the questions that were made from this one.
    """

    model: Model
    setting: Setting
    weights: Weights | str = "auto"
    fused_backward: bool | None = None
    gpu: Gpu | None = None
    exact: bool = False
    world_size: int = 1
    shard: str = "none"
    recipes: tuple[Recipe, ...] = ()
    answered: dict[Any, RecipeEstimate] = field(default_factory=dict, repr=False, compare=False)

    def named(self, name: str) -> Recipe:
        """Return the recipe of this name among those asked about."""
        return next(recipe for recipe in self.recipes if recipe.name == name)

    def answer(self, recipe: Recipe) -> RecipeEstimate:
        """Return the estimate of a recipe.

        Raises:
            QuestionError: if the recipe cannot be built so.
            SourceError: if the model cannot.
        """
        case = _Case(self, recipe)
        case.check()
        key = recipe, case.setting
        if key not in self.answered:
            self.answered[key] = self._traced(case)
        return self.answered[key]

    def _traced(self, case: _Case) -> RecipeEstimate:
        notes = tuple(case.notes())  # builds the optimizer: what cannot be built is told before it is traced
        if self.model.build is None or self.model.batch is None:
            return case.from_shapes("none, from shapes alone: no activations and no peak", notes)
        try:
            trace, how = trace_model(self.model, case.build_undeclared, case.setting, exact=self.exact)
        except UntraceableError as error:
            if isinstance(error.__cause__, SourceError):  # what was asked for cannot be: not the model's operations
                raise error.__cause__ from None
            return case.from_shapes(f"none: {error}", notes)
        return case.from_trace(trace, how, notes)

    def lower_bound(self, recipe: Recipe) -> RecipeEstimate:
        """Return the estimate from shapes alone, without a trace and without notes."""
        return _Case(self, recipe).from_shapes()


@dataclass(frozen=True)
class _Case:
    """One recipe under one setting."""

    question: Question
    recipe: Recipe

    @cached_property
    def setting(self) -> Setting:
        chosen = self.question.fused_backward
        fused = self.recipe.fused if chosen is None else chosen
        return replace(self.question.setting, fused_backward=fused, weights=str(self.question.weights))

    def check(self) -> None:
        """Raise QuestionError for a run that the library refuses."""
        shard = self.question.shard
        if self.setting.fused_backward and shard in REFUSES_FUSED:
            reason = f"recipe {self.recipe.name!r} updates in the backward pass, which {shard} refuses"
            raise QuestionError(f"{reason}: give fused_backward=False (--no-fused-backward), or shard fsdp")

    @property
    def build(self) -> Build:
        """The function that makes the recipe's optimizer, with weights written as was asked."""
        weights = self.question.weights
        return self.recipe.build if weights == "auto" else partial(self.recipe.build, weights=weights)

    def build_undeclared(self, groups: Iterable[dict[str, Any]]) -> Optimizer:
        """Return the recipe for `model.named_parameters()`, from groups that declare roles."""
        return self.build([named for group in groups for named in group["params"]])

    @cached_property
    def optimizer(self) -> Optimizer:
        """The real optimizer on parameters without memory."""
        recipe = f"recipe {self.recipe.name!r}"
        try:
            optimizer = self.build(_parameters_on_meta(self.question.model))
        except (ValueError, TypeError) as error:
            raise QuestionError(f"{recipe}: {error}") from error
        if not isinstance(optimizer, Optimizer):
            made = type(optimizer).__name__
            raise QuestionError(f"{recipe} makes a {made}: only optimizers of optstate can be estimated")
        return optimizer

    @cached_property
    def plan(self) -> Plan:
        """The plan of the real optimizer."""
        return self.optimizer.plan()

    @cached_property
    def rank(self) -> PerRank:
        """The bytes of weights, gradients and state on one device."""
        question = self.question
        one_at_a_time = self.setting.fused_backward and self.setting.grad_accum == 1
        setting = replace(self.setting, fused_backward=one_at_a_time)
        try:
            return per_rank(question.model, self.plan, setting, question.world_size, question.shard)
        except ValueError as error:
            devices = f"on {question.world_size} devices, {question.shard}"
            raise QuestionError(f"recipe {self.recipe.name!r} {devices}: {error}") from error

    def from_shapes(self, why: str = "", notes: tuple[str, ...] = ()) -> RecipeEstimate:
        """Return the estimate without a trace: weights, gradients and state."""
        return RecipeEstimate(
            recipe=self.recipe.name,
            fused_backward=self.setting.fused_backward,
            weights_bytes=self.rank.weights,
            buffer_bytes=self.question.model.buffer_bytes,
            gradients_bytes=self.rank.gradients,
            state_bytes=self.rank.state,
            basis=dict.fromkeys(SHAPES_TELL, EXACT),
            how=why,
            notes=notes,
            gpu=self.question.gpu,
        )

    def from_trace(self, trace: Trace, how: str, notes: tuple[str, ...]) -> RecipeEstimate:
        """Return the estimate with all figures of a trace."""
        divided = self.question.world_size > 1
        peak, phase = self._divided(trace) if divided else (dict(trace.at_peak), trace.phase)
        guessed = ("reserved_bytes", "device_bytes", *(("verdict",) if self.question.gpu is not None else ()))
        shapes = self.from_shapes(how, (*notes, *trace.notes))
        on_one = {} if divided else {SEEN_ON_ONE: TRACED}
        return replace(
            shapes,
            gradients_most_bytes=None if divided else trace.most.get("gradients", 0),
            activations_bytes=trace.most.get("activations", 0),
            logits_bytes=trace.most.get("logits", 0),
            scratch_bytes=trace.most.get("scratch", 0),
            peak_bytes=sum(peak.values()),
            peak_phase=phase,
            at_peak=peak,
            alive=trace.alive,
            basis={
                **shapes.basis,
                **on_one,
                **dict.fromkeys(TRACES_TELL, TRACED),
                **dict.fromkeys(PEAK_TELLS, ASSUMED if divided else TRACED),
                **dict.fromkeys(guessed, ASSUMED),
            },
        )

    def _divided(self, trace: Trace) -> tuple[dict[str, int], str]:
        """Bound the peak on one of several devices, and say where it is.

        The bound is put together from what one device was seen to need, since nothing was traced on several.

        At the start of the backward pass all activations are alive; at the end of its layers all their gradients are,
        and the activations of one layer; then, under fsdp, the root's gradients are scattered; then comes the update.
        """
        rank, most = self.rank, trace.most
        kept_at_start = rank.gradients if self.setting.grad_accum > 1 else rank.one_layer or self._largest_gradient
        start = {kind: most.get(kind, 0) for kind in ("activations", "logits", "scratch")}
        update = {**start, "activations": 0, "logits": 0}
        end = {**update, "activations": start["activations"] // (self.question.model.layers or 1)}
        weights = rank.weights + self.question.model.buffer_bytes
        all_weights, whole = weights + rank.gathered + rank.root, rank.scattered + rank.root_gradients
        moments = [
            ("backward", start, all_weights, min(kept_at_start, rank.gradients) + whole),
            ("backward", end, all_weights, self._gradients_of_layers + whole),
            ("backward", update, weights, rank.gradients + rank.root_gradients + rank.root_scattered),
            ("update", update, weights, rank.gradients),
        ]
        found = [(phase, {**of, "weights": w, "gradients": g, "state": rank.state}) for phase, of, w, g in moments]
        phase, peak = max(found, key=lambda moment: sum(moment[1].values()))
        return {kind: peak[kind] for kind in KINDS}, phase

    @property
    def _gradients_of_layers(self) -> int:
        """Bytes of gradients on this device when all layers have theirs, while the root's are still whole."""
        fused = self.setting.fused_backward and self.setting.grad_accum == 1
        return self.rank.one_layer if fused and self.rank.one_layer else self.rank.gradients - self.rank.one_root

    @property
    def _largest_gradient(self) -> int:
        return max((param.nbytes for param in self.question.model.parameters if param.trainable), default=0)

    def notes(self) -> Iterable[str]:
        """Yield what a reader of the figures should know."""
        if self.setting.fused_backward and self.setting.grad_accum > 1:
            yield "gradients of several micro-batches are kept until the last: fusing saves no gradients"
        if self.setting.fused_backward and self.setting.clip == "norm":
            yield "clipping by the global norm takes a second backward pass, and the first keeps its graph"
        if self.setting.fused_backward and self.question.world_size > 1 and self.question.shard == "none":
            yield "fused updates on several devices: under FSDP2's replicate; DistributedDataParallel is refused"
        scratch = max((param.scratch_bytes for param in self.plan), default=0)
        if scratch:
            yield f"an update takes up to {scratch / 2**30:.3g} GiB of temporaries, says the plan"
        if self.optimizer.recipe.rules:
            yield from self._declared()
        yield from self.rank.notes

    def _declared(self) -> Iterable[str]:
        """Yield how much a recipe that asks for roles keeps where they are declared."""
        build = self.question.model.build
        if build is None:
            return
        try:
            with FakeTensorMode(), default_dtype(getattr(torch, self.setting.dtype)):
                nbytes = self.build(declare_roles(build(BuildOptions()))).plan().nbytes
        except ValueError:  # a model whose roles cannot be told, or that cannot be built: a trace will say so
            return
        if abs(nbytes - self.plan.nbytes) > 0.01 * nbytes:
            yield f"with optstate.declare_roles(model) its state is {nbytes / 2**30:.3g} GiB"


def _parameters_on_meta(model: Model) -> list[tuple[str, nn.Parameter]]:
    """Return named parameters of the model's shapes and dtypes, without memory."""
    made = []
    for param in model.parameters:
        tensor = torch.empty(param.shape, dtype=getattr(torch, param.dtype), device="meta")
        made.append((param.name, nn.Parameter(tensor, requires_grad=param.trainable)))
    return made
