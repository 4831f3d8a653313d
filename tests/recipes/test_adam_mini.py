"""Adam-mini against its closed formula in fp64, block by block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optstate.recipes import AdamMini
from optstate.roles import declare_roles
from optstate.stores import Block8

STEPS = 6
OPTIONS: dict[str, Any] = {"lr": 0.05, "betas": (0.7, 0.9), "eps": 1e-2, "weight_decay": 0.3}
# Both sides compute in fp64, in another order: a few units of 2**-53 per operation and step, on numbers near one.
CLOSE = {"rtol": 0.0, "atol": 1e-13}


def seeded(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(shape: tuple[int, ...]) -> list[Tensor]:
    """One gradient per step; rows of different sizes, so that every choice of blocks gives another result."""
    scale = torch.arange(1.0, 1.0 + shape[0], dtype=torch.float64).view(-1, *(1,) * (len(shape) - 1)) if shape else 1.0
    return [seeded(*shape, seed=step) * scale for step in range(STEPS)]


def closed_formula(
    param: Tensor,
    grads: list[Tensor],
    rows_per_block: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> list[Tensor]:
    """The parameter after every step. The moments are the written-out sums, not recursions; 0 rows: by element."""
    beta1, beta2 = betas
    path = []
    for t in range(1, len(grads) + 1):
        mean = sum((1 - beta1) * beta1 ** (t - i) * grads[i - 1] for i in range(1, t + 1))
        square = torch.zeros_like(param)
        for i in range(1, t + 1):
            squares = grads[i - 1] ** 2
            if rows_per_block:
                blocks = squares.split(rows_per_block)
                squares = torch.cat([torch.full_like(b, b.sum().item() / b.numel()) for b in blocks])
            square += (1 - beta2) * beta2 ** (t - i) * squares
        corrected = (mean / (1 - beta1**t), square / (1 - beta2**t))
        param = param * (1 - lr * weight_decay) - lr * corrected[0] / (corrected[1].sqrt() + eps)
        path.append(param)
    return path


# what is declared, shape, rows of one block (0: every element is one), numbers kept of the second moment
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...], int, int]] = {
    "query": ({"role": "query_key", "head_size": 4}, (12, 5), 4, 3),
    "heads of one row": ({"role": "query_key", "head_size": 1}, (3, 5), 1, 3),
    "one head": ({"role": "query_key", "head_size": 12}, (12, 5), 12, 1),
    "bias of a query": ({"role": "query_key", "head_size": 4}, (12,), 0, 12),
    "norm": ({"role": "norm"}, (7,), 7, 1),
    "norm of two dimensions": ({"role": "norm"}, (4, 3), 4, 1),
    "bias": ({"role": "bias"}, (7,), 0, 7),
    "biases of experts": ({"role": "bias"}, (3, 4), 0, 12),
    "embedding": ({"role": "embedding"}, (9, 4), 1, 9),
    "head": ({"role": "head"}, (9, 4), 1, 9),
    "matrix": ({"role": "matrix"}, (6, 8), 1, 6),
    "undeclared matrix": ({}, (6, 8), 1, 6),
    "convolution": ({}, (4, 3, 2, 2), 1, 4),
    "undeclared vector": ({}, (7,), 0, 7),
    "number": ({}, (), 0, 1),
}


def second_moment(optimizer: AdamMini, param: Tensor) -> int:
    """How many numbers are kept of it."""
    state = optimizer.state[param].items()
    return sum(value.numel() for key, value in state if key.split(".")[0] == "exp_avg_sq")


@pytest.mark.parametrize("name", CASES)
def test_every_step_is_the_closed_formula(name: str) -> None:
    declared, shape, rows, kept = CASES[name]
    start = seeded(*shape, seed=99)
    param = nn.Parameter(start.clone())
    optimizer = AdamMini([{"params": [("p", param)], **declared}], **OPTIONS)
    assert second_moment(optimizer, param) == kept
    assert optimizer.state[param]["exp_avg"].shape == shape
    grads = gradients(shape)
    for grad, expected in zip(grads, closed_formula(start, grads, rows, **OPTIONS), strict=True):
        param.grad = grad.clone()
        optimizer.step()
        torch.testing.assert_close(param.detach(), expected, **CLOSE)


def test_the_cases_tell_blocks_apart() -> None:
    """With other blocks the same gradients end far outside the tolerance."""
    start, grads = seeded(12, 5, seed=99), gradients((12, 5))
    ends = [closed_formula(start, grads, rows, **OPTIONS)[-1] for rows in (0, 1, 4, 12)]
    for i, left in enumerate(ends):
        for right in ends[:i]:
            assert (left - right).abs().max() > 1e-2


def test_defaults_are_the_official_ones() -> None:
    param = nn.Parameter(torch.zeros(2, 2))
    group = AdamMini([param]).param_groups[0]
    kept = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
    assert kept == {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}


def test_a_group_sets_its_own_decay_and_betas() -> None:
    declared: list[dict[str, Any]] = [
        {"role": "norm", "weight_decay": 0.0},
        {"role": "query_key", "head_size": 2, "betas": (0.5, 0.8)},
        {},
    ]
    start, grads = seeded(4, 3, seed=99), gradients((4, 3))
    params = [nn.Parameter(start.clone()) for _ in declared]
    optimizer = AdamMini([{"params": [p], **extra} for p, extra in zip(params, declared, strict=True)], **OPTIONS)
    for grad in grads:
        for param in params:
            param.grad = grad.clone()
        optimizer.step()
    for param, extra, rows in zip(params, declared, (4, 2, 1), strict=True):
        options = {**OPTIONS, **{key: extra[key] for key in ("weight_decay", "betas") if key in extra}}
        torch.testing.assert_close(param.detach(), closed_formula(start, grads, rows, **options)[-1], **CLOSE)


class Attention(nn.Module):
    """Three heads of two for queries, one for keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = 2
        self.q_proj = nn.Linear(5, 6)
        self.k_proj = nn.Linear(5, 2)
        self.v_proj = nn.Linear(5, 2)
        self.out = nn.Linear(6, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (3, 2)).transpose(-2, -3)
        mixed = nn.functional.scaled_dot_product_attention(q, self.k_proj(x)[:, None], self.v_proj(x)[:, None])
        return self.out(mixed.transpose(-2, -3).flatten(-2))


class Model(nn.Module):
    """One layer, its norm, and a vocabulary of eight at both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(8, 5)
        self.attention = Attention()
        self.norm = nn.RMSNorm(5)
        self.head = nn.Linear(5, 8, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        return self.head(self.norm(x + self.attention(x)))


BLOCK_ROWS = {
    "tokens.weight": 1,
    "attention.q_proj.weight": 2,
    "attention.q_proj.bias": 0,
    "attention.k_proj.weight": 2,
    "attention.k_proj.bias": 0,
    "attention.v_proj.weight": 1,
    "attention.v_proj.bias": 0,
    "attention.out.weight": 1,
    "norm.weight": 5,
    "head.weight": 1,
}


@pytest.mark.parametrize("declared", [True, False])
def test_a_model_trains_by_the_blocks_of_its_roles(declared: bool) -> None:
    """Undeclared, queries and keys go by row and the norm by element."""
    torch.manual_seed(0)
    model = Model().double()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads: dict[str, list[Tensor]] = {name: [] for name in start}
    optimizer = AdamMini(declare_roles(model) if declared else model.named_parameters(), **OPTIONS)
    for step in range(STEPS):
        ids = torch.randint(8, (2, 6), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.roll(-1, 1).flatten())
        optimizer.zero_grad()
        loss.backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            grads[name].append(p.grad.clone())
        optimizer.step()
    for name, p in model.named_parameters():
        rows = BLOCK_ROWS[name] if declared else min(p.ndim - 1, 1)
        expected = closed_formula(start[name], grads[name], rows, **OPTIONS)[-1]
        torch.testing.assert_close(p.detach(), expected, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def test_the_plan_says_which_rule_chose_the_blocks() -> None:
    plan = {
        item.spec.name: (item.rule, str(item.slots["exp_avg_sq"].store))
        for item in AdamMini(declare_roles(Model())).plan()
    }
    assert plan["attention.q_proj.weight"][0] == "is_query_key"
    assert plan["norm.weight"] == ("is_norm", "Grouped(by='tensor')")
    assert plan["attention.q_proj.bias"] == ("is_elementwise", "Full()")
    assert plan["head.weight"] == ("default", "Grouped(by='row')")


def test_the_first_moment_may_be_kept_in_eight_bits() -> None:
    param = nn.Parameter(torch.zeros(64, 64))
    state = AdamMini([param], first=Block8()).state[param]
    assert state["exp_avg.codes"].dtype == torch.uint8
    assert state["exp_avg_sq.mean"].shape == (64,)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({}, r"'layer\.q'.* head size is not known: give \"head_size\""),
        ({"head_size": 5}, r"'layer\.q' has 12 rows, which its head size 5 does not divide"),
        ({"head_size": 24}, r"'layer\.q' has 12 rows, which its head size 24 does not divide"),
    ],
)
def test_queries_without_whole_heads_are_refused(declared: dict[str, Any], message: str) -> None:
    group = {"params": [("layer.q", nn.Parameter(torch.zeros(12, 5)))], "role": "query_key", **declared}
    with pytest.raises(ValueError, match=message):
        AdamMini([group])
