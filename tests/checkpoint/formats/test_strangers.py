"""Training checkpoints as people save them: whatever else is in the file, the optimizer's state is what torch reads."""

from __future__ import annotations

import argparse
import array
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import ipaddress
import pathlib
import random
import re
import types
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from optstate.checkpoint import CheckpointError
from optstate.checkpoint.files import torch_archive_reader
from optstate.checkpoint.files.pickle_objects import Stranger, Unread
from optstate.checkpoint.files.torch_types import is_harmful
from optstate.checkpoint.formats.registry import read_torch_checkpoint
from optstate.checkpoint.open_checkpoint import open_checkpoint
from tests.cli.test_hostile import answer, refusal
from tests.support.foreign_files import Tiny, fields, identical, param, saved, train
from tests.support.paths import DATA

pytestmark = pytest.mark.slow

THIS = __name__


# --- whatever else is in the file ---------------------------------------------------------------------------------


class Plain:
    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


class AttributeDict(dict[Any, Any]):
    def __getattr__(self, name: str) -> Any:
        return self[name]


class Many(list[Any]): ...


class Words(set[Any]): ...


class Counted(collections.Counter[str]): ...


class Ordered(collections.OrderedDict[Any, Any]): ...


class WithNames:
    def __new__(cls, *args: Any, **kwargs: Any) -> WithNames:
        return super().__new__(cls)

    def __getnewargs_ex__(self) -> Any:
        return (1,), {"b": 2}


class Slotted:
    __slots__ = ("a",)


class Stage(enum.Enum):
    TWO = 2


class Level(enum.IntEnum):
    HIGH = 3


class Flags(enum.IntFlag):
    A = 1
    B = 2


@dataclasses.dataclass
class Settings:
    lr: float = 0.1
    inner: Any = None


class Point(collections.namedtuple("Point", "x y")): ...


class Own(Tensor): ...


class Node:
    """As a configuration's nodes: each knows the one it is in."""

    def __init__(self, parent: Node | None) -> None:
        self.parent, self.children = parent, [] if parent is None else [Node(None)]


def circle() -> Any:
    top = Node(None)
    top.children = [Node(top), Node(top)]
    itself = AttributeDict(a=1)
    itself["self"] = itself
    return [top, itself]


def function(x: float) -> float:
    return x


def hooked() -> Any:
    parameter = nn.Parameter(torch.ones(3))
    parameter.register_hook(function)
    return parameter


def slotted() -> Any:
    value = Slotted()
    value.a = 1  # type: ignore[attr-defined]
    return value


def scheduler() -> Any:
    return torch.optim.lr_scheduler.LambdaLR(torch.optim.AdamW([nn.Parameter(torch.ones(3))]), function)


def quantized() -> Any:
    return torch.quantize_per_channel(torch.ones(2, 3), torch.ones(2), torch.zeros(2), 0, torch.quint8)


STRANGERS: dict[str, Callable[[], Any]] = {
    "Namespace": lambda: argparse.Namespace(lr=0.1, data="x", inner=argparse.Namespace()),
    "SimpleNamespace": lambda: types.SimpleNamespace(a=1),
    "datetime": lambda: [datetime.datetime.now(), datetime.date.today(), datetime.timedelta(1), datetime.timezone.utc],
    "partial": lambda: functools.partial(int, base=2),
    "partial of a method": lambda: functools.partial(torch.ones(2).add, alpha=2),
    "deque": lambda: collections.deque([1, torch.ones(2)], maxlen=5),
    "defaultdict(int)": lambda: collections.defaultdict(int, {1: 2}),
    "defaultdict(list)": lambda: collections.defaultdict(list, {1: [2]}),
    "defaultdict(function)": lambda: collections.defaultdict(function, {1: 2}),
    "dict subclass": lambda: AttributeDict(a=1, b=AttributeDict(c=torch.ones(2))),
    "list subclass": lambda: Many([1, Many([2])]),
    "set subclass": lambda: Words({1, 2}),
    "Counter subclass": lambda: Counted("aab"),
    "OrderedDict subclass": lambda: Ordered(a=1),
    "namedtuple": lambda: Point(1, [2]),
    "module": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.MultiheadAttention(4, 2)),
    "optimizer": lambda: torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1),
    "scheduler": scheduler,
    "generators": lambda: [random.getstate(), np.random.get_state(), torch.get_rng_state(), np.random.default_rng(1)],
    "numpy": lambda: [
        np.arange(4),
        np.dtype("f4"),
        np.float64(2),
        np.str_("a"),
        np.datetime64("2020-01-01"),
        np.float32,
    ],
    "long double": lambda: [np.longdouble(1), np.complex64(1j), np.array([1, "a", None], dtype=object)],
    "path": lambda: [pathlib.PosixPath("a/b"), pathlib.PurePosixPath("a")],
    "enum": lambda: [Stage.TWO, Level.HIGH, Flags.A | Flags.B, Stage],
    "dataclass": lambda: Settings(inner=Settings()),
    "numbers": lambda: [decimal.Decimal("1.5"), fractions.Fraction(1, 3), 1 + 2j, 2**100, uuid.uuid4()],
    "containers": lambda: [{1, 2}, frozenset("ab"), bytearray(b"a"), range(3), slice(1, 2), array.array("d", [1.0])],
    "constants": lambda: [Ellipsis, NotImplemented, int, type(None), ValueError("a"), len, function],
    "pattern": lambda: [re.compile("a+"), ipaddress.ip_address("::1")],
    "of torch": lambda: [torch.float32, torch.device("cpu"), torch.Size([2, 3]), torch.strided],
    "keywords": WithNames,
    "slots": slotted,
    "circle": circle,
    "keys": lambda: {Stage.TWO: 1, function: 2, (1, Stage.TWO): 3, torch.ones(3): 4, np.int64(3): 5},
    "sparse": lambda: torch.eye(2).to_sparse(),
    "sparse rows": lambda: torch.eye(2).to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "quantized rows": quantized,
    "quantized 32": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint32),
    "meta": lambda: torch.zeros(2, device="meta"),
    "complex128": lambda: torch.zeros(3, dtype=torch.complex128),
    "complex32": lambda: torch.zeros(3, dtype=torch.complex32),
    "conjugate": lambda: torch.zeros(2, dtype=torch.complex64).conj(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "float8": lambda: torch.ones(3).to(torch.float8_e5m2),
    "parameter with hooks": hooked,
    "tensor subclass": lambda: torch.ones(2).as_subclass(Own),
}
EVERY_WAY = [(protocol, layout) for protocol in (2, 3, 4, 5) for layout in ("zip", "older")]


@pytest.fixture(scope="module")
def adamw() -> dict[str, Any]:
    torch.manual_seed(0)
    model = Tiny()
    return train(model, torch.optim.AdamW(model.groups())).state_dict()  # type: ignore[no-any-return]


def assert_holds(path: Path, state: dict[str, Any], **options: Any) -> Any:
    """The file's optimizer is `state`, as torch has it in memory: names of statistics, steps and all numbers."""
    ours = open_checkpoint(path, **options)
    assert [len(group.parameters) for group in ours.document.groups] == [
        len(g["params"]) for g in state["param_groups"]
    ]
    for place, kept in state["state"].items():
        own = param(ours, place)
        assert own.step == int(kept["step"])
        assert own.slots.keys() == kept.keys() - {"step"}
        for slot, record in own.slots.items():
            assert identical(fields(ours, record)[""], kept[slot])
    return ours


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", STRANGERS)
def test_strangers_beside_the_optimizer_do_not_keep_it_from_being_read(
    name: str, adamw: dict[str, Any], tmp_path: Path
) -> None:
    value = STRANGERS[name]()
    for protocol, layout in EVERY_WAY:
        path = tmp_path / f"{protocol}{layout}.pt"
        tree = {"before": value, "optimizer": adamw, "args": {"a": [value]}}
        try:
            torch.save(tree, path, pickle_protocol=protocol, _use_new_zipfile_serialization=layout == "zip")
        except RuntimeError:  # torch's older layout has no storages on the meta device, and none that are nested
            assert layout == "older"
            continue
        assert_holds(path, adamw)


def test_the_names_of_strangers_are_told(adamw: dict[str, Any], tmp_path: Path) -> None:
    ours = open_checkpoint(saved({"args": argparse.Namespace(a=Stage.TWO), "optimizer": adamw}, tmp_path))
    told = f"of Python objects in the file only the names are read: argparse.Namespace, {THIS}.Stage"
    assert told in ours.notes
    many = {f"a{i}": type(f"Class{i}", (Plain,), {"__module__": THIS}) for i in range(9)}
    globals().update({kind.__name__: kind for kind in many.values()})
    path = saved({"args": {key: kind() for key, kind in many.items()}, "optimizer": adamw}, tmp_path)
    assert open_checkpoint(path).notes[-1].endswith("Class5 and 3 more")


def test_every_command_reads_a_file_with_strangers(adamw: dict[str, Any], tmp_path: Path) -> None:
    tree = {"model": nn.Linear(3, 4), "args": argparse.Namespace(lr=0.1), "optimizer": adamw, "when": circle()}
    path, plain = saved(tree, tmp_path, "a.pt"), saved(adamw, tmp_path, "b.pt")
    assert "argparse.Namespace" in answer("inspect", path)
    assert answer("check", path) == answer("check", plain)
    answer("convert", path, tmp_path / "c.pt")
    assert "verdict\tequal" in answer("diff", plain, tmp_path / "c.pt")
    again = torch.load(tmp_path / "c.pt", weights_only=True)
    for place, kept in adamw["state"].items():
        assert all(torch.equal(again["state"][place][key], value) for key, value in kept.items())


def test_an_optimizer_within_a_dict_of_a_strange_class(adamw: dict[str, Any], tmp_path: Path) -> None:
    for tree in (AttributeDict(a=AttributeDict(optimizer=adamw)), {"a": Many([adamw])}, AttributeDict(adamw)):
        assert_holds(saved(tree, tmp_path), adamw)
    assert_holds(saved(AttributeDict(a=adamw, b=adamw), tmp_path), adamw, key="b")


def test_the_dict_of_a_strange_class_may_unfold(tmp_path: Path) -> None:
    """To 1000^4 values within four containers; nobody can wait for them."""
    tree: Any = AttributeDict(a=1)
    for _ in range(6):
        tree = AttributeDict(dict.fromkeys(range(1000), tree))
    with pytest.raises(CheckpointError, match="no optimizer state"):
        open_checkpoint(saved({"args": tree}, tmp_path))
    inner: list[Any] = []
    inner.append(inner)
    state: Any = AttributeDict(state={}, param_groups=[], extra=inner)
    with pytest.raises(CheckpointError, match="contains itself"):
        open_checkpoint(saved({"args": state}, tmp_path))


# --- the optimizer's own state ------------------------------------------------------------------------------------

IN_STATE: dict[str, tuple[Callable[[], Any], str]] = {
    "object": (lambda: Plain(a=1), f"a Python object, {THIS}.Plain"),
    "dict subclass": (lambda: AttributeDict(a=1), f"a Python object, {THIS}.AttributeDict"),
    "module": (lambda: nn.Linear(2, 2), "a Python object, torch.nn.modules.linear.Linear"),
    "function": (lambda: function, f"a Python object, {THIS}.function"),
    "deque": (lambda: collections.deque([torch.ones(2)]), "a Python object, collections.deque"),
    "array": (lambda: np.ones(3), "a Python object, numpy"),
    "sparse": (lambda: torch.eye(2).to_sparse(), "a sparse tensor, which optstate does not read"),
    "meta": (lambda: torch.ones(2, device="meta"), "a tensor on the meta device, without numbers, which optstate does"),
    "complex128": (
        lambda: torch.ones(2, dtype=torch.complex128),
        "ComplexDoubleStorage', which optstate does not read",
    ),
    "quantized": (quantized, "a quantized tensor, which optstate does not read"),
    "subclass": (lambda: torch.ones(2).as_subclass(Own), f"a Python object, {THIS}.Own"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", IN_STATE)
@pytest.mark.parametrize("where", ["exp_avg", "more", "list", "all"])
def test_a_stranger_in_the_state_is_refused_and_named(
    name: str, where: str, adamw: dict[str, Any], tmp_path: Path
) -> None:
    make, words = IN_STATE[name]
    value, state = make(), dict(adamw["state"])
    if where == "all":
        state[0] = value
    elif where == "list":
        state[0] = {**state[0], "more": [torch.ones(3, 3), value]}
    else:
        state[0] = {**state[0], where: value}
    message = refusal("inspect", saved({"args": nn.Linear(2, 2), "o": {**adamw, "state": state}}, tmp_path))
    assert words in message
    assert "parameter '#0'" in message or "state of parameter 0" in message


@pytest.mark.parametrize("key", ["lr", "betas", "eps", "weight_decay"])
def test_a_stranger_for_a_hyper_parameter_is_refused(key: str, adamw: dict[str, Any], tmp_path: Path) -> None:
    for value in (Many([0.9, 0.99]), (0.9, Plain()), torch.eye(2).to_sparse()):
        groups = [{**adamw["param_groups"][0], key: value}, *adamw["param_groups"][1:]]
        message = refusal("inspect", saved({**adamw, "param_groups": groups}, tmp_path))
        assert "param_groups[0] has a" in message
        assert f"as '{key}', not a number" in message


def test_other_values_of_a_group_are_left_out_and_told(adamw: dict[str, Any], tmp_path: Path) -> None:
    groups = [{**adamw["param_groups"][0], "layers": Plain()}, *adamw["param_groups"][1:]]
    ours = assert_holds(saved({**adamw, "param_groups": groups}, tmp_path), adamw)
    told = f"the hyper-parameter of group 0 'layers' is left out: it is a Python object, {THIS}.Plain"
    assert told in ours.notes


KINDS = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", ">i4", ">f8"]


@pytest.mark.parametrize("kind", KINDS)
def test_numpys_numbers_are_numbers(kind: str, adamw: dict[str, Any], tmp_path: Path) -> None:
    for number in (np.dtype(kind).type(3), np.array(3, dtype=kind)):
        state = {place: {**kept, "step": number} for place, kept in adamw["state"].items()}
        groups = [
            {**group, "lr": np.dtype(kind).type(1), "betas": (np.float64(0.9), 0.999)}
            for group in adamw["param_groups"]
        ]
        for protocol in (2, 4):
            path = tmp_path / "a.pt"
            torch.save({"state": state, "param_groups": groups}, path, pickle_protocol=protocol)
            ours = assert_holds(path, adamw)
            assert ours.document.recipe == "adamw"
            assert ours.document.groups[0].hyper["lr"] == 1
            assert ours.document.groups[0].hyper["betas"] == (0.9, 0.999)
            assert ours.document.parameters[0].slots["exp_avg"].beta == 0.9
    exact = np.nextafter(np.dtype("f8").type(0.1), 1)
    assert torch_archive_reader.read_torch_file(
        saved([exact, np.float32(0.1), np.bool_(True), np.int64(-(2**63))], tmp_path)
    ) == [
        float(exact),
        float(np.float32(0.1)),
        True,
        -(2**63),
    ]


def test_a_step_of_numpy_that_is_no_count(adamw: dict[str, Any], tmp_path: Path) -> None:
    for number in (
        np.float64("nan"),
        np.float64(0.5),
        np.int64(-1),
        np.ones(2),
        np.datetime64("2020-01-01"),
        np.str_("3"),
    ):
        state = {**adamw["state"], 0: {**adamw["state"][0], "step": number}}
        assert "parameter '#0': step is" in refusal("inspect", saved({**adamw, "state": state}, tmp_path))


def test_an_optimizer_that_was_saved_itself(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tiny()
    optimizer = train(model, torch.optim.AdamW(model.groups()))
    state = optimizer.state_dict()
    for tree in (optimizer, {"model": model, "optimizer": optimizer}, [{"o": optimizer}]):
        for layout in (True, False):
            torch.save(tree, tmp_path / "a.pt", _use_new_zipfile_serialization=layout)
            assert_holds(tmp_path / "a.pt", state)
    raw = {"state": optimizer.state, "param_groups": optimizer.param_groups}
    assert_holds(saved(raw, tmp_path), state)
    two = {"a": optimizer, "b": train(model, torch.optim.SGD(model.parameters(), lr=0.1))}
    with pytest.raises(CheckpointError, match="the state of 2 optimizers; give --key a or --key b"):
        open_checkpoint(saved(two, tmp_path))
    assert_holds(saved(two, tmp_path), state, key="a")
    # One beside its own state_dict, as a scheduler that was saved itself has it, is not another one.
    assert_holds(saved({"optimizer": state, "live": optimizer}, tmp_path), state)


def test_a_file_without_optimizer_state_is_called_what_it_is(tmp_path: Path) -> None:
    message = refusal("inspect", saved(nn.Linear(2, 2), tmp_path))
    assert "no optimizer state in it: it is a Python object, torch.nn.modules.linear.Linear" in message
    assert "'model', 'args'" in refusal("inspect", saved({"model": nn.Linear(2, 2), "args": Plain()}, tmp_path))


# --- an optimizer for every parameter -----------------------------------------------------------------------------

SAMPLES = ("torch_adamw", "torch_adamw_bf16", "hf_adafactor", "bnb_adamw8bit", "torch_sgd_momentum", "torch_adafactor")


def one_each(state: dict[str, Any]) -> dict[str, Any]:
    """As torchtune saves the optimizers that it makes for every parameter."""
    return {
        f"layers.{i}.weight": {
            "state": {0: state["state"][i]} if i in state["state"] else {},
            "param_groups": [{**group, "params": [0]}],
        }
        for group in state["param_groups"]
        for i in group["params"]
    }


@pytest.mark.parametrize("sample", SAMPLES)
def test_one_optimizer_for_every_parameter_is_read_as_one_of_all(sample: str, tmp_path: Path) -> None:
    path = DATA / sample / "optimizer.pt"
    state, whole = torch.load(path, weights_only=True), open_checkpoint(path)
    for tree in ({"optimizer": one_each(state), "epochs_run": 1}, one_each(state)):
        ours = open_checkpoint(saved(tree, tmp_path))
        names = {f"#{i}": f"layers.{i}.weight" for i in range(len(whole.document.parameters))}
        assert sorted(p.name for p in ours.document.parameters) == sorted(names.values())
        assert (ours.kind, ours.document.recipe) == (whole.kind, whole.document.recipe)
        by_name = {p.name: p for p in ours.document.parameters}
        for theirs in whole.document.parameters:
            own = by_name[names[theirs.name]]
            assert (own.shape, own.step, own.extra) == (theirs.shape, theirs.step, theirs.extra)
            assert ours.document.groups[own.group].hyper == whole.document.groups[theirs.group].hyper
            for slot, record in theirs.slots.items():
                mine, expected = fields(ours, own.slots[slot]), fields(whole, record)
                assert mine.keys() == expected.keys()
                assert all(identical(mine[key], value) for key, value in expected.items())
        assert any("an optimizer for every parameter" in note for note in ours.notes)


def test_one_optimizer_each_becomes_a_file_that_torch_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tiny()
    parts = {name: torch.optim.AdamW([p], lr=1e-3) for name, p in model.named_parameters()}
    for ids in torch.randint(0, 90, (3, 8)):
        nn.functional.cross_entropy(model(ids), ids).backward()
        for part in parts.values():
            part.step()
            part.zero_grad()
    tree = {"optimizer": {name: part.state_dict() for name, part in parts.items()}, "seed": 0}
    path = saved(tree, tmp_path)
    answer("convert", path, tmp_path / "b.pt")
    whole = torch.optim.AdamW(model.named_parameters(), lr=0.5)
    whole.load_state_dict(torch.load(tmp_path / "b.pt", weights_only=True))
    assert whole.param_groups[0]["lr"] == 1e-3
    for name, p in model.named_parameters():
        expected = parts[name].state[p]
        assert whole.state[p].keys() == expected.keys()
        assert all(torch.equal(whole.state[p][key], value) for key, value in expected.items())
    assert "1 optimizer" not in answer("inspect", path)
    last = list(parts)[-1]
    assert_holds(path, parts[last].state_dict(), key=f"optimizer.{last}")
    assert_holds(path, whole.state_dict(), key="optimizer")


def test_groups_of_several_learning_rates_and_what_is_no_such_file(adamw: dict[str, Any], tmp_path: Path) -> None:
    tree = one_each(torch.load(DATA / "torch_adamw" / "optimizer.pt", weights_only=True))
    names = list(tree)
    for name in names[1::2]:
        tree[name]["param_groups"][0]["lr"] = 0.25
    ours = open_checkpoint(saved(tree, tmp_path))
    groups = [list(group.parameters) for group in ours.document.groups if group.hyper["lr"] == 0.25]
    assert [name for group in groups for name in group] == names[1::2]
    gan = {"generator": tree[names[0]], "discriminator": tree[names[1]]}
    with pytest.raises(CheckpointError, match="the state of 2 optimizers; give --key generator or --key discriminator"):
        open_checkpoint(saved(gan, tmp_path))
    with pytest.raises(CheckpointError, match="the state of 2 optimizers; give --key a or --key b"):
        open_checkpoint(saved({"a": adamw, "b": tree}, tmp_path))


# --- what would do something --------------------------------------------------------------------------------------

HARMFUL = (
    *("os.system", "posix.system", "nt.system", "subprocess.Popen", "builtins.eval", "builtins.exec", "builtins.open"),
    *("builtins.__import__", "builtins.print", "runpy.run_path", "shutil.rmtree", "socket.create_connection"),
    *("importlib.import_module", "pickle.loads", "torch.serialization.os.system", "ctypes.CDLL", "code.interact"),
    *("webbrowser.open", "pty.spawn", "commands.getoutput", "sys.exit", "torch.load", "urllib.request.urlopen"),
)
HARMLESS = (
    *("argparse.Namespace", "builtins.getattr", "builtins.range", "functools.partial", "collections.deque"),
    *("posix.stat_result", "omegaconf.dictconfig.DictConfig", "my.os_tools.Config", "project.code.Model", "timm.http"),
    *("torch.nn.modules.linear.Linear", "torch.storage._load_from_bytes", "datetime.datetime", "uuid.UUID"),
)


def test_names_that_do_something_are_told_from_others() -> None:
    assert [name for name in HARMFUL if not is_harmful(name)] == []
    assert [name for name in HARMLESS if is_harmful(name)] == []
    assert not any(map(is_harmful, torch_archive_reader.KNOWN))


def test_what_a_stranger_is_made_of_is_kept(tmp_path: Path) -> None:
    ours = torch_archive_reader.read_torch_file(
        saved([argparse.Namespace(lr=0.1), AttributeDict(a=1), torch.eye(2).to_sparse()], tmp_path)
    )
    assert isinstance(ours[0], Stranger)
    assert (ours[0].name, ours[0].state) == ("argparse.Namespace", {"lr": 0.1})
    assert (ours[1].name, ours[1].items) == (f"{THIS}.AttributeDict", {"a": 1})
    assert isinstance(ours[2], Unread)


def test_a_file_cannot_fill_the_message_with_names(adamw: dict[str, Any], tmp_path: Path) -> None:
    state = {**adamw, "x": Plain()}
    path = saved(state, tmp_path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"Plain", b"P\x1b[3m"))
    assert all(note.isprintable() for note in read_torch_checkpoint(path).notes)
