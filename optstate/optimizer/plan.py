"""Which chain, stores and bytes each parameter gets: decided once, on global shapes, before anything is allocated."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from optstate import kernels
from optstate.spec import FieldSpec, ParamSpec, Region, can_be_stepped
from optstate.stores import Store
from optstate.updates import Chain, Hyper, Route, as_route, clip_by_value
from optstate.weights import Plain, Weights, as_weights

__all__ = ["PRIMITIVES", "TRANSFORMS", "ParamPlan", "Plan", "SlotPlan", "StateLayout", "plan_parameter"]

TRANSFORMS = "transforms"
"""What the plan calls a step that is made by the transforms of the chain, one after the other."""

PRIMITIVES = "native primitives"
"""The same where the loops of the transforms are compiled ones."""

SMALL_SCRATCH = 1_000_000
"""Bytes of temporaries not worth a note."""


class StateLayout(NamedTuple):
    """How a tensor of a parameter's state lies in memory.

    shape: over all devices. dims: the parameter's dimension that each of its dimensions runs along, along which both
    are split; None for a dimension of its own. dtype: of the tensor.
    """

    shape: tuple[int, ...]
    dims: tuple[int | None, ...]
    dtype: torch.dtype

    def largest_part(self, spec: ParamSpec) -> int:
        """Return the number of elements on the device that holds most of the tensor, which is the first device."""
        if spec.region is None or not self.dims:
            return math.prod(self.shape)
        parts = (1 if dim is None else spec.region.parts[dim] for dim in self.dims)
        return math.prod(-(-size // count) for size, count in zip(self.shape, parts, strict=True))


@dataclass(frozen=True)
class SlotPlan:
    """One statistic of one parameter: the store in use, its tensors, and why it is not the store asked for.

    of: the tensor that the statistic is of, where that is another one than the parameter.
    """

    name: str
    store: Store
    fields: dict[str, FieldSpec]
    note: str = ""
    of: ParamSpec | None = None

    @cached_property
    def keys(self) -> dict[str, str]:
        """Field name -> key in `optimizer.state[param]`: `<slot>` or `<slot>.<field>`."""
        return {field: f"{self.name}.{field}" if field else self.name for field in self.fields}

    @property
    def nbytes(self) -> int:
        """Bytes of the statistic over all shards."""
        return sum(field.nbytes for field in self.fields.values())


@dataclass(frozen=True)
class ParamPlan:
    """How one parameter is stepped, kept and written."""

    spec: ParamSpec
    chain: Chain
    rule: str
    slots: dict[str, SlotPlan]
    weights: Weights
    trainable: bool = True

    @cached_property
    def weight_keys(self) -> dict[str, str]:
        """Field name -> key in the state of what is kept for writing the weight itself."""
        return {field: f"weight.{field}" for field in self.weights.fields(self.spec)}

    @cached_property
    def fields(self) -> dict[str, FieldSpec]:
        """Every tensor in `optimizer.state[param]`, by key: the statistics, then what writing the weight keeps."""
        of_slots = {key: slot.fields[field] for slot in self.slots.values() for field, key in slot.keys.items()}
        return of_slots | {self.weight_keys[field]: spec for field, spec in self.weights.fields(self.spec).items()}

    @cached_property
    def layouts(self) -> dict[str, StateLayout]:
        """How every tensor in `optimizer.state[param]` lies in memory, by key."""
        found = {}
        for slot in self.slots.values():
            of = slot.of or self.spec
            for field, key in slot.keys.items():
                shape, dims = slot.fields[field].layout(of)
                found[key] = StateLayout(shape, of.along(dims), slot.fields[field].dtype)
        for field, kept in self.weights.fields(self.spec).items():
            shape, dims = kept.layout(self.spec)
            found[self.weight_keys[field]] = StateLayout(shape, dims, kept.dtype)
        return found

    @property
    def largest_part_nbytes(self) -> int:
        """Bytes of state on the device that holds most of the parameter."""
        return sum(layout.largest_part(self.spec) * layout.dtype.itemsize for layout in self.layouts.values())

    @property
    def stores(self) -> dict[str, str]:
        """The store of every slot in words, and how the weight is written if that keeps something."""
        stores = {name: str(slot.store) for name, slot in self.slots.items()}
        return stores | ({"weight": str(self.weights)} if self.weight_keys else {})

    @property
    def nbytes(self) -> int:
        """Bytes of state over all shards; none while the parameter is frozen."""
        return sum(field.nbytes for field in self.fields.values()) if self.trainable else 0

    def for_region(self, region: Region | None) -> ParamPlan:
        """Plan the same parameter for a device that has this part of it; None for all of it.

        Raises:
            ValueError: if a store cannot be kept in such parts.
        """
        spec = replace(self.spec, region=region)
        return replace(plan_parameter(spec, as_route(self.chain), self.weights, self.trainable), rule=self.rule)

    @cached_property
    def guards(self) -> bool:
        """Whether the chain itself notices a gradient that is not finite, before anything is written.

        The sums of its squares show it, where the first transform keeps them.
        """
        first = next((t for t in self.chain.transforms if not isinstance(t, clip_by_value)), None)
        slots = {} if first is None else first.slots(self.spec, {})
        squared = (self.slots[name].store for name, slot in slots.items() if slot.of_squares and slot.spec is None)
        return any(store.exact_sums for store in squared)

    @cached_property
    def knows_no_shape(self) -> bool:
        """Whether every element, or block of them, goes its own way: nothing is asked for once a step has begun."""
        return self.chain.elementwise and all(slot.store.elementwise for slot in self.slots.values())

    @cached_property
    def largest_square_root(self) -> float:
        """The largest element whose square the statistics can hold; infinite if none is of squares."""
        squared = [self.slots[name].store for name, slot in self.chain.slots(self.spec, {}).items() if slot.of_squares]
        coded = any(store.alignment > 1 for store in squared)  # scales are fp32, whatever the parameter is
        return math.sqrt(torch.finfo(torch.float32 if coded else self.spec.accumulator).max) if squared else math.inf

    def largest_gradient(self, group: Mapping[str, Any]) -> float:
        """Return the largest magnitude of a gradient element that a step with a group's hyper-parameters can take."""
        clip = self.chain.transforms[0] if self.chain.transforms else None
        clipped = isinstance(clip, clip_by_value) and isinstance(clip.bound, Hyper) and clip.bound.read(group)
        return math.inf if clipped else self.largest_square_root

    @cached_property
    def first_sliced(self) -> int | None:
        """Place in the chain from which on transforms run slice by slice, so that scratch memory stays small.

        None if nothing after the last sum over the whole parameter needs scratch memory.

        Every transform before it keeps the update on paper or pays for temporaries. The one at this place may need
        sums too, if it can take them beforehand (`Transform.prepare`).
        """
        first = 0
        for i, transform in enumerate(self.chain.transforms):
            stores = [self.slots[name].store for name in transform.slots(self.spec, {})]
            if transform.elementwise and all(store.elementwise for store in stores):
                continue
            ready = transform.elementwise and transform.prepares
            ready = ready and all(store.elementwise or store.exact_sums for store in stores)
            first = i if ready else i + 1
        rest = self.chain.transforms[first:]
        if any(t.slots(self.spec, {}) or t.temporaries(self.spec, head=i + first == 0) for i, t in enumerate(rest)):
            return first
        return None

    @cached_property
    def before_slices(self) -> Chain:
        """The part of the chain that runs on the whole parameter."""
        return Chain(self.chain.transforms[: self.first_sliced])

    @cached_property
    def in_slices(self) -> Chain:
        """The part of the chain that runs slice by slice."""
        return Chain(self.chain.transforms[self.first_sliced :])

    @cached_property
    def alignment(self) -> int:
        """Slices begin at multiples of this many elements."""
        return math.lcm(self.weights.alignment, *(slot.store.alignment for slot in self.slots.values()))

    def is_sliced(self, device: torch.device) -> bool:
        """Whether a part of the chain runs slice by slice, on a device of this kind."""
        size = self.slice_elements(device)
        in_one_write = self.weights.alignment == 1 or self.alignment <= size  # a larger slice is written in parts
        return self.first_sliced is not None and self.spec.local_numel > size and in_one_write

    def slice_elements(self, device: torch.device) -> int:
        """How many elements a slice has: half as many where eager PyTorch makes codes, which takes more buffers."""
        is_compiled = device.type == "cpu" and not kernels.rehearsing() and kernels.compiled_functions() is not None
        return kernels.slice_elements(device) // (1 if self.alignment == 1 or is_compiled else 2)

    def rounds_by_name(self, group: Mapping[str, Any]) -> bool:
        """Whether a step with the group's hyper-parameters uses random bits, which are a function of the name."""
        if not self.slots and not self.weights.is_random:
            return False
        slots = self.chain.slots(self.spec, group)
        of_slots = (slot.store.is_random(slots[name].smallest_weight) for name, slot in self.slots.items())
        return self.weights.is_random or any(of_slots)

    @property
    def scratch_bytes(self) -> int:
        """Bytes of temporaries a step needs beyond its chunks of a few MB, at most; 0 where nothing grows."""
        small = self.spec.local_numel <= kernels.chunk_elements(torch.device("cpu"))
        if small or not can_be_stepped(self.spec.dtype):
            return 0
        full = self.chain.temporaries(self.spec, until=self.first_sliced) * self.spec.local_numel
        # New row and column statistics, their factors and the squares of those: nothing for a matrix, but as much
        # as the parameter itself for convolutions, whose last two dimensions are small.
        vectors = 4 * sum(slot.nbytes for slot in self.slots.values() if slot.store.exact_sums)
        return full * self.spec.accumulator.itemsize + (vectors if vectors > SMALL_SCRATCH else 0)

    @property
    def notes(self) -> tuple[str, ...]:
        """What differs from what was asked for."""
        notes = [f"{slot.name}: {slot.note}" for slot in self.slots.values() if slot.note]
        if self.spec.region is not None:
            notes.append(f"{'x'.join(map(str, self.spec.region.shape))} of it here")
        if not can_be_stepped(self.spec.dtype):
            notes.append("frozen: weights of this dtype are never stepped")
        elif not self.trainable:
            notes.append("frozen: no state until it gets a gradient")
        return tuple(notes)

    @property
    def scratch_note(self) -> tuple[str, ...]:
        """What the transforms of the chain need for a step beyond chunks; a whole step needs no such room."""
        return (f"up to {_bytes(self.scratch_bytes)} of temporaries in a step",) if self.scratch_bytes else ()


@dataclass(frozen=True)
class Plan:
    """The decisions for every parameter, in the optimizer's order. `print` it.

    steps: what makes the step of each parameter, in words; empty where no optimizer has chosen yet.
    waiting: number of small parameters whose gradients wait for one another in a fused backward pass. held: the most
    elements of gradients that wait.
    """

    params: tuple[ParamPlan, ...]
    steps: tuple[str, ...] = ()
    waiting: int = 0
    held: int = 0

    def __iter__(self) -> Iterator[ParamPlan]:
        return iter(self.params)

    def __len__(self) -> int:
        return len(self.params)

    @property
    def nbytes(self) -> int:
        """Bytes of state in all, over all shards; per-parameter step counters are plain numbers and not counted."""
        return sum(param.nbytes for param in self.params)

    @property
    def elements(self) -> int:
        """Number of parameter elements, frozen ones included."""
        return sum(param.spec.numel for param in self.params)

    def __str__(self) -> str:
        chains = list(dict.fromkeys(str(param.chain) for param in self.params))
        rows = [("parameter", "shape", "dtype", "chain", "state", "bytes", "weights", "step", "notes")]
        for param, step in zip(self.params, self.steps or [""] * len(self.params), strict=True):
            state = ", ".join(f"{name}: {store}" for name, store in param.stores.items() if name != "weight") or "-"
            rows.append(
                (
                    param.spec.name,
                    "x".join(map(str, param.spec.shape)) or "scalar",
                    str(param.spec.dtype).removeprefix("torch."),
                    str(chains.index(str(param.chain)) + 1) + (f" ({param.rule})" if param.rule else ""),
                    state,
                    str(param.nbytes),
                    str(param.weights),
                    step.partition(" (")[0],
                    "; ".join(
                        param.notes if step and not _is_of_transforms(step) else (*param.notes, *param.scratch_note)
                    ),
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        legend = [f"chain {i}: {text}" for i, text in enumerate(chains, 1)]
        whys = Counter(step for step in self.steps if _is_of_transforms(step))
        legend += [f"{step}: {count} of {len(self)} parameters" for step, count in whys.items()]
        if self.waiting:
            legend.append(
                f"fused backward: gradients of {self.waiting} small parameters wait for one another, until "
                f"{self.held} elements are there or the backward pass ends"
            )
        share = f", {self.nbytes / self.elements:.4f} per element" if self.elements else ""
        total = f"{len(self)} parameters, {self.elements} elements, {_bytes(self.nbytes)} of state{share}"
        return "\n".join([*legend, *table, total])


def _is_of_transforms(step: str) -> bool:
    """Whether the words of a step say that the transforms make it."""
    return step.startswith((TRANSFORMS, PRIMITIVES))


def plan_parameter(spec: ParamSpec, route: Route, weights: Weights | str, trainable: bool) -> ParamPlan:
    """Decide everything about one parameter.

    Raises:
        ValueError: if a store or a way to write weights cannot be used for it.
    """
    chain, rule = route.pick(spec)
    if not can_be_stepped(spec.dtype):
        return ParamPlan(spec, chain, rule, {}, Plain(), trainable=False)
    slots = {}
    for name, slot in chain.slots(spec, {}).items():
        of = slot.spec or spec
        store, note = slot.store.resolve(of, slot.signed)
        if of.region is not None and not store.takes_parts:
            raise ValueError(f"{store} cannot keep {spec.name!r}, of which each device has only a part")
        slots[name] = SlotPlan(name, store, store.fields(of, slot.signed), note, slot.spec)
    return ParamPlan(spec, chain, rule, slots, as_weights(weights, spec), trainable)


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
