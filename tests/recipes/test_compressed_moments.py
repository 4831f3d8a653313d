"""MLorc beside a recorded run of the official code, SMMF beside its equations in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

import optstate
from optstate import stores, testing
from optstate.kernels import Noise
from optstate.recipes import SMMF, MLorc, MLorcLion
from optstate.spec import ParamSpec
from optstate.stores import LowRank
from optstate.testing.devices import gradient_of, noise
from tests.support.paths import DATA

RECIPES: dict[str, Callable[..., optstate.Optimizer]] = {"mlorc": MLorc, "mlorclion": MLorcLion, "smmf": SMMF}


# --- MLorc ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Replayed(LowRank):
    """A low-rank store that takes the sketch of every step from a record instead of drawing it."""

    record: Tensor = field(default_factory=lambda: torch.empty(0), compare=False)

    def sketch(self, spec: ParamSpec, noise: Noise, device: torch.device) -> Tensor:
        return self.record[noise.step - 1]


def recorded_run() -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(DATA / "mlorc_adamw.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["meta"])["hyper"]


@pytest.mark.parametrize("fused", [False, True], ids=["step", "fused"])
@pytest.mark.parametrize("name", ["tall", "wide"])
def test_ten_steps_follow_the_official_code(name: str, fused: bool) -> None:
    """2e-7, an ulp of weights near one that move by 1e-2: the official code takes QR and SVD for the same product."""
    run, hyper = recorded_run()
    first, second = (Replayed(hyper["rank"], record=run[f"{name}.sketch.{s}"]) for s in ("exp_avg", "exp_avg_sq"))
    param = nn.Parameter(run[f"{name}.start"].clone())
    optimizer = MLorc(
        [("p", param)],
        lr=hyper["lr"],
        betas=tuple(hyper["betas"]),
        eps=hyper["eps"],
        weight_decay=0.0,
        first=first,
        second=second,
        fused_backward=fused,
    )
    for grad, after in zip(run[f"{name}.grads"], run[f"{name}.after"], strict=True):
        (param * grad).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(param.detach(), after, rtol=0, atol=2e-7)


class Float64MLorc:
    """MLorc's two rules of one matrix in float64, with an SVD where the store has Cholesky's factor."""

    def __init__(self, shape: tuple[int, int], rank: int, lion: bool) -> None:
        self.m, self.v = torch.zeros(shape).double(), torch.zeros(shape).double()
        self.rank, self.lion, self.t = rank, lion, 0

    def step(self, w: Tensor, g: Tensor, lr: float, betas: tuple[float, float], eps: float, decay: float) -> Tensor:
        (b1, b2), self.t = betas, self.t + 1
        if self.lion:
            w = w - lr * (b1 * self.m + (1 - b1) * g).sign()
            self.m = self.compressed(b2 * self.m + (1 - b2) * g, "exp_avg")
            return w * (1 - lr * decay)
        m = b1 * self.m + (1 - b1) * g
        lacking = self.v < 0
        mean = self.v[lacking].abs().mean() if lacking.any() else 0.0
        v = b2 * torch.where(lacking, mean, self.v) + (1 - b2) * g * g
        scale = (1 - b2**self.t) ** 0.5 / (1 - b1**self.t)
        self.m, self.v = self.compressed(m, "exp_avg"), self.compressed(v, "exp_avg_sq")
        return (w - lr * scale * m / (v.sqrt() + eps)) * (1 - lr * decay)

    def compressed(self, value: Tensor, slot: str) -> Tensor:
        sketch = Noise(f"p/{slot}", self.t).normal(value.shape[1] * self.rank, value.device).view(-1, self.rank)
        u, s, _ = torch.linalg.svd(value @ sketch.double(), full_matrices=False)
        basis = u[:, s > 1e-9 * s.max().clamp(min=1e-30)]
        return basis @ basis.T @ value


@pytest.mark.parametrize("recipe", [MLorc, MLorcLion])
@pytest.mark.parametrize("gradients", ["full", "rank one", "zero columns"])
def test_the_rules_in_float64(recipe: type[optstate.Optimizer], gradients: str) -> None:
    """fp64 on both sides: 1e-8, as vectors that add next to nothing are dropped at 1e-6 of the largest."""
    shape, rank, numbers = (20, 12), 3, {"betas": (0.9, 0.99), "weight_decay": 0.1}
    lion = recipe is MLorcLion
    param = nn.Parameter(noise(shape, 1).double())
    optimizer = recipe([("p", param)], lr=1e-2, rank=rank, **numbers)  # type: ignore[call-arg]
    theirs, wanted = Float64MLorc(shape, rank, lion), param.detach().clone()
    for step in range(1, 9):
        grad = gradient_of(shape, step).double()
        if gradients == "rank one":
            grad = torch.outer(grad[:, 0], torch.ones(12).double())
        elif gradients == "zero columns":
            grad[:, 2:] = 0
        param.grad = grad.clone()
        optimizer.step()
        wanted = theirs.step(wanted, grad, 1e-2, (0.9, 0.99), 1e-8, 0.1)
        torch.testing.assert_close(param.detach(), wanted, rtol=0, atol=1e-8)


def test_a_rank_that_saves_nothing_keeps_the_moments_in_full() -> None:
    shapes = {"small": (6, 5), "vector": (9,), "thin": (30, 2), "kernel": (4, 3, 2, 2), "large": (64, 96)}
    params = {name: nn.Parameter(noise(shape, i)) for i, (name, shape) in enumerate(shapes.items())}
    optimizer = MLorc(list(params.items()), rank=4)
    kept = {plan.spec.name: plan for plan in optimizer.plan()}
    assert {name for name, plan in kept.items() if plan.stores["exp_avg"] == "LowRank()"} == {"large"}
    assert kept["large"].nbytes == 2 * 4 * 4 * (64 + 96) + 4
    assert "exp_avg: factors of rank 4 would be no smaller: kept in full" in kept["small"].notes
    other = optstate.recipes.AdamW([("small", nn.Parameter(params["small"].detach().clone()))], weight_decay=0.0)
    full = next(iter(other.runner.params()))
    for step in range(1, 4):
        for name, param in params.items():
            param.grad = gradient_of(shapes[name], step)
        full.grad = gradient_of(shapes["small"], step)
        optimizer.step()
        other.step()
    # Equal but for the place of eps, and the decay of 3e-5.
    torch.testing.assert_close(params["small"].detach(), full.detach(), rtol=0, atol=1e-4)


def test_zero_gradients_move_nothing() -> None:
    for recipe in (MLorc, SMMF):
        param = nn.Parameter(noise((20, 12), 1))
        optimizer = recipe([("p", param)], weight_decay=0.0)
        for _ in range(3):
            param.grad = torch.zeros(20, 12)
            optimizer.step()
        torch.testing.assert_close(param.detach(), noise((20, 12), 1), rtol=0, atol=0)


# --- SMMF -------------------------------------------------------------------------------------------------------------


class Float64Smmf:
    """SMMF of one tensor in float64, from the paper's algorithms 1 to 4."""

    def __init__(self, count: int) -> None:
        side = next(i for i in range(int(count**0.5), 0, -1) if count % i == 0)
        self.shape, self.t = (count // side, side), 0
        self.m, self.v = torch.zeros(self.shape).double(), torch.zeros(self.shape).double()

    def step(self, w: Tensor, g: Tensor, lr: float, beta: float, rates: tuple[float, float], decay: float) -> Tensor:
        self.t, (decay_rate, growth) = self.t + 1, rates
        b1, b2 = beta * growth ** (self.t - 1), 1 - self.t**decay_rate
        square = g.reshape(self.shape)
        m, v = b1 * self.m + (1 - b1) * square, b2 * self.v + (1 - b2) * square**2
        size, self.v = self.product(m.abs()), self.product(v)
        self.m = torch.where(m > 0, size, -size)
        return w * (1 - lr * decay) - lr * (m / (v.sqrt() + 1e-8)).view(w.shape)

    @staticmethod
    def product(value: Tensor) -> Tensor:
        return torch.outer(value.sum(1), value.sum(0)) / value.sum().clamp(min=1e-300)


@pytest.mark.parametrize("shape", [(20, 12), (12, 40), (49,), (13,), (4, 3, 2, 2), ()], ids=str)
def test_smmf_follows_the_equations(shape: tuple[int, ...]) -> None:
    """fp64 on both sides: 1e-12 of weights near one."""
    param = nn.Parameter(noise(shape, 1).double())
    optimizer = SMMF([("p", param)], lr=1e-2, weight_decay=0.1, decay_rate=-0.8, growth_rate=0.99)
    theirs, wanted = Float64Smmf(param.numel()), param.detach().clone()
    for step in range(1, 9):
        grad = gradient_of(shape, step).double()
        if grad.ndim:
            grad[0] = 0
        param.grad = grad.clone()
        optimizer.step()
        wanted = theirs.step(wanted, grad, 1e-2, 0.9, (-0.8, 0.99), 0.1)
        torch.testing.assert_close(param.detach(), wanted, rtol=0, atol=1e-12)


def test_smmf_keeps_an_eighth_of_a_byte_per_element() -> None:
    param = nn.Parameter(torch.empty(4096, 4096, device="meta", dtype=torch.bfloat16))
    assert SMMF([("p", param)]).plan().nbytes == 4096 * 4096 // 8 + 2 * 4 * 2 * 4096
    odd = nn.Parameter(torch.empty(3, 5, 7, device="meta"))  # 15 x 7
    assert SMMF([("p", odd)]).plan().nbytes == -(-105 // 8) + 2 * 4 * (15 + 7)


# --- both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_the_laws_of_recipes_hold(name: str) -> None:
    """Two of the laws; `tests/testing/test_own_parts.py` asks for all of them, with the defaults."""
    testing.check_recipe(RECIPES[name], laws=["fused is stepped", "bad gradients"])


@pytest.mark.parametrize("name", RECIPES)
def test_a_state_dict_resumes_exactly_in_bf16(name: str) -> None:
    shape = (64, 96)

    def made() -> tuple[nn.Parameter, optstate.Optimizer]:
        param = nn.Parameter(noise(shape, 1).bfloat16())
        return param, RECIPES[name]([("p", param)], lr=1e-2)

    (param, optimizer), (again, other) = made(), made()
    for step in range(1, 7):
        for p, o in ((param, optimizer), (again, other)):
            p.grad = gradient_of(shape, step).bfloat16()
            if step > 3 or p is param:
                o.step()
        if step == 3:
            other.load_state_dict(optimizer.state_dict())
            with torch.no_grad():
                again.copy_(param)
    assert torch.equal(again, param)


@pytest.mark.parametrize("name", RECIPES)
def test_a_gradient_that_is_not_finite_changes_nothing(name: str) -> None:
    param = nn.Parameter(noise((64, 96), 1))
    optimizer = RECIPES[name]([("p", param)])
    param.grad = gradient_of((64, 96), 1)
    optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[param].items() if isinstance(value, Tensor)}
    weight = param.detach().clone()
    param.grad[0, 0] = torch.nan
    with pytest.raises(stores.NonFiniteGradientError):
        optimizer.step()
    assert torch.equal(param.detach(), weight)
    assert all(torch.equal(optimizer.state[param][key], value) for key, value in before.items())


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda p: MLorc(p, rank=0), "LowRank.rank=0.: give a whole number"),
        (lambda p: MLorcLion(p, rank=2.5), "LowRank.rank=2.5.: give a whole number"),
        (lambda p: MLorc(p, betas=(1.0, 0.9)), "out of range"),
        (lambda p: SMMF(p, beta=1.0), "beta=1.0 is out of range"),
        (lambda p: SMMF(p, growth_rate=1.5), "growth_rate=1.5 is out of range"),
        (lambda p: SMMF(p, decay_rate=0.5), "decay_rate=0.5 is out of range"),
        (lambda p: SMMF(p, eps=0.0), "eps=0.0 is out of range"),
    ],
)
def test_numbers_that_cannot_be_are_refused_in_a_line(build: Callable[..., Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        build([("p", nn.Parameter(torch.zeros(4, 4)))])
    assert "\n" not in str(raised.value)
