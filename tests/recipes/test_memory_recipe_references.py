"""Adam-mini, CAME, SM3, Lion and Adam with a factored second moment beside the implementations of their authors.

Both sides step along the same gradients from the same fp32 weights. They do the same arithmetic in another order,
so after 20 steps their total updates differ by some units of 2**-24 per operation: `CLOSE` allows 4e-6 of the
total update. Everything that is meant to differ is asserted, not tolerated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import lion_pytorch
import pytest
import pytorch_optimizer
import torch
from adam_mini import Adam_mini
from came_pytorch import CAME
from SM3 import SM3
from torch import Tensor, nn

from optstate import NonFiniteGradientError, recipes
from optstate.stores import Block8, Full, Store
from optstate.weights import Plain
from tests.support.trajectories import STEPS, Shape, apart, follow, gradient, parameters

pytestmark = pytest.mark.peer

CLOSE = 4e-6
SHAPES: list[Shape] = [(24, 16), (3, 40), (7, 1), (1, 9), (4, 6, 5), (3, 4, 2, 3), (16,), ()]
Build = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def difference(ours: Build, theirs: Build, shapes: list[Shape]) -> float:
    left, right = parameters(*shapes), parameters(*shapes)
    return apart(follow(ours(left), left), follow(theirs(right), right))


LARGE: Shape = (1030, 1021)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda p: recipes.CAME(p, lr=1e-2), lambda p: CAME(p, lr=1e-2)),
        (recipes.SM3, SM3),
        (lambda p: recipes.SM3(p, momentum=0.9), lambda p: SM3(p, momentum=0.9)),
        (lambda p: recipes.Lion(p, lr=1e-2), lambda p: lion_pytorch.Lion(p, lr=1e-2)),
        (
            lambda p: recipes.AdamMini([{"params": p, "role": "norm"}], lr=1e-2),
            lambda p: official([("unknown", p[0])], lr=1e-2),
        ),
        (lambda p: recipes.AdamMini(p, lr=1e-2), lambda p: official([("mlp", p[0])], lr=1e-2)),
    ],
    ids=["came", "sm3", "sm3 momentum", "lion", "adam-mini tensor", "adam-mini rows"],
)
def test_parameters_of_several_chunks(ours: Build, theirs: Build) -> None:
    """More than 2**19 elements are stepped in slices; sums, maxima and means are still over the whole parameter."""
    (p,), (q,) = parameters(LARGE), parameters(LARGE)
    assert apart(follow(ours([p]), [p], steps=3), follow(theirs([q]), [q], steps=3)) <= CLOSE


def test_heads_of_several_chunks() -> None:
    """Seven rows a head do not divide a slice; dim * dim / n_heads is seven rows where n_heads is dim / 7."""
    shape = (1036, 1036)
    (p,), (q,) = parameters(shape), parameters(shape)
    ours = recipes.AdamMini([{"params": [("query", p)], "role": "query_key", "head_size": 7}], lr=1e-2)
    theirs = official([("query", q)], lr=1e-2, dim=1036, n_heads=148)
    assert apart(follow(ours, [p], steps=3), follow(theirs, [q], steps=3)) <= CLOSE
    assert ours.state[p]["exp_avg_sq.mean"].shape == (148,)


# --- CAME ------------------------------------------------------------------------------------------------------------

CAMES: dict[str, dict[str, Any]] = {
    "defaults": {"lr": 1e-2},
    "decayed": {"lr": 1e-2, "weight_decay": 0.3},
    "other numbers": {"lr": 5e-3, "betas": (0.8, 0.95, 0.99), "clip_threshold": 0.5, "eps": (1e-3, 1e-2)},
}


@pytest.mark.parametrize("name", CAMES)
def test_came_is_the_official_one(name: str) -> None:
    options = CAMES[name]
    assert difference(lambda p: recipes.CAME(p, **options), lambda p: CAME(p, **options), SHAPES) <= CLOSE


@pytest.mark.parametrize("name", CAMES)
def test_came_is_pytorch_optimizers_in_fp32(name: str) -> None:
    def reference(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        options = dict(CAMES[name])
        eps = options.pop("eps", (1e-30, 1e-16))
        return pytorch_optimizer.CAME(params, eps1=eps[0], eps2=eps[1], **options)

    assert difference(lambda p: recipes.CAME(p, **CAMES[name]), reference, SHAPES) <= CLOSE


def test_came_keeps_no_instability_of_vectors() -> None:
    """One dimension: a full second moment and no second stage, as the official code."""
    matrix, vector = parameters((24, 16), (16,))
    state = recipes.CAME([matrix, vector]).state
    kept = {"exp_avg", "exp_avg_sq.row", "exp_avg_sq.col", "step"}
    assert set(state[matrix]) > kept
    assert sum(t.numel() for k, t in state[matrix].items() if k not in kept) == 24 + 16
    assert set(state[vector]) == {"exp_avg", "exp_avg_sq", "step"}


def test_came_corrects_no_bias() -> None:
    """At step 1 a vector's u is g / sqrt(0.001 g**2), 31.6 everywhere, clipped to RMS 1, and m = (1 - 0.9) u."""
    (vector,) = parameters((16,))
    (update,) = follow(recipes.CAME([vector], lr=1.0), [vector], steps=1)
    torch.testing.assert_close(update.abs(), torch.full((16,), 0.1), rtol=1e-5, atol=0.0)


def test_came_survives_rows_without_gradient() -> None:
    """Row sums of zero: both second moments sit on their eps, the update is zero, as in the official code."""
    left, right = parameters((24, 16)), parameters((24, 16))
    ours, theirs = recipes.CAME(left, lr=1e-2), CAME(right, lr=1e-2)
    before = left[0].detach().clone()
    for step in range(STEPS):
        for (p,), optimizer in ((left, ours), (right, theirs)):
            p.grad = gradient((24, 16), step)
            p.grad[5:8] = 0.0
            optimizer.step()
    assert torch.equal(left[0][5:8], before[5:8])
    assert apart([left[0] - before], [right[0] - before]) <= CLOSE


def test_came_keeps_fp32_statistics_of_bf16_weights_where_pytorch_optimizer_keeps_bf16() -> None:
    """A bf16 second moment with beta 0.999 stops moving; the official code keeps fp32, and so do we."""
    state = {}
    for build in (recipes.CAME, CAME, pytorch_optimizer.CAME):
        (p,) = parameters((24, 16), dtype=torch.bfloat16)
        optimizer = build([p], lr=1e-2)
        follow(optimizer, [p], steps=1)
        state[build] = {t.dtype for k, t in optimizer.state[p].items() if isinstance(t, Tensor) and k != "RMS"}
    assert state == {recipes.CAME: {torch.float32}, CAME: {torch.float32}, pytorch_optimizer.CAME: {torch.bfloat16}}


def test_came_on_bf16_weights_is_the_official_one_rounded_once() -> None:
    """The official code steps bf16 weights in bf16: lr * update is rounded before it is subtracted. Ours is the fp32
    result rounded, so one step from the same weights is compared with the official step of an fp32 copy."""
    (low,), (exact,) = parameters((24, 16), dtype=torch.bfloat16), parameters((24, 16))
    exact.data = low.detach().float()
    ours, theirs = recipes.CAME([low], lr=1e-2, weights=Plain()), CAME([exact], lr=1e-2)
    wrong = 0
    for step in range(STEPS):
        low.grad = gradient((24, 16), step).bfloat16()
        exact.grad = low.grad.float()
        ours.step()
        theirs.step()
        wrong += int((low.detach() != exact.detach().bfloat16()).sum())
        exact.data = low.detach().float()
    assert wrong <= 0.005 * STEPS * low.numel()  # fp32 differences at a rounding boundary


# --- SM3 -------------------------------------------------------------------------------------------------------------

SM3S: dict[str, dict[str, Any]] = {
    "defaults": {},
    "momentum": {"lr": 0.05, "momentum": 0.9},
    "eps": {"lr": 0.05, "eps": 1e-3},
}


@pytest.mark.parametrize("reference", [SM3, pytorch_optimizer.SM3], ids=["torch-sm3", "pytorch_optimizer"])
@pytest.mark.parametrize("name", SM3S)
def test_sm3_is_the_reference(name: str, reference: Callable[..., torch.optim.Optimizer]) -> None:
    """Cover sets are the slices along every dimension, also of 3-D and 4-D parameters."""
    assert difference(lambda p: recipes.SM3(p, **SM3S[name]), lambda p: reference(p, **SM3S[name]), SHAPES) <= CLOSE


def test_sm3_accumulators_are_the_references_maxima() -> None:
    (left,), (right,) = parameters((24, 16)), parameters((24, 16))
    ours, theirs = recipes.SM3([left]), SM3([right])
    follow(ours, [left])
    follow(theirs, [right])
    kept = sorted((t for t in ours.state[left].values() if isinstance(t, Tensor)), key=Tensor.numel)
    assert [tuple(t.shape) for t in kept] == [(16,), (24,)]
    torch.testing.assert_close(kept[1], theirs.state[right]["accumulator_0"].flatten())
    torch.testing.assert_close(kept[0], theirs.state[right]["accumulator_1"].flatten())


def test_sm3_without_momentum_keeps_no_buffer_where_pytorch_optimizer_does() -> None:
    (p,), (q,) = parameters((24, 16)), parameters((24, 16))
    reference = pytorch_optimizer.SM3([q])
    follow(reference, [q], steps=1)
    assert reference.state[q]["momentum_buffer"].numel() == q.numel()
    optimizer = recipes.SM3([p])
    assert optimizer.state_nbytes() == 4 * (24 + 16)
    assert recipes.SM3(parameters((24, 16)), momentum=0.9).state_nbytes() == 4 * (24 + 16 + 24 * 16)


def test_sm3_stays_where_no_gradient_has_been() -> None:
    """0 * rsqrt(0 + 1e-30) is zero: coordinates that never had a gradient do not move."""
    (p,) = parameters((24, 16))
    before = p.detach().clone()
    optimizer = recipes.SM3([p])
    p.grad = torch.zeros(24, 16)
    p.grad[3, 2:] = 1.0
    optimizer.step()
    moved = p.detach() != before
    assert moved[3, 2:].all()
    assert moved.sum() == 14


# --- Adam-mini -------------------------------------------------------------------------------------------------------

DIM, HEADS = 32, 4
HEAD = DIM // HEADS
# name in the official code, which chooses blocks by its substrings: shape, our declaration, blocks of one number each
PARTS: dict[str, tuple[Shape, dict[str, Any], int]] = {
    "embed_tokens.weight": ((50, DIM), {"role": "embedding"}, 50),
    "layers.0.q_proj.weight": ((DIM, DIM), {"role": "query_key", "head_size": HEAD}, HEADS),
    "layers.0.k_proj.weight": ((DIM // 2, DIM), {"role": "query_key", "head_size": HEAD}, HEADS // 2),
    "layers.0.v_proj.weight": ((DIM // 2, DIM), {}, DIM // 2),
    "layers.0.o_proj.weight": ((DIM, DIM), {}, DIM),
    "layers.0.mlp.up.weight": ((48, DIM), {}, 48),
    "layers.0.mlp.up.bias": ((48,), {"role": "bias"}, 48),
    "layers.0.norm.weight": ((DIM,), {"role": "norm"}, 1),
    "lm_head.weight": ((50, DIM), {"role": "head"}, 50),
}


def declared(params: list[nn.Parameter], weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Our groups for `PARTS`: blocks by role. The official code does not decay norms and biases; neither do these."""
    undecayed = ("norm", "bias")
    return [
        {
            "params": [(name, p)],
            **role,
            "weight_decay": 0.0 if role.get("role") in undecayed else weight_decay,
        }
        for (name, (_, role, _)), p in zip(PARTS.items(), params, strict=True)
    ]


def official(named: list[tuple[str, nn.Parameter]], **options: Any) -> Adam_mini:
    return Adam_mini(named, **{"dim": DIM, "n_heads": HEADS, "verbose": False, **options})


ADAM_MINIS: dict[str, dict[str, Any]] = {
    "defaults": {"lr": 1e-2},
    "decayed": {"lr": 1e-2, "weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-5},
}


@pytest.mark.parametrize("name", ADAM_MINIS)
def test_adam_mini_is_the_official_one_where_roles_name_the_same_blocks(name: str) -> None:
    options = ADAM_MINIS[name]
    shapes = [shape for shape, _, _ in PARTS.values()]
    left, right = parameters(*shapes), parameters(*shapes)
    ours = recipes.AdamMini(declared(left, options.get("weight_decay", 0.0)), **options)
    theirs = official(list(zip(PARTS, right, strict=True)), **options)
    assert apart(follow(ours, left), follow(theirs, right)) <= CLOSE
    for (part, (_, _, blocks)), p in zip(PARTS.items(), left, strict=True):
        second = [t for key, t in ours.state[p].items() if key.startswith("exp_avg_sq")]
        assert sum(t.numel() for t in second) == blocks, part


def test_adam_mini_keeps_the_first_moment_in_the_parameters_shape() -> None:
    """The official code keeps it in the shape of its view: a converter would have to know the heads."""
    (p,), (q,) = parameters((DIM, DIM)), parameters((DIM, DIM))
    theirs = official([("q_proj.weight", q)])
    follow(theirs, [q], steps=1)
    assert theirs.state[q]["m"].shape == (HEADS, DIM * HEAD)
    ours = recipes.AdamMini([{"params": [("q_proj.weight", p)], "role": "query_key", "head_size": HEAD}])
    assert ours.state[p]["exp_avg"].shape == (DIM, DIM)


def test_adam_mini_takes_whole_heads_where_the_official_code_takes_halves() -> None:
    """Four heads of 32 rows in a model of width 64: dim / n_heads is 16, so the official blocks are half heads."""
    rows, width, head = 128, 64, 32
    (p,), (q,) = parameters((rows, width)), parameters((rows, width))
    theirs = official([("q_proj.weight", q)], dim=width, n_heads=4)
    wrong = follow(theirs, [q])
    assert theirs.state[q]["vmean"].numel() == 8  # and no error
    ours = recipes.AdamMini([{"params": [("q_proj.weight", p)], "role": "query_key", "head_size": head}])
    right = follow(ours, [p])
    assert sum(t.numel() for k, t in ours.state[p].items() if k.startswith("exp_avg_sq")) == 4
    assert apart(right, wrong) > 0.05
    # Told of eight heads, it is wrong the same way: the official blocks are 16 rows.
    (r,) = parameters((rows, width))
    halves = recipes.AdamMini([{"params": [("q_proj.weight", r)], "role": "query_key", "head_size": 16}])
    assert apart(follow(halves, [r]), wrong) <= CLOSE


def test_adam_mini_refuses_a_head_size_that_does_not_divide_the_rows() -> None:
    (p,) = parameters((30, 16))
    with pytest.raises(ValueError, match=r"q_proj.*30.*8|q_proj.*8.*30"):
        recipes.AdamMini([{"params": [("q_proj.weight", p)], "role": "query_key", "head_size": 8}])


@pytest.mark.parametrize(
    ("name", "shape", "error"),
    [("mlp.scale", (16,), IndexError), ("query_norm.weight", (16,), RuntimeError)],
)
def test_adam_mini_takes_vectors_whatever_their_name(name: str, shape: Shape, error: type[Exception]) -> None:
    """The official code reads a block rule for matrices out of these names and breaks."""
    (p,), (q,) = parameters(shape), parameters(shape)
    with pytest.raises(error):
        follow(official([(name, q)]), [q], steps=1)
    follow(recipes.AdamMini([{"params": [(name, p)], "role": "norm"}]), [p], steps=1)
    assert p.isfinite().all()


@pytest.mark.parametrize(
    ("name", "shape", "role", "blocks", "officials"),
    [("adapter.down.weight", (16, 8), {}, 16, 1), ("norm.bias", (16,), {"role": "norm"}, 1, 16)],
)
def test_adam_mini_blocks_do_not_depend_on_names(
    name: str, shape: Shape, role: dict[str, Any], blocks: int, officials: int
) -> None:
    """A matrix of unknown name is one block in the official code, rows here; the bias of a norm is one block here."""
    (p,), (q,) = parameters(shape), parameters(shape)
    theirs = official([(name, q)])
    follow(theirs, [q], steps=1)
    assert theirs.state[q]["v" if "bias" in name else "vmean"].numel() == officials
    ours = recipes.AdamMini([{"params": [(name, p)], **role}])
    assert sum(t.numel() for k, t in ours.state[p].items() if k.startswith("exp_avg_sq")) == blocks


def test_adam_mini_decays_what_is_not_exempted_whatever_its_name() -> None:
    """The official code never decays a parameter whose name contains "norm", "bias" or "ln", such as "vulnerable"."""
    name, shape = "vulnerable.mlp.weight", (16, 8)
    (p,), (q,), (r,) = parameters(shape), parameters(shape), parameters(shape)
    undecayed = follow(official([(name, q)], lr=1e-2, weight_decay=0.5), [q])
    assert apart(follow(recipes.AdamMini([(name, r)], lr=1e-2), [r]), undecayed) <= CLOSE
    decayed = follow(recipes.AdamMini([(name, p)], lr=1e-2, weight_decay=0.5), [p])
    assert apart(decayed, undecayed) > 0.05


# --- Adam with an 8-bit first and a factored second moment -----------------------------------------------------------


def factored_adam(
    weight: Tensor, steps: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> Tensor:
    """The total update in fp64 from the formulas: Adam's, with v replaced by row x col / mean of its means' averages.

    This is the factored variant of 4-bit Adam (arXiv 2309.01507) with a full first moment: no eps inside the square,
    no clipping, both moments corrected for starting at zero.
    """
    shape = tuple(weight.shape)
    p, m = weight.double(), torch.zeros(shape, dtype=torch.float64)
    v, row, col = m.clone(), 0.0, 0.0
    for step in range(steps):
        g = gradient(shape, step).double()
        m = betas[0] * m + (1 - betas[0]) * g
        if len(shape) < 2:
            v = betas[1] * v + (1 - betas[1]) * g * g
        else:
            row = betas[1] * row + (1 - betas[1]) * (g * g).mean(-1, keepdim=True)
            col = betas[1] * col + (1 - betas[1]) * (g * g).mean(-2, keepdim=True)
            v = row * col / row.mean(-2, keepdim=True)
        c1, c2 = 1 - betas[0] ** (step + 1), 1 - betas[1] ** (step + 1)
        p = p * (1 - lr * weight_decay) - lr * (m / c1) / ((v / c2).sqrt() + eps)
    return (p - weight.double()).float()


@pytest.mark.parametrize("shape", [(24, 16), (4, 6, 5), (7, 1), (16,)], ids=str)
def test_adam_with_a_factored_second_moment_follows_its_formulas(shape: Shape) -> None:
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.3}
    (p,) = parameters(shape)
    expected = factored_adam(p.detach(), STEPS, **options)
    assert apart(follow(recipes.AdamFactor([p], first=Full(), **options), [p]), [expected]) <= CLOSE


@pytest.mark.parametrize("first", [Full(), Block8()], ids=str)
def test_factored_adam_of_several_chunks(first: Store) -> None:
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    (p,) = parameters(LARGE)
    expected = factored_adam(p.detach(), 3, **options)
    distance = apart(follow(recipes.AdamFactor([p], first=first, **options), [p], steps=3), [expected])
    assert distance <= (CLOSE if first == Full() else 3e-2)


def test_adam_with_an_8_bit_first_moment_stays_near_the_full_one() -> None:
    """A code of the signed map is at most 6 % off in the top decade, 0.7 % of the block's largest value."""
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    (p,) = parameters((64, 128))
    expected = factored_adam(p.detach(), STEPS, **options)
    optimizer = recipes.AdamFactor([p], **options)
    distance = apart(follow(optimizer, [p]), [expected])
    assert 1e-3 < distance < 3e-2
    assert optimizer.state[p]["exp_avg.codes"].dtype == torch.uint8
    assert optimizer.state_nbytes() == 64 * 128 + 4 * 32 + 4 * (64 + 128)


def test_a_square_that_overflows_leaves_no_nan() -> None:
    """1e30 is a finite gradient with an infinite square: means of infinity over infinity must not reach the weights."""
    for recipe in (recipes.AdamFactor, recipes.AdamMini, recipes.CAME):
        (p,) = parameters((64, 128))
        optimizer = recipe([p])
        follow(optimizer, [p], steps=1)
        p.grad = gradient((64, 128), 1)
        p.grad[3, 5] = 1e30
        with suppress(NonFiniteGradientError):
            optimizer.step()
        assert p.isfinite().all(), recipe


def test_adam_factor_of_vectors_is_torchs_adamw() -> None:
    assert (
        difference(lambda p: recipes.AdamFactor(p, lr=1e-2), lambda p: torch.optim.AdamW(p, lr=1e-2), [(16,), ()])
        <= CLOSE
    )


# --- Lion ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ours", [recipes.Lion, recipes.Lion8bit])
def test_lion_is_lion_pytorchs(ours: Callable[..., torch.optim.Optimizer]) -> None:
    """Below 4096 elements `Lion8bit` keeps its momentum in fp32: the same rule to the last sign."""
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.3}
    assert difference(lambda p: ours(p, **options), lambda p: lion_pytorch.Lion(p, **options), SHAPES) <= CLOSE


def test_lion_keeps_fp32_momentum_of_bf16_weights_where_lion_pytorch_keeps_bf16() -> None:
    (p,), (q,) = parameters((24, 16), dtype=torch.bfloat16), parameters((24, 16), dtype=torch.bfloat16)
    theirs = lion_pytorch.Lion([q])
    follow(theirs, [q], steps=1)
    assert theirs.state[q]["exp_avg"].dtype == torch.bfloat16
    assert recipes.Lion8bit([p]).state[p]["exp_avg"].dtype == torch.float32


def test_lion_does_not_move_where_the_mix_is_exactly_zero() -> None:
    """sign(0) = 0, in both."""
    (p,), (q,) = parameters((24, 16)), parameters((24, 16))
    before = p.detach().clone()
    for weight, optimizer in ((p, recipes.Lion8bit([p], lr=math.pi)), (q, lion_pytorch.Lion([q], lr=math.pi))):
        weight.grad = torch.zeros(24, 16)
        weight.grad[0] = 1.0
        optimizer.step()
        assert torch.equal(weight[1:], before[1:])
        torch.testing.assert_close(weight[0], before[0] - math.pi)
