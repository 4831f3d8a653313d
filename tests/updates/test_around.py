"""Chains inside transforms, statistics of other tensors, and requests about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import optstate
from optstate import checkpoint, stores, updates
from optstate.checkpoint import CheckpointError
from optstate.optimizer.chain_step import context, run_chain
from optstate.spec import ParamSpec, Region
from optstate.stores import Full, Guard, NonFiniteGradientError, Partial, Requests, Slot, Statistic, Whole, run_alone
from optstate.stores.requests import about
from optstate.testing.devices import CutParameter
from optstate.updates import Around, Context, State, Transform, Update

SPEC = ParamSpec(name="w", shape=(12, 40), dtype=torch.float32)
IN_ROWS = ParamSpec(name="w", shape=(12, 40), dtype=torch.float32, region=Region((12, 40), (4, 0), (4, 40), (3, 1)))

Build = Callable[[], Transform]

TRANSFORMS: dict[str, Build] = {
    "singular vectors": lambda: updates.project(updates.scale_by_adam(), rank=4, gap=3),
    "randomised": lambda: updates.project(updates.scale_by_adam(), rank=4, gap=3, projection="randomized"),
    "power": lambda: updates.project(updates.scale_by_adam(), rank=4, gap=3, projection="power"),
    "random": lambda: updates.project(updates.scale_by_adam(), rank=4, gap=3, projection="random"),
    "residual": lambda: updates.project(
        updates.scale_by_adam(), rank=4, gap=3, residual=updates.momentum(beta=updates.hyper("kept", 0.5))
    ),
    "factored inside": lambda: updates.project(updates.scale_by_rms(stores.Factored()), rank=4, gap=3),
    "clipped inside": lambda: updates.project(
        updates.chain(updates.scale_by_adam(), updates.clip_by_rms(0.5)), rank=4, gap=3
    ),
    "channels": lambda: updates.scale_by_projected(updates.scale_by_adam(), rank=4, gap=3),
    "tensor": lambda: updates.scale_by_projected(
        updates.scale_by_adam(), rank=1, gap=3, projection="svd", kind="tensor"
    ),
    "residual norm": lambda: updates.scale_by_residual_norm(updates.scale_by_adam(), rank=4, gap=3),
    "anew": lambda: updates.project_anew(updates.scale_by_adam(betas=(0.9, 0.99)), rank=4),
    "eigenbasis": lambda: updates.eigenbasis(updates.scale_by_adam(), every=2),
    "orthogonal": lambda: updates.chain(updates.momentum(nesterov=True), updates.orthogonalize()),
    "rows": updates.normalize_rows,
    "columns": updates.normalize_columns,
}


def optimizer_of(params: Any, transform: Transform) -> optstate.Optimizer:
    return optstate.Optimizer(params, optstate.chain(transform, updates.add_decayed_weights(0.1)), lr=1e-2)


# --- specifications of other tensors ------------------------------------------------------------------------------


def test_another_tensor_is_split_along_what_it_shares() -> None:
    low = IN_ROWS.like((12, 5), (0, None))
    assert low.region == Region((12, 5), (4, 0), (4, 5), (3, 1))
    assert (low.local_shape, low.dims, low.name, low.dtype) == ((4, 5), (0, None), "w", torch.float32)
    assert IN_ROWS.like((5, 40), (None, 1)).region is None
    assert IN_ROWS.like((), ()).region is None
    swapped = IN_ROWS.like((40, 12), (1, 0))
    assert swapped.region == Region((40, 12), (0, 4), (40, 4), (1, 3))
    assert swapped.like((12, 3), (1, None)).dims == (0, None)  # of the parameter, not of the tensor between
    assert low.along((-1, -2)) == (None, 0)
    assert SPEC.like((12, 5), (0, None)).region is None
    whole = torch.arange(60.0).view(12, 5)
    assert torch.equal(low.part(whole), whole[4:8])


@pytest.mark.parametrize(("shape", "dims"), [((12, 5), (0,)), ((13, 5), (0, None)), ((12, 12), (0, 0)), ((5,), (2,))])
def test_a_tensor_that_does_not_fit_is_refused(shape: tuple[int, ...], dims: tuple[int | None, ...]) -> None:
    with pytest.raises((ValueError, IndexError)):
        SPEC.like(shape, dims)


def test_sums_over_another_tensor_become_sums_over_the_parameter() -> None:
    low = IN_ROWS.like((5, 12), (None, 0))
    local = torch.ones(5, 4)

    def ask() -> Requests[None]:
        yield local
        yield Partial(local, -1), Partial(local, 0)
        yield stores.Largest(local, (0, 1))
        yield Whole(local, low)

    asked = list(about(ask(), low))
    assert [asked[0].dim, asked[1][0].dim, asked[1][1].dim, asked[2].dim] == [(0,), (0,), (), (0,)]
    assert all(request.settled for request in (asked[0], *asked[1], asked[2]))
    assert next(about((request for request in asked[:1]), low)) is asked[0]  # not once more
    assert isinstance(asked[3], Whole)


# --- on devices that have parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [(2, 1), (5, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_parts_of_a_parameter_are_stepped_as_the_whole_is(name: str, parts: tuple[int, int]) -> None:
    """Five rows' parts of 12 rows are uneven, and the last is empty. Within a few units in the last place."""
    for shape in ((24, 10), (12, 20)):
        cut = CutParameter(lambda groups: optimizer_of(groups, TRANSFORMS[name]()), shape, parts)
        before = cut.whole.detach().clone()
        cut.train(5)
        param, state = cut.joined()
        moved = (cut.whole.detach() - before).abs().max()
        # Products are summed in another order, and weights of about 3 are rounded to 2.4e-7. Newton and Schulz's
        # iteration is in bf16, whose rounding errors two matrices that differ by 1e-7 may have in other places.
        tolerance = 4e-2 if name == "orthogonal" else 2e-5
        assert (param - cut.whole.detach()).abs().max() <= 5e-7 + tolerance * moved
        assert {key: value.shape for key, value in state.items()} == {k: v.shape for k, v in cut.whole_state().items()}


class FromItsPart(Transform):
    """What is wrong on a part, and says so by asking for nothing."""

    elementwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        pass

    @property
    def hypers(self) -> tuple[Any, ...]:
        return ()

    def __call__(self, update: Update, state: State, ctx: Context) -> Update:
        return update.rescaled(1 / update.values(ctx).norm())


def test_a_transform_that_looks_at_its_part_alone_is_refused() -> None:
    transform = dataclass(frozen=True)(FromItsPart)()
    whole = nn.Parameter(torch.ones(4, 4))
    whole.grad = torch.ones(4, 4)
    optstate.Optimizer([("w", whole)], optstate.chain(transform), lr=0.5).step()
    assert torch.allclose(whole, torch.full((4, 4), 0.875))  # right where all of it is here
    cut = CutParameter(lambda groups: optstate.Optimizer(groups, optstate.chain(transform), lr=0.1), (12, 20), (2, 1))
    with pytest.raises(TypeError, match="FromItsPart is not elementwise, and asks for nothing of the other parts"):
        cut.train(1)


# --- one process --------------------------------------------------------------------------------------------------


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 24, bias=False), nn.Linear(24, 12, bias=False))


def loss_of(net: nn.Module, step: int) -> Tensor:
    x = torch.randn(8, 10, generator=torch.Generator().manual_seed(step))
    return net(x).square().mean() * 100


@pytest.mark.parametrize("name", TRANSFORMS)
def test_fused_and_resumed_runs_give_the_same_bits(name: str, tmp_path: Path) -> None:
    ends = []
    for way in ("stepped", "fused", "state_dict", "file"):
        net = model()
        optimizer = optimizer_of(net.named_parameters(), TRANSFORMS[name]())
        if way == "fused":
            optstate.fuse_backward(optimizer)
        for step in range(6):
            if step == 3 and way in ("state_dict", "file"):
                later = optimizer_of(net.named_parameters(), TRANSFORMS[name]())
                if way == "state_dict":
                    later.load_state_dict(optimizer.state_dict())
                else:
                    optstate.save(optimizer, tmp_path / "o.safetensors")
                    assert checkpoint.check(tmp_path / "o.safetensors").issues == ()
                    optstate.load(later, tmp_path / "o.safetensors")
                optimizer = later
            loss_of(net, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([param.detach() for param in net.parameters()])
    for end in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(end, ends[0], strict=True))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_gradient_that_is_not_finite_changes_nothing(name: str) -> None:
    """Nor where the host does not know it yet: no decomposition raises, and everything stays."""
    param = nn.Parameter(torch.randn(12, 20))
    optimizer = optimizer_of([("w", param)], TRANSFORMS[name]())
    for bad in (0, 3):  # at a step that makes a basis, and at another
        for step in range(bad):
            param.grad = torch.randn(12, 20, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        before = {"": param.detach().clone()} | {
            key: value.clone() for key, value in optimizer.state[param].items() if isinstance(value, Tensor)
        }
        param.grad = torch.full((12, 20), float("nan"))
        with pytest.raises(NonFiniteGradientError):
            optimizer.step()
        (plan,), state = optimizer.plan(), optimizer.state[param] or optimizer.runner.state_of(param)
        guard = Guard("w", param.grad, deferred=True)
        ctx = context(plan, state, param.detach(), param.grad, optimizer.param_groups[0], state["step"] + 1, guard)
        with torch.no_grad():
            run_alone(run_chain(plan, state, ctx))
        after = {"": param.detach()} | {key: value for key, value in state.items() if isinstance(value, Tensor)}
        assert all(torch.equal(after[key], value) for key, value in before.items())


def test_the_file_says_what_the_statistics_are_of(tmp_path: Path) -> None:
    path = tmp_path / "o.safetensors"
    param = nn.Parameter(torch.randn(12, 20))

    def build(gap: int = 3) -> optstate.Optimizer:
        inner = updates.scale_by_adam()
        return optstate.Optimizer([("w", param)], optstate.chain(updates.project(inner, rank=4, gap=gap)), lr=1e-2)

    optimizer = build()
    param.grad = torch.randn(12, 20)
    optimizer.step()
    optstate.save(optimizer, path)
    (described,) = checkpoint.open(path).document.parameters
    words = "project(rank=4, gap=3, scale=0.25, projection=svd, inner=[scale_by_adam])"
    assert described.chain == words
    (transform,) = described.transforms.transforms
    assert transform.name == "project"
    assert transform.inner().has("scale_by_adam")
    assert {name: (slot.shape, slot.within, slot.of) for name, slot in described.slots.items()} == {
        "projector": ((12, 4), words, ""),
        "exp_avg": ((4, 20), words, "turned"),
        "exp_avg_sq": ((4, 20), words, "turned_square"),
    }
    optstate.load(build(), path)
    with pytest.raises(CheckpointError, match="another recipe"):  # neither into another gap nor into Adam
        optstate.load(build(gap=4), path)
    adam = optstate.Optimizer([("w", param)], optstate.chain(updates.scale_by_adam()), lr=1e-2)
    with pytest.raises(CheckpointError):
        optstate.load(adam, path, allow_lossy=True)


def test_a_chain_inside_sees_no_parameter() -> None:
    for inner in (updates.scale_by_param_rms(), updates.scale_by_learning_rate()):
        with pytest.raises(ValueError, match="sees no parameter and no learning rate"):
            updates.project(inner)


@pytest.mark.parametrize(
    "wrong", [{"rank": 0}, {"rank": 2.0}, {"gap": 0}, {"gap": True}, {"projection": "eigen"}], ids=str
)
def test_wrong_numbers_are_refused(wrong: Mapping[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name}={wrong[name]!r}: give"):
        updates.project(updates.scale_by_adam(), **wrong)


def test_other_shapes_than_matrices_are_refused_by_name() -> None:
    for transform in (TRANSFORMS["random"](), TRANSFORMS["power"]()):
        with pytest.raises(ValueError, match="'bias' has 1 dimensions: give it another chain"):
            optimizer_of([("bias", nn.Parameter(torch.ones(4)))], transform)


# --- the statistics themselves ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1000, 600_000])
def test_an_average_moves_from_what_was_held(count: int) -> None:
    """Also where it is large enough to be moved in place."""
    spec = ParamSpec(name="w", shape=(count,), dtype=torch.float32)
    kept = torch.zeros(count)
    statistic = Statistic(Full(), {"": kept}, spec, Guard("w", kept))
    statistic.hold(torch.full((count,), 2.0))
    run_alone(statistic.ema(Update(torch.zeros(count)), 0.5))
    statistic.commit()
    assert torch.equal(kept, torch.ones(count))


def test_normal_noise_is_normal_and_the_same_in_parts() -> None:
    noise = stores.Noise("w", 1)
    numbers = noise.normal(100_000, torch.device("cpu"))
    assert abs(float(numbers.mean())) < 0.02  # six standard errors of a mean of 100,000
    assert abs(float(numbers.var()) - 1) < 0.03
    assert abs(float(numbers.pow(4).mean()) - 3) < 0.2
    part = stores.Noise("w", 1, region=Region((10, 20), (3, 0), (2, 20), (5, 1)))
    assert torch.equal(part.normal(40, torch.device("cpu")), noise.normal(200, torch.device("cpu"))[60:100])


class Both(Around):
    """Runs a chain on the sum over rows, and keeps the sum."""

    def space(self, spec: ParamSpec) -> ParamSpec:
        return spec.like(spec.shape[1:], (1,))

    def own_slots(self, spec: ParamSpec) -> dict[str, Slot]:
        return {"kept": Slot(stores.Block8(), spec=self.space(spec))}

    def __call__(self, update: Update, state: State, ctx: Context) -> Requests[Update]:
        sums = yield Partial(update.values(ctx).sum(0, keepdim=True), 0)
        state["kept"].hold(sums[0].clone())
        step = yield from self.inside(sums[0], state, ctx)
        return Update(step.values(ctx).expand(ctx.param.shape).contiguous())


def test_a_strangers_transform_keeps_what_it_declares() -> None:
    param = nn.Parameter(torch.zeros(6, 5000))
    optimizer = optstate.Optimizer([("w", param)], optstate.chain(Both(updates.scale_by_adam())), lr=1.0)
    param.grad = torch.ones(6, 5000)
    optimizer.step()
    assert torch.allclose(param, torch.tensor(-1.0))  # Adam's first step is the sign
    assert torch.allclose(optimizer.state[param]["exp_avg"], torch.tensor(0.6))
    assert optimizer.state_nbytes() == 4 * 5000 * 2 + 5000 + 4 * 20
    assert "Both" in str(optimizer.plan())
