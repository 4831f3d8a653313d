"""What another library's file is made from, and the parts that every such file has. Imports no torch."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from optstate.checkpoint.document.document import WEIGHT, Document, Group, Parameter, SlotRecord, TensorValue
from optstate.checkpoint.document.rules import library_of
from optstate.checkpoint.files.dtypes import FORMS, SAFETENSORS_NAMES, TORCH_NAMES
from optstate.checkpoint.files.safetensors_writer import NewEntry
from optstate.checkpoint.files.torch_pickle_writer import Constant, NewTensor
from optstate.checkpoint.formats.shared.statistics import RECIPE_OF_RULE, RULES, Meaning
from optstate.text import shown

__all__ = [
    "FACTORED",
    "NO_NUMBER",
    "LayoutError",
    "Tree",
    "TreeWriter",
    "check_rule",
    "check_statistics",
    "is_full",
    "make_constant",
    "make_scalar_constant",
    "number",
    "numbers",
]

Tree = dict[str, Any]
"""A tree that `create_torch` writes."""

FACTORED = "Factored()"

NO_NUMBER = ("int", "float")
"""Forms of a step that are plain numbers of Python's; other forms are dtypes of a tensor without dimensions."""


class LayoutError(ValueError):
    """A layout has no place for what the document holds; the message says what to do."""


@dataclass(frozen=True)
class TreeWriter:
    """A document on its way into a library's state_dict.

    layout: the library. entries: dtype and shape of every tensor the document names, by key. our_words: see `Format`,
    of the library that the document came from. notes: what a person should know about the new file, collected on the
    way. books: the maps that were made, by id.
    """

    layout: str
    document: Document
    entries: Mapping[str, NewEntry]
    our_words: Callable[[dict[str, Any]], dict[str, Any]] = dict
    notes: dict[str, None] = field(default_factory=dict)
    books: dict[str, Constant] = field(default_factory=dict)

    @cached_property
    def _by_group(self) -> list[list[Parameter]]:
        return self.document.members

    @property
    def kind(self) -> str:
        """The layout that the document came from, "" for optstate's own."""
        kind = self.document.source.get("kind", "")
        return kind if isinstance(kind, str) else ""

    @property
    def tool(self) -> str:
        """Whose hyper-parameters it has, "" for our own; a file of LeRobot's holds those of another library."""
        return library_of(self.document)

    @property
    def same(self) -> bool:
        """Whether it came from this layout, so that the file is to be what it was."""
        return self.kind == self.layout

    def common(self, group: Group) -> dict[str, Any]:
        """Return a group's hyper-parameters under the keys that our recipes have, small tensors as numbers."""
        hyper = self.our_words({key: numbers(value) for key, value in group.hyper.items()})
        if isinstance(hyper.get("betas"), list):  # of a file in JSON
            hyper["betas"] = tuple(hyper["betas"])
        if hyper.get("decoupled_weight_decay") is False and not hyper.get("weight_decay"):
            del hyper["decoupled_weight_decay"]  # nothing decays
        return hyper

    def note(self, text: str) -> None:
        """Keep a sentence for the person who converts."""
        self.notes[text] = None

    def members(self, group: int) -> list[Parameter]:
        """Return the parameters of a group, in order."""
        return self._by_group[group]

    def tensor(self, key: str, shape: tuple[int, ...] | None = None) -> NewTensor:
        """Return the tensor of this key, in another shape of as many elements if one is given."""
        entry = self.entries[key]
        return NewTensor(key, entry.dtype, entry.shape if shape is None else shape)

    def full(
        self, param: Parameter, slot: str, record: SlotRecord, allowed: str = "Full()", store: str = "fp32"
    ) -> NewTensor:
        """Return the one tensor of a statistic kept in full.

        allowed: the stores that the layout has for it, for messages. store: one of them, in words for `--slot`.
        """
        if not is_full(record) and not (self.same and set(record.fields) == {""}):
            raise self.misfit(param, slot, record, allowed, store)
        return self.tensor(record.fields[""])

    def map_of(self, record: SlotRecord) -> Constant:
        """Return the values that codes stand for: fp32, one storage for all statistics that share it."""
        if record.codebook not in self.books:
            values = self.document.codebooks.get(record.codebook)
            if values is None:
                raise LayoutError(f"the values of the codes {record.codebook!r} are not in the file")
            self.books[record.codebook] = make_constant(TensorValue("float32", (len(values),), values))
        return self.books[record.codebook]

    def step(self, param: Parameter, form: str) -> Tree:
        """Return the entry `step`: in the form that the file had it, if it came from this layout; else in this form.

        form: "int", "float", the dtype of a tensor without dimensions, or "" for no entry.
        """
        if self.same:
            form = str(self.document.source.get("step", ""))
        if not form or (self.same and param.step is None):
            return {}
        if param.step is None:
            raise LayoutError(
                f"the file does not say how many steps '{shown(param.name)}' was updated, which {self.layout} needs; "
                "convert with --recipe, which counts from 1"
            )
        if form in NO_NUMBER:
            return {"step": param.step if form == "int" else float(param.step)}
        return {"step": make_scalar_constant(form, param.step)}

    def extra(self, param: Parameter, *without: str, droppable: tuple[str, ...] = ("RMS",)) -> Tree:
        """Return what else the layout kept for a parameter, less what has its own place.

        droppable: what can be left out of another layout, since it is made anew at every step.
        """
        rest = {key: value for key, value in param.extra.items() if key not in without}
        if not self.same and (lost := [key for key in rest if key not in droppable]):
            raise LayoutError(
                f"'{shown(param.name)}' has {shown(', '.join(lost))}, which {self.layout} has no place for"
            )
        return {key: with_constants(value) for key, value in rest.items()} if self.same else {}

    def tree(self, state_of: Callable[[Parameter], Tree], hyper_of: Callable[[int, Group], Tree]) -> Tree:
        """Return the file: a state by place, the groups, and what else was at the top.

        state_of: what is kept for a parameter. hyper_of: the hyper-parameters of a group, unless they are as they were.
        """
        if not self.same and self.document.source.get("ordered") is False:
            raise LayoutError(
                f"the file has parameters by name, in no order, and {self.layout} counts them; load it by name, with "
                "optstate.load"
            )
        ids = self.ids()
        state = {i: state_of(param) for i, param in zip(ids, self.document.parameters, strict=True)}
        groups, named, first = [], self.named(), 0
        for g, group in enumerate(self.document.groups):
            names: Tree = {"param_names": list(group.parameters)} if named else {}
            hyper = with_constants(group.hyper) if self.same else hyper_of(g, group)
            groups.append({**names, **hyper, "params": ids[first : first + len(group.parameters)]})
            first += len(group.parameters)
        return {
            "state": {i: entry for i, entry in state.items() if entry},
            "param_groups": groups,
            **self.top(),
        }

    def top(self) -> Tree:
        """Return what the file has beside its state and its groups."""
        if self.document.extra and not self.same:
            names = shown(", ".join(self.document.extra))
            raise LayoutError(f"{names} of the file: {self.layout} has no place for it")
        return {key: with_constants(value) for key, value in self.document.extra.items()}

    def named(self) -> bool:
        """Whether groups list the names of their parameters."""
        if "named" in self.document.source:
            return bool(self.document.source["named"])
        return any(not param.name.startswith("#") for param in self.document.parameters)

    def ids(self) -> list[Any]:
        """Return what stands for the parameters, in order: their places, unless the file had names or other numbers."""
        names = [param.name for param in self.document.parameters]
        if self.same and self.document.source.get("keys") == "names":
            return names
        ids = self.document.source.get("ids") if self.same else None
        return list(ids) if isinstance(ids, list) and len(ids) == len(names) else list(range(len(names)))

    def warn_of_casts(self) -> None:
        """Say that torch's `load_state_dict` gives statistics the dtype of their parameter."""
        for param in self.document.parameters:
            whole = [record for record in param.slots.values() if is_full(record)]
            kept = {self.entries[key].dtype for record in whole for key in record.fields.values()}
            if param.dtype in ("bfloat16", "float16") and "F32" in kept:
                self.note(f"torch rounds statistics to the dtype of their parameter, {param.dtype}, when it loads them")

    def warn_of_rest(self, tree: Tree) -> None:
        """Say what no library's file has a place for: what is not in this one, though the document holds it."""
        document, parameters = self.document, self.document.parameters
        norm = document.clip_grad_norm
        if norm is not None and not any("clip_grad_norm" in group for group in tree["param_groups"]):
            self.note(f"the norm clip of the fused backward pass, {norm}, is not in the file: clip gradients yourself")
        if not self.named() and any(not param.name.startswith("#") for param in parameters):
            self.note("the names of parameters are not in the file, only their order")
        if tied := [f"{shown(other)} = {shown(param.name)}" for param in parameters for other in param.tied]:
            self.note(f"other names of tied parameters are not in the file: {', '.join(tied)}")
        if any(group.role or group.head_size for group in document.groups):
            self.note("the declared roles of parameters are not in the file")
        if words := dict.fromkeys(param.weights for param in parameters if param.weights not in ("", "Plain()")):
            self.note(
                f"how weights are written, {', '.join(words)}, is not in the file: the library does it its own way"
            )
        if document.history:
            self.note("what earlier conversions lost is not in the file")

    def misfit(self, param: Parameter, slot: str, record: SlotRecord, allowed: str, store: str) -> LayoutError:
        """Return the error for a statistic in a store that the layout does not have."""
        return LayoutError(
            f"{slot} of '{shown(param.name)}' is in {record.store}: {self.layout} keeps {allowed}; "
            f"convert with --slot {slot}={store}"
        )


# --- what a rule keeps --------------------------------------------------------------------------------------------


def check_rule(writer: TreeWriter, *known: str) -> str:
    """Return the rule that the document's recipe is, one of those that the library has.

    Raises:
        LayoutError: for another.
    """
    recipe = writer.document.recipe
    rule = RULES.get(recipe, "")
    if rule not in known:
        named = writer.document.source.get("optimizer")
        what = f"the recipe {recipe!r}" if recipe else f"{named}" if named else "a chain without a name"
        fitting = " or ".join(dict.fromkeys(f"--recipe {RECIPE_OF_RULE[name]}" for name in known))
        raise LayoutError(f"the state is of {what}: {writer.layout} does not have it; convert with {fitting}")
    return rule


def check_statistics(
    writer: TreeWriter, param: Parameter, meanings: Mapping[str, Meaning], theirs: Callable[[], Tree] = dict
) -> None:
    """Raise LayoutError unless a parameter keeps what a rule keeps, and nothing else.

    Two libraries may call different averages by one name: Adam corrects its second moment for beginning at zero when
    it is used, Adafactor's needs no correction. State from this very library is what it is.

    theirs: makes the group as the library has it, for weights of the past that are under keys of its own there.
    """
    odd = [slot for slot in param.slots if slot not in meanings and not writer.same]
    if odd or WEIGHT in param.slots:
        lost = odd[0] if odd else WEIGHT
        raise LayoutError(
            f"{lost} of '{shown(param.name)}' ({param.slots[lost].store}) has no place in {writer.layout}; "
            + ("write a file of optstate's own" if lost == WEIGHT else f"leave it out with --slot {lost}=drop")
        )
    if writer.same or not param.has_state:
        return
    hyper = writer.common(writer.document.groups[param.group])
    for slot, meaning in meanings.items():
        if slot in param.slots:
            known = meaning.beta is None or meaning.beta[0] in hyper
            _check_meaning(writer, param, slot, meaning, meaning.beta_in(hyper if known else theirs()))
        elif meaning.is_needed(param.shape, hyper):
            raise LayoutError(
                f"'{shown(param.name)}' has no {slot}, which {writer.layout} needs; convert with --recipe "
                f"{writer.document.recipe}"
            )


def _check_meaning(writer: TreeWriter, param: Parameter, slot: str, meaning: Meaning, beta: float | None) -> None:
    record = param.slots[slot]
    if (record.of, record.beta) == (meaning.of, beta):
        return
    there = f"of={record.of!r}, beta={record.beta}" if record.of else "unknown"
    raise LayoutError(
        f"what {slot} of '{shown(param.name)}' averages is {there}, where {writer.layout} has of={meaning.of!r}, "
        f"beta={beta}; convert with --recipe {writer.document.recipe}"
    )


def is_full(record: SlotRecord) -> bool:
    """Whether a statistic has one number per element."""
    return record.store.startswith("Full(")


# --- numbers ------------------------------------------------------------------------------------------------------


def make_scalar_constant(dtype: str, value: float) -> Constant:
    """Return a tensor without dimensions; `dtype` is the safetensors format's name."""
    if dtype not in FORMS and dtype != "BF16":
        raise LayoutError(f"a step of dtype {dtype!r} cannot be written")
    return make_constant(TensorValue(TORCH_NAMES[dtype], (), (value,)))


def make_constant(value: TensorValue) -> Constant:
    """Return a small tensor with its bytes.

    Raises:
        LayoutError: for a dtype that cannot be written, or numbers that it cannot hold.
    """
    name = SAFETENSORS_NAMES.get(f"torch.{value.dtype}", "")
    code = "f" if name == "BF16" else FORMS.get(name)
    if code is None:
        raise LayoutError(f"a tensor of {value.dtype} among the hyper-parameters cannot be written")
    numbers = [int(v) if code in "BbhHiIqQ" else v for v in value.values]
    try:
        data = struct.pack(f"<{len(numbers)}{code}", *numbers)
    except (struct.error, OverflowError):
        raise LayoutError(f"{value.dtype} does not hold {value.values[:4]}") from None
    if name == "BF16":  # the upper half of an fp32 number
        data = b"".join(data[i + 2 : i + 4] for i in range(0, len(data), 4))
    return Constant(name, value.shape, data)


def with_constants(value: Any) -> Any:
    """Plain data with small tensors as what is written of them."""
    if isinstance(value, TensorValue):
        return make_constant(value)
    if isinstance(value, tuple | list):
        return type(value)(with_constants(item) for item in value)
    return {key: with_constants(item) for key, item in value.items()} if isinstance(value, dict) else value


def number(value: Any) -> Any:
    """Return a hyper-parameter as a plain number where it is a tensor of one; anything else as it is."""
    if isinstance(value, TensorValue) and len(value.values) == 1:
        return value.values[0]
    return value


def numbers(value: Any) -> Any:
    """Return a hyper-parameter with `number` applied to all parts of tuples and lists."""
    if isinstance(value, tuple | list):
        return type(value)(numbers(item) for item in value)
    return number(value)
