"""Resuming bit for bit: every recipe and store, times every way to write weights and dtype, stepped or fused in turn.

`python -m tests.optimizer.test_resume_matrix` prints what is tested.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import optstate
from adalomo import Adafactor, AdaLomo, Lomo
from optstate import recipes, stores, updates
from optstate.recipes import (
    CAME,
    SGD,
    SM3,
    SMMF,
    SOAP,
    SUMO,
    AdaMeM,
    AdamFactor,
    AdamMini,
    AdamSMN,
    AdamW,
    AdamW4bit,
    AdamW8bit,
    AdaRankGrad,
    AdEMAMix,
    Apollo,
    ApolloMini,
    Fira,
    GaLore,
    GaLore2,
    Grass,
    LDAdam,
    Lion,
    Lion8bit,
    MLorc,
    MLorcLion,
    Muon,
    Muon8bit,
    QGaLore,
    Scale,
    ScheduleFreeAdamW,
    SGDM8bit,
)
from optstate.stores import AxisMax, Block4, Block8, Factored, Float8, Full, Grouped, Store
from optstate.weights import Kahan, Plain, Split, StochasticRounding, Weights
from tests.optimizer.test_state_dict import through_a_file
from tests.support.models import assert_same, state_of, weights_of
from tests.support.pairwise import pairwise

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = {"fp32": FP32, "bf16": BF16, "fp16": FP16, "fp64": FP64}
LOW_BF16, STOCHASTIC = Full("bfloat16"), Full("bfloat16", stochastic=True)


class Case(NamedTuple):
    """A recipe by its registry name, the stores it was given, and how it is built from parameters."""

    recipe: str
    stores: str
    build: Callable[..., optstate.Optimizer]
    roles: bool = False

    def __str__(self) -> str:
        return f"{self.recipe}, {self.stores}" if self.stores else self.recipe


def with_stores(recipe: Any, **given: Any) -> Case:
    """A case of a recipe whose options say all there is to say."""
    words = ", ".join(f"{name}={value}" for name, value in given.items())
    return Case(recipe.__name__.lower(), words, lambda p, **kw: recipe(p, **given, **kw))


def as_updates(name: str, words: str, chain: updates.Chain) -> Case:
    return Case(name, words, lambda p, **kw: optstate.Optimizer(p, chain, **kw))


FIRST: list[Store] = [LOW_BF16, STOCHASTIC, Block8(), Block4(), Block4(rank1=True), Float8()]
SECOND: list[Store] = [
    LOW_BF16,
    STOCHASTIC,
    Block8(),
    Block4(),
    Block4(rank1=True),
    Float8(),
    Factored(),
    Grouped("row"),
    Grouped("tensor"),
    Grouped(3),
    AxisMax(),
]

CASES = [
    with_stores(AdaLomo),
    with_stores(AdaLomo, weight_decay=0.1, clip_grad_value=0.1),
    with_stores(Lomo),
    with_stores(Adafactor),
    Case("adafactor", "relative step", lambda p, lr, weights: Adafactor(p, weights=weights)),
    with_stores(Adafactor, beta1=0.9),
    with_stores(Adafactor, torch_compatible=True),
    with_stores(AdamW),
    *(with_stores(AdamW, first=store) for store in FIRST),
    *(with_stores(AdamW, second=store) for store in SECOND),
    with_stores(AdamW, first=Float8(), second=Block4(rank1=True)),
    with_stores(AdamW8bit),
    with_stores(AdamW4bit),
    Case("adamw4bit", "declared roles", AdamW4bit, roles=True),
    with_stores(AdamW4bit, rank1=True),
    with_stores(AdamFactor),
    with_stores(AdamFactor, first=Block4()),
    with_stores(AdamFactor, first=Full()),
    with_stores(AdamMini),
    Case("adammini", "declared roles", AdamMini, roles=True),
    Case("adammini", "declared roles, first=Block8()", lambda p, **kw: AdamMini(p, first=Block8(), **kw), roles=True),
    with_stores(SGD),
    with_stores(SGD, momentum=0.9, nesterov=True),
    with_stores(SGD, momentum=0.9, store=STOCHASTIC),
    with_stores(SGDM8bit),
    with_stores(Lion),
    with_stores(Lion, store=Float8()),
    with_stores(Lion8bit),
    with_stores(CAME),
    with_stores(CAME, first=Block8()),
    with_stores(SM3),
    with_stores(SM3, momentum=0.9),
    with_stores(SM3, momentum=0.9, store=Block8()),
    with_stores(AdamSMN),
    with_stores(AdEMAMix, slow=Block8()),
    with_stores(MLorc),
    with_stores(MLorcLion),
    with_stores(GaLore, rank=4, update_proj_gap=2),
    with_stores(GaLore2, rank=4, update_proj_gap=2),
    with_stores(QGaLore, rank=4, update_proj_gap=2),
    with_stores(Apollo, rank=4, update_proj_gap=2),
    with_stores(ApolloMini, update_proj_gap=2),
    with_stores(Fira, rank=4, update_proj_gap=2),
    with_stores(LDAdam, rank=4),
    with_stores(Grass, rank=4, update_proj_gap=2),
    with_stores(AdaRankGrad, rank=4, min_rank=2, update_proj_gap=2),
    with_stores(AdaMeM, rank=4, update_proj_gap=2),
    with_stores(Muon),
    with_stores(Muon8bit),
    with_stores(SMMF),
    with_stores(SOAP, precondition_frequency=2),
    with_stores(SUMO, rank=4, update_proj_gap=2),
    with_stores(Scale),
    with_stores(ScheduleFreeAdamW),
    as_updates("(rmsprop)", "Float8()", updates.chain(updates.scale_by_rms(Float8(), decay=updates.constant(0.99)))),
    as_updates("(adagrad)", "Full()", updates.chain(updates.scale_by_rss(Full()))),
]

WAYS: dict[torch.dtype, list[Weights]] = {
    FP32: [Plain()],  # what every other way becomes for fp32 and fp64
    FP64: [Plain()],
    BF16: [Plain(), StochasticRounding(3), Kahan(), Split(8), Split(16)],
    FP16: [Plain(), StochasticRounding(3), Kahan()],
}


def is_written(case: Case, way: Weights, dtype: str, fused: bool) -> bool:
    """Return whether weights of a dtype are written in a way of their own."""
    return way in WAYS[DTYPES[dtype]]


COMBINATIONS = pairwise(CASES, WAYS[BF16], list(DTYPES), (False, True), allowed=is_written)


class Tiny(nn.Module):
    """An embedding, a query and a key, a norm and a head: four matrices above 4096 elements, no whole number of blocks,
    and for the embedding and the head an odd number of elements."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.num_heads = 4
        self.embedding = nn.Embedding(87, 51)
        self.q_proj = nn.Linear(51, 96, bias=False)
        self.k_proj = nn.Linear(51, 96, bias=False)
        self.norm = nn.RMSNorm(51)
        self.head = nn.Linear(51, 87)
        self.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return self.head(self.norm(x + self.q_proj(x)[..., :51] * self.k_proj(x)[..., 45:]))


def build(case: Case, way: Weights, dtype: torch.dtype, fused: bool = False) -> tuple[Tiny, optstate.Optimizer, Any]:
    model = Tiny(dtype)
    params = optstate.declare_roles(model) if case.roles else model.named_parameters()
    optimizer = case.build(params, lr=1e-2, weights=way)
    if fused:
        optstate.fuse_backward(optimizer)
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def train(model: Tiny, optimizer: optstate.Optimizer, scheduler: Any, steps: range) -> None:
    for step in steps:
        ids = torch.randint(87, (2, 7), generator=torch.Generator().manual_seed(step))
        F.cross_entropy(model(ids).flatten(0, 1).float(), ids.flatten().roll(1)).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


@pytest.fixture(autouse=True)
def unsearched() -> Iterator[None]:
    """The search for engines among all live objects takes longer than the training."""
    with mock.patch("optstate.integrations.engines.refuse_live_objects"):
        yield


def words_of(combination: tuple[Case, Weights, str, bool]) -> str:
    case, way, dtype, fused = combination
    return f"{case}; {way}; {dtype}; {'fused' if fused else 'step'}"


@pytest.mark.slow
@pytest.mark.parametrize("combination", COMBINATIONS, ids=words_of)
def test_resuming_through_a_file_is_bit_exact(combination: tuple[Case, Weights, str, bool]) -> None:
    case, way, dtype, fused = combination
    parts = build(case, way, DTYPES[dtype], fused)
    train(*parts, range(2))
    saved = through_a_file(dict(zip(("model", "optimizer", "scheduler"), (p.state_dict() for p in parts), strict=True)))
    train(*parts, range(2, 3))

    resumed = build(case, way, DTYPES[dtype], fused)
    for part, key in zip(resumed, ("model", "optimizer", "scheduler"), strict=True):
        part.load_state_dict(saved[key])
    train(*resumed, range(2, 3))
    assert_same(weights_of(resumed[0]), weights_of(parts[0]))
    assert_same(state_of(resumed[1]), state_of(parts[1]))


def test_all_that_may_meet_does_in_some_combination() -> None:
    """Guards the choice: what the combinations stand for."""
    assert {(case, dtype) for case, _, dtype, _ in COMBINATIONS} == set(product(CASES, DTYPES))
    assert {(case, way) for case, way, _, _ in COMBINATIONS} == set(product(CASES, WAYS[BF16]))
    assert {(case, fused) for case, _, _, fused in COMBINATIONS} == set(product(CASES, (False, True)))
    written = [(way, dtype) for dtype in DTYPES for way in WAYS[DTYPES[dtype]]]
    assert {(way, dtype) for _, way, dtype, _ in COMBINATIONS} == set(written)


def test_every_recipe_and_every_store_is_among_the_cases() -> None:
    assert {case.recipe for case in CASES} >= set(recipes.names())
    kinds = {kind for kind in vars(stores).values() if isinstance(kind, type) and issubclass(kind, Store)} - {Store}
    plans = (param for case in CASES for param in build(case, Plain(), BF16)[1].plan())
    assert kinds <= {type(slot.store) for plan in plans for slot in plan.slots.values()}


@pytest.mark.parametrize("case", [case for case in CASES if "Block" in str(case) or "bit" in str(case)], ids=str)
def test_block_stores_are_really_used(case: Case) -> None:
    plan = build(case, Plain(), BF16)[1].plan()
    coded = {p.spec.name for p in plan if any(key.endswith(".codes") for key in p.fields)}
    assert coded == {"embedding.weight", "q_proj.weight", "k_proj.weight", "head.weight"}


@pytest.mark.parametrize("way", WAYS[BF16], ids=str)
def test_a_run_resumed_without_its_optimizer_goes_on_otherwise(way: Weights) -> None:
    """What the test above would show if nothing were restored."""
    parts = build(with_stores(AdamW8bit), way, BF16)
    train(*parts, range(2))
    resumed = build(with_stores(AdamW8bit), way, BF16)
    resumed[0].load_state_dict(copy.deepcopy(parts[0].state_dict()))
    train(*parts, range(2, 4))
    train(*resumed, range(2, 4))
    assert not torch.equal(resumed[0].head.weight, parts[0].head.weight)


# --- what is refused ------------------------------------------------------------------------------------------------


def adamw(weights: Weights = Plain(), **given: Any) -> tuple[Tiny, optstate.Optimizer, Any]:
    return build(with_stores(AdamW, **given), weights, BF16)


OTHERS: list[tuple[dict[str, Any], dict[str, Any], str, str]] = [
    ({"weights": Split(8)}, {"weights": Kahan()}, "weight in Split(bits=8)", "weight in Kahan()"),
    ({"weights": Kahan()}, {"weights": Split(16)}, "weight in Kahan()", "weight in Split(bits=16)"),
    ({"weights": Split(16)}, {"weights": Split(8)}, "weight in Split(bits=16)", "weight in Split(bits=8)"),
    ({"weights": Split(8)}, {"weights": Split(16)}, "weight in Split(bits=8)", "weight in Split(bits=16)"),
    ({}, {"weights": Split(8)}, "exp_avg_sq in Full(),", "weight in Split(bits=8)"),
    ({"weights": Kahan()}, {"weights": StochasticRounding()}, "weight in Kahan(),", "exp_avg_sq in Full()"),
    ({"first": Block8()}, {}, "exp_avg in Block8()", "exp_avg in Full()"),
    ({"first": Block8()}, {"first": Float8()}, "exp_avg in Block8()", "exp_avg in Float8()"),
    ({"first": Block8()}, {"first": Block8(64)}, "exp_avg in Block8()", "exp_avg in Block8(block=64)"),
    ({"first": LOW_BF16}, {"first": Full()}, "Full(dtype='bfloat16')", "exp_avg in Full()"),
    ({"second": Block4()}, {"second": Block8()}, "exp_avg_sq in Block4", "exp_avg_sq in Block8"),
    ({"second": Factored()}, {"second": Grouped("row")}, "exp_avg_sq in Factored()", "Grouped(by='row')"),
    ({"second": Grouped("row")}, {"second": Grouped(3)}, "Grouped(by='row')", "Grouped(by=3)"),
    ({"second": Factored()}, {"second": AxisMax()}, "exp_avg_sq in Factored()", "exp_avg_sq in AxisMax()"),
]
SAME_TENSORS = OTHERS[-1:]
"""Row and column vectors of the same names and shapes: only the header tells these apart."""

each_other = pytest.mark.parametrize("others", OTHERS, ids=lambda others: f"{others[2]} into {others[3]}")


def refuses(optimizer: optstate.Optimizer, model: nn.Module, saved: dict[str, Any]) -> str:
    """The message `saved` is refused with. Nothing may have changed."""
    before = (weights_of(model), state_of(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"]))
    with pytest.raises(ValueError, match="was saved") as error:
        optimizer.load_state_dict(saved)
    assert_same(weights_of(model), before[0])
    assert_same(state_of(optimizer), before[1])
    assert optimizer.state_dict()["param_groups"] == before[2]
    return str(error.value)


@each_other
def test_other_stores_and_weights_are_refused_with_both_named(others: Any) -> None:
    theirs, ours, there, here = others
    saver, loader = adamw(**theirs), adamw(**ours)
    train(*saver, range(2))
    train(*loader, range(3))
    message = refuses(loader[1], loader[0], through_a_file(saver[1].state_dict()))
    was, _, now = message.partition("here it is")
    assert "'embedding.weight'" in was
    assert there in was
    assert here in now


@each_other
def test_without_the_header_the_tensors_tell(others: Any) -> None:
    """Distributed checkpoints keep torch's two keys only."""
    saver, loader = adamw(**others[0]), adamw(**others[1])
    train(*saver, range(2))
    train(*loader, range(3))
    saved = {key: value for key, value in saver[1].state_dict().items() if key != "optstate"}
    if others in SAME_TENSORS:
        loader[1].load_state_dict(through_a_file(saved))
        assert_same(state_of(loader[1]), state_of(saver[1]))
    else:
        refuses(loader[1], loader[0], through_a_file(saved))


CODED = {
    "Block8": (Block8(), "exp_avg.codes", torch.uint8),
    "Block4": (Block4(), "exp_avg.codes", torch.uint8),
    "Float8": (Float8(), "exp_avg.codes", torch.float8_e4m3fn),
}


@pytest.mark.parametrize("way", [Kahan(), Split(8), Split(16)], ids=str)
@pytest.mark.parametrize("kind", CODED)
def test_codes_and_corrections_are_never_cast(kind: str, way: Weights) -> None:
    """torch's own loading would cast floating-point state to the parameter's dtype, and here refuses to be guessed."""
    store, key, dtype = CODED[kind]
    saver, loader = adamw(way, first=store), adamw(way, first=store)
    train(*saver, range(2))
    weight_key, weight_dtype = {
        Kahan(): ("weight.compensation", BF16),
        Split(8): ("weight.correction", torch.int8),
        Split(16): ("weight.correction", torch.int16),
    }[way]
    saved = through_a_file(saver[1].state_dict())
    for copied in (saved, copy.deepcopy(saved)):
        loader[1].load_state_dict(copied)
        for own, other in zip(state_of(loader[1]), state_of(saver[1]), strict=True):
            assert_same(own, other)
        first = state_of(loader[1])[0]
        assert (first[key].dtype, first[weight_key].dtype) == (dtype, weight_dtype)
    for name, right in ((key, dtype), (weight_key, weight_dtype)):
        wrong = copy.deepcopy(saved)
        wrong["state"][0][name] = wrong["state"][0][name].float()
        message = refuses(loader[1], loader[0], wrong)
        assert f"{name} was saved as torch.float32" in message
        assert f"here it is {right}" in message


# --- copies and distributed checkpoints -----------------------------------------------------------------------------


@pytest.mark.parametrize("way", [Kahan(), Split(8), Split(16)], ids=str)
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copied_optimizer_of_few_bits_trains_on_alone(copier: Any, way: Weights) -> None:
    model, optimizer, scheduler = build(with_stores(AdamW8bit), way, BF16)
    train(model, optimizer, scheduler, range(2))
    twin, twin_optimizer = copier((model, optimizer))
    unscheduled = mock.Mock()
    train(model, optimizer, unscheduled, range(2, 4))
    assert not torch.equal(twin.head.weight, model.head.weight)
    train(twin, twin_optimizer, unscheduled, range(2, 4))
    assert_same(weights_of(twin), weights_of(model))
    assert_same(state_of(twin_optimizer), state_of(optimizer))


@pytest.mark.parametrize("way", [Kahan(), Split(8), Split(16)], ids=str)
def test_distributed_checkpointing_round_trips_codes_and_corrections_in_one_process(way: Weights) -> None:
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    parts, resumed = (build(with_stores(AdamW8bit), way, BF16) for _ in range(2))
    train(*parts, range(2))
    weights, state = copy.deepcopy(get_state_dict(parts[0], parts[1]))
    assert {v.dtype for s in state["state"].values() for v in s.values() if isinstance(v, Tensor)} >= {torch.uint8}
    set_state_dict(resumed[0], resumed[1], model_state_dict=weights, optim_state_dict=state)
    assert_same(state_of(resumed[1]), state_of(parts[1]))
    resumed[2].load_state_dict(parts[2].state_dict())
    for run in (parts, resumed):
        train(*run, range(2, 4))
    assert_same(weights_of(resumed[0]), weights_of(parts[0]))
    assert_same(state_of(resumed[1]), state_of(parts[1]))


@pytest.mark.parametrize("fused", [False, True], ids=["step", "fused"])
@pytest.mark.parametrize("way", [Kahan(), Split(8), Split(16)], ids=str)
def test_a_model_of_mixed_dtypes_resumes(way: Weights, fused: bool) -> None:
    """bf16 matrices beside an fp32 norm, which keeps nothing for its weights."""

    class Mixed(Tiny):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__(dtype)
            self.norm.float()

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embedding(ids)
            return self.head(self.norm(self.q_proj(x)[..., :51].float() + self.k_proj(x)[..., :51].float()).to(x.dtype))

    with mock.patch(f"{__name__}.Tiny", Mixed):
        parts, resumed = (build(with_stores(AdamW8bit), way, BF16, fused) for _ in range(2))
    train(*parts, range(2))
    kept = {p.spec.name: str(p.weights) for p in parts[1].plan()}
    assert (kept["norm.weight"], kept["head.weight"]) == ("Plain()", str(way))
    saved = through_a_file([part.state_dict() for part in parts])
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    for run in (parts, resumed):
        train(*run, range(2, 4))
    assert_same(weights_of(resumed[0]), weights_of(parts[0]))
    assert_same(state_of(resumed[1]), state_of(parts[1]))


if __name__ == "__main__":
    print(*map(words_of, COMBINATIONS), f"{len(COMBINATIONS)} combinations", sep="\n")
