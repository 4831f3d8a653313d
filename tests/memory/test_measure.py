"""`peak_extra_bytes` against functions whose allocations are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from optstate.memory import peak_extra_bytes

MB = 1 << 20
ROUNDING = 512
"""Bytes by which an allocator may round one allocation up."""


def zeros(nbytes: int) -> Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8)


def test_that_nothing_costs_nothing():
    assert peak_extra_bytes(lambda: None) == 0


def test_a_peak_is_what_is_alive_together():
    def in_turn() -> None:
        zeros(3 * MB)
        first = zeros(MB)
        second = zeros(MB)
        del first, second

    def together() -> None:
        kept = [zeros(3 * MB), zeros(MB)]
        kept.clear()
        zeros(2 * MB)

    assert peak_extra_bytes(in_turn) == pytest.approx(3 * MB, abs=ROUNDING)
    assert peak_extra_bytes(together) == pytest.approx(4 * MB, abs=2 * ROUNDING)


def test_what_is_returned_or_stored_counts():
    kept = []
    assert peak_extra_bytes(lambda: zeros(MB)) == pytest.approx(MB, abs=ROUNDING)
    assert peak_extra_bytes(lambda: kept.append(zeros(MB))) == pytest.approx(MB, abs=ROUNDING)


def test_temporaries_inside_operators_count():
    x = torch.ones(MB, dtype=torch.bfloat16)
    # The fp32 copy and its square root are alive together; the bf16 result only after the copy is gone.
    assert peak_extra_bytes(lambda: x.float().sqrt().bfloat16()) == pytest.approx(8 * MB, abs=2 * ROUNDING)


@pytest.mark.parametrize("known", [False, True], ids=["from outside", "from an earlier measurement"])
def test_memory_of_before_makes_no_room(known):
    held = []
    if known:
        peak_extra_bytes(lambda: held.append(zeros(2 * MB)))
    else:
        held.append(zeros(2 * MB))

    def replace_it() -> None:
        held.clear()
        held.append(zeros(MB))

    assert peak_extra_bytes(replace_it) == pytest.approx(MB, abs=ROUNDING)


def test_gradients_of_a_backward_pass_count():
    weight = torch.ones(MB // 4, requires_grad=True)
    assert peak_extra_bytes(lambda: weight.sum().backward()) == pytest.approx(MB, abs=4 * ROUNDING)


def test_an_error_passes_and_leaves_the_profiler_usable():
    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        peak_extra_bytes(broken)
    assert peak_extra_bytes(lambda: zeros(MB)) == pytest.approx(MB, abs=ROUNDING)
