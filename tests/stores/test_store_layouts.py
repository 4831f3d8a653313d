"""What stores declare is what can be computed without torch, and files that say nonsense are answered."""

from __future__ import annotations

import pytest
import torch

from optstate import stores
from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.contradictions import contradictions
from optstate.checkpoint.document.document import Document, Group, Parameter, SlotRecord
from optstate.spec import ParamSpec
from optstate.store_layouts import kept_bytes, layouts_of
from optstate.stores import Store
from optstate.stores.registry import OWN
from optstate.weights import Kahan, Split

SHAPES = [(), (7,), (5000,), (64, 96), (61, 100), (3, 48, 40), (8, 3, 3, 3), (0, 6), (4096,), (4097,)]
EVERY = [
    stores.Full(),
    stores.Full("bfloat16"),
    stores.Factored(),
    stores.AxisMax(),
    stores.Block8(),
    stores.Block8(64),
    stores.Float8(),
    stores.Block4(),
    stores.Block4(rank1=True),
    stores.Grouped("row"),
    stores.Grouped("tensor"),
    stores.Grouped(8),
    stores.LowRank(),
    stores.LowRank(30),
    stores.SignRank1(),
]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("store", EVERY, ids=str)
def test_words_and_shape_tell_the_bytes_that_a_store_allocates(store: Store, signed: bool) -> None:
    for shape in SHAPES:
        spec = ParamSpec(name="p", shape=shape, dtype=torch.float32)
        try:
            fitted, _ = store.resolve(spec, signed)
        except ValueError:
            continue
        fields = {name: torch.empty(f.shape, dtype=f.dtype) for name, f in fitted.fields(spec, signed).items()}
        layouts = layouts_of(str(fitted), shape, fitted.scale_block)
        assert layouts is not None
        assert {name: (layout.shape, layout.nbytes) for name, layout in layouts.items()} == {
            name: (tuple(field.shape), field.numel() * field.element_size()) for name, field in fields.items()
        }
        if "rank1" not in str(store):  # a vector keeps blocks, which no recipe asks for
            asked = str(fitted) if type(fitted) is type(store) else str(store)
            assert kept_bytes(asked, shape) == sum(layout.nbytes for layout in layouts.values())


def test_every_store_of_ours_has_a_layout() -> None:
    assert {type(store).__name__.lower() for store in EVERY} == set(OWN)
    assert all(layouts_of(str(store), (64, 96)) for store in EVERY)


def test_a_store_of_another_package_has_none() -> None:
    assert layouts_of("Zipped(bits=8)", (64, 96)) is None
    assert layouts_of("no words at all", (64, 96)) is None


@pytest.mark.parametrize("way", [Kahan(), Split(8), Split(16)], ids=str)
def test_what_is_kept_for_weights_is_told_by_its_words(way: Kahan | Split) -> None:
    (layout,) = (layouts_of(str(way), (6, 5)) or {}).values()
    (field,) = way.fields(ParamSpec(name="p", shape=(6, 5), dtype=torch.bfloat16)).values()
    assert (layout.shape, layout.dims) == (field.shape, field.dims)
    assert layout.dtype in ("parameter", str(field.dtype).removeprefix("torch."))


NONSENSE = [
    "Full(dtype='float99')",
    "Full(dtype=['bfloat16'])",
    "Full(dtype={})",
    "Full(1, 2, 3, 4)",
    "Full(size=3)",
    "Block8(block=0)",
    "Block8(block='x')",
    "Block8(block=1e999)",
    "Block8(codes='float99')",
    "Block8(codes=3)",
    "Block4(block=None)",
    "Grouped(by=0)",
    "Grouped(by=1e999)",
    "Grouped(by=None)",
    "Grouped()",
    "AxisMax(dtype='x')",
    "Split(bits=99)",
    "Split(bits=8.0)",
    "Split(bits=[8])",
    "Kahan(3)",
]


@pytest.mark.parametrize("words", NONSENSE)
def test_words_that_no_store_would_print_contradict_their_tensors(words: str) -> None:
    slot = SlotRecord(store=words, signed=True, fields={"": "p/exp_avg"})
    param = Parameter(
        name="p", shape=(4, 6), dtype="float32", group=0, step=1, chain="", weights="", slots={"exp_avg": slot}
    )
    document = Document(recipe="", groups=(Group(hyper={}, parameters=("p",)),), parameters=(param,))
    issues = contradictions(Checkpoint("x", "optstate", "declared", document, {}, ()))
    assert issues
    assert {issue.where for issue in issues} == {"p/exp_avg"}
