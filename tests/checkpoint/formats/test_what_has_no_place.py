"""What a layout of another library has no place for: named and refused, or noted."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import optstate
from adalomo import Adafactor
from optstate.checkpoint.document.document import Document, Group, TensorValue
from optstate.checkpoint.files.safetensors_writer import NewEntry
from optstate.checkpoint.files.tensor_bytes import bytes_of
from optstate.checkpoint.files.torch_archive_writer import Constant
from optstate.checkpoint.formats.registry import LayoutError
from optstate.checkpoint.open_checkpoint import open_checkpoint
from optstate.recipes import AdamW
from tests.support.written_state import (
    ADAM,
    SHAPES,
    document_with,
    entries_of,
    named,
    record,
    saved,
    tensors,
    trained,
    tree_of,
)

BLOCKS = {"block": 256, "codebook": "map:1"}


FACTORED = record("square", None, "Factored()", "row", "col")


EIGHT = record("gradient", 0.9, "Block8()", "codes", "absmax", **BLOCKS)


REFUSED: dict[str, tuple[str, tuple[Document, dict[str, NewEntry]], str]] = {
    "no such layout": (
        "keras",
        document_with(ADAM),
        "no library whose files can be written is called 'keras': one of bitsandbytes, ",
    ),
    "codes in torch": (
        "torch",
        document_with({**ADAM, "exp_avg": EIGHT}),
        "exp_avg of 'w' is in Block8(): torch keeps Full(); convert with --slot exp_avg=fp32",
    ),
    "factors in bitsandbytes": (
        "bitsandbytes",
        document_with({**ADAM, "exp_avg_sq": record("square", 0.999, "Factored()", "row", "col")}),
        "exp_avg_sq of 'w' is in Factored(): bitsandbytes keeps Block8() of 256 elements or Full(); convert with "
        "--slot exp_avg_sq=block8",
    ),
    "one moment in codes": (
        "bitsandbytes",
        document_with({**ADAM, "exp_avg": EIGHT}, codebooks={"map:1": (0.0,) * 256}),
        "'w' has exp_avg in Block8(), exp_avg_sq in Full(): bitsandbytes keeps both in 8 bits or both in fp32",
    ),
    "other blocks": (
        "bitsandbytes",
        document_with({**ADAM, "exp_avg": replace(EIGHT, store="Block8(block=64)", block=64)}),
        "exp_avg of 'w' is in Block8(block=64): bitsandbytes keeps Block8() of 256 elements or Full()",
    ),
    "blocks that end early": (
        "torchao",
        document_with({**ADAM, "exp_avg": replace(EIGHT, store="Block8(block=250)", block=250)}),
        "'w' has 6144 elements: torchao has whole blocks of 250 only; convert with --slot exp_avg=fp32",
    ),
    "maxima of 8-bit floats": (
        "torchao",
        document_with({**ADAM, "exp_avg": replace(EIGHT, store="Float8()", codebook="")}),
        "torchao has them divided by 448",
    ),
    "codes without their map": (
        "torchao",
        document_with({**ADAM, "exp_avg": EIGHT}),
        "the values of the codes 'map:1' are not in the file",
    ),
    "a matrix in full": (
        "transformers",
        document_with({"exp_avg_sq": record("square", None)}, "adafactor"),
        "exp_avg_sq of 'w' is in Full(): transformers keeps row and column means of matrices; convert with --slot "
        "exp_avg_sq=factored",
    ),
    "another rule": ("lion-pytorch", document_with(ADAM), "the state is of the recipe 'adamw': lion-pytorch does not"),
    "no recipe": ("torch", document_with(ADAM, ""), "the state is of a chain without a name: torch does not have it"),
    "another beta": (
        "torch",
        document_with(ADAM, hyper={"betas": (0.9, 0.99)}),
        "what exp_avg_sq of 'w' averages is of='square', beta=0.999, where torch has of='square', beta=0.99; convert",
    ),
    "an unknown meaning": (
        "torch",
        document_with({**ADAM, "exp_avg": record("", None)}),
        "what exp_avg of 'w' averages is unknown",
    ),
    "a moment that is missing": (
        "torch",
        document_with({"exp_avg": ADAM["exp_avg"]}),
        "'w' has no exp_avg_sq, which torch needs; convert with --recipe adamw",
    ),
    "no steps": ("torch", document_with(ADAM, step=None), "the file does not say how many steps 'w' was updated"),
    "what is kept for weights": (
        "torch",
        document_with({**ADAM, "weight": record("", None, "Kahan()", "low")}),
        "weight of 'w' (Kahan()) has no place in torch; write a file of optstate's own",
    ),
    "a copy of weights": (
        "torch",
        document_with({**ADAM, "master": record("", None)}),
        "master of 'w' (Full()) has no place in torch; leave it out with --slot master=drop",
    ),
    "a value of a parameter": (
        "torch",
        document_with(ADAM, extra={"mu_product": 0.5}),
        "'w' has mu_product, which torch has no place for",
    ),
    "maximize": (
        "bitsandbytes",
        document_with(ADAM, hyper={"maximize": True}),
        "param group 0 has maximize=True, which bitsandbytes cannot express: it does as with maximize=False",
    ),
    "an L2 penalty": (
        "bitsandbytes",
        document_with(ADAM, hyper={"decoupled_weight_decay": False}),
        "param group 0 has decoupled_weight_decay=False, which bitsandbytes cannot express",
    ),
    "no learning rate": (
        "lion-pytorch",
        (
            Document(recipe="lion", groups=(Group(hyper={}, parameters=()),), parameters=()),
            {},
        ),
        "param group 0 has no 'lr', which lion-pytorch needs",
    ),
    "parameters without names": (
        "pytorch_optimizer",
        document_with({"exp_avg_sq": FACTORED}, "adalomo", name="#0"),
        "the parameter #0 has no name",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_place_is_named(name: str) -> None:
    layout, (document, entries), message = REFUSED[name]
    if name == "parameters without names":
        entries = {key: NewEntry(key, "F32", (64,)) for key in entries}
    with pytest.raises(LayoutError) as caught:
        tree_of(layout, document, entries)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


ADAFACTOR_CHAIN = "scale_by_rms > clip_by_rms > add_decayed_weights > scale_by_param_rms"


RULES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "no scale": ("torch", {}, "scale_by_rms > clip_by_rms > add_decayed_weights", "scale_parameter=False"),
    "scaled decay": ("torch", {}, ADAFACTOR_CHAIN, "weight_decay=0.01, scaled by the parameter's RMS"),
    "decay by lr alone": (
        "transformers",
        {},
        "clip_by_rms > scale_by_param_rms > scale_by_schedule(cap_by_inverse_root) > add_decayed_weights",
        "weight_decay=0.01, which acts by lr alone",
    ),
    "relative": (
        "torch",
        {"lr": 1.0},
        f"{ADAFACTOR_CHAIN} > scale_by_schedule(relative_step_size)",
        "a relative step size",
    ),
    "a factor": (
        "transformers",
        {},
        f"{ADAFACTOR_CHAIN} > scale_by_schedule(relative_step_size)",
        "lr=0.001 as a factor",
    ),
    "clamped gradients": ("transformers", {"clip_grad_value": 1.0}, ADAFACTOR_CHAIN, "clip_grad_value=1.0"),
}


@pytest.mark.parametrize("name", RULES)
def test_another_rule_of_adafactor_is_refused(name: str) -> None:
    layout, hyper, chain, message = RULES[name]
    hyper = {"eps": (1e-30, 1e-3), "decay_rate": -0.8, "clip_threshold": 1.0} | hyper
    document, _ = document_with({"exp_avg_sq": FACTORED}, "adafactor", hyper, chain=chain)
    entries = {key: NewEntry(key, "F32", (64,)) for key in FACTORED.fields.values()}
    with pytest.raises(LayoutError, match=re.escape(f"param group 0 has {message}")):
        tree_of(layout, document, entries)


def test_averages_of_updates_are_no_averages_of_steps(tmp_path: Path) -> None:
    """transformers multiplies by the learning rate before it averages: the same numbers would be 100 times too long."""
    _, _, checkpoint = saved(lambda p: Adafactor(p, lr=1e-2, beta1=0.9), tmp_path)
    with pytest.raises(LayoutError, match=r"exp_avg of 'layer.0.weight' averages updates, .* finished steps"):
        tree_of("transformers", checkpoint.document, entries_of(checkpoint))


def test_values_beside_the_state_stay_or_are_named() -> None:
    document, entries = document_with(ADAM, source={"kind": "torch", "optimizer": "AdamW", "named": False})
    document = replace(document, extra={"epoch": 3, "scale": TensorValue("bfloat16", (2,), (0.5, -2.0))})
    tree = tree_of("torch", document, entries)
    assert tree["epoch"] == 3
    assert tree["scale"] == Constant("BF16", (2,), bytes_of(torch.tensor([0.5, -2.0]).bfloat16()).tobytes())
    with pytest.raises(LayoutError, match="epoch, scale of the file: bitsandbytes has no place for it"):
        tree_of("bitsandbytes", document, entries)


def test_a_users_own_hyper_parameters_stay() -> None:
    document, entries = document_with(ADAM, hyper={"initial_lr": 5e-5, "name": "decay", "foreach": True})
    assert tree_of("bitsandbytes", document, entries)["param_groups"][0] == {
        "param_names": ["w"],
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.01,
        "alpha": 0.0,
        "t_alpha": None,
        "t_beta3": None,
        "initial_lr": 5e-5,
        "name": "decay",
        "params": [0],
    }


def test_a_parameter_without_state_has_no_entry(tmp_path: Path) -> None:
    params = tensors(*SHAPES)
    params[1].requires_grad_(False)
    optimizer = AdamW(named(params))
    trained(optimizer, [params[0], params[2]])
    optstate.save(optimizer, tmp_path / "ours.safetensors")
    checkpoint = open_checkpoint(tmp_path / "ours.safetensors")
    tree = tree_of("torch", checkpoint.document, entries_of(checkpoint))
    assert list(tree["state"]) == [0, 2]
    assert tree["param_groups"][0]["params"] == [0, 1, 2]
