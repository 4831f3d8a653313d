"""Saving and loading optimizer state beside the same bytes written and read plainly, and beside safetensors."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from shapes import VOCABULARY, llama_shapes
from timing import Action, interleaved
from torch import Tensor, nn

import optstate
from optstate.checkpoint.files.safetensors_header import read_header
from optstate.checkpoint.files.tensor_bytes import bytes_of
from optstate.recipes import AdamW

SAVE, LOAD = "optstate.save", "optstate.load"
PLAIN_WRITE, PLAIN_READ = "plain write + fsync", "plain read"
THEIR_SAVE, THEIR_SAVE_SYNCED = "safetensors save_file", "safetensors save_file + fsync"
THEIR_LOAD, THEIR_LOAD_COPIED = "safetensors load_file", "safetensors load_file + copy"

PIECE = 8 << 20
SLOTS = ("exp_avg", "exp_avg_sq")
WIDTHS = ((4096, 13e9), (1536, 1.6e9), (768, 0.8e9), (384, 0.0))
"""The width of a model by the least number of bytes of its fp32 AdamW state."""

Seconds = dict[str, list[float]]


def llama_of(nbytes: float) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a LLaMA-like model for which AdamW keeps about `nbytes` bytes in fp32."""
    width = next(width for width, least in WIDTHS if nbytes >= least)
    hidden = -(-8 * width // 3 // 256) * 256
    per_layer = 4 * width * width + 3 * width * hidden + 2 * width
    layers = max(1, round((nbytes / 8 - VOCABULARY * width) / per_layer))
    return llama_shapes(width, hidden, layers)


def one_matrix_of(nbytes: float) -> dict[str, tuple[int, ...]]:
    """Return the shape of a single parameter for which AdamW keeps about `nbytes` bytes in fp32."""
    return {"matrix": (max(1, round(nbytes / 8 / 4096)), 4096)}


def adamw_of(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> AdamW:
    """Build an AdamW with moments of likely size, over parameters that are one number each, repeated without memory."""
    params = [(name, nn.Parameter(torch.zeros(1).expand(shape))) for name, shape in shapes.items()]
    optimizer = AdamW(params)
    generator = torch.Generator().manual_seed(seed)
    for _, param in params:
        state = optimizer.state[param]
        state["exp_avg"].normal_(0, 1e-3, generator=generator)
        state["exp_avg_sq"].exponential_(1e6, generator=generator)
        state["step"] = 1000
    return optimizer


def tensors_of(optimizer: AdamW) -> dict[str, Tensor]:
    """Return the moments by their names in the file, in its order."""
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    tensors = {f"{n}/{slot}": optimizer.state[p][slot] for n, p in zip(names, params, strict=True) for slot in SLOTS}
    return dict(sorted(tensors.items()))


def drop_from_cache(path: Path) -> None:
    """Make the system forget a file's pages, so that the next read comes from the disk, or what holds it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # dirty pages stay otherwise
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def measure_saving(optimizer: AdamW, folder: Path, rounds: int) -> Seconds:
    """Measure wall-clock seconds of every way to write the state, each into a file that does not exist yet."""
    tensors = tensors_of(optimizer)
    ours, plain, theirs = folder / "opt.safetensors", folder / "plain", folder / "theirs.safetensors"
    optstate.save(optimizer, ours)
    with ours.open("rb") as file:
        header = file.read(read_header(ours).data_start)
    ways = {
        PLAIN_WRITE: lambda: write_plainly(plain, header, tensors),
        SAVE: lambda: optstate.save(optimizer, ours),
        THEIR_SAVE_SYNCED: lambda: (save_file(tensors, theirs), synchronize(theirs)),
        THEIR_SAVE: lambda: save_file(tensors, theirs),
    }

    def remove() -> None:
        for path in ours, plain, theirs:
            path.unlink(missing_ok=True)

    try:
        actions = {name: Action(remove, way) for name, way in ways.items()}
        return interleaved(actions, rounds, clock=time.perf_counter)
    finally:
        remove()


def write_plainly(path: Path, header: bytes, tensors: Mapping[str, Tensor]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        for view in (memoryview(header), *map(bytes_of, tensors.values())):
            for start in range(0, len(view), PIECE):
                piece = view[start : start + PIECE]
                while piece:
                    piece = piece[os.write(descriptor, piece) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def synchronize(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def measure_loading(optimizer: AdamW, path: Path, rounds: int, cold: bool) -> Seconds:
    """Measure wall-clock seconds of every way to load a saved file, from a cold page cache or a warm one."""
    tensors = tensors_of(optimizer)
    start = read_header(path).data_start
    ways = {
        PLAIN_READ: lambda: read_plainly(path, start, tensors),
        LOAD: lambda: optstate.load(optimizer, path),
        THEIR_LOAD_COPIED: lambda: copy_over(load_file(path), tensors),
        THEIR_LOAD: lambda: load_file(path),
    }
    prepare = (lambda: drop_from_cache(path)) if cold else (lambda: None)
    actions = {name: Action(prepare, way) for name, way in ways.items()}
    return interleaved(actions, rounds, clock=time.perf_counter)


def read_plainly(path: Path, start: int, tensors: Mapping[str, Tensor]) -> None:
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        for view in map(bytes_of, tensors.values()):
            while view:
                view = view[file.readinto(view) :]


def copy_over(loaded: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(loaded[name])


def check_loading(optimizer: AdamW, path: Path) -> None:
    """Raise RuntimeError unless a load brings back what was saved."""
    tensors = tensors_of(optimizer)
    before = {name: checksum(tensor) for name, tensor in tensors.items()}
    for tensor in tensors.values():
        tensor.zero_()
    optstate.load(optimizer, path)
    different = [name for name, tensor in tensors.items() if checksum(tensor) != before[name]]
    if different:
        raise RuntimeError(f"{len(different)} tensors differ after a load, such as {different[0]}; nothing was timed")


def checksum(tensor: Tensor) -> int:
    return int(tensor.view(torch.int32).sum(dtype=torch.int64))
