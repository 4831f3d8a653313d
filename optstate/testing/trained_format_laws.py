"""The laws of another library's format: what is read, what is written, and whose state it is."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from optstate.checkpoint.document.checkpoint import Checkpoint
from optstate.checkpoint.document.contradictions import contradictions
from optstate.checkpoint.document.document_json import from_json, to_json
from optstate.checkpoint.document.rules import stray_keys
from optstate.checkpoint.files.safetensors_writer import NewEntry
from optstate.checkpoint.files.tensor_bytes import bytes_of, load_tensor
from optstate.checkpoint.files.torch_archive_reader import read_torch_file
from optstate.checkpoint.files.torch_archive_writer import create_torch
from optstate.checkpoint.formats.registry import find_formats, write_state
from optstate.checkpoint.formats.shared.format import Format
from optstate.checkpoint.formats.shared.state_dict import parse_state_dict
from optstate.checkpoint.live.load import load as load_into
from optstate.checkpoint.live.save import save
from optstate.checkpoint.open_checkpoint import open_checkpoint
from optstate.optimizer.optimizer import Optimizer
from optstate.recipes import registry
from optstate.testing.laws import Law, expect, expect_close, expect_same

__all__ = ["LIBRARY_LAWS", "Trial"]

SHAPES = ((64, 96), (40, 64), (7,), (5,))
STEPS = 3
TOLERANCE = 1e-5
"""Of weights after a few steps in fp32, relative to the largest: two codes of one rule round differently."""


@dataclass(frozen=True)
class Trial:
    """A format, what makes an optimizer of its library, and one of ours that follows the same rule.

    folder: for the files of one law.
    """

    format: Format
    build: Callable[[list[nn.Parameter]], Any]
    recipe: Callable[[list[nn.Parameter]], Optimizer] | None = None
    folder: Path = field(default_factory=Path)

    def train(self) -> tuple[list[nn.Parameter], Any, Path]:
        """Return parameters, the library's optimizer after some steps, and the file with its state."""
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
        optimizer = self.build(params)
        take_steps(optimizer, params, 0)
        torch.save(optimizer.state_dict(), self.folder / "theirs.pt")
        return params, optimizer, self.folder / "theirs.pt"

    def write(self, checkpoint: Checkpoint, name: str) -> Path:
        """Write a checkpoint as a file of the library."""
        entries = {key: NewEntry(key, stored.dtype, stored.shape) for key, stored in checkpoint.tensors.items()}
        document = from_json(to_json(checkpoint.document))
        with create_torch(self.folder / name, write_state(self.format.name, document, entries).tree) as file:
            for key, stored in checkpoint.tensors.items():
                file.put(key, bytes_of(load_tensor(stored)))
        return self.folder / name


def take_steps(optimizer: Any, params: list[nn.Parameter], first: int) -> None:
    """Take steps with gradients that depend on the weights and on the count; the last parameter has none."""
    for count in range(first, first + STEPS):
        for param in params[:-1]:
            param.grad = torch.sin(3 * param.detach() + count)
        optimizer.step()


def copies(params: list[nn.Parameter]) -> list[nn.Parameter]:
    """Return new parameters of the same values."""
    return [nn.Parameter(param.detach().clone()) for param in params]


# --- the laws -----------------------------------------------------------------------------------------------------


def everything_is_read(trial: Trial) -> None:
    """Expect the library's name, every statistic's numbers and every hyper-parameter in what is opened."""
    _, optimizer, path = trial.train()
    checkpoint = open_checkpoint(path)
    expect(checkpoint.kind == trial.format.name, f"its file is opened as one of {checkpoint.kind}")
    for issue in contradictions(checkpoint):
        expect(False, f"{issue.where}: {issue.what}")
    tree = optimizer.state_dict()
    kept = sum(tensor.nbytes for tensor in tensors_of(tree["state"]) if tensor.numel() > 1)
    books = [record.codebook for param in checkpoint.document.parameters for record in param.slots.values()]
    maps = sum(4 * len(checkpoint.document.codebooks[book]) for book in books if book)
    expect(checkpoint.nbytes + maps >= kept, f"its file has {kept} bytes of state, {checkpoint.nbytes + maps} are read")
    for theirs, ours in zip(tree["param_groups"], checkpoint.document.groups, strict=True):
        lost = theirs.keys() - {"params", "param_names"} - ours.hyper.keys()
        expect(not lost, f"the hyper-parameters {', '.join(sorted(lost))} are not read")
    stray = stray_keys(checkpoint.document)
    expect(not stray, f"its rules do not know the hyper-parameters {', '.join(stray)}")


def state_is_its_own(trial: Trial) -> None:
    """Expect that no other format takes the library's state for its own."""
    _, _, path = trial.train()
    found = parse_state_dict(read_torch_file(path), str(path))
    expect(found is not None, "its state is no state_dict")
    assert found is not None
    rivals = [other for other in find_formats() if other.names_itself >= trial.format.names_itself]
    for other in rivals:
        taken = other.read is not None and other.name != trial.format.name and other.read(found, None) is not None
        expect(not taken, f"{other.name} reads its state, too")


def files_come_back(trial: Trial) -> None:
    """Expect the file that was read, type by type and bit by bit, of what is written."""
    if trial.format.write is None or trial.format.pack is not None:
        return
    _, optimizer, path = trial.train()
    again = trial.write(open_checkpoint(path), "again.pt")
    expect_equal(torch.load(again, weights_only=False), optimizer.state_dict(), "the file")


def recipes_go_on(trial: Trial) -> None:
    """Expect that our recipe of the same rule goes on as the library does, and the library as our recipe does."""
    params, optimizer, path = trial.train()
    recipe = open_checkpoint(path).document.recipe
    if not recipe:
        return
    mine = copies(params)
    ours = (trial.recipe or registry.get(recipe))(mine)
    load_into(ours, path, allow_lossy=True)
    take_steps(ours, mine, STEPS)
    take_steps(optimizer, params, STEPS)
    expect_together(mine, params, f"our {recipe} after its file")
    if trial.format.write is None or trial.format.pack is not None:
        return
    save(ours, trial.folder / "ours.safetensors")
    target = trial.write(open_checkpoint(trial.folder / "ours.safetensors"), "of_ours.pt")
    other = trial.build(params)
    other.load_state_dict(torch.load(target, weights_only=False))
    take_steps(other, params, 2 * STEPS)
    take_steps(ours, mine, 2 * STEPS)
    expect_together(params, mine, f"the library after the file of our {recipe}")


def expect_together(found: list[nn.Parameter], wanted: list[nn.Parameter], what: str) -> None:
    """Expect that two runs have the same weights."""
    for mine, other in zip(found, wanted, strict=True):
        expect_close(mine.detach(), other.detach(), what, TOLERANCE)


def tensors_of(tree: Any) -> list[Tensor]:
    """Return the tensors in nested containers, and in tensors of classes that wrap others."""
    if isinstance(tree, Mapping):
        return [tensor for value in tree.values() for tensor in tensors_of(value)]
    if isinstance(tree, list | tuple):
        return [tensor for value in tree for tensor in tensors_of(value)]
    if isinstance(tree, Tensor):
        return [tree] if type(tree) is Tensor else tensors_of(vars(tree))
    return []


def expect_equal(found: Any, wanted: Any, place: str) -> None:
    """Expect the same types, keys and values, and tensors of the same bits."""
    if isinstance(wanted, Tensor) and type(wanted) is Tensor:
        expect(isinstance(found, Tensor), f"{place} is no tensor")
        expect_same(found, wanted, place)
        return
    if isinstance(wanted, Tensor):
        found, wanted = vars(found), vars(wanted)
    if isinstance(wanted, dict):
        expect(isinstance(found, dict), f"{place} is no dict")
        odd = sorted(map(str, found.keys() ^ wanted.keys()))
        expect(not odd, f"{place} has {', '.join(odd)} only before or only after")
        for key in wanted:
            expect_equal(found[key], wanted[key], f"{place}[{key!r}]")
    elif isinstance(wanted, list | tuple):
        expect(len(found) == len(wanted), f"{place} has {len(found)} items, it had {len(wanted)}")
        for i, (mine, other) in enumerate(zip(found, wanted, strict=True)):
            expect_equal(mine, other, f"{place}[{i}]")
    else:
        same = type(found) is type(wanted) and (found == wanted or (found != found and wanted != wanted))
        expect(same, f"{place} is {found!r}, it was {wanted!r}")


def in_a_folder(law: Callable[[Trial], None]) -> Callable[[Trial], None]:
    """Return the law with an empty folder for its files."""

    def holds(trial: Trial) -> None:
        with tempfile.TemporaryDirectory() as folder:
            law(replace(trial, folder=Path(folder)))

    return holds


LIBRARY_LAWS: tuple[Law[Trial], ...] = (
    Law("reading", "a run would go on without what is lost", in_a_folder(everything_is_read)),
    Law("whose state", "files would be read as those of another library", in_a_folder(state_is_its_own)),
    Law("writing", "the library would not go on from what is written", in_a_folder(files_come_back)),
    Law("rule", "a converted run would take other steps", in_a_folder(recipes_go_on)),
)
