"""What is known of a weight that was written: its version, and that its old value is gone."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import optstate
from optstate import weights
from optstate.integrations import live_objects
from optstate.recipes import registry
from tests.support.models import loss_of, mlp, weights_of

RECIPES = registry.names()
WRITTEN = [weights.Plain(), weights.StochasticRounding(), weights.Kahan(), weights.Split(8), weights.Split(16)]


def written_by(recipe: str, size: int, dtype: torch.dtype = torch.float32, **more: Any) -> tuple[nn.Parameter, Any]:
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(size, size).to(dtype))
    return param, registry.get(recipe)([("p", param)], lr=1e-2, **more)


class TestVersions:
    @pytest.mark.parametrize("size", [8, 96], ids=["in full", "in the recipe's stores"])
    @pytest.mark.parametrize("recipe", RECIPES)
    def test_every_tensor_that_a_step_writes_moves_its_version(self, recipe: str, size: int) -> None:
        """PyTorch's fused AdamW, which small and full parameters go through, does not move versions by itself."""
        param, optimizer = written_by(recipe, size)
        tensors = [param, *(value for value in optimizer.state[param].values() if isinstance(value, Tensor))]
        for _ in range(2):
            before = [(tensor._version, tensor.detach().clone()) for tensor in tensors]
            param.grad = torch.randn_like(param)
            optimizer.step()
            for tensor, (version, value) in zip(tensors, before, strict=True):
                assert tensor._version > version or torch.equal(tensor, value)
            assert param._version > before[0][0]

    @pytest.mark.parametrize("how", WRITTEN, ids=str)
    @pytest.mark.parametrize("recipe", ["adalomo", "adamw", "adamw8bit", "sgd", "lion"])
    def test_a_graph_from_before_a_step_is_refused(self, recipe: str, how: Any) -> None:
        param, optimizer = written_by(recipe, 96, torch.bfloat16, weights=how)
        loss = (torch.ones(2, 96, dtype=torch.bfloat16, requires_grad=True) @ param).square().sum()
        loss.backward(retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    @pytest.mark.slow
    @pytest.mark.parametrize("recipe", RECIPES)
    def test_a_weight_used_with_and_without_gradient_is_not_written_under_the_graph(self, recipe: str) -> None:
        """As in a VQ-VAE, whose codebook is used once more behind a stop-gradient: its gradient is complete while the
        other use still needs the old weight."""
        param, optimizer = written_by(recipe, 96)
        optimizer.use_backend("eager")  # compiled steps of small parameters wait for the end of the pass
        optstate.fuse_backward(optimizer)
        x = torch.randn(2, 96, requires_grad=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (x @ param.detach() @ torch.eye(96) @ param).square().sum().backward()

    @pytest.mark.parametrize("how", ["state_dict", "file"])
    def test_loading_moves_versions_too(self, how: str, tmp_path: Path) -> None:
        """A file is read straight into the memory of the state."""
        param, optimizer = written_by("adamw8bit", 96)
        param.grad = torch.randn_like(param)
        optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        optstate.save(optimizer, tmp_path / "opt.safetensors")
        tensors = {key: value for key, value in optimizer.state[param].items() if isinstance(value, Tensor)}
        before = {key: value._version for key, value in tensors.items()}
        if how == "file":
            optstate.load(optimizer, tmp_path / "opt.safetensors")
        else:
            optimizer.load_state_dict(saved)
        assert all(optimizer.state[param][key] is value for key, value in tensors.items())
        assert all(value._version > before[key] for key, value in tensors.items())

    def test_a_gradient_that_is_refused_moves_no_version(self) -> None:
        param, optimizer = written_by("adamw", 8)
        param.grad = torch.full_like(param, float("nan"))
        with pytest.raises(optstate.NonFiniteGradientError):
            optimizer.step()
        assert param._version == 0


def block_with_a_detached_weight(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    return lambda h: torch.tanh(F.linear(h, layer.weight.detach()))


def block_without_gradient(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    def block(h: Tensor) -> Tensor:
        with torch.no_grad():
            target = layer(h)
        return torch.tanh(h) * target

    return block


def block_with_data(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    return lambda h: torch.tanh(h @ layer.weight.data)


class KeepsItsWeight(torch.autograd.Function):
    """A linear layer that keeps its weight where autograd does not look."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer = layer
        return x @ layer.weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.weight.t(), None


class TestStaleReads:
    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("block", [block_with_a_detached_weight, block_without_gradient, block_with_data])
    def test_a_block_that_is_computed_again_does_not_get_the_new_weight(self, block: Any, fused: bool) -> None:
        torch.manual_seed(0)
        layer, inner = nn.Linear(6, 6), nn.Linear(6, 6)
        optimizer = optstate.recipes.AdamW([*layer.parameters(), *inner.parameters()], lr=1e-2)
        x = torch.randn(3, 6)
        h = checkpoint(block(layer), inner(x), use_reentrant=False)
        loss = layer(h).square().mean()
        if not fused:
            loss.backward()
            optimizer.step()
            return
        optimizer.use_backend("eager")  # compiled steps of small parameters wait for the end of the pass
        optstate.fuse_backward(optimizer)
        with pytest.raises(RuntimeError, match=r"would read 'param_0'.* in the backward pass that has updated it"):
            loss.backward()
        with pytest.raises(optstate.InconsistentStateError):
            optimizer.step()
        layer(x)
        assert type(layer.weight) is nn.Parameter

    def test_a_function_that_keeps_its_weight_does_not_get_the_new_one(self) -> None:
        layer, first = nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        optimizer = optstate.recipes.AdamW([*layer.parameters(), *first.parameters()], lr=1e-2)
        optstate.fuse_backward(optimizer)
        with pytest.raises(RuntimeError, match="save_for_backward"):
            layer(KeepsItsWeight.apply(first(torch.ones(3, 6)), layer)).square().mean().backward()

    def test_checkpointed_blocks_that_use_their_weights_with_gradient_are_as_without_checkpoints(self) -> None:
        results = []
        for checkpointed in (False, True):
            model = mlp()
            optimizer = optstate.recipes.AdamW(model.named_parameters(), lr=1e-2)
            optstate.fuse_backward(optimizer)
            for step in range(3):
                x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
                for layer in (model[0], model[1], model[2], model[3]):
                    x = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
                x.square().mean().backward()
                optimizer.step()
            results.append(weights_of(model))
        assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])

    def test_weights_are_plain_parameters_again_after_every_end_of_a_pass(self) -> None:
        def fails(_: Tensor) -> None:
            raise MemoryError

        for failing in (False, True):
            model = mlp()
            optimizer = optstate.recipes.AdamW(model.named_parameters(), lr=1e-2)
            optstate.fuse_backward(optimizer)
            loss = loss_of(model, 0)
            if failing:
                model[0].weight.register_hook(fails)
                with pytest.raises(MemoryError):
                    loss.backward()
                assert {"3.weight", "3.bias"} <= set(model.state_dict())  # read outside of a backward pass
                model[3].weight.detach().clone()
                optimizer.accept_partial_step()
            else:
                loss.backward()
            assert {type(p) for p in model.parameters()} == {nn.Parameter}

    def test_a_pass_of_another_thread_may_read_what_this_one_has_updated(self) -> None:
        layer, inner, head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        optimizer = optstate.recipes.AdamW([*layer.parameters(), *inner.parameters()], lr=1e-2)
        optstate.fuse_backward(optimizer)
        read: list[Tensor] = []

        def block(x: Tensor) -> Tensor:
            with torch.no_grad():
                read.append(layer(x))
            return head(x) * read[-1]

        def in_another_thread(_: Tensor) -> None:
            assert type(layer.weight) is not nn.Parameter
            thread = threading.Thread(target=other.backward)
            thread.start()
            thread.join()

        other = checkpoint(block, torch.ones(2, 6), use_reentrant=False).sum()
        inner.weight.register_hook(in_another_thread)
        layer(inner(torch.ones(3, 6))).square().mean().backward()
        optimizer.step()
        assert len(read) == 2
        assert head.weight.grad is not None

    def test_a_copy_of_a_model_whose_pass_failed_has_plain_parameters(self) -> None:
        def fails(_: Tensor) -> None:
            raise MemoryError

        model = mlp()
        optimizer = optstate.recipes.AdamW(model.named_parameters(), lr=1e-2)
        optstate.fuse_backward(optimizer)
        handle = model[0].weight.register_hook(fails)
        with pytest.raises(MemoryError):
            loss_of(model, 0).backward()
        handle.remove()
        assert type(model[3].weight) is not nn.Parameter
        assert {type(p) for p in copy.deepcopy(model).parameters()} == {nn.Parameter}

    def test_what_tells_about_a_weight_may_be_asked_while_the_pass_runs(self) -> None:
        model = mlp()
        optimizer = optstate.recipes.AdamW(model.named_parameters(), lr=1e-2)
        optstate.fuse_backward(optimizer)
        seen: list[Any] = []
        last = model[3].weight
        model[0].weight.register_hook(
            lambda _: seen.append((last.shape, last.dtype, last.device, last.numel(), last.grad, last.requires_grad))
        )
        loss_of(model, 0).backward()
        assert seen == [(torch.Size([4, 16]), torch.float32, torch.device("cpu"), 64, None, True)]


class TestLifetime:
    def test_a_fused_optimizer_that_is_deleted_is_gone_at_once(self) -> None:
        gc.disable()  # nothing may wait for the collector of circles
        try:
            model = mlp()
            optimizer = optstate.recipes.AdamW(model.named_parameters(), lr=1e-2)
            optstate.fuse_backward(optimizer)
            loss_of(model, 0).backward()
            optimizer.step()
            gone, weight = weakref.ref(optimizer), weights_of(model)["0.weight"]
            del optimizer
            assert gone() is None
            loss_of(model, 1).backward()
            assert torch.equal(model[0].weight, weight)
            assert model[0].weight.grad is not None
            assert not model[0].weight._post_accumulate_grad_hooks
        finally:
            gc.enable()

    @pytest.mark.slow
    def test_the_first_optimizer_of_a_process_is_gone_at_once_too(self) -> None:
        """PyTorch imports its compiler when that one is built, which keeps the frames of its callers for a while."""
        code = (
            "import gc, weakref, torch, optstate; gc.disable()\n"
            "def built():\n"
            "    model = torch.nn.Linear(4, 4)\n"
            "    optimizer = optstate.recipes.AdamW(model.named_parameters())\n"
            "    optstate.fuse_backward(optimizer)\n"
            "    return weakref.ref(optimizer), weakref.ref(model.weight)\n"
            "assert [reference() for reference in built()] == [None, None]"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr

    def test_weights_are_freed_with_model_and_optimizer(self) -> None:
        gc.disable()
        try:
            model = mlp()
            optimizer = optstate.recipes.AdamW(model.named_parameters(), lr=1e-2)
            handle = optstate.fuse_backward(optimizer)
            gone = weakref.ref(model[0].weight)
            del model, optimizer, handle
            assert gone() is None
        finally:
            gc.enable()

    def test_the_handle_keeps_its_optimizer(self) -> None:
        model = mlp()
        fused = optstate.fuse_backward(optstate.recipes.AdamW(model.named_parameters(), lr=1e-2))
        before = weights_of(model)["0.weight"]
        loss_of(model, 0).backward()
        fused.optimizer.step()
        assert not torch.equal(model[0].weight, before)
        assert fused.optimizer.fused is fused


class TestNewerOptimizers:
    def test_a_newer_one_takes_the_hooks_over_with_a_warning(self) -> None:
        model, plain = mlp(), mlp()
        older = optstate.recipes.AdamW(model.named_parameters(), lr=1.0)
        optstate.fuse_backward(older)
        newer = optstate.recipes.AdamW(model.named_parameters(), lr=1e-2)
        with pytest.warns(UserWarning, match=r"an older AdamW over 6 parameters was fused"):
            optstate.fuse_backward(newer)
        reference = optstate.recipes.AdamW(plain.named_parameters(), lr=1e-2)
        for step in range(3):
            for m, optimizer in ((model, newer), (plain, reference)):
                loss_of(m, step).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
        assert older.fused is None
        with pytest.raises(RuntimeError, match="a newer AdamW was fused over parameters of this optimizer"):
            older.step()
        del newer
        older.step()  # nobody else takes its gradients any more

    def test_a_cell_that_is_run_again_says_nothing(self, recwarn: pytest.WarningsRecorder) -> None:
        model = mlp()
        optimizer = optstate.recipes.AdamW(model.named_parameters(), lr=1e-2)
        optstate.fuse_backward(optimizer)
        del optimizer
        optimizer = optstate.recipes.AdamW(model.named_parameters(), lr=1e-2)
        optstate.fuse_backward(optimizer)
        assert not [warning for warning in recwarn if "fused over" in str(warning.message)]

    def test_one_that_is_replaced_inside_a_step_can_close_it(self) -> None:
        model = mlp()
        older = optstate.recipes.AdamW(model.named_parameters(), lr=1e-2)
        optstate.fuse_backward(older)
        loss_of(model, 0).backward()
        newer = optstate.recipes.AdamW(model.named_parameters(), lr=1e-2)
        with pytest.warns(UserWarning, match="fused over"):
            optstate.fuse_backward(newer)
        with pytest.raises(optstate.InconsistentStateError, match="Call step"):
            older.state_dict()
        older.step()
        assert older.state_dict()["state"][0]["step"] == 1

    def test_fusing_again_inside_a_step_lets_no_parameter_be_updated_twice(self) -> None:
        model = mlp()
        optimizer = optstate.recipes.AdamW(model.named_parameters(), lr=1e-2)
        optstate.fuse_backward(optimizer)
        loss_of(model, 0).backward()
        optimizer.fused.remove()
        optstate.fuse_backward(optimizer)
        with pytest.raises(RuntimeError, match="arrived a second time before step"):
            loss_of(model, 1).backward()

    def test_hooks_of_other_people_are_still_refused(self) -> None:
        model = mlp()
        model[0].weight.register_post_accumulate_grad_hook(lambda p: None)
        optimizer = optstate.recipes.AdamW(model.named_parameters(), lr=1e-2)
        with pytest.raises(RuntimeError, match="already has a post-accumulate-grad hook"):
            optstate.fuse_backward(optimizer)


class TestWhatWasCollected:
    @pytest.mark.parametrize("how", ["load", "accept"])
    def test_gradients_from_before_a_load_do_not_reach_the_next_update(self, how: str) -> None:
        model, plain = mlp(), mlp()
        optimizer = optstate.recipes.SGD(model.named_parameters(), lr=1e-2)
        fused = optstate.fuse_backward(optimizer)
        saved = optimizer.state_dict()
        with fused.accumulate():
            (loss_of(model, 0) * 100).backward()
        optimizer.load_state_dict(saved) if how == "load" else optimizer.accept_partial_step()
        assert all(p.grad is None for p in model.parameters())
        reference = optstate.recipes.SGD(plain.named_parameters(), lr=1e-2)
        with fused.accumulate():
            loss_of(model, 1).backward()
        loss_of(plain, 1).backward()
        optimizer.step()
        reference.step()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))

    def test_a_norm_from_before_a_load_scales_nothing(self) -> None:
        model = mlp()
        optimizer = optstate.recipes.SGD(model.named_parameters(), lr=1e-2)
        fused = optstate.fuse_backward(optimizer, clip_grad_norm=1e-6)
        fused.grad_norm(loss_of(model, 0))
        optimizer.load_state_dict(optimizer.state_dict())
        with pytest.raises(RuntimeError, match="needs the norm before the update"):
            loss_of(model, 0).backward()

    def test_gradients_that_a_broken_step_used_are_not_used_again(self) -> None:
        model = mlp()
        optimizer = optstate.recipes.SGD(model.named_parameters(), lr=1e-2)
        loss_of(model, 0).backward()
        model[3].bias.grad.fill_(float("nan"))
        with pytest.raises(optstate.NonFiniteGradientError):
            optimizer.step()
        after = weights_of(model)
        optimizer.accept_partial_step()
        optimizer.step()
        assert all(torch.equal(value, after[name]) for name, value in weights_of(model).items())


class TestLiveObjects:
    def test_instances_of_a_class_and_of_derived_ones_are_found(self) -> None:
        class Base:
            pass

        class Derived(Base):
            __slots__ = ("held",)

        objects = [Base(), Derived()]
        assert sorted(map(id, live_objects.instances_of(Base))) == sorted(map(id, objects))
        assert live_objects.instances_of(Derived) == objects[1:]

    def test_other_threads_build_their_tuples_in_peace(self) -> None:
        """A list of all objects holds tuples that are being built, and CPython then raises SystemError there."""
        stop = threading.Event()
        failures: list[BaseException] = []

        def build() -> None:
            while not stop.is_set():
                try:
                    tuple(i for i in range(2000))
                except SystemError as error:
                    failures.append(error)

        threads = [threading.Thread(target=build) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(5):
                optimizer = optstate.recipes.AdamW(mlp().named_parameters())
                optstate.fuse_backward(optimizer)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert not failures
