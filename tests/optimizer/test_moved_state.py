"""State is saved and loaded at moments when nothing else writes it: not beside a step, not inside a backward pass."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import optstate
from optstate.checkpoint.files.safetensors_writer import SafetensorsFile
from optstate.checkpoint.open_checkpoint import open_checkpoint
from optstate.distributed.placement import copy_part
from optstate.optimizer.moved_state import MovedStateError
from optstate.recipes import AdamW, AdamW8bit
from tests.support.models import assert_same, state_of

pytestmark = pytest.mark.slow

COUNT = 6


def trained(make: Callable[..., optstate.Optimizer] = AdamW, **given: Any) -> tuple[nn.ModuleList, optstate.Optimizer]:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(80, 64, bias=False) for _ in range(COUNT)])
    optimizer = make(model.named_parameters(), **given)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    return model, optimizer


def at_call(number: int, owner: Any, name: str, what: Callable[[], Any]) -> Any:
    """Something happens before the call of this number of a method."""
    method, calls = getattr(owner, name), []

    def called(*args: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            what()
        return method(*args, **more)

    return mock.patch.object(owner, name, called)


def write_one(optimizer: optstate.Optimizer) -> Callable[[], Any]:
    """A step of another thread that has only begun: one tensor is written, no step is counted."""
    state = list(optimizer.state.values())[3]
    return next(value for value in state.values() if isinstance(value, Tensor) and value.is_floating_point()).zero_


BESIDE = {"a step": lambda optimizer: optimizer.step, "a begun step": write_one}


@pytest.fixture(params=list(BESIDE))
def beside(request: pytest.FixtureRequest) -> Callable[[optstate.Optimizer], Callable[[], Any]]:
    return BESIDE[request.param]


# --- saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 70_000], ids=["file", "set"])
@pytest.mark.parametrize("number", [1, 2, COUNT, 2 * COUNT])
@pytest.mark.parametrize("make", [AdamW, AdamW8bit])
def test_a_save_beside_a_step_is_refused(
    make: Any, number: int, limit: int | None, beside: Any, tmp_path: Path
) -> None:
    _, optimizer = trained(make)
    file = tmp_path / "opt.safetensors"
    optstate.save(optimizer, file, max_shard_size=limit)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    refusal = pytest.raises(optstate.CheckpointError, match="not saved: save.. refused: '.*' was updated")
    with at_call(number, SafetensorsFile, "put", beside(optimizer)), refusal as caught:
        optstate.save(optimizer, file, max_shard_size=limit)
    assert caught.value.refused
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    optstate.save(optimizer, file, max_shard_size=limit)  # and a quiet moment is enough
    other = make(nn.ModuleList([nn.Linear(80, 64, bias=False) for _ in range(COUNT)]).named_parameters())
    optstate.load(other, file)
    assert_same(state_of(other), state_of(optimizer))


def test_saves_beside_a_stepping_thread_are_right_or_refused(tmp_path: Path) -> None:
    """With gradients of ones the average after n steps is 1 - 0.9^n, in all elements of a parameter alike."""
    _, optimizer = trained()
    stop, file = threading.Event(), tmp_path / "opt.safetensors"

    def run() -> None:
        while not stop.wait(0.002):
            optimizer.step()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    saved = refused = 0
    try:
        while saved + refused < 40:
            try:
                optstate.save(optimizer, file)
            except (optstate.CheckpointError, MovedStateError, optstate.InconsistentStateError):
                refused += 1
                continue
            saved += 1
            names = [param.name for param in open_checkpoint(file).document.parameters]
            other = AdamW(nn.ModuleList([nn.Linear(80, 64, bias=False) for _ in range(COUNT)]).named_parameters())
            optstate.load(other, file)
            for name, state in zip(names, other.state.values(), strict=True):
                average = 1 - 0.9 ** state["step"]
                low, high = state["exp_avg"].aminmax()
                assert low == high, name
                assert abs(low.item() - average) < 1e-5, name  # rounding of fp32 adds up over the steps
    finally:
        stop.set()
        thread.join()
    assert refused + saved == 40


def test_state_dict_beside_a_step_is_refused(beside: Any) -> None:
    _, optimizer = trained()
    refusal = pytest.raises(MovedStateError, match="state_dict.. refused: '.*' was updated while it was read")
    with at_call(1, optstate.Optimizer, "plan", beside(optimizer)), refusal:
        optimizer.state_dict()
    optimizer.state_dict()


def test_what_reads_state_again_and_again_is_quiet(tmp_path: Path) -> None:
    """Neither saving nor loading counts as writing beside it."""
    _, optimizer = trained()
    for _ in range(3):
        optstate.save(optimizer, tmp_path / "opt.safetensors")
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optstate.load(optimizer, tmp_path / "opt.safetensors")
    with torch.inference_mode():
        optstate.save(optimizer, tmp_path / "opt.safetensors")


# --- loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [2, 2 * COUNT])
def test_a_load_beside_a_step_is_refused_and_remembered(number: int, beside: Any) -> None:
    _, optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    calls = []

    def copied(own: Tensor, theirs: Tensor) -> None:
        calls.append(1)
        copy_part(own, theirs)
        if len(calls) == number:
            thread = threading.Thread(target=lambda: _quietly(beside(optimizer)))
            thread.start()
            thread.join()

    before = [state["step"] for state in optimizer.state.values()]
    if number == 2 * COUNT and beside is write_one:
        with pytest.raises(MovedStateError, match="was updated while it was loaded"):
            optimizer.load_prepared(lambda: (saved, copied))
        with pytest.raises(optstate.InconsistentStateError):
            optimizer.step()
        optimizer.load_state_dict(saved)
    else:  # the step is refused, as a load has begun, or what was written is loaded afterwards
        optimizer.load_prepared(lambda: (saved, copied))
    assert [state["step"] for state in optimizer.state.values()] == before
    assert_same(optimizer.state_dict()["state"], saved["state"])
    optimizer.step()


def _quietly(action: Callable[[], Any]) -> None:
    with suppress(optstate.InconsistentStateError):
        action()


def test_a_step_that_begins_within_a_load_is_refused() -> None:
    _, optimizer = trained()
    saved, said = copy.deepcopy(optimizer.state_dict()), []

    def copied(own: Tensor, theirs: Tensor) -> None:
        for action in (optimizer.step, optimizer.state_dict):
            with pytest.raises(optstate.InconsistentStateError) as caught:
                action()
            said.append(str(caught.value))
        copy_part(own, theirs)

    optimizer.load_prepared(lambda: (saved, copied))
    assert all("loading has not come to its end" in text for text in said)
    assert said


@pytest.mark.parametrize("number", range(1, 2 * COUNT + 1))
def test_an_interrupted_load_is_remembered(number: int) -> None:
    _, optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    calls = []

    def interrupted(own: Tensor, theirs: Tensor) -> None:
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        copy_part(own, theirs)

    with pytest.raises(KeyboardInterrupt):
        optimizer.load_prepared(lambda: (saved, interrupted))
    with pytest.raises(optstate.InconsistentStateError, match="loading ended at"):
        optimizer.step()
    optimizer.load_state_dict(saved)
    optimizer.step()


# --- inside a backward pass -----------------------------------------------------------------------------------------


def loads(module: nn.Module, optimizer: optstate.Optimizer, folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    saved = copy.deepcopy(optimizer.state_dict())
    by_name = copy.deepcopy(get_optimizer_state_dict(module, optimizer))
    optstate.save(optimizer, folder / "opt.safetensors")
    torch.save(saved, folder / "opt.pt")
    yield "load_state_dict", lambda: optimizer.load_state_dict(saved)
    yield "load", lambda: optstate.load(optimizer, folder / "opt.safetensors")
    yield "load a torch file", lambda: optstate.load(optimizer, folder / "opt.pt")
    yield "DCP", lambda: set_optimizer_state_dict(module, optimizer, by_name)


@pytest.mark.parametrize("fused", [False, True], ids=["stepped", "fused"])
def test_loading_inside_a_backward_pass_is_refused(fused: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    optimizer = AdamW(module.named_parameters())
    if fused:
        optstate.fuse_backward(optimizer)
    module(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    for name, load in loads(module, optimizer, tmp_path):
        before, said = state_of(optimizer), []

        def hook(grad: Tensor, load: Callable[[], Any] = load, said: list[str] = said) -> None:
            with pytest.raises((RuntimeError, optstate.CheckpointError)) as caught:
                load()
            said.append(str(caught.value))

        y = module[0](torch.ones(2, 8))
        y.register_hook(hook)
        module[1](y).sum().backward(inputs=[y])
        assert "loading inside a backward pass is refused" in said[0], name
        assert_same(state_of(optimizer), before)
        load()  # outside it is allowed, and after a pass that failed, too


def test_loading_after_a_backward_pass_that_failed_is_allowed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    optimizer = AdamW(module.named_parameters())
    optstate.fuse_backward(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())

    def fail(grad: Tensor) -> None:
        raise ValueError("boom")

    y = module[0](torch.ones(2, 8))
    y.register_hook(fail)
    with pytest.raises(ValueError, match="boom"):
        module[1](y).sum().backward()
    optimizer.load_state_dict(saved)
    module(torch.ones(2, 8)).sum().backward()
    optimizer.step()
