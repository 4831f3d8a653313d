"""Writing state that is split among devices into one file: every device takes part, one writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from optstate.checkpoint.document.document import Document
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.tensor_bytes import bytes_of, load_tensor, read_into
from optstate.checkpoint.files.tensor_place import Pieces, Stored
from optstate.distributed.agreement import DisagreementError, LostProcessError, ProcessView, fail_together, reason_of
from optstate.distributed.placement import copy_part, here, index_here, whole
from optstate.optimizer.alike import FEW, digest_of

__all__ = [
    "note_document",
    "note_path",
    "read_part_into",
    "sample_content",
    "saving_together",
    "write_gathered",
]

PARAMETER = "the parameter "

Named = Iterator[tuple[str, Tensor]]


@contextmanager
def saving_together(path: Any) -> Iterator[ProcessView]:
    """Every rank must run the body; where it raises on one, it raises on all, so that none waits for another.

    The body notes in the view that it gets what must be the same on all ranks, as rank 0 writes for them.

    Raises:
        CheckpointError: if the body raised on another rank, another rank is gone or late, or noted something else.
    """
    everyone = (dist.group.WORLD,)
    try:
        with fail_together("save", [everyone], _without_path) as views:
            yield views[everyone]
    except LostProcessError as error:
        hint = "the file is what it was before, or the complete new one; load it in new processes"
        raise CheckpointError(path, f"saving broke off: {error}", hint) from error.__cause__
    except DisagreementError as error:
        reason, hint = f"not saved, {error}", ""
        if str(error).startswith(PARAMETER):
            reason = f"not saved, the ranks have parts of different parameters: {error}"
            hint = "use torch.distributed.checkpoint if they are meant to"
        raise CheckpointError(path, reason, hint, refused=True) from None


def _without_path(failure: BaseException) -> str:
    """Why a rank failed, for the others, who write the same file."""
    if isinstance(failure, CheckpointError):
        return f"{failure.reason}; {failure.hint}" if failure.hint else failure.reason
    return reason_of(failure)


def note_path(view: ProcessView, path: Any) -> None:
    """Note which file is written: ranks may name it in several ways. A relative name is one name wherever they run."""
    text = os.fspath(path)
    view["the file"] = text if isinstance(text, str) and not os.path.isabs(text) else os.path.realpath(text)


def note_document(view: ProcessView, document: Document) -> None:
    """Note what a document says of parameters, groups and steps: rank 0 must have a part of all of it."""
    for param in document.parameters:
        kept = ", ".join(f"{slot} in {record.store}" for slot, record in param.slots.items()) or "no statistics"
        view[f"{PARAMETER}{param.name!r}"] = f"{param.dtype} {param.shape} with {kept}, written by {param.weights}"
    for g, group in enumerate(document.groups):
        view |= {f"{key} of param group {g}": repr(value) for key, value in group.hyper.items()}
    view["clip_grad_norm"] = repr(document.clip_grad_norm)
    view |= {f"the step of {param.name!r}": str(param.step) for param in document.parameters}


def write_gathered(tensors: Mapping[str, Tensor], write: Callable[[Named], None], end: Callable[[], None]) -> None:
    """Call `write` with the whole tensors, one after the other, on rank 0; every rank must call this.

    One whole tensor at a time is in memory. Where `write` raises, the other ranks come to the end all the same.

    end: called on every rank when all are gathered, before `write` finds their end.

    Raises:
        LostProcessError: if another process does not take part.
    """

    def gather() -> Named:
        for name, tensor in tensors.items():
            yield name, whole(tensor)
        end()

    gathered = gather()
    try:
        if dist.get_rank() == 0:
            write(gathered)
    finally:
        for _ in gathered:
            pass  # all have to take part in gathering what is left


def read_part_into(own: Tensor, stored: Stored) -> None:
    """Fill `own`, or what of it is on this device, from a tensor of a file: only the rows that it needs are read."""
    index = index_here(own)
    if not index:
        read_into(here(own), stored)
        return
    if not isinstance(stored, Pieces) and stored.stride is None and stored.elements:
        rows, row = index[0], stored.nbytes // own.shape[0]
        shape = (rows.stop - rows.start, *own.shape[1:])
        part = load_tensor(replace(stored, start=stored.start + rows.start * row, shape=shape))
        here(own).copy_(part[(slice(None), *index[1:])])
    else:
        copy_part(own, load_tensor(stored))


def sample_content(tensors: Mapping[str, Stored]) -> ProcessView:
    """Digests of a few numbers of each tensor of a file, by which two files are told apart.

    Raises:
        OSError: if a file ends early or cannot be read.
    """
    return {f"the content of {name!r}": digest_of(_sample(stored)) for name, stored in tensors.items()}


def _sample(stored: Stored) -> bytes:
    """Return the first few elements as they lie in the file, and as many from the middle on."""
    if isinstance(stored, Pieces):
        return b"".join(_sample(part) for _, part in stored.parts[:1])
    size, middle = stored.nbytes // max(stored.elements, 1), stored.elements // 2
    parts = []
    for first in (0, middle):
        count = min(FEW, stored.elements - first)
        place = replace(stored, start=stored.start + first * size, dtype="U8", shape=(count * size,), stride=None)
        parts.append(bytes(bytes_of(load_tensor(place))))
    return b"".join(parts)
