"""Save an optimizer to a safetensors file and go on from it exactly."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from optstate import naming
from optstate.checkpoint.document.canonical_names import with_canonical_names, with_groups_of
from optstate.checkpoint.document.checkpoint import OPTSTATE, Checkpoint
from optstate.checkpoint.document.document import KEY, WEIGHT, Document, Parameter, SlotRecord, tensor_key
from optstate.checkpoint.document.document_json import to_json
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.safetensors_set import create_set
from optstate.checkpoint.files.safetensors_writer import NewEntry, header_size
from optstate.checkpoint.files.tensor_bytes import DTYPES, bytes_of
from optstate.checkpoint.files.tensor_place import Stored
from optstate.checkpoint.formats.shared.master_weights import notes_of_masters
from optstate.checkpoint.live.gather import (
    Named,
    content_of,
    note_document,
    note_path,
    read_part_into,
    saving_together,
    write_gathered,
)
from optstate.checkpoint.live.load_converted import Prepared, conversion_onto, is_complete, prepared_conversion
from optstate.checkpoint.open_checkpoint import open_checkpoint
from optstate.checkpoint.operations.describe_optimizer import (
    described,
    dtype_name,
    parameter_names,
    slot_records,
    with_tensors,
    with_tied_names,
)
from optstate.checkpoint.operations.plan_conversion import Conversion
from optstate.distributed.agreement import DisagreementError, LostProcessError, View
from optstate.distributed.placement import is_distributed
from optstate.optimizer import state_dict
from optstate.optimizer.moved_state import MovedStateError
from optstate.optimizer.optimizer import InconsistentStateError, Optimizer
from optstate.optimizer.plan import ParamPlan, Plan

__all__ = ["load", "save"]

Path = str | os.PathLike[str]
T = TypeVar("T")

MOST_CHANGES = 3
"""Clauses about the rule in one message."""


def save(
    optimizer: Optimizer,
    path: Path,
    *,
    model: nn.Module | None = None,
    overwrite: bool = True,
    max_shard_size: int | None = None,
) -> None:
    """Write everything that `optimizer` needs to go on into one safetensors file.

    Tensors are named `<parameter>/<slot>` or `<parameter>/<slot>.<field>` and keep the dtypes they have; groups, steps
    and stores are a JSON document under the metadata key `optstate`. Equal optimizers give equal bytes. The file is
    replaced at once or not at all. Memory: none for tensors on the CPU, else one tensor.

    Where parameters are DTensors (FSDP2, HSDP, tensor parallelism, `replicate`), every rank must call this; rank 0
    writes the bytes that an unsharded run would, where it keeps the same stores. What fails on one rank fails on all,
    and the ranks must agree about the path, steps, hyper-parameters and recipes. Of replicas under
    DistributedDataParallel nothing is known: call it on one rank.

    No other thread may step meanwhile: a save that is overtaken by a step is refused, and leaves the old file.

    State of more than `max_shard_size` bytes becomes several files of at most that many each,
    `opt-00001-of-00003.safetensors` ..., and the index `opt.safetensors.index.json`, which is replaced at once.

    Give the optimizer `model.named_parameters()`: parameters without names are saved by their place, as `#0`, `#1` ...
    It has one name for a tied parameter; with `model` the file says the others, too.

    Raises:
        InconsistentStateError: if a step broke off half-way.
        CheckpointError: if the file cannot be written, exists although `overwrite` is false, or the optimizer holds
            what has no place in it; if a parameter is updated meanwhile; if another rank failed, holds something else,
            is gone, or is late by more than its process group's timeout.
        ValueError: if `max_shard_size` is below one byte.
    """
    plan = optimizer.plan()
    alone = not any(is_distributed(param) for group in optimizer.param_groups for param in group["params"])
    together: AbstractContextManager[View] = nullcontext({}) if alone else saving_together(path)
    with together as view:
        try:
            unmoved = optimizer.watch("save")
            saved = optimizer.state_dict()
            state_dict.check(optimizer, plan, saved)  # what could not be loaded again is not written either
            document = described(optimizer, plan, saved)
            text = to_json(document if model is None else with_tied_names(document, optimizer, model))
        except (ValueError, MovedStateError) as error:
            raise CheckpointError(path, f"not saved: {error}", refused=True) from None
        note_path(view, path)
        note_document(view, document)
    names = parameter_names(optimizer, plan)
    tensors: dict[str, Tensor] = {}
    entries = []
    for i, state in sorted(saved["state"].items()):
        for key, field in plan.params[i].fields.items():
            name = tensor_key(names[i], key)
            tensors[name] = state[key]
            entries.append(NewEntry(name, DTYPES[field.dtype], field.shape))
    metadata = {KEY: text}
    room = header_size(metadata, entries)

    def write(named: Named) -> None:
        with create_set(path, entries, room=room, limit=max_shard_size, overwrite=overwrite) as file:
            for name, tensor in named:
                file.put(name, bytes_of(tensor))
            file.finish(metadata)

    def end() -> None:
        """Nothing takes the old file's place if a step came between."""
        try:
            unmoved()
        except InconsistentStateError as error:
            raise CheckpointError(path, f"not saved: {error}", refused=True) from None

    def end_together() -> None:
        with saving_together(path):
            end()

    if alone:
        write(_followed_by(iter(tensors.items()), end))
    else:
        with saving_together(path):
            write_gathered(tensors, write, end_together)


def _followed_by(items: Iterator[T], end: Callable[[], None]) -> Iterator[T]:
    """The items; `end` is called after the last of them was used."""
    yield from items
    end()


def load(
    optimizer: Optimizer,
    path: Path,
    *,
    allow_lossy: bool = False,
    key: str | None = None,
    names: str | None = None,
) -> None:
    """Continue where the run that saved `path` stopped: state, steps and hyper-parameters.

    Strict: the file must hold what `optimizer.plan()` keeps, parameter by parameter and in the same stores, nothing
    less and nothing more. Nothing is cast. All of this is checked before anything is changed. Memory: none for state
    on the CPU, else one tensor.

    A parameter that is frozen here keeps the state that the file has of it. One of which the file has none, but trains
    here, is refused if this library wrote the file: it was frozen, so freeze it, load, and unfreeze it. Other libraries
    make state at the first update: there it begins anew, with a warning. `load_state_dict` follows the same rule.

    Where parameters are DTensors, every rank that shares them must call this. It fails on all of them or on none; they
    compare steps, hyper-parameters and a few numbers of every tensor, so each may read its own copy of one file. Of
    replicas under DistributedDataParallel nothing is known: give them one path.

    Model weights are not in the file: load them before or afterwards. A learning rate scheduler has its own state.

    Args:
        optimizer: built as the saved run built its own.
        path: what `save` wrote, or another tool's checkpoint of the same statistics, as a torch `optimizer.pt`. Such a
            file is taken where every number stays what it was and every step does what it did: a hyper-parameter that
            makes it another rule, such as `maximize=True`, is refused.
        allow_lossy: convert what is kept in other stores or by another rule, as `optstate convert` does; it shows
            what is lost. Hyper-parameters are the file's where the recipe is the same, else this optimizer's. It also
            takes a run in another dtype, as fp32 into bf16, or one that wrote weights in another way: corrections that
            are kept for weights begin anew then. Memory: one parameter's statistics in fp32, all of it on every device.
        key, names: of other tools' files, as for `optstate convert`.

    Raises:
        CheckpointError: if the file is unreadable or another optimizer's, naming the first difference; if it fails on
            another rank, or ranks load different things. If reading fails half-way, or another thread steps meanwhile,
            the optimizer refuses to step until a load succeeds.
        RuntimeError: inside a backward pass.
    """
    opened: list[Checkpoint] = []
    copied: list[Tensor] = []
    notes: list[str] = []

    def prepare() -> Prepared:
        opened.append(open_checkpoint(path, key=key, names=names))
        counts = [len(group["params"]) for group in optimizer.param_groups]
        checkpoint = with_groups_of(with_canonical_names(opened[0]), counts)
        view, copy = _prepared(optimizer, checkpoint, allow_lossy, notes)

        def noted(own: Tensor, theirs: Tensor) -> None:
            copied[:] = [own]
            copy(own, theirs)

        return view, noted

    with _failing(path, lambda: bool(copied)):
        optimizer.load_prepared(prepare, lambda: content_of(opened[0].tensors))
    _warn_of_other_names(optimizer, opened[0])
    for note in notes:
        warnings.warn(f"{os.fspath(path)}: {note}", stacklevel=2)


def _warn_of_other_names(optimizer: Optimizer, opened: Checkpoint) -> None:
    """Warn if our own run that saved the file rounded at random under other names."""
    params, plan = opened.document.parameters, optimizer.plan()
    names = [naming.by_place(i) if param.name.startswith("#") else param.name for i, param in enumerate(params)]
    ours = {i: param.weights for i, param in enumerate(params) if param.weights}
    saved = {"param_groups": [{"params": names, "param_names": names}], state_dict.KEY: {"weights": ours}}
    state_dict.warn_if_rounded_otherwise(saved, optimizer.param_groups, plan, ())


def _prepared(optimizer: Optimizer, checkpoint: Checkpoint, allow_lossy: bool, notes: list[str]) -> Prepared:
    """What a checkpoint becomes in this optimizer, and what brings its numbers there; nothing is changed.

    notes: gets what is to be said once it is loaded.

    Raises:
        CheckpointError: if it is another optimizer's, or numbers would change without consent.
    """
    path, difference = checkpoint.path, None
    if checkpoint.kind == OPTSTATE and any(param.chain for param in checkpoint.document.parameters):
        try:
            return _exactly(optimizer, checkpoint)
        except (ValueError, TypeError) as error:  # a hyper-parameter of the wrong kind is a TypeError
            difference = str(error)
    hint = "nothing was changed; build the optimizer as the saved run did"
    try:
        conversion, lost = _conversion(optimizer, checkpoint, consent=allow_lossy or difference is not None)
    except CheckpointError:  # it contradicts itself
        if allow_lossy or difference is None:
            raise
        raise CheckpointError(path, difference, hint, refused=True) from None
    except (ValueError, TypeError) as error:
        reason = str(error) if allow_lossy or difference is None else difference
        raise CheckpointError(path, reason, hint, refused=True) from None
    difference = difference or lost
    if difference and not allow_lossy:
        raise CheckpointError(path, difference, f"{hint}, or convert with allow_lossy=True", refused=True)
    if conversion.changes and not allow_lossy:
        reason = f"the file follows another rule: {'; '.join(conversion.changes[:MOST_CHANGES])}"
        consent = "nothing was changed; allow_lossy=True takes the statistics over all the same"
        raise CheckpointError(path, reason, consent, refused=True)
    if not conversion.lossless and not allow_lossy:
        slots = dict.fromkeys(transfer.name for transfer in conversion.all_transfers if not transfer.exact)
        what = ", ".join(slots) or ", ".join(dict.fromkeys(slot for _, slot in conversion.dropped))
        raise CheckpointError(path, f"numbers would change in {what}", "allow_lossy=True accepts that", refused=True)
    notes += [*notes_of_masters(checkpoint.notes), *conversion.notes]
    return prepared_conversion(optimizer, conversion)


def _conversion(optimizer: Optimizer, checkpoint: Checkpoint, consent: bool) -> tuple[Conversion, str]:
    """What a checkpoint becomes, and what is lost on the way apart from numbers; "" if nothing is.

    Raises:
        ValueError, TypeError: if it cannot be made, even with consent.
    """
    if not consent:
        try:
            return conversion_onto(optimizer, checkpoint), ""
        except ValueError as error:
            return conversion_onto(optimizer, checkpoint, anew=True), str(error)
    return conversion_onto(optimizer, checkpoint, anew=True), ""


def _exactly(optimizer: Optimizer, checkpoint: Checkpoint) -> Prepared:
    """What is in the optimizer's own stores, to be read into place.

    Raises:
        ValueError, TypeError: at the first difference.
    """
    plan, document = optimizer.plan(), checkpoint.document
    sources = _matched(optimizer, plan, document, checkpoint.tensors)
    view = _as_state_dict(optimizer, plan, checkpoint, sources)
    state_dict.check(optimizer, plan, view)
    places = {id(tensor): checkpoint.tensors[key] for key, tensor in sources.items()}
    return view, lambda own, theirs: read_part_into(own, places[id(theirs)])


@contextmanager
def _failing(path: Path, begun: Callable[[], bool]) -> Iterator[None]:
    """Turn what loading raises, before or after it has begun to change anything, into the error of checkpoint files."""
    unchanged = "nothing was changed; build the optimizer as the saved run did"
    broken = "the state is incomplete: load again before the next step"
    try:
        yield
    except (ValueError, TypeError) as error:
        raise CheckpointError(path, str(error), broken if begun() else unchanged, refused=True) from None
    except DisagreementError as error:
        raise CheckpointError(path, f"not loaded, {error}", "nothing was changed, on any rank", refused=True) from None
    except InconsistentStateError as error:
        raise CheckpointError(path, str(error), broken, refused=True) from None
    except LostProcessError as error:
        raise CheckpointError(path, f"loading broke off: {error}", broken) from error.__cause__
    except OSError as error:
        reason = "reading failed half-way" if begun() else "it cannot be read"
        raise CheckpointError(path, f"{reason}: {error}", broken if begun() else "nothing was changed") from error


# --- what is loaded -----------------------------------------------------------------------------------------------


def _matched(optimizer: Optimizer, plan: Plan, document: Document, entries: Mapping[str, Stored]) -> dict[str, Tensor]:
    """A stand-in without values for every tensor of the file, if all of them are what this optimizer keeps.

    Raises:
        ValueError: at the first difference.
    """
    names = parameter_names(optimizer, plan)
    if len(names) != len(document.parameters):
        raise ValueError(f"it was saved for {len(document.parameters)} parameters, this optimizer has {len(names)}")
    found: dict[str, Tensor] = {}
    for name, own, saved in zip(names, plan, document.parameters, strict=True):
        by_place = not saved.weights and saved.name.startswith("#")  # of a tool that does not name them
        if saved.name != name and not by_place:
            why = "the model or its order differs"
            if saved.name.startswith("#"):
                why = "it was saved without names, build the optimizer without names, too, or convert it with --names"
            elif name.startswith("#"):
                why = "it was saved with names, build the optimizer with model.named_parameters()"
            raise ValueError(f"it has {saved.name!r} where this optimizer has {name!r}: {why}")
        _match_parameter(own, saved)
        if saved.step is None:
            continue
        for key, spec in own.fields.items():
            entry = entries.get(tensor_key(saved.name, key))
            if entry is None:
                raise ValueError(f"the tensor '{tensor_key(saved.name, key)}' is missing")
            if (entry.dtype, entry.shape) != (DTYPES[spec.dtype], spec.shape):
                there, here = f"{entry.dtype} {entry.shape}", f"{DTYPES[spec.dtype]} {spec.shape}"
                raise ValueError(f"the tensor '{tensor_key(saved.name, key)}' is {there}, here it is {here}")
            found[tensor_key(saved.name, key)] = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
    stray = next((name for name in entries if name not in found), None)
    if stray is not None:
        raise ValueError(f"the tensor '{stray}' belongs to no statistic of this optimizer")
    return found


def _match_parameter(own: ParamPlan, saved: Parameter) -> None:
    """Raise ValueError if what was saved of a parameter is not what is kept of it here.

    What was converted from another tool's file may say neither dtypes nor how weights are written.
    """
    name, dtype = saved.name, dtype_name(own.spec.dtype)
    there, here = f"{saved.dtype or dtype} {saved.shape}", f"{dtype} {own.spec.shape}"
    if there != here:
        raise ValueError(f"{name!r} was {there} when it was saved, here it is {here}")
    if saved.chain != str(own.chain):
        raise ValueError(f"{name!r} went through the chain {saved.chain}, here it is {own.chain}: another recipe")
    if saved.weights and saved.weights != str(own.weights):
        raise ValueError(f"{name!r} was written by {saved.weights}, here it is by {own.weights}")
    if saved.step is None:
        return
    kept = slot_records(name, own, {})
    if saved.slots.keys() != kept.keys():
        raise ValueError(f"{name!r} was saved with {_listed(saved.slots)}, here it keeps {_listed(kept)}")
    for slot, ours in kept.items():
        theirs = saved.slots[slot]
        if theirs.store != ours.store:
            what = "convert the file, or keep the statistic as it was" if slot != WEIGHT else "write it as before"
            raise ValueError(f"{name!r}: {slot} was saved in {theirs.store}, here it is kept in {ours.store}; {what}")
        if theirs.codebook != ours.codebook:
            raise ValueError(f"{name!r}: {slot} has codes of {theirs.codebook or 'no map'}, here of {ours.codebook}")
        if replace(theirs, of=ours.of, beta=ours.beta) != ours:  # these two say only what the chain says, too
            raise ValueError(f"{name!r}: {slot} was saved as {theirs}, here it is {ours}")


def _listed(slots: Mapping[str, SlotRecord]) -> str:
    return ", ".join(slots) or "no statistics"


def _as_state_dict(
    optimizer: Optimizer, plan: Plan, checkpoint: Checkpoint, sources: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The file as the `state_dict` it was made from, with stand-ins for its tensors."""
    document = checkpoint.document
    state: dict[int, dict[str, Any]] = {}
    stores: dict[int, dict[str, str]] = {}
    groups: list[dict[str, Any]] = []
    first = 0
    for i, (own, saved) in enumerate(zip(plan, document.parameters, strict=True)):
        stores[i] = own.stores
        if saved.step is not None:
            tensors = {key: sources[tensor_key(saved.name, key)] for key in own.fields}
            state[i] = {"step": saved.step, **tensors}
    for g, group in enumerate(document.groups):
        if g >= len(optimizer.param_groups):
            break  # `resume.check` counts them
        ours = optimizer.param_groups[g]
        # What a parameter is, is this run's to say; stores that follow from it were compared.
        declared = {key: value for key, value in ours.items() if key in ("role", "head_size")}
        hyper: dict[str, Any] = {key: with_tensors(value, ours.get(key)) for key, value in group.hyper.items()}
        members = list(range(first, first + len(group.parameters)))
        groups.append({**hyper, **declared, "params": members})
        first += len(members)
    header = {
        "version": state_dict.VERSION,
        "stores": stores,
        "clip_grad_norm": document.clip_grad_norm,
        state_dict.COMPLETE: is_complete(checkpoint),
        state_dict.NAMES_COMPARED: True,
    }
    return {"state": state, "param_groups": groups, state_dict.KEY: header}
