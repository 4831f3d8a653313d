"""One row per library and rule: state that the library saves is read, is its own, is written as it was, and goes on.

Whoever adds a format adds a row; that no format is without one is a test, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adalomo import Adafactor
from optstate import testing
from optstate.checkpoint.formats.registry import find_format, find_formats
from optstate.checkpoint.formats.shared.format import Format
from optstate.checkpoint.formats.shared.tables import by_key
from optstate.formats import LION, NEEDED, Kept, Layout, Meaning, OtherRule, Switch, read_tables, write_tables
from optstate.recipes import SGD, AdamW, AdamW4bit, AdamW8bit

Build = Callable[[list[nn.Parameter]], Any]

ALL = testing.LAWS_OF_LIBRARIES
NOT_THE_RULE = tuple(law for law in ALL if law != "rule")
READ_ONLY = ("reading", "whose state")


def library(name: str) -> Any:
    return pytest.importorskip(name)


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[2:], "name": "vectors", "lr": 3e-4}, {"params": params[:2]}]


LIBRARIES: dict[str, tuple[str, Build, tuple[str, ...]]] = {
    "AdamW": ("torch", lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.8, 0.95)), ALL),
    "AdamW, amsgrad, a tensor for lr": (
        "torch",
        lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-3), amsgrad=True),
        NOT_THE_RULE,
    ),
    "AdamW, tensors for betas": (
        "torch",
        lambda p: torch.optim.AdamW(p, betas=(torch.tensor(0.9), torch.tensor(0.99)), foreach=False),
        NOT_THE_RULE,
    ),
    "AdamW, groups": ("torch", lambda p: torch.optim.AdamW(groups(p)), NOT_THE_RULE),
    "Adam": ("torch", lambda p: torch.optim.Adam(p, weight_decay=0.1, maximize=True), NOT_THE_RULE),
    "SGD": ("torch", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1), ALL),
    "SGD without momentum": ("torch", lambda p: torch.optim.SGD(p, lr=0.1), ALL),
    "RMSprop": ("torch", lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True), ALL),
    "Adagrad": ("torch", lambda p: torch.optim.Adagrad(p), ALL),
    "torch's Adafactor": ("torch", lambda p: torch.optim.Adafactor(p, lr=1e-2), ALL),
    "Muon": ("torch", lambda p: torch.optim.Muon(p[:2]), ALL),
    "NAdam": ("torch", lambda p: torch.optim.NAdam(p), ALL),
    "RAdam": ("torch", lambda p: torch.optim.RAdam(p), ALL),
    "Adamax": ("torch", lambda p: torch.optim.Adamax(p), ALL),
    "Adadelta": ("torch", lambda p: torch.optim.Adadelta(p), ALL),
    "ASGD": ("torch", lambda p: torch.optim.ASGD(p), ALL),
    "Rprop": ("torch", lambda p: torch.optim.Rprop(p), ALL),
    "Adafactor": (
        "transformers",
        lambda p: library("transformers").Adafactor(p, lr=1e-2, relative_step=False, weight_decay=0.1),
        ALL,
    ),
    "Adafactor with a first moment": (
        "transformers",
        lambda p: library("transformers").Adafactor(p, lr=1e-3, beta1=0.9, relative_step=False),
        NOT_THE_RULE,
    ),
    "Adafactor, relative": ("transformers", lambda p: library("transformers").Adafactor(p), NOT_THE_RULE),
    "AdamW8bit": ("bitsandbytes", lambda p: library("bitsandbytes").optim.AdamW8bit(p), NOT_THE_RULE),
    "Lion8bit": ("bitsandbytes", lambda p: library("bitsandbytes").optim.Lion8bit(p), NOT_THE_RULE),
    "SGD8bit": ("bitsandbytes", lambda p: library("bitsandbytes").optim.SGD8bit(p, lr=0.1, momentum=0.9), NOT_THE_RULE),
    "RMSprop8bit": ("bitsandbytes", lambda p: library("bitsandbytes").optim.RMSprop8bit(p), NOT_THE_RULE),
    "AdamW32bit": ("bitsandbytes", lambda p: library("bitsandbytes").optim.AdamW32bit(p), ALL),
    "lion-pytorch": ("lion-pytorch", lambda p: library("lion_pytorch").Lion(p, lr=1e-3, weight_decay=0.1), ALL),
    "CAME": ("pytorch_optimizer", lambda p: library("pytorch_optimizer").CAME(p, lr=1e-3), ALL),
    "SM3": ("pytorch_optimizer", lambda p: library("pytorch_optimizer").SM3(p, momentum=0.9), NOT_THE_RULE),
    "AdaFactor": ("pytorch_optimizer", lambda p: library("pytorch_optimizer").AdaFactor(p), NOT_THE_RULE),
    "Lion": ("pytorch_optimizer", lambda p: library("pytorch_optimizer").Lion(p), NOT_THE_RULE),
    "came-pytorch": ("came-pytorch", lambda p: library("came_pytorch").CAME(p, lr=1e-3), READ_ONLY),
    "schedulefree": ("schedulefree", lambda p: library("schedulefree").AdamWScheduleFree(p), READ_ONLY),
    "ours in 8 bits": ("optstate-state_dict", lambda p: AdamW8bit(p), READ_ONLY),
    "ours in 4 bits": ("optstate-state_dict", lambda p: AdamW4bit(p), READ_ONLY),
    "ours": ("optstate-state_dict", lambda p: AdamW(p), READ_ONLY),
}

ELSEWHERE = {
    "adam-mini": "test_readers.py, since its optimizer needs a model",
    "galore": "test_readers.py, by a sample: its package does not run here",
    "lomo-optim": "test_readers.py, by a sample: its state is in attributes",
    "torch-SM3": "test_readers.py, by a code of its own",
    "torchao": "test_writers.py, by samples: its step compiles",
    "lerobot": "test_writers.py, a folder",
    "torch.distributed.checkpoint": "test_dcp.py, a folder",
    "deepspeed": "test_deepspeed.py, a folder",
}


RECIPES: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "SGD": lambda p: SGD(p, momentum=0.9),
    "torch's Adafactor": lambda p: Adafactor(p, lr=1e-2, torch_compatible=True),
    "Adafactor": lambda p: Adafactor(p, lr=1e-2),
}
"""Ours of the same rule, where that is not the recipe as it is by default."""


@pytest.mark.slow
@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_keeps_the_laws_of_formats(name: str) -> None:
    kind, build, laws = LIBRARIES[name]
    declared = find_format(kind)
    assert declared is not None
    testing.check_format(declared, build, RECIPES.get(name), laws=laws)


def test_every_format_has_a_row() -> None:
    rows = {kind for kind, _, _ in LIBRARIES.values()}
    assert {found.name for found in find_formats()} == rows | ELSEWHERE.keys()
    assert {found.name for found in find_formats() if found.write is not None} <= rows | {"torchao", "lerobot"}


# --- the laws themselves ------------------------------------------------------------------------------------------


class Slow(torch.optim.Optimizer):
    """Lion with a flag and with keys of its own."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1, "slow": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            first, second = group["betas"]
            for param in [param for param in group["params"] if param.grad is not None]:
                pace: Tensor = self.state[param].setdefault("pace", torch.zeros_like(param))
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.sub_(torch.sign(torch.lerp(param.grad, pace, first)), alpha=group["lr"])
                pace.lerp_(param.grad, 1 - second)


NUMBERS = frozenset({"lr", "betas", "weight_decay", "slow"})
RULE = OtherRule("slow", "Slow", "lion", needs=NUMBERS, numbers=NUMBERS)
WORDS = {"lr": NEEDED, "betas": NEEDED, "weight_decay": NEEDED, "slow": 0.0}


def slow(layout: Layout, **changed: Any) -> Format:
    return replace(
        Format(
            name="slow",
            read=lambda found, optimizer: read_tables(found, [layout], "slow"),
            write=lambda writer: write_tables(writer, [layout], {"lion": layout}),
            rules=(layout.rule,),
        ),
        **changed,
    )


SOUND = Layout("Slow", RULE, {"exp_avg": Kept(LION["exp_avg"], "pace")}, hypers=by_key(WORDS))
OTHER_BETA = {"exp_avg": Kept(Meaning("gradient", beta=("betas", 0)), "pace")}
OTHER_KEY = replace(SOUND, slots={"exp_avg": Kept(LION["exp_avg"], "m")})
BROKEN: dict[str, tuple[Format, str, str]] = {
    "a hyper-parameter that it does not know": (
        slow(replace(SOUND, rule=replace(RULE, numbers=NUMBERS - {"slow"}))),
        "reading",
        "its rules do not know the hyper-parameters slow",
    ),
    "another library's state": (
        slow(SOUND, read=lambda found, optimizer: None),
        "reading",
        "its file is opened as one of torch",
    ),
    "what torch's format reads, too": (
        slow(SOUND, read=lambda found, optimizer: read_tables(found, [SOUND], "slow"), names_itself=False),
        "",
        "",
    ),
    "written under another key": (
        slow(
            SOUND, write=lambda w: write_tables(w, [replace(SOUND, slots={"exp_avg": Kept(LION["exp_avg"], "m")})], {})
        ),
        "writing",
        "has m, pace only before or only after",
    ),
    "another meaning": (slow(replace(SOUND, slots=OTHER_BETA)), "rule", "the file does not say how"),
    "another rule": (
        slow(replace(SOUND, rule=replace(RULE, recipe="adamw"))),
        "rule",
        "the file does not say how",
    ),
    "a switch that is always on": (
        slow(replace(SOUND, rule=replace(RULE, switches={"slow": Switch((1.0,), "it is slow")}))),
        "",
        "",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_format_is_caught_by_its_law(name: str) -> None:
    declared, broken, what = BROKEN[name]
    found = {}
    for law in ALL:
        try:
            testing.check_format(declared, Slow, laws=[law])
        except testing.LawError as error:
            found[law] = str(error)
    assert (broken in found) == bool(broken), found
    if broken:
        assert what in found[broken]
        assert re.match(r"format 'slow' breaks the law '\w+", found[broken])
        assert "\n" not in found[broken]
    else:
        assert found == {}
