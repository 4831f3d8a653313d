"""Steps of many small parameters in one call, whose work on the host would else cost more than the step itself.

The structures that compiled code reads are made once for each parameter and kept. Addresses in them are used only if
the tensors at hand are those of the last step, or others at the same place and of the same kind: this is looked up
anew in every step. What does not fit is stepped alone, as `StepRunner.update` does it.

What is done for every parameter is done by `map` over whole columns: a loop in Python would cost several times as much.
"""

from __future__ import annotations

import ctypes
import weakref
from array import array
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, compress
from itertools import chain as in_a_row
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from optstate.kernels import Scalar, native
from optstate.kernels.native import NUMBERS, StepKind
from optstate.optimizer.chain_step import context
from optstate.optimizer.parameters import Leaf
from optstate.optimizer.plan import ParamPlan
from optstate.optimizer.whole_steps import FusedByTorch, TableStep
from optstate.stores import Guard
from optstate.updates import Context

__all__ = ["ROUND_ELEMENTS", "Member", "Round", "SmallSteps", "rounds"]

ROUND_ELEMENTS = 1 << 19
"""Elements that are stepped in one round: their gradients, which are read twice, stay in a cache of a few megabytes."""

_dtype, _layout, _is_cpu, _shape = map(attrgetter, ("dtype", "layout", "is_cpu", "shape"))
_plan, _group, _step = attrgetter("plan"), attrgetter("group"), itemgetter("step")
_PLAIN, _GRADIENTS, _STRIDED, _TRUE, _INT = {Tensor, nn.Parameter}, {Tensor}, {torch.strided}, {True}, {int}


class Member(NamedTuple):
    """A small parameter that is to be stepped, what is known of it, and its gradient."""

    leaf: Leaf
    param: Tensor
    grad: Tensor


def rounds(members: Sequence[Member]) -> Iterator[Sequence[Member]]:
    """Yield parameters in order, as many at once as one round takes."""
    first = elements = 0
    for place, member in enumerate(members):
        count = member.leaf.plan.spec.numel
        if elements + count > ROUND_ELEMENTS and place > first:
            yield members[first:place]
            first, elements = place, 0
        elements += count
    if members:
        yield members[first:]


@dataclass(frozen=True, slots=True)
class KeptStructure:
    """What is kept of a small parameter from step to step: a structure with addresses, and what shows that they hold.

    Attributes:
        plan: that the structure was made for.
        whole: the step that made the structure.
        structure: as compiled code reads it.
        room: how many numbers of 8 bytes the sums of a step take.
        numbers: the same for all parameters of which a group makes the same numbers of a step.
        keys: of the state, in order; the first is the count of updates, the others are tensors.
        pointers, numels, dtypes: of the tensors in the state, then of the parameter.
        shape: of the parameter.
    """

    plan: ParamPlan
    whole: TableStep
    structure: Any
    room: int
    numbers: int
    keys: tuple[str, ...]
    pointers: tuple[int, ...]
    numels: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    shape: torch.Size


class KeptColumns:
    """What is kept of the parameters of a round, each kind of thing in a row: compared and handed on as a whole."""

    def __init__(self, leaves: list[Leaf], prepared: list[KeptStructure]) -> None:
        self.leaves, self.prepared = leaves, prepared
        self.leaf_ids, self.plan_ids = list(map(id, leaves)), [id(each.plan) for each in prepared]
        self.keys = [each.keys for each in prepared]
        self.is_tensor = [key > 0 for keys in self.keys for key in range(len(keys))]
        self.ends = list(accumulate((len(keys) - 1 for keys in self.keys), initial=0))
        self.pointers = [*self._of_state("pointers"), *(each.pointers[-1] for each in prepared)]
        self.numels = [*self._of_state("numels"), *(each.numels[-1] for each in prepared)]
        self.dtypes = [*self._of_state("dtypes"), *(each.dtypes[-1] for each in prepared)]
        self.shapes = [each.shape for each in prepared]
        self.names = [each.plan.spec.name for each in prepared]
        self.numbers = [each.numbers for each in prepared]
        elements = [each.numels[-1] for each in prepared]
        room_at = list(accumulate((each.room for each in prepared), initial=0))
        self.elements, self.room = sum(elements), room_at.pop()
        kinds = [int(each.whole.kind or 0) for each in prepared]
        self.by_torch = [place for place, kind in enumerate(kinds) if kind == StepKind.CHECKED]
        structures = [ctypes.addressof(each.structure) for each in prepared]
        self.table = [array("Q", column) for column in (kinds, elements, structures, room_at)]

    def _of_state(self, what: str) -> Iterator[Any]:
        return in_a_row.from_iterable(getattr(each, what)[:-1] for each in self.prepared)


@dataclass
class Round:
    """Parameters of a round that were looked at: all that a call needs of them.

    kept: their tensors in the state. steps: which step of each parameter this is.
    """

    columns: KeptColumns
    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    states: list[dict[str, Any]]
    kept: list[Tensor]
    steps: list[int]
    grad_types: list[int]

    def written(self, count: int) -> list[Tensor]:
        """Return the tensors that a step of the first parameters writes."""
        return [*self.params[:count], *self.kept[: self.columns.ends[count]]]


class SharedNumbers(NamedTuple):
    """The numbers of a step, which parameters of a group share: a structure, and what made it."""

    structure: Any
    whole: TableStep
    ctx: Context


class SmallSteps:
    """Makes steps of small parameters with one optimizer's groups and state, which are asked for anew each time."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._reference = weakref.ref(optimizer)
        self._prepared: dict[int, tuple[Leaf, KeptStructure]] = {}  # by the leaf's identity
        self._columns: dict[tuple[int, int], KeptColumns] = {}  # by the first leaf and the number of leaves
        self._kinds_of_numbers: dict[Hashable, int] = {}

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer = self._reference()
        assert optimizer is not None
        return optimizer

    # --- looking ------------------------------------------------------------------------------------------------------

    def look(self, members: Sequence[Member], keep: bool = True) -> Round | None:
        """Return parameters whose kept structures hold, gradients included; None if those of one do not.

        keep: whether the same parameters will be looked at together again.
        """
        leaves, params, grads = zip(*members, strict=True)
        columns = self._columns_of(leaves, keep)
        if columns is None or list(map(id, map(_plan, leaves))) != columns.plan_ids:
            return None
        states: list[Any] = list(map(self._optimizer.state.get, params))
        if not all(states) or list(map(tuple, states)) != columns.keys:
            return None
        kept = list(compress(in_a_row.from_iterable(map(dict.values, states)), columns.is_tensor))
        steps = list(map(_step, states))
        tensors = [*kept, *params]
        if not set(map(type, tensors)) <= _PLAIN or set(map(type, steps)) != _INT:
            return None
        are_same = (
            list(map(Tensor.data_ptr, tensors)) == columns.pointers
            and list(map(Tensor.numel, tensors)) == columns.numels
            and list(map(_dtype, tensors)) == columns.dtypes
            and list(map(_shape, params)) == columns.shapes
            and all(map(Tensor.is_contiguous, tensors))
            and not any(map(Tensor.is_neg, tensors))
        )
        grad_types = _types_of(grads, params, columns) if are_same else None
        if grad_types is None:
            return None
        return Round(columns, params, grads, states, kept, [step + 1 for step in steps], grad_types)

    def _columns_of(self, leaves: Sequence[Leaf], keep: bool) -> KeptColumns | None:
        """Return the columns of parameters that were all prepared; None if one was not."""
        key = id(leaves[0]), len(leaves)
        found = self._columns.get(key)
        if found is not None and found.leaf_ids == list(map(id, leaves)):
            return found
        prepared = []
        for leaf in leaves:
            _, ready = self._prepared.get(id(leaf), (leaf, None))
            if ready is None or ready.plan is not leaf.plan:
                return None
            prepared.append(ready)
        found = KeptColumns(list(leaves), prepared)
        if keep:
            self._columns[key] = found
        return found

    # --- preparing ----------------------------------------------------------------------------------------------------

    def fits(self, member: Member, grad_scale: Scalar) -> bool:
        """Return whether compiled code can step a parameter now; make its structure anew if the kept one does not hold.

        A structure that cannot be made, and a number that cannot be used, are left to the step of the parameter alone.
        """
        if self.look([member], keep=False) is not None:
            return True
        return self._prepare(member, grad_scale) and self.look([member], keep=False) is not None

    def _prepare(self, member: Member, grad_scale: Scalar) -> bool:
        """Make and keep the structure of a parameter; return whether that was possible."""
        leaf, param, grad = member
        self._prepared.pop(id(leaf), None)
        self._columns.clear()
        state, whole, plan = self._optimizer.state.get(param), leaf.found_step(param.device).step, leaf.plan
        if not state or not isinstance(whole, TableStep) or whole.kind is None or leaf.placement is not None:
            return False
        (first, step), *others = state.items()
        tensors = *(value for _, value in others), param
        if first != "step" or type(step) is not int or set(map(type, tensors)) - _PLAIN:
            return False
        if type(grad) is not Tensor or grad.layout != torch.strided or param.shape != plan.spec.shape:
            return False
        if not set(plan.fields) <= state.keys():
            return False
        structure = whole.fill(state, self._context(leaf, param, grad, state, step + 1, grad_scale))
        if structure is None:
            return False
        whole.with_names(structure, plan.spec.name)
        self._prepared[id(leaf)] = (
            leaf,
            KeptStructure(
                plan=plan,
                whole=whole,
                structure=structure,
                room=whole.room(structure),
                numbers=self._kind_of_numbers(plan, whole),
                keys=tuple(state),
                pointers=tuple(map(Tensor.data_ptr, tensors)),
                numels=tuple(map(Tensor.numel, tensors)),
                dtypes=tuple(map(_dtype, tensors)),
                shape=param.shape,
            ),
        )
        return True

    def _kind_of_numbers(self, plan: ParamPlan, whole: TableStep) -> int:
        """Return a number that is the same for parameters of which every group makes the same numbers of a step."""
        stores = tuple((slot.store, *(f.dtype for f in slot.fields.values())) for slot in plan.slots.values())
        key = type(whole), whole.kind, id(plan.chain), plan.weights, plan.guards, plan.largest_square_root, stores
        return self._kinds_of_numbers.setdefault(key, len(self._kinds_of_numbers))

    def _context(
        self, leaf: Leaf, param: Tensor, grad: Tensor, state: Mapping[str, Any], step: int, grad_scale: Scalar
    ) -> Context:
        group = self._optimizer.param_groups[leaf.group]
        return context(leaf.plan, state, param, grad, group, step, Guard(leaf.plan.spec.name, grad), grad_scale)

    # --- stepping -----------------------------------------------------------------------------------------------------

    def numbers(
        self, found: Round, grad_scale: Scalar, known: dict[Hashable, SharedNumbers]
    ) -> list[SharedNumbers] | None:
        """Return, for each parameter, the numbers of its step; None if some are not known to the host.

        known: those of this step that were made already; what is made here joins them.
        """
        columns = found.columns
        keys = list(zip(columns.numbers, map(_group, columns.leaves), found.steps, strict=True))
        for key in set(keys) - known.keys():
            place = keys.index(key)
            whole, state = columns.prepared[place].whole, found.states[place]
            leaf, param, grad = columns.leaves[place], found.params[place], found.grads[place]
            ctx = self._context(leaf, param, grad, state, found.steps[place], grad_scale)
            structure = whole.fill(state, ctx)
            if structure is None:
                return None
            first = structure if isinstance(structure, ctypes.Structure) else structure[0]
            first.grad.largest = whole.largest(ctx)
            known[key] = SharedNumbers(structure, whole, ctx)
        return [known[key] for key in keys]

    def begin(self, found: Round, numbers: Sequence[SharedNumbers]) -> tuple[native.ManySteps, int]:
        """Look at the values of the gradients; return the table, and how many can be used before one cannot."""
        columns, count = found.columns, len(found.params)
        kinds, elements, structures, room_at = columns.table
        address_of = {
            id(each): ctypes.addressof(each.structure) for each in {id(each): each for each in numbers}.values()
        }
        filled = [
            array("Q", column)
            for column in (
                map(address_of.__getitem__, map(id, numbers)),
                map(Tensor.data_ptr, found.grads),
                found.grad_types,
                found.steps,
            )
        ]
        room = torch.empty(columns.room, dtype=torch.float64, device="cpu")
        fine = array("i", bytes(4 * count))
        in_order = [column.buffer_info()[0] for column in (kinds, elements, structures, *filled, room_at)]
        table = native.ManySteps(count, *in_order, room.data_ptr(), fine.buffer_info()[0])
        table.alive = found, numbers, filled, room, fine
        native.share(native.function("begin_many"), (ctypes.byref(table),), columns.elements, 1, columns.elements)
        return table, fine.index(0) if 0 in fine else count

    def finish(self, found: Round, numbers: Sequence[SharedNumbers], table: native.ManySteps, count: int) -> None:
        """Write the first parameters of a round, whose gradients can be used, and their state."""
        table.count, elements = count, found.columns.elements
        if len(found.columns.by_torch) < count:
            native.share(native.function("finish_many"), (ctypes.byref(table),), elements, 1, elements)
        alike: dict[int, list[int]] = {}
        for place in found.columns.by_torch:
            if place < count:
                alike.setdefault(id(numbers[place]), []).append(place)
        for places in alike.values():
            _, whole, ctx = numbers[places[0]]
            assert isinstance(whole, FusedByTorch)
            whole.finish(
                [found.params[place] for place in places],
                [found.grads[place] for place in places],
                [found.states[place] for place in places],
                ctx,
            )


def _types_of(grads: Sequence[Tensor], params: Sequence[Tensor], columns: KeptColumns) -> list[int] | None:
    """Return what compiled code calls the dtypes of gradients; None if it may not be given their addresses."""
    if set(map(type, grads)) != _GRADIENTS or set(map(_layout, grads)) != _STRIDED or set(map(_is_cpu, grads)) != _TRUE:
        return None
    if list(map(Tensor.numel, grads)) != columns.numels[-len(grads) :]:
        return None
    if not all(map(Tensor.is_contiguous, grads)) or any(map(Tensor.is_neg, grads)):
        return None
    dtypes = list(map(_dtype, grads))
    if not set(dtypes) <= NUMBERS.keys() or any(dtypes[place] != params[place].dtype for place in columns.by_torch):
        return None
    return list(map(NUMBERS.__getitem__, dtypes))
