"""Files of other libraries' optimizers, made by them, and the numbers in them read without any of our readers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.document import Parameter, SlotRecord
from optstate.checkpoint.document.document_json import from_json, to_json
from optstate.checkpoint.files.tensor_place import Stored
from optstate.checkpoint.open_checkpoint import open_checkpoint

DTYPES = {
    "F32": torch.float32,
    "F64": torch.float64,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
}


class Tiny(nn.Module):
    """Matrices large enough for low-bit moments, and vectors that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 64)
        self.fc1 = nn.Linear(64, 80)
        self.norm = nn.LayerNorm(80)
        self.fc2 = nn.Linear(80, 96, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc2(self.norm(torch.relu(self.fc1(self.embed(ids)))))

    def groups(self, **more: Any) -> list[dict[str, Any]]:
        """As transformers' Trainer makes them: what decays comes first, so ids are not in the module's order."""
        decay = [self.embed.weight, self.fc1.weight, self.fc2.weight]
        others = [self.fc1.bias, self.norm.weight, self.norm.bias]
        return [{"params": decay, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def train(model: Any, optimizer: Any, steps: int = 3) -> Any:
    for step in range(steps):
        ids = torch.randint(0, 90, (8,), generator=torch.Generator().manual_seed(step))
        F.cross_entropy(model(ids), ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def trained(build: Callable[[Tiny], Any], dtype: torch.dtype = torch.float32, steps: int = 3) -> Any:
    torch.manual_seed(0)
    model = Tiny().to(dtype)
    return train(model, build(model), steps)


def saved(tree: Any, folder: Path, name: str = "optimizer.pt") -> Path:
    path = folder / name
    torch.save(tree, path)
    return path


def read(tree: Any, folder: Path, **options: Any) -> Checkpoint:
    return open_checkpoint(saved(tree, folder), **options)


def tensor(stored: Stored) -> Tensor:
    """The numbers in the file, without any of our readers."""
    dtype = DTYPES[stored.dtype]
    if not stored.elements:
        return torch.empty(stored.shape, dtype=dtype)
    with open(stored.path, "rb") as file:
        file.seek(stored.start)
        flat = torch.frombuffer(bytearray(file.read(stored.span)), dtype=dtype)
    return flat.view(stored.shape) if stored.stride is None else flat.as_strided(stored.shape, stored.stride)


def fields(checkpoint: Checkpoint, slot: SlotRecord) -> dict[str, Tensor]:
    return {name: tensor(stored) for name, stored in checkpoint.fields_of(slot).items()}


def param(checkpoint: Checkpoint, place: int) -> Parameter:
    return checkpoint.document.parameters[place]


def decoded(checkpoint: Checkpoint, slot: SlotRecord) -> Tensor:
    """Values of 8-bit codes by the map in the document, in bitsandbytes' own order of operations."""
    parts = fields(checkpoint, slot)
    values = torch.tensor(checkpoint.document.codebooks[slot.codebook])[parts["codes"].long()]
    scales = parts["absmax"].repeat_interleave(slot.block)[: values.numel()]
    return (values.flatten() * scales).view(values.shape)


def identical(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def check_document(checkpoint: Checkpoint) -> None:
    """It can be written and read again, and every tensor of it is there."""
    assert from_json(to_json(checkpoint.document)) == checkpoint.document
    keys = [key for parameter in checkpoint.document.parameters for key in parameter.keys]
    assert sorted(keys) == sorted(checkpoint.tensors)


def adamw() -> Any:
    return trained(lambda m: torch.optim.AdamW(m.groups())).state_dict()
