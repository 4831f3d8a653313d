"""Recognise the training engines under which an update would be wrong, and refuse them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from optstate import kernels
from optstate.integrations.live_objects import family_of, instances_of

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


def refuse_parameters(params: Iterable[Tensor], name_of: Callable[[Tensor], str]) -> None:
    """Raise RuntimeError if a parameter belongs to an engine or to another fused optimizer.

    name_of: returns a parameter's name, for the message.
    """
    for param in params:
        if is_flat(param):
            raise RuntimeError(
                f"{name_of(param)!r} is sharded by FSDP1, which never calls gradient hooks: use FSDP2 (fully_shard), "
                "or leave the update to step()"
            )
        if hasattr(param, "ds_id") or hasattr(param, "_hp_mapping"):
            raise RuntimeError(
                f"{name_of(param)!r} is managed by DeepSpeed ZeRO, which reduces gradients after hooks have run: "
                "use FSDP2 (fully_shard), or leave the update to step()"
            )
        if getattr(param, "_in_backward_optimizers", None):
            raise RuntimeError(
                f"{name_of(param)!r} already has an optimizer in its backward pass: remove that one first"
            )
        if getattr(param, "_post_accumulate_grad_hooks", None):
            raise RuntimeError(
                f"{name_of(param)!r} already has a post-accumulate-grad hook: one of the two would see no gradient. "
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

    Neither leaves a mark on the parameters, so the objects of these classes are searched where there may be some: some
    tens of milliseconds, when fusing and at the first backward pass, never in a step. A wrapper is made in a process
    group, so there is none without one.
    """
    if kernels.rehearsing():
        return
    wrapper_type: Any = torch.nn.parallel.DistributedDataParallel
    kinds = [wrapper_type] if torch.distributed.is_available() and torch.distributed.is_initialized() else []
    kinds += [torch.amp.GradScaler] if _may_scale() else []
    if not kinds:
        return
    ours = set(params)
    for item in instances_of(*kinds):
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


SCALERS = (
    "torch.amp.grad_scaler",
    "torch.cuda.amp.grad_scaler",
    "torch.cpu.amp.grad_scaler",
    "torch.distributed.fsdp.sharded_grad_scaler",
)
"""The modules of PyTorch's GradScalers."""

RECORD = "_refresh_per_optimizer_state"
"""The function, in the first and the last of these modules, of which every enabled scaler holds a reference."""


def _may_scale() -> bool:
    """Return whether an enabled GradScaler may be alive; False is certain."""
    modules = {kind.__module__ for kind in family_of(torch.amp.GradScaler)}
    if not modules <= set(SCALERS):
        return True  # somebody else's, who may keep records otherwise
    makers = [names for names in (vars(sys.modules[module]) for module in modules) if RECORD in names]
    return not makers or any(map(_is_held_by_scalers, makers))


def _is_held_by_scalers(names: Mapping[str, Any]) -> bool:
    """Return whether more than a module and PyTorch's compiler hold the function of this name in a module.

    names: of the module.
    """
    held_by_module = sys.getrefcount(globals()[_held_by_its_module.__name__])
    return sys.getrefcount(names[RECORD]) > held_by_module + _compiler_holds(names[RECORD])


def _held_by_its_module() -> None:
    """Serve as a function that has no references but its module's."""


def _compiler_holds(function: Callable[..., Any]) -> bool:
    """Return whether a function is in the table of PyTorch's compiler, which is made when that is imported."""
    table: Any = getattr(sys.modules.get("torch._dynamo.trace_rules"), "get_torch_obj_rule_map", None)
    return hasattr(table, "cache_info") and table.cache_info().currsize > 0 and function in table()


def _wraps(wrapper: Any, params: set[Tensor]) -> bool:
    """Return whether one of these is a parameter of the wrapped model; False while the wrapper is being built."""
    module = vars(wrapper).get("_modules", {}).get("module")
    return module is not None and any(param in params for param in module.parameters())
