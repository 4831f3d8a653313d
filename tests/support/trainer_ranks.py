"""What each of two processes runs for `test_trainer_fsdp2`: other people's trainers with FSDP2, beside a plain loop.

The plain loop has the whole model, and takes the batches of both processes one after the other, so that gradients are
added up alike. The optimizer is built before the model is sharded where the trainer shards it.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

import optstate
from adalomo import AdaLomo, Lomo
from optstate.recipes import AdamW, AdamW8bit
from optstate.weights import Split
from tests.support.ranks import distance, distance_of_state, whole
from tests.support.trainer_runs import (
    QUIET,
    Batch,
    Recording,
    as_on_gpus,
    batches,
    by_hand,
    forget_accelerate,
    fuse_if,
    tiny_llama,
    windows,
)
from tests.support.trainer_words import CLIP, FUSED_AFTER, FUSED_BEFORE, SIZE, STEPPED, STEPS, WORLD

RECIPES: dict[str, tuple[type[optstate.Optimizer], dict[str, Any]]] = {
    "adalomo": (AdaLomo, {"lr": 2e-2}),
    "lomo": (Lomo, {"lr": 0.3}),
    "adamw": (AdamW, {"lr": 1e-3}),
    "adamw8bit": (AdamW8bit, {"lr": 1e-3}),
}


def make(recipe: str, model: nn.Module, **more: Any) -> optstate.Optimizer:
    kind, settings = RECIPES[recipe]
    return kind(model.named_parameters(), **settings, **more)


def mine(data: list[Any]) -> list[Any]:
    """The part of this process: every other item."""
    return data[dist.get_rank() :: WORLD]


def of_all(mine: list[Batch]) -> list[Batch]:
    """The batches of both processes, in turn."""
    found: list[Any] = [None] * WORLD
    dist.all_gather_object(found, mine)
    return [batch for pair in zip(*found, strict=True) for batch in pair]


def gradients_of(model: nn.Module) -> int:
    return sum(p.grad is not None for p in model.parameters())


def same_weights(model: nn.Module, other: nn.Module) -> bool:
    """To the bit."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return all(torch.equal(whole(a.detach()), whole(b.detach())) for a, b in pairs)


def same_state(optimizer: optstate.Optimizer, other: optstate.Optimizer) -> bool:
    """To the bit."""
    same = []
    for mine, theirs in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert list(mine) == list(theirs)
        for key, value in mine.items():  # in an order that is the same in all processes, as they gather the parts
            tensor = isinstance(value, Tensor)
            same.append(torch.equal(whole(value), whole(theirs[key])) if tensor else value == theirs[key])
    return all(same)


def by_hand_once(model: nn.Module, optimizer: torch.optim.Optimizer, data: list[Batch], **how: Any) -> None:
    """Make the plain run on rank 0 alone, whose results are looked at; distances on the other rank mean nothing."""
    if dist.get_rank() == 0:
        by_hand(model, optimizer, data, **how)


# --- accelerate ------------------------------------------------------------------------------------------------------


def accelerator(accumulation: int = 1, mixed_precision: str | None = None, **plugin: Any) -> Accelerator:
    """One that shards each layer with FSDP2."""
    forget_accelerate()
    as_on_gpus()
    settings = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", **plugin)
    made = Accelerator(fsdp_plugin=settings, gradient_accumulation_steps=accumulation, mixed_precision=mixed_precision)
    assert made.is_fsdp2
    return made


class Loop:
    """accelerate's loop around a model that `prepare` shards after `unsharded` steps, beside the same model whole."""

    def __init__(
        self,
        recipe: str,
        when: str = STEPPED,
        unsharded: int = 0,
        dtype: torch.dtype = torch.float32,
        tied: bool = False,
        clip: float | None = None,
        more: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self.model, self.plain = tiny_llama(dtype, tied), tiny_llama(dtype, tied)
        self.optimizer, self.other = (make(recipe, model, **(more or {})) for model in (self.model, self.plain))
        if unsharded:
            by_hand(self.model, self.optimizer, batches(unsharded))
            by_hand(self.plain, self.other, batches(unsharded))
        if when == FUSED_BEFORE:
            optstate.fuse_backward(self.optimizer, clip_grad_norm=clip)
        self.accelerator = accelerator(**settings)
        self.model, self.wrapped = self.accelerator.prepare(self.model, self.optimizer)
        if when == FUSED_AFTER:
            optstate.fuse_backward(self.optimizer, clip_grad_norm=clip)
        self.losses: list[float] = []
        self.gradients_left: list[int] = []

    def train(
        self,
        data: list[Batch],
        kept: Callable[[], bool] = lambda: False,
        measured: bool = False,
        clip: float | None = None,
    ) -> None:
        """kept: whether a fused backward is to keep gradients. measured: their norm comes first. clip: by accelerate's
        own call."""
        for batch in mine(data):
            with self.accelerator.accumulate(self.model):
                loss = self.model(**batch).loss
                if measured:
                    self.optimizer.fused.grad_norm(loss)
                with self.optimizer.fused.accumulate() if kept() else nullcontext():
                    self.accelerator.backward(loss)
                self.gradients_left.append(gradients_of(self.model))
                if clip is not None:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), clip)
                self.wrapped.step()
                self.wrapped.zero_grad()
            self.losses.append(loss.item())

    def distances(self) -> tuple[float, float]:
        """How far weights and statistics are from those of the whole model."""
        return distance(self.model, self.plain), distance_of_state(self.optimizer, self.other)


def accelerated(recipe: str, when: str, unsharded: int = 0, **settings: Any) -> tuple[float, float, list[int]]:
    loop, data = Loop(recipe, when, unsharded, **settings), batches(WORLD * STEPS, SIZE)
    loop.train(data)
    by_hand_once(loop.plain, loop.other, data, accumulation=WORLD)
    return *loop.distances(), loop.gradients_left


def accelerated_ram_efficient(when: str) -> tuple[float, float, list[int]]:
    """The model goes through the meta device, and the weights of rank 0 to all."""
    return accelerated("adalomo", when, cpu_ram_efficient_loading=True)


def accelerated_checkpointed(when: str) -> tuple[float, float, list[int]]:
    """accelerate wraps the layers, and their parameters have other names."""
    return accelerated("adalomo", when, activation_checkpointing=True)


def accelerated_tied(when: str) -> tuple[float, float, list[int]]:
    return accelerated("adalomo", when, tied=True)


def accelerated_accumulating(when: str, told: bool) -> tuple[float, float]:
    """Two micro-batches a step; `told`: the first under `fused.accumulate()`, as on one device."""
    loop, data = Loop("lomo", when, accumulation=2), batches(WORLD * 2 * STEPS, SIZE)
    loop.train(data, kept=lambda: told and not loop.accelerator.sync_gradients)
    by_hand_once(loop.plain, loop.other, data, accumulation=2 * WORLD)
    return loop.distances()


def accelerated_clipping(how: str) -> tuple[float, float]:
    """How far from the plain loop that clips by the norm, and from the one that does not. `how`: by accelerate's own
    call, by the norm of gradients that a fused backward keeps, or by the norm measured beforehand."""
    when, own = (STEPPED, None) if how == "called" else (FUSED_AFTER, CLIP)
    loop, data = Loop("lomo", when, clip=own), batches(WORLD * STEPS, SIZE)
    loop.train(data, kept=lambda: how == "kept", measured=how == "measured", clip=CLIP if how == "called" else None)
    unclipped = tiny_llama()
    by_hand_once(unclipped, make("lomo", unclipped), data, accumulation=WORLD)
    by_hand_once(loop.plain, loop.other, data, accumulation=WORLD, clip=CLIP)
    return distance(loop.model, loop.plain), distance(loop.model, unclipped)


def accelerated_bare_clip() -> float:
    """The norm that accelerate's call finds after a fused backward."""
    loop = Loop("lomo", FUSED_AFTER)
    loop.accelerator.backward(loop.model(**mine(batches(WORLD))[0]).loss)
    norm = loop.accelerator.clip_grad_norm_(loop.model.parameters(), CLIP)
    loop.wrapped.step()
    return whole(norm).item()


def accelerated_resumed(recipe: str, when: str, kind: str, dtype: torch.dtype, folder: Path) -> tuple[bool, bool, bool]:
    """Whether losses, weights and state of a run that went on from a checkpoint are those of one that never stopped."""
    data, half = batches(WORLD * STEPS, SIZE), WORLD * STEPS // 2
    first = Loop(recipe, when, state_dict_type=kind, dtype=dtype)
    first.train(data[:half])
    first.accelerator.save_state(folder)
    first.train(data[half:])
    second = Loop(recipe, when, state_dict_type=kind, dtype=dtype)
    second.accelerator.load_state(folder)
    second.train(data[half:])
    return (
        second.losses == first.losses[half // WORLD :],
        same_weights(first.model, second.model),
        same_state(first.optimizer, second.optimizer),
    )


def accelerated_in_bf16() -> tuple[set[str], float]:
    """A bf16 model with mixed precision, for which accelerate makes the weights fp32: how they are written, and how far
    the loss ends from that of training in fp32."""
    loop, data = Loop("adalomo", FUSED_AFTER, dtype=torch.bfloat16, mixed_precision="bf16"), batches(WORLD * STEPS)
    loop.train(data)
    loop.plain.float()
    other = make("adalomo", loop.plain)
    losses = by_hand(loop.plain, other, data, accumulation=WORLD)
    return {str(param.weights) for param in loop.optimizer.plan()}, abs(loop.losses[-1] - mine(losses)[-1])


def accelerated_too_late() -> tuple[str, int]:
    """Steps in bf16 with more bits beside the weights, which accelerate then makes fp32: these bits would be lost."""
    loop = Loop("adamw", unsharded=2, dtype=torch.bfloat16, mixed_precision="bf16", more={"weights": Split(16)})
    try:
        loop.optimizer.train()
    except RuntimeError as error:
        return str(error), len(loop.optimizer.state)
    return "nothing", 0


def accelerated_whole_parameters_alive(when: str) -> int:
    """How many unsharded parameters live on when trainers call `train` after `prepare`."""
    model = tiny_llama()
    refs = [weakref.ref(p) for p in model.parameters()]
    optimizer = AdaLomo(model.named_parameters(), fused_backward=when == FUSED_BEFORE)
    _, wrapped = accelerator().prepare(model, optimizer)
    wrapped.train()
    gc.collect()
    return sum(ref() is not None for ref in refs)


def accelerated_from_the_first_gradient() -> list[int]:
    """Fused before `prepare`, with the call of `train`: gradients left."""
    loop = Loop("adalomo", FUSED_BEFORE)
    loop.wrapped.train()
    loop.train(batches(WORLD * 2))
    return loop.gradients_left


# --- transformers ----------------------------------------------------------------------------------------------------


class Counting(TrainerCallback):
    """Counts the gradients that are alive when Trainer is about to step."""

    def __init__(self) -> None:
        self.gradients_left: list[int] = []

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.gradients_left.append(gradients_of(model))


class Built(Trainer):
    """With an optimizer of one's own: Trainer refuses `optimizers=` under FSDP, and says to override this."""

    def __init__(self, *args: Any, built: optstate.Optimizer, **given: Any) -> None:
        super().__init__(*args, **given)
        self.built = built

    def create_optimizer(self, *_: Any) -> optstate.Optimizer:
        self.optimizer = self.built
        return self.optimizer


class Measuring(Built):
    """The norm is measured where the loss is known."""

    def compute_loss(self, *args: Any, **given: Any) -> Tensor:
        loss = super().compute_loss(*args, **given)
        self.built.fused.grad_norm(loss)
        return loss


def arguments(folder: Path, state_dict_type: str = "FULL_STATE_DICT", **changes: Any) -> TrainingArguments:
    values = {
        **QUIET,
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": SIZE,
        "lr_scheduler_type": "constant",
        "fsdp": True,
        "fsdp_config": {"version": 2, "state_dict_type": state_dict_type},
    }
    made = TrainingArguments(**{**values, **changes})
    as_on_gpus()
    return made


def hf(
    recipe: str,
    own: bool,
    fused: bool,
    args: TrainingArguments,
    dtype: torch.dtype = torch.float32,
    clip: float | None = None,
) -> tuple[Trainer, Recording, Counting]:
    """A Trainer with an optimizer of one's own, or with a class and its arguments. clip: by a fused backward."""
    model, seen, counting = tiny_llama(dtype), Recording(), Counting()
    count = WORLD * STEPS * SIZE * args.gradient_accumulation_steps
    given = {"train_dataset": windows(count), "data_collator": seen, "callbacks": [counting]}
    if own:
        built = make(recipe, model)
        fuse_if(fused, built, clip)
        trainer: Trainer = (Measuring if clip else Built)(model, args, built=built, **given)
    else:
        kind, settings = RECIPES[recipe]
        described = (kind, {**settings, "fused_backward": True} if fused else settings)
        trainer = Trainer(model, args, optimizer_cls_and_kwargs=described, **given)
    assert trainer.accelerator.is_fsdp2
    return trainer, seen, counting


def hf_trained(
    recipe: str, own: bool, fused: bool, accumulation: int, clip: float, folder: Path
) -> tuple[float, list[int]]:
    """How far weights end from the plain loop's, and the gradients alive before each step."""
    args = arguments(folder, gradient_accumulation_steps=accumulation, max_grad_norm=clip)
    trainer, seen, counting = hf(recipe, own, fused, args, clip=clip if fused and clip else None)
    trainer.train()
    plain = tiny_llama()
    data = of_all(seen.batches[: STEPS * accumulation])
    by_hand_once(plain, make(recipe, plain), data, accumulation=WORLD * accumulation, clip=clip or None)
    return distance(trainer.model, plain), counting.gradients_left


def hf_refused(folder: Path) -> tuple[str, bool]:
    """What is said about Trainer's norm clip when fused, and whether the weights stay as they were."""
    trainer, _, _ = hf("lomo", False, True, arguments(folder, max_grad_norm=CLIP))
    try:
        trainer.train()
    except RuntimeError as error:
        return str(error), same_weights(trainer.model, tiny_llama())
    return "nothing", False


def hf_handed_over(folder: Path) -> str:
    """What Trainer itself says to `optimizers=` under FSDP."""
    model = tiny_llama()
    try:
        Trainer(model, arguments(folder), optimizers=(make("adalomo", model), None))
    except RuntimeError as error:
        return str(error)
    return "nothing"


def hf_resumed(recipe: str, fused: bool, kind: str, dtype: torch.dtype, folder: Path) -> tuple[bool, bool, bool]:
    """As `accelerated_resumed`, with Trainer's own checkpoint."""

    def build() -> Trainer:
        args = arguments(folder, kind, save_strategy="steps", save_steps=STEPS // 2)
        return hf(recipe, True, fused, args, dtype)[0]

    first, second = build(), build()
    first.train()
    second.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS // 2}"))
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (first, second)]
    return (
        losses[0] == losses[1] and len(losses[0]) == STEPS,
        same_weights(first.model, second.model),
        same_state(first.built, second.built),
    )


# --- Lightning -------------------------------------------------------------------------------------------------------


class Module(lightning.LightningModule):
    """A Llama that Lightning's strategy asks to shard itself before the optimizer is built."""

    def __init__(self, recipe: str, fused: bool, dtype: torch.dtype = torch.float32, clip: float | None = None) -> None:
        super().__init__()
        self.clip = clip
        self.model = tiny_llama(dtype)
        self.recipe, self.is_fused = recipe, fused
        self.batches: list[Batch] = []
        self.losses: list[float] = []
        self.gradients_left: list[int] = []

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def configure_optimizers(self) -> optstate.Optimizer:
        optimizer = make(self.recipe, self.model)
        self.handle = fuse_if(self.is_fused, optimizer, self.clip)
        return optimizer

    def training_step(self, batch: Batch) -> Tensor:
        loss = self.model(**batch).loss
        self.batches.append(batch)
        self.losses.append(loss.item())
        if self.clip:
            self.handle.grad_norm(loss)
        return loss

    def on_before_optimizer_step(self, _: Any) -> None:
        self.gradients_left.append(gradients_of(self.model))


def fit(module: Module, count: int = STEPS, ckpt: Path | None = None, **settings: Any) -> lightning.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    strategy = ModelParallelStrategy(
        data_parallel_size=WORLD,
        tensor_parallel_size=1,
        save_distributed_checkpoint=settings.pop("distributed_checkpoint", True),
    )
    trainer = lightning.Trainer(
        **quiet,
        devices=WORLD,
        strategy=strategy,
        plugins=[TorchElasticEnvironment()],
        **{"max_epochs": 1, "enable_checkpointing": False, **settings},
    )
    trainer.fit(module, DataLoader(windows(WORLD * count * SIZE), batch_size=SIZE), ckpt_path=ckpt)
    return trainer


def lightning_trained(recipe: str, fused: bool, accumulation: int, clip: float | None) -> tuple[float, list[int]]:
    """As `hf_trained`, under `ModelParallelStrategy`."""
    module, plain = Module(recipe, fused, clip=clip if fused else None), tiny_llama()
    own = None if fused else clip
    fit(module, STEPS * accumulation, accumulate_grad_batches=accumulation, gradient_clip_val=own)
    by_hand_once(plain, make(recipe, plain), of_all(module.batches), accumulation=WORLD * accumulation, clip=clip)
    return distance(module.model, plain), module.gradients_left


def lightning_refused(accumulation: int, clip: float | None) -> tuple[str, bool]:
    """As `hf_refused`."""
    module = Module("lomo", True)
    try:
        fit(module, accumulate_grad_batches=accumulation, gradient_clip_val=clip)
    except RuntimeError as error:
        return str(error), same_weights(module.model, tiny_llama())
    return "nothing", False


def lightning_resumed(
    recipe: str, fused: bool, distributed: bool, dtype: torch.dtype, folder: Path
) -> tuple[bool, bool, bool]:
    """As `accelerated_resumed`, with Lightning's own checkpoint after the first of two epochs."""
    first, second = Module(recipe, fused, dtype), Module(recipe, fused, dtype)
    trainers = []
    for module, ckpt, place in ((first, None, "first"), (second, folder / "first" / "epoch=0.ckpt", "second")):
        keep = ModelCheckpoint(folder / place, "{epoch}", save_top_k=-1)
        more = {"max_epochs": 2, "enable_checkpointing": True, "callbacks": [keep]}
        trainers.append(fit(module, ckpt=ckpt, distributed_checkpoint=distributed, **more))
    return (
        second.losses == first.losses[STEPS:] and len(second.losses) == STEPS,
        same_weights(first.model, second.model),
        same_state(trainers[0].optimizers[0], trainers[1].optimizers[0]),
    )
