"""Stochastic rounding to bf16 and fp16, with random bits that are a hash of the place, not a generator's state."""

from __future__ import annotations

import ctypes
import math
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from optstate.kernels import native
from optstate.kernels.addresses import box_of
from optstate.kernels.backend import compiled_functions
from optstate.kernels.recording import RECORDING
from optstate.kernels.regions import global_index
from optstate.spec import Region, is_fake

__all__ = ["Noise", "known_finite", "name_key", "noise_key", "random_bits16", "round_bf16", "round_fp16", "word_key"]

MASK32 = 0xFFFFFFFF


@dataclass(frozen=True)
class Noise:
    """The random bits of one tensor's elements at one step: a hash of (seed, name, step, global element index).

    Nothing has to be saved, replicas agree, and a sharded run rounds exactly as the unsharded one.

    Attributes:
        name: of the parameter, without wrappers' prefixes.
        step: count of the parameter's updates.
        seed: chosen by the user.
        start: flat index, in the part on this device, of the first element at hand.
        region: which part of the tensor this device holds; None if all of it.
    """

    name: str
    step: int
    seed: int = 0
    start: int = 0
    region: Region | None = None

    def at(self, start: int) -> Noise:
        """Return this noise for elements that begin at flat index `start` of the part on this device."""
        return replace(self, start=start)

    def normal(self, count: int, device: torch.device) -> Tensor:
        """Return standard normal numbers for `count` elements from `start` on: fp32 `[count]`.

        Box and Muller's transform of two 16-bit numbers: |x| is at most 4.9.
        """
        radius, angle = (replace(self, name=f"{self.name}/{part}").bits16(count, device).float() for part in "ra")
        radius = radius.add_(32768.5).div_(65536.0).log_().mul_(-2.0).sqrt_()
        return radius.mul_(angle.mul_(math.pi / 32768.0).cos_())

    def bits16(self, count: int, device: torch.device) -> Tensor:
        """Return the random bits of `count` elements from `start` on: int16 `[count]`, uniform over all values."""
        recording = RECORDING.get()
        if recording is not None:
            return _recorded_bits16(recording.key(self.name, self.seed), recording.first_word, count)
        key = noise_key(self.name, self.step, self.seed)
        found = _compiled_bits16(key, self, count) if device.type == "cpu" else None
        if found is not None:
            return found
        if self.region is None:
            return random_bits16(key, self.start, count, device)
        if self.region.start is not None:
            return random_bits16(key, self.region.start + self.start, count, device)
        index = global_index(self.region, self.start, count, device)
        return _scattered_bits16(key, index, math.prod(self.region.whole))


def _compiled_bits16(key: int, noise: Noise, count: int) -> Tensor | None:
    """Return the random bits as compiled loops make them; None where these are not used."""
    functions, region = compiled_functions(), noise.region
    bits = None if functions is None else torch.empty(count, dtype=torch.int16, device="cpu")
    box = None if region is None or region.start is not None else box_of(region)
    scattered = region is not None and region.start is None
    if functions is None or bits is None or type(bits) is not Tensor or (scattered and box is None):
        return None
    start = noise.start + (0 if region is None or region.start is None else region.start)
    where = None if box is None else ctypes.byref(box)
    native.share(functions["fill_random_bits"], (key, where, start, bits.data_ptr()), count, native.TILE, count)
    return bits


def noise_key(name: str, step: int, seed: int = 0) -> int:
    """Return the unsigned 32-bit number that stands for seed, name and step in the hash."""
    return _mix(name_key(name, seed) ^ (step & MASK32))


@lru_cache(maxsize=1 << 14)
def name_key(name: str, seed: int = 0) -> int:
    """Return the part of `noise_key` that is the same at every step, for devices that count steps themselves."""
    return _mix(_mix(zlib.crc32(name.encode())) ^ (seed & MASK32))


def random_bits16(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """Return int16 `[count]`, uniform over all values, of which element i depends on `key` and `start + i` alone.

    Two neighbours are the halves of one 32-bit hash. The hash is the finalizer of MurmurHash3, a bijection that
    spreads every input bit.
    """
    first = start // 2
    words = (start + count + 1) // 2 - first
    parts = [_hash_words(key, lo, hi, device) for lo, hi in _same_high_word(first, first + words)]
    hashed = parts[0] if len(parts) == 1 else torch.cat(parts)
    return hashed.view(torch.int16)[start - 2 * first :][:count]


def _scattered_bits16(key: int, index: Tensor, end: int) -> Tensor:
    """Return what `random_bits16` gives the elements of these flat indices, int64 and below `end`: int16."""
    word = index >> 1
    low = (word & MASK32).to(torch.int32)
    hashed = _hashed(key, 0, low.clone())
    for high in range(1, (max(end - 1, 0) >> 33) + 1):
        hashed = torch.where(word >> 32 == high, _hashed(key, high, low.clone()), hashed)
    return hashed.view(torch.int16).view(-1, 2).gather(1, (index & 1).view(-1, 1)).view(-1)


def _recorded_bits16(key: Tensor, first_word: Tensor, count: int) -> Tensor:
    """Return what `random_bits16` gives below 2**33, of a key that is `word_key` and the index of the first word."""
    words = torch.arange((count + 1) // 2, dtype=torch.int32, device=key.device).add_(first_word)
    return _finalized(words.bitwise_xor_(key)).view(torch.int16)[:count]


def word_key(key: int) -> int:
    """Return the int32 number that is mixed into the lower 32 bits of an index, where its upper 32 bits are zero."""
    return _signed(_mix(key))


def known_finite(value: Tensor) -> bool:
    """Return whether all elements are finite, or False where the answer would make the host wait for a device."""
    return value.device.type == "cpu" and not is_fake(value) and bool(value.sum().isfinite())


def round_bf16(value: Tensor, bits: Tensor) -> Tensor:
    """Round fp32 numbers stochastically to numbers that bf16 holds exactly.

    The random bits are added below bf16's last place, and what lies below is cut off. Infinities stay; NaN is restored,
    as adding to its bits can wrap around to zero.

    Args:
        value: fp32, overwritten.
        bits: int16 random bits in the shape of `value`.

    Returns:
        `value` itself.
    """
    nan = None if known_finite(value) else value.isnan()
    value.view(torch.int32).add_(bits).add_(1 << 15).bitwise_and_(-0x10000)
    return value if nan is None else value.masked_fill_(nan, math.nan)


def round_fp16(value: Tensor, bits: Tensor) -> Tensor:
    """Round fp32 numbers stochastically to numbers that fp16 holds exactly.

    Below fp16's smallest normal number, 2**-14, its numbers are 2**-24 apart. Infinities and NaN stay.

    Args:
        value: fp32, kept.
        bits: int16 random bits in the shape of `value`.

    Returns:
        fp32, a new tensor.
    """
    uniform = bits.to(torch.int32).add_(1 << 15)
    normal = (value.view(torch.int32) + (uniform >> 3)).bitwise_and_(-0x2000).view(torch.float32)
    tiny = torch.floor(value * 2.0**24 + (uniform >> 3) * 2.0**-13) * 2.0**-24
    rounded = torch.where(value.abs() < 2.0**-14, tiny, normal)
    return torch.where(value.isfinite(), rounded, value)


def _same_high_word(lo: int, hi: int) -> list[tuple[int, int]]:
    """Split a range of 64-bit indices where their upper 32 bits change."""
    cut = ((lo >> 32) + 1) << 32
    return [(lo, hi)] if hi <= cut else [(lo, cut), *_same_high_word(cut, hi)]


def _hash_words(key: int, lo: int, hi: int, device: torch.device) -> Tensor:
    """Return the int32 hashes of the indices lo .. hi - 1, which share their upper 32 bits."""
    return _hashed(key, lo >> 32, torch.arange(hi - lo, dtype=torch.int32, device=device).add_(_signed(lo & MASK32)))


def _hashed(key: int, high: int, x: Tensor) -> Tensor:
    """Return the hashes of 64-bit indices: `high` holds their upper 32 bits, int32 `x`, overwritten, their lower."""
    return _finalized(x.bitwise_xor_(_signed(_mix(key ^ high))))


def _finalized(x: Tensor) -> Tensor:
    """Mix int32 numbers, which are overwritten."""
    shifted = torch.empty_like(x)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        # The shift carries the sign along: the mask makes it the unsigned one.
        torch.bitwise_right_shift(x, shift, out=shifted).bitwise_and_((1 << (32 - shift)) - 1)
        x.bitwise_xor_(shifted)
        if factor != 1:
            x.mul_(_signed(factor))
    return x


def _mix(x: int) -> int:
    """Return MurmurHash3's finalizer of one unsigned 32-bit Python number."""
    x &= MASK32
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK32
    return x ^ (x >> 16)


def _signed(x: int) -> int:
    """Return the int32 number with the same bits as an unsigned 32-bit number."""
    return x - (1 << 32) if x >= 1 << 31 else x
