"""Engines under which a fused update would be wrong are recognised and refused, each with a way out."""

from __future__ import annotations

import copy
import gc
import os
import pickle
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from adalomo import AdaLomo, Lomo
from optstate.integrations import engines
from tests.support.models import assert_same, loss_of, mlp, weights_of

pytestmark = pytest.mark.peer


@pytest.fixture
def one_process_group(tmp_path: Any) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    gc.collect()
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
class TestDistributed:
    def test_ddp_is_refused_when_fusing(self) -> None:
        model = mlp()
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        with pytest.raises(RuntimeError, match=r"DistributedDataParallel.*Use FSDP2.*or leave the update to step\(\)"):
            AdaLomo(wrapped.parameters(), fused_backward=True)

    def test_ddp_wrapped_later_is_refused_at_the_first_backward(self) -> None:
        model = mlp()
        optimizer = AdaLomo(model.named_parameters(), fused_backward=True)
        before = weights_of(model)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        with pytest.raises(RuntimeError, match="DistributedDataParallel"):
            wrapped(torch.ones(2, 8)).sum().backward()
        assert_same(weights_of(model), before)
        optimizer.state_dict()

    def test_ddp_trains_unfused(self) -> None:
        model, plain = mlp(), mlp()
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        optimizer, other = AdaLomo(wrapped.parameters()), AdaLomo(plain.parameters())
        for step in range(3):
            for m, o in ((wrapped, optimizer), (plain, other)):
                (m(torch.ones(2, 8) * step).square().mean()).backward()
                o.step()
                o.zero_grad()
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)

    def test_fsdp1_is_refused(self) -> None:
        from torch.distributed.fsdp import FullyShardedDataParallel

        os.environ.setdefault("RANK", "0")
        for use_orig_params in (True, False):
            wrapped = FullyShardedDataParallel(mlp(), device_id=torch.device("cpu"), use_orig_params=use_orig_params)
            with pytest.raises(RuntimeError, match="FSDP1, which never calls gradient hooks: use FSDP2"):
                Lomo(wrapped.parameters(), fused_backward=True)
            with pytest.raises(TypeError, match="a piece of a flat parameter of FSDP1"):
                AdaLomo(wrapped.parameters())


def test_a_grad_scaler_is_refused_when_fusing() -> None:
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(RuntimeError, match=r"GradScaler is in use.*Train in bf16 without a scaler"):
        AdaLomo(mlp().named_parameters(), fused_backward=True)
    assert scaler.is_enabled()


def test_a_grad_scaler_made_later_is_refused_before_anything_changes() -> None:
    model = mlp()
    optimizer = AdaLomo(model.named_parameters(), fused_backward=True)
    before = weights_of(model)
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(RuntimeError, match="GradScaler is in use"):
        scaler.scale(loss_of(model, 0)).backward()
    assert torch.equal(model[3].weight, before["3.weight"])
    del scaler
    gc.collect()
    loss_of(model, 0).backward()
    optimizer.step()


def test_a_disabled_grad_scaler_is_no_obstacle() -> None:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    model = mlp()
    optimizer = AdaLomo(model.named_parameters(), fused_backward=True)
    scaler.scale(loss_of(model, 0)).backward()
    scaler.step(optimizer)
    scaler.update()


class Searched:
    """Counts the searches through all objects."""

    def __init__(self) -> None:
        self._watched = mock.patch.object(engines, "instances_of", wraps=engines.instances_of)

    def by(self, function: Callable[[], Any]) -> int:
        with self._watched as instances_of:
            function()
        return int(instances_of.call_count)


def fused_step() -> None:
    model = mlp()
    optimizer = AdaLomo(model.named_parameters(), fused_backward=True)
    loss_of(model, 0).backward()
    optimizer.step()


def test_nothing_is_searched_where_no_scaler_and_no_process_group_is() -> None:
    gc.collect()  # scalers and classes of scalers that other tests made
    assert Searched().by(fused_step) == 0
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    assert Searched().by(fused_step) == 0
    assert not scaler.is_enabled()


@pytest.mark.usefixtures("one_process_group")
def test_with_a_process_group_wrappers_are_searched_when_fusing_and_at_the_first_backward() -> None:
    assert Searched().by(fused_step) == 2


def used_scaler() -> torch.amp.GradScaler:
    """A scaler after a step, when its records were made anew."""
    scaler, model = torch.amp.GradScaler("cpu"), mlp()
    optimizer = torch.optim.SGD(model.parameters())
    scaler.scale(loss_of(model, 0)).backward()
    scaler.step(optimizer)
    scaler.update()
    return scaler


def derived_scaler() -> torch.amp.GradScaler:
    class SomebodyElses(torch.amp.GradScaler):
        pass

    return SomebodyElses("cpu")


def sharded_scaler() -> torch.amp.GradScaler:
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    return ShardedGradScaler("cpu")


@pytest.mark.parametrize(
    "make",
    [
        sharded_scaler,
        derived_scaler,
        lambda: copy.deepcopy(torch.amp.GradScaler("cpu")),
        lambda: pickle.loads(pickle.dumps(torch.amp.GradScaler("cpu"))),
        used_scaler,
    ],
    ids=["sharded", "derived", "copied", "unpickled", "used"],
)
def test_every_kind_of_enabled_scaler_is_found(make: Callable[[], torch.amp.GradScaler]) -> None:
    scaler = make()
    with pytest.raises(RuntimeError, match="GradScaler is in use"):
        AdaLomo(mlp().named_parameters(), fused_backward=True)
    assert scaler.is_enabled()


def test_unfused_training_works_with_a_grad_scaler() -> None:
    model = mlp()
    before = weights_of(model)
    optimizer = AdaLomo(model.named_parameters())
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_an_optimizer_of_torch_in_the_backward_is_refused() -> None:
    model = mlp()
    model[0].weight._in_backward_optimizers = [object()]
    with pytest.raises(RuntimeError, match="already has an optimizer in its backward pass"):
        AdaLomo(model.named_parameters(), fused_backward=True)


def test_deepspeed_parameters_are_refused() -> None:
    model = mlp()
    model[0].weight.ds_id = 0
    with pytest.raises(RuntimeError, match="DeepSpeed ZeRO"):
        AdaLomo(model.named_parameters(), fused_backward=True)
