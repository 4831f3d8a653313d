"""Parameters are known by names without what wrappers put into them: the same run, wrapped or not."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from optstate_cli import app
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from typer.testing import CliRunner

import optstate
from adalomo import AdaLomo
from optstate import stores, updates, weights
from optstate.checkpoint.open_checkpoint import open_checkpoint
from optstate.checkpoint.operations.compare import compare
from optstate.checkpoint.parameter_names import give_names, read_names
from optstate.naming import canonical_names, same_names
from optstate.recipes import SGD, AdamW

BF16 = torch.bfloat16


class _Fabric(nn.Module):
    """A wrapper whose words are those of Lightning's Fabric."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._forward_module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._forward_module(x)


def first_checkpointed(model: nn.Module) -> nn.Module:
    model[0] = checkpoint_wrapper(model[0])
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": lambda m: torch.compile(m, backend="eager"),
    "a part compiled": lambda m: nn.Sequential(torch.compile(m[0], backend="eager"), m[1]),
    "data parallel": nn.DataParallel,
    "averaged": lambda m: torch.optim.swa_utils.AveragedModel(m, avg_fn=lambda a, b, n: a, use_buffers=False),
    "checkpointed": first_checkpointed,
    "fabric": _Fabric,
    "compiled and data parallel": lambda m: nn.DataParallel(torch.compile(m, backend="eager")),
}


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)).to(dtype)


def train(model: nn.Module, optimizer: Any, steps: int = 3, first: int = 0) -> list[torch.Tensor]:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()
        optimizer.zero_grad()
    return [param.detach().clone() for param in model.parameters()]


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "canonical"),
    [
        ("module.fc.weight", "fc.weight"),
        ("_orig_mod.fc.weight", "fc.weight"),
        ("layers.0._orig_mod.fc.weight", "layers.0.fc.weight"),
        ("module._orig_mod._fsdp_wrapped_module.fc._checkpoint_wrapped_module.weight", "fc.weight"),
        ("encoder.module.fc.weight", "encoder.fc.weight"),
        ("_forward_module.model.fc.weight", "model.fc.weight"),
        ("base_model.model.model.layers.0.q_proj.base_layer.weight", "model.layers.0.q_proj.weight"),
        ("base_model.model.layers.0.q_proj.lora_A.default.weight", "layers.0.q_proj.lora_A.weight"),
        ("base_model.model.layers.0.q_proj.lora_A.other.weight", "layers.0.q_proj.lora_A.other.weight"),
        ("base_model.model.wte.lora_embedding_A.default", "wte.lora_embedding_A"),
        ("base_model.model.lm_head.original_module.weight", "lm_head.weight"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head.modules_to_save.weight"),
        ("module", "module"),  # the parameter's own name
        ("fc.default.weight", "fc.default.weight"),
        ("submodule.weight", "submodule.weight"),
        ("base_model.fc.weight", "base_model.fc.weight"),
        ("model.fc.weight", "model.fc.weight"),
        ("", ""),
        ("..", ".."),
    ],
)
def test_words_of_wrappers_are_left_out(given: str, canonical: str) -> None:
    assert canonical_names([given, "another.weight"])[0] == canonical
    assert canonical_names([canonical, "another.weight"])[0] == canonical  # nothing is left to leave out


def test_a_word_that_tells_two_parameters_apart_stays() -> None:
    class Scaled(nn.Module):
        """A model of one's own that calls what it holds `module`."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.module = nn.Linear(2, 3)

    alone, wrapped = Scaled(), nn.DataParallel(Scaled())
    expected = ["weight", "module.weight", "bias"]
    for model in (alone, wrapped):
        assert [p.spec.name for p in AdamW(model.named_parameters()).plan()] == expected
        groups = [{"params": [pair]} for pair in model.named_parameters()]  # looked at together all the same
        assert [p.spec.name for p in AdamW(groups).plan()] == expected


def test_equal_names_stay_equal() -> None:
    assert canonical_names(["a.w", "_orig_mod.a.w"]) == ["a.w", "a.w"]
    assert canonical_names(["a.w", "a.w"]) == ["a.w", "a.w"]
    assert same_names(["module.a", "b"], ["a", "c"]) == [True, False]


def test_any_names_stay_apart_whatever_is_wrapped_around_all_of_them() -> None:
    """Names that differ in more than words which only wrappers use; the order in which they come changes nothing."""
    words = ["module", "base_model", "model", "base_layer", "default", "lora_A", "original_module", "a", "w", ""]
    chance = random.Random(0)
    for _ in range(3000):
        given = list({".".join(chance.choices(words, k=chance.randint(1, 5))) for _ in range(chance.randint(1, 5))})
        names = canonical_names(given)
        assert len(set(names)) == len(given), given
        assert canonical_names(names) == names, given
        assert canonical_names(given[::-1]) == names[::-1], given
        for wrapper in ("module.", "_orig_mod.", "module._orig_mod."):
            assert canonical_names([wrapper + name for name in given]) == names, given


# --- each once ----------------------------------------------------------------------------------------------------


def test_two_models_with_the_same_names_are_refused_when_built() -> None:
    one, two = nn.Linear(4, 4), nn.Linear(4, 4)
    groups = [{"params": one.named_parameters(), "lr": 1e-4}, {"params": two.named_parameters()}]
    with pytest.raises(ValueError, match=r"two parameters are named 'weight'.*'encoder\.' \+ name") as caught:
        AdamW(groups)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="two parameters are named 'weight', as 'weight' and '_orig_mod.weight' are"):
        AdamW([*one.named_parameters(), *torch.compile(two, backend="eager").named_parameters()])


def test_a_name_that_is_there_is_not_added() -> None:
    one, two = nn.Linear(4, 4), nn.Linear(4, 4)
    optimizer = AdamW(one.named_parameters())
    for wrapper in ("", "module.", "_orig_mod."):
        with pytest.raises(ValueError, match="two parameters are named 'weight'"):
            optimizer.add_param_group({"params": [(wrapper + name, p) for name, p in two.named_parameters()]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [("two." + name, p) for name, p in two.named_parameters()]})
    assert [p.spec.name for p in optimizer.plan()] == ["weight", "bias", "two.weight", "two.bias"]


def test_a_group_that_is_refused_leaves_its_names_free() -> None:
    model = nn.Linear(4, 4)
    optimizer = AdamW([("weight", model.weight)])
    with pytest.raises(ValueError, match="lr=-1"):
        optimizer.add_param_group({"params": [("bias", model.bias)], "lr": -1})
    optimizer.add_param_group({"params": [("bias", model.bias)]})
    assert [p.spec.name for p in optimizer.plan()] == ["weight", "bias"]


@pytest.mark.parametrize(
    ("groups", "match"),
    [
        (lambda a, b: [("a", a), b], "some parameters of a group have no names"),
        (lambda a, b: [{"params": [("a", a)]}, {"params": [b]}], "of a group have no names, and those of the other"),
        (lambda a, b: [{"params": [a]}, {"params": [("b", b)]}], "of a group have names, and those of the other"),
        (lambda a, b: [{"params": [a, b], "param_names": ["a"]}], "2 parameters and param_names="),
        (lambda a, b: [(1, a), (2, b)], "name is 1, a int: it must be a string"),
        (lambda a, b: [(None, a), (None, b)], "name is None, a NoneType"),
    ],
)
def test_names_are_strings_and_all_have_one_or_none(groups: Any, match: str) -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with pytest.raises((ValueError, TypeError), match=match):
        AdamW(groups(a, b))


def test_names_beside_the_parameters_count() -> None:
    model = net()
    source = torch.optim.SGD(model.named_parameters())
    groups = [{"params": group["params"], "param_names": group["param_names"]} for group in source.param_groups]
    assert [p.spec.name for p in AdamW(groups).plan()] == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_equally_named_parameters_never_share_their_rounding() -> None:
    """The chance that two elements round alike is p**2 + (1 - p)**2 where each rounds down with chance p."""
    ones = [nn.Parameter(torch.ones(256, 256, dtype=BF16)) for _ in range(2)]
    optimizer = SGD([{"params": [(f"te{i}.weight", p)]} for i, p in enumerate(ones)], lr=1e-3)
    for param in ones:
        param.grad = torch.ones_like(param)
    optimizer.step()
    p = (ones[0] < 1).double().mean().item()
    alike = (ones[0] == ones[1]).double().mean().item()
    assert abs(alike - (p**2 + (1 - p) ** 2)) < 0.01  # 5 standard deviations of 65536 draws


# --- wrapped or not -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_wrapping_a_model_does_not_change_how_it_is_rounded(wrap: Callable[[nn.Module], nn.Module]) -> None:
    plain, inner = net(BF16), net(BF16)
    outer = wrap(inner)
    chain = updates.chain(updates.scale_by_adam(stores.Full("bfloat16"), stores.Full("bfloat16", stochastic=True)))
    runs = []
    for model in (plain, outer):
        optimizer = optstate.Optimizer(model.named_parameters(), chain, lr=1e-3)
        runs.append((train(model, optimizer), list(optimizer.state.values())))
    for one, other in zip(*(params for params, _ in runs), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(*(states for _, states in runs), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_a_run_goes_on_wrapped_or_not(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    for first, second in ((net, lambda: wrap(net())), (lambda: wrap(net()), net)):
        model = first()
        saved = AdamW(model.named_parameters(), lr=1e-2)
        train(model, saved)
        optstate.save(saved, tmp_path / "a.safetensors", model=model)
        assert not any(p.tied for p in open_checkpoint(tmp_path / "a.safetensors").document.parameters)
        other = second()
        for from_file in (False, True):
            optimizer = AdamW(other.named_parameters(), lr=1e-2)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                if from_file:
                    optstate.load(optimizer, tmp_path / "a.safetensors")
                else:
                    optimizer.load_state_dict(saved.state_dict())
            mine, theirs = optimizer.state_dict()["state"], saved.state_dict()["state"]
            assert all(torch.equal(mine[i]["exp_avg"], theirs[i]["exp_avg"]) for i in theirs)


def test_a_file_whose_names_have_prefixes_loads_and_says_that_rounding_changes(tmp_path: Path) -> None:
    """As optimizers of wrapped models were saved before names were looked at."""
    model = net(BF16)
    saved = AdaLomo(model.named_parameters(), lr=1e-3)
    train(model, saved)
    tree = saved.state_dict()
    for group in tree["param_groups"]:
        group["param_names"] = ["module._orig_mod." + name for name in group["param_names"]]
    with_prefixes = AdaLomo(net(BF16).named_parameters(), lr=1e-3)
    with pytest.warns(UserWarning, match="'0.weight' was rounded at random under the name 'module._orig_mod.0.weight'"):
        with_prefixes.load_state_dict(copy.deepcopy(tree))
    path = tmp_path / "old.safetensors"
    for leaf in saved.runner.parameters.leaves.values():
        leaf.plan.spec.__dict__["name"] = f"module._orig_mod.{leaf.name}"
    optstate.save(saved, path)
    optimizer = AdaLomo(net(BF16).named_parameters(), lr=1e-3)
    with pytest.warns(UserWarning, match="'0.weight' was rounded at random under the name 'module._orig_mod.0.weight'"):
        optstate.load(optimizer, path)
    assert all(torch.equal(a["exp_avg_sq.row"], b["exp_avg_sq.row"]) for a, b in _matrices(saved, optimizer))


def _matrices(*optimizers: Any) -> Any:
    return zip(*([s for s in o.state.values() if "exp_avg_sq.row" in s] for o in optimizers), strict=True)


def test_without_random_rounding_a_prefix_is_not_worth_a_word(tmp_path: Path) -> None:
    model = net()
    saved = AdamW(model.named_parameters())
    train(model, saved)
    tree = saved.state_dict()
    for group in tree["param_groups"]:
        group["param_names"] = ["module." + name for name in group["param_names"]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdamW(net().named_parameters()).load_state_dict(tree)


def test_other_names_are_still_refused() -> None:
    saved = AdamW(net().named_parameters()).state_dict()
    other = AdamW([("x." + name, p) for name, p in net().named_parameters()])
    with pytest.raises(ValueError, match=r"has 'x\.0\.weight' where '0\.weight' was saved"):
        other.load_state_dict(saved)


def test_torchs_own_names_are_compared_without_prefixes(tmp_path: Path) -> None:
    model = net()
    theirs = torch.optim.AdamW(torch.compile(model, backend="eager").named_parameters(), lr=1e-2)
    train(model, theirs)
    torch.save(theirs.state_dict(), tmp_path / "opt.pt")
    optimizer = AdamW(net().named_parameters(), lr=1e-2)
    optstate.load(optimizer, tmp_path / "opt.pt")
    for ours, param in zip(optimizer.state.values(), model.parameters(), strict=True):
        assert torch.equal(ours["exp_avg"], theirs.state[param]["exp_avg"])
    swapped = theirs.state_dict()
    names = swapped["param_groups"][0]["param_names"]
    names[1], names[3] = names[3], names[1]
    torch.save(swapped, tmp_path / "swapped.pt")
    with pytest.raises(optstate.CheckpointError, match=r"it has '1\.bias' where this optimizer has '0\.bias'"):
        optstate.load(AdamW(net().named_parameters()), tmp_path / "swapped.pt")


def test_distributed_checkpoints_go_between_wrapped_and_not() -> None:
    model = torch.compile(net(), backend="eager")
    saved = AdamW(model.named_parameters())
    train(model, saved)
    tree = get_optimizer_state_dict(model, saved)
    other = net()
    optimizer = AdamW(other.named_parameters())
    set_optimizer_state_dict(other, optimizer, tree)
    for ours, theirs in zip(optimizer.state.values(), saved.state.values(), strict=True):
        assert ours["step"] == theirs["step"] == 3
        assert torch.equal(ours["exp_avg"], theirs["exp_avg"])


# --- files --------------------------------------------------------------------------------------------------------


def test_files_are_compared_converted_and_named_without_prefixes(tmp_path: Path) -> None:
    paths = []
    for i, wrapped in enumerate((False, True)):
        model = net()
        theirs = torch.optim.AdamW((torch.compile(model, backend="eager") if wrapped else model).named_parameters())
        train(model, theirs)
        paths.append(tmp_path / f"{i}.pt")
        torch.save(theirs.state_dict(), paths[-1])
    assert compare(*map(open_checkpoint, paths), tolerance=0.0).verdict == "equal"
    target = tmp_path / "c.safetensors"
    assert CliRunner().invoke(app, ["convert", str(paths[1]), str(target)]).exit_code == 0
    assert [p.name for p in open_checkpoint(target).document.parameters] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    optstate.load(AdamW(net().named_parameters()), target)
    (tmp_path / "names").write_text("module.0.weight\nmodule.0.bias\nmodule.1.weight\nmodule.1.bias\n")
    named = give_names(open_checkpoint(paths[1]), read_names(tmp_path / "names"))
    assert named.document.parameters[0].name == "module.0.weight"
    (tmp_path / "names").write_text("1.weight\n0.bias\n0.weight\n1.bias\n")
    with pytest.raises(optstate.CheckpointError, match="parameter 0 is '_orig_mod.0.weight' in the checkpoint"):
        give_names(open_checkpoint(paths[1]), read_names(tmp_path / "names"))


# --- routes -------------------------------------------------------------------------------------------------------


def test_a_rule_matches_the_name_as_given_and_without_prefixes() -> None:
    chain, other = updates.chain(updates.momentum()), updates.chain()
    model = nn.DataParallel(net())
    for rule in ("module.0.*", "0.*", "*.0.weight", "0.weight"):
        optimizer = optstate.Optimizer(model.named_parameters(), optstate.route([(rule, chain)], default=other), lr=1.0)
        for same in (optimizer, copy.deepcopy(optimizer)):
            assert [str(p.chain) for p in same.plan() if p.spec.name == "0.weight"] == [str(chain)], rule
            assert [str(p.chain) for p in same.plan() if p.spec.name == "1.weight"] == [str(other)], rule
    wrong = updates.chain(updates.scale_by_adam())
    optimizer = optstate.Optimizer(net().named_parameters(), optstate.route([("module.0.*", chain)], default=wrong))
    tree = optstate.Optimizer(model.named_parameters(), optstate.route([("module.0.*", chain)], default=wrong))
    with pytest.raises(ValueError, match="param groups"):  # a rule about a wrapper's word needs the wrapper
        optimizer.load_state_dict(tree.state_dict())


# --- with names and without ---------------------------------------------------------------------------------------


def test_missing_names_are_said_once_where_rounding_follows_from_them() -> None:
    with pytest.warns(UserWarning, match="the parameters have no names") as caught:
        AdaLomo(net(BF16).parameters())
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="the parameters have no names"):
        AdamW(net().parameters(), second=stores.Full("bfloat16"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdaLomo(net().parameters())
        AdaLomo(net(BF16).named_parameters())
        AdaLomo(net(BF16).parameters(), weights=weights.Plain())
        AdamW(net(BF16).parameters(), weights=weights.Split(16))
        AdamW(net().parameters(), second=stores.Full("bfloat16"), betas=(0.9, 0.95))  # rounded to nearest
        AdaLomo([p.requires_grad_(False) for p in net(BF16).parameters()])
        AdaLomo(net(BF16).to("meta").parameters())


@pytest.mark.parametrize("first", ["named_parameters", "parameters"])
@pytest.mark.parametrize("second", ["named_parameters", "parameters"])
@pytest.mark.filterwarnings("ignore:the parameters have no names")
def test_a_run_with_names_goes_on_exactly_without_and_says_so_where_it_cannot(first: str, second: str) -> None:
    model = net(BF16)
    saved = AdaLomo(getattr(model, first)(), lr=1e-3)
    train(model, saved)
    tree = copy.deepcopy(saved.state_dict())
    other = net(BF16)
    other.load_state_dict(model.state_dict())
    optimizer = AdaLomo(getattr(other, second)(), lr=1e-3)
    words = {
        ("named_parameters", "parameters"): "matched by the order of parameters, and the names were taken over",
        ("parameters", "named_parameters"): "'0.weight' was rounded at random under the name 'param_0'",
    }.get((first, second))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.load_state_dict(tree)
    assert [words in str(w.message) for w in caught] == ([True] if words else [])
    before, after = train(model, saved, first=3), train(other, optimizer, first=3)
    alike = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert alike == ((first, second) != ("parameters", "named_parameters"))
    if (first, second) == ("named_parameters", "parameters"):
        assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]
        assert copy.deepcopy(optimizer).plan().params[0].spec.name == "0.weight"


@pytest.mark.filterwarnings("ignore:the parameters have no names")
def test_a_file_with_names_is_not_matched_by_places(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    optstate.save(AdaLomo(net(BF16).named_parameters()), path)
    with pytest.raises(optstate.CheckpointError, match="it was saved with names, build the optimizer with"):
        optstate.load(AdaLomo(net(BF16).parameters()), path)
    optstate.save(AdaLomo(net(BF16).parameters()), path)
    with pytest.raises(optstate.CheckpointError, match="it was saved without names, build the optimizer without"):
        optstate.load(AdaLomo(net(BF16).named_parameters()), path)
    with pytest.warns(UserWarning, match="'0.weight' was rounded at random under the name 'param_0'"):
        optstate.load(AdaLomo(net(BF16).named_parameters()), path, allow_lossy=True)


@pytest.mark.filterwarnings("ignore:the parameters have no names")
def test_names_that_cannot_be_taken_over_are_left() -> None:
    model = net(BF16)
    tree = AdaLomo(model.named_parameters()).state_dict()
    tree["param_groups"][0]["param_names"] = ["w"] * 4
    optimizer = AdaLomo(net(BF16).parameters())
    with pytest.warns(UserWarning, match="'param_0' was rounded at random under the name 'w'"):
        optimizer.load_state_dict(tree)
    assert "param_names" not in optimizer.param_groups[0]
    assert [p.spec.name for p in optimizer.plan()] == ["param_0", "param_1", "param_2", "param_3"]
