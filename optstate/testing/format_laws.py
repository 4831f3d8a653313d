"""The laws of a format: another library's files are read and written without losing anything."""

from __future__ import annotations

import copy
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from optstate import checkpoint, recipes
from optstate.checkpoint.document.contradictions import contradictions
from optstate.checkpoint.document.rules import plain_hyper
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.formats.registry import find_format
from optstate.checkpoint.formats.shared.format import Format
from optstate.checkpoint.formats.shared.statistics import RECIPE_OF_RULE
from optstate.optimizer.optimizer import Optimizer
from optstate.other_libraries import FORMATS, OtherRule
from optstate.plugins import PluginWarning
from optstate.testing.laws import BrokenLawError, Law, expect, expect_close, expect_same, one_line
from optstate.testing.rule_laws import OF_A_STEP, Maker, Params, state_tensors, step_once

__all__ = ["FORMAT_LAWS", "installed_format"]

SHAPES = {"layer.weight": (61, 100), "layer.bias": (61,)}
OPTIONS: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9}}
"""Hyper-parameters with which a rule keeps a statistic at all."""

OTHERS = (("torch", "adamw"), ("torch", "sgd"), ("lion-pytorch", "lion"))
"""Formats, and recipes whose state they hold, that nobody else may claim."""

LR = 2.0**-10
"""The same number in fp32, as which some libraries keep it."""

SAID = ("lr", "betas", "weight_decay", "momentum")
"""Hyper-parameters that mean the same in all libraries; `eps` does not."""


@dataclass(frozen=True)
class Written:
    """State of a recipe, saved in optstate's own file and written in a format."""

    maker: Maker
    params: Params
    optimizer: Optimizer
    own: Path
    theirs: Path


@contextmanager
def installed_format(declared: Format) -> Iterator[None]:
    """Take the format for installed, in the place of one of its name. Where it fails that is an error, no warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", f"the format {re.escape(repr(declared.name))} ", PluginWarning)
        with _held_format(declared):
            yield


@contextmanager
def _held_format(declared: Format) -> Iterator[None]:
    if find_format(declared.name) is declared:
        yield
    else:
        with FORMATS.holding(declared.name, declared):
            yield


def _written(declared: Format, folder: Path) -> Iterator[Written]:
    """Yield a file for every rule that the format says it holds.

    Raises:
        BrokenLawError: if it can be written and takes none of them.
    """
    rules, refusals = [rule for rule in declared.stores if rule], []
    for rule in rules if declared.write is not None else []:
        recipe, options = recipes.get(RECIPE_OF_RULE[rule]), OPTIONS.get(rule, {})
        maker = Maker(rule, lambda params, recipe=recipe, options=options: recipe(params, lr=LR, **options))
        params, optimizer = maker.train(SHAPES)
        own, theirs = folder / f"{rule}.safetensors", folder / (f"{rule}.pt" if declared.pack is None else rule)
        checkpoint.save(optimizer, own)
        try:
            checkpoint.convert(own, theirs, format=declared.name)
        except CheckpointError as error:
            refusals.append(one_line(error))
            continue
        yield Written(maker, params, optimizer, own, theirs)
    if rules and len(refusals) == len(rules) and declared.write is not None:
        raise BrokenLawError(f"nothing that `stores` promises is written: {refusals[0]}")


def _each(law: Callable[[Format, Written], None]) -> Callable[[Format], None]:
    """Return a law that is asked of every file that the format writes."""

    def holds(declared: Format) -> None:
        with tempfile.TemporaryDirectory(prefix="optstate-testing-") as name, installed_format(declared):
            for written in _written(declared, Path(name)):
                try:
                    law(declared, written)
                except BrokenLawError as broken:
                    broken.where = broken.where or f"the rule {written.maker.words!r}"
                    raise

    return holds


# --- the laws -----------------------------------------------------------------------------------------------------


def is_declared(declared: Format) -> None:
    """Check that a format says what its name and its rules are, and how its files are read."""
    expect(isinstance(declared, Format), f"it is a {type(declared).__name__}, no Format")
    expect(declared.name.split() == [declared.name], f"its name {declared.name!r} is not one word")
    expect(any((declared.read, declared.read_at, declared.pack)), "nothing says how its files are read")
    for rule in declared.rules:
        expect(isinstance(rule, OtherRule), f"{rule!r} in its rules is no OtherRule")
        expect(rule.kind == declared.name, f"the rule of {rule.optimizer} is of {rule.kind!r}, not {declared.name!r}")
    unknown = [rule for rule in declared.stores if rule and rule not in RECIPE_OF_RULE]
    expect(not unknown, f"{unknown} in its stores are no rules: they are {', '.join(RECIPE_OF_RULE)}")


def reads_what_it_writes(declared: Format, written: Written) -> None:
    """Check that a file goes into the format and back with the same numbers, steps and hyper-parameters."""
    theirs = checkpoint.open(written.theirs)
    expect(theirs.kind == declared.name, f"a file that it wrote is taken for one of {theirs.kind!r}")
    found = checkpoint.check(written.theirs)
    expect(found.ok, f"check finds fault with a file that it wrote: {found.issues[0].what if found.issues else ''}")
    back = written.own.with_name("back.safetensors")
    checkpoint.convert(written.theirs, back, overwrite=True)
    for slot in checkpoint.compare(written.own, back, tolerance=0.0).slots:
        expect(slot.verdict.startswith("equal"), f"{slot.slot} is {slot.verdict} after going there and back")
    before, after = checkpoint.open(written.own).document, checkpoint.open(back).document
    # Rules that need no count lose it in libraries that keep none; exact loading finds out about the others.
    expect(after.steps in ((), before.steps), f"the steps {list(before.steps)} become {list(after.steps)}")
    for old, new in zip(before.groups, after.groups, strict=True):
        there, here = plain_hyper(new), plain_hyper(old)
        for key in [key for key in SAID if key in there and key in here]:
            expect(there[key] == here[key], f"{key}={here[key]!r} becomes {there[key]!r}")


def loads_exactly(declared: Format, written: Written) -> None:
    """Check that statistics are loaded bit for bit from a file of the format, without consent, and the run goes on.

    The step after that may differ by rounding: some libraries keep a learning rate as a tensor.
    """
    params, optimizer = written.maker.built(SHAPES)
    with torch.no_grad():
        for name, param in params.items():
            param.copy_(written.params[name])
    for group in optimizer.param_groups:  # the file's take the place of these
        group["lr"] /= 4
        if "betas" in group:
            group["betas"] = tuple(beta / 2 for beta in group["betas"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?!the format )")  # of what the file does not say
        try:
            checkpoint.load(optimizer, written.theirs)
        except CheckpointError as error:
            if "follows another rule" in error.reason and " of another package fails" not in error.reason:
                return  # said, as it should be
            raise _explained(written, error) from error
    for here, there in zip(optimizer.param_groups, written.optimizer.param_groups, strict=True):
        for key in {"lr", "betas"} & there.keys():
            expect(here[key] == there[key], f"{key}={there[key]!r} becomes {here[key]!r}: see `Format.our_words`")
    for name, param in params.items():
        for key, value in state_tensors(written.params[name], written.optimizer).items():
            expect_same(optimizer.state[param][key], value, f"{key} of {name} after loading")
    before = {name: param.detach().clone() for name, param in params.items()}
    step_once(params, optimizer, 7)
    step_once(written.params, written.optimizer, 7)
    for name, param in params.items():
        found, wanted = param.detach() - before[name], written.params[name].detach() - before[name]
        expect_close(found, wanted, f"the change of {name} in a step after loading", OF_A_STEP)


def _explained(written: Written, error: CheckpointError) -> BrokenLawError:
    """Say which `Meaning` is wrong, if that is why a file is refused: what a person would have to find out."""
    own, theirs = (checkpoint.open(path).document.parameters for path in (written.own, written.theirs))
    for old, new in zip(own, theirs, strict=True):
        for slot, record in old.slots.items():
            was, now = (record.of, record.beta), None
            if slot in new.slots:
                now = (new.slots[slot].of, new.slots[slot].beta)
            if now is not None and was != now:
                return BrokenLawError(
                    f"{slot} was of={was[0]!r}, beta={was[1]} and is read as of={now[0]!r}, beta={now[1]}: the "
                    "`Meaning` of the statistic says what it averages, and under which key of the group beta is"
                )
    return BrokenLawError(f"{one_line(error)} (hyper-parameters by other names are what `Format.our_words` translates)")


def writes_the_same_again(declared: Format, written: Written) -> None:
    """Check that a file of the format, written in it once more, has the same bytes."""
    again = written.theirs.with_name(f"again{written.theirs.suffix}")
    checkpoint.convert(written.theirs, again, format=declared.name, overwrite=True)
    if written.theirs.is_file():
        expect(again.read_bytes() == written.theirs.read_bytes(), "the bytes differ")
        return
    for file in sorted(path for path in written.theirs.rglob("*") if path.is_file()):
        copied = again / file.relative_to(written.theirs)
        expect(copied.is_file() and copied.read_bytes() == file.read_bytes(), f"the bytes of {file.name} differ")


def claims_nothing_else(declared: Format) -> None:
    """Check that files of other libraries are still taken for theirs."""
    with tempfile.TemporaryDirectory(prefix="optstate-testing-") as name, installed_format(declared):
        for other, recipe in OTHERS:
            if other == declared.name:
                continue
            make = recipes.get(recipe)
            options = OPTIONS.get(recipe, {})
            maker = Maker(recipe, lambda params, make=make, options=options: make(params, lr=LR, **options))
            own, theirs = Path(name) / f"{recipe}.safetensors", Path(name) / f"{recipe}.pt"
            checkpoint.save(maker.train(SHAPES)[1], own)
            checkpoint.convert(own, theirs, format=other)
            kind = checkpoint.open(theirs).kind
            expect(kind == other, f"a file of {other} is taken for one of {kind!r}")


def refuses_hostile_files(declared: Format, written: Written) -> None:
    """Check that a damaged file is read, or refused with a CheckpointError; nothing else is raised."""
    if declared.pack is not None:
        return
    tree, path = torch.load(written.theirs, weights_only=True), written.theirs.with_name("damaged.pt")
    for what, damaged in _damaged(tree):
        torch.save(damaged, path)
        try:
            contradictions(checkpoint.open(path))
        except CheckpointError:
            continue
        except Exception as error:
            raise BrokenLawError(f"{what} raises {one_line(error)} instead of a CheckpointError") from error


def _damaged(tree: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the tree with one thing wrong, and what that is."""
    first = next(iter(tree["state"]), None)
    for key in tree["state"].get(first, ()):
        for what, value in (("text", "text"), ("another shape", torch.zeros(3, 1, 2)), ("None", None), ("a list", [1])):
            damaged = copy.deepcopy(tree)
            damaged["state"][first][key] = value
            yield f"{what} in the place of {key!r}", damaged
        damaged = copy.deepcopy(tree)
        del damaged["state"][first][key]
        yield f"a parameter without {key!r}", damaged
    for key in [key for key in tree["param_groups"][0] if key not in ("params", "param_names")]:
        damaged = copy.deepcopy(tree)
        damaged["param_groups"][0][key] = "text"
        yield f"text in the place of {key!r}", damaged
        damaged = copy.deepcopy(tree)
        del damaged["param_groups"][0][key]
        yield f"a group without {key!r}", damaged


FORMAT_LAWS: tuple[Law[Format], ...] = (
    Law("declaration", "nobody would find the format, or know what its files hold", is_declared),
    Law("round trip", "a checkpoint would change on its way into the library and back", _each(reads_what_it_writes)),
    Law("exact load", "a run that moves from the library to optstate would not go on as it was", _each(loads_exactly)),
    Law("same bytes", "a file of the library would change although nobody asked for it", _each(writes_the_same_again)),
    Law("other files", "files of other libraries would be taken for this one's", claims_nothing_else),
    Law("damaged files", "a damaged file would end in a traceback", _each(refuses_hostile_files)),
)
