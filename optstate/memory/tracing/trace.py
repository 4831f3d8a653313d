"""Trace a training step of the real module, optimizer and hooks on fake tensors, with the memory at each moment."""

from __future__ import annotations

import gc
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from optstate import kernels
from optstate.memory.model import KINDS, Alive, BuildOptions, Model, Setting, Trace
from optstate.memory.sources.modules import default_dtype
from optstate.memory.tracing.fakes import (
    OnOneDevice,
    converting_modules,
    fake_mode,
    kernels_of_accelerators,
    without_values,
)
from optstate.memory.tracing.position import Position, phase_of
from optstate.memory.tracing.tracker import Timeline, Tracker
from optstate.memory.tracing.transformers_masks import one_sequence_per_row
from optstate.memory.tracing.updates import Known, follow_updates
from optstate.optimizer.fused_backward import FusedBackward, fuse_backward
from optstate.optimizer.optimizer import Optimizer
from optstate.roles import declare_roles

__all__ = ["Seen", "UntraceableError", "choose_largest", "observe", "trace_step"]

LARGEST = 10
"""The number of tensors alive at the peak that a trace lists, of each kind."""

CLIP = 1.0
"""The norm in a run that clips; its value changes no size."""

WRITTEN_OUT = "_safe_softmax"
"""An operator that only `scaled_dot_product_attention` calls, where it has no fused kernel."""

BuildOptimizer = Callable[[Iterable[Any]], Optimizer]


class UntraceableError(ValueError):
    """Raised for a model that cannot be run without values; the message names the operation."""


class NoLossError(TypeError):
    """Raised where a forward pass returns nothing that could be a loss."""


@dataclass(frozen=True)
class Seen:
    """The observation of one step.

    Attributes:
        timeline: the memory at each moment.
        stacks: names of the lists of identical layers.
        notes: as in a `Trace`.
    """

    timeline: Timeline
    stacks: tuple[str, ...]
    notes: tuple[str, ...] = ()


def trace_step(
    model: Model, recipe: BuildOptimizer, setting: Setting, *, layers: int | None = None, device: str = "cuda"
) -> Trace:
    """Run a training step on fake tensors, not the first one, and return the memory it needs; nothing is allocated.

    The step is::

        for batch in batches:                        # setting.grad_accum of them
            loss = model(**batch).loss               # the output itself is not kept
            loss.backward()
        clip_grad_norm_(model.parameters(), ...)     # setting.clip == "norm"
        optimizer.step()
        optimizer.zero_grad()

    With a fused backward all but the last of several backwards run under `fused.accumulate()`; clipping by norm calls
    `fused.grad_norm(loss)` before the backward pass, or with several batches leaves all of them to `optimizer.step()`.

    Args:
        model: what is trained; its `build` and `batch` are called.
        recipe: gets the groups of `optstate.declare_roles(module)` and gives the optimizer, `setting.weights` included.
        setting: how the step is run.
        layers: build only so many of the identical layers.
        device: the type of the device it is for: "cpu" counts exact bytes, others round up to 512; updates go through
            a parameter in parts as large as they are there, and attention keeps what its kernels keep there.
            Whatever it is, tensors are fake ones on the CPU.

    Raises:
        UntraceableError: if the model cannot be built or run without values.
    """
    seen = observe(model, recipe, setting, layers=layers, device=device)
    timeline = seen.timeline
    moments = timeline.moments
    place, moment = max(moments.items(), key=lambda item: item[1].total)
    most = [max(other.most[i] for other in moments.values()) for i in range(len(KINDS))]
    return Trace(
        peak=moment.total,
        at_peak=dict(zip(KINDS, moment.kinds, strict=True)),
        phase=phase_of(place),
        alive=choose_largest(timeline.alive(moment.index)),
        most=dict(zip(KINDS, most, strict=True)),
        notes=seen.notes,
    )


def choose_largest(alive: tuple[Alive, ...]) -> tuple[Alive, ...]:
    """Choose the largest tensors of each kind, together in order of size."""
    of_kind: Counter[str] = Counter()
    chosen = []
    for item in alive:
        of_kind[item.kind] += 1
        if of_kind[item.kind] <= LARGEST:
            chosen.append(item)
    return tuple(chosen)


def observe(
    model: Model,
    recipe: BuildOptimizer,
    setting: Setting,
    *,
    layers: int | None = None,
    device: str = "cuda",
    known: Known | None = None,
) -> Seen:
    """Run a training step on fake tensors as `trace` does, and return the memory at every place of the step.

    Arguments are those of `trace`, and `known`: updates that need not be made again, to which new ones are added.
    """
    if model.build is None or model.batch is None:
        raise UntraceableError(f"{model.name}: only the shapes of its parameters are known, not what it computes")
    options = BuildOptions(layers, setting.attention, setting.checkpointing)
    elsewhere: AbstractContextManager[None] = nullcontext() if device == "cpu" else kernels_of_accelerators()
    with _undisturbed(), fake_mode(), OnOneDevice(), elsewhere, one_sequence_per_row(), kernels.rehearsal(device):
        with _naming_errors(model), converting_modules(), default_dtype(getattr(torch, setting.dtype)):
            module = model.build(options)
        with without_values(module):
            with _naming_errors(model), default_dtype(getattr(torch, setting.dtype)):
                args, kwargs = model.batch(setting.batch_size, setting.seq_len)
            position = Position(module)
            tracker = Tracker(position.where, rounding=1 if device == "cpu" else 512)
            step = _Step(module, recipe, setting, args, kwargs, tracker, position, {} if known is None else known)
            with _naming_errors(model, tracker), position.following(), tracker:
                step.warm_up()
                tracker.restart()
                step.run()
        return Seen(Timeline(tracker.events), _stacks(module, layers or model.layers), tuple(_notes(module, tracker)))


class _Step:
    """The body of the loop that `trace` documents."""

    def __init__(
        self,
        module: nn.Module,
        recipe: BuildOptimizer,
        setting: Setting,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        tracker: Tracker,
        position: Position,
        known: Known,
    ) -> None:
        self.module, self.args, self.kwargs, self.setting = module, args, kwargs, setting
        self.tracker, self.position = tracker, position
        self.optimizer = recipe(declare_roles(module))
        self.fused: FusedBackward | None = None
        if setting.fused_backward:
            self.fused = fuse_backward(self.optimizer, CLIP if setting.clip == "norm" else None)
        follow_updates(self.optimizer, tracker, position, known)
        for name, param in module.named_parameters():
            tracker.seed(param, "weights", name)
            if param.requires_grad:
                self._claim_gradient(name, param)
        for name, buffer in module.named_buffers():
            tracker.seed(buffer, "weights", name)
        for name, param in module.named_parameters():
            for key, value in self.optimizer.state.get(param, {}).items():
                if isinstance(value, Tensor):
                    tracker.seed(value, "state", f"{name} {key}")
        for value in _tensors((args, kwargs)):
            tracker.seed(value, "activations", "input")

    def _claim_gradient(self, name: str, param: Tensor) -> None:
        hook: Any = param.register_hook
        hook(lambda grad: self.tracker.belongs(grad, "gradients", name))

    def warm_up(self) -> None:
        """Make what is there from the first step on, as models do in their first pass. State is there already."""
        self._loss()
        for param, state in self.optimizer.state.items():  # the step that is traced is the dearest one
            state["step"] = self.optimizer.runner.leaf(param).plan.chain.period

    def run(self) -> None:
        """Run one step."""
        count, clips = self.setting.grad_accum, self.setting.clip == "norm"
        self.position.begin_step()
        for number in range(count):
            loss = self._loss() / count if count > 1 else self._loss()
            self._backward(loss, clips, waits=number < count - 1 or (clips and count > 1))
            del loss
        with self.position.during("update"):
            if clips and self.fused is None:
                nn.utils.clip_grad_norm_(self.module.parameters(), CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def _backward(self, loss: Tensor, clips: bool, waits: bool) -> None:
        """Run the backward pass. waits: a fused one adds its gradients up for a later one, or for `step()`."""
        if self.fused is not None and clips and not waits:
            with self.position.during("backward"):
                self.fused.grad_norm(loss)
        accumulating = self.fused.accumulate() if self.fused is not None and waits else nullcontext()
        with self.position.during("backward"), accumulating:
            torch.autograd.backward(loss)
        for name, param in self.module.named_parameters():
            if param.grad is not None:
                self.tracker.belongs(param.grad, "gradients", name)

    def _loss(self) -> Tensor:
        with self.position.during("forward"):
            output = self.module(*self.args, **self.kwargs)
        loss = _loss_in(output)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise NoLossError(f"its forward pass returns {_described(output)}, and no loss: {LOSSES}")
        return loss


LOSSES = "let it return a tensor of one number, a tuple that begins with it, or a dict or an object with it as 'loss'"


def _loss_in(output: Any) -> Any:
    """Return what trainers take for the loss in the output of a model."""
    if isinstance(output, Mapping):
        return output.get("loss")
    if isinstance(output, tuple | list) and output and not hasattr(output, "loss"):
        return output[0]
    return output if isinstance(output, Tensor) else getattr(output, "loss", None)


def _described(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of {' x '.join(map(str, output.shape)) or 'one number'}"
    return "nothing" if output is None else f"a {type(output).__name__}"


@contextmanager
def _naming_errors(model: Model, tracker: Tracker | None = None) -> Iterator[None]:
    """Turn any error of a model's code into an UntraceableError of one line that names the operation."""
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UntraceableError(
            f"{model.name} cannot be traced: {error.func} needs the values of tensors{_in(tracker)}"
        ) from error
    except NoLossError as error:
        raise UntraceableError(f"{model.name} cannot be traced: {error}") from error
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UntraceableError(
            f"{model.name} cannot be traced: {type(error).__name__}{_in(tracker)}: {reason}"
        ) from error


def _in(tracker: Tracker | None) -> str:
    """Return the place of an error, or the operator before it."""
    if tracker is None:
        return " in its construction"
    if tracker.failed_in:
        return f" in {phase_of(tracker.failed_in)}"
    return f" after {tracker.last_operator}" if tracker.last_operator is not None else ""


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep the collector from freeing cycles at moments of its own, and random numbers and warnings as they are."""
    collects = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    finally:
        if collects:
            gc.enable()


def _notes(module: nn.Module, tracker: Tracker) -> Iterator[str]:
    """Yield notes on kernels of an accelerator that may keep something else than was traced."""
    if any(isinstance(part, nn.RNNBase) for part in module.modules()):
        yield "recurrent layers were run step by step: the fused kernels of a GPU keep buffers of their own instead"
    if any(WRITTEN_OUT in storage.what for storage, _ in tracker.events):
        sizes = "batch x heads x length x length"
        yield f"attention is counted as written out, {sizes}: the CPU's fused kernel takes no such shapes, a GPU's may"


def _stacks(module: nn.Module, layers: int | None) -> tuple[str, ...]:
    """Return the lists of as many modules of one class as there are layers."""
    lists = ((name, part) for name, part in module.named_modules() if isinstance(part, nn.ModuleList | nn.Sequential))
    return tuple(name for name, part in lists if len(part) == layers and len({type(layer) for layer in part}) == 1)


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, tuple | list):
        for value in tree:
            yield from _tensors(value)
