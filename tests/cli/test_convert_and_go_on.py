"""Training goes on from a converted file: in another library, in ours, with the rule of the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import optstate
from adalomo import Adafactor, AdaLomo
from optstate.checkpoint.document.native_file import document_of
from optstate.checkpoint.files.safetensors_header import read_header
from optstate.recipes import SGD, AdamW, Lion, SGDM8bit
from tests.support.converting import SHAPES, convert, converted, model_of, native, torch_file, train, trained
from tests.support.models import assert_same, state_of, weights_of
from tests.support.paths import DATA

pytestmark = pytest.mark.slow


# --- other libraries go on ----------------------------------------------------------------------------------------


def step_of(optimizer: Any, params: list[Any], path: Path, trusted: bool = True) -> None:
    """Load a file into an optimizer of the library that it was written for, and make a step."""
    optimizer.load_state_dict(torch.load(path, weights_only=trusted))
    before = [param.detach().clone() for param in params]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    for param, old in zip(params, before, strict=True):
        assert torch.isfinite(param).all()
        assert not torch.equal(param, old)


def clones(model: nn.Module) -> list[nn.Parameter]:
    return [nn.Parameter(param.detach().clone()) for param in model.parameters()]


def test_torch_goes_on_from_our_adamw_as_ours_does(tmp_path: Path) -> None:
    model, optimizer = trained(lambda m: AdamW(m.named_parameters(), lr=1e-2))
    optstate.save(optimizer, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "opt.pt")
    params = clones(model)
    other = torch.optim.AdamW(params)
    step_of(other, params, tmp_path / "opt.pt")
    assert other.param_groups[0]["lr"] == 1e-2
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    for ours, theirs in zip(model.parameters(), params, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)  # a fused kernel and one tensor at a time


def test_torch_goes_on_from_our_momentum(tmp_path: Path) -> None:
    source = native(tmp_path, lambda m: SGD(m.named_parameters(), lr=1e-2, momentum=0.9, nesterov=True))
    convert(source, tmp_path / "opt.pt")
    params = clones(model_of(SHAPES))
    other = torch.optim.SGD(params, lr=1.0)
    step_of(other, params, tmp_path / "opt.pt")
    assert (other.param_groups[0]["momentum"], other.param_groups[0]["nesterov"]) == (0.9, True)


@pytest.mark.parametrize("layout", ["torch", "transformers"])
def test_an_adafactor_made_of_adamw_goes_on(adamw: Path, layout: str, tmp_path: Path) -> None:
    convert(
        adamw, tmp_path / "opt.pt", "--recipe", "adafactor", "--set", "lr=1e-3", "--format", layout, "--allow-lossy"
    )
    params = clones(model_of(SHAPES))
    if layout == "torch":
        optimizer: Any = torch.optim.Adafactor(params)
    else:
        library = pytest.importorskip("transformers.optimization")
        optimizer = library.Adafactor(params, lr=1.0, scale_parameter=False, relative_step=False)
    step_of(optimizer, params, tmp_path / "opt.pt")
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_bitsandbytes_goes_on_from_our_adamw_in_blocks(adamw: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("bitsandbytes")
    convert(adamw, tmp_path / "opt.pt", "--to", "block8", "--format", "bitsandbytes", "--allow-lossy")
    params = clones(model_of(SHAPES))
    step_of(library.optim.AdamW8bit(params), params, tmp_path / "opt.pt")


def test_torchao_goes_on_from_our_adamw_in_blocks(adamw: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("torchao.optim")
    convert(adamw, tmp_path / "opt.pt", "--to", "block8", "--format", "torchao", "--allow-lossy")
    params = clones(model_of(SHAPES))
    with torch.compiler.set_stance("force_eager"):  # it compiles its step
        step_of(library.AdamW8bit(params), params, tmp_path / "opt.pt", trusted=False)


# --- a run goes on ------------------------------------------------------------------------------------------------


def test_our_run_goes_on_to_the_same_bits_by_way_of_torchs_file(tmp_path: Path) -> None:
    """Without names in the first file; the last one is loaded without consent, for nothing was lost."""
    model, optimizer = trained(lambda m: AdamW(m.parameters(), lr=1e-2))
    optstate.save(optimizer, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.pt")
    (tmp_path / "names.txt").write_text("\n".join(name for name, _ in model.named_parameters()))
    convert(tmp_path / "b.pt", tmp_path / "c.safetensors", "--names", tmp_path / "names.txt")
    other = model_of(SHAPES)
    other.load_state_dict(model.state_dict())
    resumed = AdamW(other.named_parameters())
    optstate.load(resumed, tmp_path / "c.safetensors")
    train(model, optimizer, 3, 3)
    train(other, resumed, 3, 3)
    assert_same(weights_of(other), weights_of(model))
    assert_same(state_of(resumed), state_of(optimizer))


@pytest.mark.parametrize("way", ["directly", "converted"])
def test_a_run_of_torch_goes_on_with_ours(way: str, tmp_path: Path) -> None:
    model, optimizer = trained(lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.1))
    torch.save(optimizer.state_dict(), tmp_path / "opt.pt")
    path = tmp_path / "opt.pt"
    if way == "converted":
        path = tmp_path / "opt.safetensors"
        convert(tmp_path / "opt.pt", path)
    other = model_of(SHAPES)
    other.load_state_dict(model.state_dict())
    resumed = AdamW(other.named_parameters())
    optstate.load(resumed, path)
    train(model, optimizer, 3, 5)
    train(other, resumed, 3, 5)
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # eps added on another side of a rounding


def test_what_a_recipe_made_of_torchs_file_is_loaded_by_it(tmp_path: Path) -> None:
    """Neither names nor dtypes are in the file, and it is for a model that has both."""
    source = torch_file(tmp_path, lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2), dtype=torch.bfloat16)
    convert(source, tmp_path / "b.safetensors", "--recipe", "adalomo", "--set", "lr=0.5", "--allow-lossy")
    optimizer = AdaLomo(model_of(SHAPES, torch.bfloat16).named_parameters())
    optstate.load(optimizer, tmp_path / "b.safetensors")
    assert optimizer.param_groups[0]["lr"] == 0.5
    with pytest.raises(optstate.CheckpointError, match="another recipe"):
        optstate.load(AdamW(model_of(SHAPES).named_parameters()), tmp_path / "b.safetensors")
    with pytest.raises(optstate.CheckpointError, match="shape|was"):
        optstate.load(AdaLomo(model_of(SHAPES[::-1]).named_parameters()), tmp_path / "b.safetensors")


def test_a_parameter_that_torch_never_updated_begins_at_zero(tmp_path: Path) -> None:
    """torch makes state at the first gradient: a file without it says nothing was averaged yet."""
    model = model_of(SHAPES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, 0, 3, unused=("p2",))
    torch.save(optimizer.state_dict(), tmp_path / "opt.pt")
    other = model_of(SHAPES)
    other.load_state_dict(model.state_dict())
    resumed = AdamW(other.named_parameters())
    optstate.load(resumed, tmp_path / "opt.pt")
    assert [state["step"] for state in resumed.state.values()] == [3, 3, 0]
    train(model, optimizer, 3, 3)
    train(other, resumed, 3, 3)
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_momentumless_sgd_of_torch_is_loaded(tmp_path: Path) -> None:
    path = torch_file(tmp_path, lambda m: torch.optim.SGD(m.parameters(), lr=0.25))
    optimizer = SGD(model_of(SHAPES).named_parameters(), lr=1.0)
    optstate.load(optimizer, path)
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_a_file_that_lost_its_state_is_not_loaded_as_a_fresh_one() -> None:
    shapes = {"w": nn.Parameter(torch.randn(96, 64))}
    optimizer = AdaLomo(list(shapes.items()))
    with pytest.raises(optstate.CheckpointError) as caught:
        optstate.load(optimizer, DATA / "lomo_optim_adalomo" / "optimizer.pt", allow_lossy=True)
    assert caught.value.refused


# --- the rule of the file, kept -----------------------------------------------------------------------------------


def rule_of(path: Path) -> tuple[set[str], list[dict[str, Any]]]:
    document = document_of(read_header(path))
    return {param.chain for param in document.parameters}, [group.hyper for group in document.groups]


def assert_goes_on(source: Path, name: str, build: Callable[[Any], Any], tmp_path: Path) -> None:
    """Converted to the recipe of the same rule nothing is lost, and the recipe itself loads it."""
    tree = converted(source, tmp_path / "same.safetensors", "--recipe", name)
    assert tree["lossless"], tree
    (entry,) = document_of(read_header(tmp_path / "same.safetensors")).history
    assert entry["from"]["source"]["optimizer"]
    optimizer = build(model_of(SHAPES).named_parameters())
    optstate.load(optimizer, tmp_path / "same.safetensors")
    assert all(bool(state) for state in optimizer.state.values())


def test_adafactor_of_torch_stays_torchs(tmp_path: Path) -> None:
    """Its learning rate is the largest step, not a factor on a relative one; its eps is a floor."""
    source = torch_file(tmp_path, lambda m: torch.optim.Adafactor(m.parameters(), lr=0.02, d=2.0))
    assert_goes_on(
        source,
        "adafactor",
        lambda p: Adafactor(p, lr=1.0, eps=(None, 1e-3), torch_compatible=True),
        tmp_path,
    )
    (chain,), (hyper,) = rule_of(tmp_path / "same.safetensors")
    assert "cap_by_inverse_root" in chain
    assert hyper["lr"] == 0.02
    assert (hyper["clip_threshold"], hyper["decay_rate"]) == (2.0, -0.8)
    assert hyper["eps"] == (torch.finfo(torch.float32).eps, 1e-3)
    direct = Adafactor(model_of(SHAPES).named_parameters(), lr=1.0, eps=(None, 1e-3), torch_compatible=True)
    optstate.load(direct, source)
    assert direct.param_groups[0]["lr"] == 0.02


@pytest.mark.parametrize("options", [{"lr": 0.02, "relative_step": False, "scale_parameter": False}, {}])
def test_adafactor_of_transformers_stays_what_it_was(options: dict[str, Any], tmp_path: Path) -> None:
    library = pytest.importorskip("transformers.optimization")
    source = torch_file(tmp_path, lambda m: library.Adafactor(m.parameters(), **options))
    assert_goes_on(source, "adafactor", lambda p: Adafactor(p, **options), tmp_path)
    (chain,), (hyper,) = rule_of(tmp_path / "same.safetensors")
    assert ("relative_step_size" in chain) is not bool(options)
    assert hyper["lr"] == options.get("lr", 1.0)
    convert(tmp_path / "same.safetensors", tmp_path / "again.pt", "--format", "transformers")
    theirs, ours = (torch.load(tmp_path / name, weights_only=True) for name in ("opt.pt", "again.pt"))
    assert {**theirs["param_groups"][0], "param_names": 0} == {**ours["param_groups"][0], "param_names": 0}


def test_momentum_of_torch_stays_what_it_was(tmp_path: Path) -> None:
    source = torch_file(tmp_path, lambda m: torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.8, nesterov=True))
    assert_goes_on(source, "sgd", lambda p: SGD(p, momentum=0.5, nesterov=True), tmp_path)
    assert rule_of(tmp_path / "same.safetensors")[1][0]["momentum"] == 0.8
    convert(source, tmp_path / "eight.safetensors", "--recipe", "sgdm8bit", "--allow-lossy")
    (chain,), (hyper,) = rule_of(tmp_path / "eight.safetensors")
    assert "nesterov" in chain
    assert hyper["momentum"] == 0.8
    optstate.load(SGDM8bit(model_of(SHAPES).parameters(), nesterov=True), tmp_path / "eight.safetensors")


@pytest.mark.parametrize(
    "build",
    [
        lambda p: SGD(p, momentum=0.9, nesterov=True),
        lambda p: SGD(p, momentum=0.9, dampening=0.5),
        lambda p: Adafactor(p, lr=0.01),
        lambda p: Adafactor(p, warmup_init=True),
        lambda p: Adafactor(p, lr=0.01, beta1=0.9, momentum_before_lr=False),
        lambda p: Adafactor(p, lr=0.01, scale_parameter=False, clip_threshold=None),
        lambda p: Adafactor(p, lr=0.01, torch_compatible=True, weight_decay=0.1),
        lambda p: AdaLomo(p, clip_grad_value=1.0),
        lambda p: Lion(p, lr=0.01),
    ],
)
def test_our_own_rules_stay_what_they_were(build: Callable[[Any], Any], tmp_path: Path) -> None:
    source = native(tmp_path, lambda m: build(m.named_parameters()))
    recipe = document_of(read_header(source)).recipe
    assert converted(source, tmp_path / "b.safetensors", "--recipe", recipe)["lossless"]
    assert rule_of(tmp_path / "b.safetensors") == rule_of(source)
    optstate.load(build(model_of(SHAPES).named_parameters()), tmp_path / "b.safetensors")


def test_a_setting_that_rules_out_the_files_rule_wins(tmp_path: Path) -> None:
    source = native(tmp_path, lambda m: Adafactor(m.named_parameters()))  # relative steps
    tree = converted(source, tmp_path / "b.safetensors", "--recipe", "adafactor", "--set", "lr=0.5")
    assert rule_of(tmp_path / "b.safetensors")[1][0]["lr"] == 0.5
    assert any("lr=0.5" in note for note in tree["notes"])
