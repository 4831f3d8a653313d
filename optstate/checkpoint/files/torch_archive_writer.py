"""Write a torch.save file without torch, one tensor at a time, atomically, with the same bytes for the same input."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from optstate.checkpoint.files.atomic_write import as_bytes, replacing, reported, reserve, write_at
from optstate.checkpoint.files.torch_archive_zip import ALIGNMENT, Record, foot, head, place, tail
from optstate.checkpoint.files.torch_pickle_writer import Constant, NewTensor, Subclass, dump
from optstate.text import shown

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Constant", "NewTensor", "Subclass", "TorchFile", "create_torch"]

_FOLDER = "archive"  # of the records; torch takes the file's name, here the bytes do not depend on it
_VERSION = b"3\n"


@contextmanager
def create_torch(
    path: str | os.PathLike[str], tree: Any, *, overwrite: bool = False, permissions: int | None = None
) -> Iterator[TorchFile]:
    """Write a file that `torch.load` reads, also with `weights_only`, `mmap` or `map_location="meta"`.

    The body calls `put` for every NewTensor of the tree. Until it ends `path` is what it was before, and an exception
    leaves no trace. The disk's room for the whole file is taken at the beginning.

    Args:
        path: where; a symbolic link is followed. An existing file keeps its permissions.
        tree: dicts, lists, tuples, sets, strings, bytes, integers, floats, booleans and None, with NewTensor, Constant
            and Subclass for the tensors.
        overwrite: replace an existing file.
        permissions: of a new file; those of the process if None.

    Raises:
        CheckpointError: the target exists (refused), is no regular file, or cannot be written; the disk is full.
        TypeError, ValueError: a tree that cannot be written, a tensor without its bytes when the body ends.
    """
    pickled, storages = dump(tree)
    with replacing(path, overwrite, permissions) as descriptor:
        file = TorchFile(path, descriptor, pickled, storages)
        yield file
        file._complete()


class TorchFile:
    """A file that `create_torch` writes."""

    def __init__(
        self, path: str | os.PathLike[str], descriptor: int, pickled: bytes, storages: list[NewTensor | Constant]
    ) -> None:
        self._path = path
        self._descriptor = descriptor
        known: dict[str, bytes] = {
            "data.pkl": pickled,
            ".format_version": b"1",
            ".storage_alignment": str(ALIGNMENT).encode(),
            "byteorder": b"little",
        }
        names = [*known, *(f"data/{number}" for number in range(len(storages))), "version"]
        sizes = [*map(len, known.values()), *(storage.nbytes for storage in storages), len(_VERSION)]
        self._records = place(zip((f"{_FOLDER}/{name}" for name in names), sizes, strict=True))
        self._checksums: dict[Record, int] = {}
        self._tensors: dict[str, Record] = {}
        with reported(path):
            reserve(descriptor, self._records[-1].stop)
        for record, data in zip(self._records, known.values(), strict=False):
            self._write(record, memoryview(data))
        for record, storage in zip(self._records[len(known) : -1], storages, strict=True):
            if isinstance(storage, Constant):
                self._write(record, memoryview(storage.data))
            else:
                self._tensors[storage.key] = record

    def put(self, key: str, buffer: Buffer) -> None:
        """Write all bytes of one tensor.

        Raises:
            ValueError: no such tensor, one that was written already, bytes that are too few or too many, or a buffer
                that is not contiguous.
            CheckpointError: the file cannot be written.
        """
        what = f"tensor '{shown(key)}'"
        if key not in self._tensors:
            raise ValueError(f"{what} is none of the {len(self._tensors)} of the file")
        record = self._tensors[key]
        if record in self._checksums:
            raise ValueError(f"{what} was written already")
        view = as_bytes(buffer, what)
        if view.nbytes != record.size:
            raise ValueError(f"{what}: a buffer of {view.nbytes} bytes, {record.size} are needed")
        self._write(record, view)

    def _write(self, record: Record, data: memoryview) -> None:
        checksum = zlib.crc32(data)
        with reported(self._path):
            write_at(self._descriptor, memoryview(head(record)), record.position)
            write_at(self._descriptor, data, record.start)
            write_at(self._descriptor, memoryview(foot(record, checksum)), record.start + record.size)
        self._checksums[record] = checksum

    def _complete(self) -> None:
        missing = [key for key, record in self._tensors.items() if record not in self._checksums]
        if missing:
            raise ValueError(f"tensor '{shown(missing[0])}' was not written, one of {len(missing)}")
        self._write(self._records[-1], memoryview(_VERSION))
        checksums = [self._checksums[record] for record in self._records]
        with reported(self._path):
            write_at(self._descriptor, memoryview(tail(self._records, checksums)), self._records[-1].stop)
