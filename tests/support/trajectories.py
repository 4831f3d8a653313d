"""Two optimizers driven along the same gradients, and how far apart they end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

STEPS = 20
Shape = tuple[int, ...]


def parameters(*shapes: Shape, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Weights of RMS 0.1, the same ones for the same shapes."""
    made = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) * 0.1 for i, shape in enumerate(shapes))
    return [nn.Parameter(weight.to(dtype)) for weight in made]


def gradient(shape: Shape, step: int, seed: int = 0) -> Tensor:
    """A gradient that depends on the step, rows from 1 % of the last one's size on: rows and blocks must differ."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1000 * seed + step + 1))
    rows = shape[0] if shape else 1
    scale = torch.logspace(-2, 0, rows) if rows > 1 else torch.ones(rows)
    return noise * scale.view(-1, *[1] * (len(shape) - 1)) if shape else noise


def follow(optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter], steps: int = STEPS) -> list[Tensor]:
    """Step along gradients that do not depend on the weights, so differences add up and never feed back.

    Returns the total update of each parameter.
    """
    before = [p.detach().clone() for p in params]
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step: half a minute for the same result
        for step in range(steps):
            for seed, p in enumerate(params):
                p.grad = gradient(tuple(p.shape), step, seed).to(p.dtype)
            optimizer.step()
    return [p.detach().float() - old.float() for p, old in zip(params, before, strict=True)]


def apart(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest relative L2 difference of a total update over all parameters."""
    with torch.no_grad():
        return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))
