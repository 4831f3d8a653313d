"""The optimizer as torch's ecosystem uses one: groups, names, schedulers, closures, hooks, copies, bad arguments."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import optstate
from adalomo import Adafactor, AdaLomo, Lomo
from optstate import stores, updates
from optstate.recipes import SGD, AdamW, Lion
from tests.support.models import EveryShape, assert_same, loss_of, mlp, state_of, weights_of
from tests.support.pairwise import pairwise

RECIPES = [AdaLomo, Lomo, Adafactor, AdamW, SGD, Lion]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def defer_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check gradients as on an accelerator: the flag stays on the device."""
    original = stores.Guard.__init__
    monkeypatch.setattr(
        stores.Guard, "__init__", lambda self, name, grad, **more: original(self, name, grad, deferred=True, **more)
    )


class TestParameters:
    def test_plain_named_and_grouped_parameters_give_the_same_run(self) -> None:
        results = []
        for given in (
            lambda m: m.parameters(),
            lambda m: m.named_parameters(),
            lambda m: [{"params": list(m.parameters())}],
            lambda m: [{"params": list(m.named_parameters())}],
        ):
            model = mlp()
            train(model, AdaLomo(given(model)), 3)
            results.append(weights_of(model))
        for result in results[1:]:
            assert_same(result, results[0])

    def test_groups_override_hyper_parameters(self) -> None:
        model = mlp()
        decayed, rest = [model[0].weight], [p for p in model.parameters() if p is not model[0].weight]
        before = weights_of(model)
        optimizer = Lomo([{"params": decayed, "weight_decay": 0.5}, {"params": rest, "lr": 0.0}], lr=0.1)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        torch.testing.assert_close(model[0].weight, before["0.weight"] * (1 - 0.1 * 0.5), rtol=1e-6, atol=0)
        assert torch.equal(model[3].weight, before["3.weight"])

    def test_hyper_parameters_carry_their_official_names(self) -> None:
        group = AdaLomo(mlp().named_parameters()).param_groups[0]
        expected = {"lr": 5e-4, "weight_decay": 0.0, "clip_threshold": 1.0, "decay_rate": -0.8, "eps": (1e-30, 1e-3)}
        assert {k: group[k] for k in expected} == expected
        assert group["clip_grad_value"] is None
        assert AdamW(mlp().parameters()).param_groups[0]["betas"] == (0.9, 0.999)

    def test_a_group_may_change_one_place_of_a_tuple(self) -> None:
        """A least parameter RMS of 1 instead of 1e-3 moves zero weights a thousand times further."""
        a, b = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4, 4))
        optimizer = AdaLomo([{"params": [a]}, {"params": [b], "eps": (1e-30, 1.0)}], lr=1e-2)
        a.grad = b.grad = torch.ones(4, 4)
        optimizer.step()
        torch.testing.assert_close(b.detach(), a.detach() * 1000, rtol=1e-5, atol=0)

    def test_added_groups_have_state_at_once(self) -> None:
        model, extra = mlp(), nn.Parameter(torch.ones(3, 4))
        optimizer = AdaLomo(model.parameters())
        optimizer.add_param_group({"params": [extra], "lr": 1.0})
        assert optimizer.state[extra]["exp_avg_sq.row"].shape == (3,)
        extra.grad = torch.ones(3, 4)
        optimizer.step()
        torch.testing.assert_close(extra.detach(), torch.zeros(3, 4), rtol=0, atol=1e-6)
        assert len(optimizer.plan()) == 7

    def test_tied_parameters_count_once(self) -> None:
        model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
        model["b"].weight = model["a"].weight
        assert len(AdaLomo(model.named_parameters()).plan()) == 1

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("recipe", "fused", "dtype"),
        pairwise(RECIPES, (False, True), (torch.float32, torch.bfloat16, torch.float16, torch.float64)),
        ids=str,
    )
    def test_every_shape_trains(self, recipe: Any, fused: bool, dtype: torch.dtype) -> None:
        model = EveryShape(dtype)
        optimizer = recipe(model.named_parameters(), lr=1e-2)
        if fused:
            optstate.fuse_backward(optimizer)
        before, first = weights_of(model), model(0).item()
        for _ in range(12):
            model(0).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert model(0).item() < first
        after = weights_of(model)
        assert all(p.isfinite().all() for p in after.values())
        for name in ("scalar", "vector", "matrix", "experts", "conv", "row"):
            assert not torch.equal(after[name], before[name]), name
        for name in ("frozen", "unused"):
            assert torch.equal(after[name], before[name]), name
        assert model.frozen not in optimizer.state
        assert optimizer.state[model.unused]["step"] == 0
        assert optimizer.state[model.empty]["step"] == 12
        assert optimizer.state_nbytes() == optimizer.plan().nbytes

    def test_a_later_unfrozen_parameter_gets_its_state_then(self) -> None:
        model = mlp()
        model[0].weight.requires_grad_(False)
        optimizer = AdaLomo(model.named_parameters())
        assert "frozen" in str(optimizer.plan())
        train(model, optimizer, 2)
        frozen = model[0].weight.detach().clone()
        model[0].weight.requires_grad_(True)
        train(model, optimizer, 1)
        assert optimizer.state[model[0].weight]["step"] == 1
        assert not torch.equal(model[0].weight, frozen)
        assert optimizer.state_nbytes() == optimizer.plan().nbytes

    def test_mixed_dtypes_in_a_group_do_not_influence_each_other(self) -> None:
        def run(*dtypes: torch.dtype) -> list[torch.Tensor]:
            params = [nn.Parameter(torch.ones(8, 8, dtype=d)) for d in dtypes]
            for p in params:
                p.grad = (torch.arange(64).view(8, 8) * 1e-4).to(p.dtype)
            AdaLomo(params, lr=1e-2, weights=optstate.weights.Plain()).step()
            return [p.detach() for p in params]

        together = run(torch.bfloat16, torch.float32)
        assert torch.equal(together[0], run(torch.bfloat16)[0])
        assert torch.equal(together[1], run(torch.float32)[0])

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_memory_layout_does_not_change_the_result(self, recipe: Any) -> None:
        """Channels-last and transposed weights; differences only from the order of sums, 1e-6 on weights near 1."""
        torch.manual_seed(0)
        conv, matrix = torch.randn(6, 4, 3, 3), torch.randn(5, 7)
        plain = [nn.Parameter(conv.clone()), nn.Parameter(matrix.clone())]
        strided = [
            nn.Parameter(conv.clone().to(memory_format=torch.channels_last)),
            nn.Parameter(matrix.t().contiguous().t()),
        ]
        assert not strided[0].is_contiguous()
        assert not strided[1].is_contiguous()
        for params in (plain, strided):
            optimizer = recipe(params, lr=1e-2)
            for step in range(3):
                generator = torch.Generator().manual_seed(step)
                for p in params:
                    p.grad = torch.randn(p.shape, generator=generator)
                optimizer.step()
        for a, b in zip(plain, strided, strict=True):
            torch.testing.assert_close(a.detach(), b.detach().contiguous(), rtol=0, atol=1e-6)


class TestRouteAndPlan:
    def test_the_first_matching_rule_wins_and_the_plan_says_which(self) -> None:
        model = mlp()
        first, second, rest = (optstate.chain(updates.add_decayed_weights(x)) for x in (0.1, 0.2, 0.3))
        moments = optstate.chain(updates.scale_by_adam(), updates.add_decayed_weights(0.0))
        route = optstate.route([("0.*", moments), (optstate.is_matrix, second), ("*", first)], default=rest)
        optimizer = optstate.Optimizer(model.named_parameters(), route, lr=1e-3)
        rules = {p.spec.name: p.rule for p in optimizer.plan()}
        names = ["0.weight", "0.bias", "3.weight", "1.weight", "1.bias", "3.bias"]
        assert rules == dict(zip(names, ["0.*", "0.*", "is_matrix", "*", "*", "*"], strict=True))
        assert set(optimizer.state[model[0].weight]) == {"step", "exp_avg", "exp_avg_sq"}
        assert set(optimizer.state[model[3].weight]) == {"step"}

    def test_name_rules_need_names(self) -> None:
        route = optstate.route([("0.*", optstate.chain())], default=optstate.chain())
        with pytest.raises(ValueError, match=r"pass model.named_parameters\(\)"):
            optstate.Optimizer(mlp().parameters(), route)

    def test_a_route_gives_each_chain_its_own_group_and_defaults(self) -> None:
        model = mlp()
        route = optstate.route(
            [(optstate.is_matrix, updates.scale_by_rms(stores.Factored(), eps=1e-30))],
            default=updates.chain(updates.scale_by_adam(eps=1e-8), updates.add_decayed_weights(0.1)),
        )
        optimizer = optstate.Optimizer([{"params": list(model.named_parameters()), "weight_decay": 0.5}], route, lr=1.0)
        assert [g["eps"] for g in optimizer.param_groups] == [1e-30, 1e-8]
        assert [g.get("weight_decay") for g in optimizer.param_groups] == [None, 0.5]
        assert [len(g["params"]) for g in optimizer.param_groups] == [2, 4]
        train(model, optimizer, 2)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        with pytest.raises(ValueError, match="unknown hyper-parameter 'betas' in a param group: its chain has"):
            optstate.Optimizer([{"params": [model[0].weight], "betas": (0.9, 0.9)}], route)

    def test_roles_are_declared_by_groups(self) -> None:
        model = mlp()
        groups = [{"params": [model[0].weight], "role": "embedding"}, {"params": [model[3].weight]}]
        route = optstate.route(
            [(lambda spec: spec.role == "embedding", updates.clip_by_rms())], default=updates.chain()
        )
        plan = optstate.Optimizer(groups, route).plan()
        assert [str(p.chain) for p in plan] == ["clip_by_rms", "gradient"]

    def test_the_plan_is_what_is_allocated(self) -> None:
        optimizer = AdaLomo(EveryShape().named_parameters())
        for plan, param in zip(optimizer.plan(), optimizer.param_groups[0]["params"], strict=True):
            expected = {key: slot.fields[f] for slot in plan.slots.values() for f, key in slot.keys.items()}
            state = {k: v for k, v in optimizer.state.get(param, {}).items() if k != "step"}
            if plan.trainable:
                assert {k: (tuple(v.shape), v.dtype) for k, v in state.items()} == {
                    k: (f.shape, f.dtype) for k, f in expected.items()
                }
        text = str(optimizer.plan())
        assert "1-D: nothing to factor, kept in full" in text
        assert "StochasticRounding" not in text
        assert "StochasticRounding" in str(AdaLomo(EveryShape(torch.bfloat16).named_parameters()).plan())

    def test_adalomo_state_is_four_bytes_per_row_and_column(self) -> None:
        optimizer = AdaLomo([nn.Parameter(torch.zeros(100, 70)), nn.Parameter(torch.zeros(3, 10, 20))])
        assert optimizer.state_nbytes() == 4 * (100 + 70) + 3 * 4 * (10 + 20)

    def test_parameter_sized_temporaries_are_announced(self) -> None:
        big = [nn.Parameter(torch.zeros(1024, 1024))]
        assert "temporaries" not in str(AdaLomo(big).plan())
        assert "temporaries" not in str(AdamW(big).plan())
        assert "temporaries" in str(
            optstate.Optimizer(big, updates.chain(updates.scale_by_adam(), updates.clip_by_rms())).plan()
        )


class TestTorchConventions:
    def test_a_scheduler_drives_the_learning_rate(self) -> None:
        model = mlp()
        optimizer = Lomo(model.named_parameters(), lr=1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        for step in range(3):
            before = weights_of(model)
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
            scheduler.step()
            for name, p in model.named_parameters():
                torch.testing.assert_close(p.detach(), before[name] - 0.5**step, rtol=1e-6, atol=1e-6)

    def test_a_closure_runs_with_gradients_enabled_and_its_loss_is_returned(self) -> None:
        model = mlp()
        optimizer = AdaLomo(model.named_parameters())

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, 0)
            loss.backward()
            return loss

        before = weights_of(model)
        with torch.no_grad():
            loss = optimizer.step(closure)
        assert loss.item() > 0
        assert not torch.equal(model[0].weight, before["0.weight"])

    def test_a_tensor_learning_rate_works_for_every_recipe(self) -> None:
        for recipe in RECIPES:
            results = []
            for lr in (1e-2, torch.tensor(1e-2)):
                model = mlp()
                train(model, recipe(model.named_parameters(), lr=lr), 3)
                results.append(weights_of(model))
            for name in results[0]:
                torch.testing.assert_close(results[0][name], results[1][name], rtol=0, atol=1e-6)

    def test_numbers_of_numpy_are_numbers(self) -> None:
        import numpy as np

        assert AdaLomo(mlp().parameters(), lr=np.float32(0.5)).param_groups[0]["lr"] == 0.5

    def test_state_follows_a_model_that_was_moved(self) -> None:
        """As trainers do: build, move the model, load the state dict moved along. Here to the meta device."""
        model = mlp()
        optimizer = AdaLomo(model.named_parameters())
        torch.__future__.set_swap_module_params_on_conversion(True)  # keeps the parameters' identity on any device
        try:
            model.to("meta")
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        optimizer.step()
        tensors = [v for state in state_of(optimizer) for v in state.values() if isinstance(v, torch.Tensor)]
        assert tensors
        assert all(v.is_meta for v in tensors)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    def test_the_meta_device_steps_without_values(self) -> None:
        for recipe in RECIPES:
            params = [nn.Parameter(torch.empty(s, device="meta", dtype=torch.bfloat16)) for s in [(4, 5), (5,), ()]]
            optimizer = recipe(params, fused_backward=True) if recipe is AdaLomo else recipe(params)
            for _ in range(2):
                sum(p.sum() for p in params).backward()
                optimizer.step()
            optimizer.state_dict()

    def test_a_gradient_of_another_precision_is_read_in_the_parameters(self) -> None:
        for recipe in RECIPES:
            results = []
            for dtype in (torch.float32, torch.float64):
                p = nn.Parameter(torch.ones(4, 4))
                p.grad_dtype = None
                p.grad = torch.linspace(-1, 1, 16).view(4, 4).to(dtype)
                recipe([p], lr=1e-2).step()
                results.append(p.detach())
            torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-7)

    def test_step_hooks_and_state_dict_hooks_run(self) -> None:
        model = mlp()
        optimizer = AdaLomo(model.named_parameters())
        seen: list[str] = []
        optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
        optimizer.register_step_post_hook(lambda *_: seen.append("after"))
        optimizer.register_state_dict_post_hook(lambda _, d: seen.append("saved"))
        optimizer.register_load_state_dict_pre_hook(lambda _, d: seen.append("loading"))
        optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
        train(model, optimizer, 1)
        optimizer.load_state_dict(optimizer.state_dict())
        assert seen == ["before", "after", "saved", "loading", "loaded"]

    @pytest.mark.parametrize(
        "copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
    )
    def test_a_copied_optimizer_trains_on_alone(self, copier: Any) -> None:
        model = mlp()
        optimizer = AdaLomo(model.named_parameters())
        train(model, optimizer, 2)
        twin, twin_optimizer = copier((model, optimizer))
        train(model, optimizer, 2, first=2)
        train(twin, twin_optimizer, 2, first=2)
        assert_same(weights_of(twin), weights_of(model))
        assert_same(state_of(twin_optimizer), state_of(optimizer))

    def test_ordinary_training_lowers_the_loss_for_every_recipe(self) -> None:
        for recipe in RECIPES:
            model = mlp()
            first = loss_of(model, 0).item()
            optimizer = recipe(model.named_parameters(), lr=1e-2)
            for _ in range(30):
                optimizer.zero_grad()
                loss_of(model, 0).backward()
                optimizer.step()
            assert loss_of(model, 0).item() < first

    @pytest.mark.slow
    def test_one_device_synchronisation_free_step_needs_no_value(self) -> None:
        """Under fake tensors any read of a value raises: every recipe, stepped and fused, low precision too."""
        from torch._subclasses import FakeTensorMode

        for recipe in RECIPES:
            for fused, dtype in ((False, torch.float32), (True, torch.bfloat16)):
                with FakeTensorMode():
                    params = [nn.Parameter(torch.empty(s, dtype=dtype)) for s in [(4, 5), (5,), (2, 3, 4), ()]]
                    optimizer = recipe(params, lr=1e-3)
                    if fused:
                        optstate.fuse_backward(optimizer)
                    for _ in range(2):
                        sum(p.sum() for p in params).backward()
                        optimizer.step()
                    assert optimizer.state[params[0]]["step"] == 2
                    assert optimizer.plan().nbytes == optimizer.state_nbytes()


class TestBadArguments:
    @pytest.mark.parametrize(
        ("build", "error", "match"),
        [
            (lambda: AdaLomo([]), ValueError, "no parameters"),
            (lambda: AdaLomo(mlp()), TypeError, "params is a Sequential"),
            (lambda: AdaLomo(torch.zeros(3)), TypeError, "params is a Tensor"),
            (lambda: AdaLomo(mlp().parameters(), lr=-1e-3), ValueError, "lr=-0.001 is out of range"),
            (lambda: AdaLomo(mlp().parameters(), lr=float("nan")), ValueError, "lr=nan"),
            (lambda: AdaLomo(mlp().parameters(), lr="fast"), TypeError, "lr='fast' is a str"),
            (lambda: AdaLomo(mlp().parameters(), weight_decay=-1), ValueError, "weight_decay=-1"),
            (lambda: AdaLomo(mlp().parameters(), clip_threshold=0.0), ValueError, "clip_threshold=0.0"),
            (lambda: AdaLomo(mlp().parameters(), decay_rate=0.8), ValueError, "decay_rate=0.8"),
            (lambda: AdaLomo(mlp().parameters(), eps=(-1e-30, 1e-3)), ValueError, r"eps\[0\]=-1e-30"),
            (lambda: AdamW(mlp().parameters(), betas=(0.9, 1.0)), ValueError, r"betas\[1\]=1.0"),
            (lambda: AdamW(mlp().parameters(), betas=(0.9,)), ValueError, "must be 2 numbers"),
            (
                lambda: AdaLomo([{"params": mlp().parameters(), "momentum": 0.9}]),
                ValueError,
                "unknown hyper-parameter 'momentum'",
            ),
            (lambda: AdaLomo([{"params": mlp().parameters(), "weight_decay": -1.0}]), ValueError, "weight_decay=-1.0"),
            (lambda: AdaLomo([{"params": mlp().parameters(), "eps": 1e-30}]), TypeError, "eps=1e-30 has no entry 0"),
            (lambda: AdaLomo([nn.Parameter(torch.zeros(3, dtype=torch.complex64))]), TypeError, "view_as_real"),
            (lambda: AdaLomo([{"params": set(mlp().parameters())}]), TypeError, "are a set"),
            (lambda: AdaLomo([nn.Parameter(torch.zeros(3)) * 2]), ValueError, "not a leaf"),
            (lambda: AdaLomo(["weights"]), TypeError, "steps tensors"),
            (lambda: AdaLomo(mlp().parameters(), weights="sometimes"), TypeError, "weights='sometimes'"),
            (lambda: AdaLomo(mlp().parameters(), eps=1e-8), ValueError, "eps=1e-08 must be two numbers"),
            (lambda: Adafactor(mlp().parameters(), eps=(1e-30,)), ValueError, "must be two numbers"),
            (lambda: AdaLomo(mlp().parameters(), eps=(0.0, 1e-3)), ValueError, "eps=0 needs a floor"),
            (lambda: AdaLomo(mlp().parameters(), decay_rate=None), TypeError, "decay_rate=None must be a number"),
            (lambda: AdaLomo(mlp().parameters(), clip_grad_value=0.0), ValueError, "clip_grad_value=0.0"),
            (lambda: AdaLomo(mlp().parameters(), lr=torch.tensor(-0.1)), ValueError, "lr=-0.1"),
            (lambda: AdaLomo(mlp().parameters(), weight_decay=torch.tensor(0.1)), TypeError, "weight_decay=tensor"),
            (lambda: AdaLomo([{"params": mlp().parameters(), "role": 3}]), TypeError, "role=3"),
            (lambda: AdaLomo([{"params": mlp().parameters(), "head_size": -1}]), ValueError, "head_size=-1"),
            (lambda: AdaLomo([("a", p) for p in mlp().parameters()]), ValueError, "two parameters are named 'a'"),
            (lambda: optstate.fuse_backward(Lomo(mlp().parameters()), "1"), TypeError, "clip_grad_norm='1' is a str"),
            (lambda: optstate.chain(updates.momentum(stores.Full)), TypeError, "give one of optstate.stores"),
            (lambda: optstate.Optimizer(mlp().parameters(), "adam"), TypeError, "the recipe is a str"),
            (lambda: optstate.chain(stores.Full()), TypeError, "give transforms"),
            (lambda: SGD(mlp().parameters(), nesterov=True), ValueError, "needs a momentum"),
            (lambda: optstate.route([(3, updates.chain())], default=updates.chain()), TypeError, "the rule 3"),
        ],
    )
    def test_one_line_names_the_value_and_the_remedy(self, build: Any, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match) as caught:
            build()
        assert "\n" not in str(caught.value)

    def test_a_parameter_given_twice_is_named(self) -> None:
        p = nn.Parameter(torch.zeros(3))
        with pytest.raises(ValueError, match="'b' is the same tensor as 'a'"):
            AdaLomo([("a", p), ("b", p)])
        optimizer = AdaLomo([("a", p)])
        with pytest.raises(ValueError, match="'c' is in another group already"):
            optimizer.add_param_group({"params": [("c", p)]})
        assert len(optimizer.param_groups) == 1

    def test_sparse_and_complex_gradients_are_refused_by_name(self) -> None:
        emb = nn.Embedding(5, 3, sparse=True)
        optimizer = AdaLomo(emb.named_parameters())
        emb(torch.tensor([1])).sum().backward()
        with pytest.raises(TypeError, match=r"'weight' is sparse_coo: use a dense one \(nn.Embedding"):
            optimizer.step()

    def test_parameters_swapped_in_later_are_refused(self) -> None:
        model = mlp()
        optimizer = AdaLomo(model.named_parameters())
        optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.zeros(3, 3))
        optimizer.param_groups[0]["params"][0].grad = torch.zeros(3, 3)
        with pytest.raises(RuntimeError, match="then build the optimizer"):
            optimizer.step()


class TestNonFiniteGradients:
    @pytest.mark.parametrize("recipe", RECIPES)
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_parameter_keeps_weight_and_state(self, recipe: Any, value: float, dtype: torch.dtype) -> None:
        model = EveryShape(dtype)
        optimizer = recipe(model.named_parameters(), lr=1e-2)
        model(0).backward()
        optimizer.step()
        model(1).backward()
        for name in ("scalar", "vector", "matrix", "experts", "conv"):
            param = getattr(model, name)
            weights, state = param.detach().clone(), copy.deepcopy(optimizer.state[param])
            param.grad.view(-1)[-1] = value
            with pytest.raises(optstate.NonFiniteGradientError, match=f"gradient of {name!r} is not finite"):
                optimizer.step_parameter(param)
            assert torch.equal(param, weights)
            assert_same(optimizer.state[param], state)

    def test_a_value_clip_does_not_hide_an_infinite_gradient(self) -> None:
        p = nn.Parameter(torch.ones(4, 4))
        p.grad = torch.full((4, 4), float("inf"))
        for recipe in (AdaLomo, Lomo):
            with pytest.raises(optstate.NonFiniteGradientError):
                recipe([p], clip_grad_value=1.0).step()
        assert torch.equal(p, torch.ones(4, 4))

    def test_a_partial_step_is_remembered_until_loaded_or_accepted(self) -> None:
        model = mlp()
        optimizer = AdaLomo(model.named_parameters())
        train(model, optimizer, 1)
        saved = copy.deepcopy(optimizer.state_dict())
        loss_of(model, 1).backward()
        model[3].weight.grad.fill_(float("nan"))
        with pytest.raises(optstate.NonFiniteGradientError):
            optimizer.step()
        for action in (optimizer.step, optimizer.state_dict):
            with pytest.raises(
                optstate.InconsistentStateError, match=r"4 parameters were updated, then '3.weight' failed"
            ):
                action()
        optimizer.load_state_dict(saved)
        optimizer.state_dict()

    def test_nothing_updated_means_nothing_to_remember(self) -> None:
        model = mlp()
        optimizer = AdaLomo(model.named_parameters())
        loss_of(model, 0).backward()
        model[0].weight.grad.fill_(float("nan"))
        with pytest.raises(optstate.NonFiniteGradientError):
            optimizer.step()
        optimizer.zero_grad()
        train(model, optimizer, 1)

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_the_deferred_check_of_accelerators_also_keeps_weight_and_state(
        self, recipe: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On an accelerator the flag is read a step later; meanwhile the step must have been one of size zero."""
        defer_checks(monkeypatch)
        model = EveryShape()
        optimizer = recipe(model.named_parameters(), lr=1e-2, weight_decay=0.1)
        model(0).backward()
        optimizer.step()
        weights, state = weights_of(model), state_of(optimizer)
        for p in model.parameters():
            if p.grad is not None and p.numel():
                p.grad.view(-1)[0] = float("nan")
        optimizer.step()
        assert_same(weights_of(model), weights)
        with pytest.raises(optstate.NonFiniteGradientError, match="6 parameters were not finite"):
            optimizer.step()
        after = state_of(optimizer)
        after[6]["step"] = state[6]["step"]  # the empty parameter has no element that could be wrong
        assert_same(after, state)
        with pytest.raises(optstate.InconsistentStateError):
            optimizer.state_dict()

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_deferred_and_immediate_checks_step_alike(self, recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """1e-7: masking a factor can change the order of two multiplications."""
        results = []
        for deferred in (False, True):
            if deferred:
                defer_checks(monkeypatch)
            model = EveryShape()
            optimizer = recipe(model.named_parameters(), lr=1e-2)
            for step in range(5):
                optimizer.zero_grad()
                model(step).backward()
                optimizer.step()
            results.append(weights_of(model))
        for name, value in results[0].items():
            torch.testing.assert_close(results[1][name], value, rtol=0, atol=1e-6)
