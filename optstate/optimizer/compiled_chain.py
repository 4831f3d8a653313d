"""Steps of chains that no whole step knows, compiled by PyTorch's inductor on request."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from optstate import kernels
from optstate.kernels import noise_key, word_key
from optstate.optimizer.plan import TRANSFORMS, ParamPlan
from optstate.optimizer.recorded_chain import (
    MOST_KEYS,
    ChainFunction,
    Numbers,
    RecordedChain,
    Settings,
    differences,
    record_chain,
)
from optstate.optimizer.whole_steps import Found
from optstate.optimizer.whole_steps.operands import as_number
from optstate.spec import is_fake
from optstate.updates import Context

__all__ = ["ChainCompiler", "CompiledChain", "require_compiler"]

MOST_ELEMENTS = 1 << 32
"""Elements of a parameter whose random bits are a hash of 31 bits of the index of a pair."""

MOST_GRAPHS = 16
"""Graphs for one kind of parameter and one class of shapes; a chain that needs more is another one at every step."""

REMEMBERED = 64


def require_compiler() -> None:
    """Check that there is what inductor needs to compile for a CPU.

    Raises:
        RuntimeError: if there is no C++ compiler.
    """
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise RuntimeError(
            "optimizer.compile() needs a C++ compiler, and none was found: install one such as g++, or name it in the "
            "environment variable CXX; without compile() the same steps run on PyTorch's operations"
        ) from None


@dataclass
class _Compiled:
    """A graph of a step, the step that it was recorded of, and what runs it."""

    numbers: Numbers
    recorded: RecordedChain
    call: Callable[..., Any]
    random: tuple[tuple[str, int], ...]
    """What is rounded at random: the end of its name, after the parameter's, and the seed."""

    def keys(self, name: str, step: int) -> Tensor:
        """Return the keys of the random bits of one parameter in one step."""
        keys = [word_key(noise_key(name + end, step, seed)) for end, seed in self.random]
        return torch.tensor(keys + [0] * (MOST_KEYS - len(keys)), dtype=torch.int32)


@dataclass
class _ShapeClass:
    """Shapes that share graphs: tensors without storage that stand for them, and the graphs, by what a step does."""

    function: ChainFunction
    stand_ins: tuple[Tensor, ...]
    script: list[Any] = field(default_factory=list)
    compiled: list[_Compiled] = field(default_factory=list)
    known: dict[Settings, tuple[_Compiled, Tensor]] = field(default_factory=dict)

    def numbers(self, settings: Settings) -> Numbers:
        """Return the numbers of a step."""
        return self.function.numbers(settings, self.stand_ins, self.script)


class ChainCompiler:
    """Compiles the steps of one optimizer's chains when they are first made, and keeps what was compiled.

    One graph serves all shapes of as many dimensions; where each element goes its own way, all shapes. PyTorch keeps
    what was compiled on disk, so that the next run takes it from there.

    count: how many graphs were compiled.
    """

    def __init__(self) -> None:
        self.count = 0
        self._classes: dict[Hashable, list[_ShapeClass]] = {}
        self._by_shape: dict[Hashable, _ShapeClass] = {}
        self._kept: list[Any] = []

    def find(self, function: ChainFunction, inputs: Sequence[Tensor], settings: Settings) -> tuple[_Compiled, Tensor]:
        """Return what steps inputs like these, and the numbers of the step.

        Raises:
            ValueError: if the chain cannot be compiled.
        """
        of_class = self._class_of(function, inputs, settings)
        found = of_class.known.get(settings)
        if found is None:
            if len(of_class.known) >= REMEMBERED:
                of_class.known.clear()
            numbers = of_class.numbers(settings)
            compiled = self._compiled(of_class, inputs, settings, numbers)
            values = [numbers.values[i] for i in compiled.recorded.lifted] or [0.0]
            found = of_class.known[settings] = compiled, torch.tensor(values, dtype=torch.float64)
        return found

    def _class_of(self, function: ChainFunction, inputs: Sequence[Tensor], settings: Settings) -> _ShapeClass:
        """Return the class of shapes that inputs belong to."""
        plan = function.plan
        slots = tuple((name, slot.store) for name, slot in plan.slots.items())
        layout = tuple((tensor.dtype, *(min(size, 2) for size in tensor.shape)) for tensor in inputs)
        spec, device = plan.spec, inputs[0].device
        kind = (
            id(plan.chain),
            spec.dtype,
            spec.role,
            spec.head_size,
            slots,
            plan.weights,
            layout,
            device,
            function.deferred,
        )
        shape = kind, *(tuple(tensor.shape) for tensor in inputs)
        found = self._by_shape.get(shape)
        if found is None:
            self._kept.append(plan.chain)  # whose id is part of the kind
            classes = self._classes.setdefault(kind, [])
            found = next((each for each in classes if each.compiled[0].recorded.fits(inputs)), None)
            if found is None:
                found = _ShapeClass(function, tuple(tensor.to("meta") for tensor in inputs))
                function.make_tables(inputs)
                function.numbers(settings, found.stand_ins, [])  # what is made once is no part of a step
                self._compiled(found, inputs, settings, found.numbers(settings))
                classes.append(found)
            self._by_shape[shape] = found
        return found

    def _compiled(
        self, of_class: _ShapeClass, inputs: Sequence[Tensor], settings: Settings, numbers: Numbers
    ) -> _Compiled:
        """Return the graph of a step with these numbers, compiled now if there is none."""
        changing: set[int] = set()
        for each in of_class.compiled:
            if each.numbers.operations == numbers.operations:
                changed = differences(each.numbers.values, numbers.values) - set(each.recorded.lifted)
                if not changed:
                    return each
                changing |= changed | set(each.recorded.lifted)
                of_class.compiled.remove(each)
                break
        if len(of_class.compiled) >= MOST_GRAPHS:
            raise ValueError(f"its operations are others in each of {MOST_GRAPHS} steps")
        function = of_class.function
        for others in settings.others():
            found = of_class.numbers(others)
            if found.operations == numbers.operations:
                changing |= differences(numbers.values, found.values)
        asked = list(function.asked)
        began = time.monotonic()
        self._say(f"optstate compiles the step of {function.plan.chain} ({_words(inputs)})")
        recorded = record_chain(function, settings, inputs, numbers, changing)
        if asked != function.asked or len(asked) > MOST_KEYS:
            raise ValueError("the tensors that it rounds at random are not the same in every step")
        call = _by_inductor(recorded, inputs)
        self.count += 1
        self._say(f", {time.monotonic() - began:.1f} s\n")
        length = len(function.plan.spec.name)
        random = tuple((name[length:], seed) for name, seed in asked)
        of_class.compiled.append(_Compiled(numbers, recorded, call, random))
        return of_class.compiled[-1]

    @staticmethod
    def _say(words: str) -> None:
        print(words, end="", file=sys.stderr, flush=True)


def _words(inputs: Sequence[Tensor]) -> str:
    dtype = str(inputs[0].dtype).removeprefix("torch.")
    return f"{dtype}, {inputs[0].ndim}-d"


def _by_inductor(recorded: RecordedChain, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """Compile a graph for every shape that it stands for."""
    from torch._inductor import standalone_compile

    numbers = torch.zeros(max(len(recorded.lifted), 1), dtype=torch.float64)
    return standalone_compile(recorded.graph, [*inputs, numbers], dynamic_shapes="from_graph")


@dataclass(frozen=True)
class CompiledChain:
    """The transforms of a chain in one graph, which inductor turns into a few loops.

    why: no whole step makes the steps, in words.
    """

    plan: ParamPlan
    compiler: ChainCompiler
    why: str

    checks_gradient: ClassVar[bool] = False

    @staticmethod
    def of(plan: ParamPlan, compiler: ChainCompiler, why: str) -> Found:
        """Return the step of a plan; none for a parameter that is split among devices."""
        if plan.spec.region is not None or plan.spec.numel >= MOST_ELEMENTS:
            what = "split among devices" if plan.spec.region is not None else "too large"
            return Found(None, f"{why}, and none is compiled for a parameter that is {what}")
        return Found(CompiledChain(plan, compiler, why))

    @property
    def words(self) -> str:
        """What the plan says of the step."""
        return f"{TRANSFORMS}, compiled by inductor ({self.why})"

    @property
    def passes(self) -> int:
        """Passes over the parameter at the least: the check of the gradient, and one loop."""
        return 2

    @property
    def moved_bytes(self) -> int:
        """Bytes read and written at the least: the gradient twice, the parameter and its state once each way."""
        return 4 * self.plan.spec.local_numel * self.plan.spec.dtype.itemsize + 2 * self.plan.nbytes

    def run(self, state: Mapping[str, Any], ctx: Context) -> bool:
        """Step the parameter; see `WholeStep.run`.

        Raises:
            ValueError: if the chain cannot be compiled. Nothing is written then.
        """
        plan, guard = self.plan, ctx.guard
        lr, grad_scale = as_number(ctx.group["lr"]), as_number(ctx.grad_scale)
        tensors = [state[key] for key in plan.fields]
        if lr is None or grad_scale is None or not _are_plain(ctx.param, ctx.grad, *tensors):
            return False
        if not guard.checked:
            guard.check(kernels.all_finite(ctx.grad, plan.largest_gradient(ctx.group)))
        names = dict.fromkeys(["lr", *plan.chain.hyper])
        group = tuple((key, _frozen(lr if key == "lr" else ctx.group[key])) for key in names)
        settings = Settings(group, ctx.step, grad_scale)
        function = ChainFunction(plan, tuple(plan.fields), guard.finite is not None)
        finite = torch.tensor(True) if guard.finite is None else guard.finite
        jobs, keys = [], torch.zeros(MOST_KEYS, dtype=torch.int32)
        for piece in self._slices(ctx, tensors):
            param, grad, *fields = piece.tensors
            inputs = [param, grad, keys, torch.tensor(piece.first_word, dtype=torch.int32), finite, *fields]
            try:
                compiled, numbers = self.compiler.find(function, inputs, settings)
            except ValueError as error:
                raise ValueError(f"the step of {plan.spec.name!r} cannot be compiled: {error}") from error
            inputs[2] = compiled.keys(plan.spec.name, ctx.step)
            jobs.append((piece, compiled.call, [*inputs, numbers]))
        guard.begin_writing()
        for piece, call, arguments in jobs:
            call(*arguments)
            piece.write_back()
        return True

    def _slices(self, ctx: Context, tensors: Sequence[Tensor]) -> Iterator[_Slice]:
        """Yield what is stepped by one call: the whole parameter; or, where elements go their own ways, slices of it.

        Slices are as long as a multiple of two blocks, and the rest is copied into one as long: so one graph is enough.
        """
        plan, param, grad = self.plan, ctx.param.detach(), ctx.grad.detach()
        if not plan.knows_no_shape:
            yield _Slice(0, [param, grad, *tensors])
            return
        flat = [(param.view(-1), 1), (grad.view(-1), 1)]
        flat += [(tensor.view(-1), spec.per) for tensor, spec in zip(tensors, plan.fields.values(), strict=True)]
        count, align = param.numel(), max(2 * plan.alignment, 16)
        size, rest = max(plan.slice_elements(param.device) // align, 1) * align, count % align
        for start in range(0, count - rest, size):
            stop = min(start + size, count - rest)
            yield _Slice(start // 2, [tensor[start // per : -(-stop // per)] for tensor, per in flat])
        if rest:
            parts = [tensor[(count - rest) // per :] for tensor, per in flat]
            padded = [tensor.new_zeros(align // per) for tensor, per in flat]
            for part, room in zip(parts, padded, strict=True):
                room[: part.numel()] = part
            yield _Slice((count - rest) // 2, padded, parts)


@dataclass(frozen=True)
class _Slice:
    """What one call steps: the parameter, the gradient and the state's tensors.

    first_word: half the flat index of the first element. written_back: where copies belong, of tensors that are copies.
    """

    first_word: int
    tensors: list[Tensor]
    written_back: Sequence[Tensor] = ()

    def write_back(self) -> None:
        """Copy what was stepped to where it belongs, but the gradient."""
        for i, part in enumerate(self.written_back):
            if i != 1:
                part.copy_(self.tensors[i][: part.numel()])


def _are_plain(*tensors: Tensor) -> bool:
    """Return whether compiled loops may be given these tensors: real, without gaps, on one device."""
    return all(
        type(tensor) in (Tensor, nn.Parameter)
        and not is_fake(tensor)
        and tensor.is_contiguous()
        and not tensor.is_neg()
        and tensor.device == tensors[0].device
        for tensor in tensors
    )


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
