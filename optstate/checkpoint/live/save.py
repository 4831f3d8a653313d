"""Save a running optimizer as a safetensors file, on one device or many."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from torch import Tensor, nn

from optstate.checkpoint.document.document import KEY, tensor_key
from optstate.checkpoint.document.document_json import to_json
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.safetensors_set import create_set
from optstate.checkpoint.files.safetensors_writer import NewEntry, header_size
from optstate.checkpoint.files.tensor_bytes import DTYPES, bytes_of
from optstate.checkpoint.live.gather import Named, note_document, note_path, saving_together, write_gathered
from optstate.checkpoint.operations.describe_optimizer import add_tied_names, describe_optimizer, list_names
from optstate.distributed.agreement import ProcessView
from optstate.distributed.placement import is_distributed
from optstate.optimizer import state_dict
from optstate.optimizer.moved_state import MovedStateError
from optstate.optimizer.optimizer import InconsistentStateError, Optimizer

__all__ = ["save"]

T = TypeVar("T")


def save(
    optimizer: Optimizer,
    path: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    overwrite: bool = True,
    max_shard_size: int | None = None,
) -> None:
    """Write everything that `optimizer` needs to go on into one safetensors file.

    Tensors are named `<parameter>/<slot>` or `<parameter>/<slot>.<field>` and keep the dtypes they have; groups, steps
    and stores are a JSON document under the metadata key `optstate`. Equal optimizers give equal bytes. The file is
    replaced at once or not at all. Memory: none for tensors on the CPU, else one tensor.

    Where parameters are DTensors (FSDP2, HSDP, tensor parallelism, `replicate`), every rank must call this; rank 0
    writes the bytes that an unsharded run would, where it keeps the same stores. What fails on one rank fails on all,
    and the ranks must agree about the path, steps, hyper-parameters and recipes. Of replicas under
    DistributedDataParallel nothing is known: call it on one rank.

    No other thread may step meanwhile: a save that is overtaken by a step is refused, and leaves the old file.

    State of more than `max_shard_size` bytes becomes several files of at most that many each,
    `opt-00001-of-00003.safetensors` ..., and the index `opt.safetensors.index.json`, which is replaced at once.

    Give the optimizer `model.named_parameters()`: parameters without names are saved by their place, as `#0`, `#1` ...
    It has one name for a tied parameter; with `model` the file says the others, too.

    Raises:
        InconsistentStateError: if a step broke off half-way.
        CheckpointError: if the file cannot be written, exists although `overwrite` is false, or the optimizer holds
            what has no place in it; if a parameter is updated meanwhile; if another rank failed, holds something else,
            is gone, or is late by more than its process group's timeout.
        ValueError: if `max_shard_size` is below one byte.
    """
    plan = optimizer.plan()
    alone = not any(is_distributed(param) for group in optimizer.param_groups for param in group["params"])
    together: AbstractContextManager[ProcessView] = nullcontext({}) if alone else saving_together(path)
    with together as view:
        try:
            unmoved = optimizer.watch("save")
            saved = optimizer.state_dict()
            state_dict.check_state_dict(optimizer, plan, saved)  # what could not be loaded again is not written either
            document = describe_optimizer(optimizer, plan, saved)
            text = to_json(document if model is None else add_tied_names(document, optimizer, model))
        except (ValueError, MovedStateError) as error:
            raise CheckpointError(path, f"not saved: {error}", refused=True) from None
        note_path(view, path)
        note_document(view, document)
    names = list_names(optimizer, plan)
    tensors: dict[str, Tensor] = {}
    entries = []
    for i, state in sorted(saved["state"].items()):
        for key, field in plan.params[i].fields.items():
            name = tensor_key(names[i], key)
            tensors[name] = state[key]
            entries.append(NewEntry(name, DTYPES[field.dtype], field.shape))
    metadata = {KEY: text}
    room = header_size(metadata, entries)

    def write(named: Named) -> None:
        with create_set(path, entries, room=room, limit=max_shard_size, overwrite=overwrite) as file:
            for name, tensor in named:
                file.put(name, bytes_of(tensor))
            file.finish(metadata)

    def end() -> None:
        """Nothing takes the old file's place if a step came between."""
        try:
            unmoved()
        except InconsistentStateError as error:
            raise CheckpointError(path, f"not saved: {error}", refused=True) from None

    def end_together() -> None:
        with saving_together(path):
            end()

    if alone:
        write(_followed_by(iter(tensors.items()), end))
    else:
        with saving_together(path):
            write_gathered(tensors, write, end_together)


def _followed_by(items: Iterator[T], end: Callable[[], None]) -> Iterator[T]:
    """Yield the items, and call `end` after the last of them was used."""
    yield from items
    end()
