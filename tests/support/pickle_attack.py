"""Hostile pickles, written opcode by opcode: everything that harms when it is called, in every way to call it.

Run as a program it reads them in a process of its own under Python's audit, with little memory, and prints what came of
it: `python -m tests.support.pickle_attack`, or with `all` every function in every way.
With `bite FOLDER` Python's own pickle reads the plain ones instead, which shows that they do what they are meant to:
each makes a file "touched" there.
"""

from __future__ import annotations

import codecs
import copyreg
import io
import json
import os
import pickle
import resource
import struct
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

TOUCHED = "touched"

# --- opcodes ------------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def data(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def name(full: str) -> bytes:
    module, _, last = full.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def on_stack(full: str) -> bytes:
    module, _, last = full.rpartition(".")
    return text(module) + text(last) + b"\x93"


def a_tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def a_list(*items: bytes) -> bytes:
    return b"](" + b"".join(items) + b"e"


def a_dict(*items: bytes) -> bytes:
    return b"}(" + b"".join(items) + b"u"


def called(full: str, *items: bytes) -> bytes:
    return name(full) + a_tuple(*items) + b"R"


NESTED = name("os.system") + a_tuple(text(f"touch {TOUCHED}")) + b"R."
CODE = text(f"open({TOUCHED!r}, 'w').close()")

# --- what is called: a function and what it is given --------------------------------------------------------------

BITING: dict[str, tuple[bytes, ...]] = {
    "os.system": (text(f"touch {TOUCHED}"),),
    "posix.system": (text(f"touch {TOUCHED}"),),
    "os.mkdir": (text(TOUCHED),),
    "subprocess.check_output": (a_list(text("touch"), text(TOUCHED)),),
    "subprocess.call": (a_list(text("touch"), text(TOUCHED)),),
    "builtins.eval": (CODE,),
    "builtins.exec": (CODE,),
    "builtins.open": (text(TOUCHED), text("w")),
    "io.open": (text(TOUCHED), text("w")),
    "codecs.open": (text(TOUCHED), text("w")),
    "logging.FileHandler": (text(TOUCHED),),
    "zipfile.ZipFile": (text(TOUCHED), text("w")),
    "tarfile.open": (text(TOUCHED), text("w")),
    "gzip.open": (text(TOUCHED), text("w")),
    "timeit.timeit": (CODE, text("pass"), name("time.time"), b"K\x01"),
    "cProfile.run": (CODE,),
    "pickle.loads": (data(NESTED),),
    "_pickle.loads": (data(NESTED),),
    "functools.reduce": (name("os.mkdir"), a_list(text(TOUCHED), b"M\xff\x01")),
}
"""Each makes a file or folder "touched" when Python reads it, or tries to."""

HARMFUL: dict[str, tuple[bytes, ...]] = {
    **BITING,
    "os.popen": (text(f"touch {TOUCHED}"),),
    "numpy._core.multiarray.scalar": (
        called("numpy.dtype", text("O8"), b"\x89", b"\x88"),
        data(NESTED),
    ),
    "nt.system": (text(f"touch {TOUCHED}"),),
    "os._exit": (b"K\x03",),
    "os.abort": (),
    "os.execv": (text("/bin/true"), a_list(text("true"))),
    "os.fork": (),
    "os.kill": (b"K\x00", b"K\x09"),
    "sys.exit": (b"K\x03",),
    "sys.setrecursionlimit": (b"K\x0a",),
    "builtins.exit": (),
    "builtins.__import__": (text("antigravity"),),
    "builtins.compile": (CODE, text("a"), text("exec")),
    "builtins.getattr": (name("os"), text("system")),
    "builtins.setattr": (name("builtins.object"), text("a"), b"N"),
    "builtins.globals": (),
    "builtins.print": (text("printed"),),
    "builtins.input": (),
    "builtins.breakpoint": (),
    "builtins.map": (name("os.system"), a_list(text(f"touch {TOUCHED}"))),
    "builtins.memoryview": (b"C\x01a",),
    "builtins.bytearray": (b"J\xff\xff\xff\x7f",),
    "builtins.range": (b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f",),
    "importlib.import_module": (text("xmlrpc.server"),),
    "runpy.run_path": (text(TOUCHED),),
    "types.FunctionType": (b"N", b"}"),
    "types.CodeType": (b"K\x00",),
    "marshal.loads": (b"C\x01i",),
    "torch.load": (text(TOUCHED),),
    "torch.storage._load_from_bytes": (data(NESTED),),
    "torch.hub.load": (text("a/b"), text("c")),
    "torch.jit.load": (text(TOUCHED),),
    "torch._C._jit_pass_inline": (b"N",),
    "torch.serialization.os.system": (text(f"touch {TOUCHED}"),),
    "torch._utils._import_dotted_name": (text("os.system"),),
    "numpy.load": (text(TOUCHED), b"N", b"\x88"),
    "numpy.testing._private.utils.runstring": (CODE, b"}"),
    "numpy.f2py.crackfortran.getlincoef": (CODE, b"}"),
    "dill.loads": (data(NESTED),),
    "cloudpickle.cloudpickle.loads": (data(NESTED),),
    "joblib.load": (text(TOUCHED),),
    "atexit.register": (name("os.system"), text(f"touch {TOUCHED}")),
    "threading.Thread": (b"N", name("os.system")),
    "multiprocessing.context.Process": (b"N", name("os.system")),
    "asyncio.run": (b"N",),
    "signal.alarm": (b"K\x01",),
    "faulthandler._sigsegv": (),
    "ctypes.string_at": (b"K\x00",),
    "ctypes.CDLL": (text("libc.so.6"),),
    "socket.create_connection": (a_tuple(text("127.0.0.1"), b"K\x01"),),
    "http.client.HTTPSConnection": (text("127.0.0.1"),),
    "urllib.request.urlopen": (text("http://127.0.0.1:1"),),
    "webbrowser.open": (text("http://127.0.0.1:1"),),
    "shutil.rmtree": (text("."),),
    "tempfile.mkdtemp": (),
    "sqlite3.connect": (text(TOUCHED),),
    "dbm.dumb.open": (text(TOUCHED), text("c")),
    "shelve.open": (text(TOUCHED),),
    "pdb.run": (CODE,),
    "pty.spawn": (text("true"),),
    "code.interact": (),
    "time.sleep": (b"J\x10\x27\x00\x00",),
    "gc.disable": (),
    "pathlib.Path.touch": (called("pathlib.PosixPath", text(TOUCHED)),),
    "operator.methodcaller": (text("touch"),),
    "re.compile": (text("(a*)*b"),),
    "decimal.Decimal": (text("1e999999999"),),
    "collections.namedtuple": (text("A"), text("b c")),
    "enum.Enum": (text("A"), text("b c")),
    "string.Formatter.format": (text("{0.__class__}"),),
    "my.module.that.is.not.there": (text("a"),),
}

# --- ways to have it called ---------------------------------------------------------------------------------------


def as_instance(full: str, args: tuple[bytes, ...]) -> bytes:
    module, _, last = full.rpartition(".")
    return b"(" + b"".join(args) + f"i{module}\n{last}\n".encode()


WAYS: dict[str, Callable[[str, tuple[bytes, ...]], bytes]] = {
    "reduce": lambda f, a: name(f) + a_tuple(*a) + b"R",
    "name on the stack": lambda f, a: on_stack(f) + a_tuple(*a) + b"R",
    "new object": lambda f, a: name(f) + a_tuple(*a) + b"\x81",
    "new object with names": lambda f, a: name(f) + a_tuple(*a) + b"}\x92",
    "keywords": lambda f, a: name(f) + b")" + a_dict(text("a"), *(a[:1] or (b"N",))) + b"\x92",
    "object": lambda f, a: b"(" + name(f) + b"".join(a) + b"o",
    "instance": as_instance,
    "memo": lambda f, a: name(f) + b"q\x070" + b"h\x07" + a_tuple(*a) + b"q\x080h\x07h\x08R",
    "memo in lines": lambda f, a: name(f) + b"p1000\n0" + b"g1000\n" + a_tuple(*a) + b"R",
    "memoized": lambda f, a: name(f) + b"\x94" + a_tuple(*a) + b"\x94R\x94",
    "called again": lambda f, a: name(f) + a_tuple(*a) + b"R" + a_tuple(*a) + b"R)R",
    "partial": lambda f, a: called("functools.partial", name(f), *a) + b")R",
    "partial with state": lambda f, a: (
        called("functools.partial", name(f)) + a_tuple(name(f), a_tuple(*a), b"}", b"N") + b"b)R"
    ),
    "reduced": lambda f, a: called("functools.reduce", name(f), a_list(*a)),
    "mapped": lambda f, a: called("builtins.set", called("builtins.map", name(f), a_list(*a))),
    "default factory": lambda f, a: called("collections.defaultdict", name(f)) + text("k") + b"Ns",
    "item of an OrderedDict": lambda f, a: called("collections.OrderedDict", a_list(a_list(called(f, *a), b"N"))),
    "argument of a stranger": lambda f, a: called("argparse.Namespace", called(f, *a)),
    "state of a stranger": lambda f, a: called("argparse.Namespace") + a_dict(text("a"), called(f, *a)) + b"b",
    "setstate": lambda f, a: called("argparse.Namespace") + a_dict(text("__setstate__"), name(f)) + b"b",
    "class": lambda f, a: called("argparse.Namespace") + a_dict(text("__class__"), name(f)) + b"b",
    "slots": lambda f, a: called("argparse.Namespace") + a_tuple(b"N", a_dict(text("__dict__"), called(f, *a))) + b"b",
    "state setter": lambda f, a: called("argparse.Namespace") + b"\x94" + called(f, *a) + b"0",
    "state of the function": lambda f, a: name(f) + a_dict(text("__code__"), b"N") + b"b",
    "list of a stranger": lambda f, a: called("collections.deque") + b"(" + called(f, *a) + b"e",
    "append of a stranger": lambda f, a: called("collections.deque") + called(f, *a) + b"a",
    "dict of a stranger": lambda f, a: called("my.AttributeDict") + text("a") + called(f, *a) + b"s",
    "append of itself": lambda f, a: called(f, *a) + text("x") + b"a",
    "items of itself": lambda f, a: called(f, *a) + text("x") + b"Ns",
    "key": lambda f, a: b"}" + called(f, *a) + b"Ns",
    "in a set": lambda f, a: b"\x8f(" + called(f, *a) + b"\x90",
    "in a frozenset": lambda f, a: b"(" + called(f, *a) + b"\x91",
    "reconstructor": lambda f, a: called("copyreg._reconstructor", name(f), name("builtins.object"), b"N"),
    "reconstructed": lambda f, a: called("copyreg._reconstructor", name(f), name("builtins.str"), *(a[:1] or (b"N",))),
    "newobj": lambda f, a: called("copyreg.__newobj__", name(f), *a),
    "getattr": lambda f, a: called("builtins.getattr", called(f, *a), text("system")) + a_tuple(*a) + b"R",
    "getattr of the module": lambda f, a: (
        called("builtins.getattr", called("importlib.import_module", text(f.rpartition(".")[0])), text("system"))
        + a_tuple(*a)
        + b"R"
    ),
    "methodcaller": lambda f, a: called("operator.methodcaller", text("__call__"), *a) + a_tuple(name(f)) + b"R",
    "extension": lambda f, a: b"\x82\xf0" + a_tuple(*a) + b"R",
    "extension of two bytes": lambda f, a: b"\x83\xf0\x00" + a_tuple(*a) + b"R",
    "extension of four bytes": lambda f, a: b"\x84\xf0\x00\x00\x00" + a_tuple(*a) + b"R",
    "persistent id": lambda f, a: called(f, *a) + b"Q",
    "persistent class": lambda f, a: a_tuple(text("storage"), name(f), text("0"), text("cpu"), b"K\x01") + b"Q",
    "persistent module": lambda f, a: (
        a_tuple(text("module"), name(f), text("a.py"), text("")) + b"Q" + a_tuple(*a) + b"R"
    ),
    "tensor of a type": lambda f, a: called(
        "torch._tensor._rebuild_from_type_v2", name(f), name("torch.Tensor"), a_tuple(*a), b"}"
    ),
    "tensor of a class": lambda f, a: called(
        "torch._tensor._rebuild_from_type_v2",
        name("torch._utils._rebuild_wrapper_subclass"),
        name(f),
        a_tuple(name(f), name("torch.float32"), b")", b")", b"K\x00", b"N", text("cpu"), b"\x89"),
        a_dict(text("a"), called(f, *a)),
    ),
    "parameter": lambda f, a: called("torch._utils._rebuild_parameter", called(f, *a), b"\x88", b"}"),
    "size": lambda f, a: called("torch.Size", called(f, *a)),
    "scalar": lambda f, a: called("numpy._core.multiarray.scalar", called(f, *a), data(NESTED)),
    "encoded": lambda f, a: called("_codecs.encode", text("a"), text(f)),
    "buffer": lambda f, a: called(f, *a) + b"\x98",
}

ODD: dict[str, bytes] = {
    "calls within calls": called("a.B") + b")R" * 50_000,
    "strangers within strangers": name("a.B") * 20_000 + b")R" + b"\x85R" * 19_999,
    "states within states": (name("a.B") + b")R") * 20_000 + b"b" * 19_999,
    "a stranger within itself": called("a.B") + b"q\x010h\x01h\x01a",
    "a state that is its object": called("a.B") + b"q\x010h\x01h\x01b",
    "lists that double in a stranger": called(
        "a.B", a_list(b"N") + b"".join(b"q%c0h%c" % (i, i) + b"2\x86" for i in range(60))
    ),
    "a dict that doubles in a stranger": called("a.B")
    + b"q\x00"
    + text("a")
    + (b"h\x00" + text("b") + b"s") * 3
    + b"h\x00ss",
    "a long name": name("a." + "b" * 200_000) + b")R",
    "a name with control characters": name("a.\x1b[31m\x07\u202e") + b")R",
    "a name of many dots": name("a" + ".b" * 50_000) + b")R",
    "many names": b"(" + b"".join(name(f"a.b{i}") for i in range(20_000)) + b"t",
    "a key of many strangers": b"}" + b"".join(called("a.B") + b"Ns" for _ in range(3000)),
    "a doubled key": b"}" + b"N" + b"2\x86" * 200 + b"Ns",
    "a huge integer": b"\x8b\x00\x00\x10\x00" + b"\x7f" * (1 << 20),
    "a huge text": b"\x8d" + struct.pack("<Q", 1 << 62),
    "a huge frame": b"\x95" + struct.pack("<Q", 1 << 62),
    "a huge bytearray": b"\x96" + struct.pack("<Q", 1 << 40),
    "a huge memo": b"Nr\xff\xff\xff\xff",
    "many marks": b"(" * 100_000,
    "nested tuples in a stranger": called("a.B", b"N" + b"\x85" * 100_000),
    "sizes of numpy": called(
        "numpy._core.multiarray.scalar", called("numpy.dtype", text("i8"), b"\x89", b"\x88"), data(b"")
    ),
    "copies of a text in strangers": text("a" * 60_000) + b"q\x010" + (called("a.B", b"h\x01") + b"0") * 20_000,
}


EVERY_WAY = ("os.system", "builtins.eval", "builtins.getattr", "logging.FileHandler", "my.module.that.is.not.there")
"""Called in every way; all others in the first few, unless all are asked for."""


def pickles(everything: bool) -> Iterator[tuple[str, bytes]]:
    """Every hostile value, without the opcode that ends a pickle."""
    for full, args in HARMFUL.items():
        ways = [*WAYS] if everything or full in EVERY_WAY else [*WAYS][:6]
        for way in ways:
            yield f"{full} by {way}", WAYS[way](full, args)
    yield from ODD.items()


# --- files --------------------------------------------------------------------------------------------------------

STATE = a_dict(text("state"), b"}", text("param_groups"), b"]")


def placed(value: bytes) -> dict[str, bytes]:
    """A training checkpoint with a value beside the optimizer's state, in it, in a group of it, or instead of it."""
    group = a_dict(
        text("lr"), b"G?\xb9\x99\x99\x99\x99\x99\x9a", text("layers"), value, text("params"), a_list(b"K\x00")
    )
    kept = a_dict(b"K\x00", a_dict(text("exp_avg"), value))
    return {
        "beside": a_dict(text("args"), value, text("optimizer"), STATE),
        "in the state": a_dict(
            text("state"), kept, text("param_groups"), a_list(a_dict(text("params"), a_list(b"K\x00")))
        ),
        "in a group": a_dict(text("state"), b"}", text("param_groups"), a_list(group)),
        "alone": value,
    }


def in_zip(value: bytes) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x04" + value + b".")
        archive.writestr("a/data/0", bytes(4))
        archive.writestr("a/version", b"3\n")
    return content.getvalue()


def in_older(value: bytes) -> bytes:
    before = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    return b"".join(pickle.dumps(part, 2) for part in before) + b"\x80\x02" + value + b"." + pickle.dumps([], 2)


LAYOUTS: dict[str, Callable[[bytes], bytes]] = {
    "zip": in_zip,
    "older": in_older,
    "pickle": lambda value: b"\x80\x04" + value + b".",
}


def files(everything: bool) -> Iterator[tuple[str, bytes]]:
    """Every value in one of the places and one of the layouts, in turn, and beside the state in the zip layout."""
    for number, (what, value) in enumerate(pickles(everything)):
        forms = placed(value)
        yield f"{what}, beside, zip", in_zip(forms["beside"])
        place = [*forms][number % len(forms)]
        layout = [*LAYOUTS][number // len(forms) % len(LAYOUTS)]
        yield f"{what}, {place}, {layout}", LAYOUTS[layout](forms[place])


# --- the two programs ---------------------------------------------------------------------------------------------


def bite(folder: Path) -> None:
    """Have Python's pickle read what bites, and print which did."""
    os.chdir(folder)
    bitten = []
    for full, args in BITING.items():
        try:
            pickle.loads(b"\x80\x04" + WAYS["reduce"](full, args) + b".")
        except Exception as error:
            print(f"{full}: {error!r}", file=sys.stderr)
        if os.path.isdir(TOUCHED):
            os.rmdir(TOUCHED)
            bitten.append(full)
        elif os.path.exists(TOUCHED):
            os.remove(TOUCHED)
            bitten.append(full)
    print(json.dumps(bitten))


def attack(everything: bool) -> None:
    """Read all files, and print what came of it."""
    from optstate.checkpoint.formats import lerobot  # noqa: F401 - or reading would import it
    from tests.support import fuzz_cases as fuzz

    copyreg.add_extension("os", "system", 240)
    results = fuzz.Results()
    for encoding in ("cp437", "raw_unicode_escape", "unicode_escape"):
        codecs.lookup(encoding)
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        for warm in (in_zip, in_older):
            Path("case.pt").write_bytes(warm(a_dict(text("args"), called("a.B"), text("optimizer"), STATE)))
            for number in range(len(fuzz.ARGUMENTS)):
                fuzz.commanded(Path("case.pt"), number, fuzz.Results())
        fuzz.limit_memory()
        sys.addaudithook(fuzz._watch)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number, (what, content) in enumerate(files(everything)):
            Path("case.pt").write_bytes(content)
            read(what, Path("case.pt"), number, fuzz, results)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        left = sorted(os.listdir("."))
    print(json.dumps({**vars(results), "grown": grown * 1024, "left": left}))


def read(what: str, path: Path, number: int, fuzz: Any, results: Any) -> None:
    """What the commands do with one file; the command itself for one of thirty."""
    random = Random(number)
    began = time.process_time()
    summary = fuzz.attempt(f"{what} inspect", lambda: fuzz.opened(path), results)
    if summary is not None:
        fuzz.attempt(f"{what} check", lambda: fuzz.checked(summary), results)
        if (checkpoint := summary.checkpoint) is not None:
            fuzz.attempt(f"{what} convert", lambda: fuzz.converted(checkpoint, random), results)
    if number % 30 == 0:
        fuzz.attempt(
            f"{what} command", lambda: fuzz.commanded(path, number // 30 % len(fuzz.ARGUMENTS), results), results
        )
    results.cases["files"] += 1
    results.slowest = max(results.slowest, (time.process_time() - began, what))


if __name__ == "__main__":
    if sys.argv[1:2] == ["bite"]:
        bite(Path(sys.argv[2]))
    else:
        attack(everything=sys.argv[1:2] == ["all"])
