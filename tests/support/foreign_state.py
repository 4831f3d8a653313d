"""State of other libraries, and what the readers make of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import bitsandbytes as bnb
import came_pytorch
import lion_pytorch
import pytorch_optimizer as po
import torch
from transformers.optimization import Adafactor as TransformersAdafactor

from tests.support.foreign_files import (
    Tiny,
    trained,
)


@dataclass(frozen=True)
class Case:
    """slots: ours -> (key of theirs, or keys of rows and columns; what it is of; beta)."""

    build: Callable[[Tiny], Any]
    kind: str
    optimizer: str
    recipe: str
    slots: dict[str, tuple[str | tuple[str, str], str, float | None]]
    vector: dict[str, str] = field(default_factory=dict)
    steps: tuple[int, ...] = (3,)


EXP_AVG = ("exp_avg", "gradient", 0.9)


EXP_AVG_SQ = ("exp_avg_sq", "square", 0.999)


ADAM = {"exp_avg": EXP_AVG, "exp_avg_sq": EXP_AVG_SQ}


HALVES = ("exp_avg_sq_row", "exp_avg_sq_col")


FACTORED = {"exp_avg_sq": (HALVES, "square", None)}


CAME = {
    "exp_avg": ("exp_avg", "update", 0.9),
    "exp_avg_sq": (HALVES, "square", 0.999),
    "exp_avg_res": (("exp_avg_res_row", "exp_avg_res_col"), "distance", 0.9999),
}


CASES = {
    "AdamW": Case(lambda m: torch.optim.AdamW(m.groups()), "torch", "AdamW", "adamw", ADAM),
    "AdamW fused": Case(lambda m: torch.optim.AdamW(m.groups(), fused=True), "torch", "AdamW", "adamw", ADAM),
    "AdamW maximize": Case(lambda m: torch.optim.AdamW(m.groups(), maximize=True), "torch", "AdamW", "", ADAM),
    "Adam": Case(lambda m: torch.optim.Adam(m.groups()), "torch", "Adam", "", ADAM),
    "Adam without decay": Case(lambda m: torch.optim.Adam(m.parameters()), "torch", "Adam", "adamw", ADAM),
    "Adam amsgrad": Case(
        lambda m: torch.optim.Adam(m.groups(), lr=torch.tensor(1e-3), amsgrad=True),
        "torch",
        "Adam",
        "",
        {**ADAM, "max_exp_avg_sq": ("max_exp_avg_sq", "square_max", None)},
    ),
    "SGD": Case(
        lambda m: torch.optim.SGD(m.groups(), lr=0.1, momentum=0.9),
        "torch",
        "SGD",
        "sgd",
        {"momentum_buffer": ("momentum_buffer", "update_sum", None)},
        steps=(),
    ),
    "RMSprop": Case(
        lambda m: torch.optim.RMSprop(m.groups(), alpha=0.98, centered=True, momentum=0.9),
        "torch",
        "RMSprop",
        "",
        {
            "square_avg": ("square_avg", "square", 0.98),
            "grad_avg": ("grad_avg", "gradient", 0.98),
            "momentum_buffer": ("momentum_buffer", "update_sum", None),
        },
    ),
    "RMSprop plain": Case(
        lambda m: torch.optim.RMSprop(m.groups()),
        "torch",
        "RMSprop",
        "",
        {"square_avg": ("square_avg", "square", 0.99)},
    ),
    "Adagrad": Case(
        lambda m: torch.optim.Adagrad(m.groups()), "torch", "Adagrad", "", {"sum": ("sum", "square_sum", None)}
    ),
    "Adafactor": Case(
        lambda m: torch.optim.Adafactor(m.groups()),
        "torch",
        "Adafactor",
        "adafactor",
        {"exp_avg_sq": (("row_var", "col_var"), "square", None)},
        {"exp_avg_sq": "variance"},
    ),
    "Muon": Case(
        lambda m: torch.optim.Muon([m.fc1.weight, m.fc2.weight]),
        "torch",
        "Muon",
        "",
        {"momentum_buffer": ("momentum_buffer", "gradient", 0.95)},
        steps=(),
    ),
    "transformers": Case(
        lambda m: TransformersAdafactor(m.groups(), lr=1e-3, relative_step=False, scale_parameter=False),
        "transformers",
        "Adafactor",
        "adafactor",
        FACTORED,
        {"exp_avg_sq": "exp_avg_sq"},
    ),
    "transformers with momentum": Case(
        lambda m: TransformersAdafactor(m.groups(), beta1=0.8, warmup_init=True),
        "transformers",
        "Adafactor",
        "adafactor",
        {"exp_avg": ("exp_avg", "update", 0.8), **FACTORED},
        {"exp_avg_sq": "exp_avg_sq"},
    ),
    "lion-pytorch": Case(
        lambda m: lion_pytorch.Lion(m.groups()),
        "lion-pytorch",
        "Lion",
        "lion",
        {"exp_avg": ("exp_avg", "gradient", 0.99)},
        steps=(),
    ),
    "came-pytorch": Case(
        lambda m: came_pytorch.CAME(m.groups(), lr=1e-3),
        "came-pytorch",
        "CAME",
        "came",
        CAME,
        {"exp_avg_sq": "exp_avg_sq"},
    ),
    "pytorch_optimizer CAME": Case(
        lambda m: po.CAME(m.groups()), "pytorch_optimizer", "CAME", "came", CAME, {"exp_avg_sq": "exp_avg_sq"}
    ),
    "pytorch_optimizer Adafactor": Case(
        lambda m: po.AdaFactor(m.groups()),
        "pytorch_optimizer",
        "AdaFactor",
        "",
        {"exp_avg": ("exp_avg", "update", 0.9), **FACTORED},
        {"exp_avg_sq": "exp_avg_sq"},
    ),
    "pytorch_optimizer Lion": Case(
        lambda m: po.Lion(m.groups()),
        "pytorch_optimizer",
        "Lion",
        "lion",
        {"exp_avg": ("exp_avg", "gradient", 0.99)},
    ),
}


def of_bitsandbytes(name: str, **more: Any) -> Any:
    if name.startswith(("SGD", "LARS")):
        more = {"lr": 0.1, "momentum": 0.9, **more}
    return trained(lambda m: getattr(bnb.optim, name)(m.groups(), **more)).state_dict()
