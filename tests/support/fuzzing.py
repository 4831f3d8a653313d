"""Random damage to files: of bytes, of JSON, of pickles and of the values in them, the same for the same seed."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

from optstate.checkpoint.files.dtypes import BITS
from optstate.checkpoint.files.pickle_machine import Global, Object
from optstate.checkpoint.files.tensor_place import Stored
from optstate.checkpoint.files.torch_pickle_writer import Constant, Subclass, pickle_tree

__all__ = ["damaged", "damaged_json", "damaged_pickle", "damaged_tree", "damaged_zip", "rezipped", "safetensors_of"]

NUMBERS = [0, 1, 2, -1, 3, 255, 256, 2**31, -(2**31), 2**32, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30]
FLOATS = [0.5, -0.0, 1.0, 3.5, -1.5, 1e308, -1e308, 1e-320, 2.0**63]
TEXTS = ["", "a", "NaN", "#0", "#1", "$float", "a/b", "exp_avg", "Block8()", "Full(dtype='x')", "Factored(", "square"]
WORDS = ["Block8(block=-1)", "Block8(block=1e400)", "Full(3)", "Block4(block=0)", "Float8(" + "(" * 200, "Block8('a')"]
UGLY = ["\x1b[31mred\n", "\u202e", "\r\n", "x" * 5000, "../../etc/passwd", "%s{0}", "a\u0308", "\ud800", "\0", "\x9b"]
CONTAINERS: list[Callable[[], Any]] = [list, dict, tuple, lambda: [[]], lambda: {"": None}, lambda: [0] * 300]
LITERALS = [
    "NaN",
    "-Infinity",
    "1e999",
    "-0",
    '"\\ud800"',
    '"\\u0000"',
    "1" * 5000,
    "[" * 3000 + "]" * 3000,
    "{}x",
    "01",
]
OPCODES = b"(.012FIKJMNPQRSTUXVabcdegijhlopqrstu]}" + bytes(range(0x80, 0x97))
SNIPPETS = [
    b"cos\nsystem\n(S'true'\ntR",
    b"cbuiltins\neval\n(S'1'\ntR",
    b"c__builtin__\nset\n)R",
    b"cargparse\nNamespace\n)R}X\x01\x00\x00\x00aNsb",
    b"cfunctools\npartial\n(cos\nsystem\ntR)R",
    b"ccollections\ndeque\n)R(NNe",
    b"ca\nB\n)\x81X\x01\x00\x00\x00aNs",
    b"ctorch._utils\n_rebuild_sparse_tensor\n(NNtR",
    b"cnumpy._core.multiarray\nscalar\n(cnumpy\ndtype\n(X\x02\x00\x00\x00i8tRC\x08\x03\0\0\0\0\0\0\0tR",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ccollections\nOrderedDict\n)R",
    b"(((((((",
    b"]q\x00h\x00a",
    b"2" * 40,
    b"\x8a\xff" + b"\x7f" * 255,
    b"X\xff\xff\xff\x7f",
    b"J\xff\xff\xff\xff",
    b"}(h\x01h\x01u",
    b"G\x7f\xf8\0\0\0\0\0\0",
]


def _odd(random: Random) -> Any:
    """A value that is rarely what is expected."""
    kind = random.randrange(10)
    if kind < 3:
        return random.choice(NUMBERS)
    if kind < 5:
        return random.choice([*FLOATS, float("nan"), float("inf"), float("-inf")])
    if kind < 7:
        return random.choice(TEXTS + WORDS + UGLY)
    if kind < 8:
        return random.choice([None, True, False])
    if kind < 9:
        return random.choice(CONTAINERS)()
    nested: Any = 1
    for _ in range(random.choice([3, 40, 90])):
        nested = [nested] if random.random() < 0.5 else {"a": nested}
    return nested


# --- bytes --------------------------------------------------------------------------------------------------------


def damaged(content: bytes, other: bytes, random: Random) -> bytes:
    """Bytes changed, cut off, filled with zeros, taken out, repeated, or taken from another file."""
    data = bytearray(content)
    for _ in range(random.choice([1, 1, 1, 2, 4, 12])):
        # What a file says of itself is at its ends.
        size = len(data)
        at = random.choice(
            [random.randrange(size + 1), min(size, random.randrange(600)), max(0, size - random.randrange(900))]
        )
        length = random.choice([1, 2, 8, random.randrange(1, 2000)])
        match random.randrange(9):
            case 0 | 1:
                data[at : at + 1] = bytes([random.randrange(256)])
            case 2:
                width = random.choice([1, 2, 4, 8])
                data[at : at + width] = (random.choice(NUMBERS) % 256**width).to_bytes(width, "little")
            case 3:
                data[at : at + length] = bytes(min(length, size - at))
            case 4:
                del data[at : at + length]
            case 5:
                data[at:at] = data[at : at + length]
            case 6:
                start = random.randrange(len(other))
                data[at : at + length] = other[start : start + length]
            case 7:
                del data[at:]
            case 8:
                data[at:] = other[at:]
    return bytes(data)


def damaged_zip(content: bytes, random: Random) -> bytes:
    """A zip archive with other numbers in its headers and its directory."""
    data = bytearray(content)
    places = [
        match.start() for match in re.finditer(rb"PK(?:\x01\x02|\x03\x04|\x05\x06|\x06\x06|\x06\x07|\x07\x08)", content)
    ]
    for _ in range(random.choice([1, 1, 2, 5])):
        at = random.choice(places) + random.choice(
            [0, 4, 6, 8, 10, 14, 16, 18, 20, 22, 24, 26, 28, 30, 34, 38, 42, 46, 48]
        )
        width = random.choice([1, 2, 4, 8])
        value = random.choice([*NUMBERS, random.randrange(len(data)), random.randrange(64)])
        data[at : at + width] = (value % 256**width).to_bytes(width, "little")
    return bytes(data)


# --- JSON ---------------------------------------------------------------------------------------------------------


def damaged_json(text: str, random: Random) -> str:
    """JSON with other values, and at times with what is no JSON or comes twice."""
    tree = damaged_tree(json.loads(text), random)
    text = json.dumps(tree, ensure_ascii=random.random() < 0.9)
    if random.random() < 0.1:
        members = list(re.finditer(r'"[^"\\]*": (?:"[^"\\]*"|[\d.e-]+|null)', text))
        if members:
            member = random.choice(members)
            text = f"{text[: member.end()]}, {member[0]}{text[member.end() :]}"
    if random.random() < 0.1:
        numbers = list(re.finditer(r"(?<=: )[\d.e-]+", text))
        if numbers:
            number = random.choice(numbers)
            text = text[: number.start()] + random.choice(LITERALS) + text[number.end() :]
    return text


def safetensors_of(header: str, data: bytes) -> bytes:
    """A safetensors file with this header."""
    content = header.encode("utf-8", "surrogatepass")
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content + data


# --- trees --------------------------------------------------------------------------------------------------------


def damaged_tree(tree: Any, random: Random) -> Any:
    """A copy of nested dicts, lists, tuples, objects and plain values in which a few are others, missing, or more."""
    holder = [_copy(tree)]
    for _ in range(random.choice([1, 1, 1, 2, 3, 8])):
        places = _places(holder)
        container, key = random.choice(places)
        if isinstance(container, list):
            _damage_list(container, key, places, random)
        else:
            _damage_dict(container, key, places, random)
        if not holder:
            return None
    return _frozen(holder[0])


class _Tuple(list[Any]):
    """A tuple while it may still change."""


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return _Tuple(map(_copy, value))
    if isinstance(value, list):
        return [_copy(item) for item in value]
    return Object(value.name, value.args, value.kwargs, _copy(value.state)) if isinstance(value, Object) else value


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    if isinstance(value, _Tuple):
        return tuple(map(_frozen, value))
    if isinstance(value, list):
        return list(map(_frozen, value))
    return Object(value.name, value.args, value.kwargs, _frozen(value.state)) if isinstance(value, Object) else value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Everywhere that a value is: its container, and its key there."""
    places, todo = [], [value]
    while todo:
        container = todo.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        for key in keys:
            places.append((container, key))
            item = container[key].state if isinstance(container[key], Object) else container[key]
            if isinstance(item, dict | list) and len(item) < 200:
                todo.append(item)
    return places


def _damage_list(container: list[Any], key: int, places: list[tuple[Any, Any]], random: Random) -> None:
    match random.randrange(6):
        case 0:
            del container[key]
        case 1:
            container.insert(key, _copy(container[key]))
        case 2:
            container.insert(key, _odd(random))
        case _:
            container[key] = _changed(container[key], places, random)


def _damage_dict(container: dict[Any, Any], key: Any, places: list[tuple[Any, Any]], random: Random) -> None:
    match random.randrange(8):
        case 0:
            del container[key]
        case 1:
            container[random.choice([*container, *TEXTS, *WORDS, *UGLY])] = container.pop(key)
        case 2:
            container[random.choice(TEXTS + WORDS + UGLY)] = _copy(container[key])
        case _:
            container[key] = _changed(container[key], places, random)


def _changed(value: Any, places: list[tuple[Any, Any]], random: Random) -> Any:
    """Something else in the place of a value, often something like it."""
    kind = random.randrange(8)
    if isinstance(value, Constant) and kind < 5:
        return _other_tensor(value, random)
    if kind == 0:
        return random.choice([[value], {"a": value}, _Tuple([value]), str(value)[:100]])
    if kind == 1:
        container, key = random.choice(places)
        return _copy(container[key])
    if kind < 5 and isinstance(value, bool | int | float):
        return random.choice([-value, value + 1, value * 1000, float(value), 1 - value, random.choice(NUMBERS)])
    if kind < 4 and isinstance(value, str):
        cut = random.randrange(len(value) + 1)
        return value[:cut] + random.choice(["", *TEXTS, *WORDS, *UGLY]) + value[cut + random.randrange(2) :]
    return _odd(random)


def _other_tensor(tensor: Constant, random: Random) -> Constant:
    """The bytes of a tensor in another shape, of another dtype, fewer of them, or with odd numbers."""
    dtype = random.choice(
        [tensor.dtype, tensor.dtype, "F32", "F64", "BF16", "F16", "U8", "I64", "BOOL", "C64", "F8_E4M3"]
    )
    count = len(tensor.data) * 8 // BITS[dtype]
    half = next((n for n in range(2, 40) if count % n == 0), 1)
    shape = random.choice(
        [tensor.shape[::-1], (count,), (count, 1), (1, count), (half, count // half), (), (0,), (1,), (0, 3)]
    )
    elements = 1
    for n in shape:
        elements *= n
    data = tensor.data[: elements * BITS[dtype] // 8]
    if len(data) * 8 != elements * BITS[dtype]:
        shape, data = (0,), b""
    if data and random.random() < 0.3:
        data = random.choice([b"\xff", b"\x80", b"\0", b"\x7f"]) * len(data)
    return Constant(dtype, shape, data)


def writable(value: Any) -> Any:
    """What `create_torch` writes for a tree that was read: tensors with their numbers, objects as what they were."""
    if isinstance(value, Stored):
        with open(value.path, "rb") as file:
            file.seek(value.start)
            data = file.read(value.nbytes)
        return Constant(value.dtype, value.shape, data)
    if isinstance(value, dict):
        return {key: writable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(writable, value))
    return Object(value.name, (), {}, writable(value.state)) if isinstance(value, Object) else value


def tree_for_torch(value: Any) -> Any:
    """A tree with what `create_torch` writes for objects."""
    if isinstance(value, dict):
        return {key: tree_for_torch(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(tree_for_torch, value))
    if isinstance(value, Object):
        return Subclass(value.name, "F32", (1,), value.state if isinstance(value.state, dict) else {})
    return value


# --- pickles ------------------------------------------------------------------------------------------------------


def damaged_pickle(data: bytes, other: bytes, random: Random) -> bytes:
    """A pickle with other opcodes and numbers, parts of it or of another one again, and what would do harm."""
    result = bytearray(data)
    for _ in range(random.choice([1, 1, 1, 2, 4])):
        at = random.randrange(len(result) or 1)
        match random.randrange(7):
            case 0:
                result[at : at + 1] = bytes([random.choice(OPCODES)])
            case 1:
                result[at : at + 1] = bytes([random.randrange(256)])
            case 2:
                result[at:at] = random.choice(SNIPPETS)
            case 3:
                length = random.randrange(1, 300)
                result[at:at] = result[at : at + length]
            case 4:
                del result[at : at + random.randrange(1, 60)]
            case 5:
                start = random.randrange(len(other))
                result[at:at] = other[start : start + random.randrange(1, 300)]
            case 6:
                width = random.choice([1, 2, 4])
                result[at : at + width] = (random.choice(NUMBERS) % 256**width).to_bytes(width, "little")
    return bytes(result)


def pickle_of(value: Any) -> bytes:
    """The pickle of a tree that was read, objects made of what they were made of."""
    return b"\x80\x02" + _opcodes(value) + b"."


def _opcodes(value: Any) -> bytes:
    if isinstance(value, Object):
        made = _opcodes(Global(value.name)) + _opcodes(value.args) + b"\x81"
        return made if value.state is None else made + _opcodes(value.state) + b"b"
    if isinstance(value, Global):
        module, _, name = value.name.rpartition(".")
        return f"c{module}\n{name}\n".encode()
    if isinstance(value, dict):
        return b"}(" + b"".join(_opcodes(part) for item in value.items() for part in item) + b"u"
    if isinstance(value, list | tuple):
        items = b"".join(map(_opcodes, value))
        return b"](" + items + b"e" if isinstance(value, list) else b"(" + items + b"t"
    return pickle_tree(value)[0][2:-1]


def rezipped(content: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """A file of torch.save with another pickle in it, and a directory that is right."""
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(written, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(entry.filename, change(data) if entry.filename.endswith("/data.pkl") else data)
    return written.getvalue()
