"""Writing state that is split among devices into one file: every device takes part, one writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.stored import Stored
from optstate.checkpoint.tensors import load, read_into
from optstate.placement import copy_part, is_distributed

__all__ = ["any_distributed", "read_part_into", "write_gathered"]

Named = Iterator[tuple[str, Tensor]]


def any_distributed(tensors: Mapping[str, Tensor]) -> bool:
    """Whether at least one of the tensors is split among devices or replicated on them as a DTensor."""
    return any(is_distributed(tensor) for tensor in tensors.values())


def write_gathered(path: Any, tensors: Mapping[str, Tensor], write: Callable[[Named], None]) -> None:
    """Call `write` with the whole tensors, one after the other, on rank 0; every rank must call this.

    One whole tensor at a time is in memory. If writing fails, every rank raises.

    Raises:
        CheckpointError: if a tensor lies on a part of the ranks only, or if rank 0 could not write.
    """
    meshes = [tensor.device_mesh for tensor in tensors.values() if is_distributed(tensor)]  # type: ignore[attr-defined]
    if any(mesh.size() != dist.get_world_size() for mesh in meshes):
        reason = "some parameters are on a part of the ranks only, which cannot be gathered into one file"
        raise CheckpointError(path, reason, "use torch.distributed.checkpoint", refused=True)
    whole = ((name, _whole(tensor)) for name, tensor in tensors.items())
    failure: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            write(whole)
        except BaseException as error:
            failure = error
    for _ in whole:
        pass  # the others wait until all have taken part
    told = [None if failure is None else str(failure)]
    dist.broadcast_object_list(told, src=0)
    if failure is not None:
        raise failure
    if told[0] is not None:
        raise CheckpointError(path, f"not saved, rank 0 failed: {told[0]}")


def read_part_into(own: Tensor, stored: Stored) -> None:
    """Fill `own`, or what of it is on this device, from a tensor of a file."""
    if is_distributed(own):
        copy_part(own, load(stored))
    else:
        read_into(own, stored)


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if is_distributed(tensor) else tensor  # type: ignore[attr-defined]
