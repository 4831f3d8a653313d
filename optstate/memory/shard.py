"""Bytes on each of several devices that divide state, gradients or weights among them: computed, not traced.

Every parameter is cut along its first dimension into chunks of `ceil(m / W)` rows, as PyTorch's `fully_shard` does
(https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html); rank 0 has the first chunk, the largest, and
its figures are given. What is split, by the stages of ZeRO (arXiv 1910.02054, section 5):

    none    nothing: every device holds all of it (data parallelism)
    zero1   state
    zero2   state and gradients
    fsdp    state, gradients and weights (ZeRO's stage 3)

State is what an optimizer for such parts plans: stores decide on the parameter as it is split (blocks that do not end
where parts do are kept otherwise), and a field is split with the parameter's rows if it has an entry for each, or for a
number of elements that parts are a multiple of; else every device has all of it, as of columns and of sums over the
whole parameter. Activations, logits and the scratch of an update belong to a device's own batch and do not divide.

fsdp, with each layer wrapped and the model around them, also has whole weights and gradients for a while. Weights: of
two layers, one in use and one fetched ahead, and of the root (what is in no layer: embedding, head, last norm), which
stay from the forward pass to the end of the backward pass. Gradients: of one layer and, laid out to be scattered, of
the layer before; of the root, from when they are made until they are laid out at the end of the backward pass. What is
gathered or laid out has `W * ceil(m / W)` rows of each parameter. All of it has the parameter's dtype. The gradients
that are left of a group share one buffer, so a fused backward frees them together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from optstate.memory.model import Model, ParamShape, Setting
from optstate.memory.sources.modules import families
from optstate.optimizer.optimizer import Optimizer
from optstate.optimizer.plan import ParamPlan, Plan
from optstate.spec import ParamSpec, Region
from optstate.updates import Chain
from optstate.weights import Weights

__all__ = ["SHARDS", "PerRank", "local_shape", "per_rank"]

SHARDS = ("none", "zero1", "zero2", "fsdp")
SPLIT = {"none": "", "zero1": "state", "zero2": "state gradients", "fsdp": "state gradients weights"}


@dataclass(frozen=True)
class PerRank:
    """The bytes on rank 0, which has the most; all figures follow from shapes, no step is run.

    All figures but `weights`, `gradients` and `state` are 0 unless the shard is "fsdp". The root is everything that is
    in no layer.

    Attributes:
        world_size, shard: number of devices, and what they divide among them.
        weights, gradients, state: what stays for the step; under a fused backward `gradients` is the largest single
            gradient, or under fsdp those of the largest group.
        gathered: whole weights of two layers.
        scattered: whole gradients of one layer, and of one layer laid out to be scattered.
        root, root_gradients, root_scattered: whole weights, gradients, and laid-out gradients of the root.
        one_layer, one_root: gradients of the largest layer, and of the root, that stay on the device.
        notes: what is not counted, and what has another store than on one device.
    """

    world_size: int
    shard: str
    weights: int
    gradients: int
    state: int
    gathered: int = 0
    scattered: int = 0
    root: int = 0
    root_gradients: int = 0
    root_scattered: int = 0
    one_layer: int = 0
    one_root: int = 0
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """The sum of all figures, which bounds what is alive at one moment from above."""
        return self.weights + self.gradients + self.state + self.whole

    @property
    def whole(self) -> int:
        """Bytes of whole weights and gradients, which are there for a while only."""
        return self.gathered + self.scattered + self.root + self.root_gradients + self.root_scattered


def per_rank(model: Model, plan: Plan | Optimizer, setting: Setting, world_size: int, shard: str) -> PerRank:
    """Return what rank 0 of `world_size` holds, see the module's text.

    plan: of an optimizer for the whole model, or that optimizer. setting: of it, whether the backward pass is fused.

    Raises:
        ValueError: for another shard, a world size below one, or a store that cannot be kept in such parts.
    """
    if shard not in SHARDS:
        raise ValueError(f"shard={shard!r} is none of {', '.join(SHARDS)}")
    if type(world_size) is not int or world_size < 1:
        raise ValueError(f"world_size={world_size!r} must be a whole number of devices, at least 1")
    plan = plan.plan() if isinstance(plan, Optimizer) else plan
    split = SPLIT[shard].split() if world_size > 1 else []
    trained = [param for param in model.parameters if param.trainable]
    grads = [_weight_bytes(param, world_size if "gradients" in split else 1) for param in trained]
    whole = _whole_parameters(model, world_size) if "weights" in split else {}
    in_parts = list(_planned_in_parts(plan, world_size if "state" in split else 1))
    at_once = max(whole["one_layer"], whole["one_root"]) if whole else max(grads, default=0)
    return PerRank(
        world_size=world_size,
        shard=shard,
        weights=sum(_weight_bytes(param, world_size if "weights" in split else 1) for param in model.parameters),
        gradients=at_once if setting.fused_backward else sum(grads),
        state=sum(param.largest_part_nbytes for param in in_parts),
        notes=(*_notes(shard, world_size), *_kept_otherwise(plan, in_parts)),
        **whole,
    )


def local_shape(shape: tuple[int, ...], world_size: int) -> tuple[int, ...]:
    """Return what rank 0 has of a parameter: the first `ceil(m / W)` rows; a scalar is everywhere."""
    return (-(-shape[0] // world_size), *shape[1:]) if shape else ()


def _weight_bytes(param: ParamShape, world_size: int) -> int:
    local = ParamShape(param.name, local_shape(param.shape, world_size), param.dtype)
    return local.nbytes


def region_of_first(shape: tuple[int, ...], world_size: int) -> Region | None:
    """Return the part of a parameter that rank 0 has; None for all of it."""
    if world_size == 1 or not shape:
        return None
    others = len(shape) - 1
    return Region(shape, (0,) * len(shape), local_shape(shape, world_size), (world_size, *(1,) * others))


def _planned_in_parts(plan: Plan, world_size: int) -> Iterator[ParamPlan]:
    """Yield the plan of each parameter that trains, as rank 0 has it; parameters that are alike are planned once."""
    alike: dict[tuple[ParamSpec, Chain, Weights], ParamPlan] = {}
    for param in plan:
        if not param.trainable:
            continue
        key = replace(param.spec, name=""), param.chain, param.weights
        if key not in alike:
            alike[key] = param.for_region(region_of_first(param.spec.shape, world_size))
        yield alike[key]


def _kept_otherwise(plan: Plan, in_parts: Iterable[ParamPlan]) -> Iterator[str]:
    """Yield notes on statistics whose store is another one than on one device, counted by the reason."""
    whole = [slot for param in plan if param.trainable for slot in param.slots.values()]
    parts = [slot for param in in_parts for slot in param.slots.values()]
    changed = Counter(part.note for one, part in zip(whole, parts, strict=True) if one.store != part.store)
    for reason, count in changed.items():
        yield f"{count} of {len(whole)} statistics {reason}"


def _whole_parameters(model: Model, world_size: int) -> dict[str, int]:
    """Return the bytes of whole groups of parameters that fsdp has for a while, as attributes of `PerRank`."""
    layers = _layers(model.parameters)
    inside = {param.name for layer in layers for param in layer}
    root = [param for param in model.parameters if param.name not in inside]
    trained = [[param for param in group if param.trainable] for group in (*layers, root)]
    *of_layers, one_root = (sum(_weight_bytes(param, world_size) for param in group) for group in trained)
    one_layer = max(of_layers, default=0)
    gathered = [world_size * sum(_weight_bytes(param, world_size) for param in layer) for layer in layers]
    return {
        "gathered": sum(sorted(gathered)[-2:]),
        "scattered": max(map(_nbytes, trained[:-1]), default=0) + world_size * one_layer,
        "root": world_size * sum(_weight_bytes(param, world_size) for param in root),
        "root_gradients": _nbytes(trained[-1]),
        "root_scattered": world_size * one_root,
        "one_layer": one_layer,
        "one_root": one_root,
    }


def _layers(parameters: tuple[ParamShape, ...]) -> list[list[ParamShape]]:
    """Return the longest numbered list of modules, at least two: what is sharded layer by layer."""
    longest = max(families(parameters).values(), key=len, default=[])
    return longest if len(longest) > 1 else []


def _nbytes(params: Iterable[ParamShape]) -> int:
    return sum(param.nbytes for param in params)


def _notes(shard: str, world_size: int) -> tuple[str, ...]:
    if world_size == 1:
        return ()
    if shard == "fsdp":
        return ("per device: worked out from shapes, each layer a group of its own; NCCL's buffers are not counted",)
    return (
        "per device: worked out from shapes; the buckets in which gradients are added up are not counted (as much as "
        "the gradients again under DistributedDataParallel, unless gradient_as_bucket_view=True)",
    )
