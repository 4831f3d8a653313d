"""Steps whose learning rate and count a device keeps, as in a CUDA graph: the same results, and nobody waits."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import optstate
from adalomo import AdaLomo
from optstate import recipes, stores, updates
from optstate.kernels.triton_steps import interprets
from optstate.optimizer import step_runner
from optstate.stores import Guard, NonFiniteGradientError

pytest.importorskip("triton", reason="triton is not installed")
if not interprets():
    pytest.skip("needs TRITON_INTERPRET=1: test_in_interpreter.py starts it", allow_module_level=True)

from tests.kernels.triton.test_steps import adam
from tests.kernels.triton.test_tables import give_gradients, have_same_bits, params_of, tensors_of

SHAPES = [(6, 7), (33,), (9,)]


def of(chain: Any) -> Any:
    return lambda named, lr: optstate.Optimizer(named, chain, lr=lr)


CASES: dict[str, Any] = {
    "adam": of(adam(stores.Full("bfloat16", True), stores.Full())),
    "heavy ball": of(optstate.chain(updates.momentum(heavy_ball=True, dampening=0.1))),
    "adalomo": partial(AdaLomo, weight_decay=0.1),
    "came": partial(recipes.get("came"), weight_decay=0.1),
    "sm3": recipes.get("sm3"),
}


def build(make: Any, on_device: bool) -> Any:
    generator = torch.Generator().manual_seed(1)
    params = [nn.Parameter(torch.randn(shape, generator=generator).bfloat16()) for shape in SHAPES]
    lr = torch.tensor(0.01)
    optimizer = make([(f"layer.{i}", param) for i, param in enumerate(params)], lr=lr if on_device else float(lr))
    optimizer.use_backend("triton")
    if on_device:
        optimizer.count_on_device()
    return optimizer


class NoReading(TorchDispatchMode):
    """Refuses what would make the host wait for a number of a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads a number of the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_numbers_of_the_host(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags of gradients are read later, as on CUDA; matrices take launches of their own, others share them."""
    ours, theirs = build(CASES[name], on_device=True), build(CASES[name], on_device=False)
    for seed in (1, 2):
        give_gradients(ours, seed)
        give_gradients(theirs, seed)
        theirs.step()
        with monkeypatch.context() as patch, NoReading():
            patch.setattr(step_runner, "Guard", partial(Guard, deferred=True))
            ours.runner.clock.begin_step()
            ours.runner.update_all(params_of(ours), 1.0)
            ours.runner.clock.close_step()
        ours.runner.consistency.close()
    assert have_same_bits(tensors_of(ours), tensors_of(theirs))
    ours.read_clock()
    assert [ours.state[param]["step"] for param in params_of(ours)] == [2, 2, 2]


def test_steps_that_a_graph_replays_are_counted() -> None:
    """A replay counts on the device alone. What the host takes over is the number of all steps."""
    ours, theirs = build(CASES["adam"], on_device=True), build(CASES["adam"], on_device=False)
    for optimizer, step in ((ours, 1), (theirs, 1)):
        give_gradients(optimizer, step)
        optimizer.step()
    ours.runner.clock.ticks += 5
    for param in params_of(theirs):
        theirs.state[param]["step"] += 5
    for optimizer in (ours, theirs):
        give_gradients(optimizer, 2)
        optimizer.step()
    assert have_same_bits(tensors_of(ours), tensors_of(theirs))
    saved = ours.state_dict()["state"]
    assert [state["step"] for state in saved.values()] == [7, 7, 7]
    ours.load_state_dict(theirs.state_dict())
    for optimizer in (ours, theirs):
        give_gradients(optimizer, 3)
        optimizer.step()
    assert have_same_bits(tensors_of(ours), tensors_of(theirs))


def test_gradients_that_were_not_finite_are_told_when_the_count_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = build(CASES["adam"], on_device=True)
    give_gradients(optimizer, 1)
    params_of(optimizer)[1].grad[0] = torch.inf
    before = tensors_of(optimizer)[3].clone()
    monkeypatch.setattr(step_runner, "Guard", partial(Guard, deferred=True))
    optimizer.step()
    with pytest.raises(NonFiniteGradientError, match="1 gradients were not finite"):
        optimizer.read_clock()
    optimizer.read_clock()
    assert torch.equal(before, tensors_of(optimizer)[3])


def test_what_a_device_cannot_count_is_refused() -> None:
    by_schedule = of(optstate.chain(updates.sign_momentum(), updates.scale_by_schedule(lambda step, lr: lr / step)))
    for make in (by_schedule, of(optstate.chain(updates.clip_by_norm(1.0)))):
        optimizer = build(make, on_device=True)
        give_gradients(optimizer, 1)
        with pytest.raises(RuntimeError, match="no step whose numbers a device can make"):
            optimizer.step()
    fused = build(CASES["adam"], on_device=False)
    optstate.fuse_backward(fused)
    with pytest.raises(RuntimeError, match="neither a fused backward pass"):
        fused.count_on_device()
