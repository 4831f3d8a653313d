"""`LowRank` and `SignRank1`: what they keep, in one piece and in parts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import optstate
from optstate import stores, testing, updates
from optstate.kernels import Noise
from optstate.spec import ParamSpec
from optstate.stores import LowRank, SignRank1, Store
from optstate.stores.registry import parse_store
from optstate.testing.devices import CutParameter, noise


@pytest.mark.parametrize("store", [LowRank(4), SignRank1()], ids=str)
def test_the_laws_of_stores_hold(store: Store) -> None:
    """Those that are fast; `tests/testing/test_own_parts.py` asks for all of them."""
    slow = {"no value is read", "resume", "fused is stepped", "file", "any shape"}
    testing.check_store(store, laws=[law for law in testing.LAWS_OF_STORES if law not in slow])


def kept(store: Store, value: torch.Tensor, signed: bool = True) -> torch.Tensor:
    """Return what a store reads of a value that it has kept."""
    spec = ParamSpec(name="p", shape=tuple(value.shape), dtype=value.dtype)
    fitted, _ = store.resolve(spec, signed)
    fields = {name: torch.zeros(f.shape, dtype=f.dtype) for name, f in fitted.fields(spec, signed).items()}
    fitted.write(fields, value.clone(), Noise("p/m", 3))
    return fitted.read(fields, spec.shape)


def test_a_matrix_of_the_rank_comes_back() -> None:
    """1e-5 of the largest: fp32 products, and a basis that is orthonormal to 1e-7."""
    value = noise((50, 3), 1) @ noise((3, 70), 2)
    found = kept(LowRank(3), value)
    torch.testing.assert_close(found, value, rtol=0, atol=1e-5 * float(value.abs().max()))
    less = kept(LowRank(5), value)
    torch.testing.assert_close(less, value, rtol=0, atol=1e-5 * float(value.abs().max()))


def test_what_is_left_out_is_near_the_best_of_its_rank() -> None:
    """Halko, Martinsson and Tropp, theorem 10.5: for singular values that halve, the mean error is a few times that."""
    u, v = (torch.linalg.qr(noise((40, 40), seed))[0] for seed in (1, 2))
    value = (u * 0.5 ** torch.arange(40)) @ v
    error = (kept(LowRank(6), value) - value).norm()
    best = 0.5**6 * (1 - 0.25**34) ** 0.5 / 0.75**0.5
    assert best * 0.999 <= error < 6 * best


def test_negative_elements_of_a_second_moment_become_their_mean_magnitude() -> None:
    value = noise((30, 20), 1).square()
    product, read = kept(LowRank(2), value), kept(LowRank(2), value, signed=False)
    lacking = product < 0
    assert lacking.any()
    torch.testing.assert_close(read[~lacking], product[~lacking], rtol=0, atol=0)
    wanted = product[lacking].abs().mean().expand(int(lacking.sum()))
    torch.testing.assert_close(read[lacking], wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("store", [LowRank(2), SignRank1()], ids=str)
@pytest.mark.parametrize("signed", [True, False])
def test_zero_stays_zero(store: Store, signed: bool) -> None:
    assert not kept(store, torch.zeros(12, 10), signed).any()


def test_signs_come_back_and_magnitudes_are_a_product() -> None:
    value = noise((3, 8, 10), 1)
    value[0, 2], value[:, :, 3] = 0.0, 0.0
    found = kept(SignRank1(), value)
    assert torch.equal(found > 0, value > 0)
    size = value.abs().double()
    wanted = size.sum(-1, keepdim=True) * size.sum(-2, keepdim=True) / size.sum((-1, -2), keepdim=True)
    torch.testing.assert_close(found.abs().double(), wanted, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(kept(SignRank1(), value.square(), False), kept(stores.Factored(), value.square(), False))


def test_a_signed_momentum_takes_an_eighth_of_a_byte() -> None:
    spec = ParamSpec(name="p", shape=(4096, 4096), dtype=torch.bfloat16)
    nbytes = sum(field.nbytes for field in SignRank1().fields(spec, True).values())
    assert nbytes == 4096 * 4096 // 8 + 4 * 8192
    assert nbytes / spec.numel < 0.13


CHAINS: dict[str, Callable[[Store], optstate.Chain]] = {
    "momentum": lambda store: optstate.chain(updates.momentum(store, nesterov=True)),
    "second moment": lambda store: optstate.chain(updates.scale_by_rms(store, eps=1e-6)),
    "adam": lambda store: optstate.chain(updates.scale_by_adam(store, store, eps=1e-4)),
}


@pytest.mark.parametrize("shape", [(40, 24), (6, 40)], ids=str)
@pytest.mark.parametrize("parts", [(2, 1), (4, 1), (1, 3), (2, 2), (5, 1)], ids=str)
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("store", [LowRank(3), SignRank1()], ids=str)
def test_parts_are_kept_as_the_whole(store: Store, chain: str, parts: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """fp64: parts differ from the whole by the order of sums."""
    recipe = lambda p: optstate.Optimizer(p, CHAINS[chain](store), lr=1e-2)  # noqa: E731
    cut = CutParameter(recipe, shape, parts, torch.float64)
    if cut.plan.stores != next(iter(cut.optimizer.plan())).stores:
        assert isinstance(store, SignRank1)  # a byte of signs would be on two devices
        return
    cut.train(5)
    param, _ = cut.joined()
    torch.testing.assert_close(param, cut.whole.detach(), rtol=0, atol=1e-8)


def test_signs_that_devices_would_cut_within_a_byte_are_kept_in_full() -> None:
    recipe = lambda p: optstate.Optimizer(p, updates.momentum(SignRank1()), lr=1e-2)  # noqa: E731
    cut = CutParameter(recipe, (6, 10), (1, 2))
    assert cut.plan.stores == {"exp_avg": "Full()"}
    assert "within a byte of 8 signs" in cut.plan.notes[0]


def test_only_small_sums_leave_a_device() -> None:
    """Two thin matrices and a Gram matrix per moment, never the parameter: rounds of requests, counted."""
    recipe = lambda p: optstate.Optimizer(p, updates.momentum(LowRank(3)), lr=1e-2)  # noqa: E731
    cut = CutParameter(recipe, (40, 24), (2, 2))
    cut.train(2)
    assert cut.rounds == [3, 3]  # the range of the sketch, its Gram matrix, the other factor


@pytest.mark.parametrize("words", ["LowRank()", "LowRank(rank=7)", "LowRank(signed=False)", "SignRank1()", "lowrank"])
def test_words_build_the_store(words: str) -> None:
    store = parse_store(words)
    assert parse_store(str(store)) == store


@pytest.mark.parametrize("rank", [0, -1, 2.0, True, "4"])
def test_a_rank_that_cannot_be_is_refused(rank: object) -> None:
    with pytest.raises(ValueError, match="give a whole number, 1 at least"):
        LowRank(rank)  # type: ignore[arg-type]
