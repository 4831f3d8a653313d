"""Write a safetensors file one tensor at a time, atomically, and with the same bytes for the same input.

The library's own `save_file` needs all tensors at once, shuffles the metadata, leaves every file readable by its owner
only and puts a regular file in the place of a symbolic link (safetensors 0.8; issues #584 and #782). The layout here
is the library's, so that a file with one metadata key is byte for byte the one it would write.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from optstate.checkpoint.container import BITS, MAX_HEADER, METADATA
from optstate.checkpoint.errors import CheckpointError, shown

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["NewEntry", "layout", "write"]

_RANK = {dtype: rank for rank, dtype in enumerate(BITS)}


@dataclass(frozen=True, slots=True)
class NewEntry:
    """A tensor to be written: `dtype` is the format's name of it ("F32", "BF16", "U8" ...)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Numbers in the tensor."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.elements * BITS[self.dtype] // 8


def layout(entries: Iterable[NewEntry]) -> list[NewEntry]:
    """The entries in the order of their bytes in the file: wide dtypes first, so that all are aligned; then by name.

    This is the library's order. Raises ValueError for a name that occurs twice or is reserved, an unknown dtype, a
    shape that is not one of counts or does not fill whole bytes.
    """
    ordered = sorted(entries, key=lambda entry: (-_RANK.get(entry.dtype, 0), entry.name))
    names: set[str] = set()
    for entry in ordered:
        if entry.name in names:
            raise ValueError(f"two tensors are called '{shown(entry.name)}'")
        if entry.name == METADATA:
            raise ValueError(f"no tensor can be called {METADATA}: the format keeps this name for the metadata")
        if entry.dtype not in BITS:
            raise ValueError(f"tensor '{shown(entry.name)}': unknown dtype {entry.dtype!r}, known: {', '.join(BITS)}")
        if any(n < 0 for n in entry.shape) or entry.elements * BITS[entry.dtype] % 8:
            raise ValueError(f"tensor '{shown(entry.name)}': impossible shape {entry.shape} for {entry.dtype}")
        names.add(entry.name)
    return ordered


def write(
    path: str | os.PathLike[str],
    metadata: Mapping[str, str],
    entries: Sequence[NewEntry],
    data: Iterable[Buffer],
    *,
    overwrite: bool = False,
) -> None:
    """Write a safetensors file; at every moment `path` is what it was before or the complete new file.

    Args:
        path: where; a symbolic link is followed. An existing file keeps its permissions, a new one gets those of the
            process (0666 less the umask).
        metadata: the strings of `__metadata__`; written sorted by key, left out if empty.
        entries: the tensors, in any order.
        data: C-contiguous buffers, those of the tensors in the order of `layout(entries)`; a tensor may come in
            several buffers, a buffer holds bytes of one tensor only. Consumed one by one: memory is the caller's.
        overwrite: replace an existing file.

    Raises:
        CheckpointError: the target exists (refused), is no regular file, or cannot be written.
        ValueError, TypeError: entries, metadata or data that do not fit together.

    On any exception, KeyboardInterrupt included, the temporary file is removed. A killed process may leave
    `.optstate-<random>.tmp` in the target's folder: never read, safe to delete.
    """
    ordered = layout(entries)
    header = _header(metadata, ordered)
    target = os.path.realpath(path)
    permissions = _permissions(path, target, overwrite)
    temporary = os.path.join(os.path.dirname(target), f".optstate-{os.urandom(8).hex()}.tmp")
    try:
        with _reported(path):
            descriptor = os.open(temporary, _NEW, 0o666 if permissions is None else permissions)
        try:
            with _reported(path):
                if permissions is not None:
                    os.chmod(temporary, permissions)  # what the umask took away
                _write_all(descriptor, memoryview(header))
            for part in _checked(ordered, data):
                with _reported(path):
                    _write_all(descriptor, part)
            with _reported(path):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        with _reported(path):
            _put_in_place(path, temporary, target, overwrite)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def _header(metadata: Mapping[str, str], ordered: Sequence[NewEntry]) -> bytes:
    """The header with its length before it, padded so that the data begin at a multiple of eight."""
    content: dict[str, object] = {}
    if metadata:
        for key, value in metadata.items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise TypeError(f"metadata are strings, not {key!r}: {type(value).__name__}")
        content[METADATA] = dict(sorted(metadata.items()))
    start = 0
    for entry in ordered:
        stop = start + entry.nbytes
        content[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ValueError(f"the header would have {len(text)} bytes, above the format's limit of {MAX_HEADER}")
    return len(text).to_bytes(8, "little") + text


def _checked(ordered: Sequence[NewEntry], data: Iterable[Buffer]) -> Iterator[memoryview]:
    """The buffers as bytes; raises ValueError unless they are exactly those of the entries."""
    buffers = iter(data)
    for entry in ordered:
        missing = entry.nbytes
        while missing:
            buffer = next(buffers, None)
            if buffer is None:
                raise ValueError(f"tensor '{shown(entry.name)}': the data end {missing} bytes before it is complete")
            view = memoryview(buffer)
            if view.nbytes > missing:
                raise ValueError(f"tensor '{shown(entry.name)}': a buffer of {view.nbytes} bytes, {missing} fit")
            if not view.c_contiguous:
                raise ValueError(f"tensor '{shown(entry.name)}': a buffer that is not contiguous")
            missing -= view.nbytes
            if view.nbytes:  # an empty view cannot be cast
                yield view.cast("B")
    for buffer in buffers:
        if nbytes := memoryview(buffer).nbytes:
            raise ValueError(f"a buffer of {nbytes} bytes is left after the last tensor")


def _write_all(descriptor: int, view: memoryview) -> None:
    while view:
        view = view[os.write(descriptor, view) :]


def _permissions(path: str | os.PathLike[str], target: str, overwrite: bool) -> int | None:
    """Those of the existing file, or None if there is none; refuses what may not be replaced."""
    with _reported(path):
        try:
            found = os.lstat(target)
        except FileNotFoundError:
            return None
    if stat.S_ISLNK(found.st_mode):
        raise CheckpointError(path, "a symbolic link that leads to itself")
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "not a regular file"
        raise CheckpointError(path, f"is {kind} and cannot be replaced", refused=True)
    if not overwrite:
        raise _exists(path)
    return stat.S_IMODE(found.st_mode) & 0o777


def _exists(path: str | os.PathLike[str]) -> CheckpointError:
    return CheckpointError(path, "exists already", "choose another name or allow overwriting", refused=True)


def _put_in_place(path: str | os.PathLike[str], temporary: str, target: str, overwrite: bool) -> None:
    """Give the complete file its name, and make the name last through a power failure."""
    if overwrite:
        os.replace(temporary, target)
    else:
        # A link fails if another process has made the target meanwhile, which a replacement would destroy.
        try:
            os.link(temporary, target)
        except FileExistsError:
            raise _exists(path) from None
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if os.path.lexists(target):  # the best that can be done without links
                raise _exists(path) from None
            os.replace(temporary, target)
        else:
            os.unlink(temporary)
    if os.name == "posix":
        folder = os.open(os.path.dirname(target), os.O_RDONLY)
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that have no such thing
                raise
        finally:
            os.close(folder)


_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES)


@contextmanager
def _reported(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns the OSError of an operation on the file into a CheckpointError; those of the data's source pass."""
    try:
        yield
    except OSError as error:
        hint = "is its folder there?" if isinstance(error, FileNotFoundError) else ""
        raise CheckpointError(path, f"cannot be written: {error.strerror or error}", hint) from error
