"""Converting optimizer state: time beside reading the source, and peak memory in a process of its own.

As a script, converts and prints how far memory rose: python checkpoint_convert.py SOURCE TARGET SLOTS THREADS
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from checkpoint_io import PIECE, Seconds, adamw_of, drop_from_cache
from timing import Action, interleaved

import optstate
from optstate import checkpoint

READ = "plain read"
CONVERSIONS: dict[str, dict[str, str]] = {
    "to Block8, both moments": {"exp_avg": "block8", "exp_avg_sq": "block8"},
    "to Factored, second moment": {"exp_avg_sq": "factored"},
}
CACHES = ("cold", "warm")
STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def convert(source: Path, target: Path, slots: Mapping[str, str]) -> None:
    checkpoint.convert(source, target, slots=slots, allow_lossy=True, overwrite=True)


def measure_converting(source: Path, folder: Path, rounds: int) -> Seconds:
    """Measure wall-clock seconds of reading and of each conversion, each from a cold page cache and from a warm one.

    A conversion opens the source, writes a new file to the disk (fsync) and measures what is lost.
    """
    target = folder / "converted.safetensors"
    buffer = bytearray(PIECE)

    def cold() -> None:
        target.unlink(missing_ok=True)
        drop_from_cache(source)

    def warm() -> None:
        target.unlink(missing_ok=True)
        read(source, buffer)

    actions = {}
    for cache, prepare in zip(CACHES, (cold, warm), strict=True):
        actions[f"{READ}, {cache}"] = Action(prepare, lambda: read(source, buffer))
        for name, slots in CONVERSIONS.items():
            actions[f"{name}, {cache}"] = Action(prepare, lambda slots=slots: convert(source, target, slots))
    try:
        return interleaved(actions, rounds, clock=time.perf_counter)
    finally:
        target.unlink(missing_ok=True)


def read(path: Path, buffer: bytearray) -> None:
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def can_measure_peak() -> bool:
    """Return whether the system tells a process's peak of memory and lets it be reset: Linux does."""
    return CLEAR.exists() and "VmHWM:" in STATUS.read_text()


def peak_of_converting(source: Path, folder: Path, slots: Mapping[str, str]) -> int:
    """Measure by how many bytes a process's memory rises in a conversion that is not the process's first."""
    target = folder / "converted.safetensors"
    command = [sys.executable, __file__, str(source), str(target), json.dumps(slots), str(torch.get_num_threads())]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    target.unlink()
    return int(done.stdout)


def main(source: str, target: str, slots: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder, "small.safetensors")
        optstate.save(adamw_of({"matrix": (128, 128)}), small)
        convert(small, Path(folder, "converted.safetensors"), json.loads(slots))
    CLEAR.write_text("5")  # the peak begins at what is there now
    before = kilobytes("VmRSS:")
    convert(Path(source), Path(target), json.loads(slots))
    print((kilobytes("VmHWM:") - before) * 1024)


def kilobytes(key: str) -> int:
    return int(STATUS.read_text().split(key)[1].split()[0])


if __name__ == "__main__":
    main(*sys.argv[1:])
