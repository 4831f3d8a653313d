"""A fused backward that cannot be right, or breaks off: refused or remembered, never silent."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import optstate
from adalomo import AdaLomo, Lomo
from optstate import stores, updates
from tests.support.models import assert_same, loss_of, mlp, state_of, weights_of


class TestRefusals:
    def test_a_second_backward_before_step(self) -> None:
        model = mlp()
        optimizer = AdaLomo(model.named_parameters(), fused_backward=True)
        loss_of(model, 0).backward()
        weights = weights_of(model)
        with pytest.raises(RuntimeError, match=r"arrived a second time before step\(\)"):
            loss_of(model, 1).backward()
        assert_same(weights_of(model), weights)
        for action in (optimizer.step, optimizer.state_dict):
            with pytest.raises(optstate.InconsistentStateError):
                action()
        optimizer.accept_partial_step()
        loss_of(model, 1).backward()
        optimizer.step()

    def test_two_losses_over_different_parameters_are_fine(self) -> None:
        a, b = mlp(seed=1), mlp(seed=2)
        optimizer = AdaLomo([*a.parameters(), *b.parameters()], fused_backward=True)
        loss_of(a, 0).backward()
        loss_of(b, 0).backward()
        optimizer.step()
        assert optimizer.state[b[0].weight]["step"] == 1

    def test_reentrant_checkpoints_that_share_a_layer(self) -> None:
        """The hook would fire twice with partial gradients, the second computed from updated weights."""
        torch.manual_seed(0)
        layer = nn.Linear(6, 6)
        _optimizer = AdaLomo(layer.named_parameters(), fused_backward=True)
        x = torch.randn(3, 6).requires_grad_()
        for _ in range(2):
            x = checkpoint(lambda h: torch.tanh(layer(h)), x, use_reentrant=True)
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            x.square().mean().backward()

    def test_a_retained_graph_cannot_be_run_over_updated_weights(self) -> None:
        """Updates bump version counters, so autograd itself refuses."""
        model = mlp()
        optimizer = AdaLomo(model.named_parameters(), fused_backward=True)
        loss = loss_of(model, 0)
        loss.backward(retain_graph=True)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_step_without_a_gradient(self) -> None:
        optimizer = AdaLomo(mlp().named_parameters(), fused_backward=True)
        with pytest.raises(RuntimeError, match=r"no backward\(\) ran"):
            optimizer.step()

    def test_parameters_replaced_in_the_model(self) -> None:
        model = mlp()
        optimizer = AdaLomo(model.named_parameters(), fused_backward=True)
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
        loss_of(model, 0).backward()
        with pytest.raises(RuntimeError, match="parameters were replaced"):
            optimizer.step()

    def test_hooks_lost(self) -> None:
        model = mlp()
        optimizer = AdaLomo(model.named_parameters(), fused_backward=True)
        loss_of(model, 0).backward()
        optimizer.step()
        model[0].weight._post_accumulate_grad_hooks.clear()
        loss_of(model, 1).backward()
        with pytest.raises(RuntimeError, match="'0.weight' and 0 more lost their backward hooks"):
            optimizer.step()

    def test_hooks_lost_by_swapping_conversion(self) -> None:
        """The hook stays listed on the tensor, but autograd no longer calls it."""
        model = mlp()
        optimizer = AdaLomo(model.named_parameters(), fused_backward=True)
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            model.to(torch.float64).to(torch.float32)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        loss_of(model, 0).backward()
        with pytest.raises(RuntimeError, match="lost their backward hooks"):
            optimizer.step()

    @pytest.mark.parametrize("fused", [False, True])
    def test_a_model_cast_after_the_optimizer_was_built(self, fused: bool) -> None:
        model = mlp()
        optimizer = AdaLomo(model.named_parameters(), fused_backward=fused)
        model.to(torch.bfloat16)
        with pytest.raises(RuntimeError, match="cast and reshape the model first"):
            loss_of(model, 0).backward()
            optimizer.step()

    def test_gradients_from_before_fusing_are_used(self) -> None:
        model, plain = mlp(), mlp()
        optimizer, other = AdaLomo(model.named_parameters()), AdaLomo(plain.named_parameters())
        loss_of(model, 0).backward()
        loss_of(plain, 0).backward()
        optstate.fuse_backward(optimizer)
        optimizer.step()
        other.step()
        assert_same(weights_of(model), weights_of(plain))

    def test_a_deepcopied_model_is_not_hooked_and_the_optimizer_notices(self) -> None:
        model = mlp()
        optimizer = AdaLomo(model.named_parameters(), fused_backward=True)
        twin = copy.deepcopy(model)
        loss_of(twin, 0).backward()
        assert twin[0].weight.grad is not None
        with pytest.raises(RuntimeError, match="step\\(\\) without a gradient"):
            optimizer.step()

    def test_foreign_hooks(self) -> None:
        model = mlp()
        model[0].weight.register_post_accumulate_grad_hook(lambda p: None)
        with pytest.raises(RuntimeError, match="'0.weight' already has a post-accumulate-grad hook"):
            AdaLomo(model.named_parameters(), fused_backward=True)

    def test_refusing_leaves_no_hook_behind(self) -> None:
        model = mlp()
        model[3].weight.register_post_accumulate_grad_hook(lambda p: None)
        optimizer = AdaLomo(model.named_parameters())
        with pytest.raises(RuntimeError):
            optstate.fuse_backward(optimizer)
        loss_of(model, 0).backward()
        assert model[0].weight.grad is not None
        optimizer.step()


class TestBrokenBackward:
    class Fails(updates.Transform):
        """Raises on the parameter of shape (4, 16) at its second step."""

        def __call__(self, update: Any, state: Any, ctx: Any) -> Any:
            if ctx.spec.shape == (4, 16) and ctx.step == 2:
                raise ArithmeticError("no such luck")
            return update

    @pytest.mark.parametrize(
        "before",
        [
            (updates.scale_by_rms(stores.Factored()), updates.clip_by_rms()),
            (updates.scale_by_adam(),),
            (updates.momentum(),),
        ],
    )
    def test_an_exception_in_the_middle_keeps_that_parameter_and_is_remembered(self, before: Any) -> None:
        model = mlp()
        fails = type("fails", (self.Fails,), {})
        chain = optstate.chain(*before, dataclasses.dataclass(frozen=True)(fails)())
        optimizer = optstate.Optimizer(model.named_parameters(), chain, lr=1e-2)
        optstate.fuse_backward(optimizer)
        loss_of(model, 0).backward()
        optimizer.step()
        weights, state = weights_of(model), state_of(optimizer)
        with pytest.raises(ArithmeticError, match="no such luck"):
            loss_of(model, 1).backward()
        # backward reaches the last layer first: its bias was updated, then its weight failed
        assert not torch.equal(model[3].bias, weights["3.bias"])
        assert torch.equal(model[3].weight, weights["3.weight"])
        assert_same(state_of(optimizer)[4], state[4])
        assert torch.equal(model[0].weight, weights["0.weight"])
        with pytest.raises(optstate.InconsistentStateError, match="'3.weight' failed: no such luck"):
            optimizer.step()
        with pytest.raises(optstate.InconsistentStateError):
            optimizer.state_dict()
        with pytest.raises(optstate.InconsistentStateError):
            loss_of(model, 2).backward()

    def test_a_nan_loss_touches_nothing_and_the_next_batch_trains(self) -> None:
        model = mlp()
        optimizer = AdaLomo(model.named_parameters(), fused_backward=True)
        weights = weights_of(model)
        with pytest.raises(optstate.NonFiniteGradientError):
            (loss_of(model, 0) * float("nan")).backward()
        assert_same(weights_of(model), weights)
        for p in model.parameters():
            p.grad = None
        loss_of(model, 1).backward()
        optimizer.step()
        optimizer.state_dict()

    def test_a_nan_in_the_middle_is_remembered(self) -> None:
        model = mlp()
        optimizer = AdaLomo(model.named_parameters(), fused_backward=True)
        handle = model[0].weight.register_hook(lambda grad: grad * float("nan"))
        weights = weights_of(model)
        with pytest.raises(optstate.NonFiniteGradientError, match="'0.weight' is not finite"):
            loss_of(model, 0).backward()
        handle.remove()
        assert torch.equal(model[0].weight, weights["0.weight"])
        assert optimizer.state[model[0].weight]["step"] == 0
        assert not torch.equal(model[3].weight, weights["3.weight"])
        with pytest.raises(optstate.InconsistentStateError, match="accept_partial_step"):
            optimizer.step()


class FailsInBackward(torch.autograd.Function):
    """Passes its input on and raises when a gradient comes back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise MemoryError("out of memory")


class TestBrokenOutsideOfHooks:
    def test_a_backward_that_fails_between_two_updates_is_remembered(self) -> None:
        for action in ("step", "state_dict"):
            first, last = mlp(), nn.Linear(4, 1)
            optimizer = AdaLomo([*first.parameters(), *last.parameters()], fused_backward=True)
            optimizer.use_backend("eager")  # which updates small parameters at once
            weights = weights_of(first)
            with pytest.raises(MemoryError):
                last(FailsInBackward.apply(first(torch.ones(2, 8)))).sum().backward()
            assert_same(weights_of(first), weights)
            with pytest.raises(optstate.InconsistentStateError, match="2 parameters were updated, then the back"):
                getattr(optimizer, action)()
            optimizer.accept_partial_step()
            last(first(torch.ones(2, 8))).sum().backward()
            optimizer.step()
            optimizer.state_dict()

    @pytest.mark.parametrize("fused", [False, True])
    def test_a_parameter_half_written_is_remembered_even_if_it_was_the_first(
        self, fused: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        param = nn.Parameter(torch.ones(3))
        optimizer = AdaLomo([param], fused_backward=fused)

        def interrupted(*_: Any) -> None:
            param.data[0] = 7.0
            raise KeyboardInterrupt

        monkeypatch.setattr("optstate.kernels.apply_update", interrupted)
        optimizer.use_backend("eager")
        with pytest.raises(KeyboardInterrupt):
            param.square().sum().backward()
            optimizer.step()
        with pytest.raises(optstate.InconsistentStateError, match="'param_0' failed and may.*: KeyboardInterrupt"):
            optimizer.state_dict()

    def test_gradients_of_a_failed_batch_do_not_reach_the_next(self) -> None:
        """A last micro-batch that is not finite drops the sum of those before it."""
        model, plain = mlp(), mlp()
        optimizer, other = AdaLomo(model.named_parameters()), AdaLomo(plain.named_parameters())
        fused = optstate.fuse_backward(optimizer)
        with fused.accumulate():
            loss_of(model, 0).backward()
        with pytest.raises(optstate.NonFiniteGradientError):
            (loss_of(model, 1) * float("nan")).backward()
        assert all(p.grad is None for p in model.parameters())
        for m, o in ((model, optimizer), (plain, other)):
            loss_of(m, 2).backward()
            o.step()
        assert_same(weights_of(model), weights_of(plain))

    def test_a_micro_batch_that_breaks_off_drops_the_sum_it_is_part_of(self) -> None:
        first, last = mlp(), nn.Linear(4, 1)
        optimizer = AdaLomo([*first.parameters(), *last.parameters()])
        fused = optstate.fuse_backward(optimizer)
        with fused.accumulate():
            last(first(torch.ones(2, 8))).sum().backward()
        with pytest.raises(MemoryError), fused.accumulate():
            last(FailsInBackward.apply(first(torch.ones(2, 8)))).sum().backward()
        assert all(p.grad is None for p in [*first.parameters(), *last.parameters()])
        last(first(torch.ones(2, 8))).sum().backward()
        optimizer.step()

    def test_a_clipped_accumulation_that_is_not_finite_is_dropped_whole(self) -> None:
        model = mlp()
        optimizer = AdaLomo(model.named_parameters())
        fused = optstate.fuse_backward(optimizer, clip_grad_norm=1.0)
        weights = weights_of(model)
        with fused.accumulate():
            (loss_of(model, 0) * float("nan")).backward()
        with pytest.raises(optstate.NonFiniteGradientError, match="skip the batch"):
            optimizer.step()
        assert_same(weights_of(model), weights)
        with fused.accumulate():
            loss_of(model, 0).backward()
        optimizer.step()


class TestSeveralOptimizers:
    def test_measuring_leaves_other_parameters_alone(self) -> None:
        """The norm pass computes gradients of its own optimizer's parameters only."""
        body, head = mlp(), nn.Linear(4, 1)
        fused = optstate.fuse_backward(AdaLomo(body.named_parameters()), clip_grad_norm=1.0)
        loss = head(body(torch.ones(2, 8))).sum()
        fused.grad_norm(loss)
        assert head.weight.grad is None
        loss.backward()
        torch.testing.assert_close(head.bias.grad, torch.full((1,), 2.0), rtol=0, atol=0)  # once, not twice

    def test_two_fused_and_clipped_optimizers_train_side_by_side(self) -> None:
        models = [mlp(), nn.Linear(4, 1)]
        optimizers = [AdaLomo(m.named_parameters(), lr=1e-2) for m in models]
        handles = [optstate.fuse_backward(o, clip_grad_norm=0.1) for o in optimizers]
        for _ in range(3):
            loss = models[1](models[0](torch.ones(2, 8))).sum()
            for handle in handles:
                handle.grad_norm(loss)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
        assert optimizers[0].state[models[0][0].weight]["step"] == 3

    def test_reentrant_checkpoints_cannot_be_measured_and_say_so(self) -> None:
        model = mlp()
        fused = optstate.fuse_backward(AdaLomo(model.named_parameters()), clip_grad_norm=1.0)
        x = torch.ones(2, 8, requires_grad=True)
        with pytest.raises(RuntimeError, match="use use_reentrant=False"):
            fused.grad_norm(checkpoint(model, x, use_reentrant=True).sum())
        loss = checkpoint(model, x, use_reentrant=False).sum()
        fused.grad_norm(loss)
        loss.backward()
        fused.optimizer.step()


class TestClipIsNeverDroppedSilently:
    def test_an_abandoned_measurement_is_not_used(self) -> None:
        model = mlp()
        fused = optstate.fuse_backward(Lomo(model.named_parameters()), clip_grad_norm=1.0)
        fused.grad_norm(loss_of(model, 0))
        with pytest.raises(optstate.NonFiniteGradientError):
            fused.grad_norm(loss_of(model, 1) * float("nan"))
        with pytest.raises(RuntimeError, match="needs the norm"):
            loss_of(model, 2).backward()

    def test_a_copy_must_be_told_how_to_clip(self) -> None:
        model = mlp()
        optimizer = Lomo(model.named_parameters())
        optstate.fuse_backward(optimizer, clip_grad_norm=1.0)
        twin, copied = copy.deepcopy((model, optimizer))
        loss_of(twin, 0).backward()
        with pytest.raises(RuntimeError, match=r"copy of an optimizer fused with clip_grad_norm=1.0"):
            copied.step()
        copied.zero_grad()
        fused = optstate.fuse_backward(copied, clip_grad_norm=1.0)
        loss = loss_of(twin, 0)
        fused.grad_norm(loss)
        loss.backward()
        copied.step()

    def test_resuming_without_the_clip_warns(self) -> None:
        optimizer = Lomo(mlp().named_parameters())
        optstate.fuse_backward(optimizer, clip_grad_norm=1.0)
        saved = optimizer.state_dict()
        with pytest.warns(UserWarning, match=r"clip_grad_norm=1.0, this optimizer has None"):
            Lomo(mlp().named_parameters()).load_state_dict(saved)

    def test_torchs_clip_after_a_fused_backward_finds_nothing(self) -> None:
        """Gradients are gone: trainers that clip by default report a norm of 0."""
        model = mlp()
        _optimizer = AdaLomo(model.named_parameters(), fused_backward=True)
        loss_of(model, 0).backward()
        assert nn.utils.clip_grad_norm_(model.parameters(), 1.0) == 0
