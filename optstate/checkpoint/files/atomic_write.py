"""Put a new file in the place of an old one, so that at every moment one of them is there and complete."""

from __future__ import annotations

import errno
import os
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from optstate.checkpoint.errors import CheckpointError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "as_bytes",
    "ending_in_order",
    "replacing",
    "reported",
    "reserve_room",
    "temporary_beside",
    "write_all",
    "write_at",
]

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES)
_NO_RESERVATION = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def replacing(
    path: str | os.PathLike[str], overwrite: bool, permissions: int | None = None, temporary: str | None = None
) -> Iterator[int]:
    """Yield a descriptor of a new file, which takes the target's place when the body ends without an exception.

    A symbolic link is followed. An existing file keeps its permissions, a new one gets those that are given, else those
    of the process (0666 less the umask). On any exception, KeyboardInterrupt included, the temporary file is removed,
    and when the process is asked to end (`ending_in_order`). A killed one may leave `.optstate-<random>.tmp` in the
    target's folder: never read, safe to delete. `temporary` is this file's name, from `temporary_beside`, for a caller
    that removes the file itself where an interrupt comes between the lines of its `with` statements.

    Raises CheckpointError if the target exists and `overwrite` is false (refused), is no regular file (refused), or
    cannot be written. Exceptions of the body pass; it puts what it does with the descriptor under `reported`.
    """
    target = os.path.realpath(path)
    existing = _permissions(path, target, overwrite)
    permissions = permissions if existing is None else existing
    temporary = temporary or temporary_beside(path)
    with ending_in_order():
        yield from _replacing(path, target, temporary, permissions, overwrite)


def temporary_beside(path: str | os.PathLike[str]) -> str:
    """Return a name for a temporary file in the folder of the target; a symbolic link is followed."""
    return os.path.join(os.path.dirname(os.path.realpath(path)), f".optstate-{os.urandom(8).hex()}.tmp")


def _replacing(
    path: str | os.PathLike[str], target: str, temporary: str, permissions: int | None, overwrite: bool
) -> Iterator[int]:
    try:
        with reported(path):
            descriptor = os.open(temporary, _NEW, 0o666 if permissions is None else permissions)
        try:
            if permissions is not None:
                with reported(path):
                    os.chmod(temporary, permissions)  # what the umask took away
            yield descriptor
            with reported(path):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        with reported(path):
            _put_in_place(path, temporary, target, overwrite)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


class _EndedError(BaseException):
    """The process was asked to end."""


@contextmanager
def ending_in_order() -> Iterator[None]:
    """Within it, SIGTERM and SIGHUP end the process as they always do, but what is half written is removed before.

    Only where nobody else has decided what they do, and in the main thread, which alone may decide it.
    """
    signals = [number for name in ("SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None]
    ours = [number for number in signals if signal.getsignal(number) is signal.SIG_DFL]
    if not ours or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        for each in ours:
            signal.signal(each, signal.SIG_IGN)  # what is being removed is removed
        raise _EndedError(number)

    try:
        try:
            for number in ours:
                signal.signal(number, end)
            yield
        finally:
            for number in ours:
                signal.signal(number, signal.SIG_DFL)
    except _EndedError as ended:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), ended.args[0])
        raise


@contextmanager
def reported(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the OSError of an operation on the file into a CheckpointError."""
    try:
        yield
    except OSError as error:
        hint = "is its folder there?" if isinstance(error, FileNotFoundError) else ""
        raise CheckpointError(path, f"cannot be written: {error.strerror or error}", hint) from error


def as_bytes(buffer: Buffer, what: str) -> memoryview:
    """Return a C-contiguous buffer as bytes; raise ValueError that begins with `what` for another."""
    view = memoryview(buffer)
    if not view.c_contiguous:
        raise ValueError(f"{what}: a buffer that is not contiguous")
    return view.cast("B") if view.nbytes else memoryview(b"")  # an empty view cannot be cast


def write_all(descriptor: int, view: memoryview) -> None:
    """Write all of the bytes where the file stands."""
    while view:
        view = view[os.write(descriptor, view) :]


def write_at(descriptor: int, view: memoryview, position: int) -> None:
    """Write all of the bytes at a position; where the file stands afterwards is not defined."""
    if not hasattr(os, "pwrite"):
        os.lseek(descriptor, position, os.SEEK_SET)
        write_all(descriptor, view)
        return
    while view:
        count = os.pwrite(descriptor, view, position)
        view = view[count:]
        position += count


def reserve_room(descriptor: int, size: int) -> None:
    """Give the file its size and room on the disk, so that a full one is known before the work and not after it.

    Costs nothing: the blocks are marked, not written, and later writes in any order are as fast or faster. Does
    nothing where the system or the file system has no such thing.
    """
    if size == 0 or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in _NO_RESERVATION:
            raise


def _permissions(path: str | os.PathLike[str], target: str, overwrite: bool) -> int | None:
    """Those of the existing file, or None if there is none; refuses what may not be replaced."""
    with reported(path):
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
