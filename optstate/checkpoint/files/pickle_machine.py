"""An interpreter of pickles that builds plain data and can call nothing that a file names. Imports no torch.

A pickle is a program for a stack machine; what makes it dangerous is that it may name any function of Python, and call
it. Here a name is only ever a `Global`, and a call of one an `Object`, or a `Stranger` where the caller does not
know the name, that remembers what it was given. A name that the caller does not let pass ends the reading at once.
Python's own pickle module has no part in it.

Memory stays within a small multiple of the pickle: a length is compared with what is left before it is read, and
whatever is made is counted, copies of what is referred to many times included.
"""

from __future__ import annotations

import codecs
import io
import struct
from collections.abc import Callable, Collection, Mapping
from typing import Any, BinaryIO

from optstate.checkpoint.files.pickle_objects import (
    BUILDERS,
    NAMES,
    Global,
    Object,
    PickleError,
    Stranger,
    Unread,
    called,
    checked_key,
    weight,
)
from optstate.text import shown

__all__ = ["Global", "Object", "PickleError", "Stranger", "Unread", "UnsafeGlobalError", "load_pickle"]

MOST_BYTES = 1 << 27
"""Bytes of one pickle. That of an optimizer with 100,000 tensors has 20 MB."""
MOST_OBJECTS = 5_000_000
"""Containers, texts, objects and references of one pickle: two dozen for each tensor."""
LONGEST_NUMBER = 1024
"""Bytes of one integer: Python refuses to print one of twice this length."""


class UnsafeGlobalError(PickleError):
    """A pickle that names a function or class that is not known; `name` is its name, as "builtins.print"."""

    def __init__(self, name: str) -> None:
        super().__init__(f"asks for '{shown(name)}', which is not on the list of what is read")
        self.name = name


def load_pickle(
    data: bytes | BinaryIO,
    *,
    known: Collection[str],
    rebuild: Mapping[str, Callable[..., Any]],
    persistent: Callable[[Any], Any] | None = None,
    strange: Callable[[str], bool] | None = None,
) -> Any:
    """Return the plain data of one pickle of protocol 0 to 5.

    OrderedDict, Counter and defaultdict become dicts, a bytearray becomes bytes. Values may be nested to any depth and
    contain themselves, if the pickle says so.

    Args:
        data: the pickle, or a buffered file positioned at its start, which is left behind its end.
        known: names of classes and functions that the pickle may have; called, they become an `Object`.
        rebuild: functions of ours by the name that stands for them, called with what the pickle gives.
        persistent: what makes a value of a persistent id; without it there may be none.
        strange: whether the pickle may have a name that is in none of these; called, it becomes a `Stranger`. Without
            it there may be none.

    Raises:
        UnsafeGlobalError: as soon as a name comes that is in none of these, nor one of Python's plain containers, and
            that `strange` does not let pass.
        PickleError: if it is malformed or over a limit.
    """
    source = _Source(io.BytesIO(data) if isinstance(data, bytes) else data)
    machine = _Machine(source, known, rebuild, persistent, strange)
    try:
        return machine.run()
    except PickleError:
        raise
    except KeyError:
        raise PickleError(f"a malformed pickle: what it refers to before byte {source.position} is not there") from None
    except IndexError:
        raise PickleError(f"a malformed pickle: before byte {source.position} it takes more than there is") from None
    except (ValueError, OverflowError):
        raise PickleError(f"a malformed pickle: no valid value before byte {source.position}") from None


class _Source:
    """The bytes of a pickle; `position` counts from its start."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        start = file.tell()
        size = file.seek(0, io.SEEK_END) - start
        file.seek(start)
        self.position = 0
        self._left = min(size, MOST_BYTES)
        self._end = "ends early" if size <= MOST_BYTES else f"is longer than {MOST_BYTES} bytes"

    def expect(self, count: int) -> None:
        """Raise PickleError unless `count` more bytes are there."""
        if not 0 <= count <= self._left:
            raise PickleError(f"the pickle {self._end}: byte {self.position} asks for {count}, {self._left} are left")

    def take(self, count: int) -> bytes:
        """Read the next `count` bytes."""
        self.expect(count)
        data = self._file.read(count)
        self._left -= count
        self.position += count
        if len(data) != count:
            raise PickleError(f"the pickle ends early: no bytes from {self.position - count + len(data)} on")
        return data

    def line(self) -> bytes:
        """Read the bytes up to the next line feed."""
        line = self._file.readline(self._left)
        self._left -= len(line)
        self.position += len(line)
        if not line.endswith(b"\n"):
            raise PickleError(f"the pickle {self._end}: no line ends before byte {self.position}")
        return line[:-1]


class _Machine:
    """The stack machine: `stack` since the last mark, the stacks before each mark, and what may be referred to."""

    def __init__(
        self,
        source: _Source,
        known: Collection[str],
        rebuild: Mapping[str, Callable[..., Any]],
        persistent: Callable[[Any], Any] | None,
        strange: Callable[[str], bool] | None,
    ) -> None:
        self.source = source
        self.known = known
        self.rebuild = rebuild
        self.persistent = persistent
        self.strange = strange
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.names: dict[tuple[str, str], Global] = {}
        self.objects = 0

    def run(self) -> Any:
        """Interpret up to the end of the pickle."""
        while (code := self.source.take(1)) != b".":
            if code in _STEPS:
                _STEPS[code](self)
            elif code in _SIZED:
                width, decode = _SIZED[code]
                self.made(decode(self.source.take(self.number(width))))
            elif code in _FIXED:
                self.stack.append(self.number(_FIXED[code]))
            elif code in _CONSTANTS:
                self.stack.append(_CONSTANTS[code])
            elif code in _LINES:
                self.made(_LINES[code](self.source.line()))
            else:
                what = _REFUSED.get(code, f"no opcode (0x{code.hex()})")
                raise PickleError(f"a malformed pickle: {what} at byte {self.source.position - 1}")
        return self.stack.pop()

    def number(self, form: str) -> Any:
        """Read a number in one of struct's formats."""
        return struct.unpack(form, self.source.take(struct.calcsize(form)))[0]

    def count(self, objects: int) -> None:
        """Take note of objects that are made."""
        self.objects += objects
        if self.objects > MOST_OBJECTS:
            raise PickleError(f"more than {MOST_OBJECTS} objects in one pickle")

    def made(self, value: Any, objects: int = 1) -> None:
        """Put a new value on the stack."""
        self.count(objects)
        self.stack.append(value)

    # The stack, and references to what was on it.

    def mark(self) -> None:
        self.count(1)
        self.marked.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marked.pop()
        return items

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.since_mark()

    def refer(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def remember(self, index: int) -> None:
        if index < 0:
            raise ValueError(index)
        self.count(1)
        self.memo[index] = self.stack[-1]

    def persist(self, saved: Any) -> None:
        if self.persistent is None:
            raise PickleError("a pickle that refers to something outside of it")
        self.made(self.persistent(saved))

    # Containers.

    def last_as_tuple(self, size: int) -> None:
        if len(self.stack) < size:
            raise IndexError(size)
        items = tuple(self.stack[-size:])
        del self.stack[-size:]
        self.made(items)

    def target(self, kind: type) -> Any:
        """Return the container on top of the stack, or within the stranger there."""
        top = found = self.stack[-1]
        if type(top) is Stranger and kind is not set:
            top.items = kind() if top.items is None else top.items
            found = top.items
        if type(found) is not kind:
            raise PickleError(f"a malformed pickle: fills {called(top)} as if it were a {kind.__name__}")
        return found

    def append(self) -> None:
        item = self.stack.pop()
        self.target(list).append(item)

    def extend(self) -> None:
        items = self.since_mark()
        self.target(list).extend(items)

    def set_items(self, items: list[Any]) -> None:
        into = self.target(dict)
        if len(items) % 2:
            raise PickleError("a malformed pickle: a key without a value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            into[checked_key(key)] = value

    def new_dict(self) -> None:
        items = self.since_mark()
        self.made({})
        self.set_items(items)

    def add_items(self) -> None:
        items = self.since_mark()
        self.target(set).update(map(checked_key, items))

    # Names, and what is made with them.

    def named(self, module: Any, name: Any) -> Global:
        if type(module) is not str or type(name) is not str:
            raise PickleError("a malformed pickle: a name that is not text")
        if (found := self.names.get((module, name))) is not None:
            return found
        full = f"{_MODULES.get(module, module)}.{name}"
        full = _NAMES.get(full, full)
        known = full in self.rebuild or full in BUILDERS or full in NAMES or full in self.known or full == _INSTANCE
        if not known and (self.strange is None or not self.strange(full)):
            raise UnsafeGlobalError(full)
        found = self.names[module, name] = Global(full)
        return found

    def name_in_lines(self) -> Global:
        module = self.source.line().decode()
        return self.named(module, self.source.line().decode())

    def name_on_stack(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.made(self.named(module, name))

    def call(self, function: Any, args: Any, kwargs: Any) -> None:
        """Put on the stack what stands for a call: what a function of ours makes of it, or else an inert object."""
        if type(function) not in (Global, Stranger) or type(args) is not tuple or type(kwargs) is not dict:
            raise PickleError(f"a malformed pickle: a call of {called(function)} with {called(args)}")
        # A function may copy what it is given, and a pickle may give it the same again and again.
        self.count(weight(kwargs) + sum(map(weight, args)))
        if type(function) is Stranger:  # such as functools.partial(...)
            self.count(len(args))
            self.made(Stranger(function.name, (function, *args), kwargs), 3)
            return
        if function.name == _INSTANCE:
            self.made(self.instance(args), 3)
            return
        ours = self.rebuild.get(function.name, BUILDERS.get(function.name))
        if ours is None:
            kind = Object if function.name in self.known else Stranger
            self.made(kind(function.name, args, kwargs), 3)
            return
        try:
            self.made(ours(*args, **kwargs), 3)
        except TypeError:
            raise PickleError(f"a malformed pickle: '{function.name}' is given what it does not take") from None

    def instance(self, args: tuple[Any, ...]) -> Object | Stranger:
        """Make an instance as protocols before 2 write it: class, plain class it is derived from, value of this."""
        if len(args) != 3 or not isinstance(args[0], Global):
            raise PickleError(f"a malformed pickle: an instance of {called(args[0] if args else None)}")
        kind, _, value = args
        args = () if value is None else (value,)
        if kind.name in self.known:
            return Object(kind.name, args)
        self.count(weight(value))
        items = value.copy() if type(value) in (list, dict) else None
        return Stranger(kind.name, args, items=items)

    def call_last(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.call(function, args, {})

    def call_last_with_names(self) -> None:
        kwargs, args, function = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.call(function, args, kwargs)

    def call_since_mark(self) -> None:
        function, *args = self.since_mark()
        self.call(function, tuple(args), {})

    def call_in_lines(self) -> None:
        function = self.name_in_lines()
        self.call(function, tuple(self.since_mark()), {})

    def build(self) -> None:
        """Set the state of an object. That of an OrderedDict is what was set on it besides its items: passed over."""
        state, into = self.stack.pop(), self.stack[-1]
        if type(into) in (Object, Stranger) and into.state is None:
            into.state = state
        elif type(into) is not dict:
            raise PickleError(f"a malformed pickle: sets the state of {called(into)}")

    def protocol(self) -> None:
        if (protocol := self.number("<B")) > 5:
            raise PickleError(f"a pickle of protocol {protocol}; those of 0 to 5 are read")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _integer(data: bytes) -> int:
    if len(data) > LONGEST_NUMBER:
        raise PickleError(f"an integer of {len(data)} bytes")
    return int.from_bytes(data, "little", signed=True)


def _integer_in_line(line: bytes) -> int | bool:
    if line in (b"00", b"01"):
        return line == b"01"
    digits = line.removesuffix(b"L")
    if len(digits) > 2 * LONGEST_NUMBER:
        raise PickleError(f"an integer of {len(digits)} digits")
    return int(digits)


def _text_in_line(line: bytes) -> str:
    return line.decode("raw-unicode-escape")


def _quoted_text(line: bytes) -> str:
    """Return a string of Python 2, written as its repr."""
    if len(line) < 2 or line[:1] not in (b"'", b'"') or line[-1:] != line[:1]:
        raise ValueError(line)
    unescaped: bytes = codecs.escape_decode(line[1:-1])[0]
    return unescaped.decode()


# As Python 2 calls them, and protocols before 3 do, which torch.save writes.
_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg", "exceptions": "builtins"}
_NAMES = {
    "builtins.long": "builtins.int",
    "builtins.unicode": "builtins.str",
    "builtins.xrange": "builtins.range",
    "builtins.reduce": "functools.reduce",
}

_INSTANCE = "copyreg._reconstructor"  # which makes an instance of a class of a protocol before 2

# The opcodes, by what they put on the stack or do to it. https://docs.python.org/3/library/pickletools.html

_CONSTANTS: dict[bytes, Any] = {b"N": None, b"\x88": True, b"\x89": False, b")": ()}

_FIXED = {b"K": "<B", b"M": "<H", b"J": "<i", b"G": ">d"}

_SIZED: dict[bytes, tuple[str, Callable[[bytes], Any]]] = {
    b"\x8c": ("<B", _text),
    b"X": ("<I", _text),
    b"\x8d": ("<Q", _text),
    b"U": ("<B", bytes.decode),  # strings of Python 2
    b"T": ("<i", bytes.decode),
    b"C": ("<B", bytes),
    b"B": ("<I", bytes),
    b"\x8e": ("<Q", bytes),
    b"\x96": ("<Q", bytes),  # a bytearray
    b"\x8a": ("<B", _integer),
    b"\x8b": ("<i", _integer),
}

_LINES: dict[bytes, Callable[[bytes], Any]] = {
    b"I": _integer_in_line,
    b"L": _integer_in_line,
    b"F": float,
    b"V": _text_in_line,
    b"S": _quoted_text,
}

_STEPS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine.protocol,
    b"\x95": lambda m: m.source.expect(m.number("<Q")),  # a frame
    b"(": _Machine.mark,
    b"0": _Machine.pop,
    b"1": lambda m: m.since_mark().clear(),
    b"2": lambda m: m.stack.append(m.stack[-1]),
    b"g": lambda m: m.refer(int(m.source.line())),
    b"h": lambda m: m.refer(m.number("<B")),
    b"j": lambda m: m.refer(m.number("<I")),
    b"p": lambda m: m.remember(int(m.source.line())),
    b"q": lambda m: m.remember(m.number("<B")),
    b"r": lambda m: m.remember(m.number("<I")),
    b"\x94": lambda m: m.remember(len(m.memo)),
    b"P": lambda m: m.persist(_text(m.source.line())),
    b"Q": lambda m: m.persist(m.stack.pop()),
    b"]": lambda m: m.made([]),
    b"}": lambda m: m.made({}),
    b"\x8f": lambda m: m.made(set(), 3),
    b"l": lambda m: m.made(m.since_mark()),
    b"d": _Machine.new_dict,
    b"\x91": lambda m: m.made(frozenset(map(checked_key, m.since_mark())), 3),
    b"t": lambda m: m.made(tuple(m.since_mark())),
    b"\x85": lambda m: m.last_as_tuple(1),
    b"\x86": lambda m: m.last_as_tuple(2),
    b"\x87": lambda m: m.last_as_tuple(3),
    b"a": _Machine.append,
    b"e": _Machine.extend,
    b"s": lambda m: m.set_items([m.stack.pop(), m.stack.pop()][::-1]),
    b"u": lambda m: m.set_items(m.since_mark()),
    b"\x90": _Machine.add_items,
    b"c": lambda m: m.made(m.name_in_lines()),
    b"\x93": _Machine.name_on_stack,
    b"R": _Machine.call_last,
    b"\x81": _Machine.call_last,  # of a class
    b"\x92": _Machine.call_last_with_names,
    b"o": _Machine.call_since_mark,
    b"i": _Machine.call_in_lines,
    b"b": _Machine.build,
}

_REFUSED = {
    b"\x82": "a number for a name",
    b"\x83": "a number for a name",
    b"\x84": "a number for a name",
    b"\x97": "a buffer outside of it",
    b"\x98": "a buffer outside of it",
}
