"""Files that are opened once: a header and all the data behind it are of one version of a file.

Whoever opens a path again may find another version there: a run replaces its checkpoint while it is read. Here a file
is opened once and read by place, so what was replaced is read to its end; what is overwritten where it lies is noticed
by its size and time, and refused.
"""

from __future__ import annotations

import io
import os
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import ref

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["MOST_OPEN", "FileChangedError", "OpenFiles", "Opened", "View", "opened_at", "reading"]

MOST_OPEN = 128
"""Descriptors that are kept: of more files the ones used last. The others are opened again and compared."""

_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
_COPIED = 1 << 24  # bytes at a time where the system cannot read into memory that is there
_LOCK = threading.RLock()

Identity = tuple[int, int, int, int]


class FileChangedError(OSError):
    """A file is not the one that was opened: it was overwritten, or replaced and not kept open."""

    def __init__(self, path: str, what: str) -> None:
        super().__init__(f"'{path}' was {what} while it was read: read it again when it is complete")


class Opened:
    """One version of a file, from its opening on. It is closed when nothing refers to it any more.

    known: what readers keep of it, to take it apart once; emptied when the reading ends.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._descriptor: int | None = None
        self._readers = 0
        self._number = next(_NUMBERS)
        self.path = os.fspath(path)
        self.known: dict[str, Any] = {}
        # Should a pipe have taken the file's place since it was looked at, this neither waits nor reads from it.
        self._descriptor = os.open(self.path, _FLAGS)
        self.identity = _identity(os.fstat(self._descriptor))
        self._keep()

    @property
    def size(self) -> int:
        """Bytes in the file, as it was opened."""
        return self.identity[2]

    def read_into(self, buffer: Buffer, start: int) -> int:
        """Fill a writable buffer of bytes from a place on; how many there were, fewer only at the end of the file.

        Raises:
            FileChangedError: if the file was overwritten since it was opened; the buffer may then hold anything.
            OSError: if it cannot be read.
        """
        with memoryview(buffer) as view, self._reading() as descriptor:
            done = 0
            while done < len(view):
                found = _read_at(descriptor, view[done:], start + done)
                if not found:
                    break
                done += found
            if _identity(os.fstat(descriptor)) != self.identity:
                raise FileChangedError(self.path, "overwritten")
        return done

    def announce(self, start: int, length: int) -> None:
        """Let the system read a part into its cache while something else is done; where it cannot, nothing happens."""
        if hasattr(os, "posix_fadvise"):
            with suppress(OSError), self._reading() as descriptor:
                os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_WILLNEED)

    def is_at(self, path: str | os.PathLike[str]) -> bool:
        """Whether a path leads to this version of the file now."""
        try:
            return _identity(os.stat(path)) == self.identity
        except (OSError, ValueError):
            return False

    @contextmanager
    def _reading(self) -> Iterator[int]:
        """Yield the descriptor, which stays open within."""
        with _LOCK:
            if self._descriptor is None:
                self._open_again()
            self._readers += 1
            self._keep()
            descriptor = self._descriptor
            assert descriptor is not None
        try:
            yield descriptor
        finally:
            with _LOCK:
                self._readers -= 1

    def _open_again(self) -> None:
        descriptor = os.open(self.path, _FLAGS)
        try:
            if _identity(os.fstat(descriptor)) != self.identity:
                raise FileChangedError(self.path, "replaced")
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def _keep(self) -> None:
        """Put it behind those that were used before, and close the first ones if there are too many."""
        with _LOCK:
            _KEPT.pop(self._number, None)
            _KEPT[self._number] = ref(self)
            for number in list(_KEPT)[: max(len(_KEPT) - MOST_OPEN, 0)]:
                other = _KEPT[number]() if number in _KEPT else None
                if other is not None and not other._readers:
                    other._close()

    def _close(self) -> None:
        """Close the descriptor. The collector may call this at any moment: no lock is taken."""
        _KEPT.pop(self._number, None)
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __del__(self) -> None:
        try:
            self._close()
        except (OSError, AttributeError, TypeError):
            return  # the interpreter is ending, and what this module has may be gone


_NUMBERS = count()
_KEPT: dict[int, ref[Opened]] = {}
"""Those with a descriptor, the one used last at the end."""


def _identity(found: os.stat_result) -> Identity:
    """Which file it is, and in which version: what is written changes its time, or its size."""
    if not stat.S_ISREG(found.st_mode):
        raise OSError("it is not a regular file any more")
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _read_at(descriptor: int, view: memoryview, start: int) -> int:
    """Read what there is from a place on, as the system gives it at once."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [view], start)
    if hasattr(os, "pread"):
        data = os.pread(descriptor, min(len(view), _COPIED), start)
    else:
        with _LOCK:
            os.lseek(descriptor, start, os.SEEK_SET)
            data = os.read(descriptor, min(len(view), _COPIED))
    view[: len(data)] = data
    return len(data)


class View(io.RawIOBase):
    """A file to read from the beginning to the end, or from where one likes. Closing it leaves the file open."""

    def __init__(self, opened: Opened) -> None:
        self.opened = opened
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + (0, self._at, self.opened.size)[whence]
        if at < 0:
            raise OSError(f"there is no byte {at}")
        self._at = at
        return at

    def readinto(self, buffer: Buffer) -> int:
        found = self.opened.read_into(buffer, self._at)
        self._at += found
        return found

    def read(self, size: int | None = -1) -> bytes:
        left = max(self.opened.size - self._at, 0)
        data = bytearray(left if size is None or size < 0 else min(size, left))
        return bytes(memoryview(data)[: self.readinto(data)])


class OpenFiles:
    """The files of one reading: a path leads to the same version of a file, whoever asks."""

    def __init__(self) -> None:
        self._opened: dict[str, Opened] = {}

    def at(self, path: str | os.PathLike[str]) -> Opened:
        """Return the file at a path, opened when it is asked for first."""
        place = os.path.abspath(path)
        if place not in self._opened:
            self._opened[place] = Opened(path)
        return self._opened[place]

    def replaced(self, paths: Iterable[str | os.PathLike[str]] | None = None) -> str | None:
        """Return the first of these paths, or of all that were opened, that leads to another version of its file now.

        None if all lead to the one that was opened.
        """
        if paths is None:
            moved = (place for place, opened in self._opened.items() if not opened.is_at(place))
            return next(moved, None)
        return next((os.fspath(path) for path in paths if not self.at(path).is_at(path)), None)

    def forget(self) -> None:
        """Open everything anew from now on, and let go what readers kept."""
        for opened in self._opened.values():
            opened.known.clear()
        self._opened = {}


_READING: ContextVar[OpenFiles | None] = ContextVar("reading", default=None)


@contextmanager
def reading() -> Iterator[OpenFiles]:
    """Within it, files are opened once and taken apart once. One within another is part of it."""
    files = _READING.get()
    if files is not None:
        yield files
        return
    files = OpenFiles()
    token = _READING.set(files)
    try:
        yield files
    finally:
        _READING.reset(token)
        files.forget()


def opened_at(path: str | os.PathLike[str]) -> Opened:
    """Return the file at a path: that of the reading which is going on, else opened for the caller alone."""
    files = _READING.get()
    return Opened(path) if files is None else files.at(path)
