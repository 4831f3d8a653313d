"""The figures of an estimate: the bytes of every recipe, where its peak is, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from optstate.memory import verdict
from optstate.memory.model import Alive, Setting
from optstate.memory.verdict import Gpu

__all__ = ["ASSUMED", "EXACT", "NOT_INCLUDED", "SCHEMA", "TRACED", "RecipeEstimate", "Result"]

SCHEMA = "optstate.estimate/1"

EXACT, TRACED, ASSUMED = "exact", "traced", "assumed"
"""The basis of a figure: computed from shapes, traced in a run on tensors without values, or a rule of thumb."""

NOT_INCLUDED = (
    "what the CUDA context takes beyond the assumed 0.3 to 1 GB",
    "fragmentation of the allocator beyond the assumed factor",
    "workspaces of cuBLAS, cuDNN, NCCL and fused attention",
    "what torch.compile and custom kernels save or add",
    "a data loader that pins or prefetches batches on the GPU",
    "other processes on the GPU, a display among them",
)


@dataclass(frozen=True)
class RecipeEstimate:
    """The memory that one recipe needs on one device, in bytes; unknown figures are None.

    Attributes:
        weights_bytes, buffer_bytes, gradients_bytes, state_bytes: from shapes. `gradients_bytes` is one gradient of
            every parameter, or the largest gradient where each is used and freed in the backward pass.
        activations_bytes, logits_bytes, scratch_bytes: the most at any moment.
        gradients_most_bytes: the most gradients at any moment, which can be more than `gradients_bytes`: a tied
            parameter has several gradients that wait to be summed, and accumulation adds one to those that are there.
        peak_bytes: the most of everything together.
        peak_phase: where the peak is, as in `Trace.phase`.
        at_peak: the bytes of the peak by kind.
        basis: how each figure came about: exact, traced or assumed.
        alive: the largest tensors at the peak.
        how: how the trace was made, or why there is none.
        notes: what a reader of the figures should know.
        gpu: the GPU that the recipe should fit, or None.
    """

    recipe: str
    fused_backward: bool
    weights_bytes: int
    gradients_bytes: int
    state_bytes: int
    buffer_bytes: int = 0
    activations_bytes: int | None = None
    logits_bytes: int | None = None
    scratch_bytes: int | None = None
    peak_bytes: int | None = None
    peak_phase: str | None = None
    at_peak: Mapping[str, int] = field(default_factory=dict)
    basis: Mapping[str, str] = field(default_factory=dict)
    alive: tuple[Alive, ...] = field(default=(), repr=False)
    how: str = ""
    notes: tuple[str, ...] = ()
    gpu: Gpu | None = None
    gradients_most_bytes: int | None = None

    @property
    def known_bytes(self) -> int:
        """Bytes that are alive together whatever the activations are: a lower bound of the peak."""
        return self.weights_bytes + self.buffer_bytes + self.gradients_bytes + self.state_bytes

    @property
    def reserved_bytes(self) -> int | None:
        """Bytes that PyTorch's allocator reserves for the peak: assumed."""
        return None if self.peak_bytes is None else verdict.reserved(self.peak_bytes)

    @property
    def device_bytes(self) -> tuple[int, int] | None:
        """Bytes that the device shows as used, least and most: assumed."""
        return None if self.peak_bytes is None else verdict.device(self.peak_bytes)

    @property
    def verdict(self) -> str | None:
        """ "fits", "tight" or "no"; "unknown" where only a lower bound is known and that fits; None without a GPU."""
        if self.gpu is None:
            return None
        if self.peak_bytes is not None:
            return verdict.judge(self.peak_bytes, self.gpu.nbytes)
        return verdict.NO if verdict.judge(self.known_bytes, self.gpu.nbytes) == verdict.NO else verdict.UNKNOWN

    def to_json(self) -> dict[str, Any]:
        """Return the estimate of the recipe as plain data."""
        return {
            "recipe": self.recipe,
            "fused_backward": self.fused_backward,
            "weights_bytes": self.weights_bytes,
            "buffer_bytes": self.buffer_bytes,
            "gradients_bytes": self.gradients_bytes,
            "state_bytes": self.state_bytes,
            "gradients_most_bytes": self.gradients_most_bytes,
            "activations_bytes": self.activations_bytes,
            "logits_bytes": self.logits_bytes,
            "scratch_bytes": self.scratch_bytes,
            "known_bytes": self.known_bytes,
            "peak_bytes": self.peak_bytes,
            "peak_phase": self.peak_phase,
            "at_peak": dict(self.at_peak),
            "reserved_bytes": self.reserved_bytes,
            "device_bytes": list(self.device_bytes) if self.device_bytes is not None else None,
            "verdict": self.verdict,
            "basis": dict(self.basis),
            "how": self.how,
            "notes": list(self.notes),
            "alive": [_alive_tree(item) for item in self.alive],
        }


def _alive_tree(item: Alive) -> dict[str, Any]:
    shape, nbytes = list(item.shape), item.nbytes
    return {"what": item.what, "kind": item.kind, "shape": shape, "dtype": item.dtype, "bytes": nbytes}


@dataclass(frozen=True)
class Result:
    """The figures of an estimate.

    Attributes:
        source, origin: what was estimated, and where the model is from.
        parameters: number of elements of all parameters.
        tensors: number of parameters.
        setting: the run, apart from what each recipe decides.
        recipes: the estimate of each recipe.
        gpu: the GPU that the run should fit, or None.
        world_size, shard: number of devices, and what they divide among them.
        notes: what a reader of the figures should know.
        versions: versions of the libraries that figures depend on.
        not_included: memory that no figure includes.
        sized: whether inputs follow the setting's batch size and length.
    """

    source: str
    origin: str
    parameters: int
    tensors: int
    setting: Setting
    recipes: tuple[RecipeEstimate, ...]
    gpu: Gpu | None = None
    world_size: int = 1
    shard: str = "none"
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    not_included: tuple[str, ...] = NOT_INCLUDED
    sized: bool = True

    def __getitem__(self, recipe: str) -> RecipeEstimate:
        """Return the estimate of a recipe by its name."""
        for one in self.recipes:
            if one.recipe == recipe:
                return one
        raise KeyError(recipe)

    @property
    def fits(self) -> bool:
        """Whether one of the recipes fits the GPU for sure: the verdicts "tight" and "unknown" do not count.

        True without a GPU, where nothing has to fit.
        """
        return self.gpu is None or any(one.verdict == verdict.FITS for one in self.recipes)

    def to_json(self) -> dict[str, Any]:
        """Return the estimate as plain data of the schema `optstate.estimate/1`."""
        return {
            "schema": SCHEMA,
            "source": self.source,
            "origin": self.origin,
            "parameters": self.parameters,
            "tensors": self.tensors,
            "setting": self._setting_tree(),
            "gpu": None if self.gpu is None else {"name": self.gpu.name, "bytes": self.gpu.nbytes},
            "recipes": [one.to_json() for one in self.recipes],
            "notes": list(self.notes),
            "not_included": list(self.not_included),
            "versions": dict(self.versions),
        }

    def _setting_tree(self) -> dict[str, Any]:
        """Return the setting of the run as plain data; batch size and length are None where inputs have their own."""
        setting = self.setting
        return {
            "dtype": setting.dtype,
            "weights": setting.weights,
            "batch_size": setting.batch_size if self.sized else None,
            "seq_len": setting.seq_len if self.sized else None,
            "grad_accum": setting.grad_accum,
            "checkpointing": setting.checkpointing,
            "attention": setting.attention,
            "clip": setting.clip,
            "world_size": self.world_size,
            "shard": self.shard,
        }
