"""Checkpoints of DeepSpeed 0.19.8 against torch.load of the same files and DeepSpeed's own converter.

tests/data/make_deepspeed.py wrote zero1 and zero3, and deepspeed.checkpoint.ds_to_universal made universal1 and
universal3 of them; zero2 is of a larger model.
"""

from __future__ import annotations

import itertools
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.tensor_place import Stored
from optstate.checkpoint.formats import deepspeed
from tests.support.paths import DATA

OPTIMIZER = {
    "zero1": "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "zero2": "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "zero3": "zero_pp_rank_0_mp_rank_00_optim_states.pt",
}
MODEL = {
    "zero1": "mp_rank_00_model_states.pt",
    "zero2": "mp_rank_00_model_states.pt",
    "zero3": "zero_pp_rank_0_mp_rank_00_model_states.pt",
}


class LossScaler:
    pass


@dataclass
class fragment_address:
    numel: int
    start: int


class ZeroStageEnum(IntEnum):
    optimizer_states = 1
    gradients = 2
    weights = 3


@pytest.fixture(autouse=True)
def classes_of_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough of DeepSpeed for torch to read its files, and to write them again."""
    places: dict[str, type] = {
        "deepspeed.runtime.fp16.loss_scaler": LossScaler,
        "deepspeed.utils.tensor_fragment": fragment_address,
        "deepspeed.runtime.zero.config": ZeroStageEnum,
    }
    for name, kind in places.items():
        module = ModuleType(name)
        setattr(module, kind.__name__, kind)
        monkeypatch.setattr(kind, "__module__", name)
        monkeypatch.setitem(sys.modules, name, module)
        for i in range(1, name.count(".") + 1):
            parent = name.rsplit(".", i)[0]
            monkeypatch.setitem(sys.modules, parent, sys.modules.get(parent, ModuleType(parent)))


def numbers(stored: Stored) -> Tensor:
    assert stored.dtype == "F32"
    assert stored.stride is None
    data = Path(stored.path).read_bytes()[stored.start : stored.start + stored.nbytes]
    return torch.frombuffer(bytearray(data), dtype=torch.float32).view(stored.shape)


def loaded(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def file_of(kind: str, names: dict[str, str]) -> Path:
    return DATA / f"deepspeed_{kind}" / "global_step3" / names[kind]


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """A copy of one checkpoint in which the optimizer's or the model's file was changed."""

    def change(kind: str, how: Callable[[Any], None], names: dict[str, str] = OPTIMIZER) -> Path:
        folder = tmp_path / kind
        shutil.copytree(DATA / f"deepspeed_{kind}", folder)
        path = folder / "global_step3" / names[kind]
        tree = loaded(path)
        how(tree if names is MODEL else tree["optimizer_state_dict"])
        torch.save(tree, path)
        return folder

    return change


# --- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zero1", "zero2"])
def test_parameters_are_parts_of_the_flat_tensors(kind: str) -> None:
    checkpoint = deepspeed.read_deepspeed(DATA / f"deepspeed_{kind}")
    own, model = loaded(file_of(kind, OPTIMIZER))["optimizer_state_dict"], loaded(file_of(kind, MODEL))
    for g, mapping in enumerate(own["param_slice_mappings"]):
        flats = own["base_optimizer_state"]["state"][g] | {"master": own["single_partition_of_fp32_groups"][g]}
        for name, at in mapping.items():
            shape = model["module"][name].shape
            for slot in ("exp_avg", "exp_avg_sq", "master"):
                expected = flats[slot][at.start : at.start + at.numel].view(shape)
                assert torch.equal(numbers(checkpoint.tensors[f"{name}/{slot}"]), expected)


def test_subgroups_of_stage_3_are_one_after_the_other() -> None:
    checkpoint = deepspeed.read_deepspeed(DATA / "deepspeed_zero3")
    own, model = loaded(file_of("zero3", OPTIMIZER))["optimizer_state_dict"], loaded(file_of("zero3", MODEL))
    for i, shapes in enumerate(model["param_shapes"]):
        flats = own["optimizer_state_dict"]["state"][i] | {"master": own["fp32_flat_groups"][i]}
        for slot in ("exp_avg", "exp_avg_sq", "master"):
            parts = [numbers(checkpoint.tensors[f"{name}/{slot}"]) for name in shapes]
            assert [part.shape for part in parts] == list(shapes.values())
            assert torch.equal(torch.cat([part.flatten() for part in parts]), flats[slot])


@pytest.mark.parametrize("stage", [1, 3])
def test_parameters_are_what_the_converter_of_deepspeed_makes_of_them(stage: int) -> None:
    checkpoint = deepspeed.read_deepspeed(DATA / f"deepspeed_zero{stage}")
    folder = DATA / f"deepspeed_universal{stage}" / "global_step3_universal" / "zero"
    for param in checkpoint.document.parameters:
        for slot, file in (("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq"), ("master", "fp32")):
            theirs = torch.load(folder / param.name / f"{file}.pt", weights_only=True)
            theirs = theirs["param"] if isinstance(theirs, dict) else theirs
            assert torch.equal(numbers(checkpoint.tensors[f"{param.name}/{slot}"]), theirs.view(param.shape))


@pytest.mark.parametrize("stage", [1, 3])
def test_the_universal_form_gives_the_same_document_and_numbers(stage: int) -> None:
    zero = deepspeed.read_deepspeed(DATA / f"deepspeed_zero{stage}")
    universal = deepspeed.read_deepspeed(DATA / f"deepspeed_universal{stage}")
    assert universal.kind == universal.document.source["kind"] == "deepspeed-universal"
    assert universal.document.groups == zero.document.groups
    assert universal.document.parameters == zero.document.parameters
    assert universal.tensors.keys() == zero.tensors.keys()
    for key, stored in universal.tensors.items():
        assert torch.equal(numbers(stored), numbers(zero.tensors[key]))


@pytest.mark.parametrize("kind", ["zero1", "zero2", "zero3"])
def test_nothing_is_lost_or_read_twice(kind: str) -> None:
    """No byte of the flat tensors belongs to two statistics, or to none."""
    checkpoint = deepspeed.read_deepspeed(DATA / f"deepspeed_{kind}")
    own = loaded(file_of(kind, OPTIMIZER))["optimizer_state_dict"]
    base = own["optimizer_state_dict"] if kind == "zero3" else own["base_optimizer_state"]
    flats = [state[slot] for state in base["state"].values() for slot in ("exp_avg", "exp_avg_sq")]
    flats += own["fp32_flat_groups" if kind == "zero3" else "single_partition_of_fp32_groups"]
    places = sorted((stored.start, stored.start + stored.nbytes) for stored in checkpoint.tensors.values())
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(places))
    assert sum(stop - start for start, stop in places) == sum(flat.nbytes for flat in flats)


def test_document() -> None:
    checkpoint = deepspeed.read_deepspeed(DATA / "deepspeed_zero2")
    document, first = checkpoint.document, checkpoint.document.parameters[0]
    assert [group.parameters for group in document.groups] == [
        ("embed.weight", "fc1.weight", "fc2.weight"),
        ("fc1.bias", "norm.weight", "norm.bias"),
    ]
    assert [group.hyper["weight_decay"] for group in document.groups] == [0.1, 0.0]
    assert (first.shape, first.dtype, first.step) == ((96, 64), "bfloat16", 3)
    assert {slot: (record.of, record.beta, record.signed) for slot, record in first.slots.items()} == {
        "exp_avg": ("gradient", 0.9, True),
        "exp_avg_sq": ("square", 0.999, False),
        "master": ("", None, True),
    }
    assert (checkpoint.kind, document.recipe, document.source["tool"]) == ("deepspeed-zero2", "adamw", "deepspeed")
    assert document.extra["loss_scaler"] == {"cur_scale": 1.0, "dynamic": False}
    assert [note for note in checkpoint.notes if "fp32 copy of the weight" in note]


def test_folder_tag_and_file_are_the_same() -> None:
    folder = DATA / "deepspeed_zero1"
    paths = [folder, folder / "global_step3", file_of("zero1", OPTIMIZER)]
    assert all(deepspeed.is_deepspeed(path) for path in paths)
    first, *others = [deepspeed.read_deepspeed(path) for path in paths]
    assert all((other.document, other.tensors) == (first.document, first.tensors) for other in others)
    assert {Path(file).name for file in first.files} == {OPTIMIZER["zero1"], MODEL["zero1"]}


def test_what_is_no_such_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("missing")
    paths = [tmp_path, tmp_path / "latest", tmp_path / "nothing", DATA / "dcp_adamw", DATA / "hostile_index"]
    assert not any(deepspeed.is_deepspeed(path) for path in paths)


# --- other layouts of the same -----------------------------------------------------------------------------------


def test_aligned_parameters_have_gaps_between_them(changed: Callable[..., Path]) -> None:
    def align(own: Any) -> None:
        own["base_optimizer_state"]["state"][1]["exp_avg"] = torch.arange(48.0)
        own["base_optimizer_state"]["state"][1]["exp_avg_sq"] = torch.arange(48.0)
        own["single_partition_of_fp32_groups"][1] = torch.arange(42.0)
        for i, at in enumerate(own["param_slice_mappings"][1].values()):
            at.start = 16 * i

    tensors = deepspeed.read_deepspeed(changed("zero1", align)).tensors
    assert numbers(tensors["norm.bias/exp_avg"]).tolist() == list(range(32, 42))
    assert numbers(tensors["norm.bias/master"]).tolist() == list(range(32, 42))


def test_the_optimizer_for_bfloat16_does_not_say_its_stage(changed: Callable[..., Path]) -> None:
    checkpoint = deepspeed.read_deepspeed(changed("zero1", lambda own: own.pop("zero_stage")))
    assert checkpoint.kind == "deepspeed-zero1"


def test_fused_adam_is_read_as_adamw_and_says_so(changed: Callable[..., Path]) -> None:
    def fuse(own: Any) -> None:
        base = own["base_optimizer_state"]
        keys = ("lr", "betas", "eps", "weight_decay", "params")
        base["param_groups"] = [
            {key: group[key] for key in keys} | {"bias_correction": True} for group in base["param_groups"]
        ]
        for state in base["state"].values():
            state["step"] = 3

    checkpoint = deepspeed.read_deepspeed(changed("zero1", fuse))
    first = checkpoint.document.parameters[0]
    assert (checkpoint.document.recipe, checkpoint.document.source["optimizer"]) == ("adamw", "FusedAdam")
    assert (first.step, first.slots["exp_avg"].beta) == (3, 0.9)
    assert [note for note in checkpoint.notes if "adam_w_mode" in note]


def test_parameters_that_were_never_updated(changed: Callable[..., Path]) -> None:
    checkpoint = deepspeed.read_deepspeed(changed("zero1", lambda own: own["base_optimizer_state"]["state"].pop(1)))
    bias = next(param for param in checkpoint.document.parameters if param.name == "fc1.bias")
    assert (bias.step, list(bias.slots)) == (None, ["master"])


def test_tied_weights_are_named(changed: Callable[..., Path]) -> None:
    def tie(tree: Any) -> None:
        tree["shared_params"] = {"head.weight": "embed.weight"}

    first = deepspeed.read_deepspeed(changed("zero1", tie, MODEL)).document.parameters[0]
    assert (first.name, first.tied) == ("embed.weight", ("head.weight",))


def test_the_universal_form_of_several_tensor_parallel_ranks_has_the_whole_shape(tmp_path: Path) -> None:
    folder = tmp_path / "universal"
    shutil.copytree(DATA / "deepspeed_universal1" / "global_step3_universal", folder)
    tree = loaded(folder / "mp_rank_00_model_states.pt")
    tree["param_shapes"][0]["fc1.weight"] = torch.Size([5, 8])
    torch.save(tree, folder / "mp_rank_00_model_states.pt")
    document = deepspeed.read_deepspeed(folder).document
    assert next(param.shape for param in document.parameters if param.name == "fc1.weight") == (10, 8)


def test_the_universal_form_without_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "universal"
    shutil.copytree(DATA / "deepspeed_universal1" / "global_step3_universal", folder)
    (folder / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"no \*_model_states\.pt, which says the groups"):
        deepspeed.read_deepspeed(folder)
    tree = loaded(folder / "zero" / "optimizer_state.pt")
    tree["param_groups"] = tree["param_groups"][:1]
    torch.save(tree, folder / "zero" / "optimizer_state.pt")
    checkpoint = deepspeed.read_deepspeed(folder)
    assert [param.name for param in checkpoint.document.parameters] == sorted(
        param.name for param in checkpoint.document.parameters
    )
    assert checkpoint.document.parameters[0].shape == (12, 8)
    assert [note for note in checkpoint.notes if "alphabet" in note]


# --- what is refused -----------------------------------------------------------------------------------------------


def test_several_ranks_are_refused_with_their_number(tmp_path: Path, changed: Callable[..., Path]) -> None:
    folder = tmp_path / "ranks"
    shutil.copytree(DATA / "deepspeed_zero1", folder)
    first = folder / "global_step3" / OPTIMIZER["zero1"]
    for rank in (1, 2):
        shutil.copy(first, first.with_name(first.name.replace("pp_rank_0", f"pp_rank_{rank}")))
    for path in (folder, first):
        with pytest.raises(CheckpointError, match=r"state of 3 ranks.*ds_to_universal") as caught:
            deepspeed.read_deepspeed(path)
        assert caught.value.refused


@pytest.mark.parametrize(("kind", "count"), [("zero1", [4, 4]), ("zero3", 4)])
def test_one_file_of_several_ranks_is_refused(changed: Callable[..., Path], kind: str, count: Any) -> None:
    with pytest.raises(CheckpointError, match="state of 4 ranks"):
        deepspeed.read_deepspeed(changed(kind, lambda own: own.update(partition_count=count)))


def longer_than_its_shape(own: Any) -> None:
    own["param_slice_mappings"][0]["fc1.weight"].numel = 81


def overlapping(own: Any) -> None:
    own["param_slice_mappings"][0]["fc1.weight"].start = 95


def in_another_order(own: Any) -> None:
    mapping = own["param_slice_mappings"][0]
    mapping.move_to_end("embed.weight")


def too_short(own: Any) -> None:
    own["base_optimizer_state"]["state"][0]["exp_avg"] = torch.zeros(295)


def blockwise(own: Any) -> None:
    own["base_optimizer_state"]["state"][0]["absmax1"] = torch.zeros(2)


def elastic(own: Any) -> None:
    own["base_optimizer_state"] = list(own["base_optimizer_state"]["state"].values())


def no_groups(own: Any) -> None:
    own["base_optimizer_state"].pop("param_groups")


def unknown_flat(own: Any) -> None:
    own["base_optimizer_state"]["param_groups"][1]["params"] = [7]


def half_a_step(own: Any) -> None:
    own["base_optimizer_state"]["state"][0]["step"] = torch.tensor(2.5)


def stage_9(own: Any) -> None:
    own["zero_stage"] = 9


WRONG = {
    longer_than_its_shape: "gives 'fc1.weight' 81 elements from 96 on: it has 80, and what is before ends at 96",
    overlapping: "gives 'fc1.weight' 80 elements from 95 on",
    in_another_order: "names other parameters than param_shapes of .*, or in another order",
    too_short: r"exp_avg has shape \[295\], not a number for each of the 296 elements",
    blockwise: r"absmax1 has shape \[2\], not a number for each of the 296 elements",
    elastic: "elastic_checkpoint",
    no_groups: "has no 'param_groups'",
    unknown_flat: r"has flat tensors \[7\]: \*_model_states\.pt knows of 2",
    half_a_step: r"step is 2\.5",
    stage_9: "has zero_stage 9",
}


@pytest.mark.parametrize("change", WRONG, ids=lambda change: change.__name__)
def test_a_file_that_was_changed_is_one_error(changed: Callable[..., Path], change: Any) -> None:
    with pytest.raises(CheckpointError, match=WRONG[change]) as caught:
        deepspeed.read_deepspeed(changed("zero1", change))
    assert "\n" not in str(caught.value)


def test_a_shape_of_another_size_shifts_everything_in_stage_3_and_is_an_error(changed: Callable[..., Path]) -> None:
    def shrink(tree: Any) -> None:
        tree["param_shapes"][0]["embed.weight"] = torch.Size([11, 8])

    with pytest.raises(CheckpointError, match=r"has shape \[176\], not a number for each of the 168 elements"):
        deepspeed.read_deepspeed(changed("zero3", shrink, MODEL))


def test_missing_files(tmp_path: Path) -> None:
    folder = tmp_path / "zero1"
    shutil.copytree(DATA / "deepspeed_zero1", folder)
    (folder / "global_step3" / MODEL["zero1"]).unlink()
    with pytest.raises(CheckpointError, match="shapes of parameters"):
        deepspeed.read_deepspeed(folder)
    (folder / "global_step3" / OPTIMIZER["zero1"]).rename(tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match=r"without \*_optim_states\.pt of ZeRO.*under 'optimizer'"):
        deepspeed.read_deepspeed(folder)
    (folder / "latest").write_text("../outside")
    with pytest.raises(CheckpointError, match="latest: names '../outside', which is no folder beside it"):
        deepspeed.read_deepspeed(folder)


def test_nothing_is_executed(changed: Callable[..., Path], capsys: Any) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return print, ("this must not be printed",)

    folder = changed("zero1", lambda own: own.update(extra=Evil()))
    with pytest.raises(CheckpointError, match=r"builtins\.print") as caught:
        deepspeed.read_deepspeed(folder)
    assert caught.value.refused
    assert capsys.readouterr().out == ""


def test_a_parameter_that_the_model_lacks(tmp_path: Path) -> None:
    folder = tmp_path / "universal"
    shutil.copytree(DATA / "deepspeed_universal3" / "global_step3_universal", folder)
    shutil.copytree(folder / "zero" / "fc1.bias", folder / "zero" / "other.bias")
    with pytest.raises(CheckpointError, match=r"the parameter 'other\.bias', which \*_model_states\.pt does not have"):
        deepspeed.read_deepspeed(folder)
    shutil.rmtree(folder / "zero" / "other.bias")
    torch.save(torch.zeros(11), folder / "zero" / "fc1.bias" / "exp_avg.pt")
    with pytest.raises(CheckpointError, match=r"exp_avg\.pt: it has shape \[11\], the model \[10\]"):
        deepspeed.read_deepspeed(folder)
