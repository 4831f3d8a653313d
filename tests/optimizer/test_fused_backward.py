"""The fused backward: same result as step(), gradients freed at once, nothing wrong in silence."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import optstate
from adalomo import Adafactor, AdaLomo, Lomo
from optstate import stores, updates
from optstate.recipes import SGD, AdamW, Lion
from tests.support.models import EveryShape, assert_same, loss_of, mlp, state_of, weights_of

RECIPES = [AdaLomo, Lomo, Adafactor, AdamW, SGD, Lion]


def fused_and_stepped(recipe: Any, make: Any, loss: Any, steps: int = 5) -> tuple[nn.Module, nn.Module]:
    """Train two copies, one fused, and return them after asserting equal weights and states, bit for bit."""
    models = [make(), make()]
    optimizers = [recipe(m.named_parameters(), lr=1e-2) for m in models]
    optstate.fuse_backward(optimizers[0])
    for step in range(steps):
        for model, optimizer in zip(models, optimizers, strict=True):
            loss(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(weights_of(models[0]), weights_of(models[1]))
    assert_same(state_of(optimizers[0]), state_of(optimizers[1]))
    return models[0], models[1]


class TestEqualsStep:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("recipe", RECIPES)
    def test_weights_and_states_are_bit_equal(self, recipe: Any, dtype: torch.dtype) -> None:
        fused_and_stepped(recipe, lambda: EveryShape(dtype), lambda model, step: model(step))

    def test_tied_weights(self) -> None:
        class Tied(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.emb = nn.Embedding(7, 5)
                self.head = nn.Linear(5, 7, bias=False)
                self.head.weight = self.emb.weight

        def loss(model: Any, step: int) -> torch.Tensor:
            ids = torch.arange(step, step + 4) % 7
            return nn.functional.cross_entropy(model.head(model.emb(ids)), (ids + 1) % 7)

        fused_and_stepped(AdaLomo, Tied, loss)

    @pytest.mark.parametrize("mode", ["plain", "non-reentrant", "reentrant"])
    def test_a_layer_used_twice_and_checkpointed_blocks(self, mode: str) -> None:
        """A layer shared inside one graph is updated once, from the summed gradient."""

        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 1)

            def block(self, x: torch.Tensor) -> torch.Tensor:
                return torch.tanh(self.inner(torch.tanh(self.inner(x))))

        def loss(model: Any, step: int) -> torch.Tensor:
            x = torch.randn(3, 6, generator=torch.Generator().manual_seed(step)).requires_grad_()
            y = model.block(x) if mode == "plain" else checkpoint(model.block, x, use_reentrant=mode == "reentrant")
            return model.head(y).square().mean()

        fused_and_stepped(AdaLomo, Twice, loss)

    def test_a_layer_shared_between_non_reentrant_checkpoints(self) -> None:
        def make() -> nn.Module:
            torch.manual_seed(0)
            return nn.Linear(6, 6)

        def loss(model: Any, step: int) -> torch.Tensor:
            x = torch.randn(3, 6, generator=torch.Generator().manual_seed(step)).requires_grad_()
            for _ in range(2):
                x = checkpoint(lambda h: torch.tanh(model(h)), x, use_reentrant=False)
            return x.square().mean()

        fused_and_stepped(AdaLomo, make, loss)

    def test_a_closure_that_runs_backward(self) -> None:
        model = mlp()
        optimizer = AdaLomo(model.named_parameters(), fused_backward=True)
        before = weights_of(model)

        def closure() -> torch.Tensor:
            loss = loss_of(model, 0)
            loss.backward()
            return loss

        assert optimizer.step(closure).item() > 0
        assert not torch.equal(model[0].weight, before["0.weight"])
        assert optimizer.state[model[0].weight]["step"] == 1

    def test_create_graph_does_not_record_the_update(self) -> None:
        """Hooks then run with gradients enabled."""
        model = mlp()
        optimizer = AdaLomo(model.named_parameters(), fused_backward=True)
        with pytest.warns(UserWarning, match="create_graph"):
            loss_of(model, 0).backward(create_graph=True)
        optimizer.step()
        assert all(p.is_leaf and p.grad_fn is None for p in model.parameters())

    def test_autograd_grad_does_not_update(self) -> None:
        model = mlp()
        AdaLomo(model.named_parameters(), fused_backward=True)
        before = weights_of(model)
        torch.autograd.grad(loss_of(model, 0), list(model.parameters()))
        assert_same(weights_of(model), before)


class TestMemory:
    def test_one_gradient_is_alive_at_a_time(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(8)))
        optimizer = Lomo(model.named_parameters())
        alive: list[int] = []

        def count(_: Any) -> None:
            alive.append(sum(p.grad is not None for p in model.parameters()))

        for p in model.parameters():
            p.register_hook(count)
        optstate.fuse_backward(optimizer)
        model(torch.randn(2, 32)).sum().backward()
        assert len(alive) == 16
        assert max(alive) == 0  # a tensor hook runs before its own gradient is stored: none other is left
        assert all(p.grad is None for p in model.parameters())

    def test_gradient_storage_is_released(self) -> None:
        model = mlp()
        optimizer = AdaLomo(model.named_parameters())
        seen: list[weakref.ref[Any]] = []
        for p in model.parameters():
            p.register_hook(lambda grad: seen.append(weakref.ref(grad)))
        optstate.fuse_backward(optimizer)
        loss_of(model, 0).backward()
        gc.collect()
        assert len(seen) == 6
        assert all(ref() is None for ref in seen)

    def test_dropping_the_optimizer_drops_it(self) -> None:
        """Hooks hold no strong reference: the optimizer goes, backward leaves plain gradients."""
        model = mlp()
        optimizer = AdaLomo(model.named_parameters(), fused_backward=True)
        ref = weakref.ref(optimizer)
        del optimizer
        gc.collect()
        assert ref() is None
        loss_of(model, 0).backward()
        assert model[0].weight.grad is not None
        model.zero_grad()
        again = AdaLomo(model.named_parameters(), fused_backward=True)
        loss_of(model, 0).backward()
        again.step()


class TestHandle:
    def test_fusing_twice_is_the_same_handle(self) -> None:
        optimizer = AdaLomo(mlp().named_parameters())
        fused = optstate.fuse_backward(optimizer)
        assert fused.active
        assert optstate.fuse_backward(optimizer) is fused
        with pytest.raises(ValueError, match="another clip_grad_norm"):
            optstate.fuse_backward(optimizer, clip_grad_norm=1.0)

    def test_removed_means_ordinary_training(self) -> None:
        model, plain = mlp(), mlp()
        optimizer, other = AdaLomo(model.named_parameters()), AdaLomo(plain.named_parameters())
        fused = optstate.fuse_backward(optimizer)
        for step in range(4):
            if step == 2:
                fused.remove()
                assert not fused.active
            for m, o in ((model, optimizer), (plain, other)):
                loss_of(m, step).backward()
                assert (m[0].weight.grad is None) == (m is model and step < 2)
                o.step()
                o.zero_grad()
        assert_same(weights_of(model), weights_of(plain))
        assert not model[0].weight._post_accumulate_grad_hooks

    def test_bad_arguments(self) -> None:
        model = mlp()
        with pytest.raises(TypeError, match="got a SGD"):
            optstate.fuse_backward(torch.optim.SGD(model.parameters(), lr=1.0))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="clip_grad_norm=0"):
            optstate.fuse_backward(AdaLomo(model.parameters()), clip_grad_norm=0)


class TestClipping:
    def test_equals_clip_grad_norm(self) -> None:
        """The same coefficient up to the order in which squares are summed: 1e-6 on weights."""
        for recipe in (Lomo, AdaLomo, AdamW):
            model, plain = mlp(), mlp()
            optimizer, other = recipe(model.named_parameters(), lr=0.1), recipe(plain.named_parameters(), lr=0.1)
            fused = optstate.fuse_backward(optimizer, clip_grad_norm=0.05)
            for step in range(4):
                loss = loss_of(model, step)
                norm = fused.grad_norm(loss)
                loss.backward()
                optimizer.step()
                loss_of(plain, step).backward()
                expected = nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
                other.step()
                other.zero_grad()
                torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
            for name, value in weights_of(plain).items():
                torch.testing.assert_close(weights_of(model)[name], value, rtol=0, atol=1e-6)

    def test_measuring_changes_nothing(self) -> None:
        model = mlp()
        optimizer = AdaLomo(model.named_parameters())
        fused = optstate.fuse_backward(optimizer)
        weights, state = weights_of(model), state_of(optimizer)
        fused.grad_norm(loss_of(model, 0))
        assert_same(weights_of(model), weights)
        assert_same(state_of(optimizer), state)
        assert all(p.grad is None for p in model.parameters())

    def test_a_step_without_measuring_is_an_error_and_changes_nothing(self) -> None:
        model = mlp()
        optimizer = Lomo(model.named_parameters())
        fused = optstate.fuse_backward(optimizer, clip_grad_norm=1.0)
        weights = weights_of(model)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"call fused.grad_norm\(loss\)"):
                loss_of(model, 0).backward()
            assert_same(weights_of(model), weights)
        loss = loss_of(model, 0)
        fused.grad_norm(loss)
        loss.backward()
        optimizer.step()
        with pytest.raises(RuntimeError, match="needs the norm"):  # the coefficient is used once
            loss_of(model, 1).backward()

    def test_a_norm_that_is_not_finite_is_refused_before_anything_changes(self) -> None:
        model = mlp()
        optimizer = Lomo(model.named_parameters())
        fused = optstate.fuse_backward(optimizer, clip_grad_norm=1.0)
        weights = weights_of(model)
        with pytest.raises(optstate.NonFiniteGradientError, match="nothing was changed"):
            fused.grad_norm(loss_of(model, 0) * float("nan"))
        assert_same(weights_of(model), weights)
        optimizer.state_dict()

    def test_measuring_comes_first(self) -> None:
        model = mlp()
        optimizer = Lomo(model.named_parameters())
        fused = optstate.fuse_backward(optimizer)
        loss_of(model, 0).backward()
        with pytest.raises(RuntimeError, match="comes first in a step"):
            fused.grad_norm(loss_of(model, 1))
        fused.remove()
        with pytest.raises(RuntimeError, match="was removed"):
            fused.grad_norm(loss_of(model, 1))


class TestAccumulation:
    @pytest.mark.parametrize("last_outside", [True, False])
    @pytest.mark.parametrize("recipe", [AdaLomo, AdamW])
    def test_accumulating_is_exact(self, recipe: Any, last_outside: bool) -> None:
        model, plain = mlp(), mlp()
        optimizer, other = recipe(model.named_parameters()), recipe(plain.named_parameters())
        fused = optstate.fuse_backward(optimizer)
        for step in range(3):
            for micro in range(4):
                loss = loss_of(model, 10 * step + micro) / 4
                if last_outside and micro == 3:
                    loss.backward()
                else:
                    with fused.accumulate():
                        loss.backward()
                (loss_of(plain, 10 * step + micro) / 4).backward()
            optimizer.step()
            other.step()
            other.zero_grad()
            assert all(p.grad is None for p in model.parameters())
        assert_same(weights_of(model), weights_of(plain))
        assert_same(state_of(optimizer), state_of(other))

    def test_accumulated_gradients_are_clipped_by_their_own_norm(self) -> None:
        model, plain = mlp(), mlp()
        optimizer, other = Lomo(model.named_parameters(), lr=1.0), Lomo(plain.named_parameters(), lr=1.0)
        fused = optstate.fuse_backward(optimizer, clip_grad_norm=0.01)
        for micro in range(2):
            with fused.accumulate():
                loss_of(model, micro).backward()
            loss_of(plain, micro).backward()
        optimizer.step()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.01)
        other.step()
        for name, value in weights_of(plain).items():  # order of summing squares: a few ulp
            torch.testing.assert_close(weights_of(model)[name], value, rtol=0, atol=1e-6)

    def test_a_measured_clip_and_accumulation_do_not_mix_silently(self) -> None:
        model = mlp()
        optimizer = Lomo(model.named_parameters())
        fused = optstate.fuse_backward(optimizer, clip_grad_norm=1.0)
        with fused.accumulate():
            loss_of(model, 0).backward()
        with pytest.raises(RuntimeError, match="under accumulate"):
            fused.grad_norm(loss_of(model, 1))

    def test_accumulating_after_an_update_is_refused(self) -> None:
        model = mlp()
        fused = optstate.fuse_backward(AdaLomo(model.named_parameters()))
        loss_of(model, 0).backward()
        with pytest.raises(RuntimeError, match="accumulate first, update last"), fused.accumulate():
            pass


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


class TestModes:
    def test_nested_accumulation_lasts_until_the_outer_end(self) -> None:
        model = mlp()
        fused = optstate.fuse_backward(AdaLomo(model.named_parameters()))
        with fused.accumulate():
            with fused.accumulate():
                loss_of(model, 0).backward()
            loss_of(model, 1).backward()
            assert model[0].weight.grad is not None
            with pytest.raises(RuntimeError, match="comes first"):
                fused.grad_norm(loss_of(model, 2))
        fused.optimizer.step()

    def test_a_removed_handle_does_nothing(self) -> None:
        fused = optstate.fuse_backward(AdaLomo(mlp().named_parameters()))
        fused.remove()
        with pytest.raises(RuntimeError, match="was removed"):
            fused.attach()
        with pytest.raises(RuntimeError, match="was removed"), fused.accumulate():
            pass

    def test_the_optimizer_gives_the_handle(self) -> None:
        optimizer = AdaLomo(mlp().named_parameters(), fused_backward=True)
        assert optimizer.fused is optstate.fuse_backward(optimizer)
        optimizer.fused.remove()
        assert optimizer.fused is None

    def test_a_group_added_while_fused_is_hooked(self) -> None:
        model, extra = mlp(), nn.Linear(4, 1)
        optimizer = AdaLomo(model.parameters(), fused_backward=True)
        optimizer.add_param_group({"params": list(extra.parameters())})
        extra(model(torch.ones(2, 8))).sum().backward()
        assert extra.weight.grad is None
        optimizer.step()
        assert optimizer.state[extra.weight]["step"] == 1

    def test_backward_with_inputs_updates_those_only(self) -> None:
        model = mlp()
        optimizer = AdaLomo(model.named_parameters(), fused_backward=True)
        weights = weights_of(model)
        loss_of(model, 0).backward(inputs=[model[3].weight])
        optimizer.step()
        moved = [name for name, p in model.named_parameters() if not torch.equal(p, weights[name])]
        assert moved == ["3.weight"]

    def test_swapped_data_keeps_its_hook(self) -> None:
        model = mlp()
        optimizer = AdaLomo(model.named_parameters(), fused_backward=True)
        model[0].weight.data = model[0].weight.data.clone()
        loss_of(model, 0).backward()
        assert model[0].weight.grad is None
        optimizer.step()

    @pytest.mark.parametrize("scheduler", ["one cycle", "cyclic", "plateau"])
    def test_schedulers_of_torch_drive_a_fused_run(self, scheduler: str) -> None:
        model = mlp()
        optimizer = optstate.Optimizer(model.named_parameters(), updates.chain(updates.momentum()), lr=1e-2)
        optstate.fuse_backward(optimizer)
        lr = torch.optim.lr_scheduler
        make = {
            "one cycle": lambda: lr.OneCycleLR(optimizer, max_lr=0.1, total_steps=8),
            "cyclic": lambda: lr.CyclicLR(optimizer, base_lr=0.01, max_lr=0.1, step_size_up=2),
            "plateau": lambda: lr.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0),
        }
        driver, seen = make[scheduler](), set()
        for step in range(6):
            loss = loss_of(model, step)
            loss.backward()
            optimizer.step()
            driver.step(loss.detach()) if scheduler == "plateau" else driver.step()
            seen.add(round(optimizer.param_groups[0]["lr"], 6))
        assert len(seen) > 1
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


class TestUnfreezing:
    def test_a_parameter_unfrozen_after_fusing_is_updated_and_hooked(self) -> None:
        model, plain = mlp(), mlp()
        optimizers = []
        for m in (model, plain):
            m[0].weight.requires_grad_(False)
            optimizers.append(AdaLomo(m.named_parameters()))
        optstate.fuse_backward(optimizers[0])
        for step in range(4):
            for m, o in zip((model, plain), optimizers, strict=True):
                if step == 2:
                    m[0].weight.requires_grad_(True)
                loss_of(m, step).backward()
                if m is model and step == 3:
                    assert m[0].weight.grad is None  # hooked when the step before was closed
                o.step()
                o.zero_grad()
        assert_same(weights_of(model), weights_of(plain))
        assert_same(state_of(optimizers[0]), state_of(optimizers[1]))

    def test_a_parameter_frozen_after_fusing_is_left_alone(self) -> None:
        model = mlp()
        optimizer = AdaLomo(model.named_parameters(), fused_backward=True)
        model[0].weight.requires_grad_(False)
        frozen = model[0].weight.detach().clone()
        loss_of(model, 0).backward()
        optimizer.step()
        assert torch.equal(model[0].weight, frozen)

    def test_a_parameter_put_into_a_group_by_hand_is_refused_before_anything_is_written(self) -> None:
        model, extra = mlp(), nn.Parameter(torch.zeros(1))
        optimizer = AdamW(model.named_parameters())
        optstate.fuse_backward(optimizer)
        loss_of(model, 0).backward()
        optimizer.step()
        before = weights_of(model)
        optimizer.param_groups[0]["params"].append(extra)
        with pytest.raises(RuntimeError, match="put into the optimizer's groups after it was built"):
            (loss_of(model, 1) + extra).sum().backward()
        assert_same(weights_of(model), before)
        optimizer.param_groups[0]["params"].pop()  # taken back: the run goes on
        loss_of(model, 1).backward()
        optimizer.step()
        assert not torch.equal(model[0].weight, before["0.weight"])


class TestCompiledAndThreads:
    def test_hooks_work_with_a_compiled_model(self) -> None:
        model, plain = mlp(), mlp()
        compiled = torch.compile(model, backend="aot_eager")
        optimizer, other = AdaLomo(model.named_parameters(), fused_backward=True), AdaLomo(plain.named_parameters())
        for step in range(3):
            loss_of(compiled, step).backward()
            optimizer.step()
            loss_of(plain, step).backward()
            other.step()
            other.zero_grad()
        for name, value in weights_of(plain).items():  # the compiler may reorder sums of gradients
            torch.testing.assert_close(weights_of(model)[name], value, rtol=0, atol=1e-6)
