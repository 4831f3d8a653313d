"""Places beyond 2**31 elements: the last programs of a launch, over memory of which only the end is touched."""

from __future__ import annotations

import builtins
import mmap

import pytest
import torch
from torch import Tensor

from optstate.kernels import name_key, noise_key
from optstate.kernels.native import WriteKind
from optstate.kernels.rounding import random_bits16, round_bf16
from optstate.kernels.rules import ElementRule, MatrixRule
from optstate.kernels.triton_steps import GradientTensor, MomentTensor, WeightTensor, interprets

pytest.importorskip("triton", reason="triton is not installed")
if not interprets():
    pytest.skip("needs TRITON_INTERPRET=1: test_in_interpreter.py starts it", allow_module_level=True)

from triton.runtime import interpreter

from optstate.kernels.triton_steps.elementwise import launch_elementwise
from optstate.kernels.triton_steps.factored import FactoredLaunches
from optstate.kernels.triton_steps.many import CHUNK, launch_elementwise_table
from optstate.kernels.triton_steps.maxima import launch_maxima
from optstate.kernels.triton_steps.tables import RowOfTable, Table

COUNT = 2**31 + 2048
ROWS, COLS = 2**15 + 16, 2**16
END = 700
"""Elements at the end that are looked at: they lie in the last tile of every launch here."""


@pytest.fixture(scope="module")
def large() -> Tensor:
    """A parameter larger than 32-bit numbers count: memory that nobody touches is none."""
    room = mmap.mmap(-1, 2 * ROWS * COLS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        room.madvise(mmap.MADV_NOHUGEPAGE)  # else 2 MB are taken for every element that is touched
    return torch.frombuffer(room, dtype=torch.bfloat16)


@pytest.fixture
def last_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the interpreter run only the last program of many, along each dimension of a launch."""

    def few(*bounds: int) -> range:
        every = builtins.range(*bounds)
        return every[-1:] if len(every) > 20 else every

    monkeypatch.setattr(interpreter, "range", few, raising=False)


def fill_end(param: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Write the end of a parameter; return its value, and where it is."""
    end = param.view(-1)[-END:]
    end.copy_(torch.randn(END, generator=torch.Generator().manual_seed(seed)))
    return end.float(), end


def rounded(value: Tensor, count: int, key: int) -> Tensor:
    return round_bf16(value.clone(), random_bits16(key, count - END, END, value.device)).bfloat16()


def test_elementwise(large: Tensor, last_programs: None) -> None:
    param = large[:COUNT]
    value, end = fill_end(param, 1)
    weight = WeightTensor(param, how=WriteKind.STOCHASTIC, key=noise_key("w", 3))
    rule = ElementRule(step=0.25)
    launch_elementwise(weight, GradientTensor(param), MomentTensor(), MomentTensor(), rule, None, moves_second=False)
    assert torch.equal(end, rounded(value - 0.25 * value, COUNT, weight.key))


def test_a_table(large: Tensor) -> None:
    param = large[:COUNT]
    value, end = fill_end(param, 2)
    weight = WeightTensor(param, how=WriteKind.STOCHASTIC, key=name_key("w"))
    row = RowOfTable(weight, param, MomentTensor(), MomentTensor())
    table = Table.of([row], CHUNK)
    table.chunks = table.chunks[-1:]
    flags = torch.ones(1, dtype=torch.bool)
    launch_elementwise_table(table, row, GradientTensor(param), ElementRule(step=0.25), flags, 3)
    assert torch.equal(end, rounded(value - 0.25 * value, COUNT, noise_key("w", 3)))


def test_a_matrix(large: Tensor, last_programs: None) -> None:
    """Factors of one, which earlier launches would leave, make the step that of a descent."""
    param = large.view(ROWS, COLS)
    value, end = fill_end(param, 3)
    weight = WeightTensor(param, how=WriteKind.STOCHASTIC, key=noise_key("w", 3))
    row, col = torch.zeros(ROWS), torch.zeros(COLS)
    rule = MatrixRule(1.0, 0.0, None, None, step=0.25, decay=0.0)
    finite = torch.tensor(True)
    launches = FactoredLaunches(weight, GradientTensor(param), MomentTensor(), row, col, rule, finite, clears=True)
    launches.sum_squares()
    of_end = launches.row_parts.view(launches.across, ROWS)[-1, -1]
    assert of_end.item() == pytest.approx(value[-launches.width :].square().sum().item(), rel=1e-5)
    for factors in (launches.row_roots, launches.col_roots):
        factors.fill_(1.0)
    launches.row_means.zero_()[0] = 1.0
    launches.apply(launches.gradient, row, col, rule)
    assert torch.equal(
        end[-launches.width :], rounded(value - 0.25 * value, ROWS * COLS, weight.key)[-launches.width :]
    )


def test_maxima(large: Tensor, last_programs: None) -> None:
    """The kept maxima are those of ones, so that the update is known."""
    param = large.view(ROWS, COLS)
    value, end = fill_end(param, 4)
    weight = WeightTensor(param, how=WriteKind.STOCHASTIC, key=noise_key("w", 3))
    rule = ElementRule(step=0.25, eps=1e-30)
    row, col = torch.ones(ROWS), torch.ones(COLS)
    launch_maxima(weight, GradientTensor(param), MomentTensor(), row, col, rule, torch.tensor(True))
    expected = rounded(value - 0.25 * value / (1.0 + value * value).sqrt(), ROWS * COLS, weight.key)
    assert torch.equal(end[-256:], expected[-256:])
    assert large.numel() > 2**31
    assert col[-1] == (1.0 + value[-1] ** 2)
