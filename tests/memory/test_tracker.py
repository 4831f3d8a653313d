"""The tracker on small pieces of code whose live bytes are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from optstate.memory.model import KINDS
from optstate.memory.tracing.fakes import fake_mode
from optstate.memory.tracing.tracker import Timeline, Tracker


def here() -> tuple[str, str]:
    return "1 here", "activations"


def watched(rounding: int = 1) -> Tracker:
    return Tracker(here, rounding)


def peak(tracker: Tracker) -> int:
    return max(moment.total for moment in Timeline(tracker.events).moments.values())


@pytest.mark.parametrize("fake", [False, True])
def test_a_peak_is_what_is_alive_together(fake: bool) -> None:
    def run() -> int:
        with watched() as tracker:
            first = torch.ones(1000)
            del first
            second, third = torch.ones(300), torch.ones(200)
            del second, third
        return peak(tracker)

    if fake:
        with fake_mode():
            assert run() == 4000
    else:
        assert run() == 4000


def test_storages_count_once_however_many_tensors_share_them() -> None:
    with fake_mode(), watched() as tracker:
        x = torch.ones(10, 10)
        views = [x.t(), x[0], x.view(-1), x.detach()]
        x.add_(1)
        del x
        assert peak(tracker) == 400
        assert [made for _, made in tracker.events] == [True]
        del views
        assert [made for _, made in tracker.events] == [True, False]


def test_each_storage_is_rounded_up() -> None:
    with fake_mode(), watched(512) as tracker:
        kept = [torch.ones(1), torch.ones(128), torch.ones(129), torch.empty(0)]
    assert len(kept) == 4
    assert peak(tracker) == 512 + 512 + 1024


def test_what_autograd_saves_is_alive_until_it_is_used() -> None:
    with fake_mode(), watched() as tracker:
        x = torch.ones(100, requires_grad=True)
        y = x.exp()  # its result is saved
        z = y.sum()
        del y
        assert sum(s.nbytes if made else -s.nbytes for s, made in tracker.events) == 400 + 400 + 4
        z.backward()
        assert x.grad is not None
        assert sum(s.nbytes if made else -s.nbytes for s, made in tracker.events) == 400 + 400 + 4


def test_owners_are_told_later_and_sums_hand_them_on() -> None:
    """A parameter used twice: both parts of its gradient and their sum are gradients."""
    with fake_mode():
        weight = nn.Parameter(torch.ones(20, 20))
        tracker = watched()
        tracker.seed(weight, "weights", "w")
        weight.register_hook(lambda grad: tracker.belongs(grad, "gradients", "w"))
        with tracker:
            x = torch.ones(5, 20)
            (x @ weight @ weight).sum().backward()
    timeline = Timeline(tracker.events)
    moment = max(timeline.moments.values(), key=lambda moment: moment.total)
    by_kind = dict(zip(KINDS, moment.most, strict=True))
    assert by_kind["weights"] == 1600
    assert by_kind["gradients"] == 2 * 1600
    assert {item.what for item in timeline.alive(len(tracker.events) - 1) if item.kind == "gradients"} == {"w"}


def test_sums_of_gradients_count_in_place_as_autograd_makes_them_without_a_mode() -> None:
    """Three parts of 4 MB each: the second is added onto the first, then the third."""
    with fake_mode():
        tracker = watched()
        with tracker:
            x = torch.ones(1 << 20, requires_grad=True)
            y = sum((x * float(i) for i in range(3)), start=torch.zeros(()))
            assert isinstance(y, Tensor)
            tracker.restart()
            y.backward(y.detach())
    size = 4 << 20
    assert peak(tracker) == 4 * size  # x, y, the sum so far, a new part


def test_restarting_keeps_what_is_alive() -> None:
    with fake_mode(), watched() as tracker:
        kept, dropped = torch.ones(100), torch.ones(1000)
        del dropped
        tracker.restart()
        assert peak(tracker) == 400
        del kept
    assert [made for _, made in tracker.events] == [True, False]


def test_what_was_alive_at_a_moment() -> None:
    with fake_mode(), watched() as tracker:
        first = torch.ones(1000)
        second = torch.ones(2, 1000, dtype=torch.bfloat16)
        third = first + 1
        del first, second, third
        torch.ones(7)
    timeline = Timeline(tracker.events)
    index = timeline.moments["1 here"].index
    alive = timeline.alive(index)
    assert [item.nbytes for item in alive] == [4000, 4000, 4000]
    assert {(item.shape, item.dtype) for item in alive} == {((1000,), "float32"), ((2, 1000), "bfloat16")}
    assert {item.what for item in alive} == {"aten.ones.default", "aten.add.Tensor"}


def test_a_tensor_on_another_device_is_refused_before_autograd_meets_it() -> None:
    with fake_mode(), pytest.raises(RuntimeError, match=r"aten\.empty.* makes a tensor on cuda:0"), watched():
        torch.empty(3, device="cuda")
