"""Recognise the training engines under which an update would be wrong, and refuse them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from optstate import kernels
from optstate.integrations.live_objects import instances_of

__all__ = ["distributed_leaves", "refuse_flat_parameter", "refuse_live_objects", "refuse_parameters"]


def refuse_flat_parameter(name: str, param: Tensor, in_parts: bool) -> None:
    """Raise TypeError for a flat parameter of FSDP1 whose recipe needs the shapes of the parameters in it.

    Args:
        name: of the parameter.
        param: the parameter.
        in_parts: whether the recipe treats each element, or block of elements, by itself.
    """
    if not in_parts and is_flat(param):
        raise TypeError(
            f"{name!r} is a piece of a flat parameter of FSDP1, in which rows, columns and norms of the parameters are "
            "lost, so this recipe would become another one: use FSDP2 (fully_shard), or a recipe that works element by "
            "element, such as AdamW"
        )


def is_flat(param: Tensor) -> bool:
    """Return whether a parameter is a flat one that FSDP1 made, or a piece of one."""
    return type(param).__name__ == "FlatParameter" or bool(getattr(param, "_fsdp_flattened", False))


def refuse_parameters(named: Iterable[tuple[str, Tensor]]) -> None:
    """Raise RuntimeError if a parameter belongs to an engine or to another fused optimizer."""
    for name, param in named:
        if is_flat(param):
            raise RuntimeError(
                f"{name!r} is sharded by FSDP1, which never calls gradient hooks: use FSDP2 (fully_shard), "
                "or leave the update to step()"
            )
        if hasattr(param, "ds_id") or hasattr(param, "_hp_mapping"):
            raise RuntimeError(
                f"{name!r} is managed by DeepSpeed ZeRO, which reduces gradients after hooks have run: "
                "use FSDP2 (fully_shard), or leave the update to step()"
            )
        if getattr(param, "_in_backward_optimizers", None):
            raise RuntimeError(f"{name!r} already has an optimizer in its backward pass: remove that one first")
        if getattr(param, "_post_accumulate_grad_hooks", None):
            raise RuntimeError(
                f"{name!r} already has a post-accumulate-grad hook: one of the two would see no gradient. "
                "Remove that hook first"
            )


def distributed_leaves() -> list[Tensor]:
    """Return every distributed tensor that is alive and can get a gradient.

    FSDP2 gives gradients to parameters that are in no graph, so that these cannot be found in another way. The search
    takes some tens of milliseconds.
    """
    module = sys.modules.get("torch.distributed.tensor")
    leaves = instances_of(module.DTensor) if module is not None else []
    return [leaf for leaf in leaves if leaf.is_leaf and leaf.requires_grad]


def refuse_live_objects(params: Iterable[Tensor]) -> None:
    """Raise RuntimeError if DistributedDataParallel wraps one of the parameters or a GradScaler is in use.

    Neither leaves a mark on the parameters, so the objects of these classes are searched: some tens of milliseconds,
    when fusing and at the first backward pass, never in a step.
    """
    if kernels.rehearsing():
        return
    ours = set(params)
    wrapper_type: Any = torch.nn.parallel.DistributedDataParallel
    for item in instances_of(torch.amp.GradScaler, wrapper_type):
        if isinstance(item, wrapper_type) and _wraps(item, ours):
            raise RuntimeError(
                "the model is wrapped in DistributedDataParallel, which averages gradients after this update would "
                "have used and freed them: replicas would drift apart. Use FSDP2 (fully_shard or replicate), "
                "or leave the update to step()"
            )
        if not isinstance(item, wrapper_type) and vars(item).get("_enabled"):
            raise RuntimeError(
                "a GradScaler is in use: a fused update would apply the scaled gradient, and could not be undone "
                "when an overflow shows. Train in bf16 without a scaler, or leave the update to step(). "
                "(If the scaler belongs to another model, create it with enabled=False or delete it)"
            )


def _wraps(wrapper: Any, params: set[Tensor]) -> bool:
    """Return whether one of these is a parameter of the wrapped model; False while the wrapper is being built."""
    module = vars(wrapper).get("_modules", {}).get("module")
    return module is not None and any(param in params for param in module.parameters())
