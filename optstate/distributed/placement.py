"""Placements: how a parameter that is a DTensor lies on several devices, and how its state lies beside it."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from optstate.distributed.agreement import collective
from optstate.spec import ParamSpec, Region

__all__ = ["Placement", "copy_part", "gather_whole", "here", "index_here", "is_distributed", "placement_of"]


def is_distributed(tensor: object) -> bool:
    """Return whether a tensor is a DTensor, without the half a second that importing their module takes."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def here(tensor: Tensor) -> Tensor:
    """Return the part of a tensor on this device: the tensor itself if it is not distributed."""
    if not is_distributed(tensor):
        return tensor
    local: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return local.wait() if hasattr(local, "wait") else local


def placement_of(param: Tensor) -> Placement | None:
    """Return the placement of a DTensor; None for any other tensor."""
    return Placement(param) if is_distributed(param) else None


class Placement:
    """The way in which one parameter is split (FSDP2, tensor parallelism) and replicated (HSDP) over a mesh of devices.

    Args:
        param: a DTensor.

    Raises:
        ValueError: for a parameter that holds partial sums, or one that is split unevenly along one dimension twice.
    """

    def __init__(self, param: Any) -> None:
        from torch.distributed.tensor import Partial
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        self.mesh, self.placements, self.shape = param.device_mesh, tuple(param.placements), tuple(param.shape)
        self.device = here(param).device  # the CPU under an offloading policy, whatever the mesh is of
        if any(isinstance(p, Partial) for p in self.placements):
            raise ValueError("it holds partial sums: redistribute it to Replicate() or Shard()")
        self.split: list[list[int]] = [[] for _ in self.shape]
        for mesh_dim, place in enumerate(self.placements):
            dim = getattr(place, "dim", None)
            if dim is not None and self.mesh.size(mesh_dim) > 1:
                self.split[dim % len(self.shape)].append(mesh_dim)
        parts = tuple(math.prod(self.mesh.size(d) for d in mesh_dims) for mesh_dims in self.split)
        for size, count, mesh_dims in zip(self.shape, parts, self.split, strict=True):
            if len(mesh_dims) > 1 and size % count:
                raise ValueError(
                    f"its dimension of size {size} is split twice, into {count} parts that are not equal: shard it "
                    "along different dimensions"
                )
        with unset_fake_temporarily():  # PyTorch reads offsets from tensors
            shape, offset = compute_local_shape_and_global_offset(self.shape, self.mesh, self.placements)
        self.region = Region(self.shape, offset, shape, parts) if any(n > 1 for n in parts) else None

    @cached_property
    def everyone(self) -> tuple[Any, ...]:
        """The process groups, one per dimension of the mesh, of all processes with a part or copy of the parameter."""
        return tuple(self.mesh.get_group(d) for d in range(self.mesh.ndim))

    def groups(self, dims: Sequence[int] | None = None) -> tuple[Any, ...]:
        """Return the process groups over which sums must go, one after another.

        Args:
            dims: the dimensions of the parameter along which the sum is taken; None for all.
        """
        chosen = range(len(self.shape)) if dims is None else dims
        return tuple(self.mesh.get_group(d) for d in sorted({d for dim in chosen for d in self.split[dim]}))

    @property
    def slots_in_buffer(self) -> int:
        """Number of elements that FSDP2 sets aside for this device's part of the gradient in its group's buffer.

        FSDP2 pads the parts along the dimension that it splits, over the first dimensions of the mesh.
        """
        sizes = list(self.shape if self.region is None else self.region.shape)
        first = next((i for i, place in enumerate(self.placements) if getattr(place, "dim", None) is not None), None)
        if self.region is not None and first is not None and self.mesh.size(first) > 1:
            dim = self.placements[first].dim % len(sizes)
            sizes[dim] = -(-self.shape[dim] // self.region.parts[dim])
        return math.prod(sizes)

    def zeros(self, shape: Sequence[int], dims: Sequence[int | None], dtype: torch.dtype) -> Tensor:
        """Return a tensor of the parameter's state, of zeros: a DTensor that lies as `along` says."""
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        placements = self.along(dims)
        with unset_fake_temporarily():
            part, _ = compute_local_shape_and_global_offset(tuple(shape), self.mesh, placements)
        local = torch.zeros(part, dtype=dtype, device=self.device)
        size, stride = torch.Size(shape), torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, self.mesh, placements, run_check=False, shape=size, stride=stride)

    def along(self, dims: Sequence[int | None]) -> tuple[Any, ...]:
        """Return the placements of a tensor whose dimensions run along these dimensions of the parameter.

        The tensor is split where the parameter is split along one of `dims`, and replicated elsewhere. None stands for
        a dimension that runs along none.
        """
        from torch.distributed.tensor import Replicate, Shard

        found: list[Any] = []
        for place in self.placements:
            dim = getattr(place, "dim", None)
            if dim is None or dim % len(self.shape) not in dims:
                found.append(Replicate())
            elif dims.index(dim % len(self.shape)) == dim:
                found.append(place)  # also one that is split in another order, as under FSDP with tensor parallelism
            else:
                found.append(Shard(dims.index(dim % len(self.shape))))
        return tuple(found)

    def gather(self, local: Tensor, spec: ParamSpec) -> Tensor:
        """Return all of a tensor that runs along the parameter's dimensions; every device must call this together.

        Args:
            local: this device's part.
            spec: of the tensor; the parameter's own, or made with `like`.

        Raises:
            LostProcessError: if another process does not take part.
        """
        from torch.distributed.tensor import DTensor

        if spec.region is None:
            return local
        placements = self.along(spec.along(range(spec.ndim)))
        size, stride = torch.Size(spec.shape), torch.empty(spec.shape, device="meta").stride()
        with collective():
            part = DTensor.from_local(
                local.contiguous(), self.mesh, placements, run_check=False, shape=size, stride=stride
            )
            return here(part.full_tensor())

    def gradient(self, grad: Any) -> Tensor:
        """Return this device's part of a gradient, with partial sums added up.

        Raises:
            TypeError: if the gradient is not distributed.
            LostProcessError: if partial sums cannot be added up, as another process does not take part.
        """
        if not is_distributed(grad):
            raise TypeError("its gradient is no DTensor although the parameter is one")
        if tuple(grad.placements) != self.placements:
            with collective():
                return here(grad.redistribute(placements=self.placements))
        return here(grad)


def copy_part(own: Tensor, theirs: Tensor) -> None:
    """Copy one tensor into another, `own.copy_(theirs)`, whichever of the two is distributed, and however.

    One of the two may be flat and the other in rows.

    Raises:
        LostProcessError: if parts must come from another process, and it does not take part.
    """
    if is_distributed(own) and is_distributed(theirs) and theirs.shape == own.shape:
        mine: Any = own
        their: Any = theirs
        if tuple(their.placements) == tuple(mine.placements):
            here(own).copy_(here(theirs))
            return
        with collective():
            part = here(_as_bytes(theirs).redistribute(mine.device_mesh, mine.placements))
        here(own).copy_(_from_bytes(part, theirs.dtype))
    else:
        here(own).copy_(gather_whole(theirs).reshape(own.shape)[index_here(own)])


def index_here(tensor: Tensor) -> tuple[slice, ...]:
    """Return the slices that cut this device's part out of the whole tensor."""
    if not is_distributed(tensor):
        return ()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    distributed: Any = tensor
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, distributed.device_mesh, distributed.placements)
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def gather_whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor on every device, which must all call this together if the tensor is distributed.

    Raises:
        LostProcessError: if another process does not take part.
    """
    if not is_distributed(tensor):
        return tensor
    with collective():
        gathered = _as_bytes(tensor).full_tensor()
    return _from_bytes(gathered, tensor.dtype)


def _as_bytes(tensor: Tensor) -> Any:
    """Return a distributed tensor's bytes, as a last dimension more, distributed in the same way.

    Every backend moves bytes, while gloo has no int16 and no 8-bit floats.
    """
    from torch.distributed.tensor import DTensor

    distributed: Any = tensor
    local = here(tensor.detach()).contiguous().unsqueeze(-1).view(torch.uint8)
    size = torch.Size((*tensor.shape, tensor.dtype.itemsize))
    stride = torch.empty(size, device="meta").stride()
    mesh, placements = distributed.device_mesh, distributed.placements
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=size, stride=stride)


def _from_bytes(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor whose bytes `_as_bytes` gave."""
    return tensor.contiguous().view(dtype).squeeze(-1)
