"""Codes against brute force in float64: every code book, every fp16 bit pattern, ties, and tensors without values."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from optstate.kernels import Codebook, dynamic_map, linear_map
from optstate.stores import block_codes

COMMON = settings(deadline=None, derandomize=True, database=None, max_examples=40)
UP, DOWN = torch.tensor(math.inf), torch.tensor(-math.inf)
SMALLEST = 2.0**-149

MAKERS: dict[str, Callable[[], Codebook]] = {
    "signed 8": lambda: Codebook(dynamic_map(True)),
    "unsigned 8": lambda: Codebook(dynamic_map(False), keeps_positive=True),
    "signed 4": lambda: Codebook(dynamic_map(True, bits=4)),
    "linear 4": lambda: Codebook(linear_map(4)),
}
IN_USE = {
    "signed 8": block_codes.SIGNED_8,
    "unsigned 8": block_codes.UNSIGNED_8,
    "signed 4": block_codes.SIGNED_4,
    "linear 4": block_codes.LINEAR_4,
}
NIBBLES = ("signed 4", "linear 4")
every_book = pytest.mark.parametrize("name", IN_USE)


def values_of(name: str) -> Tensor:
    bits = int(name[-1])
    return torch.tensor(linear_map(bits) if name == "linear 4" else dynamic_map(name.startswith("signed"), bits))


def nearest(name: str, x: Tensor) -> Tensor:
    """The nearest value's place, the lower one at equal distance; sums of two neighbours are exact in float64.

    Of the unsigned 8-bit book code 0 is for zero alone.
    """
    values = values_of(name).double()
    code = torch.searchsorted((values[:-1] + values[1:]) / 2, x.double().contiguous())
    return torch.where((x > 0) & (code == 0), 1, code) if name == "unsigned 8" else code


def check(name: str, x: Tensor) -> None:
    want = nearest(name, x)
    got = IN_USE[name].encode(x.clone())
    assert got.dtype == torch.uint8
    wrong = got.long() != want.view(-1)
    assert not wrong.any(), (x.view(-1)[wrong][:5].tolist(), got[wrong][:5].tolist(), want.view(-1)[wrong][:5].tolist())


def bounds_of(name: str) -> Tensor:
    """The midpoints between neighbours, rounded to fp32 either way, and zero."""
    values = values_of(name).double()
    middle = ((values[:-1] + values[1:]) / 2).float()
    return torch.cat([middle, torch.nextafter(middle, UP), torch.nextafter(middle, DOWN), torch.zeros(1)])


def noise(count: int, seed: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def both_signs(name: str, x: Tensor) -> Tensor:
    return torch.cat([x, -x]) if name.startswith("signed") else x


# --- the nearest code ------------------------------------------------------------------------------------------------


@every_book
@COMMON
@given(st.lists(st.floats(-1, 1, width=32, allow_subnormal=True), min_size=1, max_size=50))
def test_any_number_gets_the_nearest_code(name: str, numbers: list[float]) -> None:
    x = torch.tensor(numbers)
    check(name, x if name.startswith("signed") else x.abs())


@every_book
@COMMON
@given(st.integers(0, 99))
def test_random_numbers_of_every_size_get_the_nearest_code(name: str, seed: int) -> None:
    uniform, exponent = noise(2000, seed), -149 * noise(2000, seed + 100)
    check(name, both_signs(name, torch.cat([uniform, torch.exp2(exponent)])))


@every_book
def test_bounds_and_their_neighbours_get_the_nearest_code(name: str) -> None:
    x = both_signs(name, bounds_of(name))
    for _ in range(3):
        check(name, x)
        x = torch.cat([x, torch.nextafter(x, UP), torch.nextafter(x, DOWN)]).clamp(-1, 1)


@every_book
def test_the_lower_code_is_taken_at_equal_distance(name: str) -> None:
    values = values_of(name).double()
    middle = (values[:-1] + values[1:]) / 2
    exact = middle.float().double() == middle
    assert exact.any()
    first = 1 if name == "unsigned 8" else 0  # the bound below its smallest value is 0
    lower = torch.arange(len(middle))[exact]
    codes = IN_USE[name].encode(middle[exact].float()).long()
    assert torch.equal(codes[lower >= first], lower[lower >= first])


@every_book
def test_every_value_is_its_own_code(name: str) -> None:
    values, codes = values_of(name), torch.arange(2 ** int(name[-1])).to(torch.uint8)
    assert torch.equal(IN_USE[name].encode(values.clone()), codes)


@every_book
@COMMON
@given(st.integers(0, 99))
def test_decoded_numbers_keep_their_codes(name: str, seed: int) -> None:
    book = IN_USE[name]
    codes = book.encode(both_signs(name, torch.exp2(-30 * noise(500, seed))))
    read = values_of(name)[codes.long()]
    assert torch.equal(book.encode(read.clone()), codes)
    if name not in NIBBLES:
        assert torch.equal(book.decode(codes), read)


@every_book
def test_zero_has_the_code_of_zero_whatever_its_sign(name: str) -> None:
    codes = IN_USE[name].encode(torch.tensor([0.0, -0.0]))
    # The linear book has no zero: its smallest value.
    assert values_of(name)[codes.long()].tolist() == [1 / 16 if name == "linear 4" else 0.0] * 2


@every_book
def test_beyond_the_ends_come_the_codes_of_the_ends(name: str) -> None:
    """What is held may have overflowed: infinity must not wrap around to the other end."""
    beyond = torch.tensor([1.0000001, 7e4, 3e38, math.inf])
    assert IN_USE[name].encode(beyond).tolist() == [2 ** int(name[-1]) - 1] * 4
    assert IN_USE[name].encode(-beyond).tolist() == [0] * 4


# --- the lookup by fp16 bit pattern ----------------------------------------------------------------------------------


def reach_of_patterns() -> tuple[Tensor, Tensor]:
    """The least and the largest fp32 number that rounds to each finite fp16 number, ascending, one zero."""
    half = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    grid = torch.unique(half[half.isfinite()].double())
    middle = (grid[:-1] + grid[1:]) / 2  # exact in fp32: one bit more than fp16
    ties_down = middle.float().half().double() == grid[:-1]
    last = torch.where(ties_down, middle.float(), torch.nextafter(middle.float(), DOWN))
    least = torch.cat([grid[:1].float(), torch.nextafter(last, UP)])
    largest = torch.cat([last, grid[-1:].float()])
    assert torch.equal(least.half().double(), grid)
    assert torch.equal(largest.half().double(), grid)
    return least, largest


@every_book
def test_at_most_one_bound_lies_within_the_reach_of_a_pattern(name: str) -> None:
    """So one comparison after the lookup is enough: exhaustively, for all 63487 finite fp16 numbers."""
    least, largest = reach_of_patterns()
    assert len(least) == 2 * 31 * 1024 - 1
    assert (nearest(name, largest) - nearest(name, least)).max() == 1


@every_book
def test_codes_are_exact_at_both_ends_of_the_reach_of_every_pattern(name: str) -> None:
    """With one bound at most in between, and the bounds tested by themselves, that is all fp32 numbers."""
    for end in reach_of_patterns():
        check(name, end)


def test_every_positive_number_has_a_code_above_zero_in_the_unsigned_8_bit_book() -> None:
    """All exponents, subnormal ones included, with the least, the largest and random mantissas."""
    mantissas = torch.cat([torch.tensor([0, 1, 0x7FFFFF]), (noise(200, 0) * 0x7FFFFF).int()])
    bits = (torch.arange(127, dtype=torch.int32)[:, None] << 23) + mantissas.int()
    x = bits.view(-1)[bits.view(-1) > 0].view(torch.float32)
    assert x.min() == SMALLEST
    x = torch.cat([x, torch.exp2(torch.arange(-149.0, 1.0))])
    assert (IN_USE["unsigned 8"].encode(x.clone()) >= 1).all()
    check("unsigned 8", x)


def test_a_book_that_does_not_keep_positive_numbers_rounds_them_to_zero() -> None:
    plain = Codebook(dynamic_map(False))
    assert plain.encode(torch.tensor([SMALLEST, 1e-9, 1e-7])).tolist() == [0, 0, 0]


# --- two codes a byte ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9, 255, 4097])
@pytest.mark.parametrize("name", NIBBLES)
def test_nibbles_hold_the_same_codes_first_in_the_upper_half(name: str, count: int) -> None:
    x = 2 * noise(count, count) - 1
    x = x if name.startswith("signed") else x.abs()
    codes = nearest(name, x).tolist()
    packed = IN_USE[name].encode_nibbles(x.clone())
    assert packed.dtype == torch.uint8
    codes += [0] * (count % 2)
    assert packed.tolist() == [16 * upper + lower for upper, lower in zip(codes[::2], codes[1::2], strict=True)]
    read = IN_USE[name].decode_nibbles(packed, count)
    assert torch.equal(read, values_of(name)[codes[:count]])


@pytest.mark.parametrize("name", NIBBLES)
def test_every_byte_is_read_as_two_values(name: str) -> None:
    values = values_of(name)
    read = IN_USE[name].decode_nibbles(torch.arange(256).to(torch.uint8), 512)
    assert torch.equal(read, torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1).view(-1))


def test_8_bit_floats_are_read_as_pytorch_reads_them() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert torch.equal(block_codes.E4M3.decode(codes).nan_to_num(7.0), (codes.float() / 448).nan_to_num(7.0))


# --- tensors without values ------------------------------------------------------------------------------------------


def use_without_values(book: Codebook, device: str, nibbles: bool) -> None:
    """Encode and decode seven numbers that are not there; check what comes out."""
    x = torch.empty(7, device=device)
    codes = book.encode_nibbles(x) if nibbles else book.encode(x)
    read = book.decode_nibbles(codes, 7) if nibbles else book.decode(codes)
    assert (tuple(codes.shape), codes.dtype) == ((4 if nibbles else 7,), torch.uint8)
    assert (tuple(read.shape), read.dtype) == ((7,), torch.float32)
    assert {codes.device.type, read.device.type} == {device}


@pytest.mark.parametrize("first", ["real", "fake"])
@pytest.mark.parametrize("kind", ["fake", "meta"])
@pytest.mark.parametrize("name", MAKERS)
def test_tensors_without_values_have_sizes_and_leave_no_tables_behind(name: str, kind: str, first: str) -> None:
    book, nibbles = MAKERS[name](), name in NIBBLES
    x = 2 * noise(999, 1) - 1
    if first == "real":
        book.encode(x.clone())
    if kind == "meta":
        use_without_values(book, "meta", nibbles)
    else:
        with FakeTensorMode():
            use_without_values(book, "cpu", nibbles)
    codes = book.encode(x.clone())
    assert type(codes) is Tensor
    assert torch.equal(codes.long(), nearest(name, x))
    read = book.decode_nibbles(book.encode_nibbles(x.clone()), 999) if nibbles else book.decode(codes)
    assert torch.equal(read, values_of(name)[codes.long()])


def test_the_tables_cannot_be_changed_by_what_is_read() -> None:
    """`decode` returns new memory, which stores multiply in place."""
    for name in IN_USE:
        before = values_of(name)
        if name in NIBBLES:
            IN_USE[name].decode_nibbles(torch.arange(256).to(torch.uint8), 512).mul_(3)
            again = IN_USE[name].decode_nibbles(torch.arange(16).to(torch.uint8), 32)[1::2]
        else:
            IN_USE[name].decode(torch.arange(256).to(torch.uint8)).mul_(3)
            again = IN_USE[name].decode(torch.arange(256).to(torch.uint8))
        assert torch.equal(again, before)


@pytest.mark.slow
def test_tables_do_not_depend_on_torchs_defaults() -> None:
    """A checkpoint written by a process with another default dtype must decode to the same numbers here."""
    code = (
        "import torch\n"
        "torch.set_default_dtype(torch.bfloat16)\n"
        "torch.set_default_device('meta')\n"
        "from optstate.stores import block_codes as b\n"
        "books = (b.SIGNED_8, b.UNSIGNED_8, b.SIGNED_4, b.LINEAR_4, b.E4M3)\n"
        "x = torch.linspace(0, 1, 64, dtype=torch.float32, device='cpu')\n"
        "print([book.values.double().tolist() for book in books], [book.encode(x).tolist() for book in books])\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    books = (block_codes.SIGNED_8, block_codes.UNSIGNED_8, block_codes.SIGNED_4, block_codes.LINEAR_4, block_codes.E4M3)
    x = torch.linspace(0, 1, 64)
    assert printed.strip() == (
        f"{[book.values.double().tolist() for book in books]} {[book.encode(x).tolist() for book in books]}"
    )
