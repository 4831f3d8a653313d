"""Other libraries go on from what is written for them as ours would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optstate
from adalomo import Adafactor, AdaLomo
from optstate import stores
from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.files.tensor_bytes import bytes_of
from optstate.checkpoint.files.torch_archive_writer import create_torch
from optstate.checkpoint.formats.registry import LayoutError, choose_format
from optstate.checkpoint.open_checkpoint import open_checkpoint
from optstate.checkpoint.operations.plan_conversion import Conversion, plan_stores
from optstate.checkpoint.operations.plan_recipe import plan_recipe
from optstate.checkpoint.operations.run_conversion import carry_out
from optstate.recipes import CAME, SGD, SM3, AdamW, AdamW4bit, AdamW8bit, Lion, Lion8bit, SGDM8bit
from tests.support.paths import DATA
from tests.support.written_state import SHAPES, STEPS, entries_of, library, saved, tensors, trained, tree_of, write

# --- files of ours, read by libraries -----------------------------------------------------------------------------


def copies(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """The same parameters in the same groups."""
    clones = [nn.Parameter(param.detach().clone()) for param in params]
    return [{"params": clones[:2]}, {"params": clones[2:]}]


def members(groups: list[dict[str, Any]]) -> list[nn.Parameter]:
    return [param for group in groups for param in group["params"]]


def assert_same_steps(ours: Any, theirs: Any, params: list[nn.Parameter], others: list[nn.Parameter]) -> None:
    """Both optimizers move by the same three steps, which are far longer than the tolerance: a few roundings of weights
    up to 4, as one fuses multiplications and additions and the other does not."""
    before = [param.detach().clone() for param in params]
    for _ in range(3):
        for mine, other in zip(params, others, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        ours.step()
        theirs.step()
    for mine, other, was in zip(params, others, before, strict=True):
        assert (mine - was).abs().mean() > 1e-3
        torch.testing.assert_close(other, mine, rtol=1e-6, atol=5e-7)


def transformers_adafactor(params: Any) -> Any:
    return library("transformers").Adafactor(params)


CONTINUED: dict[str, tuple[Callable[[Any], Any], str, Callable[[Any], Any]]] = {
    "adamw": (lambda p: AdamW(p, lr=1e-2, betas=(0.8, 0.95)), "torch", lambda p: torch.optim.AdamW(p)),
    "sgd": (lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1), "torch", lambda p: torch.optim.SGD(p)),
    "sgd without momentum": (lambda p: SGD(p, lr=0.1), "torch", lambda p: torch.optim.SGD(p)),
    "torch's adafactor": (
        lambda p: Adafactor(p, lr=1e-2, eps=(None, 1e-3), torch_compatible=True, weight_decay=0.1),
        "torch",
        lambda p: torch.optim.Adafactor(p),
    ),
    "adafactor in torch": (lambda p: Adafactor(p, lr=1e-2), "torch", lambda p: torch.optim.Adafactor(p)),
    "adafactor": (lambda p: Adafactor(p, lr=1e-2, weight_decay=0.1), "transformers", transformers_adafactor),
    "adafactor, lr alone": (
        lambda p: Adafactor(p, lr=1e-2, scale_parameter=False, clip_threshold=None),
        "transformers",
        transformers_adafactor,
    ),
    "adafactor, relative": (
        lambda p: Adafactor([{**group, "lr": 1.0} for group in p]),
        "transformers",
        lambda p: library("transformers").Adafactor(p, lr=1.0, relative_step=False),
    ),
    "adafactor, average of steps": (
        lambda p: Adafactor(p, lr=1e-2, beta1=0.9, momentum_before_lr=False),
        "transformers",
        transformers_adafactor,
    ),
    "adalomo": (lambda p: AdaLomo(p, lr=1e-2, weight_decay=0.1), "transformers", transformers_adafactor),
    "lion": (
        lambda p: Lion(p, lr=1e-3, weight_decay=0.1),
        "lion-pytorch",
        lambda p: library("lion_pytorch").Lion(p),
    ),
    "came": (
        lambda p: CAME(p, lr=1e-3, weight_decay=0.1),
        "pytorch_optimizer",
        lambda p: library("pytorch_optimizer").CAME(p),
    ),
    "sm3": (lambda p: SM3(p, lr=0.1), "pytorch_optimizer", lambda p: library("pytorch_optimizer").SM3(p)),
    "sm3 with momentum": (
        lambda p: SM3([{**group, "lr": 1.0} for group in p], momentum=0.9),
        "pytorch_optimizer",
        lambda p: library("pytorch_optimizer").SM3(p),
    ),
    "adamw in bitsandbytes": (
        lambda p: AdamW(p, lr=1e-2),
        "bitsandbytes",
        lambda p: library("bitsandbytes").optim.AdamW32bit(p),
    ),
    "lion in bitsandbytes": (
        lambda p: Lion(p, lr=1e-3, weight_decay=0.1),
        "bitsandbytes",
        lambda p: library("bitsandbytes").optim.Lion32bit(p),
    ),
    "sgd in bitsandbytes": (
        lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        "bitsandbytes",
        lambda p: library("bitsandbytes").optim.SGD32bit(p, lr=0.1, momentum=0.5),
    ),
}


@pytest.mark.parametrize("name", CONTINUED)
def test_the_library_goes_on_as_we_do(name: str, tmp_path: Path) -> None:
    """The hyper-parameters come from the file as well: the library's optimizer is built with others."""
    make, layout, theirs = CONTINUED[name]
    params, optimizer, checkpoint = saved(make, tmp_path)
    write(layout, checkpoint, tmp_path / "theirs.pt")
    groups = copies(params)
    other = theirs(groups)
    own_keys = set(other.param_groups[0])
    other.load_state_dict(torch.load(tmp_path / "theirs.pt"))
    assert {"param_names", *own_keys, "step"} >= set(other.param_groups[0]) >= own_keys
    assert other.param_groups[0]["param_names"] == ["layer.0.weight", "layer.1.weight"]
    assert_same_steps(optimizer, other, params, members(groups))


def test_adalomo_goes_on_in_pytorch_optimizer(tmp_path: Path) -> None:
    """Its state lies beside `state` by the names of the parameters."""
    made = library("pytorch_optimizer")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for i, param in enumerate(tensors(*SHAPES)):
                self.register_parameter(f"p{i}", param)

    ours, theirs = Model(), Model()
    optimizer = AdaLomo(ours.named_parameters(), lr=1e-2, weight_decay=0.1)
    trained(optimizer, list(ours.parameters()))
    optstate.save(optimizer, tmp_path / "ours.safetensors")
    write("pytorch_optimizer", open_checkpoint(tmp_path / "ours.safetensors"), tmp_path / "theirs.pt")
    theirs.load_state_dict(ours.state_dict())
    other = made.AdaLOMO(theirs, lr=1e-2, weight_decay=0.1)
    other.load_state_dict(torch.load(tmp_path / "theirs.pt"))
    assert other.num_steps == STEPS
    grads = [torch.randn_like(param) for param in ours.parameters()]
    before = [param.detach().clone() for param in ours.parameters()]
    for param, grad in zip(ours.parameters(), grads, strict=True):
        param.grad = grad.clone()
    optimizer.step()
    other.fused_backward(sum((p * g).sum() for p, g in zip(theirs.parameters(), grads, strict=True)), lr=1e-2)
    for mine, theirs_, was in zip(ours.parameters(), theirs.parameters(), before, strict=True):
        assert (mine - was).abs().mean() > 1e-3
        torch.testing.assert_close(theirs_, mine, rtol=1e-6, atol=1e-7)


LOW_BIT: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], dict[str, str]]] = {
    "adamw": (
        lambda p: AdamW8bit(p, lr=1e-2),
        lambda p: library("bitsandbytes").optim.AdamW8bit(p),
        {"exp_avg": "1", "exp_avg_sq": "2"},
    ),
    "lion": (
        lambda p: Lion8bit(p, lr=1e-3),
        lambda p: library("bitsandbytes").optim.Lion8bit(p),
        {"exp_avg": "1"},
    ),
    "sgd": (
        lambda p: SGDM8bit(p, lr=0.1),
        lambda p: library("bitsandbytes").optim.SGD8bit(p, lr=0.1, momentum=0.5),
        {"momentum_buffer": "1"},
    ),
}


@pytest.mark.parametrize("name", LOW_BIT)
def test_bitsandbytes_takes_our_codes(name: str, tmp_path: Path) -> None:
    make, theirs, slots = LOW_BIT[name]
    params, optimizer, checkpoint = saved(make, tmp_path)
    write("bitsandbytes", checkpoint, tmp_path / "theirs.pt")
    groups = copies(params)
    other = theirs(groups)
    other.load_state_dict(torch.load(tmp_path / "theirs.pt"))
    for mine, theirs_ in zip(params, members(groups), strict=True):
        state, wanted = other.state[theirs_], optimizer.state[mine]
        assert state["step"] == STEPS
        for slot, n in slots.items():
            codes = mine.numel() >= 4096
            assert torch.equal(state[f"state{n}"], wanted[f"{slot}.codes" if codes else slot])
            if codes:
                assert torch.equal(state[f"absmax{n}"], wanted[f"{slot}.absmax"])
    before = [param.detach().clone() for param in members(groups)]
    for param in members(groups):
        param.grad = torch.randn_like(param)
    other.step()
    assert all((a - b).abs().mean() > 1e-4 for a, b in zip(members(groups), before, strict=True))


@pytest.mark.parametrize("bits", [8, 4])
def test_torchao_takes_our_codes(bits: int, tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.optim")
    params, optimizer, checkpoint = saved(lambda p: (AdamW8bit if bits == 8 else AdamW4bit)(p, lr=1e-2), tmp_path)
    assert choose_format(checkpoint.document) == ("bitsandbytes" if bits == 8 else "torchao")
    write("torchao", checkpoint, tmp_path / "theirs.pt")
    groups = copies(params)
    other = (torchao.AdamW8bit if bits == 8 else torchao.AdamW4bit)(groups)
    other.load_state_dict(torch.load(tmp_path / "theirs.pt", weights_only=False))
    for mine, theirs in zip(params, members(groups), strict=True):
        for slot in ("exp_avg", "exp_avg_sq"):
            fresh, state = other._new_buffer(theirs, slot == "exp_avg"), other.state[theirs][slot]
            assert type(state) is type(fresh)
            assert state.shape == mine.shape
            if type(state) is Tensor:
                continue
            assert {key: type(value) for key, value in vars(state).items() if key != "_shape"} == {
                key: type(value) for key, value in vars(fresh).items() if key != "_shape"
            }
            assert (state.signed, state.block_size) == (fresh.signed, fresh.block_size)
            assert torch.equal(state.qmap, fresh.qmap)
            store = stores.Block8(signed=state.signed) if bits == 8 else stores.Block4(signed=state.signed)
            fields = {field: optimizer.state[mine][f"{slot}.{field}"] for field in ("codes", "absmax")}
            assert torch.equal(state.dequantize(), store.read(fields, mine.shape))
    with torch.compiler.set_stance("force_eager"):
        trained(other, members(groups), steps=1)
    assert all(torch.isfinite(param).all() for param in members(groups))


# --- from one library to another ----------------------------------------------------------------------------------


def carried(conversion: Conversion, layout: str, path: Path) -> dict[str, Any]:
    """The file of a conversion, as torch reads it."""
    tree = tree_of(layout, conversion.document, {entry.name: entry for entry in conversion.entries})
    with create_torch(path, tree) as file:
        carry_out(conversion, lambda key, tensor: file.put(key, bytes_of(tensor)))
    return torch.load(path, weights_only=layout != "torchao")


def trained_by(make: Callable[[Any], Any], path: Path) -> tuple[list[nn.Parameter], Any, Checkpoint]:
    """Parameters and a library's optimizer after some steps, and its file."""
    params = tensors(*SHAPES)
    optimizer = make([{"params": params[:2]}, {"params": params[2:], "lr": 3e-3}])
    trained(optimizer, params)
    torch.save(optimizer.state_dict(), path)
    return params, optimizer, open_checkpoint(path)


def test_torchs_adamw_goes_into_bitsandbytes_and_back(tmp_path: Path) -> None:
    bnb = library("bitsandbytes")
    _, _, checkpoint = trained_by(lambda p: torch.optim.AdamW(p, betas=(0.8, 0.9)), tmp_path / "torch.pt")
    made = carried(plan_stores(checkpoint, "block8", {}), "bitsandbytes", tmp_path / "bnb.pt")
    other = bnb.optim.AdamW8bit(copies(tensors(*SHAPES)))
    other.load_state_dict(made)
    assert other.param_groups[1]["lr"] == 3e-3
    assert other.param_groups[0]["betas"] == (0.8, 0.9)
    assert "foreach" not in other.param_groups[0]
    trained(other, members(other.param_groups), steps=1)

    again = carried(plan_stores(open_checkpoint(tmp_path / "bnb.pt"), "fp32", {}), "torch", tmp_path / "again.pt")
    theirs = torch.load(tmp_path / "torch.pt")
    assert again["param_groups"] == theirs["param_groups"]
    for i, state in theirs["state"].items():
        assert list(again["state"][i]) == list(state)
        assert torch.equal(again["state"][i]["step"], state["step"])
        for key in ("exp_avg", "exp_avg_sq"):
            assert (again["state"][i][key] - state[key]).abs().max() < 0.01 * state[key].abs().max()


def test_codes_of_bitsandbytes_are_torchaos(tmp_path: Path) -> None:
    """Both libraries have the same map, so nothing but the names of the parts changes."""
    pytest.importorskip("torchao")
    write("torchao", open_checkpoint(DATA / "bnb_adamw8bit" / "optimizer.pt"), tmp_path / "torchao.pt")
    bnb = torch.load(DATA / "bnb_adamw8bit" / "optimizer.pt")["state"][1]["__bnb_optimizer_quant_state__"]
    made = torch.load(tmp_path / "torchao.pt", weights_only=False)
    for slot, n in (("exp_avg", "1"), ("exp_avg_sq", "2")):
        moment = made["state"][1][slot]
        parts = (bnb[f"state{n}"], bnb[f"absmax{n}"], bnb[f"qmap{n}"])
        assert all(map(torch.equal, (moment.codes, moment.scale, moment.qmap), parts))
        assert moment.signed is (slot == "exp_avg")
    theirs = torch.load(DATA / "torchao_adamw8bit" / "optimizer.pt", weights_only=False)
    assert made["param_groups"] == theirs["param_groups"]


def test_adafactor_of_torch_and_transformers_is_the_same_state(tmp_path: Path) -> None:
    adafactor = library("transformers").Adafactor
    _, hf, checkpoint = trained_by(
        lambda p: adafactor([{**group, "lr": 1e-3} for group in p], lr=1e-3, relative_step=False), tmp_path / "hf.pt"
    )
    write("torch", checkpoint, tmp_path / "torch.pt")
    params = tensors(*SHAPES)
    for param, trained_one in zip(params, members(hf.param_groups), strict=True):
        param.data.copy_(trained_one)
    other = torch.optim.Adafactor([{"params": params[:2]}, {"params": params[2:]}])
    other.load_state_dict(torch.load(tmp_path / "torch.pt"))
    for param, trained_one in zip(params, members(hf.param_groups), strict=True):
        state, wanted = other.state[param], hf.state[trained_one]
        assert state["step"] == wanted["step"] == STEPS
        if param.ndim == 2:
            assert torch.equal(state["row_var"], wanted["exp_avg_sq_row"][:, None])
            assert torch.equal(state["col_var"], wanted["exp_avg_sq_col"][None])
        else:
            assert torch.equal(state["variance"], wanted["exp_avg_sq"])
    assert_same_steps(hf, other, members(hf.param_groups), params)
    write("transformers", open_checkpoint(tmp_path / "torch.pt"), tmp_path / "again.pt")
    again, first = torch.load(tmp_path / "again.pt"), torch.load(tmp_path / "hf.pt")
    assert [{**group, "eps": None} for group in again["param_groups"]] == [
        {**group, "eps": None} for group in first["param_groups"]
    ]
    assert again["param_groups"][0]["eps"] == pytest.approx((1e-30, 1e-3), rel=1e-12)
    torch.testing.assert_close(
        {i: {**state, "RMS": 0.0} for i, state in again["state"].items()},
        {i: {**state, "RMS": 0.0} for i, state in first["state"].items()},
        rtol=0,
        atol=0,
    )


def test_adamw_becomes_adafactor_without_its_correction(tmp_path: Path) -> None:
    """After three steps of beta2=0.999 the second moment is 0.003 of the mean square that Adafactor has."""
    adafactor = library("transformers").Adafactor
    _, adamw, checkpoint = trained_by(lambda p: torch.optim.AdamW(p), tmp_path / "torch.pt")
    with pytest.raises(LayoutError, match="--recipe adafactor"):
        tree_of("transformers", checkpoint.document, entries_of(checkpoint))
    groups = tuple(replace(g, hyper={**g.hyper, "eps": (1e-30, 1e-3)}) for g in checkpoint.document.groups)
    relabelled = replace(checkpoint.document, recipe="adafactor", groups=groups)
    with pytest.raises(LayoutError, match=r"of='gradient', beta=0.9, where transformers has of='update', beta=None"):
        tree_of("transformers", relabelled, entries_of(checkpoint))
    made = carried(plan_recipe(checkpoint, "adafactor"), "transformers", tmp_path / "hf.pt")
    raw = members(adamw.param_groups)[0]
    mean_square = adamw.state[raw]["exp_avg_sq"] / (1 - 0.999**STEPS)
    torch.testing.assert_close(made["state"][0]["exp_avg_sq_row"], mean_square.mean(-1))
    other = adafactor(copies(tensors(*SHAPES)))
    other.load_state_dict(made)
    trained(other, members(other.param_groups), steps=1)
