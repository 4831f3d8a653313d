"""Recipes of the low-rank family beside recorded runs, other people's code, and loops in fp64 from the equations.

Recorded runs are fp32: a weight near 1 has a last place of 1.2e-7, and all of them end within three of these, where the
smallest mistake (bias correction, eps, order of the decay) is above 1e-4. Loops in fp64 take the same singular vectors,
so that 1e-10 of the movement is left for the order of sums.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_optimizer
import tomllib
import torch
from safetensors import safe_open
from torch import Tensor, nn

import optstate
from optstate import recipes, testing
from optstate.recipes import (
    AdaMeM,
    AdaRankGrad,
    Apollo,
    ApolloMini,
    Fira,
    GaLore,
    GaLore2,
    Grass,
    LDAdam,
    QGaLore,
)
from optstate.stores import Block4, Block8, Factored, Full, NonFiniteGradientError
from optstate.testing.devices import CutParameter, noise
from optstate.updates.projected import make_random_vectors
from tests.support.paths import DATA, ROOT

LAST_PLACES = 3 * 2.0**-23
EXACT = 1e-10
LR = 1e-2
FP64 = torch.float64

FAMILY: dict[str, Callable[..., optstate.Optimizer]] = {
    "galore": lambda params, **more: GaLore(params, LR, rank=4, update_proj_gap=3, **more),
    "galore2": lambda params, **more: GaLore2(params, LR, rank=4, update_proj_gap=3, **more),
    "qgalore": lambda params, **more: QGaLore(params, LR, rank=4, update_proj_gap=2, queue_size=1, **more),
    "apollo": lambda params, **more: Apollo(params, LR, rank=4, update_proj_gap=3, **more),
    "apollo_svd": lambda params, **more: Apollo(params, LR, rank=4, update_proj_gap=3, proj="svd", **more),
    "apollomini": lambda params, **more: ApolloMini(params, LR, **more),
    "fira": lambda params, **more: Fira(params, LR, rank=4, update_proj_gap=3, **more),
    "ldadam": lambda params, **more: LDAdam(params, LR, rank=4, **more),
    "grass": lambda params, **more: Grass(params, LR, rank=5, update_proj_gap=3, **more),
    "grass_drawn": lambda params, **more: Grass(params, LR, rank=5, update_proj_gap=3, selection="norm", **more),
    "adarankgrad": lambda params, **more: AdaRankGrad(params, LR, rank=8, xi=0.7, update_proj_gap=3, **more),
    "adamem": lambda params, **more: AdaMeM(params, LR, rank=4, update_proj_gap=3, **more),
}


def gradients(shape: tuple[int, int], steps: int, dtype: torch.dtype = FP64) -> list[Tensor]:
    """Gradients with a few large singular values, which differ from step to step."""
    sizes = torch.logspace(0, -1, min(shape), dtype=FP64)
    found = []
    for step in range(steps):
        u, _, vh = torch.linalg.svd(noise(shape, step).to(FP64) + noise(shape, 99).to(FP64), full_matrices=False)
        found.append(((u * sizes) @ vh).mul_(1.0 + step % 3).to(dtype))
    return found


def stepped(optimizer: Any, param: nn.Parameter, grads: list[Tensor]) -> list[Tensor]:
    """Step along gradients; return the weight after every step."""
    seen = []
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
        seen.append(param.detach().clone())
    return seen


def one(shape: tuple[int, ...], dtype: torch.dtype = FP64) -> nn.Parameter:
    return nn.Parameter(noise(shape, 7).to(dtype))


def steps_of(found: list[Tensor], start: Tensor) -> list[Tensor]:
    """What every step took from the weight, over the learning rate."""
    return [(a - b) / LR for a, b in zip([start, *found], found, strict=False)]


# --- official code ------------------------------------------------------------------------------------------------

RECORDED: dict[str, Callable[[Any], optstate.Optimizer]] = {
    "galore_adamw": lambda params: GaLore(params, 1e-2, rank=4, update_proj_gap=5),
    "apollo_svd": lambda params: Apollo(params, 1e-2, rank=4, update_proj_gap=5, proj="svd"),
    "ldadamw": lambda params: LDAdam(params, 1e-3, rank=4),
}


@pytest.mark.parametrize("fused", [False, True], ids=["step", "fused"])
@pytest.mark.parametrize("which", ["tall", "wide"])
@pytest.mark.parametrize("name", RECORDED)
def test_eleven_steps_follow_the_official_code(name: str, which: str, fused: bool) -> None:
    with safe_open(DATA / f"{name}_run.safetensors", "pt") as file:
        start, grads, after = (file.get_tensor(f"{which}.{what}") for what in ("start", "grads", "after"))
        hyper = json.loads(file.metadata()["meta"])["hyper"]
    param = nn.Parameter(start.clone())
    optimizer = RECORDED[name]([("p", param)])
    assert optimizer.param_groups[0]["lr"] == hyper["lr"]
    if fused:
        optstate.fuse_backward(optimizer)
    for step, grad in enumerate(grads):
        (param * grad).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0:
            assert (param.detach() - after[step // 5]).abs().max() <= LAST_PLACES, f"step {step + 1}"
    assert (param.detach() - start).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(40, 24), (12, 40)], ids=["tall", "wide"])
@pytest.mark.parametrize("gap", [1, 100])
@pytest.mark.parametrize("name", ["galore", "fira"])
def test_another_library_makes_the_same_steps(name: str, gap: int, shape: tuple[int, int]) -> None:
    """Its Fira bounds growth before the bias correction, so that betas of zero, without one, are compared."""
    betas = (0.9, 0.999) if name == "galore" else (0.0, 0.0)
    theirs = getattr(pytorch_optimizer, {"galore": "GaLore", "fira": "Fira"}[name])
    ours = {"galore": GaLore, "fira": Fira}[name]
    grads, a, b = gradients(shape, 6, torch.float32), one(shape, torch.float32), one(shape, torch.float32)
    group = {"params": [b], "rank": 4, "update_proj_gap": gap, "scale": 1.0, "projection_type": "std"}
    mine = stepped(
        ours([("p", a)], LR, rank=4, update_proj_gap=gap, scale=1.0, betas=betas, weight_decay=0.1), a, grads
    )
    other = stepped(theirs([group], lr=LR, betas=betas, weight_decay=0.1), b, grads)
    assert max(float((x - y).abs().max()) for x, y in zip(mine, other, strict=True)) <= 8 * 2.0**-23


# --- loops from the equations -------------------------------------------------------------------------------------


class Adam64:
    """Adam of the equations: E-torch, or eps beside the uncorrected root."""

    def __init__(self, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, hat: bool = False) -> None:
        self.betas, self.eps, self.hat = betas, eps, hat
        self.m: Any = 0.0
        self.v: Any = 0.0

    def __call__(self, g: Tensor, t: int) -> Tensor:
        b1, b2 = self.betas
        self.m, self.v = b1 * self.m + (1 - b1) * g, b2 * self.v + (1 - b2) * g * g
        c1, c2 = 1 - b1**t, 1 - b2**t
        if self.hat:
            return c2**0.5 / c1 * self.m / (self.v.sqrt() + self.eps)
        return self.m / c1 / ((self.v / c2).sqrt() + self.eps)


def right_vectors(g: Tensor, rank: int, wide: bool = False) -> Tensor:
    """The signs that a decomposition happens to give count: moments stay as they are in another basis."""
    if wide:
        return torch.linalg.svd(g.T, full_matrices=False)[0][:, :rank].T
    return torch.linalg.svd(g, full_matrices=False)[2][:rank]


def limited(update: Tensor, last: float | None) -> tuple[Tensor, float]:
    """Bound the growth of a norm by 1 %."""
    norm = float(update.norm())
    limit = 1.0 if last is None else max(norm / (last + 1e-8), 1.01) / 1.01
    return update / limit, norm / limit


def galore_loop(grads: list[Tensor], wide: bool) -> list[Tensor]:
    adam, found = Adam64(eps=1e-6, hat=True), []
    for t, g in enumerate(grads, 1):
        if t % 3 == 1:
            basis = right_vectors(g, 4, wide)
        found.append(0.25 * adam(g @ basis.T, t) @ basis)
    return found


def fira_loop(grads: list[Tensor], wide: bool) -> list[Tensor]:
    adam, found, last = Adam64(eps=1e-6, hat=True), [], None
    for t, g in enumerate(grads, 1):
        if t % 3 == 1:
            basis = right_vectors(g, 4, wide)
        low = g @ basis.T
        step = adam(low, t)
        ratio = step.norm(dim=1, keepdim=True) / (low.norm(dim=1, keepdim=True) + 1e-8)
        rest, last = limited(ratio * (g - low @ basis), last)
        found.append(0.25 * (step @ basis + rest))
    return found


def adamem_loop(grads: list[Tensor], wide: bool) -> list[Tensor]:
    m: Any = 0.0
    row: Any = 0.0
    col: Any = 0.0
    lines: Any = 0.0
    found = []
    for t, g in enumerate(grads, 1):
        if t % 3 == 1:
            basis = right_vectors(g, 4, wide)
        low = g @ basis.T
        rest = g - low @ basis
        m = 0.9 * m + 0.1 * low
        row, col = 0.95 * row + 0.05 * m.square().mean(1), 0.95 * col + 0.05 * m.square().mean(0)
        lines = 0.95 * lines + 0.05 * rest.square().mean(1)
        second = row[:, None] * col[None, :] / row.mean()
        found.append((m / second.sqrt()) @ basis + rest / (lines.sqrt() + 1e-8)[:, None])
    return found


def adarankgrad_loop(grads: list[Tensor], wide: bool) -> list[Tensor]:
    """With vectors that are really fewer, and moments that really change their size."""
    adam, found, basis = Adam64(), [], None
    for t, g in enumerate(grads, 1):
        if t % 3 == 1:
            rank = 1
            while rank < 8 and (g - g @ right_vectors(g, rank).T @ right_vectors(g, rank)).norm() > 0.7 * g.norm():
                rank += 1
            new = right_vectors(g, rank, wide)
            if basis is not None:
                turn, (k1, k2) = basis @ new.T, (1 - 0.9 ** (t - 1), 1 - 0.999 ** (t - 1))
                mean, square = adam.m / k1, adam.v / k2
                adam.m = k1 * mean @ turn
                adam.v = k2 * ((square - mean**2) @ turn**2 + (mean @ turn) ** 2).abs()
            basis = new
        found.append(adam(g @ basis.T, t) @ basis)
    return found


LOOPS = {"galore": galore_loop, "fira": fira_loop, "adamem": adamem_loop, "adarankgrad": adarankgrad_loop}


@pytest.mark.parametrize("wide", [False, True], ids=["tall", "wide"])
@pytest.mark.parametrize("name", LOOPS)
def test_steps_are_those_of_the_equations(name: str, wide: bool) -> None:
    grads = gradients((30, 16), 8)
    wanted = LOOPS[name](grads, wide)
    param = one((16, 30) if wide else (30, 16))
    start = param.detach().clone()
    made = steps_of(stepped(FAMILY[name]([("p", param)]), param, [g.T if wide else g for g in grads]), start)
    for t, (found, want) in enumerate(zip(made, wanted, strict=True), 1):
        assert ((found.T if wide else found) - want).abs().max() <= EXACT * want.abs().max() * 1e3, f"step {t}"


def test_the_rank_in_use_follows_the_gradient() -> None:
    param = one((30, 16))
    optimizer = AdaRankGrad([("p", param)], LR, rank=8, min_rank=2, xi=0.5, update_proj_gap=1)
    for true_rank, wanted in ((5, 5), (1, 2), (12, 8)):
        basis = torch.linalg.qr(noise((16, true_rank), true_rank).to(FP64))[0]
        rows = torch.linalg.qr(noise((30, true_rank), true_rank + 50).to(FP64))[0]
        stepped(optimizer, param, [rows @ basis.T])
        state = optimizer.state[param]
        least = 1 + sum(1 for r in range(1, true_rank) if (true_rank - r) > 0.25 * true_rank + 1e-9)
        assert int(state["rank_in_use"]) == min(max(least, 2), 8), (true_rank, wanted)
        assert int((state["projector"].norm(dim=1) > 0.5).sum()) == int(state["rank_in_use"])
        assert torch.equal(param.isfinite(), torch.ones_like(param, dtype=torch.bool))


@pytest.mark.parametrize("kind", ["channel", "tensor"])
@pytest.mark.parametrize("shape", [(30, 16), (16, 30)], ids=["tall", "wide"])
def test_apollo_scales_the_gradient_itself(shape: tuple[int, int], kind: Any) -> None:
    param, grads = one(shape), gradients(shape, 7)
    optimizer = Apollo([("p", param)], LR, rank=4, update_proj_gap=3, scale=4.0, scale_type=kind)
    transform, spec = optimizer.plan().params[0].chain.transforms[0], optimizer.plan().params[0].spec
    start = param.detach().clone()
    made = steps_of(stepped(optimizer, param, grads), start)
    adam, last, is_right = Adam64(eps=1e-6, hat=True), None, shape[0] >= shape[1]

    class At:
        def __init__(self) -> None:
            self.spec, self.param = spec, param

    for t, (g, found) in enumerate(zip(grads, made, strict=True), 1):
        basis = make_random_vectors(transform, At(), 4, t - (t - 1) % 3)  # type: ignore[arg-type]
        low = g @ basis.T if is_right else basis.T @ g
        step = adam(low, t)
        correction = (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
        along = None if kind == "tensor" else 1 if is_right else 0
        keep = {} if along is None else {"dim": along, "keepdim": True}
        ratio = (step / correction).norm(**keep) / (low.norm(**keep) + 1e-8)
        scaled, last = limited(g * ratio, last)
        want = 2.0 * correction * scaled  # the root of scale
        assert (found - want).abs().max() <= 1e3 * EXACT * want.abs().max(), f"step {t}"


def test_apollo_mini_is_apollo_of_rank_one() -> None:
    grads = gradients((30, 16), 4)
    a, b = one((30, 16)), one((30, 16))
    mini = stepped(ApolloMini([("p", a)], LR), a, grads)
    apollo = stepped(Apollo([("p", b)], LR, rank=1, scale=128, scale_type="tensor"), b, grads)
    assert all(map(torch.equal, mini, apollo))


@pytest.mark.parametrize("selection", ["top", "norm", "uniform"])
def test_grass_steps_the_rows_that_it_chose(selection: Any) -> None:
    param, grads = one((30, 16)), gradients((30, 16), 7)
    optimizer = Grass([("p", param)], LR, rank=12, update_proj_gap=3, selection=selection)
    before = param.detach().clone()
    for t, g in enumerate(grads, 1):
        stepped(optimizer, param, [g])
        state = optimizer.state[param]
        rows = state["chosen"].long()
        if t % 3 == 1:
            adam = Adam64()
            if selection == "top":
                assert set(rows.tolist()) == set(g.norm(dim=1).topk(12).indices.tolist())
            chance = g.norm(dim=1) / g.norm(dim=1).sum() if selection == "norm" else torch.full((30,), 1 / 30)
            rho = torch.ones(12, dtype=FP64) if selection == "top" else (12 * chance[rows].to(FP64)).rsqrt()
        step = rho[:, None] * adam(rho[:, None] * g[rows], (t - 1) % 3 + 1)
        want = torch.zeros_like(g).index_add_(0, rows, step)
        found = (before - param.detach()) / LR
        assert (found - want).abs().max() <= 1e3 * EXACT * want.abs().max(), f"step {t}"
        before = param.detach().clone()
    if selection == "uniform":
        assert len(set(rows.tolist())) < 12, "no row was drawn twice: the sum of repeated rows is not tested"


def test_the_mean_of_drawn_projections_is_the_gradient() -> None:
    """E[P P^T] = 1, in four classes of 100 rows each; of 6000 draws 600 or more fall into one: 5 % for one error."""
    g = noise((400, 3), 1).to(FP64)
    g *= torch.tensor([1.0, 2.0, 3.0, 4.0]).repeat_interleave(100)[:, None] / g.norm(dim=1, keepdim=True)
    params, total = [one((400, 3)) for _ in range(15)], torch.zeros(400, dtype=FP64)
    optimizer = Grass([(f"p{i}", param) for i, param in enumerate(params)], LR, rank=400, selection="norm")
    for param in params:
        param.grad = g.clone()
    optimizer.step()
    for param in params:
        state = optimizer.state[param]
        total.index_add_(0, state["chosen"].long(), state["rho"].square())
    assert (total.view(4, 100).mean(1) / 15 - 1).abs().max() <= 0.2


def test_lazy_vectors_follow_the_cosines() -> None:
    """A gradient of one direction doubles the gap after two cosines; one that turns away does not."""
    steady, turning = one((30, 16)), one((30, 16))
    optimizer = QGaLore([("a", steady), ("b", turning)], LR, rank=4, update_proj_gap=2, queue_size=2)
    directions = torch.linalg.qr(noise((16, 16), 3).to(FP64))[0]
    refreshed: dict[str, list[int]] = {"a": [], "b": []}
    for t in range(1, 14):
        steady.grad = torch.outer(noise((30,), t).to(FP64), directions[0]) + 1e-3 * gradients((30, 16), 1)[0]
        turning.grad = torch.outer(noise((30,), t).to(FP64), directions[t]) + 1e-3 * gradients((30, 16), 1)[0]
        old = {n: optimizer.state[p]["projector"].clone() for n, p in (("a", steady), ("b", turning))}
        optimizer.step()
        for n, p in (("a", steady), ("b", turning)):
            if not torch.equal(old[n], optimizer.state[p]["projector"]):
                refreshed[n].append(t)
    # cosines come at 3 and 5, so that the gap is 4 from 5 on (9), with one more at 9 it is 8 (17).
    assert refreshed == {"a": [1, 3, 5, 9], "b": [1, 3, 5, 7, 9, 11, 13]}
    assert (float(optimizer.state[steady]["gap"]), float(optimizer.state[turning]["gap"])) == (8.0, 2.0)
    assert float(optimizer.state[steady]["cosines"].min()) > 0.99


# --- laws ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILY)
def test_the_laws_of_recipes_hold(name: str) -> None:
    testing.check_recipe(FAMILY[name], laws=["fused is stepped", "no value is read"])


@pytest.mark.parametrize("parts", [(2, 1), (4, 1), (1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("name", FAMILY)
def test_parts_are_stepped_as_the_whole_is(name: str, parts: tuple[int, int]) -> None:
    for shape in ((40, 24), (12, 40)):
        cut = CutParameter(lambda groups: FAMILY[name](groups, weight_decay=0.1), shape, parts, FP64)
        before = cut.whole.detach().clone()
        cut.train(4)
        param, state = cut.joined()
        moved = cut.whole.detach() - before
        assert (param - cut.whole.detach()).abs().max() <= 1e-9 * moved.abs().max()
        for key, value in cut.whole_state().items():
            assert (state[key] - value).abs().max() <= 1e-8 * value.abs().max(), key


STORES = {
    "block8": {"first": Block8(), "second": Block8()},
    "block4": {"first": Block4(), "second": Block4()},
    "factored": {"first": Full(), "second": Factored()},
    "bf16": {"first": Full("bfloat16"), "second": Full()},
}


@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize("recipe", [GaLore, Apollo, Fira, LDAdam, Grass, AdaRankGrad], ids=lambda r: r.__name__)
def test_moments_in_any_store(recipe: Any, kind: str) -> None:
    """A step in another store is that of fp32 moments, but for the error that the store is known for."""
    shape = (96, 80)
    runs = []
    for stores in (STORES[kind], {}):
        param = one(shape, torch.float32)
        optimizer = recipe([("p", param)], LR, rank=64, **stores)
        runs.append((stepped(optimizer, param, gradients(shape, 4, torch.float32))[-1] - noise(shape, 7), optimizer))
    (found, coded), (wanted, plain) = runs
    assert coded.state_nbytes() < plain.state_nbytes()
    # Adam's ratio is one at the first steps, whatever the store rounds; a factored one differs by its model.
    assert float((found - wanted).norm() / wanted.norm()) <= {"block8": 0.1, "bf16": 0.05}.get(kind, 0.6)
    assert float(torch.cosine_similarity(found.flatten(), wanted.flatten(), 0)) > 0.8


def test_ldadam_moves_a_factored_second_moment() -> None:
    """It is carried into the new basis and then averaged: both must be in what is kept."""
    param = one((30, 16))
    optimizer = LDAdam([("p", param)], LR, rank=4, second=Factored())
    stepped(optimizer, param, gradients((30, 16), 1))
    first = optimizer.state[param]["exp_avg_sq.row"].clone()
    stepped(optimizer, param, [1e3 * g for g in gradients((30, 16), 2)[1:]])
    assert (optimizer.state[param]["exp_avg_sq.row"] > 100 * first).all()


# --- hard cases ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILY)
def test_ranks_above_the_matrix_and_gradients_of_zero_or_low_rank(name: str) -> None:
    for shape in ((3, 2), (2, 3), (1, 5), (4, 4)):
        param = one(shape, torch.float32)
        optimizer = FAMILY[name]([("p", param)])
        low = torch.outer(noise(shape[:1], 1), noise(shape[1:], 2))
        before = param.detach().clone()
        stepped(optimizer, param, [torch.zeros(shape)] * 2)
        assert torch.equal(param.detach(), before), "a gradient of zero moves nothing"
        stepped(optimizer, param, [low, low * 2, low * 0, noise(shape, 5), noise(shape, 6)])
        assert bool(param.isfinite().all())
        assert all(bool(value.isfinite().all()) for key, value in optimizer.state[param].items() if key != "step")
        assert float((param - before).abs().max()) < 1.0


@pytest.mark.parametrize("recipe", [GaLore, GaLore2, Fira, AdaMeM, AdaRankGrad], ids=lambda r: r.__name__)
def test_what_a_gradient_of_low_rank_spans_is_kept(recipe: Any) -> None:
    """The space of the projection holds the gradient, whatever vectors fill up the rank."""
    param = one((30, 16))
    low = noise((30, 3), 1).to(FP64) @ noise((3, 16), 2).to(FP64)
    optimizer = recipe([("p", param)], LR, rank=6, update_proj_gap=2)
    made = steps_of(stepped(optimizer, param, [low, low]), one((30, 16)).detach())
    basis = optimizer.state[param]["projector"]
    assert (low - low @ basis.T @ basis).abs().max() <= 1e-9 * low.abs().max()
    rows = torch.linalg.svd(low, full_matrices=False)[2][:3]
    for step in made if recipe is not AdaMeM else ():  # its factored mean mixes columns of the space
        outside = step - step @ rows.T @ rows
        assert outside.abs().max() <= (1e-6 if recipe in (GaLore2, Fira) else 2.0) * step.abs().max()
    assert float(made[0].abs().max()) < 30.0, "rounding was made as large as a gradient"


@pytest.mark.parametrize("name", FAMILY)
def test_a_bad_gradient_at_a_refresh_changes_nothing(name: str) -> None:
    param = one((30, 16), torch.float32)
    optimizer = FAMILY[name]([("p", param)])
    stepped(optimizer, param, gradients((30, 16), 6, torch.float32))
    before = {key: value.clone() for key, value in optimizer.state[param].items() if isinstance(value, Tensor)}
    weight = param.detach().clone()
    param.grad = noise((30, 16), 1)
    param.grad[3, 3] = torch.nan
    with pytest.raises(NonFiniteGradientError):
        optimizer.step()
    assert torch.equal(param.detach(), weight)
    assert optimizer.state[param]["step"] == 6
    assert all(torch.equal(optimizer.state[param][key], value) for key, value in before.items())


@pytest.mark.parametrize("name", FAMILY)
def test_bf16_weights_move_on_average_by_steps_below_their_spacing(name: str) -> None:
    """Steps of about 2e-4 at weights near 1, whose spacing is 4e-3: rounded to nearest, none would ever move."""
    param = nn.Parameter(torch.ones(64, 48, dtype=torch.bfloat16))
    other = nn.Parameter(torch.ones(64, 48))
    grads = [torch.outer(noise((64,), 1).sign(), torch.ones(48)) + 0.01 * noise((64, 48), t) for t in range(6)]
    runs = []
    for p in (param, other):
        optimizer = FAMILY[name]([("p", p)])
        for group in optimizer.param_groups:
            group["lr"] = 2e-4
        runs.append(stepped(optimizer, p, [g.to(p.dtype) for g in grads])[-1].float() - 1)
    signs = grads[0].sign()
    found, wanted = (float((run * signs).mean()) for run in runs)
    assert wanted < 0
    # 3072 weights rounded by a spacing of 4e-3 six times: a standard error of 7e-5 at most.
    assert abs(found - wanted) <= 0.3 * abs(wanted) + 2.5e-4


# --- which parameters, and what they cost -------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 24)
        self.hidden = nn.Linear(24, 40)
        self.conv = nn.Conv2d(3, 4, 2)
        self.norm = nn.LayerNorm(40)
        self.lm_head = nn.Linear(40, 50, bias=False)


@pytest.mark.parametrize("name", FAMILY)
def test_roles_choose_what_is_projected(name: str) -> None:
    declared = FAMILY[name](optstate.declare_roles(Model()))
    hidden = [plan.spec.name for plan in declared.plan() if plan.rule == "is_hidden_matrix"]
    assert hidden == ["hidden.weight"]
    undeclared = FAMILY[name](Model().named_parameters())
    hidden = [plan.spec.name for plan in undeclared.plan() if plan.rule == "is_hidden_matrix"]
    assert hidden == ["embedding.weight", "hidden.weight", "lm_head.weight"]


SIZES = {  # numbers in fp32 that a 40 x 24 matrix of rank 4 keeps, by the papers' counts
    "galore": 4 * (2 * 40 + 24),
    "galore2": 4 * (2 * 40 + 24),
    "qgalore": 4 * (2 * 40 + 24) + 1 + 1,
    "apollo": 4 * 2 * 40 + 1,
    "apollo_svd": 4 * (2 * 40 + 24) + 1,
    "apollomini": 2 * 40 + 1,
    "fira": 4 * (2 * 40 + 24) + 1,
    "ldadam": 4 * (2 * 40 + 24) + 40 * 24,
    "grass": 5 * 2 * 24 + 5,
    "grass_drawn": 5 * 2 * 24 + 10,
    "adarankgrad": 8 * (2 * 40 + 24) + 1,
    "adamem": 4 * (40 + 24) + 40 + 4 + 40,
}


@pytest.mark.parametrize("name", FAMILY)
def test_state_has_the_size_of_the_paper_and_of_the_estimate(name: str) -> None:
    params = [("hidden", one((40, 24), torch.float32)), ("bias", one((40,), torch.float32))]
    optimizer = FAMILY[name](params)
    stepped(optimizer, params[0][1], [noise((40, 24), 1)])
    assert optimizer.state_nbytes() == 4 * (SIZES[name] + 2 * 40) == optimizer.plan().nbytes
    model = nn.Linear(24, 40)
    answer = optstate.estimate(model, recipe=lambda params: FAMILY[name](params))
    assert answer.recipes[0].state_bytes == 4 * (SIZES[name] + 2 * 40)


def test_the_package_offers_them_by_name() -> None:
    offered = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["optstate.recipes"]
    for kind in (AdaMeM, AdaRankGrad, Apollo, ApolloMini, Fira, GaLore, GaLore2, Grass, LDAdam, QGaLore):
        assert offered[kind.__name__.lower()] == f"optstate.recipes:{kind.__name__}"
        assert kind.__name__ in recipes.__all__


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda p: GaLore(p, rank=0), "rank=0"),
        (lambda p: GaLore(p, update_proj_gap=2.5), "update_proj_gap=2.5"),
        (lambda p: GaLore(p, scale=-1.0), "scale=-1.0"),
        (lambda p: GaLore(p, projection="qr"), "projection='qr'"),
        (lambda p: GaLore(p, betas=(0.9, 1.0)), "betas"),
        (lambda p: GaLore(p, first=Factored()), "first moment"),
        (lambda p: QGaLore(p, cos_threshold=0.0), "cos_threshold=0.0"),
        (lambda p: QGaLore(p, gamma_proj=0), "gamma_proj=0"),
        (lambda p: Apollo(p, scale=0), "scale=0"),
        (lambda p: Apollo(p, scale_type="row"), "scale_type='row'"),
        (lambda p: Apollo(p, proj="power"), "proj='power'"),
        (lambda p: LDAdam(p, rho=1.5), "rho"),
        (lambda p: Grass(p, selection="best"), "selection='best'"),
        (lambda p: AdaRankGrad(p, rank=4, min_rank=5), "min_rank=5"),
        (lambda p: AdaRankGrad(p, xi=1.0), "xi=1.0"),
        (lambda p: AdaMeM(p, betas=(0.9,)), "betas=(0.9,)"),
    ],
)
def test_wrong_hyper_parameters_are_refused_in_one_line(build: Any, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)) as refused:
        build([("p", one((8, 8), torch.float32))])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", FAMILY)
def test_a_file_and_a_state_dict_resume_exactly_between_two_refreshes(name: str, tmp_path: Path) -> None:
    grads = gradients((96, 64), 9, torch.float32)
    runs = []
    for how in ("whole", "dict", "file"):
        param = one((96, 64), torch.float32)
        optimizer = FAMILY[name]([("p", param)])
        stepped(optimizer, param, grads[:5])
        if how != "whole":
            again = FAMILY[name]([("p", param)])
            if how == "dict":
                again.load_state_dict(optimizer.state_dict())
            else:
                optstate.save(optimizer, tmp_path / "state.safetensors")
                optstate.load(again, tmp_path / "state.safetensors")
            optimizer = again
        runs.append(stepped(optimizer, param, grads[5:]))
    assert all(map(torch.equal, runs[0], runs[1]))
    assert all(map(torch.equal, runs[0], runs[2]))
