"""Small models the tests train."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RecordedModel(nn.Module):
    """The model of the recorded runs: 10 parameters, embedding rows 11 and 12 never used."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(13, 8)
        self.ln1 = nn.LayerNorm(8)
        self.fc1 = nn.Linear(8, 12)
        self.fc2 = nn.Linear(12, 8)
        self.ln2 = nn.LayerNorm(8)
        self.head = nn.Linear(8, 13, bias=False)

    def forward(self, ids: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        h = self.emb(ids)
        x = self.fc2(torch.tanh(self.fc1(self.ln1(h)))) + h
        logits = self.head(self.ln2(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()) * weight


class EveryShape(nn.Module):
    """Parameters of every kind a model can have: 0-d, 1-d, matrix, 3-d experts, conv, empty, frozen, unused."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)

        def make(*shape: int) -> nn.Parameter:
            return nn.Parameter((torch.randn(shape) * 0.5).to(dtype))

        self.scalar = make()
        self.vector = make(6)
        self.matrix = make(5, 6)
        self.experts = make(3, 4, 5)
        self.conv = make(4, 3, 2, 2)
        self.row = make(1, 6)
        self.empty = nn.Parameter(torch.zeros(0, 6, dtype=dtype))
        self.frozen = make(4, 4).requires_grad_(False)
        self.unused = make(3, 3)

    def forward(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        used = [self.scalar, self.vector, self.matrix, self.experts, self.conv, self.row]
        total = torch.zeros((), dtype=torch.float32)
        for param in used:
            target = torch.randn(param.shape, generator=generator)
            total = total + (param.float() - target).square().sum()
        return total + self.empty.sum() + self.frozen.float().sum() * self.scalar.float()


def mlp(dtype: torch.dtype = torch.float32, width: int = 16, seed: int = 0) -> nn.Sequential:
    """Linear, norm, linear: matrices and vectors, all used."""
    torch.manual_seed(seed)
    layers = [nn.Linear(8, width), nn.LayerNorm(width), nn.Tanh(), nn.Linear(width, 4)]
    return nn.Sequential(*layers).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inputs of `mlp` at a step."""
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(1000 + step)).to(dtype)


def loss_of(model: nn.Module, step: int) -> Tensor:
    """A loss of `mlp` that depends on the step."""
    dtype = next(model.parameters()).dtype
    return model(batch(step, dtype)).float().square().mean()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def state_of(optimizer: torch.optim.Optimizer) -> list[dict[str, object]]:
    """A copy of the state in parameter order."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [
        {k: v.clone() if isinstance(v, Tensor) else v for k, v in optimizer.state[p].items()}
        if p in optimizer.state
        else {}
        for p in params
    ]


def assert_same(left: object, right: object) -> None:
    """Bit-equality of nested dicts and lists of tensors and numbers."""
    if isinstance(left, dict):
        assert isinstance(right, dict)
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list):
        assert isinstance(right, list)
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    elif isinstance(left, Tensor):
        assert isinstance(right, Tensor)
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    else:
        assert left == right
