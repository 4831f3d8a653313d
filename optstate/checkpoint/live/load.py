"""Load a checkpoint into a running optimizer: plan the conversion onto it, mind consent, read numbers into place.

A file that this optimizer could have written is the conversion in which every transfer is a copy.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from optstate import naming
from optstate.checkpoint.document.canonical_names import with_canonical_names, with_groups_of
from optstate.checkpoint.document.checkpoint import OPTSTATE, Checkpoint
from optstate.checkpoint.document.document import tensor_key
from optstate.checkpoint.errors import CheckpointError
from optstate.checkpoint.files.dtypes import TORCH_NAMES
from optstate.checkpoint.formats.shared.master_weights import notes_of_masters
from optstate.checkpoint.live.gather import read_part_into, sample_content
from optstate.checkpoint.live.plan_load import is_complete, plan_load, refuse_differences
from optstate.checkpoint.open_checkpoint import open_checkpoint
from optstate.checkpoint.operations.convert_values import Recoder
from optstate.checkpoint.operations.describe_optimizer import restore_tensors
from optstate.checkpoint.operations.plan_conversion import Conversion, Transfer, plan_copy
from optstate.checkpoint.operations.read_values import Values
from optstate.distributed.agreement import DisagreementError, LostProcessError
from optstate.distributed.placement import copy_part, here
from optstate.optimizer import state_dict
from optstate.optimizer.optimizer import InconsistentStateError, Optimizer
from optstate.spec import FieldSpec

__all__ = ["load"]

MOST_CHANGES = 3
"""Clauses about the rule in one message."""

UNCHANGED = "nothing was changed; build the optimizer as the saved run did"


def load(
    optimizer: Optimizer,
    path: str | os.PathLike[str],
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
        key: of other tools' files, as for `optstate convert`.
        names: of other tools' files, as for `optstate convert`.

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
        conversion = _agreed_conversion(optimizer, checkpoint, allow_lossy)
        notes.extend([*notes_of_masters(checkpoint.notes), *conversion.notes])
        view, copy = _as_state_dict(optimizer, conversion)

        def noted(own: Tensor, theirs: Tensor) -> None:
            copied[:] = [own]
            copy(own, theirs)

        return view, noted

    with _failing(path, lambda: bool(copied)):
        optimizer.load_prepared(prepare, lambda: sample_content(opened[0].tensors))
    _warn_of_other_names(optimizer, opened[0])
    for note in notes:
        warnings.warn(f"{os.fspath(path)}: {note}", stacklevel=2)


@contextmanager
def _failing(path: str | os.PathLike[str], begun: Callable[[], bool]) -> Iterator[None]:
    """Turn what loading raises, before or after it has begun to change anything, into the error of checkpoint files."""
    broken = "the state is incomplete: load again before the next step"
    try:
        yield
    except (ValueError, TypeError) as error:
        raise CheckpointError(path, str(error), broken if begun() else UNCHANGED, refused=True) from None
    except DisagreementError as error:
        raise CheckpointError(path, f"not loaded, {error}", "nothing was changed, on any rank", refused=True) from None
    except InconsistentStateError as error:
        raise CheckpointError(path, str(error), broken, refused=True) from None
    except LostProcessError as error:
        raise CheckpointError(path, f"loading broke off: {error}", broken) from error.__cause__
    except OSError as error:
        reason = "reading failed half-way" if begun() else "it cannot be read"
        raise CheckpointError(path, f"{reason}: {error}", broken if begun() else "nothing was changed") from error


def _warn_of_other_names(optimizer: Optimizer, opened: Checkpoint) -> None:
    """Warn if our own run that saved the file rounded at random under other names."""
    params, plan = opened.document.parameters, optimizer.plan()
    names = [naming.by_place(i) if param.name.startswith("#") else param.name for i, param in enumerate(params)]
    ours = {i: param.weights for i, param in enumerate(params) if param.weights}
    saved = {"param_groups": [{"params": names, "param_names": names}], state_dict.KEY: {"weights": ours}}
    state_dict.warn_if_rounded_otherwise(saved, optimizer.param_groups, plan, ())


# --- consent ------------------------------------------------------------------------------------------------------


def _agreed_conversion(optimizer: Optimizer, checkpoint: Checkpoint, allow_lossy: bool) -> Conversion:
    """Plan what a checkpoint becomes in this optimizer, as far as the caller agrees with it; change nothing.

    Raises:
        CheckpointError: if it is another optimizer's, or numbers would change without consent.
    """
    path, difference = checkpoint.path, ""
    if checkpoint.kind == OPTSTATE and any(param.chain for param in checkpoint.document.parameters):
        try:
            return _exact_conversion(optimizer, checkpoint)
        except (ValueError, TypeError) as error:  # a hyper-parameter of the wrong kind is a TypeError
            difference = str(error)
    try:
        conversion, lost = _conversion_at_all(optimizer, checkpoint, consent=allow_lossy or bool(difference))
    except CheckpointError:  # the file contradicts itself
        if allow_lossy or not difference:
            raise
        raise CheckpointError(path, difference, UNCHANGED, refused=True) from None
    except (ValueError, TypeError) as error:
        raise CheckpointError(path, str(error) if allow_lossy else difference or str(error), UNCHANGED, True) from None
    if allow_lossy:
        return conversion
    if difference := difference or lost:
        raise CheckpointError(path, difference, f"{UNCHANGED}, or convert with allow_lossy=True", refused=True)
    if conversion.changes:
        reason = f"the file follows another rule: {'; '.join(conversion.changes[:MOST_CHANGES])}"
        consent = "nothing was changed; allow_lossy=True takes the statistics over all the same"
        raise CheckpointError(path, reason, consent, refused=True)
    if not conversion.lossless:
        slots = dict.fromkeys(transfer.name for transfer in conversion.all_transfers if not transfer.exact)
        what = ", ".join(slots) or ", ".join(dict.fromkeys(slot for _, slot in conversion.dropped))
        raise CheckpointError(path, f"numbers would change in {what}", "allow_lossy=True accepts that", refused=True)
    return conversion


def _exact_conversion(optimizer: Optimizer, checkpoint: Checkpoint) -> Conversion:
    """Plan to copy every tensor of a file that this optimizer could have written.

    Raises:
        ValueError, TypeError: at the first difference.
    """
    refuse_differences(optimizer, checkpoint)
    conversion = plan_copy(checkpoint)
    state_dict.check_state_dict(optimizer, optimizer.plan(), _as_state_dict(optimizer, conversion)[0])
    return conversion


def _conversion_at_all(optimizer: Optimizer, checkpoint: Checkpoint, consent: bool) -> tuple[Conversion, str]:
    """Plan what a checkpoint becomes, and say what is lost on the way apart from numbers, "" for nothing.

    Raises:
        ValueError, TypeError: if it cannot be made, even with consent.
    """
    if not consent:
        try:
            return plan_load(optimizer, checkpoint), ""
        except ValueError as error:
            return plan_load(optimizer, checkpoint, anew=True), str(error)
    return plan_load(optimizer, checkpoint, anew=True), ""


# --- numbers ------------------------------------------------------------------------------------------------------

Prepared = tuple[Mapping[str, Any], Callable[[Tensor, Tensor], Any]]
"""A `state_dict` with stand-ins for its tensors, and what copies the values of a stand-in into a tensor."""


def _as_state_dict(optimizer: Optimizer, conversion: Conversion) -> Prepared:
    """Show a conversion as a `state_dict` whose numbers are read while they are copied.

    Copying raises OSError or UnreadableStatisticError if the file cannot be read, or holds numbers that are not finite
    where they would have to be changed.
    """
    numbers = _Numbers(conversion)
    state: dict[int, dict[str, Any]] = {}
    planned = zip(conversion.document.parameters, conversion.transfers.values(), optimizer.plan(), strict=True)
    for i, (param, transfers, plan) in enumerate(planned):
        if param.step is None:
            continue
        made = {key: (transfer, field) for transfer in transfers for field, key in transfer.record.fields.items()}
        state[i] = {
            key: numbers.stand_in(made.get(tensor_key(param.name, key)), plan.fields[key]) for key in plan.fields
        }
        state[i]["step"] = param.step
    groups: list[dict[str, Any]] = []
    first = 0
    for g, group in enumerate(conversion.document.groups):
        own = optimizer.param_groups[g] if g < len(optimizer.param_groups) else {}  # `state_dict.check` counts them
        hyper: dict[str, Any] = {key: restore_tensors(value, own.get(key)) for key, value in group.hyper.items()}
        # What a parameter is, is this run's to say.
        hyper |= {key: own[key] for key in ("role", "head_size") if key in own}
        groups.append({**hyper, "params": list(range(first, first + len(group.parameters)))})
        first += len(group.parameters)
    header = {
        "version": state_dict.VERSION,
        "clip_grad_norm": conversion.document.clip_grad_norm,
        "weights": {i: param.weights for i, param in enumerate(conversion.document.parameters) if param.weights},
        state_dict.COMPLETE: is_complete(conversion.checkpoint),
        state_dict.NAMES_COMPARED: True,
    }
    return {"state": state, "param_groups": groups, state_dict.KEY: header}, numbers.copy


class _Numbers:
    """Brings the numbers of a conversion into tensors: copies are read into place, others made statistic by statistic.

    Memory: for what is not copied one statistic in fp32, and its new tensors.
    """

    def __init__(self, conversion: Conversion) -> None:
        self._tensors = conversion.checkpoint.tensors
        self._recoder = Recoder(Values(conversion.checkpoint))
        self._made: tuple[Transfer | None, dict[str, Tensor]] = (None, {})
        # The stand-ins themselves are kept, so that no other tensor takes the id of one.
        self._sources: dict[int, tuple[Tensor, tuple[Transfer, str] | None]] = {}

    def stand_in(self, source: tuple[Transfer, str] | None, spec: FieldSpec) -> Tensor:
        """Return a tensor without values for a field of a statistic; without a source it begins at zero."""
        shape, dtype = spec.shape, spec.dtype
        if source is not None and source[0].store is None:
            entry = source[0].entries[source[1]]
            shape, dtype = entry.shape, getattr(torch, TORCH_NAMES.get(entry.dtype, ""), dtype)
        tensor = torch.empty(shape, dtype=dtype, device="meta")
        self._sources[id(tensor)] = (tensor, source)
        return tensor

    def copy(self, own: Tensor, stand_in: Tensor) -> None:
        """Fill `own` with the values of a stand-in."""
        _, source = self._sources[id(stand_in)]
        if source is None:
            here(own).zero_()
            return
        transfer, field = source
        if transfer.store is None:
            assert transfer.was is not None
            read_part_into(own, self._tensors[transfer.was.fields[field]])
            return
        if self._made[0] is not transfer:
            self._made = (transfer, self._recoder.fields_of(transfer))
        copy_part(own, self._made[1].pop(field))
