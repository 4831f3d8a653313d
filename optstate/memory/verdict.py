"""Judge whether an allocated peak fits a GPU: what the allocator and the driver add, and how large GPUs are."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass

from optstate.memory.errors import QuestionError

__all__ = [
    "CONTEXT",
    "FITS",
    "FRAGMENTATION",
    "NO",
    "TIGHT",
    "UNKNOWN",
    "Gpu",
    "device_bytes",
    "find_gpu",
    "judge_peak",
    "reserved_bytes",
]

GIB = 2**30

FITS, TIGHT, NO, UNKNOWN = "fits", "tight", "no", "unknown"

FRAGMENTATION = 1.14
"""Reserved bytes per allocated byte: 15.97 GB for 13.99 GB in torchtune's measurement (pytorch/torchtune#527)."""

CONTEXT = (300_000_000, 1_000_000_000)
"""Bytes that a process takes on a GPU besides PyTorch's allocator, least and most: 0.3 to 1 GB for the CUDA context."""

CAPACITY = {
    "RTX 3090": 23.5,
    "RTX 4090": 23.5,
    "RTX 5090": 31.3,
    "RTX A6000": 47.4,
    "A10": 22.0,
    "A10G": 22.0,
    "A40": 44.3,
    "A100-40": 39.3,
    "A100-80": 79.1,
    "H100-80": 79.1,
    "H100-94": 93.0,
    "H200": 139.7,
    "L4": 22.0,
    "L40": 44.3,
    "L40S": 44.3,
    "T4": 14.5,
    "V100-16": 15.7,
    "V100-32": 31.7,
    "MI250": 63.5,
    "MI250X": 63.5,
    "MI300X": 191.6,
}
"""GiB that PyTorch reports as the total capacity of these GPUs in its out-of-memory messages, the least seen, rounded
down: less than the vendors' 24, 32, 80 ... GB, since the driver and error correction take their part. MI250:
one of its two dies, which are devices of their own."""

UNITS = {"mib": 2**20, "gib": GIB, "tib": 2**40, "mb": 10**6, "gb": 10**9, "tb": 10**12, "g": GIB, "": GIB}


@dataclass(frozen=True)
class Gpu:
    """A GPU; `nbytes` is the memory that a process can have, the context of the driver included."""

    name: str
    nbytes: int


def find_gpu(text: str | float) -> Gpu:
    """Find the GPU of a name ("RTX 4090", "a100-80"), or any of a size ("24GiB", "24GB"; 24 is in GiB).

    Raises:
        QuestionError: if it is neither, naming the nearest.
    """
    if isinstance(text, int | float) and not isinstance(text, bool):
        return _of_size(f"{text:g} GiB", float(text) * GIB)
    if not isinstance(text, str):
        raise QuestionError(f"gpu {text!r} is neither a name nor a size: give 24GiB or RTX4090")
    named = {_key(name): name for name in CAPACITY}
    wanted = _key(text)
    if wanted in named:  # before sizes: 4090 is a card
        return _of_size(named[wanted], CAPACITY[named[wanted]] * GIB)
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if size and size[2] in UNITS:
        unit = "" if size[2] else " GiB"
        return _of_size(f"{text.strip()}{unit}", float(size[1]) * UNITS[size[2]])
    several = [name for name in CAPACITY if "-" in name and _key(name.partition("-")[0]) == wanted]
    near = [named[key] for key in difflib.get_close_matches(wanted, named, n=1)]
    hint = f"did you mean {' or '.join(several or near)}?" if several or near else "give a size such as 24GiB"
    raise QuestionError(f"gpu {text!r} is neither a known name nor a size; {hint}")


def _of_size(name: str, nbytes: float) -> Gpu:
    if not (math.isfinite(nbytes) and nbytes >= 1):
        raise QuestionError(f"gpu {name!r} has no memory: give a size such as 24GiB")
    return Gpu(name, int(nbytes))


def _key(name: str) -> str:
    """Return a name as it is compared: what people write around the model's number left out."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    return re.sub(r"^(nvidia|amd|instinct|tesla|geforce|rtx)+", "", re.sub(r"(gib|gb)$", "", plain))


def reserved_bytes(allocated: int) -> int:
    """Return the bytes that PyTorch's caching allocator reserves for a peak: assumed, as this depends on the run."""
    return math.ceil(allocated * FRAGMENTATION)


def device_bytes(allocated: int) -> tuple[int, int]:
    """Return the least and the most bytes that the GPU shows as used.

    The least is without fragmentation and with a small context, the most with fragmentation and a large context.
    """
    least, most = CONTEXT
    return allocated + least, reserved_bytes(allocated) + most


def judge_peak(allocated: int, memory: int) -> str:
    """Return whether a peak fits into `memory` bytes.

    "fits" if the most that the peak can become does, "no" if not even the least does, "tight" if it depends.
    """
    least, most = device_bytes(allocated)
    if most <= memory:
        return FITS
    return TIGHT if least <= memory else NO
