"""Files of torch.save as trees of plain data, with the places of their tensors; nothing of them is executed.

Imports no torch. A file has a pickle of the saved values, which refers to storages by a key, and the bytes of these:
a zip archive of uncompressed records since torch 1.6, before that one pickle after another and then the bytes.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, BinaryIO, NamedTuple, cast

from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files import pickle_machine
from optstate.checkpoint.files.dtypes import BITS, MAX_COUNT, STORAGES
from optstate.checkpoint.files.file_kinds import (
    HINTS,
    PICKLE,
    TORCH_OLD,
    TORCH_ZIP,
    UNKNOWN,
    ZIP,
    cannot_open,
    identify,
    open_file,
    read_bytes,
    size_of,
    source_of,
    special_kind,
)
from optstate.checkpoint.files.pickle_machine import Global, PickleError, Unread, UnsafeGlobalError
from optstate.checkpoint.files.pickle_objects import check_tree
from optstate.checkpoint.files.torch_tensors import REBUILD, StoredStorage
from optstate.checkpoint.files.torch_types import KNOWN, OTHER_STORAGES, is_harmful
from optstate.text import shown

__all__ = ["read_pickle", "read_torch_file", "read_torch_part"]

MOST_DIRECTORY = 1 << 25
"""Bytes of a zip archive's directory; a storage takes a hundred."""

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # what the older layout begins with

MOST_STRANGERS = 1000
"""Names of strangers that are taken note of."""

CUT_SHORT = "the write or the download was cut short"


Names = dict[str, None]
"""Names in the order in which they came."""


def read_torch_file(path: str | os.PathLike[str], strangers: Names | None = None) -> Any:
    """Return what torch.save was given, as plain data.

    Dicts of any kind are dicts, tensors and parameters `Stored`, torch.Size a tuple, NumPy's numbers numbers; dtypes
    are `Global`, instances of the foreign classes that optimizers keep `Object`, and so are tensors of a subclass: its
    name and attributes. What is made with any other name is a `Stranger`, a tensor that has no form here `Unread`.

    strangers: takes note of these names.

    Raises:
        CheckpointError: if it is no such file or is damaged; refused if it asks for a function or class that a saved
            value does not need and that does something, as `os.system`.
    """
    kind = identify(path)
    strangers = {} if strangers is None else strangers
    if kind in (TORCH_ZIP, ZIP):
        with _reading(path) as file:
            return _checked(_Archive(path, file, 0, size_of(file), strangers).tree())
    if kind in (TORCH_OLD, PICKLE):
        with _reading(path) as file:
            return _checked(_older_tree(path, file, strangers))
    raise CheckpointError(path, f"{_named(path, kind)}, not one written by torch.save", HINTS.get(kind, ""))


def read_torch_part(path: str | os.PathLike[str], start: int, length: int) -> Any:
    """Return the plain data of a zip of torch.save that takes `length` bytes of a file from `start` on."""
    if (kind := special_kind(path)) is not None:
        raise CheckpointError(path, f"{kind}, not one written by torch.save")
    with _reading(path) as file:
        if start < 0 or length < 0 or start + length > size_of(file):
            raise CheckpointError(path, f"has no {length} bytes from {start} on, it has {size_of(file)}", CUT_SHORT)
        return _checked(_Archive(path, file, start, length, {}).tree())


def read_pickle(path: str | os.PathLike[str]) -> Any:
    """Return the plain data of a pickle alone, without strangers, as torch.distributed.checkpoint writes .metadata."""
    kind = identify(path)
    if kind != PICKLE:
        raise CheckpointError(path, f"{_named(path, kind)}, not a pickle", HINTS.get(kind, ""))
    with _reading(path) as file:
        return _checked(_load(file))


@contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yield the file, opened; what goes wrong with it within is a CheckpointError."""
    with io.BufferedReader(cast(io.RawIOBase, open_file(path))) as file:
        try:
            yield cast(BinaryIO, file)
        except UnsafeGlobalError as error:
            raise _unsafe(path, "", error) from None
        except PickleError as error:
            raise CheckpointError(path, str(error)) from None
        except OSError as error:
            raise cannot_open(path, error) from error


def _unsafe(path: str | os.PathLike[str], kind: str, error: UnsafeGlobalError) -> CheckpointError:
    what = f"asks for '{shown(error.name)}' when it is read, which is not on the list of what optstate reads"
    hint = "if you trust it, load it in a sandbox and save its tensors and plain values alone"
    return CheckpointError(path, f"{kind}{what}; it was not executed", hint, refused=True)


def _named(path: str | os.PathLike[str], kind: str) -> str:
    if kind != UNKNOWN:
        return kind
    with open_file(path) as file:
        tar = read_bytes(path, file, 512)[257:262] == b"ustar"
    return "a tar archive, perhaps of torch before 0.1.10" if tar else kind


def _checked(tree: Any) -> Any:
    check_tree(tree)
    return tree


def _load(data: bytes | BinaryIO) -> Any:
    """Read a pickle without tensors and strangers."""
    return pickle_machine.load_pickle(data, known=KNOWN, rebuild=REBUILD)


def _load_values(data: bytes | BinaryIO, persistent: Callable[[Any], Any], strangers: Names) -> Any:
    """Read a pickle of anything; `strangers` takes note of the names that are not known."""

    def strange(name: str) -> bool:
        if is_harmful(name):
            return False
        if len(strangers) < MOST_STRANGERS:
            strangers[name] = None
        return True

    return pickle_machine.load_pickle(data, known=KNOWN, rebuild=REBUILD, persistent=persistent, strange=strange)


class _Reference(NamedTuple):
    """How the pickle refers to a storage: its key, and what it says of it."""

    key: str
    dtype: str
    elements: int
    width: int
    view: Any

    @property
    def nbytes(self) -> int:
        return self.elements * self.width

    @property
    def unread(self) -> Unread | None:
        """What stands for its tensors, if the safetensors format has no name for such numbers."""
        return None if self.dtype in BITS else Unread(f"a tensor of numbers in a '{shown(self.dtype)}'")


def _module_class(saved: Any) -> Global | None:
    """Return the class of a module, which older files keep as a persistent id with the source of the class."""
    match saved:
        case ("module", Global() as kind, _, _):
            return kind
    return None


def _reference(saved: Any, length: int) -> _Reference:
    """Parse a persistent id: ("storage", class, key, device, elements), and a view in older files."""
    if not isinstance(saved, tuple) or len(saved) != length or saved[0] != "storage":
        raise PickleError("a malformed file: it refers to something that is no storage")
    kind, key, elements = saved[1], saved[2], saved[4]
    if not isinstance(kind, pickle_machine.Global) or not isinstance(key, str) or type(elements) is not int:
        raise PickleError("a malformed file: it does not say which storage it refers to")
    if not 0 <= elements <= MAX_COUNT:
        raise PickleError(f"a malformed file: storage '{shown(key)}' with {elements} elements")
    name = kind.name.rpartition(".")[2]
    dtype = STORAGES.get(name)
    width = BITS[dtype] // 8 if dtype is not None else OTHER_STORAGES.get(name)
    if width is None and length > 5:  # the places of those behind it are not known, then
        raise PickleError(f"numbers in a '{shown(kind.name)}', whose size is not known")
    return _Reference(key, dtype or kind.name, elements, width or 0, saved[5] if length > 5 else None)


# The zip layout.


class _Part(io.RawIOBase):
    """A part of a file as a file, for zipfile: no number in the archive makes it read, or allocate, much."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file = file
        self._start = start
        self._length = length
        self._at = 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        at = offset + (0, self._at, self._length)[whence]
        if at < 0:
            raise io.UnsupportedOperation(f"byte {at}")  # an OSError, which zipfile expects, and a ValueError
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, min(self._length - self._at, MOST_DIRECTORY))
        self._file.seek(self._start + self._at)
        data = self._file.read(left if size < 0 else min(size, left))
        self._at += len(data)
        return data


class _Archive:
    """A zip archive of torch.save, which takes `length` bytes of the file from `start` on."""

    def __init__(self, path: str | os.PathLike[str], file: BinaryIO, start: int, length: int, strangers: Names) -> None:
        self._path = path
        self._file = file
        self._strangers = strangers
        self._start = start
        self._stop = start + length
        self._records = self._directory(_Part(file, start, length))
        self._storages: dict[str, StoredStorage] = {}

    def tree(self) -> Any:
        """Return what was saved."""
        if "byteorder" in self._records and (order := self._read("byteorder", 16)) != b"little":
            raise CheckpointError(self._path, f"its byte order is {order!r}; only little-endian numbers are read")
        return _load_values(self._read("data.pkl", pickle_machine.MOST_BYTES), self._storage, self._strangers)

    def _directory(self, part: _Part) -> dict[str, zipfile.ZipInfo]:
        """Return the records by their names within the top folder."""
        try:
            with zipfile.ZipFile(cast(BinaryIO, part)) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, struct.error, ValueError, IndexError, OverflowError, NotImplementedError):
            raise CheckpointError(self._path, "a zip archive without a valid directory", CUT_SHORT) from None
        names = {entry.filename for entry in entries}
        folders = {name.partition("/")[0] for name in names}
        if any(f"{folder}/constants.pkl" in names for folder in folders):
            hint = "load it with torch.jit.load and save its state_dict"
            raise CheckpointError(self._path, "a TorchScript archive, not one written by torch.save", hint)
        if not any(f"{folder}/data.pkl" in names for folder in folders):
            raise CheckpointError(self._path, "a zip archive without data.pkl, not one written by torch.save")
        if len(folders) > 1 or len(names) < len(entries):
            raise CheckpointError(self._path, "a zip archive with two top folders or two records of one name")
        if first := min(entry.header_offset for entry in entries):
            hint = "if it is a part of a checkpoint of torch.distributed.checkpoint, give the folder"
            raise CheckpointError(self._path, f"its archive begins at byte {first} instead of 0", hint)
        return {entry.filename.partition("/")[2]: entry for entry in entries}

    def _place(self, name: str) -> tuple[int, int]:
        """Return the first byte of a record, from the beginning of the file, and how many it has."""
        entry = self._records[name]
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            hint = "save it again with torch.save, or zip it again without compression"
            raise CheckpointError(self._path, f"record '{shown(name)}' is compressed", hint)
        if entry.flag_bits & 1:
            raise CheckpointError(self._path, f"record '{shown(name)}' is encrypted")
        header = self._start + entry.header_offset
        if self._start <= header <= self._stop - 30:
            self._file.seek(header)
            local = self._file.read(30)
            start = header + 30 + sum(struct.unpack("<2H", local[26:]))
            if local.startswith(b"PK\x03\x04") and start + entry.file_size <= self._stop:
                return start, entry.file_size
        raise CheckpointError(self._path, f"record '{shown(name)}' is not in the file", CUT_SHORT)

    def _read(self, name: str, most: int) -> bytes:
        start, size = self._place(name)
        if size > most:
            raise CheckpointError(self._path, f"record '{name}' has {size} bytes; {most} are read")
        self._file.seek(start)
        return read_bytes(self._path, self._file, size)

    def _storage(self, saved: Any) -> StoredStorage | Unread | Global:
        if (kind := _module_class(saved)) is not None:
            return kind
        reference = _reference(saved, 5)
        storage = self._storages.get(reference.key) or self._found(reference)
        if (storage.dtype, storage.elements) != (reference.dtype, reference.elements):
            raise PickleError(f"a malformed file: storage '{shown(reference.key)}' is of two dtypes or sizes")
        return reference.unread or storage

    def _found(self, reference: _Reference) -> StoredStorage:
        place = f"storage '{shown(reference.key)}'"
        record = f"data/{reference.key}"
        if record not in self._records:
            raise CheckpointError(self._path, f"{place} is missing: a tensor refers to it", CUT_SHORT)
        start, size = self._place(record)
        if size < reference.nbytes:
            raise CheckpointError(self._path, f"{place} has {size} bytes, its tensors need {reference.nbytes}")
        shape = (reference.elements,)
        storage = StoredStorage(
            os.fspath(self._path), start, reference.dtype, shape, source=source_of(self._file), key=reference.key
        )
        self._storages[reference.key] = storage
        return storage


# The layout before torch 1.6: pickles of the magic number, the version, the machine, the values, and the keys of the
# storages; then each storage in the order of the keys, its number of elements before it.


def _older_tree(path: str | os.PathLike[str], file: BinaryIO, strangers: Names) -> Any:
    """Return what was saved. The values are read twice, since only what follows them tells where the storages are."""
    if _first(path, file) != MAGIC:
        raise CheckpointError(path, "a pickle, not written by torch.save")
    if _load(file) != PROTOCOL:
        raise CheckpointError(path, f"of a version of torch.save's older layout that is not {PROTOCOL}")
    machine = _load(file)
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise CheckpointError(path, "its numbers are not little-endian")
    values = file.tell()
    references: dict[str, _Reference] = {}
    _load_values(file, lambda saved: _collected(path, saved, references), strangers)
    storages = _older_storages(path, file, references)
    file.seek(values)
    return _load_values(
        file, lambda saved: _module_class(saved) or _viewed(storages[saved[2]], _reference(saved, 6)), strangers
    )


def _first(path: str | os.PathLike[str], file: BinaryIO) -> Any:
    """Return the first pickle of the file, None if torch.save could not have written it."""
    try:
        return _load(file)
    except UnsafeGlobalError as error:
        raise _unsafe(path, "a pickle, not written by torch.save; it ", error) from None
    except PickleError:
        return None


def _collected(
    path: str | os.PathLike[str], saved: Any, references: dict[str, _Reference]
) -> StoredStorage | Unread | Global:
    """Return a storage in a place that is not known yet; `references` takes note of it."""
    if (kind := _module_class(saved)) is not None:
        return kind
    reference = _reference(saved, 6)
    first = references.setdefault(reference.key, reference)
    if (first.dtype, first.elements) != (reference.dtype, reference.elements):
        raise PickleError(f"a malformed file: storage '{shown(reference.key)}' is of two dtypes or sizes")
    storage = StoredStorage(os.fspath(path), 0, reference.dtype, (reference.elements,), key=reference.key)
    return _viewed(storage, reference)


def _viewed(storage: StoredStorage, reference: _Reference) -> StoredStorage | Unread:
    """Return the part of a storage that files before torch 0.4 could refer to as if it were one."""
    if reference.unread is not None:
        return reference.unread
    if reference.view is None:
        return storage
    match reference.view:
        case (str(), int(offset), int(size)) if 0 <= offset <= offset + size <= storage.elements:
            start = storage.start + offset * BITS[storage.dtype] // 8
            return replace(storage, start=start, shape=(size,))
    raise PickleError(f"a malformed file: a view that is not within storage '{shown(storage.key)}'")


def _older_storages(
    path: str | os.PathLike[str], file: BinaryIO, references: dict[str, _Reference]
) -> dict[str, StoredStorage]:
    """Return the storages with their places, by key."""
    keys = _load(file)
    if not isinstance(keys, list) or not all(type(key) is str for key in keys) or sorted(keys) != sorted(references):
        raise CheckpointError(path, "a malformed file: its storages are not those that its tensors refer to")
    storages = {}
    at = file.tell()
    for key, reference in ((key, references[key]) for key in keys):
        file.seek(at)
        elements = int.from_bytes(read_bytes(path, file, 8), "little", signed=True)
        start, at = at + 8, at + 8 + reference.nbytes
        if at > size_of(file):
            raise CheckpointError(path, f"ends within storage '{shown(key)}'", CUT_SHORT)
        if elements != reference.elements:
            what = f"storage '{shown(key)}' has {elements} elements, its tensors say {reference.elements}"
            raise CheckpointError(path, f"a malformed file: {what}")
        storages[key] = StoredStorage(
            os.fspath(path), start, reference.dtype, (elements,), source=source_of(file), key=key
        )
    return storages
