"""Find changes and sizes with which a run fits a GPU, by trying them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from optstate.memory.errors import QuestionError
from optstate.memory.question import Question, Recipe, recipe_of
from optstate.memory.result import Estimate, RecipeEstimate
from optstate.memory.sources import SourceError
from optstate.memory.verdict import CONTEXT, FITS, FRAGMENTATION, NO, Gpu
from optstate.recipes import registry

__all__ = ["QUANTITIES", "Change", "LargestSize", "find_changes", "find_largest"]

QUANTITIES = ("batch", "seq")
"""The sizes that can be solved for."""

SMALLER = ("adamw8bit", "adamfactor", "adamw4bit", "adafactor", "adalomo", "lomo")
"""Recipes that are tried in place of one whose state is larger, where they are installed: AdamW's nearest first."""

MOST = 1 << 24
"""The largest batch or sequence that is tried."""

UNCHANGED = 64
"""If a size this many times as large has the same activations, the inputs do not depend on the size."""

BY_SECANT = 12
"""Number of sizes tried along straight lines before the rest is halved: peaks are made of a few straight pieces."""


@dataclass(frozen=True)
class Change:
    """A change that makes a run fit.

    kind: "run", "batch" or "recipe", by what is another. what: then, in words. options: of the command line that make
    the change. estimate: with it.
    """

    kind: str
    what: str
    options: str
    estimate: RecipeEstimate


@dataclass(frozen=True)
class LargestSize:
    """The largest size with which a recipe fits.

    Attributes:
        quantity: "batch" or "seq".
        value: the size; 0 if none fits.
        recipe: name of the recipe.
        estimate: with this size; None if no size fits.
        why: the reason why the model takes no larger size, if it is not the memory.
    """

    quantity: str
    value: int
    recipe: str
    estimate: RecipeEstimate | None
    why: str = ""


def find_changes(estimate: Estimate) -> tuple[Change, ...]:
    """Find changes under which a recipe fits that does not: of each kind the smallest, each traced.

    Of several recipes it is the one with the least peak that is changed; none if one of them fits already.

    Raises:
        QuestionError: if there is no GPU to fit.
    """
    question, _ = _asked(estimate)
    if any(one.verdict == FITS for one in estimate.recipes):
        return ()
    recipes = {one.recipe: one for one in estimate.recipes}
    nearest = min(recipes.values(), key=lambda one: one.peak_bytes or one.known_bytes)
    recipe = question.named(nearest.recipe)
    if nearest.peak_bytes is None and nearest.verdict != NO:
        return ()  # nothing can be traced
    tried = (_other_run(question, recipe), _smaller_batch(question, recipe), _other_recipe(question, nearest))
    return tuple(change for change in tried if change is not None)


def _asked(estimate: Estimate) -> tuple[Question, Gpu]:
    if not isinstance(estimate.question, Question) or estimate.gpu is None:
        raise QuestionError("nothing says which memory to fit: give gpu, as 24GiB or RTX4090")
    return estimate.question, estimate.gpu


def _fits(question: Question, recipe: Recipe) -> RecipeEstimate | None:
    """Return the estimate if the run fits; what cannot by weights, gradients and state alone is not traced."""
    try:
        if question.lower_bound(recipe).verdict == NO:
            return None
        answer = question.answer(recipe)
    except (SourceError, QuestionError):  # a model that cannot checkpoint, weights that a recipe cannot write
        return None
    return answer if answer.verdict == FITS else None


Run = tuple[Question, str, str]
"""A question, what it changes in words, and the options that change it."""


def _runs(question: Question, recipe: Recipe) -> list[Run]:
    """List other ways to run the recipe, to the same end: the smallest change first, all together last."""
    fused = recipe.fused if question.fused_backward is None else question.fused_backward
    checkpointed = replace(question, setting=replace(question.setting, checkpointing=True))
    runs = []
    if not question.setting.checkpointing:
        runs.append((checkpointed, "activation checkpointing", "--checkpointing"))
    if not fused and question.setting.grad_accum == 1:
        runs.append((replace(question, fused_backward=True), "updates in the backward pass", "--fused-backward"))
        if not question.setting.checkpointing:
            both = replace(checkpointed, fused_backward=True)
            words = "checkpointing and updates in the backward pass"
            runs.append((both, words, "--checkpointing --fused-backward"))
    return runs


def _other_run(question: Question, recipe: Recipe) -> Change | None:
    for changed, what, options in _runs(question, recipe):
        answer = _fits(changed, recipe)
        if answer is not None:
            return Change("run", f"{recipe.name} with {what}", f"--recipe {recipe.name} {options}", answer)
    return None


def _smaller_batch(question: Question, recipe: Recipe) -> Change | None:
    """Find a batch that fits, with nothing else changed, else with all else that helps."""
    batch = question.setting.batch_size
    if batch == 1:
        return None
    for changed, what, options in [(question, "", ""), *_runs(question, recipe)[-1:]]:
        one = _fits(_with_size(changed, "batch", 1), recipe)
        if one is None:
            continue
        guess = min(_on_the_line(one, changed.answer(recipe), batch, question), batch)
        answer = _fits(_with_size(changed, "batch", guess), recipe)
        size, found = (guess, answer) if answer is not None else (1, one)
        words = f"{recipe.name} with a batch of {size} instead of {batch}" + (f", {what}" if what else "")
        return Change("batch", words, f"--recipe {recipe.name} -b {size} {options}".strip(), found)
    return None


def _on_the_line(one: RecipeEstimate, whole: RecipeEstimate, batch: int, question: Question) -> int:
    """Return the batch that fits if peaks grow evenly from a batch of one."""
    assert one.peak_bytes is not None
    assert whole.peak_bytes is not None
    assert question.gpu is not None
    each = (whole.peak_bytes - one.peak_bytes) / (batch - 1)
    return max(1 + math.floor((_most_allocated(question.gpu) - one.peak_bytes) / each), 1) if each > 0 else batch


def _other_recipe(question: Question, now: RecipeEstimate) -> Change | None:
    """Find a recipe with less state, run as it is made to be; else with all else that helps.

    If the one with the least does not fit, no other is tried.
    """
    installed = registry.names()
    asked = replace(question, fused_backward=None)
    recipes = [recipe_of(name) for name in SMALLER if name in installed and name != now.recipe]
    recipes = [recipe for recipe in recipes if asked.lower_bound(recipe).known_bytes < now.known_bytes]
    for helped in (False, True):
        runs = [(recipe, _run_of(asked, recipe, helped)) for recipe in recipes]
        if not runs or _fits(runs[-1][1][0], runs[-1][0]) is None:
            continue
        for recipe, (changed, what, options) in runs:
            answer = _fits(changed, recipe)
            if answer is not None:
                words = f"{recipe.name} with {what}" if what else recipe.name
                return Change("recipe", words, f"--recipe {recipe.name} {options}".strip(), answer)
    return None


def _run_of(question: Question, recipe: Recipe, helped: bool) -> Run:
    runs = _runs(question, recipe) if helped else []
    return runs[-1] if runs else (question, "", "")


# --- sizes --------------------------------------------------------------------------------------------------------


def find_largest(estimate: Estimate, quantity: str) -> tuple[LargestSize, ...]:
    """Find the largest batch or sequence that surely fits the GPU, for each recipe: one more does not.

    Raises:
        QuestionError: without a GPU, for another quantity, or for a model that cannot be traced.
    """
    question, _ = _asked(estimate)
    if quantity not in QUANTITIES:
        raise QuestionError(f"solve for {quantity!r}: give {' or '.join(QUANTITIES)}")
    return tuple(_largest(question, question.named(one.recipe), quantity) for one in estimate.recipes)


def _largest(question: Question, recipe: Recipe, quantity: str) -> LargestSize:
    answers: dict[int, RecipeEstimate] = {}
    why = ""

    def peak(size: int) -> int | None:
        """Return the peak with this size; None where the model does not take the size."""
        nonlocal why
        try:
            answers[size] = _with_size(question, quantity, size).answer(recipe)
        except SourceError as error:
            if not error.usage:
                raise
            why = str(error)
            return None
        found, least = answers[size].peak_bytes, min(answers)
        if found is None:
            raise QuestionError(f"{recipe.name}: {answers[size].how}")
        if size >= UNCHANGED * least and answers[size].activations_bytes == answers[least].activations_bytes:
            raise QuestionError(f"a {quantity} of {least} and one of {size} need the same: nothing to solve for")
        return found

    assert question.gpu is not None
    if question.lower_bound(recipe).verdict == NO:
        return LargestSize(quantity, 0, recipe.name, None, "weights, gradients and state alone are too much")
    start = question.setting.batch_size if quantity == "batch" else question.setting.seq_len
    value = _last_below(peak, _most_allocated(question.gpu), start)
    return LargestSize(quantity, value, recipe.name, answers.get(value), why)


def _with_size(question: Question, quantity: str, size: int) -> Question:
    setting = question.setting
    changed = replace(setting, batch_size=size) if quantity == "batch" else replace(setting, seq_len=size)
    return replace(question, setting=changed)


def _most_allocated(gpu: Gpu) -> int:
    """Return the largest peak that fits for sure."""
    return math.floor((gpu.nbytes - CONTEXT[1]) / FRAGMENTATION)


def _last_below(peak: Callable[[int], int | None], limit: int, start: int) -> int:
    """Find the largest size from 1 whose peak is at most `limit`, 0 if there is none; peaks grow with sizes.

    peak: None for sizes that cannot be.
    """
    known: dict[int, int] = {}
    fits, fails = 0, MOST + 1
    size = start
    while True:
        found = peak(size)
        if found is not None:
            known[size] = found
        if found is not None and found <= limit:
            fits = max(fits, size)
        else:
            fails = min(fails, size)
        if fails - fits <= 1:
            return fits
        size = _next(known, limit, fits, fails)


def _next(known: dict[int, int], limit: int, fits: int, fails: int) -> int:
    """Choose the next size to try, strictly between the largest known to fit and the smallest known not to.

    It is where a straight line through two known ones meets the limit. Peaks are the most of several straight lines in
    the size, so that a line through one that fits and one that does not leads too low if anything.
    """
    low, high = fits + 1, fails - 1
    if not fits:
        return low
    if len(known) > BY_SECANT or (fails <= MOST and fails not in known):  # where no size can be, no line leads
        return (low + high) // 2
    a, b = (fits, fails) if fails <= MOST else (sorted(known)[-2:][0], fits)
    if known[a] == known[b]:
        return min(4 * fits, high)
    guess = a + math.floor((limit - known[a]) * (b - a) / (known[b] - known[a]))
    return min(max(guess, low), high)
