"""One training run of the small language model: settings, steps, checkpoints, and a measurement of its memory."""

from __future__ import annotations

import math
import os
import pickle
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from corpus import Corpus, UsageError
from gpt import GPT
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import optstate
from optstate.memory import peak_extra_bytes

__all__ = ["OPTIONS", "Memory", "Run", "Settings", "measure_memory", "options_of", "train"]

ADAM, LION, SGD = {"lr": 2e-3, "betas": (0.9, 0.95)}, {"lr": 3e-4}, {"lr": 0.03, "momentum": 0.9}

OPTIONS: dict[str, dict[str, Any]] = {
    "adalomo": {"lr": 5e-2},
    "adafactor": {"lr": 5e-2},
    **dict.fromkeys(("adamw", "adamw8bit", "adamw4bit", "adamfactor", "adammini"), ADAM),
    **dict.fromkeys(("lion", "lion8bit"), LION),
    "lomo": {"lr": 0.1},
    **dict.fromkeys(("sgd", "sgdm8bit"), SGD),
}
"""Keyword arguments of each recipe; a recipe that is not listed runs with its own defaults.

The learning rates come from a small search with this model, seed 0, by validation loss. After 800 steps adalomo with
0.03, 0.05, 0.08 had 2.045, 1.971, 2.053, and adamw with 0.001, 0.002, 0.004 had 1.980, 1.940, 1.956. After 200 steps
lomo with 0.1, 0.3 had 2.60, 3.13 (1.0 diverged), sgd with 0.03, 0.1, 0.3 had 2.82, 2.84, 3.12, and lion with 0.0003,
0.001, 0.002 had 2.62, 2.98, 2.79. adafactor with a learning rate is adalomo's rule. A recipe that compresses another's
state takes the other's rate. The betas are those customary for language models, not searched.
"""

FUSED_BY_DEFAULT = {"adalomo", "lomo"}
VALIDATION_WINDOWS = 128
WARMUP_SHARE = 0.1
FINAL_LR_SHARE = 0.1
PROBE = (1, 8)
"""Sequences, and bytes in each, of the batch that memory is measured with: its activations take next to nothing."""


@dataclass(frozen=True)
class Settings:
    """The settings that define a run; None for `lr` or `fused_backward` is what suits the recipe."""

    recipe: str = "adalomo"
    lr: float | None = None
    fused_backward: bool | None = None
    steps: int = 800
    batch: int = 8
    dtype: str = "float32"
    seed: int = 0

    @property
    def fused(self) -> bool:
        """Whether the update happens inside the backward pass."""
        return self.recipe in FUSED_BY_DEFAULT if self.fused_backward is None else self.fused_backward

    @property
    def label(self) -> str:
        """The name of the run in tables and progress bars."""
        return f"{self.recipe}, {'fused' if self.fused else 'stepped'}"


def options_of(settings: Settings) -> dict[str, Any]:
    """Return the keyword arguments of a run's recipe."""
    options = dict(OPTIONS.get(settings.recipe, {}))
    return options if settings.lr is None else {**options, "lr": settings.lr}


def build_optimizer(model: GPT, settings: Settings) -> optstate.Optimizer:
    """Build the recipe's optimizer over the model's parameters, fused into the backward pass if the settings say so.

    Raises:
        UsageError: if the recipe is unknown or refuses its arguments.
    """
    try:
        optimizer = optstate.recipes.get(settings.recipe)(model.named_parameters(), **options_of(settings))
    except (LookupError, TypeError, ValueError) as error:
        raise UsageError(str(error)) from None
    if settings.fused:
        optstate.fuse_backward(optimizer)
    return optimizer


Build = Callable[[GPT, Settings], optstate.Optimizer]
"""A function that makes the optimizer of a run."""


def lr_factor(steps: int) -> Callable[[int], float]:
    """Return a factor on the learning rate by step: linear warmup, then a cosine down to a tenth."""
    warmup = max(1, round(steps * WARMUP_SHARE))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * (1 + math.cos(math.pi * progress)) / 2

    return factor


@dataclass
class Run:
    """A training run: model, optimizer, schedule and position. Everything follows from corpus, settings and build."""

    corpus: Corpus
    settings: Settings
    step: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    build: Build = build_optimizer

    def __post_init__(self) -> None:
        torch.manual_seed(self.settings.seed)
        self.model = GPT().to(getattr(torch, self.settings.dtype))
        self.optimizer = self.build(self.model, self.settings)
        self.scheduler = LambdaLR(self.optimizer, lr_factor(self.settings.steps))

    @property
    def context(self) -> int:
        """Bytes the model sees at once."""
        return self.model.config.context

    def update(self, inputs: Tensor, targets: Tensor) -> float:
        """Train on one batch and return its loss; these four lines are the same stepped and fused."""
        loss = self.model.loss(inputs, targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def advance(self) -> None:
        """Take the next step of the run."""
        batch = self.corpus.batch(self.step, self.settings.batch, self.context, self.settings.seed)
        start = time.perf_counter()
        self.losses.append(self.update(*batch))
        self.scheduler.step()
        self.seconds.append(time.perf_counter() - start)
        self.step += 1

    @torch.no_grad()
    def validate(self, windows: int = VALIDATION_WINDOWS) -> float:
        """Return the loss in nats per byte over `windows` windows of the validation text."""
        inputs, targets = self.corpus.validation(windows, self.context)
        parts = zip(inputs.split(16), targets.split(16), strict=True)
        return sum(self.model.loss(x, y).item() * len(x) for x, y in parts) / len(inputs)

    @property
    def step_seconds(self) -> float | None:
        """Median time of the steps this process took: forward, backward and update."""
        return statistics.median(self.seconds) if self.seconds else None

    # --- checkpoints ------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """Return the settings that a checkpoint must share with this run to continue in it, as numbers and strings."""
        known = asdict(self.settings)
        kept = {key: known[key] for key in ("recipe", "batch", "dtype", "seed")}
        return {**kept, "lr": options_of(self.settings).get("lr"), "corpus": self.corpus.fingerprint[:12]}

    def save(self, path: Path) -> None:
        """Write everything a later process needs; the file appears whole or not at all."""
        state = {
            "identity": self.identity(),
            "step": self.step,
            "steps": self.settings.steps,
            "losses": self.losses,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def load(self, path: Path) -> int:
        """Continue where a saved run stopped. It may have been stepped and this one fused, or the reverse.

        Returns:
            How many steps the saved run was to take. If this one takes another number, the learning rate follows
            another curve from here on.

        Raises:
            UsageError: if the file is not a checkpoint, or belongs to another run.
        """
        state = _read_checkpoint(path)
        for key, own in self.identity().items():
            saved = state["identity"].get(key)
            if saved != own:
                raise UsageError(
                    f"{path} was saved with {key} {saved}, this run has {key} {own}: give the same options"
                )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.step, self.losses = state["step"], list(state["losses"])
        return int(state["steps"])


def _read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, weights_only=True)
    except OSError as error:
        raise UsageError(f"cannot read the checkpoint {path}: {error.strerror}") from None
    except (RuntimeError, EOFError, pickle.UnpicklingError):
        raise UsageError(f"{path} is not a checkpoint of this script") from None
    if not isinstance(state, dict) or "identity" not in state:
        raise UsageError(f"{path} is not a checkpoint of this script")
    return state


# --- training with something to look at ---------------------------------------------------------------------------


def train(
    run: Run, until: int, console: Console, save_at: tuple[int, Path] | None = None, label: str | None = None
) -> None:
    """Advance to step `until`, showing loss and speed; write one checkpoint on the way if asked."""
    with _display(run, label or run.settings.label, console) as show:
        while run.step < until:
            run.advance()
            show()
            if save_at is not None and run.step == save_at[0]:
                run.save(save_at[1])


@contextmanager
def _display(run: Run, label: str, console: Console) -> Iterator[Callable[[], None]]:
    """Show a progress bar on a terminal, about ten plain lines elsewhere."""
    total = run.settings.steps
    if not console.is_terminal:
        every = max(1, total // 10)
        yield lambda: print(_line(run, label), flush=True) if run.step % every == 0 or run.step == total else None
        return
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(f"{label:16}", total=total, completed=run.step, speed="")
        yield lambda: bar.update(task, completed=run.step, speed=_speed(run))


def _speed(run: Run) -> str:
    rate = run.settings.batch * run.context / statistics.fmean(run.seconds[-20:])
    return f"loss {statistics.fmean(run.losses[-20:]):.3f}  {rate:,.0f} tokens/s"


def _line(run: Run, label: str) -> str:
    return f"{label:16}  step {run.step:>4} of {run.settings.steps}  {_speed(run)}"


# --- memory -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """The bytes that one training step takes besides weights and activations.

    state: tensors of the optimizer.
    gradients: most gradient bytes alive at one moment.
    backward_and_update: most bytes allocated at one moment between the start of the backward pass and the end of
        the update: gradients, scratch of the update, and what the backward pass itself needs for one parameter.
    """

    state: int
    gradients: int
    backward_and_update: int


def measure_memory(corpus: Corpus, settings: Settings, build: Build = build_optimizer) -> Memory:
    """Measure a twin of a run, so that the run itself is not touched.

    The batch is 8 bytes of text. Gradients, state and scratch have the size of the parameters whatever the batch;
    activations and their gradients grow with it, and here they disappear beside the rest.
    """
    twin = Run(corpus, settings, build=build)
    probe = corpus.batch(0, *PROBE, settings.seed)
    twin.update(*probe)  # the first step may allocate what later ones reuse
    gradients = _peak_gradient_bytes(twin, probe)
    loss = twin.model.loss(*probe)

    def backward_and_update() -> None:
        loss.backward()
        twin.optimizer.step()
        twin.optimizer.zero_grad()

    with _quiet_profiler():
        peak = peak_extra_bytes(backward_and_update)
    return Memory(twin.optimizer.state_nbytes(), gradients, peak)


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Keep what the profiler's C++ code writes to stderr off the screen; Python's exceptions come through."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _peak_gradient_bytes(run: Run, probe: tuple[Tensor, Tensor]) -> int:
    """Return the most bytes of gradients alive at once, counted whenever a gradient reaches a parameter."""
    params = list(run.model.parameters())
    seen = []

    def look(incoming: Tensor) -> None:
        seen.append(incoming.nbytes + sum(p.grad.nbytes for p in params if p.grad is not None))

    handles = [param.register_hook(look) for param in params]
    run.update(*probe)
    for handle in handles:
        handle.remove()
    return max(seen)
