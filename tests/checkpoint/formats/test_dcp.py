"""Folders of torch.distributed.checkpoint against what torch itself reads from them.

tests/data/make_dcp.py wrote dcp_two_ranks and dcp_optstate; dcp_adamw and dcp_adamw_flat are one model in both forms.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp_of_torch
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from optstate.checkpoint.document.document import TensorValue
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.safetensors_header import read_header
from optstate.checkpoint.files.tensor_bytes import load_tensor
from optstate.checkpoint.files.tensor_place import Pieces, Stored
from optstate.checkpoint.formats import dcp
from tests.support.paths import DATA

FOLDERS = ("dcp_adamw", "dcp_adamw_flat", "dcp_two_ranks", "dcp_optstate")
DTYPES = {"F32": torch.float32, "U8": torch.uint8, "BF16": torch.bfloat16}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def numbers(stored: Stored) -> Tensor:
    """A tensor by its place alone."""
    if isinstance(stored, Pieces):
        return load_tensor(stored)
    assert stored.stride is None
    data = Path(stored.path).read_bytes()[stored.start : stored.start + stored.nbytes]
    return torch.frombuffer(bytearray(data), dtype=DTYPES[stored.dtype]).view(stored.shape)


def read_by_torch(folder: Path, into: Path) -> dict[str, Any]:
    """Everything in the folder by joined keys, as torch's own converter gives it."""
    dcp_to_torch_save(folder, into)
    flat: dict[str, Any] = {}

    def join(tree: Any, place: str) -> None:
        for key, value in tree.items():
            if isinstance(value, dict):
                join(value, f"{place}{key}.")
            else:
                flat[f"{place}{key}"] = value

    join(torch.load(into, weights_only=True), "")
    return flat


def save(folder: Path, state: dict[str, Any]) -> Path:
    dcp_of_torch.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def stepped(model: nn.Module, optimizer: Any, width: int = 4) -> Any:
    for _ in range(2):
        model(torch.ones(2, width)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def saved(folder: Path, model: nn.Module, optimizer: Any, flat: bool = False, prefix: str = "optim") -> Path:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    return save(folder, {prefix: state} if prefix else state)


# --- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOLDERS)
def test_every_statistic_is_what_torch_reads(name: str, tmp_path: Path) -> None:
    checkpoint, theirs = dcp.read_dcp(DATA / name), read_by_torch(DATA / name, tmp_path / "all.pt")
    prefix = str(checkpoint.document.source["prefix"])
    state = {key: value for key, value in theirs.items() if key.startswith(f"{prefix}state.")}
    for param in checkpoint.document.parameters:
        step = state.pop(f"{prefix}state.{param.name}.step")
        assert param.step == int(step)
        for slot, record in param.slots.items():
            for field, stored in checkpoint.fields_of(record).items():
                value = state.pop(f"{prefix}state.{param.name}.{slot}{'.' if field else ''}{field}")
                assert torch.equal(numbers(stored), value)
                assert numbers(stored).dtype == value.dtype
    assert state == {}


def test_document_of_the_nested_form() -> None:
    document = dcp.read_dcp(DATA / "dcp_adamw").document
    first = document.parameters[0]
    assert [group.parameters for group in document.groups] == [
        ("embed.weight", "fc1.weight", "fc2.weight"),
        ("fc1.bias", "norm.weight", "norm.bias"),
    ]
    assert [group.hyper["weight_decay"] for group in document.groups] == [0.1, 0.0]
    assert document.groups[0].hyper["betas"] == (0.9, 0.999)
    assert document.groups[0].hyper["foreach"] is None
    assert (first.shape, first.dtype, first.step) == ((96, 64), "float32", 3)
    assert {slot: (record.of, record.beta, record.signed) for slot, record in first.slots.items()} == {
        "exp_avg": ("gradient", 0.9, True),
        "exp_avg_sq": ("square", 0.999, False),
    }
    assert document.recipe == "adamw"
    assert document.source["kind"] == "dcp"


def test_flattened_form_gives_the_same_but_says_that_groups_were_made() -> None:
    nested, flat = dcp.read_dcp(DATA / "dcp_adamw"), dcp.read_dcp(DATA / "dcp_adamw_flat")
    assert flat.document.groups == nested.document.groups
    assert flat.document.parameters == nested.document.parameters
    assert [note for note in flat.notes if "made one group" in note]
    assert not nested.notes


def test_sharded_tensors_by_rows_and_by_columns_in_any_prefix() -> None:
    checkpoint = dcp.read_dcp(DATA / "dcp_two_ranks")
    by_columns, by_rows = checkpoint.tensors["0.weight/exp_avg"], checkpoint.tensors["2.weight/exp_avg"]
    assert isinstance(by_columns, Pieces)
    assert [first for first, _ in by_columns.parts] == [(0, 0), (0, 3)]
    assert isinstance(by_rows, Pieces)
    assert [part.shape for _, part in by_rows.parts] == [(2, 4), (1, 4)]
    assert {Path(part.path).name for _, part in by_rows.parts} == {"__0_0.distcp", "__1_0.distcp"}
    assert (by_rows.shape, by_rows.nbytes) == ((3, 4), 48)
    assert checkpoint.document.source["prefix"] == "app.optim."
    assert {Path(file).name for file in checkpoint.files} == {".metadata", "__0_0.distcp", "__1_0.distcp"}


def test_own_optimizer_has_its_stores_again() -> None:
    checkpoint = dcp.read_dcp(DATA / "dcp_optstate")
    weight, bias = checkpoint.document.parameters[:2]
    assert {slot: (record.store, record.block, record.beta) for slot, record in weight.slots.items()} == {
        "exp_avg": ("Block8()", 256, 0.9),
        "exp_avg_sq": ("Block8()", 256, 0.999),
    }
    assert [record.store for record in bias.slots.values()] == ["Full()", "Full()"]
    assert (weight.shape, weight.step) == ((80, 64), 3)


def test_reading_imports_no_torch() -> None:
    code = (
        "import sys; from optstate.checkpoint.formats import dcp, deepspeed; "
        f"dcp.read_dcp({str(DATA / 'dcp_two_ranks')!r}); deepspeed.read_deepspeed({str(DATA / 'deepspeed_zero1')!r}); "
        "assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


# --- forms that torch writes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "optimizer"])
@pytest.mark.parametrize("flat", [False, True])
def test_names_that_begin_with_numbers(tmp_path: Path, prefix: str, flat: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = stepped(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    document = dcp.read_dcp(saved(tmp_path / "saved", model, optimizer, flat, prefix)).document
    assert document.groups[0].parameters == ("0.weight", "0.bias", "1.weight", "1.bias")
    assert len(document.groups) == 1
    assert document.groups[0].hyper["lr"] == 0.1


def test_named_groups_with_equal_hyper_parameters_stay_two(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    named = list(model.named_parameters())
    optimizer = stepped(model, torch.optim.AdamW([{"params": named[:1]}, {"params": named[1:]}]))
    checkpoint = dcp.read_dcp(saved(tmp_path / "saved", model, optimizer, flat=True))
    assert [len(group.parameters) for group in checkpoint.document.groups] == [1, 3]
    assert not checkpoint.notes
    assert "param_names" not in checkpoint.document.groups[0].hyper


@pytest.mark.parametrize("flat", [False, True])
def test_learning_rates_that_are_tensors_join_groups_by_their_numbers(tmp_path: Path, flat: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = stepped(model, torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.25), amsgrad=True))
    document = dcp.read_dcp(saved(tmp_path / "saved", model, optimizer, flat)).document
    assert [group.hyper["lr"] for group in document.groups] == [TensorValue("float32", (), (0.25,))]
    assert document.parameters[0].slots.keys() == {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    assert document.recipe == ""


def test_an_optimizer_without_state_still_has_groups(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    optimizer = stepped(model, torch.optim.SGD(model.parameters(), lr=0.5))
    document = dcp.read_dcp(saved(tmp_path / "saved", model, optimizer)).document
    assert [param.has_state for param in document.parameters] == [False, False]
    assert document.recipe == "sgd"


def test_factored_statistics_tell_the_shape_without_weights(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    optimizer = stepped(model, torch.optim.Adafactor(model.parameters()))
    weight = dcp.read_dcp(saved(tmp_path / "saved", model, optimizer, flat=True)).document.parameters[0]
    assert (weight.shape, weight.slots["exp_avg_sq"].store, weight.dtype) == ((3, 4), "Factored()", "")


def test_weights_with_state_in_their_names_and_other_values(tmp_path: Path) -> None:
    model = nn.ModuleDict({"state": nn.Linear(4, 3)})
    optimizer = torch.optim.AdamW(model.parameters())
    stepped(model["state"], optimizer)
    state = get_optimizer_state_dict(model, optimizer)
    folder = save(tmp_path / "saved", {"model": model.bfloat16().state_dict(), "optim": state, "epoch": 3})
    checkpoint = dcp.read_dcp(folder)
    weight = checkpoint.document.parameters[0]
    assert (weight.name, weight.dtype) == ("state.weight", "bfloat16")
    assert [note for note in checkpoint.notes if "'epoch'" in note or "epoch" in note]


def test_weights_of_another_shape_than_their_statistics_are_an_error(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    optimizer = stepped(model, torch.optim.AdamW(model.parameters()))
    state = get_optimizer_state_dict(model, optimizer)
    folder = save(tmp_path / "saved", {"model": {"weight": torch.zeros(4, 3)}, "optim": state})
    with pytest.raises(CheckpointError, match=r"'weight': its statistics have shape \[3, 4\], its weight \[4, 3\]"):
        dcp.read_dcp(folder)


def test_transposed_tensors(tmp_path: Path) -> None:
    model = nn.Linear(4, 3, bias=False)
    optimizer = stepped(model, torch.optim.AdamW(model.parameters()))
    state = get_optimizer_state_dict(model, optimizer)
    moment = state["state"]["weight"]["exp_avg"] = torch.arange(12.0).view(4, 3).t()
    stored = dcp.read_dcp(save(tmp_path / "saved", {"optim": state})).tensors["weight/exp_avg"]
    values = torch.frombuffer(
        bytearray(Path(stored.path).read_bytes()[stored.start :][: stored.span]), dtype=torch.float32
    )
    assert stored.stride == (1, 3)
    assert torch.equal(values.as_strided(stored.shape, stored.stride), moment)


def test_values_in_the_hugging_face_writer_make_a_zip_that_is_named(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    optimizer = stepped(model, torch.optim.AdamW(model.parameters()))
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_of_torch.save(state, storage_writer=dcp_of_torch.HuggingFaceStorageWriter(str(tmp_path)), no_dist=True)
    with pytest.raises(CheckpointError, match="HuggingFaceStorageWriter makes of values that are not tensors"):
        read_header(next(tmp_path.glob("*.safetensors")))


def test_names_and_statistics_are_told_apart_by_the_path_of_the_nested_form(tmp_path: Path) -> None:
    """`a.b.c` is c of a.b here, and b.c of a there; only the path says so."""
    state = {"a": {"b.d": torch.zeros(2)}, "a.b": {"c": torch.ones(2)}}
    tree = {"state": state, "param_groups": [{"lr": 0.1, "params": ["a", "a.b"]}]}
    tensors = dcp.read_dcp(save(tmp_path / "saved", {"optim": tree})).tensors
    assert tensors.keys() == {"a/b_d", "a.b/c"}


def test_names_and_statistics_are_told_apart_by_known_names_in_the_flattened_form(tmp_path: Path) -> None:
    """A statistic that nobody knows, with a dot, of a parameter whose name begins as another's."""
    hyper = {"param_groups.a.lr": 0.1, "param_groups.a.b.lr": 0.1}
    state = {"state.a.new": torch.zeros(2), "state.a.b.new": torch.ones(2), "state.a.b.new.part": torch.ones(2)}
    tensors = dcp.read_dcp(save(tmp_path / "saved", state | hyper)).tensors
    assert tensors.keys() == {"a/new", "a.b/new", "a.b/new_part"}


# --- what is refused -----------------------------------------------------------------------------------------------


def test_several_optimizers_and_none(tmp_path: Path) -> None:
    model = nn.Linear(4, 3)
    state = get_optimizer_state_dict(model, stepped(model, torch.optim.AdamW(model.parameters())))
    with pytest.raises(CheckpointError, match=r"2 optimizers, under 'disc\.', 'gen\.'") as caught:
        dcp.read_dcp(save(tmp_path / "two", {"gen": state, "disc": state}))
    assert caught.value.refused
    with pytest.raises(CheckpointError, match=r"no optimizer state: 2 keys, such as 'model\.weight'"):
        dcp.read_dcp(save(tmp_path / "none", {"model": model.state_dict()}))


def test_megatron_is_named(tmp_path: Path) -> None:
    keys = {"optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_bf16.bucket_idx_0.exp_avg": torch.zeros(4)}
    folder = save(tmp_path / "buffers", keys)
    older = tmp_path / "older"
    (older / "mp_rank_00").mkdir(parents=True)
    (older / "mp_rank_00" / "distrib_optim.pt").write_bytes(b"")
    for path in (folder, older):
        assert dcp.is_dcp(path)
        with pytest.raises(CheckpointError, match="Megatron-LM's distributed optimizer") as caught:
            dcp.read_dcp(path)
        assert caught.value.refused


def test_what_is_such_a_folder(tmp_path: Path) -> None:
    assert all(dcp.is_dcp(DATA / name) for name in FOLDERS)
    assert not dcp.is_dcp(tmp_path)
    assert not dcp.is_dcp(tmp_path / "missing")
    assert not dcp.is_dcp(__file__)
    (tmp_path / "__0_0.distcp").write_bytes(b"")
    assert dcp.is_dcp(tmp_path)
    with pytest.raises(CheckpointError, match=r"without \.metadata; it is written last"):
        dcp.read_dcp(tmp_path)


class Evil:
    def __reduce__(self) -> Any:
        return print, ("this must not be printed",)


KEY = MetadataIndex("app.optim.state.2.weight.exp_avg", (0, 0))


def chunks_of(metadata: Metadata) -> list[ChunkStorageMetadata]:
    return metadata.state_dict_metadata[KEY.fqn].chunks


def beyond(metadata: Metadata) -> None:
    metadata.storage_data[KEY].offset = 1 << 40


def negative(metadata: Metadata) -> None:
    metadata.storage_data[KEY].offset = -1


def shorter(metadata: Metadata) -> None:
    metadata.storage_data[KEY].length -= 200


def longer(metadata: Metadata) -> None:
    metadata.storage_data[KEY].length = 1 << 40


def other_item(metadata: Metadata) -> None:
    metadata.storage_data[KEY].offset = metadata.storage_data[MetadataIndex("app.model.0.bias", (0,))].offset


def value_instead(metadata: Metadata) -> None:
    lr = metadata.storage_data[MetadataIndex("app.optim.param_groups.0.lr")]
    metadata.storage_data[KEY] = lr


def outside(metadata: Metadata) -> None:
    metadata.storage_data[KEY].relative_path = "../__0_0.distcp"


def absolute(metadata: Metadata) -> None:
    metadata.storage_data[KEY].relative_path = "/etc/passwd"


def another_file(metadata: Metadata) -> None:
    metadata.storage_data[KEY].relative_path = "__7_0.distcp"


def no_place(metadata: Metadata) -> None:
    del metadata.storage_data[KEY]


def compressed(metadata: Metadata) -> None:
    metadata.storage_data[KEY].transform_descriptors = ["stream.zstd"]


def larger(metadata: Metadata) -> None:
    metadata.state_dict_metadata[KEY.fqn].size = torch.Size([1 << 40, 4])


def part_missing(metadata: Metadata) -> None:
    chunks_of(metadata).pop()


def overlapping(metadata: Metadata) -> None:
    """As many elements as there should be, but row 1 twice and row 0 never."""
    chunks_of(metadata)[0].offsets = torch.Size([1, 0])
    metadata.storage_data[MetadataIndex(KEY.fqn, (1, 0))] = metadata.storage_data[KEY]


def other_dimensions(metadata: Metadata) -> None:
    chunks_of(metadata)[0].offsets = torch.Size([0])


def other_dtype(metadata: Metadata) -> None:
    metadata.state_dict_metadata[KEY.fqn].properties.dtype = torch.float16


def executed(metadata: Metadata) -> None:
    metadata.planner_data["x"] = Evil()


def no_places(metadata: Metadata) -> None:
    metadata.storage_data = None


def no_key(metadata: Metadata) -> None:
    object.__setattr__(next(iter(metadata.storage_data)), "fqn", None)


WRONG = {
    beyond: "from 1099511627776 on",
    negative: "no list of counts",
    shorter: "__0_0.distcp: .*directory|not in the file",
    longer: "has no 1099511627776 bytes",
    other_item: r"F32 \[2\] in its file, F32 \[2, 4\] in \.metadata",
    value_instead: "is a value of type float in its file",
    outside: "which is no file in this folder",
    absolute: "which is no file in this folder",
    another_file: "'__7_0.distcp' is missing: it has 1 of the",
    no_place: r"does not say where '.*exp_avg' from \[0, 0\] on is",
    compressed: "was written with stream.zstd",
    larger: "the 2 parts of .* do not fill its shape",
    part_missing: "the 1 parts of .* do not fill its shape",
    overlapping: "the 2 parts of .* do not fill its shape",
    other_dimensions: "another number of dimensions",
    other_dtype: "F32 .* in its file, F16",
    executed: "asks for 'builtins.print'",
    no_places: "does not say what there is, and where",
    no_key: "a place of what has no key",
}


@pytest.mark.parametrize("change", WRONG, ids=lambda change: change.__name__)
def test_metadata_that_was_changed_is_one_error(tmp_path: Path, change: Any, capsys: Any) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(DATA / "dcp_two_ranks", folder)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=WRONG[change]) as caught:
        dcp.read_dcp(folder)
    assert caught.value.refused == (change in (executed, compressed))
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", pickle.dumps([1]), pickle.dumps({"state_dict_metadata": {}})])
def test_metadata_that_is_something_else(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"\.metadata: "):
        dcp.read_dcp(tmp_path)


def test_every_file_of_a_rank_is_needed(tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(DATA / "dcp_two_ranks", folder)
    (folder / "__1_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"'__1_0.distcp' is missing: it has \d+ of the 33 items.*all ranks"):
        dcp.read_dcp(folder)


def test_a_file_that_becomes_shorter_is_an_error_when_its_numbers_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(DATA / "dcp_two_ranks", folder)
    pieces = dcp.read_dcp(folder).tensors["2.weight/exp_avg"]
    (folder / "__1_0.distcp").write_bytes(b"")
    assert isinstance(pieces, Pieces)
    with pytest.raises(OSError, match="was overwritten while it was read"):
        load_tensor(pieces)


@pytest.mark.parametrize("flat", [False, True])
def test_own_optimizer_flattened_and_alone(tmp_path: Path, flat: bool) -> None:
    from optstate.recipes import AdamW8bit

    model = nn.Linear(64, 80)
    optimizer = stepped(model, AdamW8bit(model.named_parameters(), lr=0.1), 64)
    checkpoint = dcp.read_dcp(saved(tmp_path / "saved", model, optimizer, flat, ""))
    weight = checkpoint.document.parameters[0]
    assert (weight.name, weight.slots["exp_avg_sq"].store, weight.slots["exp_avg_sq"].signed) == (
        "weight",
        "Block8()",
        False,
    )
    own = optimizer.state_dict()["state"][0]
    assert torch.equal(numbers(checkpoint.tensors["weight/exp_avg.codes"]), own["exp_avg.codes"])
