"""`optstate convert` as a command: every kind of file there and back, exit codes, what is said, what is left behind."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from optstate_cli import app
from torch import nn
from typer.testing import CliRunner, Result

import optstate
from adalomo import Adafactor, AdaLomo
from optstate.checkpoint.document.document import KEY
from optstate.checkpoint.document.native_file import document_of
from optstate.checkpoint.files.safetensors_header import read_header
from optstate.recipes import SGD, AdamW, AdamW8bit, Lion, SGDM8bit
from optstate.weights import Kahan
from tests.checkpoint.formats.test_writers import assert_equal
from tests.support.models import EveryShape, assert_same, state_of, weights_of
from tests.support.paths import DATA

pytestmark = pytest.mark.slow

BETAS, EPS = (0.9, 0.999), 1e-8


def invoke(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def convert(source: Path, target: Path, *options: Any) -> str:
    """The output of a conversion that must succeed."""
    result = invoke("convert", source, target, *options)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def converted(source: Path, target: Path, *options: Any) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(convert(source, target, "--json", *options))
    return tree


def refused(code: int, *arguments: Any) -> str:
    """The one line on stderr of a command that must fail; of a wrong use, the words in typer's frame."""
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    if code == 2:
        lines = (line.strip("│╭╰─╮╯ ") for line in result.stderr.splitlines())
        return " ".join(line for line in lines if line)
    assert result.stderr.startswith("optstate: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def model_of(shapes: Iterable[tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.ParameterDict:
    torch.manual_seed(seed)
    return nn.ParameterDict({f"p{i}": nn.Parameter(torch.randn(shape).to(dtype)) for i, shape in enumerate(shapes)})


SHAPES = ((96, 64), (128, 64), (128,))


def train(model: nn.Module, optimizer: Any, first: int, count: int, unused: tuple[str, ...] = ()) -> None:
    """Steps with gradients that are a function of the step."""
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        for name, param in model.named_parameters():
            grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            param.grad = None if name in unused or not param.requires_grad else grad
        optimizer.step()


def trained(build: Callable[[Any], Any], shapes: Any = SHAPES, steps: int = 3, **options: Any) -> tuple[Any, Any]:
    model = model_of(shapes, **options)
    optimizer = build(model)
    train(model, optimizer, 0, steps)
    return model, optimizer


def native(folder: Path, build: Callable[[Any], Any], name: str = "a.safetensors", **options: Any) -> Path:
    optstate.save(trained(build, **options)[1], folder / name)
    return folder / name


def torch_file(folder: Path, build: Callable[[Any], Any], **options: Any) -> Path:
    torch.save(trained(build, **options)[1].state_dict(), folder / "opt.pt")
    return folder / "opt.pt"


@pytest.fixture(scope="module")
def adamw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native(tmp_path_factory.mktemp("adamw"), lambda m: AdamW(m.named_parameters(), lr=1e-2))


# --- every kind of file, there and back ---------------------------------------------------------------------------

BACK = {
    "torch_adamw/optimizer.pt": "torch",
    "torch_adamw_named/optimizer.pt": "torch",
    "torch_adamw_bf16/optimizer.pt": "torch",
    "torch_sgd_momentum/optimizer.pt": "torch",
    "torch_adafactor/optimizer.pt": "torch",
    "hf_trainer_adamw": "torch",
    "hf_adafactor/optimizer.pt": "transformers",
    "bnb_adamw8bit/optimizer.pt": "bitsandbytes",
    "bnb_adamw8bit_legacy_flat/optimizer.pt": "bitsandbytes",
    "torchao_adamw8bit/optimizer.pt": "torchao",
    "po_adalomo/optimizer.pt": "pytorch_optimizer",
    "lerobot_adamw": "lerobot",
}
ONE_WAY = [
    "lomo_optim_adalomo/attributes.pt",
    "galore_adamw",
    "schedulefree_adamw",
    "dcp_adamw",
    "dcp_adamw_flat",
    "dcp_optstate",
    "dcp_two_ranks",
    "deepspeed_zero1",
    "deepspeed_zero2",
    "deepspeed_zero3",
    "deepspeed_universal1",
    "deepspeed_universal3",
]


@pytest.mark.parametrize("sample", [*BACK, *ONE_WAY])
def test_every_kind_becomes_ours_without_loss(sample: str, tmp_path: Path) -> None:
    """And goes back to what it was, bit by bit, with its groups, ids and types."""
    source, ours = DATA / sample, tmp_path / "ours.safetensors"
    for command in ("inspect", "check"):
        assert invoke(command, source).exit_code == 0
    tree = converted(source, ours)
    assert (tree["lossless"], tree["bytes_after"]) == (True, tree["bytes_before"])
    assert json.loads(invoke("check", ours, "--json").stdout)["issues"] == []
    difference = invoke("diff", source, ours, "--json")
    assert (difference.exit_code, json.loads(difference.stdout)["verdict"]) == (0, "equal")
    if sample not in BACK:
        return
    again = tmp_path / ("again" if BACK[sample] == "lerobot" else "again.pt")
    asked = ["--format", "lerobot"] if BACK[sample] == "lerobot" else []
    assert converted(ours, again, *asked)["format"] == BACK[sample]
    assert json.loads(invoke("diff", source, again, "--json").stdout)["verdict"] == "equal"
    if BACK[sample] == "lerobot":
        assert_same_lerobot(again, source)
        return
    if BACK[sample] == "torchao":
        pytest.importorskip("torchao")
    trusted = BACK[sample] != "torchao"
    original = source if source.is_file() else source / "optimizer.pt"
    assert_equal(torch.load(again, weights_only=trusted), torch.load(original, weights_only=trusted))


def assert_same_lerobot(folder: Path, original: Path) -> None:
    original = next(original.rglob("optimizer_state.safetensors")).parent
    assert sorted(os.listdir(folder)) == ["optimizer_param_groups.json", "optimizer_state.safetensors"]
    ours, theirs = (safetensors.torch.load_file(f / "optimizer_state.safetensors") for f in (folder, original))
    assert_equal(dict(sorted(ours.items())), dict(sorted(theirs.items())))
    groups = [json.loads((f / "optimizer_param_groups.json").read_text()) for f in (folder, original)]
    assert groups[0] == groups[1]


def test_notes_of_the_source_are_shown(tmp_path: Path) -> None:
    notes = converted(DATA / "deepspeed_zero1", tmp_path / "a.safetensors")["notes"]
    assert any("fp32 copy of the weight" in note for note in notes)
    assert "note\tthe slot 'master'" in convert(DATA / "deepspeed_zero1", tmp_path / "b.safetensors")


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


# --- exit codes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--to", "block9"], "'block9' is none of"),
        (["--to", "drop"], "'drop' is none of"),
        (["--to", "Block8(block=7)"], "a block is an even number"),
        (["--slot", "exp_avg"], "give NAME=VALUE"),
        (["--slot", "exp_avg="], "give NAME=VALUE"),
        (["--slot", "exp_avg=tiny"], "'tiny' is none of"),
        (["--recipe", "adalom"], "did you mean 'adalomo'?"),
        (["--recipe", "adalomo", "--to", "bf16"], "--recipe decides the stores"),
        (["--set", "lr=1"], "give --recipe"),
        (["--recipe", "adalomo", "--set", "lr"], "give NAME=VALUE"),
        (["--recipe", "adalomo", "--set", "rl=1"], "no hyper-parameter 'rl'"),
        (["--recipe", "adalomo", "--set", "lr=fast"], "give a number"),
        (["--format", "pytorch"], "did you mean 'torch'?"),
        (["--format", "numpy"], "one of optstate, bitsandbytes"),
        (["--max-shard-size", "5XB"], "such as 5GB"),
        (["--format", "torch", "--max-shard-size", "5KB"], "files of optstate's own"),
        (["--nonsense"], "No such option"),
    ],
)
def test_wrong_use(adamw: Path, options: list[str], words: str, tmp_path: Path) -> None:
    assert words in refused(2, "convert", adamw, tmp_path / "b.safetensors", *options)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--to", "bf16"], "numbers would change in exp_avg Full() -> Full(dtype='bfloat16')"),
        (["--slot", "exp_avg=factored", "--allow-lossy"], "exp_avg of 'p0' cannot go into Factored()"),
        (["--slot", "exp_sum=bf16", "--allow-lossy"], "keeps no 'exp_sum': it has exp_avg, exp_avg_sq"),
        (["--recipe", "adalomo", "--set", "lr=-1", "--allow-lossy"], "lr=-1"),
        (["--recipe", "sm3", "--allow-lossy"], "accumulator (sum of squared gradients) cannot be made"),
        (["--format", "lion-pytorch"], "lion-pytorch does not have it; convert with --recipe lion"),
    ],
)
def test_refused(adamw: Path, options: list[str], words: str, tmp_path: Path) -> None:
    assert words in refused(4, "convert", adamw, tmp_path / "b.safetensors", *options)
    assert os.listdir(tmp_path) == []


def test_a_momentum_gives_no_second_moment(tmp_path: Path) -> None:
    source = DATA / "torch_sgd_momentum" / "optimizer.pt"
    message = refused(4, "convert", source, tmp_path / "b.safetensors", "--recipe", "adamw", "--allow-lossy")
    assert "exp_avg_sq (average of squared gradients) cannot be made" in message


def test_projected_squares_have_no_way_back(tmp_path: Path) -> None:
    options = ["--slot", "exp_avg_sq=fp32", "--allow-lossy"]
    message = refused(4, "convert", DATA / "galore_adamw", tmp_path / "b.safetensors", *options)
    assert "squares of projected gradients say nothing of the squares of gradients" in message


def test_state_that_lomo_optim_left_out(tmp_path: Path) -> None:
    message = refused(4, "convert", DATA / "lomo_optim_adalomo" / "optimizer.pt", tmp_path / "b.safetensors")
    assert "lomo-optim keeps them in attributes of the optimizer" in message


def test_shapes_that_nobody_tells(tmp_path: Path) -> None:
    source = torch_file(tmp_path, lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    message = refused(4, "convert", source, tmp_path / "b.safetensors", "--recipe", "sgd")
    assert "the shape of '#0' is not in the file: give --names with shapes, or a model" in message


def test_adam_without_a_count_of_steps(tmp_path: Path) -> None:
    """Counted from one, its second moment would be taken for a thousand times what it is."""
    _, optimizer = trained(lambda m: torch.optim.AdamW(m.parameters()))
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        del state["step"]
    torch.save(saved, tmp_path / "opt.pt")
    convert(tmp_path / "opt.pt", tmp_path / "a.safetensors")
    options = ["--recipe", "adamw8bit", "--allow-lossy"]
    message = refused(4, "convert", tmp_path / "opt.pt", tmp_path / "b.safetensors", *options)
    assert "does not say how many steps it was updated" in message
    with pytest.raises(optstate.CheckpointError, match="how many steps"):
        optstate.load(AdamW(model_of(SHAPES).parameters()), tmp_path / "opt.pt", allow_lossy=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\nb\n", "it gives 2 names, the checkpoint has 6 parameters"),
        ("a\na\nb\nc\nd\ne\n", "the name 'a' comes twice"),
        (json.dumps({name: [3, 3] for name in "abcdef"}), "of shape [3, 3] for parameter '#0'"),
    ],
)
def test_names_that_do_not_fit(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "names").write_text(text)
    source = DATA / "torch_adamw" / "optimizer.pt"
    result = invoke("convert", source, tmp_path / "b.safetensors", "--names", tmp_path / "names")
    assert (result.exit_code in (3, 4), result.stderr.count("\n")) == (True, 1)
    assert words in result.stderr


def test_targets(adamw: Path, tmp_path: Path) -> None:
    target = tmp_path / "b.safetensors"
    target.write_text("old")
    assert "exists already; choose another name, or --force" in refused(4, "convert", adamw, target)
    assert target.read_text() == "old"
    convert(adamw, target, "--force")
    assert target.read_bytes() == adamw.read_bytes()
    missing = tmp_path / "none" / "b.safetensors"
    assert "its folder does not exist; make it first" in refused(3, "convert", adamw, missing)
    assert "is a folder and cannot be replaced" in refused(4, "convert", adamw, tmp_path, "--force")
    assert "no such file" in refused(3, "convert", tmp_path / "nothing", target, "--force")


@pytest.mark.parametrize("kind", ["itself", "symbolic link", "hard link"])
def test_the_source_is_no_target(kind: str, tmp_path: Path) -> None:
    source = native(tmp_path, lambda m: AdamW(m.named_parameters()))
    before, target = source.read_bytes(), tmp_path / "b.safetensors"
    if kind == "itself":
        target = source
    elif kind == "symbolic link":
        target.symlink_to(source)
    else:
        target.hardlink_to(source)
    assert "is the source itself" in refused(4, "convert", source, target, "--to", "bf16", "--allow-lossy", "--force")
    assert source.read_bytes() == before


def test_a_set_is_no_target_of_its_own(adamw: Path, tmp_path: Path) -> None:
    """It has no file of the name that it was saved under."""
    convert(adamw, tmp_path / "set.safetensors", "--max-shard-size", "100KB")
    target = tmp_path / "set.safetensors"
    assert not target.exists()
    assert "is the source itself" in refused(4, "convert", target, target, "--force")
    assert "exists already" in refused(4, "convert", adamw, target)
    assert invoke("check", target).exit_code == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(adamw: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        assert "cannot be written" in refused(3, "convert", adamw, tmp_path / "b.safetensors")
    finally:
        tmp_path.chmod(0o700)


def test_no_traceback_unless_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["convert", DATA / "hostile_torch" / "evil_print.pt", tmp_path / "b.safetensors"]
    assert "print" in refused(4, *arguments)
    monkeypatch.setenv("OPTSTATE_DEBUG", "1")
    result = invoke(*arguments)
    assert isinstance(result.exception, optstate.CheckpointError)


@pytest.mark.parametrize("path", sorted((DATA / "hostile_torch").iterdir()), ids=lambda path: path.name)
def test_malformed_files_give_one_line(path: Path, tmp_path: Path) -> None:
    result = invoke("convert", path, tmp_path / "b.safetensors")
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.exit_code in (0, 3, 4)
    assert result.stderr.count("\n") == (1 if result.exit_code else 0)


def tampered(source: Path, target: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The file with another document beside its tensors."""
    document = json.loads(read_header(source).metadata[KEY])
    change(document)
    safetensors.torch.save_file(safetensors.torch.load_file(source), target, {KEY: json.dumps(document)})
    return target


@pytest.mark.parametrize(
    ("code", "words", "change"),
    [
        (3, "p0/exp_avg: it has shape [96, 64]", lambda p: p.update(shape=[1 << 40, 1 << 20])),
        (3, "p0/exp_avg: it has shape [96, 64]", lambda p: p.update(shape=[64, 96])),
        (3, "Block8() without absmax", lambda p: p["slots"]["exp_avg"].update(store="Block8()")),
        (3, "is used, but its values are not in the file", lambda p: p["slots"]["exp_avg"].update(codebook="mine:0")),
        (4, "its tensors do not fit", lambda p: p["slots"]["exp_avg"].update(store="Projected(rank=8)", of="gradient")),
        (4, "no way back to its numbers", lambda p: p["slots"]["exp_avg"].update(store="Zipped()")),
    ],
)
def test_a_document_that_is_not_of_its_tensors(
    adamw: Path, code: int, words: str, change: Callable[[dict[str, Any]], Any], tmp_path: Path
) -> None:
    source = tampered(adamw, tmp_path / "a.safetensors", lambda document: change(document["parameters"][0]))
    message = refused(code, "convert", source, tmp_path / "b.safetensors", "--to", "block4", "--allow-lossy")
    assert words in message
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_parameter_of_whole_numbers(adamw: Path, tmp_path: Path) -> None:
    source = tampered(adamw, tmp_path / "a.safetensors", lambda d: d["parameters"][0].update(dtype="int8"))
    options = ["--recipe", "adalomo", "--allow-lossy"]
    assert "'p0' has dtype 'int8'" in refused(4, "convert", source, tmp_path / "b.safetensors", *options)


# --- what is said -------------------------------------------------------------------------------------------------

PLANS = [
    ["--to", "block8"],
    ["--slot", "exp_avg_sq=factored", "--slot", "exp_avg=bf16"],
    ["--slot", "exp_avg=drop"],
    ["--recipe", "adalomo"],
    ["--recipe", "adamw4bit"],
    ["--format", "torch"],
    ["--to", "block8", "--format", "torchao"],
]


@pytest.mark.parametrize("options", PLANS, ids=" ".join)
def test_a_dry_run_predicts_every_byte_and_writes_nothing(adamw: Path, options: list[str], tmp_path: Path) -> None:
    target = tmp_path / "b.safetensors"
    planned = converted(adamw, target, "--dry-run", *options)
    assert (os.listdir(tmp_path), planned["written"]) == ([], False)
    made = converted(adamw, target, "--allow-lossy", *options)
    for key in ("bytes_before", "bytes_after", "lossless", "format", "notes"):
        assert planned[key] == made[key]
    for before, after in zip(planned["slots"], made["slots"], strict=True):
        same = ("slot", "from", "to", "parameters", "bytes_before", "bytes_after", "lossless")
        assert [before[key] for key in same] == [after[key] for key in same]
    assert sum(row["bytes_after"] for row in made["slots"]) == made["bytes_after"]
    if made["format"] == "optstate":
        tensors = safetensors.torch.load_file(target).values()
        assert sum(tensor.nbytes for tensor in tensors) == made["bytes_after"]


def test_a_dry_run_refuses_what_writing_refuses(adamw: Path, tmp_path: Path) -> None:
    for options in (["--format", "lion-pytorch"], ["--to", "factored"]):
        assert refused(4, "convert", adamw, tmp_path / "b.pt", *options, "--dry-run")


def test_json_is_the_report_and_the_file_keeps_it(adamw: Path, tmp_path: Path) -> None:
    tree = converted(adamw, tmp_path / "b.safetensors", "--slot", "exp_avg_sq=factored", "--allow-lossy")
    assert tree.keys() >= {"schema", "lossless", "bytes_before", "bytes_after", "slots", "notes", "target", "format"}
    (row,) = (row for row in tree["slots"] if row["to"] == "Factored()")
    assert row.keys() >= {"slot", "from", "to", "relative_error", "update_relative_error", "update_cosine"}
    assert (row["slot"], row["from"], row["parameters"]) == ("exp_avg_sq", "Full()", 2)
    old, new = (safetensors.torch.load_file(path) for path in (adamw, tmp_path / "b.safetensors"))
    error = [(v, torch.outer(v.mean(1), v.mean(0)) / v.mean()) for v in (old[f"p{i}/exp_avg_sq"] for i in (0, 1))]
    ratio = sum(float((a - b).square().sum()) for a, b in error) / sum(float(a.square().sum()) for a, _ in error)
    assert row["relative_error"] == pytest.approx(ratio**0.5, rel=1e-4)
    assert new.keys() >= {"p0/exp_avg_sq.row", "p0/exp_avg_sq.col", "p2/exp_avg_sq"}
    (entry,) = document_of(read_header(tmp_path / "b.safetensors")).history
    assert entry["from"]["recipe"] == "adamw"
    assert [line["now"] for line in entry["slots"]] == [line["to"] for line in tree["slots"]]
    assert entry["update_relative_error"] == pytest.approx(tree["update_relative_error"], rel=1e-3)


def test_text_in_a_pipe_has_stable_columns(adamw: Path, tmp_path: Path) -> None:
    text = convert(adamw, tmp_path / "b.safetensors", "--to", "bf16", "--allow-lossy")
    table, _, facts = text.partition("\n\n")
    header, *rows = (line.split("\t") for line in table.splitlines())
    assert header == [
        *["SLOT", "FROM", "TO", "PARAMETERS", "BYTES", "NEW BYTES"],
        *["ERROR", "UPDATE ERROR", "COSINE", "INFLATION", "ZEROS"],
    ]
    assert [row[:6] for row in rows] == [
        ["exp_avg", "Full()", "Full(dtype='bfloat16')", "3", "57856", "28928"],
        ["exp_avg_sq", "Full()", "Full(dtype='bfloat16')", "3", "57856", "28928"],
    ]
    assert [line.split("\t")[0] for line in facts.splitlines()] == ["format", "state", "numbers", "update", "written"]


def test_a_terminal_of_80_columns_is_wide_enough(adamw: Path, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    options = ["--slot", "exp_avg_sq=factored", "--slot", "exp_avg=bf16", "--allow-lossy"]
    code = "import sys; from optstate_cli import app; app(sys.argv[1:])"
    command = [sys.executable, "-c", code, "convert", str(adamw), "b.safetensors", *options]
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "TERM": "dumb"}
    done = subprocess.Popen(command, stdout=follower, stderr=follower, cwd=tmp_path, env=environment)
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(leader, 4096)
        except OSError:  # of a closed terminal
            break
        if not part:
            break
        shown += part
    assert done.wait() == 0
    lines = shown.decode().splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.split()[:4] == ["exp_avg_sq", "2", "Full", "Factored"] for line in lines), lines


def test_a_set_of_files(adamw: Path, tmp_path: Path) -> None:
    target = tmp_path / "set.safetensors"
    tree = converted(adamw, target, "--max-shard-size", "60KB")
    assert tree["lossless"]
    names = sorted(os.listdir(tmp_path))
    assert names[-1] == "set.safetensors.index.json"
    assert len(names) > 2
    assert all((tmp_path / name).stat().st_size < 70_000 for name in names)
    for command in ("inspect", "check"):
        assert invoke(command, target).exit_code == 0
    optimizer = AdamW(model_of(SHAPES).named_parameters())
    optstate.load(optimizer, target)
    assert {state["step"] for state in optimizer.state.values()} == {3}


# --- nothing is lost silently -------------------------------------------------------------------------------------


def notes_of(source: Path, target: Path, *options: Any) -> str:
    return "\n".join(converted(source, target, "--dry-run", *options)["notes"])


def test_what_a_library_has_no_place_for_is_said(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)).bfloat16()
    model[1].weight = model[0].weight
    optimizer = AdamW([{"params": list(model.named_parameters()), "role": "embedding"}])
    optstate.fuse_backward(optimizer, clip_grad_norm=1.0)
    optstate.save(optimizer, tmp_path / "a.safetensors", model=model)
    notes = notes_of(tmp_path / "a.safetensors", tmp_path / "b.pt")
    assert "other names of tied parameters are not in the file: 1.weight = 0.weight" in notes
    assert "the declared roles" in notes
    assert "clip of the fused backward pass, 1.0" in notes
    assert "how weights are written, StochasticRounding" in notes
    assert "names of parameters are not in the file" in notes_of(
        tmp_path / "a.safetensors", tmp_path / "folder", "--format", "lerobot"
    )
    assert "clip_grad_norm=1.0" in notes_of(tmp_path / "a.safetensors", tmp_path / "b", "--recipe", "adamw8bit")
    assert notes_of(tmp_path / "a.safetensors", tmp_path / "b.safetensors") == ""


def test_what_a_recipe_has_no_place_for_is_said(tmp_path: Path) -> None:
    notes = notes_of(DATA / "hf_adafactor", tmp_path / "b.safetensors", "--recipe", "adalomo")
    assert "left out: RMS" in notes
    assert "relative_step=False" in notes
    notes = notes_of(DATA / "torch_adamw" / "optimizer.pt", tmp_path / "b.safetensors", "--recipe", "adamw8bit")
    assert "hyper-parameters of the file that are left out: amsgrad=False, capturable=False" in notes
    assert " lr=" not in notes


def test_tensors_of_no_statistic_are_said(tmp_path: Path) -> None:
    source = native(tmp_path, lambda m: AdamW(m.named_parameters()))
    tensors, metadata = safetensors.torch.load_file(source), read_header(source).metadata
    safetensors.torch.save_file({**tensors, "mine": torch.zeros(3)}, source, metadata)
    assert "left out, tensors of no statistic: mine" in notes_of(source, tmp_path / "b.safetensors")


# --- numbers and shapes of every kind -----------------------------------------------------------------------------

EVERY = [
    ["--to", "bf16"],
    ["--to", "block8"],
    ["--to", "block4"],
    ["--slot", "exp_avg_sq=factored"],
    ["--slot", "exp_avg_sq=Grouped(by='row')"],
    ["--recipe", "adalomo"],
    ["--recipe", "adamw8bit"],
    ["--recipe", "adammini"],
    ["--format", "torch"],
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", EVERY, ids=" ".join)
def test_every_shape_and_dtype(options: list[str], dtype: torch.dtype, tmp_path: Path) -> None:
    """Without dimensions, empty, frozen, unused; of several groups."""
    model = EveryShape(dtype)
    named = dict(model.named_parameters())
    groups = [[name for name in named if len(name) < 6], [name for name in named if len(name) >= 6]]
    optimizer = AdamW([{"params": [(name, named[name]) for name in group]} for group in groups])
    for seed in range(3):
        model(seed).backward()
        optimizer.step()
        optimizer.zero_grad()
    optstate.save(optimizer, tmp_path / "a.safetensors")
    target = tmp_path / ("b.pt" if "torch" in options else "b.safetensors")
    tree = converted(tmp_path / "a.safetensors", target, *options, "--allow-lossy")
    issues = json.loads(invoke("check", target, "--json").stdout)["issues"]
    assert [issue["where"] for issue in issues] == ["step"]  # the unused one has made none
    for row in tree["slots"]:
        for key in ("relative_error", "update_relative_error"):
            assert row[key] is None or 0 <= row[key] < 2


def test_fp64_is_measured_in_fp64(tmp_path: Path) -> None:
    source = native(tmp_path, lambda m: AdamW(m.named_parameters()), dtype=torch.float64)
    tree = converted(source, tmp_path / "b.safetensors", "--to", "Full(dtype='float32')", "--allow-lossy")
    assert 1e-9 < tree["slots"][0]["relative_error"] < 6e-8  # of fp32's rounding, not zero
    assert converted(source, tmp_path / "c.safetensors", "--to", "full")["lossless"]


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1.0])
def test_numbers_that_are_none_are_copied_and_not_converted(value: float, tmp_path: Path) -> None:
    """Infinity in a block makes all of it NaN, and has no relative error."""
    _, optimizer = trained(lambda m: torch.optim.AdamW(m.parameters()))
    next(iter(optimizer.state.values()))["exp_avg_sq"][0, 0] = value
    torch.save(optimizer.state_dict(), tmp_path / "opt.pt")
    convert(tmp_path / "opt.pt", tmp_path / "a.safetensors")
    target = tmp_path / "b.safetensors"
    for options in (["--to", "block8"], ["--slot", "exp_avg_sq=factored"], ["--recipe", "adalomo"]):
        message = refused(4, "convert", tmp_path / "opt.pt", target, "--allow-lossy", *options)
        assert "exp_avg_sq of '#0' holds" in message
    assert not target.exists()
    resumed = AdamW8bit(model_of(SHAPES).parameters())
    with pytest.raises(optstate.CheckpointError, match="the state is incomplete"):
        optstate.load(resumed, tmp_path / "opt.pt", allow_lossy=True)


def test_huge_numbers_still_have_an_error(tmp_path: Path) -> None:
    """Their squares overflow in fp32."""
    _, optimizer = trained(lambda m: torch.optim.AdamW(m.parameters()))
    next(iter(optimizer.state.values()))["exp_avg"][0, 0] = 1e30
    torch.save(optimizer.state_dict(), tmp_path / "opt.pt")
    tree = converted(tmp_path / "opt.pt", tmp_path / "b.safetensors", "--to", "bf16", "--allow-lossy")
    assert all(0 < row["relative_error"] < 0.01 for row in tree["slots"])


def test_a_group_without_parameters(tmp_path: Path) -> None:
    """It stays in its place, also where the recipe becomes another."""
    model = model_of(SHAPES)
    first, *others = model.parameters()
    groups: list[dict[str, Any]] = [{"params": [first]}, {"params": []}, {"params": others, "lr": 0.5}]
    optimizer = torch.optim.AdamW(groups)
    train(model, optimizer, 0, 2)
    torch.save(optimizer.state_dict(), tmp_path / "opt.pt")
    convert(tmp_path / "opt.pt", tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "again.pt")
    assert_equal(*(torch.load(tmp_path / name, weights_only=True) for name in ("again.pt", "opt.pt")))
    convert(tmp_path / "opt.pt", tmp_path / "b.safetensors", "--recipe", "adamw8bit", "--allow-lossy")
    assert [group.hyper["lr"] for group in document_of(read_header(tmp_path / "b.safetensors")).groups] == [
        1e-3,
        1e-3,
        0.5,
    ]


def test_state_of_no_steps(tmp_path: Path) -> None:
    source = native(tmp_path, lambda m: AdamW(m.named_parameters(), lr=0.5), steps=0)
    convert(source, tmp_path / "b.safetensors", "--recipe", "adamw8bit", "--allow-lossy")
    optimizer = AdamW8bit(model_of(SHAPES).named_parameters())
    optstate.load(optimizer, tmp_path / "b.safetensors")
    assert optimizer.state_dict()["state"][0]["exp_avg_sq.absmax"].max() < 1e-36  # codes of squares are never zero
    assert ({state["step"] for state in optimizer.state.values()}, optimizer.param_groups[0]["lr"]) == ({0}, 0.5)


def test_what_is_kept_for_weights_is_copied_or_refused(tmp_path: Path) -> None:
    source = native(tmp_path, lambda m: AdamW(m.named_parameters(), weights=Kahan()), dtype=torch.bfloat16)
    convert(source, tmp_path / "b.safetensors", "--to", "block8", "--allow-lossy")
    old, new = (safetensors.torch.load_file(path) for path in (source, tmp_path / "b.safetensors"))
    kept = [key for key in old if "/weight" in key]
    assert kept
    assert all(torch.equal(old[key], new[key]) for key in kept)
    assert "no way back" in refused(4, "convert", source, tmp_path / "c.safetensors", "--slot", "weight=bf16")
    assert "weight of 'p0' (Kahan()) has no place" in refused(
        4, "convert", source, tmp_path / "c.pt", "--format", "torch"
    )
    optstate.load(
        AdamW8bit(model_of(SHAPES, torch.bfloat16).named_parameters(), weights=Kahan()), source, allow_lossy=True
    )


# --- nothing is left behind ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--format", "torch"], ["--max-shard-size", "60KB"]], ids=" ".join)
def test_an_error_half_way_leaves_the_old_file(
    adamw: Path, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, written = tmp_path / "b.safetensors", os.pwrite
    target.write_text("old")
    count = 0

    def full(descriptor: int, data: Any, position: int) -> int:
        nonlocal count
        count += 1
        if count > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", full)
    assert "cannot be written: No space left on device" in refused(3, "convert", adamw, target, "--force", *options)
    assert (os.listdir(tmp_path), target.read_text()) == (["b.safetensors"], "old")


def test_an_error_half_way_leaves_no_folder(adamw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: Any, position: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    assert "No space left" in refused(3, "convert", adamw, tmp_path / "folder", "--format", "lerobot")
    assert os.listdir(tmp_path) == []


def test_a_file_larger_than_the_system_allows(adamw: Path, tmp_path: Path) -> None:
    """In a process of its own, as a user runs it."""
    resource = pytest.importorskip("resource")
    (tmp_path / "b.safetensors").write_text("old")
    code = "import sys; from optstate_cli import app; app(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, "convert", str(adamw), "b.safetensors", "--force"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("optstate: ")
    assert done.stderr.count("\n") == 1
    assert (os.listdir(tmp_path), (tmp_path / "b.safetensors").read_text()) == (["b.safetensors"], "old")


def test_a_conversion_to_a_recipe_does_not_import_the_compiler(adamw: Path, tmp_path: Path) -> None:
    """The optimizer that says what the recipe keeps is one of parameters without values, and never runs."""
    code = (
        "import sys; from optstate import checkpoint\n"
        "checkpoint.convert(*sys.argv[1:], recipe='adamw8bit', allow_lossy=True)\n"
        "print([m for m in ('torch._dynamo', 'sympy') if m in sys.modules])\n"
        "import torch; from optstate.recipes import AdamW; AdamW([('w', torch.nn.Parameter(torch.ones(2)))])\n"
        "print('torch._dynamo' in sys.modules)"
    )
    arguments = [sys.executable, "-c", code, str(adamw), str(tmp_path / "b.safetensors")]
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    assert done.stdout == "[]\nTrue\n"
