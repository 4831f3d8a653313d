"""What each of several devices holds when parameters, gradients or state are split among them: worked out, not traced.

Every parameter is cut along its first dimension into chunks of `ceil(m / W)` rows, as PyTorch's `fully_shard` does
(https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html); rank 0 has the first chunk, the largest, and
its figures are given. What is split, by the stages of ZeRO (arXiv 1910.02054, section 5):

    none    nothing: every device holds all of it (data parallelism)
    zero1   state
    zero2   state and gradients
    fsdp    state, gradients and weights (ZeRO's stage 3)

State is that of the stores themselves, `fields()` decided on the whole parameter and then cut: a number per element or
per row goes with its rows, block scales with the elements of the chunk (rounded up), columns and sums over the whole
parameter are on every device. Activations, logits and the scratch of an update belong to a device's own batch and do
not divide.

fsdp, with each layer wrapped and the model around them, also has whole weights for a while: those of two layers, one in
use and one fetched ahead, and those of the root (what is in no layer: embedding, head, last norm), which stay from the
forward pass to the end of the backward pass. Whole gradients wait to be added up and scattered: those of one layer, and
those of the root until the backward pass ends. All of these have the parameter's dtype.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from optstate.memory.setting import Model, ParamShape, Setting
from optstate.memory.sources.modules import families
from optstate.optimizer import Optimizer
from optstate.plan import ParamPlan, Plan
from optstate.spec import FieldSpec, ParamSpec

__all__ = ["SHARDS", "PerRank", "local_shape", "per_rank"]

SHARDS = ("none", "zero1", "zero2", "fsdp")
SPLIT = {"none": "", "zero1": "state", "zero2": "state gradients", "fsdp": "state gradients weights"}


@dataclass(frozen=True)
class PerRank:
    """Bytes on rank 0, which has the most. All of it follows from shapes: analytic, no step was run.

    weights, gradients, state: what stays for the step; gradients are the largest single one under a fused backward.
    gathered: whole weights of two layers. scattered: whole gradients of one. root, root_gradients: whole weights and
    gradients of what is in no layer. These four are 0 unless the shard is "fsdp". notes: what is not counted.
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
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """All of it, which bounds what is alive at one moment from above."""
        return self.weights + self.gradients + self.state + self.whole

    @property
    def whole(self) -> int:
        """What is there for a while only, of whole parameters."""
        return self.gathered + self.scattered + self.root + self.root_gradients


def per_rank(model: Model, plan: Plan | Optimizer, setting: Setting, world_size: int, shard: str) -> PerRank:
    """What rank 0 of `world_size` holds, see the module's text.

    plan: of an optimizer for the whole model, or that optimizer. setting: of it, whether the backward pass is fused.

    Raises:
        ValueError: for another shard, or a world size below one.
    """
    if shard not in SHARDS:
        raise ValueError(f"shard={shard!r} is none of {', '.join(SHARDS)}")
    if type(world_size) is not int or world_size < 1:
        raise ValueError(f"world_size={world_size!r} must be a whole number of devices, at least 1")
    plan = plan.plan() if isinstance(plan, Optimizer) else plan
    split = SPLIT[shard].split() if world_size > 1 else []
    grads = [_weight_bytes(p, world_size if "gradients" in split else 1) for p in model.parameters if p.trainable]
    return PerRank(
        world_size=world_size,
        shard=shard,
        weights=sum(_weight_bytes(param, world_size if "weights" in split else 1) for param in model.parameters),
        gradients=max(grads, default=0) if setting.fused_backward else sum(grads),
        state=sum(_state_bytes(param, world_size if "state" in split else 1) for param in plan),
        notes=_notes(shard, world_size),
        **(_whole_parameters(model) if "weights" in split else {}),
    )


def local_shape(shape: tuple[int, ...], world_size: int) -> tuple[int, ...]:
    """What rank 0 has of a parameter: the first `ceil(m / W)` rows; a scalar is everywhere."""
    return (-(-shape[0] // world_size), *shape[1:]) if shape else ()


def _weight_bytes(param: ParamShape, world_size: int) -> int:
    local = ParamShape(param.name, local_shape(param.shape, world_size), param.dtype)
    return local.nbytes


def _state_bytes(param: ParamPlan, world_size: int) -> int:
    """Bytes of all that is kept for a parameter, as far as it is on rank 0."""
    if not param.trainable:
        return 0
    return sum(_local_field(field, param.spec, world_size).nbytes for field in param.fields.values())


def _local_field(field: FieldSpec, spec: ParamSpec, world_size: int) -> FieldSpec:
    """A field as far as it belongs to the first rows of the parameter."""
    if not spec.numel:
        return field
    rows = local_shape(spec.shape, world_size)[0] if spec.shape else 1
    whole = spec.shape[0] if spec.shape else 1
    if field.per > 1:  # one entry for so many consecutive elements
        entries = -(-(spec.numel // whole * rows) // field.per)
        return FieldSpec((entries,), field.dtype, field.dims, field.per)
    sizes = (-(-n * rows // whole) if dim == 0 else n for n, dim in zip(field.shape, field.dims, strict=True))
    return FieldSpec(tuple(sizes), field.dtype, field.dims)


def _whole_parameters(model: Model) -> dict[str, int]:
    """Bytes of whole weights and gradients under fsdp."""
    layers = _layers(model.parameters)
    inside = {param.name for layer in layers for param in layer}
    root = [param for param in model.parameters if param.name not in inside]
    return {
        "gathered": sum(sorted(map(_nbytes, layers))[-2:]),
        "scattered": max(map(_gradient_bytes, layers), default=0),
        "root": _nbytes(root),
        "root_gradients": _gradient_bytes(root),
    }


def _layers(parameters: tuple[ParamShape, ...]) -> list[list[ParamShape]]:
    """The longest numbered list of modules, at least two: what is sharded layer by layer."""
    longest = max(families(parameters).values(), key=len, default=[])
    return longest if len(longest) > 1 else []


def _nbytes(params: Iterable[ParamShape]) -> int:
    return sum(param.nbytes for param in params)


def _gradient_bytes(params: Iterable[ParamShape]) -> int:
    return sum(param.nbytes for param in params if param.trainable)


def _notes(shard: str, world_size: int) -> tuple[str, ...]:
    if world_size == 1:
        return ()
    if shard == "fsdp":
        return ("per device: worked out from shapes, each layer a group of its own; NCCL's buffers are not counted",)
    return (
        "per device: worked out from shapes; the buckets in which gradients are added up are not counted (as much as "
        "the gradients again under DistributedDataParallel, unless gradient_as_bucket_view=True)",
    )
