"""Opening a checkpoint of any kind: files that hold more or something else, folders, optstate's own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import optstate
from optstate.checkpoint import CheckpointError
from optstate.checkpoint.document.document import KEY
from optstate.checkpoint.open_checkpoint import open_checkpoint
from optstate.recipes import AdamW8bit
from tests.support.foreign_files import (
    Tiny,
    adamw,
    check_document,
    fields,
    identical,
    param,
    read,
    saved,
    tensor,
    trained,
)
from tests.support.models import mlp
from tests.support.paths import DATA

# --- files that hold more, or something else ----------------------------------------------------------------------


def test_the_one_optimizer_of_a_training_checkpoint_is_found(tmp_path: Path) -> None:
    tree = {"model": Tiny().state_dict(), "optimizer": adamw(), "epoch": 3, "args": {"lr": 1e-3}}
    assert len(read(tree, tmp_path).document.parameters) == 6
    assert len(read(tree, tmp_path, key="optimizer").document.parameters) == 6
    lightning = {"state_dict": Tiny().state_dict(), "optimizer_states": [adamw()], "loops": {"fit": {"state": {}}}}
    assert len(read(lightning, tmp_path).document.parameters) == 6
    assert len(read(lightning, tmp_path, key="optimizer_states.0").document.parameters) == 6
    assert len(read({"train": {"inner": tree}}, tmp_path).document.parameters) == 6


def test_of_several_optimizers_one_is_asked_for(tmp_path: Path) -> None:
    other = trained(lambda m: torch.optim.SGD(m.groups(), lr=0.1)).state_dict()
    tree = {"optimizer_states": [adamw(), other], "ema": 1}
    with pytest.raises(
        CheckpointError, match="2 optimizers; give --key optimizer_states.0 or --key optimizer_states.1"
    ):
        read(tree, tmp_path)
    assert read(tree, tmp_path, key="optimizer_states.1").document.recipe == "sgd"
    with pytest.raises(
        CheckpointError, match="no optimizer state at 'ema': there is an int; give --key optimizer_states"
    ):
        read(tree, tmp_path, key="ema")
    with pytest.raises(CheckpointError, match="the whole file is the optimizer's state"):
        read(adamw(), tmp_path, key="optimizer")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (lambda: Tiny().state_dict(), "looks like model weights, not optimizer state"),
        (lambda: {"model": Tiny().state_dict(), "epoch": 1}, r"no optimizer state.*'model' \(model weights\), 'epoch'"),
        (
            lambda: torch.optim.lr_scheduler.StepLR(torch.optim.SGD(Tiny().parameters(), lr=0.1), 3).state_dict(),
            "looks like a learning rate scheduler's state",
        ),
        (lambda: {"python": (3,), "numpy": (1,), "cpu": torch.get_rng_state()}, "random number generators"),
        (lambda: torch.amp.GradScaler("cpu").state_dict(), "a gradient scaler's state"),
        (lambda: [1, 2, 3], "no optimizer state in it: it is a list"),
        (dict, "holds nothing"),
    ],
)
def test_something_else_is_called_what_it_looks_like(tree: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(tree(), tmp_path)


def test_files_before_torch_1_6_are_read(tmp_path: Path) -> None:
    tree = adamw()
    path = tmp_path / "old.pt"
    torch.save({"optimizer": tree}, path, _use_new_zipfile_serialization=False)
    ours = open_checkpoint(path)
    assert identical(fields(ours, param(ours, 1).slots["exp_avg"])[""], tree["state"][1]["exp_avg"])


def test_other_files_are_named(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    safetensors.torch.save_file(Tiny().state_dict(), weights)
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    archive = tmp_path / "weights.gguf"
    archive.write_bytes(b"GGUF" + bytes(40))
    for path, message in (
        (weights, "6 tensors.*looks like model weights"),
        (text, "a file of unknown kind, not a checkpoint"),
        (archive, "a GGUF file"),
        (tmp_path / "missing.pt", "no such file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)
    with pytest.raises(CheckpointError, match="a key is for files of torch.save"):
        open_checkpoint(weights, key="optimizer")


# --- LeRobot, folders, optstate's own -----------------------------------------------------------------------------


def lerobot(folder: Path, tree: Any) -> Path:
    """What LeRobot writes: `flatten_dict` with "/", and the groups as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    flattened = {f"state/{i}/{key}": value for i, state in tree["state"].items() for key, value in state.items()}
    safetensors.torch.save_file(flattened, folder / "optimizer_state.safetensors")
    (folder / "optimizer_param_groups.json").write_text(json.dumps(tree["param_groups"]))
    return folder


def test_lerobots_folder_and_file(tmp_path: Path) -> None:
    tree = adamw()
    folder = lerobot(tmp_path / "checkpoints" / "training_state", tree)
    for path in (folder, folder.parent, folder / "optimizer_state.safetensors"):
        ours = open_checkpoint(path)
        check_document(ours)
        assert (ours.kind, ours.path, ours.document.recipe) == ("lerobot", str(path), "adamw")
        assert ours.document.source["kind"] == "lerobot"
        assert ours.document.steps == (3,)
        assert ours.document.groups[1].hyper["weight_decay"] == 0.0
        assert len(ours.files) == 2
        for place, state in tree["state"].items():
            assert identical(fields(ours, param(ours, place).slots["exp_avg"])[""], state["exp_avg"])


def test_lerobot_without_its_groups_and_with_wrong_ones(tmp_path: Path) -> None:
    folder = lerobot(tmp_path, adamw())
    groups = folder / "optimizer_param_groups.json"
    groups.write_text(json.dumps([{"params": [0, 1]}]))
    with pytest.raises(CheckpointError, match="parameter 2, which is in no param group"):
        open_checkpoint(folder)
    groups.write_text("[")
    with pytest.raises(CheckpointError, match="groups beside the file cannot be read"):
        open_checkpoint(folder)
    groups.unlink()
    ours = open_checkpoint(folder)
    assert len(ours.document.parameters) == 6
    assert any("no optimizer_param_groups.json" in note for note in ours.notes)


def test_a_trainers_folder(tmp_path: Path) -> None:
    saved(adamw(), tmp_path)
    safetensors.torch.save_file(Tiny().state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
    ours = open_checkpoint(tmp_path)
    assert (ours.path, ours.files, ours.notes) == (str(tmp_path), (str(tmp_path / "optimizer.pt"),), ())
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 7}))
    assert open_checkpoint(tmp_path).notes == ("trainer_state.json says step 7, the optimizer counted 3",)


def test_a_trainer_that_logged_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    saved(adamw(), tmp_path)
    state = tmp_path / "trainer_state.json"
    log = [{"loss": float("nan"), "grad_norm": float("inf")}]
    state.write_text(json.dumps({"global_step": 3, "log_history": log}))  # as Python writes them: NaN, Infinity
    assert open_checkpoint(tmp_path).notes == ()
    state.write_text(json.dumps({"global_step": 7, "log_history": log}))
    assert open_checkpoint(tmp_path).notes == ("trainer_state.json says step 7, the optimizer counted 3",)


def test_lerobots_groups_with_numbers_that_only_python_writes(tmp_path: Path) -> None:
    tree = adamw()
    tree["param_groups"][0]["clip"], tree["param_groups"][0]["seed"] = float("inf"), 10**25 + 1
    hyper = open_checkpoint(lerobot(tmp_path, tree)).document.groups[0].hyper
    assert (hyper["clip"], hyper["seed"]) == (float("inf"), 10**25 + 1)


def test_of_several_optimizers_in_a_folder_one_is_asked_for(tmp_path: Path) -> None:
    saved(adamw(), tmp_path, "optimizer.bin")
    assert len(open_checkpoint(tmp_path).document.parameters) == 6
    saved(adamw(), tmp_path, "optimizer_1.bin")
    with pytest.raises(CheckpointError, match="2 checkpoints: 'optimizer.bin', 'optimizer_1.bin'; give one of them"):
        open_checkpoint(tmp_path)
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    with pytest.raises(CheckpointError, match="a folder without optimizer state"):
        open_checkpoint(nothing)
    (nothing / "rank0-of-8-optimizer.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="state of one rank"):
        open_checkpoint(nothing)


@pytest.fixture
def native(tmp_path: Path) -> Path:
    model = mlp(torch.float32, 600)
    optimizer = AdamW8bit(model.named_parameters(), lr=1e-3)
    model(torch.randn(3, 8)).square().mean().backward()
    optimizer.step()
    folder = tmp_path / "native"
    folder.mkdir()
    optstate.save(optimizer, folder / "opt.safetensors")
    return folder / "opt.safetensors"


def test_a_file_of_optstates_own(native: Path) -> None:
    for path in (native, native.parent):
        ours = open_checkpoint(path)
        check_document(ours)
        assert (ours.kind, ours.certainty, ours.document.recipe) == ("optstate", "declared", "adamw8bit")
    with safetensors.safe_open(native, "pt") as file:
        assert {key: tensor(ours.tensors[key]).tolist() for key in ours.tensors} == {
            key: file.get_tensor(key).tolist()
            for key in file.keys()  # noqa: SIM118
        }
    with pytest.raises(CheckpointError, match=r"state of adamw8bit \(optstate\), not of Lion"):
        open_checkpoint(native, optimizer="Lion")


def split(native: Path, folder: Path, documents: tuple[bool, bool] = (True, False), lost: str = "") -> Path:
    """A sharded set of two files, the document in those that are to have it."""
    folder.mkdir()
    tensors = safetensors.torch.load_file(native)
    with safetensors.safe_open(native, "pt") as file:
        metadata = file.metadata()
    keys = [key for key in sorted(tensors) if key != lost]
    weight_map = {}
    for i, (part, document) in enumerate(zip((keys[:3], keys[3:]), documents, strict=True)):
        name = f"opt-0000{i + 1}-of-00002.safetensors"
        held = {key: tensors[key] for key in part}
        safetensors.torch.save_file(held, folder / name, metadata={KEY: metadata[KEY]} if document else None)
        weight_map |= dict.fromkeys(part, name)
    index = folder / "opt.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_a_sharded_set_of_optstates_own(native: Path, tmp_path: Path) -> None:
    whole = open_checkpoint(native)
    for documents in ((True, False), (False, True)):
        index = split(native, tmp_path / f"set{documents[0]}", documents)
        for path in (index, index.parent):
            ours = open_checkpoint(path)
            assert ours.document == whole.document
            assert len(ours.files) == 3
            for key in whole.tensors:
                assert identical(tensor(ours.tensors[key]), tensor(whole.tensors[key]))


def test_sharded_sets_that_are_not_whole(native: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="2 optstate documents"):
        open_checkpoint(split(native, tmp_path / "two", (True, True)))
    with pytest.raises(CheckpointError, match="2 shards without an optstate document: looks like model weights"):
        open_checkpoint(split(native, tmp_path / "none", (False, False)))
    lost = next(iter(open_checkpoint(native).tensors))
    with pytest.raises(CheckpointError, match=f"the tensor '{lost}' is missing"):
        open_checkpoint(split(native, tmp_path / "lost", lost=lost))


@pytest.mark.peer
def test_opening_imports_no_torch(native: Path, tmp_path: Path) -> None:
    import bitsandbytes as bnb

    eight_bit = trained(lambda m: bnb.optim.AdamW8bit(m.groups())).state_dict()
    paths = [saved(adamw(), tmp_path), saved(eight_bit, tmp_path, "b.pt"), native]
    paths.append(DATA / "galore_adamw" / "optimizer.pt")
    paths.append(lerobot(tmp_path / "training_state", adamw()))
    order = tmp_path / "names.txt"
    order.write_text("a\nb\nc\n\nd\ne\nf\n")
    code = (
        "import sys\n"
        "from optstate.checkpoint.open_checkpoint import open_checkpoint\n"
        f"for path in {[str(path) for path in paths]!r}:\n"
        "    open_checkpoint(path)\n"
        f"open_checkpoint({str(paths[0])!r}, names={str(order)!r})\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
