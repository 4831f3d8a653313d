"""What the tests of other people's trainers share: a tiny Llama, real text, and the loop a trainer should equal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import optstate
from tests.support.paths import ROOT

LENGTH = 24
Batch = dict[str, Tensor]


QUIET: dict[str, Any] = {
    "max_grad_norm": 0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
"""Arguments of transformers' trainers: every loss is logged, nothing is clipped, saved, reported or drawn."""


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its settings for the whole process: each test begins without those of the last."""
    yield
    forget_accelerate()


def forget_accelerate() -> None:
    """Make accelerate look at its surroundings anew."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def tiny_llama(dtype: torch.dtype = torch.float32, tied: bool = False) -> LlamaForCausalLM:
    """12 thousand parameters over bytes; embedding, attention, gated feed-forward and norms, head untied or tied."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=256, max_position_embeddings=64, tie_word_embeddings=tied, **sizes)
    return LlamaForCausalLM(config).to(dtype)


def windows(count: int) -> list[Batch]:
    """Neighbouring stretches of a text that does not change."""
    text = (ROOT / "tests/data/text.md").read_bytes()[: count * LENGTH]
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().view(count, LENGTH)
    return [{"input_ids": row, "labels": row} for row in ids]


def stacked(items: Iterable[Batch]) -> Batch:
    """A batch of windows."""
    items = list(items)
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


class Recording:
    """A collator that keeps the batches, in the order in which Trainer drew them."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def __call__(self, items: list[Batch]) -> Batch:
        self.batches.append(stacked(items))
        return self.batches[-1]


def batches(count: int, size: int = 2) -> list[Batch]:
    """The windows in order, as an unshuffled loader gives them."""
    rows = iter(windows(count * size))
    return [stacked(islice(rows, size)) for _ in range(count)]


def by_hand(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: list[Batch],
    lr_of_step: Callable[[int], float] | None = None,
    accumulation: int = 1,
    clip: float | None = None,
) -> list[float]:
    """The plain loop, stepped: what every trainer here is compared with."""
    losses = []
    model.train()
    for step in range(len(data) // accumulation):
        for group in optimizer.param_groups:
            group["lr"] = lr_of_step(step) if lr_of_step else group["lr"]
        for batch in data[step * accumulation : (step + 1) * accumulation]:
            loss = model(**batch).loss
            (loss / accumulation).backward()
            losses.append(loss.item())
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return losses


@torch.no_grad()
def loss_over(model: nn.Module, data: list[Batch]) -> float:
    """The mean loss of these batches: to see that a run has learnt from them."""
    return sum(model(**batch).loss.item() for batch in data) / len(data)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_close(model: nn.Module, other: nn.Module, atol: float = 1e-6) -> None:
    """Weights of two runs. Some differ in the order of sums, so 1e-6 of weights that are about 0.02 to 1."""
    mine, theirs = weights_of(model), weights_of(other)
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def assert_equal(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Weights of two runs, to the bit."""
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def fuse_if(fused: bool, optimizer: optstate.Optimizer, clip: float | None = None) -> Any:
    """Fuse, or leave it stepped."""
    return optstate.fuse_backward(optimizer, clip_grad_norm=clip) if fused else None


def as_on_a_gpu_in_fp16(accelerator: Any) -> None:
    """What `mixed_precision="fp16"` makes of an Accelerator; accelerate does not offer it on a CPU."""
    accelerator.scaler = torch.amp.GradScaler("cpu")


def as_on_gpus() -> None:
    """Make accelerate shard on CPUs, too. FSDP2 works there, but accelerate ignores an FSDP plugin unless it counts the
    processes as those of GPUs; tensors and sums stay on the CPU."""
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
