"""Every optimizer that is compared, ours and others', behind one interface: load gradients, then step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

import adalomo
import optstate

LOMO_ADALOMO, LOMO_LOMO = "lomo-optim AdaLomo", "lomo-optim Lomo"
ADAMW_FUSED, SGD_FUSED, SGD_LOOP = "torch AdamW fused", "torch SGD fused", "torch SGD for-loop"
OUR_ADALOMO, OUR_ADALOMO_AUTO = "optstate AdaLomo", "optstate AdaLomo, stochastic"
OUR_LOMO = "optstate Lomo"


class MissingPeer(SystemExit):
    """Another library that is not installed: ends a benchmark that does not go on without."""


def library(name: str) -> Any:
    """Import another library, or raise MissingPeer."""
    try:
        return import_module(name)
    except ImportError as error:
        text = f"{error}; the benchmarks compare with other libraries: pip install 'optstate[bench]'"
        raise MissingPeer(text) from None


@dataclass
class Runner:
    """An optimizer on one module: `load`, which is not timed, hands over gradients; `step` updates the parameters."""

    module: nn.Module
    step: Callable[[], object]
    optimizer: Any

    def load(self, grads: Sequence[Tensor]) -> None:
        for param, grad in zip(self.module.parameters(), grads, strict=True):
            param.grad = grad


@dataclass(frozen=True)
class Contestant:
    """How to put an optimizer on a module, given a learning rate.

    counterpart: the name of lomo-optim's optimizer with the same rule, if it has one.
    only: the one dtype it is run in; None for all.
    """

    name: str
    build: Callable[[nn.Module, float], Runner]
    counterpart: str = ""
    only: torch.dtype | None = None

    @property
    def ours(self) -> bool:
        return self.name.startswith("optstate ")


def contestants(dtype: torch.dtype) -> list[Contestant]:
    """Return all optimizers that take part in this dtype, recipes of one family next to each other."""
    plain = optstate.weights.Plain()
    everyone = [
        Contestant(OUR_ADALOMO, ours(adalomo.AdaLomo, weights=plain), LOMO_ADALOMO),
        Contestant(OUR_ADALOMO_AUTO, ours(adalomo.AdaLomo, weights="auto"), LOMO_ADALOMO, only=torch.bfloat16),
        Contestant(LOMO_ADALOMO, lomo_optim_adalomo, LOMO_ADALOMO),
        Contestant("pytorch_optimizer AdaLOMO", pytorch_optimizer_adalomo, LOMO_ADALOMO),
        Contestant(OUR_LOMO, ours(adalomo.Lomo, weights=plain), LOMO_LOMO),
        Contestant(LOMO_LOMO, lomo_optim_lomo, LOMO_LOMO),
        Contestant(SGD_FUSED, torchs(torch.optim.SGD, fused=True), LOMO_LOMO),
        Contestant(SGD_LOOP, torchs(torch.optim.SGD, foreach=False), LOMO_LOMO),
        Contestant("optstate Adafactor", ours(adalomo.Adafactor, weights=plain)),
        Contestant("torch Adafactor for-loop", torchs(torch.optim.Adafactor, foreach=False)),
        Contestant("optstate AdamW", ours(optstate.recipes.AdamW, weights=plain)),
        Contestant(ADAMW_FUSED, torchs(torch.optim.AdamW, fused=True)),
    ]
    return [c for c in everyone if c.only in (None, dtype)]


def by_name(names: Sequence[str], dtype: torch.dtype) -> list[Contestant]:
    """Return the contestants of these names, in this order."""
    found = {c.name: c for c in contestants(dtype)}
    return [found[name] for name in names]


def ours(recipe: Callable[..., optstate.Optimizer], **options: Any) -> Callable[[nn.Module, float], Runner]:
    """Build a recipe of optstate, stepped by `step()`."""

    def build(module: nn.Module, lr: float) -> Runner:
        optimizer = recipe(module.named_parameters(), lr=lr, **options)
        return Runner(module, optimizer.step, optimizer)

    return build


def torchs(optimizer_class: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[..., Runner]:
    """Build an optimizer of torch.optim."""

    def build(module: nn.Module, lr: float) -> Runner:
        optimizer = optimizer_class(module.parameters(), lr=lr, **options)
        return Runner(module, optimizer.step, optimizer)

    return build


def lomo_optim_adalomo(module: nn.Module, lr: float) -> Runner:
    """Build lomo-optim's AdaLomo without loss scaling, which would cost one more pass over the gradient."""
    adalomo_class = library("lomo_optim").AdaLomo
    with cuda_is_identity():
        optimizer = adalomo_class(module, lr=lr, loss_scale=0)

    def step() -> None:
        optimizer.step_num += 1
        optimizer.lr = lr
        optimizer.grad_func(0)

    return Runner(module, step, optimizer)


def lomo_optim_lomo(module: nn.Module, lr: float) -> Runner:
    """Build lomo-optim's Lomo."""
    optimizer = library("lomo_optim").Lomo(module, lr=lr)

    def step() -> None:
        optimizer.lr = lr
        optimizer.grad_func(0)

    return Runner(module, step, optimizer)


def pytorch_optimizer_adalomo(module: nn.Module, lr: float) -> Runner:
    """Build pytorch_optimizer's AdaLOMO, without loss scaling."""
    optimizer = library("pytorch_optimizer").AdaLOMO(module, lr=lr, loss_scale=0)

    def step() -> None:
        optimizer.num_steps += 1
        optimizer.lr = lr
        optimizer.grad_func(0)

    return Runner(module, step, optimizer)


@contextmanager
def cuda_is_identity() -> Iterator[None]:
    """Let `.cuda()` do nothing: lomo-optim's AdaLomo moves its state to a GPU even if there is none."""
    original = torch.Tensor.cuda
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    try:
        yield
    finally:
        torch.Tensor.cuda = original
