"""Text for the language-model examples: bytes in a fixed order, and batches that depend on the step alone."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Corpus", "UsageError", "read_corpus"]

CAP_BYTES = 4 * 2**20
"""Bytes after which reading stops: far more than the examples train on, and read in a moment."""

VALIDATION_SHARE = 0.05

LEFT_OUT = {
    *("test", "tests", "idlelib", "turtledemo", "lib2to3"),  # tests and applications
    *("site-packages", "dist-packages", "ensurepip", "__pycache__"),  # not the standard library's own text
    *("encodings", "pydoc_data"),  # tables and generated text
}
"""Folders of the standard library that are not read."""


class UsageError(Exception):
    """Raised for an argument that cannot be used, with a message of one line."""


@dataclass(frozen=True)
class Corpus:
    """A text as bytes: the last 5 % are for validation.

    train, valid: uint8 `[bytes]`. fingerprint: a hash of both, which a checkpoint remembers.
    """

    train: Tensor
    valid: Tensor
    source: str
    fingerprint: str

    def set_aside(self) -> tuple[Corpus, Corpus]:
        """Divide the text in three parts instead of two, to choose hyper-parameters on text that nothing else sees.

        Returns:
            Two corpora with one training text, which is this one's without its end. The first has that end, as many
            bytes as this corpus validates on, for its validation text; the second has this corpus's own.
        """
        cut = len(self.train) - len(self.valid)
        train, selection = self.train[:cut], self.train[cut:]
        return self._with(train, selection), self._with(train, self.valid)

    def _with(self, train: Tensor, valid: Tensor) -> Corpus:
        digest = hashlib.sha256(train.numpy())
        digest.update(valid.numpy())
        return Corpus(train, valid, self.source, digest.hexdigest())

    def description(self) -> dict[str, str | int]:
        """Return where the text comes from, its hash and the bytes of its parts, for a report."""
        sizes = {"training_bytes": len(self.train), "validation_bytes": len(self.valid)}
        return {"corpus": self.source, "corpus_sha256": self.fingerprint, **sizes}

    def batch(self, step: int, size: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets `[size, length]` of one step, from random places of the training text.

        A generator of its own, seeded by run and step, draws them: a resumed run sees what the uninterrupted one
        would have seen, and no other random number in the program matters.
        """
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(len(self.train) - length, (size,), generator=generator)
        return _windows(self.train, starts, length)

    def validation(self, count: int, length: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets `[count, length]`, evenly spread over the validation text, always the same."""
        return _windows(self.valid, torch.linspace(0, len(self.valid) - length - 1, count).long(), length)


def read_corpus(path: Path | None, context: int) -> Corpus:
    """Read a file, or all text files of a folder; by default the sources of Python's standard library.

    Files come in the order of their paths, and at most `CAP_BYTES` are read. Bytes are taken as they are; files
    with a zero byte are not text and are passed over, and so are hidden ones.

    Raises:
        UsageError: if there is nothing at the path, or not enough text for one window of `context` bytes in each part.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if path is None else path
    try:
        text = _read(_standard_library(root) if path is None else _text_files(root))
    except OSError as error:
        raise UsageError(f"cannot read the corpus {root}: {error.strerror}") from None
    cut = len(text) - int(len(text) * VALIDATION_SHARE)
    shortest = min(cut, len(text) - cut)
    if shortest < context + 1:
        needed = int((context + 2) / VALIDATION_SHARE)
        raise UsageError(f"the corpus {root} has {len(text)} bytes of text: at least {needed} are needed")
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    source = "Python's standard library" if path is None else str(path)
    return Corpus(data[:cut], data[cut:], source, hashlib.sha256(text).hexdigest())


def _standard_library(root: Path) -> Iterable[Path]:
    return (p for p in _sorted(root, "*.py") if not LEFT_OUT.intersection(p.relative_to(root).parts))


def _text_files(root: Path) -> Iterable[Path]:
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise UsageError(f"there is no corpus at {root}: give a file or a folder")
    return (p for p in _sorted(root, "*") if not any(part.startswith(".") for part in p.relative_to(root).parts))


def _sorted(root: Path, pattern: str) -> list[Path]:
    return sorted((p for p in root.rglob(pattern) if p.is_file()), key=lambda p: p.relative_to(root).as_posix())


def _read(files: Iterable[Path]) -> bytes:
    text = bytearray()
    for file in files:
        with file.open("rb") as stream:
            content = stream.read(CAP_BYTES - len(text))
        if b"\0" not in content:
            text += content
        if len(text) >= CAP_BYTES:
            break
    return bytes(text)


def _windows(data: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    window = data[starts[:, None] + torch.arange(length + 1)].long()
    return window[:, :-1], window[:, 1:]
