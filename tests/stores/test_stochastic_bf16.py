"""Statistics in bf16 that are rounded stochastically: right on average, and the same on every run."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import optstate
from optstate import updates
from optstate.kernels import Noise
from optstate.stores import Full, Store
from tests.support.models import assert_same
from tests.support.stored import noise

pytestmark = pytest.mark.slow


STOCHASTIC = Full("bfloat16", stochastic=True)


def rounded(value: Tensor, step: int = 1, name: str = "p/exp_avg_sq") -> Tensor:
    """What the store keeps, as float64."""
    (kept,) = STOCHASTIC.encode(value.clone(), Noise(name, step)).values()
    assert torch.equal(kept.bfloat16().float(), kept)
    return kept.double()


@pytest.mark.parametrize("size", [1.0, -1.0, 2.0**-65, -(2.0**100)])
def test_stochastic_rounding_is_right_on_average(size: float) -> None:
    """40000 roundings each of numbers all along one bf16 interval: the mean within 5 standard errors."""
    count, unit = 40_000, 2.0**-7
    for share in (0.0, 1 / 65536, 0.01, 0.25, 0.5, 0.8, 0.999):
        value = torch.tensor(size * (1 + share * unit))
        fraction = (float(value) / size - 1) / unit
        up = (rounded(value.expand(count).contiguous()) / size - 1) / unit
        assert set(up.unique().tolist()) <= {0.0, 1.0}
        # Random bits have 16 places: the share of roundings up is exact to 2**-16.
        error = math.sqrt(fraction * (1 - fraction) / count)
        assert abs(float(up.mean()) - fraction) <= 5 * error + 2.0**-16


def test_every_step_slot_and_element_rounds_by_bits_of_its_own() -> None:
    """A quarter of the way: what is rounded up is a quarter each, and no more common to two than chance makes it."""
    value = torch.full((40_000,), 1 + 0.25 * 2.0**-7)
    up = {key: rounded(value, *key) > 1.001 for key in [(1, "p/a"), (2, "p/a"), (1, "p/b"), (1, "q/a")]}
    for key, bits in up.items():
        assert abs(float(bits.float().mean()) - 0.25) <= 5 * math.sqrt(0.25 * 0.75 / 40_000), key
        assert abs(float((bits[1:] & bits[:-1]).float().mean()) - 1 / 16) <= 5 * math.sqrt(1 / 16 / 40_000)
    first = up[1, "p/a"]
    for key, bits in up.items():
        if key != (1, "p/a"):
            assert abs(float((bits & first).float().mean()) - 1 / 16) <= 5 * math.sqrt(1 / 16 / 40_000), key


def decay(second: Store, steps: int) -> Tensor:
    """The second moment after a gradient of ones and then `steps` of zeros, relative to the exact one."""
    shape = (64, 64)
    param = nn.Parameter(torch.zeros(shape))
    optimizer = optstate.Optimizer([("p", param)], updates.scale_by_adam(second=second, betas=(0.0, 0.999)), lr=0.0)
    param.grad = torch.ones(shape)
    optimizer.step()
    param.grad = torch.zeros(shape)
    for _ in range(steps):
        optimizer.step()
    return optimizer.state[param]["exp_avg_sq"].double() / (0.001 * 0.999**steps)


def test_a_bf16_second_moment_decays_as_an_fp32_one_on_average() -> None:
    """2000 steps of beta2 = 0.999 leave 13.5 %. Rounding to nearest leaves it all, and is refused."""
    steps = 2000
    ratio = decay(Full("bfloat16"), steps)
    assert float((decay(Full(), 20) - 1).abs().max()) < 1e-5
    # A step moves by 0.001 of the value, an eighth to a quarter of its last place: each step rounds by sqrt(p (1 - p))
    # of it, at most 0.44 * 2**-7 of the value, independently; so 0.15 after 2000, and 0.15 / 64 of the mean of 4096.
    error = 0.44 * 2.0**-7 * math.sqrt(steps)
    assert abs(float(ratio.mean()) - 1) <= 5 * error / 64
    assert error / 4 < float(ratio.std()) < 1.2 * error
    nearest = torch.tensor(0.001).bfloat16()
    for _ in range(steps):
        nearest = (nearest.float() * 0.999).bfloat16()
    assert nearest == torch.tensor(0.001).bfloat16()
    with pytest.raises(ValueError, match="does not decay"):
        updates.scale_by_adam(second=Full("bfloat16", stochastic=False), betas=(0.0, 0.999))


def test_rounding_touches_no_generator_and_a_resumed_run_rounds_alike() -> None:
    def run(seed: int, stop: int | None) -> tuple[nn.Parameter, optstate.Optimizer]:
        param = nn.Parameter(noise((70, 90), 0))
        chain = updates.scale_by_adam(STOCHASTIC, STOCHASTIC, betas=(0.9, 0.999))
        optimizer = optstate.Optimizer([("p", param)], chain, lr=0.01)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        for step in range(6):
            if step == stop:
                saved = optimizer.state_dict()
                optimizer = optstate.Optimizer([("p", param)], chain, lr=0.01)
                optimizer.load_state_dict(saved)
            param.grad = noise((70, 90), step)
            optimizer.step()
        assert torch.equal(torch.get_rng_state(), before)
        return param, optimizer

    (p, straight), (q, resumed) = run(0, None), run(1, 3)
    assert torch.equal(p, q)
    assert_same(straight.state[p], resumed.state[q])
    # Rounded, not kept as they came: both moments are inexact in bf16, and up as often as down.
    exact = nn.Parameter(noise((70, 90), 0))
    reference = optstate.Optimizer([("p", exact)], updates.scale_by_adam(betas=(0.9, 0.999)), lr=0.01)
    for step in range(6):
        exact.grad = noise((70, 90), step)
        reference.step()
    above = straight.state[p]["exp_avg_sq"].float() > reference.state[exact]["exp_avg_sq"]
    assert 0.4 < float(above.float().mean()) < 0.6
