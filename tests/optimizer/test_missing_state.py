"""One rule for parameters with state on one side only, whichever way the state comes.

Every row of the table goes through every loader, whose outcomes must be the same; PyTorch's own lazily made state says
what a parameter without any has to begin with.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import optstate
from optstate.optimizer.missing_state import Gap, rule
from optstate.recipes import AdamW, AdamW8bit
from tests.support.models import assert_same

pytestmark = pytest.mark.slow

STEPS = 2
THE_ONE = "0.bias"


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 80), nn.ReLU(), nn.Linear(80, 64))


def train(module: nn.Module, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        module(torch.ones(2, 64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


# --- who saved it ---------------------------------------------------------------------------------------------------

Saved = tuple[nn.Module, Any]
THEN = ("trained", "frozen", "frozen after training")


def run_of(make: Callable[[nn.Module], Any], then: str) -> Saved:
    module = model()
    module[0].bias.requires_grad_(then != "frozen")
    optimizer = make(module)
    train(module, optimizer, STEPS)
    module[0].bias.requires_grad_(then == "trained")
    return module, optimizer


def own(module: nn.Module) -> AdamW:
    return AdamW(module.named_parameters(), lr=1e-2)


def of_torch(module: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(module.named_parameters(), lr=1e-2)


# --- how it is loaded -----------------------------------------------------------------------------------------------


def by_file(saved: Saved, module: nn.Module, optimizer: AdamW, folder: Path) -> None:
    optstate.save(saved[1], folder / "opt.safetensors")
    optstate.load(optimizer, folder / "opt.safetensors")


def by_set(saved: Saved, module: nn.Module, optimizer: AdamW, folder: Path) -> None:
    optstate.save(saved[1], folder / "opt.safetensors", max_shard_size=30_000)
    optstate.load(optimizer, folder / "opt.safetensors")


def by_conversion(saved: Saved, module: nn.Module, optimizer: AdamW, folder: Path) -> None:
    """From 8 bits, which the small vectors are not kept in."""
    source_module = copy.deepcopy(saved[0])
    source = AdamW8bit(source_module.named_parameters(), lr=1e-2)
    names = [name for name, _ in source_module.named_parameters()]
    for param, (name, original) in zip(source_module.parameters(), saved[0].named_parameters(), strict=True):
        assert name in names
        if original in saved[1].state:
            source.state.setdefault(param, source.runner.parameters.allocate(param, source.state))["step"] = saved[
                1
            ].state[original]["step"]
        elif param in source.state:
            del source.state[param]
    optstate.save(source, folder / "opt.safetensors")
    optstate.load(optimizer, folder / "opt.safetensors", allow_lossy=True)


def by_dict(saved: Saved, module: nn.Module, optimizer: AdamW, folder: Path) -> None:
    optimizer.load_state_dict(copy.deepcopy(saved[1].state_dict()))


def by_torch_file(saved: Saved, module: nn.Module, optimizer: AdamW, folder: Path) -> None:
    torch.save(saved[1].state_dict(), folder / "opt.pt")
    optstate.load(optimizer, folder / "opt.pt")


def by_converted_torch_file(saved: Saved, module: nn.Module, optimizer: AdamW, folder: Path) -> None:
    from optstate.checkpoint.open_checkpoint import open_checkpoint
    from optstate.checkpoint.operations.plan_recipe import plan_recipe
    from optstate.checkpoint.operations.run_conversion import write_native

    found = saved[1].state_dict()
    del found["param_groups"][0]["param_names"]
    torch.save(found, folder / "opt.pt")
    checkpoint = open_checkpoint(
        folder / "opt.pt", names="tests.optimizer.test_missing_state:model"
    )  # it has the shapes
    write_native(plan_recipe(checkpoint, "adamw"), folder / "opt.safetensors")
    optstate.load(optimizer, folder / "opt.safetensors")


def by_dcp(saved: Saved, module: nn.Module, optimizer: AdamW, folder: Path) -> None:
    options = StateDictOptions(strict=False)
    set_optimizer_state_dict(module, optimizer, get_optimizer_state_dict(*saved), options=options)


OWN = {
    "file": (own, by_file),
    "set": (own, by_set),
    "conversion": (own, by_conversion),
    "state_dict": (own, by_dict),
    "torch file": (own, by_torch_file),
}
FOREIGN = {
    "torch's state_dict": (of_torch, by_dict),
    "torch's file": (of_torch, by_torch_file),
    "torch's file, converted": (of_torch, by_converted_torch_file),
}
DCP = {"own by DCP": (own, by_dcp), "torch's by DCP": (of_torch, by_dcp)}

# --- the table ------------------------------------------------------------------------------------------------------

NOW = ("trains", "frozen", "frozen after building", "unfrozen after building")
"""Before loading; in the last two state was made at building, or was not."""

LOADED, ANEW, NOTHING, REFUSED = "loaded", "begun anew", "nothing", "refused"


def expected(how: str, then: str, now: str) -> str:
    """What the rule says, row by row."""
    there = then != "frozen"  # whether there is state in what is loaded
    if how in DCP:
        there = there and now in ("trains", "unfrozen after building")  # torch does not load what is frozen here
    if there:
        return LOADED
    if now in ("frozen", "frozen after building"):
        return NOTHING
    return REFUSED if how in OWN else ANEW


def built(now: str, trained: int) -> tuple[nn.Module, AdamW]:
    module = model()
    module[0].bias.requires_grad_(now in ("trains", "frozen after building"))
    optimizer = own(module)
    train(module, optimizer, trained)
    module[0].bias.requires_grad_(now in ("trains", "unfrozen after building"))
    return module, optimizer


TABLE = [
    (how, then, now, (0, 3)[(i + j + k) % 2])
    for i, how in enumerate([*OWN, *FOREIGN, *DCP])
    for j, then in enumerate(THEN)
    for k, now in enumerate(NOW)
]
"""Every row of the table, by turns loaded into a fresh optimizer and into one that has made three steps."""


@pytest.mark.parametrize(("how", "then", "now", "trained"), TABLE)
def test_every_loader_does_the_same(how: str, then: str, now: str, trained: int, tmp_path: Path) -> None:
    make, load = {**OWN, **FOREIGN, **DCP}[how]
    saved = run_of(make, then)
    module, optimizer = built(now, trained)
    bias = module[0].bias
    before, outcome = copy.deepcopy(optimizer.state_dict()), expected(how, then, now)
    had_state = bias in optimizer.state
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if outcome == REFUSED:
            with pytest.raises((ValueError, optstate.CheckpointError), match=f"nothing for '{THE_ONE}', which trains"):
                load(saved, module, optimizer, tmp_path)
            assert_same(optimizer.state_dict()["state"], before["state"])
            return
        load(saved, module, optimizer, tmp_path)
    said = [str(warning.message) for warning in caught if THE_ONE in str(warning.message)]
    if outcome == LOADED:
        assert optimizer.state[bias]["step"] == STEPS
        if how != "conversion":
            theirs = saved[1].state[saved[0][0].bias]
            assert torch.equal(optimizer.state[bias]["exp_avg"], theirs["exp_avg"])
        assert not said
    elif outcome == ANEW:
        state = optimizer.state[bias]
        assert state["step"] == 0
        assert all(not value.any() for value in state.values() if isinstance(value, Tensor))
        assert "begun anew" in said[0]
    else:
        assert bias not in optimizer.state
        assert bool(said) == had_state
    others = [p for p in module.parameters() if p is not bias]
    assert {optimizer.state[p]["step"] for p in others} == {STEPS}
    bias.requires_grad_(True)  # and whatever it was, it goes on
    train(module, optimizer, 1)
    assert optimizer.state[bias]["step"] == (STEPS if outcome == LOADED else 0) + 1
    assert optimizer.plan().params[1].trainable


def test_the_rule_in_one_table() -> None:
    for here in (False, True):
        for trains in (False, True):
            for complete in (False, True):
                given = {"here": here, "trains": trains, "complete": complete}
                assert rule("p", saved=True, **given) is Gap.FILL
                if trains and complete:
                    with pytest.raises(ValueError, match="nothing for 'p'"):
                        rule("p", saved=False, **given)
                else:
                    expected = Gap.ANEW if trains else Gap.DROP if here else Gap.NONE
                    assert rule("p", saved=False, **given) is expected


def test_what_begins_anew_steps_as_a_fresh_one_does() -> None:
    """Against PyTorch, which makes state at the first update, from the same weights and gradients."""
    source_module, source = run_of(of_torch, "frozen")
    module, optimizer = built("trains", 3)
    theirs_module = model()
    theirs = torch.optim.AdamW(theirs_module.named_parameters(), lr=1e-2)
    for each in (module, theirs_module):
        each.load_state_dict(source_module.state_dict())
    theirs.load_state_dict(copy.deepcopy(source.state_dict()))
    with pytest.warns(UserWarning, match="begun anew"):
        optimizer.load_state_dict(copy.deepcopy(source.state_dict()))
    train(module, optimizer, 3)
    train(theirs_module, theirs, 3)
    for a, b in zip(module.parameters(), theirs_module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)  # fp32 weights of order one, steps of 1e-2


def test_an_unfrozen_parameter_has_state_once_it_is_saved(tmp_path: Path) -> None:
    """Unfrozen, and saved before its first gradient: in a new process it trains from the beginning."""
    module, optimizer = built("unfrozen after building", 2)
    optstate.save(optimizer, tmp_path / "opt.safetensors")
    for load in (
        lambda other: optstate.load(other, tmp_path / "opt.safetensors"),
        lambda other: other.load_state_dict(optimizer.state_dict()),
    ):
        other_module, other = built("trains", 0)
        other_module.load_state_dict(module.state_dict())
        load(other)
        assert other.state[other_module[0].bias]["step"] == 0
        run = copy.deepcopy((module, optimizer))
        train(*run, 1)
        train(other_module, other, 1)
        states = [[opt.state[p] for p in m.parameters()] for m, opt in (run, (other_module, other))]
        assert_same(*states)


def test_no_statistics_at_all_are_no_state() -> None:
    empty = torch.optim.AdamW(model().named_parameters()).state_dict()
    _, optimizer = built("trains", 0)
    with pytest.raises(ValueError, match="no statistics at all"):
        optimizer.load_state_dict(empty)
