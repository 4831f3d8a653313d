"""Writing state that is split among devices into one file: every device takes part, one writes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.stored import Pieces, Stored
from optstate.checkpoint.tensors import load, read_into
from optstate.placement import copy_part, here, index_here, is_distributed, whole

__all__ = ["any_distributed", "read_part_into", "write_gathered"]

Named = Iterator[tuple[str, Tensor]]


def any_distributed(tensors: Mapping[str, Tensor]) -> bool:
    """Whether at least one of the tensors is split among devices or replicated on them as a DTensor."""
    return any(is_distributed(tensor) for tensor in tensors.values())


def write_gathered(path: Any, tensors: Mapping[str, Tensor], write: Callable[[Named], None]) -> None:
    """Call `write` with the whole tensors, one after the other, on rank 0; every rank must call this.

    One whole tensor at a time is in memory. If writing fails, every rank raises.

    Raises:
        CheckpointError: if not all ranks have parts of the same tensors, or if rank 0 could not write.
    """
    if not _agreed([(name, tuple(tensor.shape)) for name, tensor in tensors.items()]):
        reason = "the ranks have parts of different parameters, which cannot be gathered into one file"
        raise CheckpointError(path, reason, "use torch.distributed.checkpoint", refused=True)
    gathered = ((name, whole(tensor)) for name, tensor in tensors.items())
    failure: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            write(gathered)
        except BaseException as error:
            failure = error
    for _ in gathered:
        pass  # the others wait until all have taken part
    told = [None if failure is None else str(failure)]
    dist.broadcast_object_list(told, src=0)
    if failure is not None:
        raise failure
    if told[0] is not None:
        raise CheckpointError(path, f"not saved, rank 0 failed: {told[0]}")


def read_part_into(own: Tensor, stored: Stored) -> None:
    """Fill `own`, or what of it is on this device, from a tensor of a file: only the rows that it needs are read."""
    index = index_here(own)
    if not index:
        read_into(here(own), stored)
        return
    if not isinstance(stored, Pieces) and stored.stride is None and stored.elements:
        rows, row = index[0], stored.nbytes // own.shape[0]
        shape = (rows.stop - rows.start, *own.shape[1:])
        part = load(replace(stored, start=stored.start + rows.start * row, shape=shape))
        here(own).copy_(part[(slice(None), *index[1:])])
    else:
        copy_part(own, load(stored))


def _agreed(what: Any) -> bool:
    """Whether all ranks say the same."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, hashlib.sha256(repr(what).encode()).hexdigest())
    return len(set(everywhere)) == 1
