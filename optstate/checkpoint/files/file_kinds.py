"""What a file is by its content, and opening one without waiting for a pipe."""

from __future__ import annotations

import os
import stat
from typing import BinaryIO

from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.opened_file import Opened, View, opened_at
from optstate.text import shown

__all__ = [
    "FOLDER",
    "HINTS",
    "SAFETENSORS",
    "UNKNOWN",
    "cannot_open",
    "identify",
    "kind_of",
    "open_file",
    "permissions_of",
    "read_bytes",
    "read_whole",
    "size_of",
    "source_of",
    "special_kind",
]

MAX_HEADER = 100_000_000  # bytes; the safetensors format's own limit


SAFETENSORS = "a safetensors file"
EMPTY = "an empty file"
FOLDER = "a folder"
TORCH_ZIP = "a file written by torch.save"
ZIP = "a zip archive"
TORCH_OLD = "a file written by torch.save before torch 1.6"
PICKLE = "a pickle"
GGUF = "a GGUF file"
LFS = "a git-LFS pointer"
HTML = "an HTML page"
JSON = "a JSON file"
GZIP = "a gzip archive"
UNKNOWN = "a file of unknown kind"

HINTS = {
    EMPTY: "the write or the download was cut short",
    TORCH_ZIP: "or what torch.distributed.checkpoint's HuggingFaceStorageWriter makes of values that are not tensors",
    GGUF: "GGUF holds model weights, no optimizer state",
    LFS: "the file itself was not downloaded: run git lfs pull",
    HTML: "a download gave a web page instead of the file: look at it, and download again",
    JSON: "for a sharded set give its folder or its *.index.json",
}

# The first bytes of what torch.save wrote before its zip format: a pickled magic number.
_TORCH_OLD_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def identify(path: str | os.PathLike[str]) -> str:
    """Return the kind of a file, by its content and never by its name: "a safetensors file", "a git-LFS pointer" ...

    Raises CheckpointError if it cannot be opened.
    """
    special = special_kind(path)
    if special is not None:
        return special
    with open_file(path) as file:
        return kind_of(read_bytes(path, file, 512), file.opened.size)


def kind_of(first: bytes, size: int) -> str:
    """Return the kind of a file by its first 512 bytes and its size."""
    if size == 0:
        return EMPTY
    length = int.from_bytes(first[:8], "little")
    # Before the pickles: a header of 640 bytes begins with 0x80 0x02 as a pickle of protocol 2 does.
    if len(first) > 8 and length <= min(MAX_HEADER, size - 8) and first[8:].lstrip(b" \t\r\n").startswith(b"{"):
        return SAFETENSORS
    if first.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return TORCH_ZIP if b"/data.pkl" in first or b"/byteorder" in first or b"/version" in first else ZIP
    if first.startswith(_TORCH_OLD_MAGIC):
        return TORCH_OLD
    if first[:1] == b"\x80" and first[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and first[2:8].strip(b"\0"):
        return PICKLE
    if first.startswith(b"GGUF"):
        return GGUF
    if first.startswith(b"version https://git-lfs.github.com/spec/"):
        return LFS
    if first.startswith(b"\x1f\x8b\x08"):
        return GZIP
    text = first.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head")):
        return HTML
    if b"\0" not in first and text.startswith((b'{"', b"{\n", b"{ ", b"{\r", b"{}", b"[")):
        return JSON
    return UNKNOWN


def special_kind(path: str | os.PathLike[str]) -> str | None:
    """Return what a path leads to if that is no regular file: asked before opening, since opening a pipe would wait."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise cannot_open(path, error) from error
    if stat.S_ISREG(mode):
        return None
    kinds = {stat.S_IFDIR: FOLDER, stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def cannot_open(path: str | os.PathLike[str], error: Exception) -> CheckpointError:
    """Return the CheckpointError for an error on the way to a file's bytes."""
    if isinstance(error, FileNotFoundError):
        try:
            target = os.readlink(path)
        except (OSError, ValueError):
            return CheckpointError(path, "no such file")
        return CheckpointError(path, f"a symbolic link to '{shown(target)}', which does not exist")
    if isinstance(error, OSError):
        return CheckpointError(path, f"cannot be read: {error.strerror or error}")
    return CheckpointError(path, f"not a possible path: {error}")


def open_file(path: str | os.PathLike[str]) -> View:
    """Return a regular file for reading, unbuffered; the caller has ruled out the special ones.

    It is opened once in a `reading`: all that is read there of one path is of one version of the file.
    """
    try:
        return View(opened_at(path))
    except (OSError, ValueError) as error:
        raise cannot_open(path, error) from error


def permissions_of(path: str | os.PathLike[str]) -> int:
    """Who may do what with a file; its owner alone, if it is not there any more."""
    try:
        return stat.S_IMODE(os.stat(path).st_mode) & 0o777
    except OSError:
        return stat.S_IRUSR | stat.S_IWUSR


def source_of(file: BinaryIO | View) -> Opened:
    """Return what `open_file` opened, also where a buffer lies between."""
    view = getattr(file, "raw", file)
    assert isinstance(view, View)
    return view.opened


def size_of(file: BinaryIO | View) -> int:
    """Bytes in a file that `open_file` opened, as it was then."""
    return source_of(file).size


def read_whole(path: str | os.PathLike[str], most: int) -> bytes:
    """All bytes of a small file.

    Raises:
        CheckpointError: if it has more than `most`, or cannot be read.
    """
    with open_file(path) as file:
        size = file.opened.size
        if size > most:
            raise CheckpointError(path, f"it has {size} bytes; at most {most} are read")
        return read_bytes(path, file, size)


def read_bytes(path: str | os.PathLike[str], file: BinaryIO | View, count: int) -> bytes:
    """`count` bytes, or fewer at the end of the file."""
    parts = []
    try:
        while count > 0 and (part := file.read(count)):
            parts.append(part)
            count -= len(part)
    except OSError as error:
        raise cannot_open(path, error) from error
    return b"".join(parts)
