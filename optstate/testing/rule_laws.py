"""The laws of whatever makes an optimizer: a recipe, or a chain with somebody's transform or store in it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from optstate.checkpoint.live.load import load
from optstate.checkpoint.live.save import save
from optstate.checkpoint.open_checkpoint import open_checkpoint
from optstate.checkpoint.operations.plan_conversion import plan_stores
from optstate.checkpoint.operations.run_conversion import write_native
from optstate.kernels import chunking
from optstate.optimizer.fused_backward import fuse_backward
from optstate.optimizer.optimizer import Optimizer
from optstate.store_layouts import Shape
from optstate.stores import NonFiniteGradientError
from optstate.testing.devices import CutParameter, gradient_of, noise
from optstate.testing.laws import BrokenLawError, Law, at, expect, expect_close, expect_same, one_line

__all__ = ["RULE_LAWS", "Maker"]

Params = dict[str, nn.Parameter]

FP64, FP32, BF16 = torch.float64, torch.float32, torch.bfloat16
SHAPES: dict[str, Shape] = {
    "scalar": (),
    "vector": (7,),
    "matrix": (61, 100),
    "even": (64, 96),
    "experts": (3, 40, 48),
    "conv": (4, 3, 2, 2),
    "empty": (0, 6),
}
LARGE = ("matrix", "even", "experts")
EVERY_RULE_TAKES = (64, 96)
CUTS: tuple[tuple[Shape, Shape], ...] = (
    ((64, 96), (2, 1)),
    ((61, 100), (3, 1)),
    ((64, 96), (1, 2)),
    ((48, 96), (2, 2)),
)
STEPS, ROUNDING = 2, 1e-5
SMALL = 2.0**-6
"""Weights begin small, so that their rounding hides no difference in a step."""

OF_A_STEP = 1e-3
"""How far the change of a weight may be off, beside the largest change, by the rounding of fp32."""

FEW_BITS = 0.35
"""How far numbers may be from what they were, beside the largest, after being kept in 4 bits."""

CUT_BLOCKS = (
    "devices cut a block here, for which `resolve` must return another store (see `ParamSpec.keeps_together`), or "
    "`encode_part` and `read` take parts"
)


@dataclass(frozen=True)
class Maker:
    """What makes an optimizer of parameters, names and groups as `optstate.Optimizer` takes them.

    words: the part that is tested, in words.
    """

    words: str
    make: Callable[..., Optimizer]

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """The shapes that the optimizer does not refuse, and can step."""
        return {name: shape for name, shape in SHAPES.items() if not self.problem(shape)}

    @cached_property
    def few(self) -> dict[str, Shape]:
        """One vector and one matrix of these."""
        return {name: shape for name, shape in self.shapes.items() if name in ("vector", "even")}

    def problem(self, shape: Shape) -> str:
        """Return why a parameter of this shape cannot be stepped, "" if it can."""
        try:
            self.train({"p": shape}, steps=1)
        except Exception as error:
            return one_line(error)
        return ""

    def built(
        self, shapes: Mapping[str, Shape], dtype: torch.dtype = FP32, device: str = "cpu"
    ) -> tuple[Params, Optimizer]:
        """Make parameters and their optimizer."""
        params = {
            name: nn.Parameter((noise(shape, i) * SMALL).to(dtype).to(device))
            for i, (name, shape) in enumerate(shapes.items())
        }
        return params, self.make([{"params": list(params.items()), "head_size": 16}])

    def train(
        self,
        shapes: Mapping[str, Shape],
        dtype: torch.dtype = FP32,
        fused: bool = False,
        steps: int = STEPS,
    ) -> tuple[Params, Optimizer]:
        """Make parameters and their optimizer, and some steps."""
        params, optimizer = self.built(shapes, dtype)
        with _unsearched():
            if fused:
                fuse_backward(optimizer)
            for step in range(1, steps + 1):
                step_once(params, optimizer, step)
        return params, optimizer


@contextmanager
def _unsearched() -> Iterator[None]:
    """Leave out the search for engines among all live objects, which takes longer than the steps here."""
    with mock.patch("optstate.integrations.engines.refuse_live_objects"):
        yield


def step_once(params: Params, optimizer: Optimizer, step: int) -> None:
    """Make one step with gradients that depend on its number alone."""
    wanted = {name: gradient_of(param.shape, 10 * step + i) for i, (name, param) in enumerate(params.items())}
    torch.stack([(param.float() * wanted[name]).sum() for name, param in params.items()]).sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()


def state_tensors(param: Tensor, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the tensors kept for a parameter."""
    return {key: value for key, value in optimizer.state[param].items() if isinstance(value, Tensor)}


def _same_runs(a: tuple[Params, Optimizer], b: tuple[Params, Optimizer], which: str) -> None:
    for name, param in a[0].items():
        other = b[0][name]
        with at(param.shape, param.dtype):
            expect_same(other.detach(), param.detach(), f"the weight {which}")
            mine, theirs = state_tensors(param, a[1]), state_tensors(other, b[1])
            expect(mine.keys() == theirs.keys(), f"the state {which} has {sorted(theirs)}, not {sorted(mine)}")
            for key, value in mine.items():
                expect_same(theirs[key], value, f"{key} {which}")


# --- the laws -----------------------------------------------------------------------------------------------------


def any_shape(rule: Maker) -> None:
    """Check that every shape is stepped, or refused with a ValueError when the optimizer is built."""
    for shape in SHAPES.values():
        with at(shape, FP32):
            try:
                params, optimizer = rule.built({"p": shape})
            except ValueError as error:
                expect(shape != EVERY_RULE_TAKES, f"a plain matrix is refused: {one_line(error)}")
                continue
            step_once(params, optimizer, 1)
            expect(bool(params["p"].isfinite().all()), "the weight is not finite after one step")


def declared_sizes(rule: Maker) -> None:
    """Check that what the plan declares is allocated, and is the same without memory."""
    for dtype in (FP32, BF16):
        params, optimizer = rule.train(rule.shapes, dtype, steps=1)
        _, without = rule.built(rule.shapes, dtype, device="meta")
        total = 0
        for plan, other in zip(optimizer.plan(), without.plan(), strict=True):  # a route has its own order
            name, param = plan.spec.name, params[plan.spec.name]
            with at(param.shape, dtype):
                kept = state_tensors(param, optimizer)
                expect(kept.keys() == plan.fields.keys(), f"{sorted(kept)} kept, {sorted(plan.fields)} declared")
                for key, layout in plan.layouts.items():
                    declared, allocated = (
                        (layout.shape, layout.dtype),
                        (tuple(kept[key].shape), kept[key].dtype),
                    )
                    expect(allocated == declared, f"{key} is {allocated}, declared {declared}")
                expect(
                    plan.nbytes == other.nbytes, f"{plan.nbytes} bytes for {name}, {other.nbytes} on the meta device"
                )
                total += sum(value.numel() * value.element_size() for value in kept.values())
        expect(total == optimizer.state_nbytes(), f"{total} bytes kept, state_nbytes() says {optimizer.state_nbytes()}")


def fused_is_stepped(rule: Maker) -> None:
    """Check that the hooks of the backward pass do what `step()` does, bit for bit."""
    for dtype, shapes in ((FP32, rule.few), (BF16, rule.shapes)):
        stepped, fused = (rule.train(shapes, dtype, fused) for fused in (False, True))
        _same_runs(stepped, fused, "of a fused backward pass")


def resumes(rule: Maker) -> None:
    """Check that a run that is saved to a file and loaded goes on bit for bit."""
    for dtype, shapes in ((FP32, rule.few), (BF16, rule.shapes)):
        params, optimizer = rule.train(shapes, dtype)
        with _scratch_folder() as folder:
            save(optimizer, folder / "a.safetensors")
            again, other = rule.built(shapes, dtype)
            with torch.no_grad():
                for name, param in again.items():
                    param.copy_(params[name])
            load(other, folder / "a.safetensors")
        _same_runs((params, optimizer), (again, other), "after loading")
        for run in ((params, optimizer), (again, other)):
            step_once(*run, STEPS + 1)
        _same_runs((params, optimizer), (again, other), "one step after loading")


def reads_no_value(rule: Maker) -> None:
    """Check that a step runs without values: on an accelerator every read of a value waits for the device."""
    shapes = rule.few  # found out with values
    expect(bool(shapes), "no vector and no matrix can be stepped at all")
    with FakeTensorMode():
        for shape in shapes.values():
            with at(shape, BF16):
                rule.train({"p": shape}, BF16, steps=1)


def parts_are_whole(rule: Maker) -> None:
    """Check that a parameter in parts on several devices is stepped as in one piece."""
    for shape, parts in CUTS:
        with at(shape, FP64, f"cut in {'x'.join(map(str, parts))}"):
            try:
                both = CutParameter(rule.make, shape, parts, FP64)
            except ValueError:
                continue  # refused: nothing is silent
            if both.plan.stores != next(iter(both.optimizer.plan())).stores:
                continue  # kept in another store where parts are cut so, as the plan says
            before = both.whole.detach().clone()
            try:
                both.train(STEPS)
            except Exception as error:
                fields, layouts = both.plan.fields, both.plan.layouts
                if any(field.per > 1 and not layouts[key].dims for key, field in fields.items()):
                    raise BrokenLawError(f"{one_line(error)}: {CUT_BLOCKS}") from error
                raise
            param, state = both.joined()
            expect_close(param - before, both.whole.detach() - before, "the change of the weight", ROUNDING)
            for key, value in both.whole_state().items():
                if value.is_floating_point() and value.dtype.itemsize > 1:
                    expect_close(state[key], value, key, ROUNDING)
                else:
                    expect_same(state[key], value, key)


def slices_are_whole(rule: Maker) -> None:
    """Check that stepping slice by slice, as for parameters larger than a processor's cache, gives the same result."""
    shapes = {name: shape for name, shape in rule.shapes.items() if name in LARGE}
    if not rule.problem((5000,)):
        shapes["long"] = (5000,)
    expect(bool(shapes), "no large parameter can be stepped at all")
    before, whole = rule.built(shapes)[0], rule.train(shapes)
    with mock.patch.object(chunking, "CPU_CHUNK", 1 << 11):
        sliced = rule.train(shapes)
    for name, param in whole[0].items():
        with at(param.shape, FP32, "slices of 512 or 1024 elements"):
            start = before[name].detach()
            found, wanted = sliced[0][name].detach() - start, param.detach() - start
            expect_close(found, wanted, "the change of the weight", OF_A_STEP)
            for key, value in state_tensors(param, whole[1]).items():
                other = state_tensors(sliced[0][name], sliced[1])[key]
                expect_close(other.float(), value.float(), key, ROUNDING)


def refuses_bad_gradients(rule: Maker) -> None:
    """Check that a gradient that is not finite raises, and leaves weight and state as they were."""
    for shape in rule.shapes.values():
        if not shape or 0 in shape:
            continue
        params, optimizer = rule.train({"p": shape})
        param = params["p"]
        before = {"the weight": param.detach().clone()}
        before |= {key: value.clone() for key, value in state_tensors(param, optimizer).items()}
        param.grad = gradient_of(shape, 1)
        param.grad.view(-1)[-1] = torch.inf
        with at(shape, FP32, "a gradient with one infinite element"):
            try:
                optimizer.step()
            except NonFiniteGradientError:
                pass
            else:
                raise BrokenLawError("no NonFiniteGradientError is raised")
            after = {"the weight": param.detach(), **state_tensors(param, optimizer)}
            for key, value in before.items():
                expect_same(after[key], value, f"{key} after a refused step")


def converts_both_ways(rule: Maker) -> None:
    """Check that statistics of a saved file become fp32, and go back into an optimizer that keeps them as before."""
    params, optimizer = rule.train(rule.shapes)
    with _scratch_folder() as folder:
        save(optimizer, folder / "a.safetensors")
        checkpoint = open_checkpoint(folder / "a.safetensors")
        if not any(param.slots for param in checkpoint.document.parameters):
            return
        conversion = plan_stores(checkpoint, "fp32", {})
        conversion.check()
        write_native(conversion, folder / "b.safetensors")
        again, other = rule.built(rule.shapes)
        load(other, folder / "b.safetensors", allow_lossy=True)
    for name, param in params.items():
        with at(param.shape, FP32):
            mine, theirs = state_tensors(param, optimizer), state_tensors(again[name], other)
            for key, value in mine.items():
                if value.is_floating_point() and value.dtype.itemsize > 1:
                    expect_close(theirs[key], value, f"{key} after fp32 and back", FEW_BITS)


@contextmanager
def _scratch_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="optstate-testing-") as name:
        yield Path(name)


RULE_LAWS: tuple[Law[Maker], ...] = (
    Law("any shape", "models have scalars, convolutions, experts and empty tensors", any_shape),
    Law("declared sizes", "plan, file header and estimate would promise other bytes than a run takes", declared_sizes),
    Law("fused is stepped", "switching on the fused backward pass would train another model", fused_is_stepped),
    Law("resume", "a run that is interrupted would end elsewhere than one that is not", resumes),
    Law("no value is read", "on an accelerator every step would wait, and no estimate could be made", reads_no_value),
    Law("parts are whole", "training on several devices would differ from training on one", parts_are_whole),
    Law("slices are whole", "large parameters would be updated by another rule than small ones", slices_are_whole),
    Law("bad gradients", "one overflow in a batch would spoil the state for good", refuses_bad_gradients),
    Law("conversion", "a checkpoint could not be taken to another store and back", converts_both_ways),
)
