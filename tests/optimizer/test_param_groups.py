"""Param groups as trainers and libraries make them: empty ones, frozen parameters of any dtype, keys of their own."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from optstate_cli import app
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, OneCycleLR
from typer.testing import CliRunner

import optstate
from adalomo import AdaLomo
from optstate import stores, updates
from optstate.checkpoint.open_checkpoint import open_checkpoint
from optstate.checkpoint.operations.compare import compare
from optstate.recipes import SGD, AdamMini, AdamW, AdamW8bit


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))


def grouped(model: nn.Module, counts: tuple[int, ...], named: bool = True, **more: Any) -> list[dict[str, Any]]:
    """The model's parameters in groups of so many."""
    pairs = iter(model.named_parameters() if named else model.parameters())
    return [{"params": [next(pairs) for _ in range(count)], **more} for count in counts]


def step(model: nn.Module, optimizer: Any, steps: int = 2) -> Any:
    for _ in range(steps):
        for i, param in enumerate(p for p in model.parameters() if p.requires_grad):
            param.grad = torch.full_like(param, 0.1 * (i + 1))
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def same_state(a: Any, b: Any) -> None:
    mine, theirs = a.state_dict()["state"], b.state_dict()["state"]
    assert mine.keys() == theirs.keys()
    for i, state in theirs.items():
        assert mine[i]["step"] == int(state["step"])
        assert all(torch.equal(mine[i][key], value) for key, value in state.items() if key != "step")


# --- empty groups -------------------------------------------------------------------------------------------------

LAYOUTS = [(4, 0), (0, 4), (2, 0, 2), (0, 2, 0, 2, 0)]
every_layout = pytest.mark.parametrize("counts", LAYOUTS, ids=str)


@every_layout
@pytest.mark.parametrize("named", [True, False])
def test_an_empty_group_is_a_group(counts: tuple[int, ...], named: bool, tmp_path: Path) -> None:
    model, reference = net(), net()
    optimizer = AdamW(grouped(model, counts, named), lr=0.1)
    assert [len(g["params"]) for g in optimizer.param_groups] == list(counts)
    assert all(g["betas"] == (0.9, 0.999) and g["lr"] == 0.1 for g in optimizer.param_groups)
    step(model, optimizer)
    step(reference, AdamW(reference.parameters(), lr=0.1))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))
    assert len(optimizer.plan()) == 4
    optstate.save(optimizer, tmp_path / "a.safetensors")
    for i in (0, 1):
        other = AdamW(grouped(net(), counts, named), lr=0.5)
        if i:
            optstate.load(other, tmp_path / "a.safetensors")
        else:
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        same_state(other, optimizer)
        assert [g["lr"] for g in other.param_groups] == [0.1] * len(counts)
    same_state(copy.deepcopy(optimizer), optimizer)


def test_only_empty_groups_wait_for_parameters(tmp_path: Path) -> None:
    optimizer = AdamW([{"params": []}, {"params": [], "lr": 0.5}])
    optimizer.step()
    optstate.save(optimizer, tmp_path / "a.safetensors")
    optstate.load(optimizer, tmp_path / "a.safetensors")
    model = net()
    optimizer.add_param_group({"params": model.named_parameters()})
    assert [g["param_names"] for g in optimizer.param_groups][:2] == [[], []]
    step(model, optimizer)
    assert optimizer.plan().params[0].spec.name == "0.weight"
    unnamed = AdamW([{"params": []}])
    unnamed.add_param_group({"params": list(net().parameters())})
    unnamed.add_param_group({"params": []})
    assert not any("param_names" in g for g in unnamed.param_groups)


def test_fused_an_empty_group_is_nothing_to_wait_for() -> None:
    model = net()
    optimizer = AdaLomo(grouped(model, (2, 0, 2)), lr=0.1)
    optstate.fuse_backward(optimizer)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert {s["step"] for s in optimizer.state.values()} == {1}
    optimizer.add_param_group({"params": []})
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()


@every_layout
def test_torchs_state_with_an_empty_group_is_resumed(counts: tuple[int, ...], tmp_path: Path) -> None:
    model = net()
    theirs = step(model, torch.optim.AdamW(grouped(model, counts, named=False), lr=0.1))
    torch.save(theirs.state_dict(), tmp_path / "opt.pt")
    for own in (counts, tuple(n for n in counts if n), (*counts, 0)):
        optimizer = AdamW(grouped(net(), own), lr=0.1)
        optstate.load(optimizer, tmp_path / "opt.pt")
        same_state(optimizer, theirs)
        assert [len(g["params"]) for g in optimizer.param_groups] == list(own)
        lossy = AdamW8bit(grouped(net(), own), lr=0.1)
        optstate.load(lossy, tmp_path / "opt.pt", allow_lossy=True)
        assert {s["step"] for s in lossy.state.values()} == {2}
        handed = AdamW(grouped(net(), own), lr=0.1)
        handed.load_state_dict(theirs.state_dict())
        same_state(handed, theirs)
    uphill = step(model, torch.optim.AdamW(grouped(model, counts, named=False), lr=0.1, maximize=True))
    for own in (counts, tuple(n for n in counts if n), (*counts, 0)):
        with pytest.raises(ValueError, match="maximize=True"):
            AdamW(grouped(net(), own), lr=0.1).load_state_dict(uphill.state_dict())


@every_layout
def test_an_empty_group_more_or_less_is_no_other_optimizer(counts: tuple[int, ...], tmp_path: Path) -> None:
    groups = grouped(model := net(), counts)
    for i, group in enumerate(groups):
        group["lr"] = 0.1 * (i + 1)
    saved = step(model, AdamW(groups))
    optstate.save(saved, tmp_path / "a.safetensors")
    own = tuple(n for n in counts if n)
    for i in (0, 1):
        optimizer = AdamW([{"params": []}, *grouped(net(), own)], lr=7.0)
        if i:
            optstate.load(optimizer, tmp_path / "a.safetensors")
        else:
            optimizer.load_state_dict(saved.state_dict())
        same_state(optimizer, saved)
        filled = [0.1 * (i + 1) for i, count in enumerate(counts) if count]
        # the same groups: each has its saved hyper-parameters; else an empty one keeps its own
        expected = [0.1 * (i + 1) for i in range(len(counts))] if counts == (0, *own) else [7.0, *filled]
        assert [g["lr"] for g in optimizer.param_groups] == expected
    with pytest.raises(ValueError, match="param groups|was saved with"):
        AdamW(grouped(net(), (1, 3))).load_state_dict(saved.state_dict())


@every_layout
def test_files_with_empty_groups_are_read_compared_and_converted(counts: tuple[int, ...], tmp_path: Path) -> None:
    model = net()
    theirs = step(model, torch.optim.AdamW(grouped(model, counts, named=False), lr=0.1))  # torch wants names everywhere
    source, native, back = (str(tmp_path / name) for name in ("opt.pt", "a.safetensors", "back.pt"))
    torch.save(theirs.state_dict(), source)
    run = CliRunner()
    shown = run.invoke(app, ["inspect", source, "--json"])
    assert [g["parameters"] for g in json.loads(shown.stdout)["groups"]] == list(counts), shown.stdout
    for arguments in (["convert", source, native], ["convert", native, back, "--format", "torch"], ["check", native]):
        result = run.invoke(app, arguments)
        assert result.exit_code == 0, result.output
    assert compare(open_checkpoint(source), open_checkpoint(native), tolerance=0.0).verdict == "equal"
    tree = torch.load(back)
    assert [len(g["params"]) for g in tree["param_groups"]] == list(counts)
    other = torch.optim.AdamW(grouped(net(), counts, named=False), lr=0.1)
    other.load_state_dict(tree)
    places = iter(f"p{i}" for i in range(4))
    lists = [[next(places) for _ in range(count)] for count in counts]
    for listed in (lists, [some for some in lists if some], [*lists, []]):
        (tmp_path / "names.json").write_text(json.dumps(listed))
        result = run.invoke(app, ["convert", source, native, "--names", str(tmp_path / "names.json"), "--force"])
        assert result.exit_code == 0, result.output
        assert [group.parameters for group in open_checkpoint(native).document.groups] == [tuple(n) for n in lists]
    lion = str(tmp_path / "lion.safetensors")
    result = run.invoke(app, ["convert", source, lion, "--recipe", "adamw8bit", "--allow-lossy"])
    assert result.exit_code == 0, result.output
    assert [len(g.parameters) for g in open_checkpoint(lion).document.groups] == list(counts)
    optstate.load(AdamW8bit(grouped(net(), counts), lr=0.1), lion)
    estimated = run.invoke(app, ["estimate", source, "--recipe", "adamw", "--json"])
    assert estimated.exit_code == 0, estimated.output


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("counts", [(4, 0), (0, 4), (2, 0, 2)], ids=str)
def test_distributed_checkpoints_keep_an_empty_group(counts: tuple[int, ...], tmp_path: Path) -> None:
    """torch itself takes one empty group only."""
    model = net()
    saved = step(model, AdamW(grouped(model, counts), lr=0.1))
    dcp.save(get_optimizer_state_dict(model, saved), checkpoint_id=tmp_path, no_dist=True)
    other = net()
    optimizer = AdamW(grouped(other, counts), lr=0.5)
    tree = get_optimizer_state_dict(other, optimizer)
    dcp.load(tree, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(other, optimizer, tree)
    same_state(optimizer, saved)
    assert [g["lr"] for g in optimizer.param_groups if g["params"]] == [0.1] * sum(n > 0 for n in counts)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_folder_in_which_groups_cannot_be_empty_is_loaded_onto_some_that_are(tmp_path: Path) -> None:
    """Flattened, hyper-parameters are kept for every parameter, and those of empty groups nowhere."""
    model = net()
    saved = step(model, AdaLomo(grouped(model, (4,)), lr=0.1))
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    dcp.save(get_optimizer_state_dict(model, saved, options=options), checkpoint_id=tmp_path, no_dist=True)
    for counts in LAYOUTS[:2]:
        optimizer = AdaLomo(grouped(net(), counts), lr=0.5)
        optstate.load(optimizer, tmp_path)
        same_state(optimizer, saved)
        assert [len(g["params"]) for g in optimizer.param_groups] == list(counts)


def test_routes_leave_empty_groups_alone() -> None:
    optimizer = AdamMini([{"params": []}, *optstate.declare_roles(net()), {"params": [], "lr": 0.3}], lr=0.1)
    assert optimizer.param_groups[0]["params"] == []
    assert optimizer.param_groups[-1]["lr"] == 0.3
    LambdaLR(optimizer, lambda t: 0.5)
    assert optimizer.param_groups[-1]["lr"] == 0.15


def test_a_set_has_no_order() -> None:
    with pytest.raises(TypeError, match="are a set, which has another order in every run"):
        AdamW([{"params": set(net().parameters())}])


# --- frozen parameters of any dtype -------------------------------------------------------------------------------

FROZEN: dict[str, Any] = {
    "int8": torch.zeros(8, 4, dtype=torch.int8),
    "uint8": torch.zeros(16, 1, dtype=torch.uint8),
    "bool": torch.zeros(3, dtype=torch.bool),
    "complex": torch.zeros(3, dtype=torch.complex64),
    "float8": torch.zeros(8, 4, dtype=torch.float8_e4m3fn),
    "sparse": torch.eye(3).to_sparse(),
}


class Quantised(nn.Module):
    """A frozen matrix in another dtype, and an adapter that trains."""

    def __init__(self, codes: torch.Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.codes = nn.Parameter(codes.clone(), requires_grad=False)
        self.lora = nn.Linear(4, 2)


@pytest.mark.parametrize("codes", FROZEN.values(), ids=FROZEN.keys())
@pytest.mark.parametrize("build", [AdamW, AdaLomo, AdamW8bit, AdamMini])
def test_frozen_parameters_are_skipped_whatever_they_are(build: Any, codes: torch.Tensor, tmp_path: Path) -> None:
    model = Quantised(codes)
    optimizer = build(model.named_parameters(), lr=0.1)
    assert {p.spec.name: p.trainable for p in optimizer.plan()} == {
        "codes": False,
        "lora.weight": True,
        "lora.bias": True,
    }
    assert "frozen" in str(optimizer.plan())
    step(model, optimizer)
    assert model.codes not in optimizer.state
    optstate.save(optimizer, tmp_path / "a.safetensors")
    other = build(Quantised(codes).named_parameters(), lr=0.1)
    optstate.load(other, tmp_path / "a.safetensors")
    same_state(other, optimizer)
    again = build(Quantised(codes).named_parameters(), lr=0.1)
    again.load_state_dict(optimizer.state_dict())
    same_state(again, optimizer)
    without = build(model.lora.named_parameters(), lr=0.1)
    assert without.plan().nbytes == optimizer.plan().nbytes
    result = CliRunner().invoke(app, ["check", str(tmp_path / "a.safetensors")])
    assert result.exit_code == 0, result.output


@pytest.mark.peer
def test_a_model_in_four_bits_with_an_adapter() -> None:
    """As QLoRA: bitsandbytes packs weights into uint8 of another shape."""
    import bitsandbytes.nn

    model = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4"), nn.Linear(64, 8)).to("cpu")
    model[0].weight.requires_grad_(False)
    assert model[0].weight.dtype == torch.uint8
    ours, theirs = AdamW(model.named_parameters()), torch.optim.AdamW(model.named_parameters())
    assert len(ours.param_groups[0]["params"]) == len(theirs.param_groups[0]["params"]) == 3
    assert len(step(model, ours).state) == 2


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_parameters_in_float8_that_train_are_refused_when_built(dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.zeros(4, 4, dtype=dtype))
    for build in (AdamW, AdaLomo, AdamW8bit):
        with pytest.raises(
            TypeError, match="'w' is torch.float8_e.*cannot|too coarse to train: keep the weights in bf"
        ):
            build([("w", param)])
    optimizer = AdamW(net().named_parameters())
    with pytest.raises(TypeError, match="too coarse to train"):
        optimizer.add_param_group({"params": [("w", param)]})
    assert len(optimizer.param_groups) == 1


def test_codes_that_are_unfrozen_later_are_not_stepped() -> None:
    param = nn.Parameter(torch.zeros(4, 4, dtype=torch.float8_e4m3fn), requires_grad=False)
    optimizer = AdamW([("w", param)])
    param.requires_grad_()
    param.grad = torch.zeros_like(param)
    with pytest.raises(TypeError, match="'w' is torch.float8_e4m3fn, which cannot be stepped"):
        optimizer.step()
    assert param not in optimizer.state


# --- keys of others -----------------------------------------------------------------------------------------------

KEYS: dict[str, Any] = {
    "lr_scale": 0.5,
    "group_name": "layer_3_decay",
    "is_last_layer": False,
    "lr_multiplier": 1.0,
    "wd_multiplier": 0.5,
    "weight_decay_mult": 2.0,
    "lr_mult": 2,
    "decay_mult": 0.0,
    "layer_id": 3,
    "name": "backbone",
    "base_lr": 0.1,
    "fix_step": None,
    "tags": ("a", ["b"]),
    "foreach": None,
    "amsgrad": False,
    "maximize": False,
}


@pytest.mark.parametrize("build", [AdamW, AdaLomo])
def test_keys_that_are_nobodys_are_carried_along_and_saved(build: Any, tmp_path: Path) -> None:
    model = net()
    optimizer = step(model, build(grouped(model, (4, 0), **KEYS), lr=0.1))
    assert all({key: g[key] for key in KEYS} == KEYS for g in optimizer.param_groups)
    optstate.save(optimizer, tmp_path / "a.safetensors")
    for extra in ({}, dict.fromkeys(KEYS, 0)):
        for i in (0, 1):
            other = build(grouped(net(), (4, 0), **{k: v for k, v in extra.items() if k != "tags"}), lr=0.5)
            if i:
                optstate.load(other, tmp_path / "a.safetensors")
            else:
                other.load_state_dict(optimizer.state_dict())
            assert all({key: g[key] for key in KEYS} == KEYS for g in other.param_groups)
    ours = build(grouped(net(), (4, 0), mine="kept"))  # not in the file
    optstate.load(ours, tmp_path / "a.safetensors")
    assert ours.param_groups[0]["mine"] == "kept"
    tree = get_optimizer_state_dict(model, optimizer)
    assert tree["param_groups"][0]["lr_scale"] == 0.5
    optimizer.param_groups[0]["lr_scale"] = 1.0
    set_optimizer_state_dict(model, optimizer, tree)
    assert optimizer.param_groups[0]["lr_scale"] == 0.5


def test_a_route_gives_such_keys_to_every_part() -> None:
    route = optstate.route([(optstate.is_matrix, updates.scale_by_adam())], default=updates.momentum())
    optimizer = optstate.Optimizer([{"params": net().named_parameters(), "lr_scale": 0.5, "momentum": 0.3}], route)
    assert [g["lr_scale"] for g in optimizer.param_groups] == [0.5, 0.5]
    assert [g.get("momentum") for g in optimizer.param_groups] == [None, 0.3]


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("weigth_decay", "weight_decay"),
        ("weightdecay", "weight_decay"),
        ("Weight_Decay", "weight_decay"),
        ("weight-decay", "weight_decay"),
        ("beta", "betas"),
        ("epsilon", "eps"),
        ("learning_rate", "lr"),
        ("LR", "lr"),
        ("momentums", "momentum"),
        ("clip_treshold", "clip_threshold"),
    ],
)
def test_a_key_that_is_nearly_a_hyper_parameter_is_asked_about(key: str, meant: str) -> None:
    for groups in (grouped(net(), (4,), **{key: 0.1}), grouped(net(), (4, 0))):
        groups[-1][key] = 0.1
        with pytest.raises(
            ValueError, match=f"unknown hyper-parameter '{key}' in a param group: did you mean '(?:{meant})"
        ):
            AdamW(groups)
    optimizer = AdamW(net().named_parameters())
    with pytest.raises(ValueError, match="did you mean"):
        optimizer.add_param_group({"params": [("x", nn.Parameter(torch.ones(2)))], key: 0.1})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("build", "key", "value", "match"),
    [
        (AdaLomo, "betas", (0.9, 0.99), "unknown hyper-parameter 'betas'"),
        (AdaLomo, "momentum", 0.9, "unknown hyper-parameter 'momentum'"),
        (AdamW, "momentum", 0.9, "unknown hyper-parameter 'momentum'"),
        (AdamW, "amsgrad", True, "amsgrad=True in a param group asks for another rule"),
        (AdamW, "maximize", True, "maximize=True in a param group asks for another rule"),
        (AdamW, "nesterov", True, "nesterov=True in a param group asks for another rule"),
    ],
)
def test_what_would_have_no_effect_is_refused(build: Any, key: str, value: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build(grouped(net(), (4,), **{key: value}))
    build(grouped(net(), (4,), **{key: False if value is True else 0.0}))  # nothing is asked for


def test_groups_of_torchs_optimizers_are_taken_where_the_rule_is_the_same() -> None:
    for source in (torch.optim.AdamW, torch.optim.Adam):
        groups = source(net().named_parameters(), lr=0.3, betas=(0.8, 0.9), weight_decay=0.0).param_groups
        assert [AdamW(groups).param_groups[0][key] for key in ("lr", "betas")] == [0.3, (0.8, 0.9)]
    AdamW(torch.optim.AdamW(net().named_parameters(), weight_decay=0.1).param_groups)
    with pytest.raises(ValueError, match="decoupled_weight_decay=False in a param group asks for a decay that is part"):
        AdamW(torch.optim.Adam(net().named_parameters(), weight_decay=0.1).param_groups)


@pytest.mark.parametrize(
    ("group", "match"),
    [
        ({"parms": []}, "must be a dict with the key 'params', not one with 'parms'"),
        ({"params": None}, "the parameters of a group are a NoneType"),
        ({"params": "weights"}, "the parameters of a group are a str"),
        ([], "must be a dict with the key 'params', not list"),
    ],
)
def test_what_is_no_group(group: Any, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        AdamW([{"params": []}, group])
    with pytest.raises(TypeError, match=match):
        AdamW(net().named_parameters()).add_param_group(group)


@pytest.mark.peer
def test_sam_takes_our_optimizers_as_it_takes_torchs() -> None:
    weights = []
    for base in (AdamW, torch.optim.AdamW):
        model = net()
        import pytorch_optimizer

        sam = pytorch_optimizer.SAM(model.parameters(), base_optimizer=base, lr=1e-2, weight_decay=0.0)
        for _ in range(3):
            model(torch.ones(2, 4)).square().mean().backward()
            sam.first_step(zero_grad=True)
            model(torch.ones(2, 4)).square().mean().backward()
            sam.second_step(zero_grad=True)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-7)  # fp32: the same rule in another order


# --- what schedulers look at --------------------------------------------------------------------------------------


def two_adams(model: nn.Module) -> Any:
    rules = [(optstate.is_matrix, updates.scale_by_adam(stores.Full()))]
    return optstate.Optimizer(
        model.named_parameters(), optstate.route(rules, default=updates.scale_by_adam(betas=(0.8, 0.99))), lr=0.1
    )


SCHEDULED: dict[str, Any] = {
    "adamw": lambda m: AdamW(m.named_parameters(), lr=0.1),
    "adammini": lambda m: AdamMini(optstate.declare_roles(m), lr=0.1),
    "empty groups": lambda m: AdamMini([{"params": []}, *optstate.declare_roles(m), {"params": []}], lr=0.1),
    "two adams": two_adams,
}


@pytest.mark.parametrize("build", SCHEDULED.values(), ids=SCHEDULED.keys())
def test_schedulers_of_momentum_find_it_in_routed_recipes(build: Any) -> None:
    model = net()
    optimizer = build(model)
    reference = torch.optim.AdamW(net().parameters(), lr=0.1, betas=(0.8, 0.99))
    schedules = [OneCycleLR(o, max_lr=1e-2, total_steps=6) for o in (optimizer, reference)]
    for _ in range(5):
        step(model, optimizer, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own says that the reference is not stepped
            for schedule in schedules:
                schedule.step()
        for group in optimizer.param_groups:
            assert group["lr"] == reference.param_groups[0]["lr"]
            assert group["betas"][0] == reference.param_groups[0]["betas"][0]
            assert group["betas"][1] in (0.999, 0.99, 0.95)
    CyclicLR(build(net()), base_lr=1e-4, max_lr=1e-2)


def test_defaults_are_what_all_groups_share() -> None:
    route = optstate.route([(optstate.is_matrix, updates.scale_by_adam())], default=updates.momentum())
    both = optstate.Optimizer(net().named_parameters(), route, lr=0.1)
    assert both.defaults == {"lr": 0.1}
    with pytest.raises(ValueError, match="must support momentum or beta1"):
        OneCycleLR(both, max_lr=1.0, total_steps=5)
    matrices = [(name, p) for name, p in net().named_parameters() if p.ndim == 2]
    one = optstate.Optimizer(matrices, route, lr=0.1)
    assert one.defaults == {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}
    one.add_param_group({"params": [("b", nn.Parameter(torch.ones(3)))]})
    assert one.defaults == {"lr": 0.1}
    assert optstate.Optimizer(net().named_parameters(), updates.momentum(), lr=0.1).defaults["momentum"] == 0.9


# --- inference mode -----------------------------------------------------------------------------------------------


def test_nothing_is_built_under_inference_mode() -> None:
    model = net()
    optimizer = AdamW(model.named_parameters())
    with torch.inference_mode():
        for what in (
            lambda: AdamW(model.named_parameters()),
            lambda: AdaLomo(model.named_parameters(), fused_backward=True),
            lambda: optstate.fuse_backward(optimizer),
            lambda: copy.deepcopy(optimizer),
            lambda: optimizer.add_param_group({"params": [("w", nn.Parameter(torch.ones(2)))]}),
        ):
            with pytest.raises(RuntimeError, match=r"under torch\.inference_mode\(\).*outside of it"):
                what()
        inside = net()
    assert len(optimizer.param_groups) == 1
    assert optimizer.fused is None
    with pytest.raises(ValueError, match=r"'0\.weight' was made under torch\.inference_mode\(\)"):
        AdamW(inside.named_parameters())
    with torch.no_grad():
        step(model, AdamW(model.named_parameters()))


def test_state_that_is_made_while_loading_can_be_stepped() -> None:
    model, other = net(), net()
    saved = step(model, AdamW(model.named_parameters())).state_dict()
    other[0].weight.requires_grad_(False)
    optimizer = AdamW(other.named_parameters())
    other[0].weight.requires_grad_(True)
    with torch.inference_mode():
        optimizer.load_state_dict(saved)
    step(other, optimizer)
    assert {s["step"] for s in optimizer.state.values()} == {4}


# --- groups that users change by hand -----------------------------------------------------------------------------


def three_groups(fused: bool, named: bool = True, recipe: Any = AdamW) -> tuple[list[nn.Linear], Any]:
    layers = [nn.Linear(4, 4, bias=False) for _ in range(3)]
    groups = [
        {"params": [(name, layer.weight) if named else layer.weight], "lr": lr}
        for name, layer, lr in zip("abc", layers, (1.0, 0.1, 0.01), strict=True)
    ]
    optimizer = recipe(groups, lr=1.0)
    if fused:
        optstate.fuse_backward(optimizer)
    return layers, optimizer


def moves(layers: list[nn.Linear], optimizer: Any) -> list[float]:
    """How far each weight goes in a step: its learning rate, as the gradients of all elements are alike."""
    before = [layer.weight.detach().clone() for layer in layers]
    sum(layer(torch.ones(1, 4)).sum() for layer in layers).backward()
    optimizer.step()
    for layer in layers:
        layer.weight.grad = None
    return [round((layer.weight - old).abs().max().item(), 2) for layer, old in zip(layers, before, strict=True)]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_parameters_have_the_values_of_the_group_they_are_in(fused: bool, named: bool) -> None:
    layers, optimizer = three_groups(fused, named, SGD)
    optimizer.param_groups.reverse()
    assert moves(layers, optimizer) == [1.0, 0.1, 0.01]
    first, second, _ = optimizer.param_groups
    first["params"], second["params"] = first["params"] + second["params"], []
    assert moves(layers, optimizer) == [1.0, 0.01, 0.01]
    assert [group.get("param_names") for group in optimizer.param_groups] == (
        [["c", "b"], [], ["a"]] if named else [None] * 3
    )
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_a_group_that_is_taken_out_is_stepped_no_more_and_can_come_back(fused: bool, named: bool) -> None:
    layers, optimizer = three_groups(fused, named)
    moves(layers, optimizer)
    taken = optimizer.param_groups.pop(0)
    assert len(copy.deepcopy(optimizer).state_dict()["state"]) == 2
    with pytest.warns(UserWarning, match="taken out of the param groups.*without state from now on: "):
        assert moves(layers, optimizer) == [0.0, 0.1, 0.01]
    assert layers[0].weight not in optimizer.state
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    weight = ("a", taken["params"][0]) if named else taken["params"][0]
    optimizer.add_param_group({"params": [weight], "lr": 0.5})
    assert moves(layers, optimizer) == [0.5, 0.1, 0.01]
    assert len({param.spec.name for param in optimizer.plan()}) == 3
    assert optimizer.state[layers[0].weight]["step"] == 1


def test_groups_that_cannot_be_followed_are_refused_in_one_line() -> None:
    layers, optimizer = three_groups(False)
    optimizer.param_groups = [{"params": [layer.weight for layer in layers], "lr": 0.1}]
    with pytest.raises(RuntimeError, match="'a' was put into param group 0, which has no 'betas'"):
        moves(layers, optimizer)

    layers, optimizer = three_groups(False)
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.ones(5, 4))]
    with pytest.raises(RuntimeError, match="was put into the optimizer's groups after it was built"):
        optimizer.state_dict()

    layers, optimizer = three_groups(False)
    optimizer.param_groups[1]["params"].append(layers[0].weight)
    with pytest.raises(RuntimeError, match="'a' is in two places of the param groups"):
        moves(layers, optimizer)

    route = optstate.route([("a", updates.momentum())], default=updates.scale_by_adam())
    optimizer = optstate.Optimizer([(n, layer.weight) for n, layer in zip("abc", layers, strict=True)], route, lr=0.1)
    one, other = optimizer.param_groups
    one["params"], other["params"] = one["params"] + other["params"], []
    with pytest.raises(RuntimeError, match="'b' was put into param group 0, whose parameters another chain steps"):
        moves(layers, optimizer)


@pytest.mark.parametrize("when", ["before", "after"])
def test_looking_for_state_where_there_is_none_changes_nothing(when: str) -> None:
    """torch's `state` makes an empty entry for every parameter it is asked for."""
    model = net()
    model[0].bias.requires_grad_(False)
    optimizer = AdamW(model.named_parameters())
    if when == "after":
        step(model, optimizer)
    assert not optimizer.state[model[0].bias]
    step(model, optimizer)
    assert not optimizer.state[model[0].bias]
    saved = copy.deepcopy(optimizer.state_dict())
    assert all(saved["state"].values())
    saved["state"][1] = {}  # as torch's optimizers save it
    optimizer.load_state_dict(saved)
    assert not optimizer.state[model[0].bias]
    model[0].bias.requires_grad_(True)
    step(model, optimizer)
    assert optimizer.state[model[0].bias]["step"] > 0


@pytest.mark.parametrize("here", [(2,), (2, 0), (0, 2)])
@pytest.mark.parametrize("there", [(2,), (2, 0), (0, 2)])
def test_torchs_state_is_loaded_with_empty_groups_on_either_side(there: tuple[int, ...], here: tuple[int, ...]) -> None:
    model = nn.Linear(4, 4)
    theirs = torch.optim.AdamW(grouped(model, there, named=False), lr=1e-3)
    model(torch.ones(1, 4)).sum().backward()
    theirs.step()
    optimizer = AdamW(grouped(model, here, named=False), lr=1e-3)
    optimizer.load_state_dict(theirs.state_dict())
    for param in model.parameters():
        assert torch.equal(optimizer.state[param]["exp_avg_sq"], theirs.state[param]["exp_avg_sq"])


def test_a_parameter_that_has_no_shape_yet_is_refused_in_one_line() -> None:
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(ValueError, match=r"'0\.weight' has no shape yet, as its layer is lazy: run a batch"):
        AdamW(model.named_parameters())
    model(torch.ones(2, 3))
    step(model, AdamW(model.named_parameters()))
