"""The simulation behind the table of what many devices hold, on a model whose figures follow from its shapes."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from transformers import LlamaConfig

from optstate.memory.sources import find_model
from optstate.recipes import registry
from tests.support.paths import ROOT

pytestmark = pytest.mark.peer

LAYERS, WIDTH, HIDDEN, WORDS = 3, 256, 512, 1024
WORLD = 8
MATRICES = [*[(WIDTH, WIDTH)] * 4, *[(HIDDEN, WIDTH)] * 2, (WIDTH, HIDDEN)]
NORMS = 2
WHOLE = [*MATRICES * LAYERS, *[(WORDS, WIDTH)] * 2]
VECTORS = NORMS * LAYERS + 1
ELEMENTS = sum(rows * cols for rows, cols in WHOLE) + VECTORS * WIDTH


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import simulated
    finally:
        del sys.path[0]
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        vocab_size=WORDS,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    with simulated.one_of(WORLD) as mesh:
        sharded = simulated.Sharded.of(find_model(folder), mesh)
        return {recipe: simulated.simulate(sharded, registry.get(recipe)) for recipe in ("adalomo", "adamw", "lomo")}


def test_a_device_holds_its_share(rows: dict[str, dict[str, Any]]) -> None:
    """bf16 weights and gradients; AdamW has two numbers in fp32 for each element, AdaLomo its rows and all columns."""
    assert {row["weights"] for row in rows.values()} == {2 * ELEMENTS // WORLD}
    assert {row["gradients"] for row in rows.values()} == {2 * ELEMENTS // WORLD}
    assert rows["adamw"]["state"] == 8 * ELEMENTS // WORLD
    columns = 4 * sum(cols for _, cols in WHOLE)
    assert rows["adalomo"]["state_whole"] == columns
    assert rows["adalomo"]["state"] == columns + 4 * (sum(m for m, _ in WHOLE) + VECTORS * WIDTH) // WORLD
    assert rows["lomo"]["state"] == 0


def test_fused_gradients_are_those_of_the_largest_group(rows: dict[str, dict[str, Any]]) -> None:
    layer = sum(m * n for m, n in MATRICES) + NORMS * WIDTH
    root = 2 * WORDS * WIDTH + WIDTH
    assert {row["fused_gradients"] for row in rows.values()} == {2 * max(layer, root) // WORLD}


def test_all_reduces_are_counted(rows: dict[str, dict[str, Any]]) -> None:
    """AdaLomo asks twice, for columns with the parameter's squares, and for the update's; the others once, whether a
    gradient is finite. Each group by itself when fused: one for each layer, and the root."""
    counts = {name: (row["collectives"], row["fused_collectives"]) for name, row in rows.items()}
    groups = LAYERS + 1
    assert counts == {"adalomo": (2, 2 * groups), "adamw": (1, groups), "lomo": (1, groups)}
