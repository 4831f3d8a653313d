"""Formats that are broken on purpose: each is caught by the law that it breaks, and by no other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from optstate import testing
from optstate.checkpoint.formats import registry
from optstate.formats import (
    FIRST,
    NEEDED,
    SECOND,
    Checkpoint,
    Format,
    Kept,
    Layout,
    Meaning,
    OtherRule,
    StateDict,
    Tree,
    TreeWriter,
    by_key,
    read_tables,
    whole,
    write_tables,
)
from optstate.other_libraries import FORMATS
from tests.testing.test_broken_parts import broken_laws

pytestmark = pytest.mark.slow

NAME = "smalllib"
HYPERS = {"lr": NEEDED, "betas": NEEDED, "eps": NEEDED, "weight_decay": NEEDED, "small": 1}
RULE = OtherRule(NAME, "Small", "adamw", needs=frozenset({"small"}), numbers=frozenset(HYPERS))
SLOTS = {"exp_avg": Kept(FIRST, "m"), "exp_avg_sq": Kept(SECOND, "v")}
LAYOUT = Layout("Small", RULE, SLOTS, step_form="int", hypers=by_key(HYPERS))
UNCOUNTED = replace(LAYOUT, step_form="")
ANY_LION = Layout("Lion", replace(RULE, needs=frozenset({"betas"})), whole({"exp_avg": FIRST}))


def read(found: StateDict, optimizer: str | None = None) -> Checkpoint | None:
    return read_tables(found, [LAYOUT], NAME)


def read_under_another_name(found: StateDict, optimizer: str | None = None) -> Checkpoint | None:
    return read_tables(found, [LAYOUT], "largelib")


def read_lions_too(found: StateDict, optimizer: str | None = None) -> Checkpoint | None:
    return read_tables(found, [LAYOUT, ANY_LION], NAME)


def read_carelessly(found: StateDict, optimizer: str | None = None) -> Checkpoint | None:
    if "small" in found.keys:
        _ = [kept["m"].shape for kept in found.state.values()]
    return read(found)


def write(writer: TreeWriter) -> Tree:
    return write_tables(writer, [LAYOUT], {"adam": LAYOUT})


def write_no_steps(writer: TreeWriter) -> Tree:
    return write_tables(writer, [UNCOUNTED], {"adam": UNCOUNTED})


def write_otherwise_again(writer: TreeWriter) -> Tree:
    tree = write(writer)
    return {**tree, "times": 2} if writer.same else tree


def our_words(hyper: dict[str, Any], rule: str) -> dict[str, Any]:
    return {key: value for key, value in hyper.items() if key != "small"}


SOUND = Format(
    name=NAME, read=read, write=write, stores={"adam": frozenset({"Full"})}, rules=(RULE,), our_words=our_words
)

BROKEN = [
    (replace(SOUND, rules=(replace(RULE, kind="largelib"),), name=NAME), "declaration"),
    (replace(SOUND, read=read_under_another_name), "round trip"),
    (replace(SOUND, write=write_no_steps), "exact load"),
    (replace(SOUND, write=write_otherwise_again), "same bytes"),
    (replace(SOUND, read=read_lions_too), "other files"),
    (replace(SOUND, read=read_carelessly), "damaged files"),
]


def test_a_sound_format_passes() -> None:
    testing.check_format(SOUND)


@pytest.mark.parametrize(("declared", "law"), BROKEN, ids=[law for _, law in BROKEN])
def test_each_broken_format_breaks_its_law_and_no_other(declared: Format, law: str) -> None:
    found = broken_laws(testing.check_format, declared, testing.LAWS_OF_FORMATS)
    assert list(found) == [law], {name: str(error) for name, error in found.items()}


def test_every_law_of_formats_has_a_format_that_breaks_it() -> None:
    assert {law for _, law in BROKEN} == set(testing.LAWS_OF_FORMATS)


@pytest.mark.parametrize("declared", registry.find_formats(), ids=lambda declared: declared.name)
def test_our_own_formats_keep_the_laws(declared: Format) -> None:
    testing.check_format(declared)


def test_a_format_that_writes_nothing_it_promises_is_caught() -> None:
    declared = replace(SOUND, stores={"sgd": frozenset({"Full"})})
    with pytest.raises(testing.LawError, match="nothing that `stores` promises is written"):
        testing.check_format(declared)


# --- a library with words of its own for the weights of the past ----------------------------------------------------

APART = {"rate": "lr", "beta1": ("betas", 0), "beta2": ("betas", 1), "eps": "eps", "shrink": "weight_decay"}


def write_apart(writer: TreeWriter, place: int, group: Any) -> Tree:
    ours = writer.common(group)
    return {k: ours[of] if isinstance(of, str) else ours[of[0]][of[1]] for k, of in APART.items()}


def join(hyper: dict[str, Any], rule: str) -> dict[str, Any]:
    ours: dict[str, Any] = {of: hyper[key] for key, of in APART.items() if isinstance(of, str) and key in hyper}
    return ours | ({"betas": (hyper["beta1"], hyper["beta2"])} if {"beta1", "beta2"} <= hyper.keys() else {})


def apart(first: Meaning, second: Meaning) -> Format:
    rule = OtherRule(NAME, "Small", "adamw", needs=frozenset({"shrink"}), numbers=frozenset(APART))
    layout = Layout(
        "Small",
        rule,
        {"exp_avg": Kept(first, "m"), "exp_avg_sq": Kept(second, "v")},
        step_form="int",
        hypers=write_apart,
    )
    return Format(
        name=NAME,
        read=lambda found, optimizer: read_tables(found, [layout], NAME),
        write=lambda writer: write_tables(writer, [layout], {"adam": layout}),
        stores={"adam": frozenset({"Full"})},
        rules=(rule,),
        our_words=join,
    )


def test_a_library_may_keep_weights_of_the_past_under_keys_of_its_own() -> None:
    first = Meaning("gradient", beta=("beta1", None))
    testing.check_format(apart(first, Meaning("square", signed=False, beta=("beta2", None))))


def test_a_weight_of_the_past_that_is_under_another_key_is_named() -> None:
    with pytest.raises(testing.LawError, match=r"exp_avg was of='gradient', beta=0.9 and is read as .* beta=None: the"):
        testing.check_format(apart(FIRST, SECOND), laws=["exact load"])


def test_the_format_that_is_given_is_checked_and_not_an_installed_one_of_its_name() -> None:
    first, second = Meaning("gradient", beta=("beta1", None)), Meaning("square", signed=False, beta=("beta2", None))
    sound = apart(first, second)
    with FORMATS.holding(NAME, sound), pytest.raises(testing.LawError, match="ZeroDivisionError"):
        testing.check_format(replace(sound, write=lambda writer: {"state": 1 // 0}), laws=["round trip"])


def test_hyper_parameters_that_nobody_translates_are_found_out() -> None:
    first, second = Meaning("gradient", beta=("beta1", None)), Meaning("square", signed=False, beta=("beta2", None))
    for words in (None, lambda hyper, rule: {}[rule]):
        with pytest.raises(testing.LawError, match="exact load.*our_words|exact load.*fails: KeyError"):
            testing.check_format(replace(apart(first, second), our_words=words), laws=["exact load"])
