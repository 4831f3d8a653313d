"""An interrupt at every line of the library while a step is made: is a half-made one always seen?

`python -m tests.support.interrupts` tries the first and the last time that each line is executed, with `--all` every
time, and
prints a table; the tests try the first time that each line of the rooms through which a step goes is executed.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import optstate
from adalomo import AdaLomo
from optstate.recipes import AdamW, AdamW8bit

LIBRARY = str(Path(optstate.__file__).parent)
Place = tuple[str, int]


class Interrupted(KeyboardInterrupt):
    """Raised at a line that somebody chose."""


class Tracer:
    """Follows the lines of the library that a call executes, and interrupts it at one of them."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.places: list[Place] = []
        self.stop_at = stop_at

    def run(self, call: Callable[[], Any]) -> None:
        """Raises Interrupted before the line number `stop_at` of those that are executed."""
        sys.settrace(self._enter)
        try:
            call()
        finally:
            sys.settrace(None)

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(LIBRARY) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.places.append((frame.f_code.co_filename[len(LIBRARY) + 1 :], frame.f_lineno))
            if len(self.places) - 1 == self.stop_at:
                raise Interrupted
        return self._line


@dataclass
class Case:
    """A model and its optimizer after one step, what makes the next one, and what closes it."""

    params: list[Tensor]
    optimizer: optstate.Optimizer
    step: Callable[[int], Any]
    asked: Callable[[], bool] = lambda: False
    """Whether another device may have gone on with the step that was interrupted here."""

    def values(self) -> list[Tensor]:
        """Every number that a step changes."""
        found = [optstate.distributed.placement.here(p).detach().clone() for p in self.params]
        for state in self.optimizer.state.values():
            found += [optstate.distributed.placement.here(torch.as_tensor(value)).clone() for value in state.values()]
        return found


@dataclass
class Outcome:
    """What the interrupts of a case led to."""

    tried: int = 0
    half: int = 0
    silent: list[Place] = field(default_factory=list)
    whole_but_refused: int = 0
    wrong_afterwards: list[Place] = field(default_factory=list)


def equal(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def refused(call: Callable[[], Any]) -> bool:
    try:
        call()
    except optstate.InconsistentStateError:
        return True
    return False


def attack(make: Callable[[], Case], choose: Callable[[list[Place]], Iterable[int]]) -> Outcome:
    """Interrupt the second step of a case at chosen ones of the lines that it executes."""
    with (
        mock.patch("optstate.integrations.engines.instances_of", _nothing),
        mock.patch("optstate.integrations.trainers.instances_of", _nothing),
    ):
        return _attack(make, choose)  # without a search for engines, which takes longer than all the rest


def _nothing(*kinds: type) -> list[Any]:
    return []


def all_lines(places: list[Place]) -> Iterable[int]:
    return range(len(places))


def first_and_last(places: list[Place]) -> Iterable[int]:
    first = {place: i for i, place in reversed(list(enumerate(places)))}
    return sorted({*first.values(), *{place: i for i, place in enumerate(places)}.values()})


def first_in_step(places: list[Place]) -> Iterable[int]:
    """The first time of each line in files that drive a step; what these call only computes."""
    first = {place: i for i, place in reversed(list(enumerate(places)))}
    return sorted(i for (file, _), i in first.items() if file in DRIVERS)


ROOMS = {
    "optimizer": "broken_step chain_step gradient_hooks loading norm_clip optimizer state_dict step_runner",
    "distributed": "sums",
    "stores": "guard base",
}
DRIVERS = {f"{room}/{file}.py" for room, files in ROOMS.items() for file in files.split()}


def _attack(make: Callable[[], Case], choose: Callable[[list[Place]], Iterable[int]]) -> Outcome:
    straight = make()
    before = straight.values()
    lines = Tracer()
    lines.run(lambda: straight.step(1))
    after = straight.values()
    straight.step(2)
    later = straight.values()
    outcome = Outcome()
    for number in choose(lines.places):
        case = make()
        tracer = Tracer(number)
        try:
            tracer.run(lambda: case.step(1))  # noqa: B023
        except Interrupted:
            pass
        else:
            continue  # the line belongs to what Python runs now and then, or the interrupt was caught by autograd
        outcome.tried += 1
        _judge(case, tracer.places[-1], outcome, before, after, later)
    return outcome


def _judge(
    case: Case, place: Place, outcome: Outcome, before: list[Tensor], after: list[Tensor], later: list[Tensor]
) -> None:
    now = case.values()
    unchanged, whole = equal(now, before) and not case.asked(), equal(now, after)
    if not unchanged and not whole:
        outcome.half += 1
        seen = refused(case.optimizer.state_dict) and refused(case.optimizer.step)
        return None if seen else outcome.silent.append(place)
    if refused(case.optimizer.state_dict):
        outcome.whole_but_refused += 1
        return None
    case.optimizer.zero_grad()
    case.step(2 if whole else 1)
    if not equal(case.values(), later if whole else after):
        outcome.wrong_afterwards.append(place)
    return None


# --- cases --------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """A matrix in two groups of layers, a vector, and a parameter without elements."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.reentrant = reentrant

    def forward(self, step: int) -> Tensor:
        torch.manual_seed(step)
        x = torch.randn(4, 6)
        if not self.reentrant:
            return self.last(self.first(x).tanh()).square().mean() + self.empty.sum()
        x = x.requires_grad_()  # reentrant passes begin inside the pass that is not the outermost
        h = checkpoint(lambda t: self.first(t).tanh(), x, use_reentrant=True)
        return self.last(h).square().mean() + self.empty.sum()


def _case(recipe: Any, step: Callable[[Small, Any], Callable[[int], Any]], fused: bool, **more: Any) -> Case:
    model = Small(reentrant=more.pop("reentrant", False))
    optimizer = recipe(model.named_parameters(), lr=1e-2)
    if fused:
        optstate.fuse_backward(optimizer, **more)
    make_step = step(model, optimizer)
    make_step(0)
    return Case(list(model.parameters()), optimizer, make_step)


def _plain(model: Small, optimizer: Any) -> Callable[[int], Any]:
    def step(number: int) -> None:
        model(number).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _accumulated(model: Small, optimizer: Any) -> Callable[[int], Any]:
    def step(number: int) -> None:
        for part in range(2):
            with optimizer.fused.accumulate():
                model(10 * number + part).backward()
        optimizer.step()

    return step


def _clipped(model: Small, optimizer: Any) -> Callable[[int], Any]:
    def step(number: int) -> None:
        loss = model(number)
        optimizer.fused.grad_norm(loss)
        loss.backward()
        optimizer.step()

    return step


def _loaded(recipe: Any) -> Case:
    """Here the step that is interrupted is a load of another run's state, with a step after it."""
    case = _case(recipe, _plain, fused=False)
    saved = [_saved(recipe, steps) for steps in range(3)]
    case.step = lambda number: case.optimizer.load_state_dict(saved[number])
    return case


@cache
def _saved(recipe: Any, steps: int) -> dict[str, Any]:
    """The state of a run that made three steps more than this."""
    other = _case(recipe, _plain, fused=False)
    for number in range(1, steps + 4):
        other.step(number)
    return copy.deepcopy(other.optimizer.state_dict())


@cache
def _two_devices() -> Any:
    return dist.device_mesh.init_device_mesh("cpu", (2,))


def split(recipe: Any) -> Case:
    """One of two devices that each hold half of a matrix; what the other one sends is what this one sent."""
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = _two_devices()
    torch.manual_seed(0)
    shapes = {"matrix": (6, 4), "other": (4, 4), "vector": (6,)}
    params = [nn.Parameter(distribute_tensor(torch.randn(shape), mesh, [Shard(0)])) for shape in shapes.values()]
    optimizer = recipe(list(zip(shapes, params, strict=True)), lr=1e-2)
    sent: list[bool] = []

    def step(number: int) -> None:
        torch.manual_seed(number)
        for param in params:
            param.grad = distribute_tensor(torch.randn(param.shape), mesh, [Shard(0)])
        sent.clear()
        original = dist.all_reduce

        def all_reduce(*args: Any, **kwargs: Any) -> Any:
            sent.append(True)
            return original(*args, **kwargs)

        dist.all_reduce = all_reduce
        try:
            optimizer.step()
        finally:
            dist.all_reduce = original

    step(0)
    return Case(list(params), optimizer, step, asked=lambda: bool(sent))


CASES: dict[str, Callable[[], Case]] = {
    "AdaLomo stepped": lambda: _case(AdaLomo, _plain, fused=False),
    "AdaLomo fused": lambda: _case(AdaLomo, _plain, fused=True),
    "AdaLomo fused, accumulated": lambda: _case(AdaLomo, _accumulated, fused=True),
    "AdaLomo fused, clipped": lambda: _case(AdaLomo, _clipped, fused=True, clip_grad_norm=0.1),
    "AdaLomo fused, reentrant checkpoint": lambda: _case(AdaLomo, _plain, fused=True, reentrant=True),
    "AdamW stepped": lambda: _case(AdamW, _plain, fused=False),
    "AdamW fused": lambda: _case(AdamW, _plain, fused=True),
    "AdamW8bit fused": lambda: _case(AdamW8bit, _plain, fused=True),
    "AdaLomo loaded": lambda: _loaded(AdaLomo),
    "AdamW8bit loaded": lambda: _loaded(AdamW8bit),
}
SPLIT_CASES: dict[str, Callable[[], Case]] = {
    "AdaLomo on two devices": lambda: split(AdaLomo),
    "AdamW on two devices": lambda: split(AdamW),
}


def start_two_devices() -> None:
    """Make this process the first of two; what the other would do is left out."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)


def attack_one_of_two_devices() -> None:
    """Attack AdaLomo's step there, and end with an error if a half-made step passes unseen."""
    start_two_devices()
    found = attack(lambda: split(AdaLomo), first_in_step)
    print(found)
    assert found.half > 20
    assert not found.silent
    assert not found.wrong_afterwards


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    start_two_devices()
    columns = ("tried", "half made", "silent", "whole, but refused", "wrong later")
    print(f"{'interrupted':36}", *(f"{column:>{len(column) + 2}}" for column in columns))
    total: Counter[str] = Counter()
    for name, make in {**CASES, **SPLIT_CASES}.items():
        found = attack(make, all_lines if "--all" in sys.argv else first_and_last)
        counts = (found.tried, found.half, len(found.silent), found.whole_but_refused, len(found.wrong_afterwards))
        row = dict(zip(columns, counts, strict=True))
        total.update(row)
        print(f"{name:36}", *(f"{row[column]:{len(column) + 2}}" for column in columns), flush=True)
        for place in (*found.silent, *found.wrong_afterwards):
            print("   at", *place)
    print(f"{'all':36}", *(f"{total[column]:{len(column) + 2}}" for column in columns))


if __name__ == "__main__":
    main()
