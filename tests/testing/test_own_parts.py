"""Every store, transform and recipe of this library keeps the laws that others are held to."""

from __future__ import annotations

import pytest

from optstate import recipes, stores, testing, updates
from optstate.stores import Store, registry
from optstate.updates import Transform

pytestmark = pytest.mark.slow

STORES = [
    stores.Full(),
    stores.Full("bfloat16"),
    stores.Full("bfloat16", stochastic=True),
    stores.Factored(),
    stores.AxisMax(),
    stores.Block8(),
    stores.Block8(64),
    stores.Float8(),
    stores.Block4(),
    stores.Block4(rank1=True),
    stores.Grouped("row"),
    stores.Grouped("head"),
    stores.Grouped("tensor"),
    stores.Grouped(2),
    stores.LowRank(),
    stores.LowRank(8),
    stores.SignRank1(),
]

TRANSFORMS = [
    updates.scale_by_adam(),
    updates.scale_by_adam(stores.Block8(), stores.Factored()),
    updates.scale_by_rms(stores.Factored(), eps=1e-30),
    updates.scale_by_rss(stores.AxisMax()),
    updates.momentum(),
    updates.momentum(heavy_ball=True, nesterov=True),
    updates.sign_momentum(),
    updates.scale_by_confidence(),
    updates.clip_by_rms(1.0),
    updates.clip_by_norm(1.0),
    updates.clip_by_value(0.1),
    updates.scale_by_param_rms(1e-3),
    updates.add_decayed_weights(0.1),
    updates.scale_by_learning_rate(),
    updates.scale_by_line_rms(),
    updates.chain(updates.scale_by_adam(), updates.decay_weights_after(0.1)),
    updates.project(updates.scale_by_adam(), rank=4, gap=1),
    updates.scale_by_projected(updates.scale_by_adam(), rank=4, gap=1),
    updates.scale_by_residual_norm(updates.scale_by_adam(), rank=4, gap=1),
    updates.project_anew(updates.scale_by_adam(), rank=4),
    updates.project_lazily(updates.scale_by_adam(), rank=4, gap=1),
    updates.project_by_need(updates.scale_by_adam(), rank=4, gap=1),
    updates.select_rows(updates.scale_by_adam(), rows=8, gap=1),
    updates.scale_by_schedule(lambda step, lr: lr / (1 + step)),
    updates.chain(updates.scale_by_rms(stores.Factored(), eps=1e-30), updates.clip_by_rms(1.0)),
    updates.as_square(updates.scale_by_moving_adam(stores.SignRank1(), stores.SignRank1())),
    updates.scale_by_moving_adam(),
    updates.scale_by_ademamix(warmup=2),
    updates.scale_by_momentum_square(),
    updates.scale_by_second_moment(),
    updates.schedule_free(),
    updates.chain(updates.momentum(), updates.cautious()),
    updates.chain(updates.momentum(), updates.scale_by_factor(0.5)),
    updates.chain(updates.momentum(heavy_ball=True), updates.orthogonalize_exactly()),
    updates.project_and_carry(updates.momentum(heavy_ball=True), rank=4, gap=1),
    updates.normalize_rows(rms=True),
    updates.normalize_columns(),
    updates.chain(updates.momentum(), updates.orthogonalize()),
    updates.eigenbasis(updates.scale_by_adam(), every=1),
]


@pytest.mark.parametrize("store", STORES, ids=str)
def test_stores_keep_the_laws(store: Store) -> None:
    testing.check_store(store)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: type(transform).__name__)
def test_transforms_keep_the_laws(transform: Transform) -> None:
    testing.check_transform(transform)


@pytest.mark.parametrize("name", recipes.names())
def test_recipes_keep_the_laws(name: str) -> None:
    testing.check_recipe(recipes.get(name), lr=1e-3)


def test_no_store_and_no_transform_is_left_out() -> None:
    assert {type(store).__name__.lower() for store in STORES} == set(registry.store_names())
    kinds = {kind for kind in vars(updates).values() if isinstance(kind, type) and issubclass(kind, Transform)}
    tested = {type(t) for t in TRANSFORMS} | {type(t) for chain in TRANSFORMS for t in getattr(chain, "transforms", ())}
    bases = {Transform, updates.Around, updates.Projected}
    assert {kind.__name__ for kind in kinds - bases - tested} == set()
