"""The laws of a store by itself: its words, its tensors, and its numbers."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from optstate import kernels, updates
from optstate.checkpoint.document.contradictions import contradictions
from optstate.checkpoint.live.save import save
from optstate.checkpoint.open_checkpoint import open_checkpoint
from optstate.checkpoint.operations.check_values import find_plugged_store_issues
from optstate.checkpoint.operations.plan_conversion import plan_stores
from optstate.checkpoint.operations.read_values import Values
from optstate.checkpoint.operations.run_conversion import write_native
from optstate.kernels import Noise
from optstate.optimizer.optimizer import Optimizer
from optstate.spec import FieldSpec, ParamSpec, Region
from optstate.store_layouts import Shape
from optstate.stores import Full, Store
from optstate.stores.registry import known_also, parse_store
from optstate.testing.devices import noise
from optstate.testing.laws import BrokenLawError, Law, at, expect, expect_close, expect_same, one_line
from optstate.testing.rule_laws import Maker
from optstate.text import parsed_call
from optstate.updates import Chain

__all__ = ["STORE_LAWS", "chain_with", "signs"]

FP32 = torch.float32
SHAPES: tuple[Shape, ...] = ((), (7,), (5000,), (64, 96), (61, 100), (3, 48, 40), (4, 3, 2, 2))
EVERY_STORE_TAKES = (64, 96)
DTYPES = (FP32, torch.bfloat16, torch.float64)
CONSTANTS = (2.0, 1e-3)
NEAR = 0.25
"""How far a constant may be read from what was stored, in parts of it: formats of few bits round."""


@dataclass(frozen=True)
class StoreCase:
    """A store fitted to one parameter and to a sign, with the tensors that it declares."""

    store: Store
    spec: ParamSpec
    signed: bool
    fields: dict[str, FieldSpec]

    def place(self) -> AbstractContextManager[None]:
        """Return the context in which whatever breaks is said to be in this setting."""
        return at(self.spec.shape, self.spec.dtype, f"signed={self.signed}")

    def encoded(self, value: Tensor) -> dict[str, Tensor]:
        """Return the tensors of a statistic of this value, as they are kept."""
        fields = self.empty()
        self.store.write(fields, value.clone(), Noise("p/statistic", 1))
        return fields

    def empty(self) -> dict[str, Tensor]:
        """Return the tensors of a statistic that begins."""
        return {name: torch.zeros(field.shape, dtype=field.dtype) for name, field in self.fields.items()}

    def values(self, seed: int = 1) -> Tensor:
        """Return numbers that the statistic may have."""
        value = noise(self.spec.shape, seed)
        return value if self.signed else value.square()


def signs(store: Store) -> list[bool]:
    """Return which statistics the store can keep: that can be negative, and that cannot."""
    found = []
    for signed in (True, False):
        try:
            store.check(signed, 1.0)
        except ValueError:
            continue
        found.append(signed)
    return found


def settings(store: Store, dtypes: tuple[torch.dtype, ...] = (FP32,)) -> Iterator[StoreCase]:
    """Yield the store in every setting that it takes and does not hand on to one of this library's stores."""
    for signed in signs(store):
        for dtype in dtypes:
            for shape in SHAPES:
                spec = ParamSpec(name="p", shape=shape, dtype=dtype, head_size=16)
                try:
                    fitted, _ = store.resolve(spec, signed)
                except ValueError as error:
                    if shape == EVERY_STORE_TAKES:
                        raise BrokenLawError(f"a plain matrix is refused: {one_line(error)}") from error
                    continue
                if isinstance(fitted, Full) and not isinstance(store, Full):
                    continue
                with at(shape, dtype, f"signed={signed}"):
                    case = StoreCase(fitted, spec, signed, fitted.fields(spec, signed))
                yield case


def chain_with(store: Store, signed: bool) -> Chain:
    """Return a chain that keeps its only statistic in the store."""
    return updates.chain(updates.momentum(store) if signed else updates.scale_by_rms(store, eps=1e-12))


# --- the laws -----------------------------------------------------------------------------------------------------


def words_name_it(store: Store) -> None:
    """Check that the words of a store build a store that is equal to it."""
    expect(bool(signs(store)), "it takes neither signed nor unsigned statistics")
    expect(parsed_call(str(store))[0] == type(store).__name__.lower(), f"its words {store} are not named as its class")
    with known_also(type(store)):
        again = parse_store(str(store))
    expect(again == store and hash(again) == hash(store), f"its words {store} build {again!r}, not {store!r}")


def sizes_are_declared(store: Store) -> None:
    """Check that every tensor has the name, number of elements and dtype that `fields` declares, always the same."""
    for case in settings(store, DTYPES):
        with case.place():
            _sizes_of(case)


def _sizes_of(case: StoreCase) -> None:
    spec, signed = case.spec, case.signed
    again = case.store.fields(spec, signed)
    expect(again == case.fields, "fields() does not answer the same twice")
    if spec.numel and spec.shape:
        half = (-(-spec.shape[0] // 2), *spec.shape[1:])
        rows = Region(spec.shape, (0,) * spec.ndim, half, (2, *(1,) * (spec.ndim - 1)))
        part = ParamSpec(name="p", shape=spec.shape, dtype=spec.dtype, head_size=16, region=rows)
        sizes = {name: (field.shape, field.dtype) for name, field in case.store.fields(part, signed).items()}
        whole = {name: (field.shape, field.dtype) for name, field in case.fields.items()}
        expect(sizes == whole, "fields() depends on the part that a device has: shapes are those of the whole")
    encoded = case.store.encode(case.values().to(spec.accumulator), Noise("p/statistic", 1))
    expect(encoded.keys() == case.fields.keys(), f"encode gives {sorted(encoded)}, declared {sorted(case.fields)}")
    for name, field in case.fields.items():
        new, label = encoded[name], name or "the tensor"
        count = math.prod(field.shape)
        expect(new.numel() == count, f"{label} has {new.numel()} elements, declared {count}")
        floats = new.dtype.is_floating_point and field.dtype.is_floating_point
        expect(new.dtype == field.dtype or floats, f"{label} is {new.dtype}, declared {field.dtype}: it would be cast")
        expect(len(field.dims) in (0, len(field.shape)), f"{label} has {len(field.dims)} dims of {len(field.shape)}")


def numbers_come_back(store: Store) -> None:
    """Check that a statistic is read in the parameter's shape, zero at the start, and near a stored constant."""
    for case in settings(store):
        with case.place():
            _numbers_of(case)


def _numbers_of(case: StoreCase) -> None:
    start = case.store.read(case.empty(), case.spec.shape)
    expect(tuple(start.shape) == case.spec.shape, f"a statistic of shape {list(start.shape)} is read")
    expect(start.dtype == FP32, f"{start.dtype} is read instead of torch.float32")
    expect(not bool((start.abs() > 1e-30).any()), f"a statistic that begins is read as {float(start.abs().max()):.3g}")
    for constant in (*CONSTANTS, *((-CONSTANTS[0],) if case.signed else ())):
        value = torch.full(case.spec.shape, constant)
        found = case.store.read(case.encoded(value), case.spec.shape)
        expect_close(found, value, f"{constant} was stored, and what is read is", NEAR)


def slices_are_kept_alone(store: Store) -> None:
    """Check that slices of an elementwise store are the whole's, and that other stores are their factors' product."""
    for case in settings(store):
        with case.place():
            _slices_of(case)


def _slices_of(case: StoreCase) -> None:
    spec, value = case.spec, case.values()
    if not spec.shape:
        return
    fields = case.encoded(value)
    whole = case.store.read(fields, spec.shape)
    if not case.store.elementwise:
        product = reduce(torch.mul, case.store.factors(fields, spec.shape)).expand(spec.shape)
        expect_close(product, whole, "the product of its factors beside what is read", 1e-5)
        return
    align, written = case.store.alignment, case.empty()
    for piece in kernels.cut_into_pieces(spec.shape, max(spec.numel // 3 // align, 1) * align, align):
        parts = {name: piece.of_field(field, case.fields[name].per) for name, field in fields.items()}
        found = case.store.read(parts, (piece.stop - piece.start,))
        expect_same(found, piece.of(whole).reshape(-1), f"elements {piece.start} to {piece.stop} read alone")
        part, bits = piece.of(value).reshape(-1).clone(), Noise("p/statistic", 1).at(piece.start)
        for name, new in case.store.encode(part, bits).items():
            place = piece.of_field(written[name], case.fields[name].per)
            expect(
                new.numel() == place.numel(),
                f"{name or 'it'} of a slice has {new.numel()} elements, not {place.numel()}",
            )
            place.copy_(new.reshape(place.shape))
    for name, field in fields.items():
        expect_same(written[name], field, f"{name or 'the tensor'} written slice by slice")


def files_hold_it(store: Store) -> None:
    """Check that a file of fp32 statistics becomes one in this store and goes back, with the numbers that it reads."""
    for signed in signs(store):
        rule = Maker(str(store), lambda params, signed=signed: Optimizer(params, chain_with(Full(), signed), lr=1e-3))
        shapes = {f"p{i}": shape for i, shape in enumerate(SHAPES) if _takes(store, shape, signed)}
        params, optimizer = rule.train(shapes)
        with tempfile.TemporaryDirectory(prefix="optstate-testing-") as name, known_also(type(store)):
            folder = Path(name)
            save(optimizer, folder / "full.safetensors")
            full = open_checkpoint(folder / "full.safetensors")
            slot = next(iter(full.document.parameters[0].slots))
            there = plan_stores(full, None, {slot: str(store)})
            there.check()
            write_native(there, folder / "kept.safetensors")
            kept = open_checkpoint(folder / "kept.safetensors")
            issues = [*contradictions(kept), *find_plugged_store_issues(kept)]
            expect(not issues, f"the file is found to be wrong: {issues[0].where} {issues[0].what}" if issues else "")
            back = plan_stores(kept, None, {slot: "fp32"})
            back.check()
            write_native(back, folder / "back.safetensors")
            numbers = Values(open_checkpoint(folder / "back.safetensors"))
            for param in numbers.checkpoint.document.parameters:
                assert param.shape is not None
                with at(param.shape, FP32, f"signed={signed}"):
                    spec = ParamSpec(name="p", shape=param.shape, dtype=FP32, head_size=16)
                    fitted, _ = store.resolve(spec, signed)
                    case = StoreCase(fitted, spec, signed, fitted.fields(spec, signed))
                    value = optimizer.state[params[param.name]][slot]
                    fields = case.empty()
                    fitted.write(fields, value.clone())
                    wanted = fitted.read(fields, param.shape)
                    expect_same(
                        numbers.read(param, slot), wanted.reshape(param.shape).float(), "what the file gives back"
                    )


def _takes(store: Store, shape: Shape, signed: bool) -> bool:
    try:
        store.resolve(ParamSpec(name="p", shape=shape, dtype=FP32, head_size=16), signed)
    except ValueError:
        return False
    return True


STORE_LAWS: tuple[Law[Store], ...] = (
    Law("words", "files name a store by its words, and would be read by another one", words_name_it),
    Law("store sizes", "plan, file header and estimate would promise other bytes than a run takes", sizes_are_declared),
    Law("numbers", "a step would use other statistics than were kept", numbers_come_back),
    Law(
        "store slices",
        "large parameters and parts on devices would be kept otherwise than small ones",
        slices_are_kept_alone,
    ),
    Law("file", "a checkpoint could not be converted into this store and back", files_hold_it),
)
