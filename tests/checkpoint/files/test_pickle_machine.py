"""The interpreter of pickles: plain data as Python's own, and nothing else whatever a pickle says."""

from __future__ import annotations

import collections
import enum
import functools
import io
import os
import pickle
import pickletools
import random
import time
import tracemalloc
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optstate.checkpoint.files import pickle_machine, pickle_objects
from optstate.checkpoint.files.pickle_machine import Global, Object, PickleError, Stranger, UnsafeGlobalError
from optstate.checkpoint.files.pickle_objects import check_tree

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
THIS = __name__


def load(data: bytes, known: Collection[str] = ()) -> Any:
    return pickle_machine.load_pickle(data, known=known, rebuild={})


def refusal(data: bytes, known: Collection[str] = ()) -> str:
    with pytest.raises(PickleError) as caught:
        load(data, known)
    assert "\n" not in str(caught.value)
    return str(caught.value)


atoms = (
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64)
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text()
    | st.binary()
)
keys = atoms.filter(lambda key: type(key) is not int or abs(key) < 2**64)
keys = keys | st.tuples(keys, keys) | st.frozensets(keys, max_size=3)
trees = st.recursive(
    atoms | st.integers(-(2**900), 2**900) | st.sets(keys, max_size=4) | st.frozensets(keys, max_size=4),
    lambda inner: st.lists(inner) | st.dictionaries(keys, inner, max_size=5) | st.lists(inner).map(tuple),
    max_leaves=20,
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(trees, st.sampled_from(PROTOCOLS))
def test_plain_data_is_what_pickle_makes_of_it(tree: Any, protocol: int) -> None:
    data = pickle.dumps(tree, protocol)
    ours = load(data)
    assert repr(ours) == repr(pickle.loads(data))  # repr tells 1 from True and 0.0 from -0.0
    assert load(pickletools.optimize(data)) == ours


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (collections.OrderedDict(b=1, a=[2]), {"b": 1, "a": [2]}),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (collections.defaultdict(list, {1: [2]}), {1: [2]}),
        (bytearray(b"a\xff"), b"a\xff"),
        (bytearray(), b""),
        (b"", b""),
        (set(), set()),
        (frozenset(), frozenset()),
        (2 - 1j, 2 - 1j),
        ("\ud800 half\n\\u0041", "\ud800 half\n\\u0041"),
        (float("inf"), float("inf")),
    ],
    ids=repr,
)
def test_other_containers_become_the_plain_ones(value: Any, plain: Any, protocol: int) -> None:
    ours = load(pickle.dumps(value, protocol))
    assert type(ours) is type(plain)
    assert ours == plain
    assert list(ours) == list(plain) if isinstance(plain, dict) else True


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_is_shared_stays_shared_and_a_list_may_contain_itself(protocol: int) -> None:
    shared: list[Any] = [1]
    own: list[Any] = [shared, shared, {"again": shared}]
    own.append(own)
    ours = load(pickle.dumps(own, protocol))
    assert ours[0] is ours[1] is ours[2]["again"]
    assert ours[3] is ours


def test_what_was_set_on_an_ordered_dict_is_passed_over() -> None:
    value = collections.OrderedDict(a=1)
    value._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]  # as a module's state_dict has it
    assert load(pickle.dumps(value, 2)) == {"a": 1}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_file_is_left_behind_the_pickle(protocol: int) -> None:
    file = io.BytesIO(b"before" + pickle.dumps([1, "two"], protocol) + pickle.dumps(3, protocol) + b"after")
    file.seek(6)
    assert pickle_machine.load_pickle(file, known=(), rebuild={}) == [1, "two"]
    assert pickle_machine.load_pickle(file, known=(), rebuild={}) == 3
    assert file.read() == b"after"


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"(dp0\nS'a\\x41\"'\np1\nI1\ns.", {'aA"': 1}),
        (b"(lp0\nI01\naI00\naL5L\naF1.5\naNa.", [True, False, 5, 1.5, None]),
        (b"\x80\x02U\x03abcT\x02\x00\x00\x00de\x86.", ("abc", "de")),
        (b"(I1\nI2\nd.", {1: 2}),
        (b"I1\n(I2\nI3\n1.", 1),
        (b"I1\n2\x86.", (1, 1)),
    ],
)
def test_opcodes_that_only_python_2_wrote(data: bytes, value: Any) -> None:
    assert repr(load(data)) == repr(value) == repr(pickle.loads(data))


def test_every_opcode_of_python_is_interpreted_or_refused_on_purpose() -> None:
    tables = (
        pickle_machine._CONSTANTS,
        pickle_machine._FIXED,
        pickle_machine._SIZED,
        pickle_machine._LINES,
        pickle_machine._STEPS,
        pickle_machine._REFUSED,
    )
    ours = [code for table in tables for code in table]
    assert len(ours) == len(set(ours))
    assert {*ours, b"."} == {opcode.code.encode("latin1") for opcode in pickletools.opcodes}


# Objects.


class Plain:
    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


class Slots:
    __slots__ = ("a",)


class WithNames:
    def __new__(cls, *args: Any, **kwargs: Any) -> WithNames:
        return super().__new__(cls)

    def __getnewargs_ex__(self) -> Any:
        return (1,), {"b": 2}


class Stage(enum.Enum):
    TWO = 2


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_known_class_becomes_an_object_with_its_state(protocol: int) -> None:
    ours = load(pickle.dumps(Plain(rank=8, inner=[Plain()]), protocol), {f"{THIS}.Plain"})
    assert type(ours) is Object
    assert (ours.name, ours.args, ours.kwargs) == (f"{THIS}.Plain", (), {})
    assert ours.state["rank"] == 8
    assert ours.state["inner"][0].state is None


@pytest.mark.parametrize("protocol", [4, 5])
def test_what_a_class_is_made_with_is_kept(protocol: int) -> None:
    ours = load(pickle.dumps(WithNames(), protocol), {f"{THIS}.WithNames"})
    assert (ours.args, ours.kwargs) == ((1,), {"b": 2})
    slots = Slots()
    slots.a = 3  # type: ignore[attr-defined]
    assert load(pickle.dumps(slots, protocol), {f"{THIS}.Slots"}).state == (None, {"a": 3})
    stage = load(pickle.dumps(Stage.TWO, protocol), {f"{THIS}.Stage"})
    assert (stage.name, stage.args) == (f"{THIS}.Stage", (2,))


@pytest.mark.parametrize("data", [b"(I7\nimod\nName\n.", b"(cmod\nName\nI7\no.", b"cmod\nName\n(I7\ntR."])
def test_the_older_ways_to_make_an_object(data: bytes) -> None:
    ours = load(data, {"mod.Name"})
    assert (ours.name, ours.args) == ("mod.Name", (7,))
    assert pickle_machine.load_pickle(data, known=(), rebuild={"mod.Name": lambda n: n + 1}) == 8
    with pytest.raises(PickleError, match="does not take"):
        pickle_machine.load_pickle(data, known=(), rebuild={"mod.Name": lambda: 0})


def test_a_class_and_an_object_can_be_keys() -> None:
    keyed = {Plain: 1, Stage.TWO: 2, Plain(): 3, Plain(): 4}
    ours = load(pickle.dumps(keyed, 4), {f"{THIS}.Plain", f"{THIS}.Stage"})
    assert ours[Global(f"{THIS}.Plain")] == 1
    assert len(ours) == 4


def test_persistent_ids() -> None:
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            return ("place", 5) if isinstance(obj, range) else None

    file = io.BytesIO()
    Pickler(file, 2).dump([range(3)])
    assert "outside" in refusal(file.getvalue())
    assert pickle_machine.load_pickle(file.getvalue(), known=(), rebuild={}, persistent=lambda saved: saved) == [
        ("place", 5)
    ]


# Strangers: made with names that are not known, where these may pass.


class Words(list[Any]): ...


class Table(dict[Any, Any]): ...


def with_strangers(data: bytes, **options: Any) -> Any:
    return pickle_machine.load_pickle(
        data, known=(), rebuild={}, strange=lambda name: not name.startswith("os."), **options
    )


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_stranger_keeps_what_it_was_given(protocol: int) -> None:
    words, table = Words([1, Words([2])]), Table(a=1)
    words.name = "w"  # type: ignore[attr-defined]
    ours = with_strangers(pickle.dumps([Plain(a=Plain()), words, table, Stage.TWO], protocol))
    assert all(type(value) is Stranger for value in ours)
    assert ours[0].state["a"].name == f"{THIS}.Plain"
    assert (ours[1].name, ours[1].items[0], ours[1].state) == (f"{THIS}.Words", 1, {"name": "w"})
    assert ours[1].items[1].items == [2]
    assert ours[2].items == {"a": 1}
    assert ours[3].args == (2,)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_call_of_a_stranger_is_a_stranger(protocol: int) -> None:
    ours = with_strangers(pickle.dumps(WithNames(), protocol))  # functools.partial(...)() before protocol 4
    assert type(ours) is Stranger
    if protocol in (2, 3):
        partial = ours.args[0]
        assert (ours.name, partial.name) == ("functools.partial", "functools.partial")


def test_names_of_python_2_are_those_of_python_3() -> None:
    assert with_strangers(b"c__builtin__\nlong\n.") == Global("builtins.int")
    assert with_strangers(b"c__builtin__\nxrange\n(I3\ntR.").name == "builtins.range"
    assert with_strangers(b"cexceptions\nValueError\n)R.").name == "builtins.ValueError"
    for function in (int, str, range, ValueError, functools.reduce):
        expected = Global(f"{function.__module__.replace('_functools', 'functools')}.{function.__qualname__}")
        assert with_strangers(pickle.dumps(function, 2)) == expected


@pytest.mark.parametrize(
    "data",
    [
        b"ca\nB\n)R(N\x90.",  # filled as a set
        b"ca\nB\n)RNaNNs.",  # as a list and as a dict
        b"ca\nB\n)RNNsNa.",
        b"ca\nB\n)R]Ns.",  # without a key
        b"ca\nB\n)R]NNsa.",
        b"ca\nB\n)R(]Nu.",  # a list is no key
        b"ca\nB\n)RNR.",
        b"ca\nB\n)RNbNb}b}b.",
        b"ca\nB\n}b.",
        b"N)R.",
        b"ccopyreg\n_reconstructor\n(ca\nB\ntR.",
    ],
)
def test_a_stranger_is_used_as_python_could(data: bytes) -> None:
    with pytest.raises(PickleError, match="malformed|in a key|without a value|takes more"):
        with_strangers(data)


def test_strangers_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_machine, "MOST_OBJECTS", 20_000)
    items = pickle.dumps(list(range(500)), 2)[:-1] + b"q\x7f0"
    for made in (
        b"ca\nB\n)R" * 10_000,
        b"ca\nB\n" + b")R" * 10_000,
        items + b"ccopyreg\n_reconstructor\nq\x01ca\nB\nq\x02" + b"0h\x01h\x02h\x02h\x7f\x87R" * 1000,
        items + b"ca\nB\n" + b"(" + b"h\x7f" * 300 + b"tR" + b"h\x7f\x85R" * 300,
    ):
        with pytest.raises(PickleError, match="more than 20000 objects"):
            with_strangers(made + b".")


def test_nobody_goes_into_a_stranger() -> None:
    circle = Plain()
    circle.me = [circle]
    check_tree(with_strangers(pickle.dumps({"a": circle}, 4)))
    with pytest.raises(PickleError, match="contains itself"):
        check_tree(load(pickle.dumps({"a": circle}, 4), {f"{THIS}.Plain"}))


# What is not plain data.


class Evil:
    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_function_is_called(protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "called"
    data = pickle.dumps({"a": [Evil(os.system, f"touch {marker}")]}, protocol)
    assert b"\x93" in data or protocol < 4  # STACK_GLOBAL
    with pytest.raises(UnsafeGlobalError) as caught:
        load(data)
    assert caught.value.name == f"{os.system.__module__}.system"
    assert not marker.exists()
    pickle.loads(data)
    assert marker.exists()


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"cos\nsystem\nthis is never looked at", "os.system"),
        (b"(S'true'\nios\nsystem\n.", "os.system"),
        (b"(cos\nsystem\nS'true'\no.", "os.system"),
        (b"\x80\x02c__builtin__\neval\n.", "builtins.eval"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "os.system"),
        (b"\x80\x04\x8c\x09functools\x8c\x07partial\x93.", "functools.partial"),
        (b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93.", "builtins.getattr"),
        (b"c\n\n.", "."),
    ],
)
def test_an_unknown_name_ends_the_reading_at_once(data: bytes, name: str) -> None:
    with pytest.raises(UnsafeGlobalError) as caught:
        load(data, {"known.Class"})
    assert caught.value.name == name


def test_a_name_cannot_be_smuggled_into_the_message() -> None:
    assert "\x1b" not in refusal(b"c\x1b[31mos\nsystem\n.")
    assert len(refusal(b"c" + b"x" * 100_000 + b"\nsystem\n.")) < 500


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"N",
        b"0.",
        b"1.",
        b"t.",
        b"2.",
        b"\x85.",
        b"N\x86.",
        b"(.",
        b"h\x00.",
        b"q\x00.",
        b"\x94.",
        b"g5\n.",
        b"gx\n.",
        b"Np-1\n.",
        b"]N",
        b"NNa.",
        b"N(Ne.",
        b"]NNs.",
        b"}(Nu.",
        b"}(]Nu.",
        b"}(}Nu.",
        b"}(\x8fNu.",
        b"(]\x91.",
        b"\x8f(]\x90.",
        b"](N\x90.",
        b"(Nd.",
        b"(]Nd.",
        b"NNR.",
        b"N)R.",
        b"N)\x81.",
        b"cbuiltins\nset\nNR.",
        b"cbuiltins\nset\n(NtR.",
        b"cbuiltins\nset\n(NNtR.",
        b"cbuiltins\nset\n((]ltR.",
        b"cbuiltins\nbytes\n(I100000000000\ntR.",
        b"cbuiltins\nbytearray\n(I100000000000\ntR.",
        b"c_codecs\nencode\n(V\\u1234\nVlatin1\ntR.",
        b"c_codecs\nencode\n(Va\nVzip\ntR.",
        b"ccollections\nOrderedDict\n((I1\ntltR.",
        b"cbuiltins\ncomplex\n(V1\ntR.",
        b"cbuiltins\ncomplex\n(V1\nV2\ntR.",
        b"ccopyreg\n_reconstructor\n(NNNtR.",
        b"]}b.",
        b"NNb.",
        b"\x80\x06N.",
        b"\x8c\x05ab.",
        b"X\xff\xff\xff\xffab.",
        b"\x8e" + b"\xff" * 8 + b".",
        b"\x8d" + (2**62).to_bytes(8, "little") + b".",
        b"\x96" + (2**40).to_bytes(8, "little") + b".",
        b"\x95" + (2**40).to_bytes(8, "little") + b"N.",
        b"T\xff\xff\xff\xff.",
        b"\x8b\xff\xff\xff\xff.",
        b"\x8b\x00\x10\x00\x00" + b"\x7f" * 4096 + b".",
        b"L" + b"9" * 5000 + b"\n.",
        b"I0x10\n.",
        b"Ix\n.",
        b"Fx\n.",
        b"Sab\n.",
        b"S'\\x'\n.",
        b"S'\\xff'\n.",
        b"V\\u12\n.",
        b"X\x01\x00\x00\x00\xff.",
        b"\x8c\x01a\x93.",
        b"N\x8c\x01a\x93.",
        b"(o.",
        b"Px\n.",
        b"NQ.",
        b"\x82\x01.",
        b"\x83\x01\x00.",
        b"\x84\x01\x00\x00\x00.",
        b"\x97.",
        b"N\x98.",
        b"\xff.",
    ],
)
def test_a_malformed_pickle_is_a_pickle_error(data: bytes) -> None:
    assert refusal(data)


def test_what_is_a_key_is_soon_hashed() -> None:
    doubled = b"N" + b"2\x86" * 200  # a tuple of the last one twice, 200 times: its hash would never come
    started = time.perf_counter()
    assert "key of more than" in refusal(b"}" + doubled + b"Ns.")
    assert "key of more than" in refusal(b"\x8f(" + doubled + b"\x90.")
    nested = b"N" + b"\x85" * 100_000
    assert "key of more than" in refusal(b"}" + nested + b"Ns.")
    assert "bits in a key" in refusal(pickle.dumps({2**61 - 1: 0, 2 * (2**61 - 1): 0, 2**90: 0}))
    assert time.perf_counter() - started < 5


def peak(data: bytes) -> int:
    tracemalloc.start()
    try:
        refusal(data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "data",
    [
        b"\x8e" + (2**38).to_bytes(8, "little"),
        b"B\xff\xff\xff\x7f",
        b"X\xff\xff\xff\x7f",
        b"\x96" + (2**38).to_bytes(8, "little"),
        b"V" + b"a" * 1000,
        b"Nr\xff\xff\xff\xff0",  # the last of four thousand million references
        b"Np99999999999999\n0",
    ],
)
def test_no_number_makes_it_allocate(data: bytes) -> None:
    assert peak(data) < 1 << 20


def test_copies_of_one_value_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_machine, "MOST_OBJECTS", 20_000)
    text = pickle.dumps("a" * 64_000, 2)[:-1] + b"q\x000"
    copied = b"c_codecs\nencode\nq\x01h\x00Vlatin1\n\x86q\x020" + b"h\x01h\x02R" * 1000
    assert "more than 20000 objects" in refusal(text + copied)
    assert peak(text + copied) < 4 << 20
    items = pickle.dumps(list(range(500)), 2)[:-1] + b"\x85q\x7f0"
    assert "more than 20000 objects" in refusal(items + b"cbuiltins\nset\nq\x01" + b"h\x01h\x7fR" * 1000)
    for made in (b"]", b"}", b"(", b"\x8f", b"]\x94", b"Va\n", b")\x85", b"(l", b"cbuiltins\nset\n"):
        assert "more than 20000 objects" in refusal(made * 20_001)


def test_a_pickle_has_a_longest_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_machine, "MOST_BYTES", 1000)
    assert "longer than 1000 bytes" in refusal(pickle.dumps("a" * 1000))
    assert load(pickle.dumps("a" * 900) + b"more" * 1000) == "a" * 900


@pytest.mark.slow
@pytest.mark.parametrize("one", [b"]", b"(", b"\x85", b"cmod\nName\n"])
def test_deep_nesting_needs_no_recursion(one: bytes) -> None:
    depth = 100_000
    data = {
        b"]": one * depth + b"a" * (depth - 1),
        b"(": one * depth + b"t" * depth,
        b"\x85": b"N" + one * depth,
        b"cmod\nName\n": (one + b")\x81") * depth + b"b" * (depth - 1),
    }[one]
    ours = load(data + b".", {"mod.Name"})
    with pytest.raises(PickleError, match="nested more than 100"):
        check_tree(ours)
    del ours  # taking it apart needs none either


# Trees that cannot be gone through.


def nested(depth: int) -> Any:
    tree: Any = 1
    for _ in range(depth):
        tree = {"a": tree}
    return tree


def test_a_tree_of_usual_depth_is_gone_through() -> None:
    check_tree(1)
    check_tree("text")
    check_tree(nested(pickle_objects.DEEPEST))
    check_tree([[], [], (), {}, {1: {2}}, frozenset(), Object("a", ([],), {"b": []}, {"c": ()})])
    shared = [1] * 1000
    check_tree([shared] * 1000)


def test_depth_is_that_of_the_longest_way() -> None:
    half = nested(pickle_objects.DEEPEST // 2 + 1)
    tree: Any = half
    for _ in range(pickle_objects.DEEPEST // 2):
        tree = [tree]
    with pytest.raises(PickleError, match="nested more than 100"):
        check_tree([half, tree])
    with pytest.raises(PickleError, match="nested more than 100"):
        check_tree([tree, half])


@pytest.mark.parametrize("kind", ["list", "dict", "object", "key"])
def test_a_tree_that_contains_itself_is_refused(kind: str) -> None:
    inner: list[Any] = []
    held = Object("a", state=inner)
    inner.append({"list": inner, "dict": {1: inner}, "object": held, "key": {held: 1}}[kind])
    with pytest.raises(PickleError, match="contains itself"):
        check_tree({"a": [inner]})


def test_a_tree_that_unfolds_is_refused() -> None:
    tree: Any = ["leaf"]
    for _ in range(90):
        tree = [tree, tree]
    with pytest.raises(PickleError, match="more than 16777216 values"):
        check_tree(tree)
    text = "a" * (1 << 20)
    check_tree([text] * 10)
    with pytest.raises(PickleError, match="more than 16777216 values"):
        check_tree([[text] * 100] * 100)


def test_damaged_pickles_give_a_value_or_a_pickle_error() -> None:
    random.seed(0)
    tree = {"state": {0: {"step": 3, "x": (1.5, None, b"ab", {1, 2}), "o": Plain(a=1)}}, "groups": [[1], 2**70, "é"]}
    outcomes = collections.Counter[str]()
    for protocol in PROTOCOLS:
        whole = pickle.dumps(tree, protocol)
        for size in range(len(whole)):
            refusal(whole[:size], {f"{THIS}.Plain"})
        for _ in range(400):
            damaged = bytearray(whole)
            for _ in range(random.randint(1, 3)):
                damaged[random.randrange(len(damaged))] = random.randrange(256)
            try:
                check_tree(load(bytes(damaged), {f"{THIS}.Plain"}))
                outcomes["read"] += 1
            except PickleError:
                outcomes["refused"] += 1
    assert min(outcomes["read"], outcomes["refused"]) > 100
