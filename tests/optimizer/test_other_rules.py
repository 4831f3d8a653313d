"""State of other libraries' optimizers under every flag: it goes on as theirs would, or is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import lion_pytorch
import lion_pytorch.cautious_lion
import numpy as np
import pytest
import pytorch_optimizer as po
import torch
import torchao.optim
from optstate_cli.main import app
from torch import Tensor, nn
from transformers.optimization import Adafactor as TransformersAdafactor
from typer.testing import CliRunner

import optstate
from adalomo import Adafactor
from optstate import updates
from optstate.checkpoint import CheckpointError
from optstate.checkpoint.open_checkpoint import open_checkpoint
from optstate.other_libraries import ALL
from optstate.recipes import CAME, SGD, AdamMini, AdamW, Lion

pytestmark = pytest.mark.peer

SHAPES = ((6, 5), (5,))
STEPS = 4

REFUSALS = (ValueError, CheckpointError)

Build = Callable[[list[nn.Parameter]], Any]


def parameters(like: Sequence[Tensor] | None = None) -> list[nn.Parameter]:
    if like is not None:
        return [nn.Parameter(tensor.detach().clone()) for tensor in like]
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def train(optimizer: Any, params: Sequence[nn.Parameter], first: int = 0) -> list[Tensor]:
    """A few steps of gradients that depend on the weights and shrink, so that averages and maxima come apart."""
    for step in range(first, first + STEPS):
        for param in params:
            param.grad = torch.sin(3 * param.detach() + step) * 0.5**step
        optimizer.step()
    return [param.detach().clone() for param in params]


def apart(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest difference of two runs."""
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


CLOSE = 2e-6
"""Of weights around 1 that moved by 0.1: fp32 rounds each of eight steps by 6e-8, in another order of operations."""


class Run:
    """Another library's run, saved in the middle."""

    def __init__(self, build: Build, folder: Path) -> None:
        params = parameters()
        optimizer = build(params)
        train(optimizer, params)
        self.path = folder / "optimizer.pt"
        self.state = deepcopy(optimizer.state_dict())
        torch.save(self.state, self.path)
        self.weights = parameters(params)
        self.end = train(optimizer, params, STEPS)

    def load(self, build: Build, how: str) -> tuple[Any, list[nn.Parameter]]:
        params = parameters(self.weights)
        optimizer = build(params)
        if how == "live":
            optimizer.load_state_dict(torch.load(self.path, weights_only=True))
        else:
            optstate.load(optimizer, self.path, allow_lossy=how == "consent")
        return optimizer, params

    def goes_on(self, build: Build, how: str = "file") -> float:
        """How far ours ends from where theirs does."""
        return apart(train(*self.load(build, how), STEPS), self.end)

    def refuses(self, build: Build, how: str = "file") -> str:
        """The message of the refusal, after which the optimizer is as it was built."""
        params = parameters(self.weights)
        optimizer = build(params)
        with pytest.raises(REFUSALS) as caught:
            if how == "live":
                optimizer.load_state_dict(torch.load(self.path, weights_only=True))
            else:
                optstate.load(optimizer, self.path)
        fresh = build(parameters(self.weights))
        assert optimizer.state_dict()["param_groups"] == fresh.state_dict()["param_groups"]
        assert all(state["step"] == 0 for state in optimizer.state.values())
        kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        assert not any(value.any() for value in kept)
        text = str(caught.value)
        assert "\n" not in text
        return text


@pytest.fixture(autouse=True)
def quietly() -> Iterator[None]:
    """Warnings are told by tests of their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def l2_adam(params: list[nn.Parameter]) -> Any:
    chain = optstate.chain(updates.add_decayed_weights(0.3), updates.scale_by_adam())
    return optstate.Optimizer(params, chain, lr=0.5)


# --- Adam's family ------------------------------------------------------------------------------------------------

FLAGS = list(product((torch.optim.Adam, torch.optim.AdamW), (False, True), (False, True), (0.0, 0.1), (False, True)))


@pytest.mark.parametrize(("kind", "amsgrad", "maximize", "decay", "single"), FLAGS)
def test_adam_under_all_flags(
    kind: Any, amsgrad: bool, maximize: bool, decay: float, single: bool, tmp_path: Path
) -> None:
    """Ours goes on where the rule is the same, and where it is refused it would not have."""

    def build(params: list[nn.Parameter]) -> Any:
        flags = {"amsgrad": amsgrad, "maximize": maximize, "weight_decay": decay}
        return kind(params, lr=0.02, betas=(0.8, 0.9), foreach=not single, capturable=False, **flags)

    run = Run(build, tmp_path)
    for ours, decoupled in ((AdamW, True), (l2_adam, False)):
        same_decay = decay == 0 or decoupled == (kind is torch.optim.AdamW)
        for how in ("live", "file"):
            if same_decay and not amsgrad and not maximize:
                assert run.goes_on(ours, how) < CLOSE
                continue
            text = run.refuses(ours, how)
            assert ("amsgrad=True" in text) == amsgrad
            assert ("maximize=True" in text) == maximize
        if not same_decay or amsgrad or maximize:
            assert run.goes_on(ours, "consent") > 100 * CLOSE


def test_groups_may_follow_different_rules(tmp_path: Path) -> None:
    """Weights decay in one group only: that group alone tells, and betas are those of each group."""

    def build(kind: Any, decay: float) -> Build:
        return lambda params: kind(
            [
                {"params": params[:1], "weight_decay": decay, "betas": (0.7, 0.9)},
                {"params": params[1:], "weight_decay": 0.0, "lr": torch.tensor(0.03)},
            ],
            lr=0.01,
        )

    def ours(params: list[nn.Parameter]) -> Any:
        return AdamW([{"params": params[:1]}, {"params": params[1:]}])

    coupled = Run(build(torch.optim.Adam, 0.1), tmp_path)
    assert "param group 0 has decoupled_weight_decay=False: weight decay is added to the gradient" in (
        coupled.refuses(ours)
    )
    assert "param group 0" in coupled.refuses(ours, "live")
    run = Run(build(torch.optim.Adam, 0.0), tmp_path)
    assert max(run.goes_on(ours), run.goes_on(ours, "live")) < CLOSE
    optimizer, _ = run.load(ours, "file")
    assert [group["betas"] for group in optimizer.param_groups] == [(0.7, 0.9), (0.9, 0.999)]
    # fp32 has 0.03 only to 7 digits
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([0.01, 0.03], rel=1e-7)


OTHERS: dict[str, tuple[Build, str]] = {
    "RMSprop": (lambda p: torch.optim.RMSprop(p), "eps is added to the root"),
    "Adagrad": (lambda p: torch.optim.Adagrad(p), "cannot be made from what the file keeps: sum"),
    "Adadelta": (lambda p: torch.optim.Adadelta(p), "an average of past steps"),
    "Adamax": (lambda p: torch.optim.Adamax(p), "exp_inf"),
    "NAdam": (lambda p: torch.optim.NAdam(p), "momentum_decay"),
    "RAdam": (lambda p: torch.optim.RAdam(p), "rectified"),
    "RAdam, decoupled": (lambda p: torch.optim.RAdam(p, decoupled_weight_decay=True), "rectified"),
    "ASGD": (lambda p: torch.optim.ASGD(p), "cannot be made from what the file keeps: ax"),
    "Rprop": (lambda p: torch.optim.Rprop(p), "cannot be made from what the file keeps: prev"),
    "LAMB": (lambda p: po.Lamb(p), ""),
    "AdaBelief": (lambda p: po.AdaBelief(p), ""),
    "AdamP": (lambda p: po.AdamP(p), ""),
    "StableAdamW": (lambda p: po.StableAdamW(p), ""),
}


@pytest.mark.parametrize("name", OTHERS)
def test_rules_that_are_none_of_ours(name: str, tmp_path: Path) -> None:
    build, why = OTHERS[name]
    run = Run(build, tmp_path)
    assert why in run.refuses(AdamW)
    run.refuses(AdamW, "live")
    assert open_checkpoint(run.path).document.recipe == ""


def test_statistics_whose_meaning_nobody_knows_are_not_taken_by_their_names(tmp_path: Path) -> None:
    """With consent neither: `exp_avg` of an unknown optimizer may average anything."""
    run = Run(lambda p: po.StableAdamW(p), tmp_path)
    with pytest.raises(CheckpointError, match="cannot be made from what the file keeps|nothing that the file keeps"):
        run.load(AdamW, "consent")


def test_a_file_that_does_not_say_how_weights_decay_is_taken_for_decoupled_with_a_warning(tmp_path: Path) -> None:
    """Files before torch 2.7."""
    run = Run(lambda p: torch.optim.AdamW(p, lr=0.02), tmp_path)
    for group in run.state["param_groups"]:
        del group["decoupled_weight_decay"]
    torch.save(run.state, run.path)
    for how in ("live", "file"):
        with pytest.warns(UserWarning, match="does not say whether weight decay is decoupled"):
            run.load(AdamW, how)
        assert run.goes_on(AdamW, how) < CLOSE


def test_uncorrected_averages_of_deepspeeds_adam_are_refused(tmp_path: Path) -> None:
    run = Run(lambda p: torch.optim.AdamW(p, lr=0.02), tmp_path)
    for corrected in (True, False):
        for group in run.state["param_groups"]:
            for key in group.keys() - {"params", "lr", "betas", "eps", "weight_decay"}:
                del group[key]
            group["bias_correction"] = corrected
        torch.save(run.state, run.path)
        if corrected:
            assert run.goes_on(AdamW, "live") < CLOSE
        else:
            assert "bias_correction=False: its averages are not corrected" in run.refuses(AdamW, "live")


# --- SGD, Lion, CAME ----------------------------------------------------------------------------------------------

SGD_FLAGS = [
    (momentum, dampening, nesterov, decay, maximize)
    for momentum, dampening, nesterov, decay, maximize in product(
        (0.0, 0.9), (0.0, 0.4), (False, True), (0.0, 0.1), (False, True)
    )
    if not nesterov or (momentum and not dampening)
]


@pytest.mark.parametrize(("momentum", "dampening", "nesterov", "decay", "maximize"), SGD_FLAGS)
def test_sgd_under_all_flags(
    momentum: float, dampening: float, nesterov: bool, decay: float, maximize: bool, tmp_path: Path
) -> None:
    def build(params: list[nn.Parameter]) -> Any:
        numbers = {"momentum": momentum, "dampening": dampening, "weight_decay": decay}
        return torch.optim.SGD(params, lr=0.05, nesterov=nesterov, maximize=maximize, **numbers)

    run = Run(build, tmp_path)
    for ours_nesterov in (False, True) if momentum else (False,):

        def ours(params: list[nn.Parameter], nesterov: bool = ours_nesterov) -> Any:
            return SGD(params, lr=1.0, momentum=0.5 if momentum else 0.0, nesterov=nesterov)

        if maximize:
            assert "maximize=True: it goes uphill" in run.refuses(ours)
        elif ours_nesterov == nesterov:
            assert run.goes_on(ours) < CLOSE
        else:
            assert "nesterov" in run.refuses(ours)
            assert run.goes_on(ours, "consent") > 100 * CLOSE


LION = {
    "at rest": ({}, True),
    "L2": ({"weight_decouple": False}, False),
    "L2 of nothing": ({"weight_decouple": False, "weight_decay": 0.0}, True),
    "fixed": ({"fixed_decay": True}, False),
    "centred": ({"use_gc": True}, False),
    "cautious": ({"cautious": True}, False),
    "not cautious": ({"cautious": False}, True),
    "unknown": ({"brave": True}, False),
}


@pytest.mark.parametrize("name", LION)
def test_lion_under_the_flags_of_pytorch_optimizer(name: str, tmp_path: Path) -> None:
    flags, same = LION[name]
    options = {"weight_decay": 0.1, **flags}
    run = Run(lambda p: po.Lion(p, lr=0.01, betas=(0.8, 0.9), **options), tmp_path)
    if same:
        assert run.goes_on(Lion) < CLOSE
    else:
        text = run.refuses(Lion)
        assert any(f"param group 0 has {key}={value}" in text for key, value in flags.items())
    if name == "L2":

        def coupled(params: list[nn.Parameter]) -> Any:
            return optstate.Optimizer(params, optstate.chain(updates.add_decayed_weights(0.0), updates.sign_momentum()))

        assert "updates.add_decayed_weights(...), updates.sign_momentum(...)" in run.refuses(Lion)
        assert run.goes_on(coupled) < CLOSE


def test_lion_pytorch_and_its_cautious_variant(tmp_path: Path) -> None:
    run = Run(lambda p: lion_pytorch.Lion(p, lr=0.01, weight_decay=0.1), tmp_path)
    with pytest.warns(UserWarning, match="does not say whether weight_decay was divided by the first learning rate"):
        run.load(Lion, "file")
    assert run.goes_on(Lion) < CLOSE
    cautious = lion_pytorch.cautious_lion.Lion
    for flags, same in (
        ({"cautious_factor": 1.0}, True),
        ({"cautious_factor": 0.5}, False),
        ({"cautious_factor": 1.0, "cautious_wd": True, "weight_decay": 0.1}, False),
        ({"cautious_factor": 1.0, "cautious_wd": True}, True),
    ):
        run = Run(lambda p, flags=flags: cautious(p, lr=0.01, **flags), tmp_path)
        if same:
            assert run.goes_on(Lion) < CLOSE
        else:
            assert "param group 0 has cautious_" in run.refuses(Lion)


@pytest.mark.parametrize("flag", ["weight_decouple", "fixed_decay", "ams_bound"])
def test_came_under_the_flags_of_pytorch_optimizer(flag: str, tmp_path: Path) -> None:
    options = {flag: flag != "weight_decouple", "weight_decay": 0.1}
    run = Run(lambda p: po.CAME(p, lr=0.01, **options), tmp_path)
    assert f"param group 0 has {flag}={options[flag]}" in run.refuses(CAME)
    with pytest.warns(UserWarning, match="does not say clip_threshold: what this optimizer has stays"):
        Run(lambda p: po.CAME(p, lr=0.01, weight_decay=0.1), tmp_path).load(CAME, "file")


# --- Adafactor ----------------------------------------------------------------------------------------------------

ADAFACTOR = [
    flags
    for flags in product((False, True), (False, True), (False, True), (None, 0.8))
    if flags[1] or not flags[2]  # a warm-up is one of relative steps
]


@pytest.mark.parametrize(("scale", "relative", "warmup", "beta1"), ADAFACTOR)
def test_transformers_adafactor_under_all_flags(
    scale: bool, relative: bool, warmup: bool, beta1: float | None, tmp_path: Path
) -> None:
    """Its three switches are arguments of ours: built with them it goes on, built with others it is refused."""
    flags = {"scale_parameter": scale, "relative_step": relative, "warmup_init": warmup}
    rate = None if relative else 0.01
    run = Run(lambda p: TransformersAdafactor(p, lr=rate, beta1=beta1, **flags), tmp_path)
    for other_scale, other_relative, other_warmup, other_beta in ADAFACTOR:
        if (other_beta is None) != (beta1 is None):
            continue  # another set of statistics
        more = {"scale_parameter": other_scale, "relative_step": other_relative, "warmup_init": other_warmup}
        more |= {"lr": None if other_relative else 0.5, "beta1": other_beta, "momentum_before_lr": beta1 is None}
        ours = partial(Adafactor, **more)
        if (other_scale, other_relative, other_warmup) == (scale, relative, warmup):
            assert run.goes_on(ours) < CLOSE
        else:
            run.refuses(ours)


@pytest.mark.parametrize("maximize", [False, True])
def test_torchs_adafactor(maximize: bool, tmp_path: Path) -> None:
    run = Run(lambda p: torch.optim.Adafactor(p, lr=0.02, weight_decay=0.1, maximize=maximize), tmp_path)

    def ours(params: list[nn.Parameter]) -> Any:
        return Adafactor(params, lr=0.5, torch_compatible=True)

    if maximize:
        assert "maximize=True" in run.refuses(ours)
    else:
        assert run.goes_on(ours) < CLOSE
        assert "went through" in run.refuses(lambda p: Adafactor(p, lr=0.5, relative_step=False))


# --- low bits, Adam-mini ------------------------------------------------------------------------------------------


def test_percentile_clipping_shows_in_the_state(tmp_path: Path) -> None:
    run = Run(lambda p: bnb.optim.AdamW32bit(p, lr=0.02), tmp_path)
    assert run.goes_on(AdamW) < CLOSE
    for state in run.state["state"].values():
        inner = state.get("__bnb_optimizer_quant_state__", state)
        inner["gnorm_vec"] = torch.zeros(100)
    torch.save(run.state, run.path)
    assert "parameters keep gnorm_vec: gradients are clipped at a percentile" in run.refuses(AdamW)


def test_torchaos_amsgrad(tmp_path: Path) -> None:
    run = Run(lambda p: torchao.optim.AdamW8bit(p, lr=0.02), tmp_path)
    assert run.goes_on(AdamW) < CLOSE  # small parameters are in fp32
    run = Run(lambda p: torchao.optim.AdamW8bit(p, lr=0.02, amsgrad=True), tmp_path)
    assert "amsgrad=True" in run.refuses(AdamW)


def test_adam_minis_betas_are_taken_over(tmp_path: Path) -> None:
    """They are two keys there, and one here."""
    import adam_mini

    run = Run(
        lambda p: adam_mini.Adam_mini(
            [("a.mlp.weight", p[0]), ("a.bias", p[1])], lr=0.02, betas=(0.7, 0.8), verbose=False
        ),
        tmp_path,
    )

    def ours(params: list[nn.Parameter]) -> Any:
        return AdamMini([{"params": [pair]} for pair in zip(("a.mlp.weight", "a.bias"), params, strict=True)])

    optimizer, _ = run.load(ours, "file")
    assert [group["betas"] for group in optimizer.param_groups] == [(0.7, 0.8)] * 2
    assert run.goes_on(ours) < CLOSE


# --- keys that nobody knows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "refused"), [(True, True), (False, False), (None, False), (0.5, False), ("x", False)]
)
def test_unknown_flags_that_are_on_are_refused_and_others_carried(value: Any, refused: bool, tmp_path: Path) -> None:
    run = Run(lambda p: torch.optim.AdamW([{"params": p, "novel": value}], lr=0.02), tmp_path)
    for how in ("live", "file"):
        if refused:
            assert "param group 0 has novel=True: this flag is not known here" in run.refuses(AdamW, how)
            continue
        with pytest.warns(UserWarning, match="not known here are carried along: novel"):
            optimizer, _ = run.load(AdamW, how)
        assert optimizer.param_groups[0]["novel"] == value
        assert run.goes_on(AdamW, how) < CLOSE


def test_what_is_said_points_at_the_line_that_loads() -> None:
    params = parameters()
    theirs = torch.optim.AdamW([{"params": params, "novel": 0.5}])
    train(theirs, params)
    with pytest.warns(UserWarning, match="carried along: novel") as said:
        AdamW(parameters()).load_state_dict(theirs.state_dict())
    assert [warning.filename for warning in said] == [__file__]


@pytest.mark.parametrize("flag", [np.bool_(True), np.array(True), torch.tensor(True)])
def test_a_flag_is_on_whatever_it_is_made_of(flag: Any) -> None:
    params = parameters()
    theirs = torch.optim.AdamW([{"params": params, "novel": flag}])
    train(theirs, params)
    with pytest.raises(ValueError, match="novel=True: this flag is not known here"):
        AdamW(parameters()).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("lr", float("nan"), "lr=nan is out of range"),
        ("lr", None, "lr=None is a NoneType"),
        ("lr", 10**400, "lr is too large for a number"),
        ("betas", (0.9, 1.0), "betas.1.=1.0 is out of range"),
        ("betas", (0.9, 10**400), "betas.1. is too large for a number"),
        ("eps", 10**400, "eps is too large for a number"),
    ],
)
def test_values_that_no_step_can_use_are_named(key: str, value: Any, why: str, tmp_path: Path) -> None:
    params = parameters()
    theirs = torch.optim.AdamW(params)
    train(theirs, params)
    theirs.param_groups[0][key] = value
    torch.save(theirs.state_dict(), tmp_path / "opt.pt")
    with pytest.raises(CheckpointError, match=why):
        optstate.load(AdamW(parameters()), tmp_path / "opt.pt")
    with pytest.raises((ValueError, TypeError), match=why):
        AdamW(parameters()).load_state_dict(theirs.state_dict())
    arguments = ["convert", str(tmp_path / "opt.pt"), str(tmp_path / "a.safetensors"), "--recipe", "adamw8bit"]
    result = CliRunner().invoke(app, [*arguments, "--allow-lossy"])
    assert result.exit_code in (0, 4)  # 0: with hyper-parameters of the new recipe's own
    assert isinstance(result.exception, SystemExit | None)


@pytest.mark.parametrize("step", [np.int64(2), np.float32(2.0), torch.tensor(2)])
def test_a_step_is_a_count_whatever_it_is_made_of(step: Any) -> None:
    params = parameters()
    theirs = torch.optim.AdamW(params)
    train(theirs, params)
    saved = theirs.state_dict()
    for state in saved["state"].values():
        state["step"] = step
    ours = AdamW(parameters())
    ours.load_state_dict(saved)
    assert {state["step"] for state in ours.state.values()} == {2}
    for odd in (float("nan"), 10**30, -1, True):
        saved["state"][0]["step"] = odd
        with pytest.raises(ValueError, match="which is not a count"):
            ours.load_state_dict(saved)


def test_a_flag_of_the_users_own_is_no_other_rule(tmp_path: Path) -> None:
    """What this optimizer's group says, too, is not of the other library."""
    params = parameters()
    optimizer = AdamW(params)
    optimizer.param_groups[0]["mine"] = True
    train(optimizer, params)
    saved = optimizer.state_dict()
    del saved["optstate"]  # as torch.distributed.checkpoint does
    other = AdamW(parameters(params))
    other.param_groups[0]["mine"] = True
    other.load_state_dict(saved)
    assert other.param_groups[0]["mine"] is True


def test_the_table_knows_every_default_of_the_libraries() -> None:
    """A new version's new flag fails here before it is refused in somebody's run."""
    built = {
        ("torch", name): getattr(torch.optim, name)(parameters(), lr=0.1)
        for name in ("Adam", "AdamW", "SGD", "Adafactor")
    }
    built |= {
        ("transformers", "Adafactor"): TransformersAdafactor(parameters()),
        ("bitsandbytes", "AdamW"): bnb.optim.AdamW8bit(parameters()),
        ("bitsandbytes", "Lion"): bnb.optim.Lion8bit(parameters()),
        ("bitsandbytes", "SGD"): bnb.optim.SGD8bit(parameters(), lr=0.1, momentum=0.9),
        ("torchao", "AdamW"): torchao.optim.AdamW8bit(parameters()),
        ("lion-pytorch", "Lion"): lion_pytorch.cautious_lion.Lion(parameters()),
        ("pytorch_optimizer", "Lion"): po.Lion(parameters()),
        ("pytorch_optimizer", "CAME"): po.CAME(parameters()),
        ("pytorch_optimizer", "SM3"): po.SM3(parameters()),
    }
    rules = {(rule.kind, rule.optimizer): rule for rule in ALL}
    for key, optimizer in built.items():
        unknown = {name for name in optimizer.param_groups[0] if not rules[key].knows(name)}
        assert not unknown, key
    assert all(rule.recipe or rule.why for rule in ALL)
    assert all(set(rule.switches).isdisjoint(rule.numbers) for rule in ALL)


# --- commands -----------------------------------------------------------------------------------------------------


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_convert_says_that_the_rule_changes_and_needs_consent(tmp_path: Path) -> None:
    run = Run(lambda p: torch.optim.AdamW(p, lr=0.02, maximize=True), tmp_path)
    target = tmp_path / "opt.safetensors"
    refused = invoke("convert", run.path, target, "--recipe", "adamw")
    assert refused.exit_code == 4
    assert "the rule would change: param group 0 has maximize=True: it goes uphill" in refused.stderr
    assert "numbers would change" not in refused.stderr
    assert not target.exists()
    made = invoke("convert", run.path, target, "--recipe", "adamw", "--allow-lossy", "--json")
    assert made.exit_code == 0
    tree = json.loads(made.stdout)
    assert tree["lossless"] is False
    assert "maximize=True" in tree["changes"][0]
    assert tree["update_cosine"] is None
    assert {(row["lossless"], row["relative_error"], row["update_cosine"]) for row in tree["slots"]} == {
        (True, 0.0, None)
    }
    assert "maximize=True" in open_checkpoint(target).document.history[-1]["changes"][0]
    lines = invoke("convert", run.path, target, "--recipe", "adamw", "--dry-run").stdout
    assert "changes: param group 0 has maximize=True" in lines


@pytest.mark.parametrize("middle", ["plain", "stores"])
def test_a_file_converted_on_the_way_still_says_its_rule(middle: str, tmp_path: Path) -> None:
    run = Run(lambda p: torch.optim.AdamW(p, lr=0.02, maximize=True), tmp_path)
    target = tmp_path / "opt.safetensors"
    more = () if middle == "plain" else ("--slot", "exp_avg=bf16", "--allow-lossy")
    assert invoke("convert", run.path, target, *more).exit_code == 0
    with pytest.raises(CheckpointError, match="maximize=True"):
        optstate.load(AdamW(parameters(run.weights)), target)


@pytest.mark.parametrize("command", ["inspect", "check"])
def test_inspect_and_check_say_it(command: str, tmp_path: Path) -> None:
    run = Run(lambda p: torch.optim.AdamW([{"params": p, "novel": 3}], lr=0.02, amsgrad=True), tmp_path)
    result = invoke(command, run.path, "--json")
    assert result.exit_code == 0  # the file is sound
    for words in ("param group 0 has amsgrad=True: it divides by the largest", "carried along: novel"):
        assert words in result.stdout
    if command == "inspect":
        assert json.loads(result.stdout)["recipe"] is None
    quiet = Run(lambda p: torch.optim.AdamW(p, lr=0.02), tmp_path)
    assert json.loads(invoke("check", quiet.path, "--json").stdout)["issues"] == []


def test_diff_finds_another_rule_in_a_file_of_another_tool(tmp_path: Path) -> None:
    run = Run(lambda p: torch.optim.AdamW(p, lr=0.02, maximize=True), tmp_path)
    optimizer, _ = run.load(AdamW, "consent")
    optimizer.param_groups[0].update(run.state["param_groups"][0], params=optimizer.param_groups[0]["params"])
    ours = tmp_path / "ours.safetensors"
    for group in optimizer.param_groups:
        for key in group.keys() - {"params", "lr", "betas", "eps", "weight_decay"}:
            del group[key]
    optstate.save(optimizer, ours)
    result = invoke("diff", run.path, ours, "--json")
    assert result.exit_code == 1
    assert "maximize=True" in result.stdout
