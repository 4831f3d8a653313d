"""Names for numbered parameters: lists, groups, models; what does not fit is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import adam_mini
import pytest
import safetensors.torch
import torch
from torch import nn

import optstate
from optstate.checkpoint import CheckpointError
from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.open_checkpoint import open_checkpoint
from optstate.checkpoint.parameter_names import NamedParameter, give_names, read_names
from optstate.recipes import AdamW4bit
from tests.support.foreign_files import Tiny, adamw, check_document, identical, saved, tensor, train
from tests.support.paths import ROOT

IN_GROUPS = ["embed.weight", "fc1.weight", "fc2.weight", "fc1.bias", "norm.weight", "norm.bias"]
"""The order of `Tiny.groups`; that of the module has the vectors in between."""

HERE = __name__


# What `package.module:factory` may lead to.


def module() -> nn.Module:
    return Tiny().to(torch.bfloat16)


def tied() -> nn.Module:
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["embed"].weight
    return model


def pairs() -> Any:
    return Tiny().named_parameters()


def groups() -> Any:
    named = dict(Tiny().named_parameters())
    return ({"params": [(name, named[name]) for name in part]} for part in (IN_GROUPS[:3], IN_GROUPS[3:]))


def groups_with_names() -> Any:
    named = dict(Tiny().named_parameters())
    return [{"params": [named[name] for name in p], "param_names": p} for p in (IN_GROUPS[:3], IN_GROUPS[3:])]


def nameless() -> Any:
    return Tiny().parameters()


def failing() -> Any:
    raise RuntimeError("no weights here\nand a second line")


def leaving() -> Any:
    raise SystemExit(0)


def nothing() -> Any:
    return 3


class Sizes:
    @staticmethod
    def wide() -> nn.Module:
        return nn.Linear(1 << 20, 1 << 20)  # 4 TiB: only on the meta device


@pytest.fixture
def numbered(tmp_path: Path) -> Checkpoint:
    """Two groups of three parameters each."""
    return open_checkpoint(saved(adamw(), tmp_path))


@pytest.fixture
def one_group(tmp_path: Path) -> Checkpoint:
    torch.manual_seed(0)
    model = Tiny()
    tree = train(model, torch.optim.AdamW(model.parameters())).state_dict()
    return open_checkpoint(saved(tree, tmp_path, "one.pt"))


def listed(folder: Path, content: Any, name: str = "names") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def names_of(checkpoint: Checkpoint) -> list[str]:
    return [param.name for param in checkpoint.document.parameters]


def test_a_text_file_has_a_name_a_line(tmp_path: Path) -> None:
    names = read_names(listed(tmp_path, "a.weight\n\n  b \r\nc"))
    assert names.named == (NamedParameter("a.weight"), NamedParameter("b"), NamedParameter("c"))
    assert (names.groups, names.of_module) == ((), False)


def test_json_lists_names_groups_or_shapes(tmp_path: Path) -> None:
    assert read_names(listed(tmp_path, ["a", "b"])).named == (NamedParameter("a"), NamedParameter("b"))
    nested = read_names(listed(tmp_path, [["a"], [], ["b", "c"]]))
    assert (nested.named, nested.groups) == ((NamedParameter("a"), NamedParameter("b"), NamedParameter("c")), (1, 0, 2))
    shaped = read_names(listed(tmp_path, {"b": [2, 3], "a": None}))
    assert shaped.named == (NamedParameter("b", (2, 3)), NamedParameter("a"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\nb\na", "the name 'a' comes twice"),
        ("\n\n", "it names no parameters"),
        ('{"a": [1], "a": [2]}', "the name 'a' comes twice"),
        ('{"a": [-1]}', "the shape of 'a' is"),
        ('["a", 1]', "not names: a list of them"),
        ('[["a"], "b"]', "not names: a list of them"),
        ('["a"', "not valid JSON"),
        ("<html></html>", "an HTML page, not a list of names"),
    ],
)
def test_lists_that_are_none(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_names(listed(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_a_file_of_weights_cannot_give_the_order(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(Tiny().state_dict(), path)
    with pytest.raises(CheckpointError, match="sorted by name.*package.module:factory"):
        read_names(path)
    with pytest.raises(CheckpointError, match="no such file"):
        read_names(tmp_path / "missing.txt")


def test_a_module_gives_names_shapes_and_dtypes() -> None:
    names = read_names(f"{HERE}:module")
    expected = tuple(NamedParameter(n, tuple(p.shape), "bfloat16") for n, p in Tiny().named_parameters())
    assert (names.named, names.groups, names.of_module) == (expected, (), True)
    assert [named.name for named in read_names(f"{HERE}:tied").named] == ["embed.weight"]


def test_a_model_is_built_without_memory() -> None:
    assert read_names(f"{HERE}:Sizes.wide").named[0] == NamedParameter("weight", (1 << 20, 1 << 20), "float32")


@pytest.mark.parametrize("factory", ["groups", "groups_with_names"])
def test_param_groups_give_names_in_their_order(factory: str) -> None:
    names = read_names(f"{HERE}:{factory}")
    assert [named.name for named in names.named] == IN_GROUPS
    assert (names.groups, names.of_module) == ((3, 3), False)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (f"{HERE}:failing", "the factory fails: RuntimeError: no weights here$"),
        (f"{HERE}:nameless", "gives a Parameter where a name and a parameter are needed; give names"),
        (f"{HERE}:nothing", "the factory returns a value of type int"),
        (f"{HERE}:missing", "the factory fails: AttributeError"),
        (f"{HERE}:leaving", "the factory fails: SystemExit: 0$"),
        ("no_such_module_here:build", "the factory fails: ModuleNotFoundError: No module named"),
        (f"{HERE}:HERE", "it is of type str, no function"),
    ],
)
def test_factories_that_fail_are_one_line(factory: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_names(factory)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_factory_in_the_working_directory_is_found(tmp_path: Path) -> None:
    listed(tmp_path, "import torch\n\ndef build():\n    return torch.nn.Linear(3, 2)\n", "my_model_of_two.py")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    script = listed(
        elsewhere,
        "from optstate.checkpoint.parameter_names import read_names\n"
        "print(read_names('my_model_of_two:build').named[0].name)\n",
        "script.py",
    )
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        check=True,
        capture_output=True,
        text=True,
    )
    assert found.stdout == "weight\n"


# --- names for a checkpoint ---------------------------------------------------------------------------------------


def test_a_list_names_parameters_in_the_order_of_the_groups(numbered: Checkpoint, tmp_path: Path) -> None:
    paragraphs = "\n".join([*IN_GROUPS[:3], "", "", *IN_GROUPS[3:], ""])
    for content in (paragraphs, [IN_GROUPS[:3], IN_GROUPS[3:]]):
        named = give_names(numbered, read_names(listed(tmp_path, content)))
        check_document(named)
        assert names_of(named) == IN_GROUPS
        assert [list(group.parameters) for group in named.document.groups] == [IN_GROUPS[:3], IN_GROUPS[3:]]
        for old, new in zip(numbered.document.parameters, named.document.parameters, strict=True):
            assert (new.shape, new.step, new.group) == (old.shape, old.step, old.group)
            for before, after in zip(old.keys, new.keys, strict=True):
                assert after.startswith(f"{new.name}/")
                assert identical(tensor(named.tensors[after]), tensor(numbered.tensors[before]))


def test_a_module_names_one_group_and_gives_dtypes(one_group: Checkpoint) -> None:
    named = give_names(one_group, read_names(f"{HERE}:module"))
    assert names_of(named) == [name for name, _ in Tiny().named_parameters()]
    assert {param.dtype for param in named.document.parameters} == {"bfloat16"}


def test_the_order_of_a_module_is_not_that_of_groups(numbered: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match=r"optimizer's 2 groups, which have 3 \+ 3 parameters") as caught:
        give_names(numbered, read_names(f"{HERE}:module"))
    assert caught.value.refused
    assert names_of(give_names(numbered, read_names(f"{HERE}:groups"))) == IN_GROUPS


def test_shapes_that_differ_are_refused_with_both(numbered: Checkpoint) -> None:
    with pytest.raises(
        CheckpointError,
        match=r"gives 'fc1.bias' of shape \[80\] for parameter '#2', which has \[96, 80\] in the checkpoint",
    ) as caught:
        give_names(numbered, read_names(f"{HERE}:pairs"))
    assert caught.value.refused


def test_counts_and_groups_must_be_the_same(numbered: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"gives 5 names, the checkpoint has 6 parameters \(3 \+ 3 in its groups\)"
    ):
        give_names(numbered, read_names(listed(tmp_path, IN_GROUPS[:5])))
    with pytest.raises(CheckpointError, match=r"groups of 2 \+ 4 names, the checkpoint's have 3 \+ 3 parameters"):
        give_names(numbered, read_names(listed(tmp_path, [IN_GROUPS[:2], IN_GROUPS[2:]])))


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["torch.optim.AdamW", "bitsandbytes.optim.AdamW8bit"])
def test_an_order_alone_does_not_name_several_groups(kind: str, tmp_path: Path) -> None:
    """A list in the model's order would put a matrix's state under a vector's name: only groups or shapes tell."""
    torch.manual_seed(0)
    model = Tiny()
    path = saved(train(model, resolve_name(kind)(model.groups())).state_dict(), tmp_path)
    of_model = [name for name, _ in model.named_parameters()]
    for order in (of_model, IN_GROUPS):
        for content in ("\n".join(order), order, dict.fromkeys(order)):
            with pytest.raises(CheckpointError, match=r"2 param groups, which have 3 \+ 3 parameters") as caught:
                open_checkpoint(path, names=str(listed(tmp_path, content)))
            assert caught.value.refused
            assert "empty line between groups" in str(caught.value)
    wrong = "\n".join([*of_model[:2], "", *of_model[2:]])
    with pytest.raises(CheckpointError, match="which names are of which"):
        open_checkpoint(path, names=str(listed(tmp_path, wrong)))
    named = open_checkpoint(path, names=str(listed(tmp_path, "\n".join([*IN_GROUPS[:3], "", *IN_GROUPS[3:]]))))
    shapes = {param.name: param.shape for param in named.document.parameters}
    assert shapes == {name: tuple(param.shape) for name, param in model.named_parameters()}


def test_shapes_name_several_groups_unless_two_groups_share_one(tmp_path: Path) -> None:
    def state(*shapes: tuple[int, ...]) -> Path:
        params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer = torch.optim.AdamW([{"params": params[:2]}, {"params": params[2:]}])
        optimizer.step()
        return saved(optimizer.state_dict(), tmp_path)

    path = state((2, 3), (4, 3), (3,))
    named = open_checkpoint(path, names=str(listed(tmp_path, {"a": [2, 3], "b": [4, 3], "c": [3]})))
    assert names_of(named) == ["a", "b", "c"]
    with pytest.raises(CheckpointError, match=r"gives 'c' of shape \[3\] for parameter '#1', which has \[4, 3\]"):
        open_checkpoint(path, names=str(listed(tmp_path, {"a": [2, 3], "c": [3], "b": [4, 3]})))
    path = state((2, 3), (4, 3), (4, 3))
    with pytest.raises(CheckpointError, match="which names are of which"):
        open_checkpoint(path, names=str(listed(tmp_path, {"a": [2, 3], "c": [4, 3], "b": [4, 3]})))
    named = open_checkpoint(path, names=str(listed(tmp_path, [["a", "b"], ["c"]])))
    assert names_of(named) == ["a", "b", "c"]


def test_a_single_group_takes_a_list_with_empty_lines(one_group: Checkpoint, tmp_path: Path) -> None:
    order = [name for name, _ in Tiny().named_parameters()]
    named = give_names(one_group, read_names(listed(tmp_path, "\n\n".join(order))))
    assert names_of(named) == order


@pytest.mark.parametrize(("shape", "fits"), [([33, 129], True), ([33, 130], False), ([32, 129], False), ([], False)])
def test_shapes_of_packed_codes_are_checked_by_their_counts(shape: list[int], fits: bool, tmp_path: Path) -> None:
    """Two codes of 4 bits share a byte, and an odd count looks like an even one: the file does not tell the shape."""
    param = nn.Parameter(torch.ones(33, 129))
    optimizer = AdamW4bit([param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    path = saved(optimizer.state_dict(), tmp_path)
    assert open_checkpoint(path).document.parameters[0].shape is None
    names = str(listed(tmp_path, {"p": shape}))
    if fits:
        assert open_checkpoint(path, names=names).document.parameters[0].shape == (33, 129)
        return
    with pytest.raises(
        CheckpointError, match=r"the shapes that it gives are not those.*codes has shape \[2129\]"
    ) as caught:
        open_checkpoint(path, names=names)
    assert caught.value.refused
    other = AdamW4bit([nn.Parameter(torch.ones(shape))])
    with pytest.raises(CheckpointError, match=r"codes has shape \[2129\]"):
        optstate.load(other, path, allow_lossy=True)


def test_shapes_are_filled_in_where_the_file_has_none(tmp_path: Path) -> None:
    tree = torch.optim.SGD(Tiny().parameters(), lr=0.1).state_dict()
    shapes = {name: list(param.shape) for name, param in Tiny().named_parameters()}
    path = saved(tree, tmp_path)
    named = open_checkpoint(path, names=str(listed(tmp_path, shapes)))
    assert [list(param.shape or ()) for param in named.document.parameters] == list(shapes.values())


def test_names_that_a_file_has_must_be_the_given_ones(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tiny()
    tree = train(model, torch.optim.AdamW(model.named_parameters())).state_dict()
    own = open_checkpoint(saved(tree, tmp_path))
    order = [name for name, _ in model.named_parameters()]
    same = give_names(own, read_names(f"{HERE}:module"))
    assert names_of(same) == order
    assert {param.dtype for param in same.document.parameters} == {"bfloat16"}
    other = [*order[:5], "head.weight"]
    with pytest.raises(CheckpointError, match="does not have 'fc2.weight', a parameter's name.*'head.weight'"):
        give_names(own, read_names(listed(tmp_path, other)))
    with pytest.raises(CheckpointError, match="parameter 1 is 'fc1.weight' in the checkpoint and 'fc2.weight' there"):
        give_names(own, read_names(listed(tmp_path, IN_GROUPS[:1] + IN_GROUPS[2:3] + IN_GROUPS[1:2] + IN_GROUPS[3:])))


def test_adam_minis_lower_case_names_are_spelt_again(tmp_path: Path) -> None:
    model = nn.ModuleDict({"Embed": nn.Linear(4, 3), "Norm": nn.LayerNorm(3)})
    optimizer = adam_mini.Adam_mini(model.named_parameters(), dim=4, n_heads=2, verbose=False)
    model["Norm"](model["Embed"](torch.ones(2, 4))).square().sum().backward()
    optimizer.step()
    own = open_checkpoint(saved(optimizer.state_dict(), tmp_path))
    names = [name for name, _ in model.named_parameters()]
    assert names_of(own) == [name.lower() for name in names]
    assert names_of(give_names(own, read_names(listed(tmp_path, names)))) == names
