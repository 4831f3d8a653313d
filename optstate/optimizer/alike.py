"""What processes that share parameters must have alike: chains, steps, hyper-parameters, and what they load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from optstate.distributed.agreement import Groups, ProcessView
from optstate.distributed.placement import is_distributed
from optstate.optimizer.parameters import Leaf
from optstate.spec import is_fake

__all__ = ["FEW", "content", "digest_of", "processes", "views"]

NOT_HYPER = frozenset({"params", "param_names"})
FEW = 16
"""Elements of a tensor that stand for all of it, or that a hyper-parameter may have."""


def processes(leaves: Iterable[Leaf]) -> list[Groups]:
    """Return the groups of processes that have parts or copies of these parameters as DTensors, each once.

    Parameters that are plain tensors say nothing of other processes: replicas under DistributedDataParallel and experts
    of a process's own look alike, so nothing is asked of them.
    """
    placements = (leaf.placement for leaf in leaves)
    return list(dict.fromkeys(placement.everyone for placement in placements if placement is not None))


def views(
    leaves: Sequence[Leaf], groups: Sequence[Mapping[str, Any]], steps: Mapping[int, int], **more: Any
) -> dict[Groups, ProcessView]:
    """Note what must be the same on all processes that share parameters.

    Args:
        leaves: of all parameters in order.
        groups: the param groups with the hyper-parameters that count.
        steps: how often each parameter that has state was updated, by its place.
        **more: other values that must be the same, by what they are.
    """
    found: dict[Groups, ProcessView] = {each: {} for each in processes(leaves)}
    for each, view in found.items():
        shared = [i for i, leaf in enumerate(leaves) if leaf.placement is not None and leaf.placement.everyone == each]
        for i in shared:
            plan = leaves[i].plan
            stores = ", ".join(f"{name} in {store}" for name, store in plan.stores.items()) or "no statistics"
            view[f"the recipe of {leaves[i].name!r}"] = f"{plan.chain} ({stores}, written by {plan.weights})"
        for g in sorted({leaves[i].group for i in shared}):
            hyper = {key: value for key, value in groups[g].items() if key not in NOT_HYPER and _is_plain(value)}
            view |= {f"{key} of param group {g}": repr(_without_tensors(value)) for key, value in hyper.items()}
        view |= {what: repr(value) for what, value in more.items()}
        view |= {f"the step of {leaves[i].name!r}": str(steps[i]) if i in steps else "none" for i in shared}
    return found


def content(tensors: Mapping[str, Tensor]) -> ProcessView:
    """Note digests of a few numbers of each tensor, which tell tensors saved at different times apart.

    Distributed tensors are left out, as every process has another part.
    """
    whole = {name: tensor for name, tensor in tensors.items() if not is_distributed(tensor) and not is_fake(tensor)}
    return {f"the content of {name!r}": digest_of(_sample(tensor)) for name, tensor in whole.items()}


def digest_of(data: bytes) -> str:
    """Return a few characters that differ where data does."""
    return sha256(data).hexdigest()[:12]


def _sample(tensor: Tensor) -> bytes:
    """Return the bytes of the first few elements, and of as many from the middle on."""
    flat = tensor.detach().reshape(-1)
    middle = flat.numel() // 2
    parts = [flat[start : start + FEW].cpu().contiguous().view(torch.uint8) for start in (0, middle)]
    return bytes(torch.cat(parts).tolist())


def _is_plain(value: Any) -> bool:
    """Return whether repr() of a value tells the value, not its place in memory."""
    if isinstance(value, Tensor):
        return value.numel() <= FEW and not is_fake(value) and not is_distributed(value)
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _without_tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _without_tensors(item) for key, item in value.items()}
    return [_without_tensors(item) for item in value] if isinstance(value, list | tuple) else value
