"""Recordings of chains: the graph of operations that a step makes, for any shape, with its numbers as an input.

A chain is ordinary Python: it reads hyper-parameters and the count of steps, and calculates with both. A recording runs
it once on tensors without values. What Python calculated stands in the graph as numbers; those that change from step to
step are made elements of one more input. Before each step the chain runs again on tensors without storage, which takes
milliseconds for all parameters of a kind and tells the numbers of that step, and whether its operations are still the
same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from optstate.kernels import Recording, recorded
from optstate.optimizer.chain_step import context, run_chain
from optstate.optimizer.plan import ParamPlan
from optstate.stores import Guard, run_alone

__all__ = ["MOST_KEYS", "ChainFunction", "Numbers", "RecordedChain", "Settings", "differences", "record_chain"]

MOST_KEYS = 8
"""Tensors of one parameter that are rounded at random: the weight, and each statistic."""

aten = torch.ops.aten


@dataclass(frozen=True)
class Settings:
    """What a step takes from Python: the param group's numbers, the count of steps, and the clip's coefficient."""

    group: tuple[tuple[str, Any], ...]
    step: int
    grad_scale: float

    def others(self) -> tuple[Settings, Settings]:
        """Return settings that differ in every number; those of the next step, and of the same one."""
        group = tuple((key, _scaled(value)) for key, value in self.group)
        scale = self.grad_scale if self.grad_scale == 1.0 else _scaled(self.grad_scale)
        return Settings(group, self.step + 1, scale), Settings(group, self.step, scale)


def differences(some: Sequence[float], others: Sequence[float]) -> set[int]:
    """Return the places in which two rows of numbers differ, NaN being equal to NaN; all where one is longer."""
    if len(some) != len(others):
        return set(range(max(len(some), len(others))))
    return {i for i, (a, b) in enumerate(zip(some, others, strict=True)) if a != b and not (a != a and b != b)}


@dataclass(frozen=True)
class Numbers:
    """The numbers among the arguments of a step's operations, in order; and the operations, with all else they get."""

    values: tuple[float, ...]
    operations: tuple[Any, ...]


class _KnownFinite(Guard):
    """The guard of a gradient that was looked at before; a flag that only a device knows is an input of the graph."""

    __slots__ = ()

    def check(self, finite: Tensor) -> None:
        """Do nothing: the sums of a chain would tell once more what is known."""


@dataclass(frozen=True)
class ChainFunction:
    """The step of one kind of parameter as a function of tensors, which it writes.

    deferred: whether only a device knows if the gradient is finite.
    """

    plan: ParamPlan
    keys: tuple[str, ...]
    deferred: bool
    asked: list[tuple[str, int]] = field(default_factory=list)
    """Name and seed of each tensor that was rounded at random when the function last ran."""

    def bind(self, settings: Settings) -> Callable[..., tuple[()]]:
        """Return the function of a parameter, its gradient, keys, the first word, a flag, and the state's tensors."""
        _ = self.plan.guards, self.plan.weight_keys  # asked once, of the real shape
        group = dict(settings.group)

        def run(param: Tensor, grad: Tensor, keys: Tensor, word: Tensor, finite: Tensor, *fields: Tensor) -> tuple[()]:
            spec = replace(self.plan.spec, shape=tuple(param.shape), region=None)
            plan: ParamPlan = object.__new__(ParamPlan)
            plan.__dict__.update(self.plan.__dict__, spec=spec, first_sliced=None)
            state = dict(zip(self.keys, fields, strict=True))
            guard = _KnownFinite(spec.name, grad, deferred=self.deferred)
            guard.checked, guard.finite = True, finite if self.deferred else None
            recording = Recording(keys, word)
            with recorded(recording):
                ctx = context(plan, state, param, grad, group, settings.step, guard, settings.grad_scale)
                run_alone(run_chain(plan, state, ctx))
            self.asked[:] = recording.asked
            return ()

        return run

    def make_tables(self, inputs: Sequence[Tensor]) -> None:
        """Read the statistics once, which makes the tables of their codes: a recording takes them as they are."""
        state = dict(zip(self.keys, inputs[-len(self.keys) :] if self.keys else (), strict=True))
        for slot in self.plan.slots.values():
            fields = {field: state[key] for field, key in slot.keys.items()}
            slot.store.factors(fields, inputs[0].shape)

    def numbers(self, settings: Settings, inputs: Sequence[Tensor], script: list[Any]) -> Numbers:
        """Return the numbers of the step with these settings.

        Args:
            settings: of the step.
            inputs: as the function takes them, of the device "meta".
            script: what the operations returned when this was asked with the same inputs before; written.

        Raises:
            ValueError: if the chain asks for values, with why as the end of a sentence.
        """
        try:
            with torch.no_grad(), _Listener(script) as listener:
                self.bind(settings)(*inputs)
        except Exception as error:
            raise ValueError(_asks_for_values(error)) from error
        return Numbers(tuple(listener.values), tuple(listener.operations))


class _Listener(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation and its numbers; returns what it returned before, while operations are those of before.

    A result without storage is nothing but a shape, and takes longer to find than the rest of a step.
    """

    def __init__(self, script: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values: list[float] = []
        self.operations: list[Any] = []
        self._script = script

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.detach.default:  # which PyTorch itself calls now and then
            return func(*args, **kwargs)
        rest: list[Any] = [func]
        self._note(args, rest)
        self._note(kwargs.values(), rest)
        operation, place = tuple(rest), len(self.operations)
        self.operations.append(operation)
        if place < len(self._script) and self._script[place][0] == operation:
            return _anew(self._script[place][1], func, args, kwargs)
        result = func(*args, **kwargs)
        self._script[place:] = [(operation, result)]
        return result

    def _note(self, arguments: Iterable[Any], rest: list[Any]) -> None:
        for leaf in arguments:
            if type(leaf) is float:
                self.values.append(leaf)
            elif isinstance(leaf, list | tuple):
                self._note(leaf, rest)
            elif not isinstance(leaf, Tensor | torch.device):
                rest.append(leaf)


def _anew(result: Any, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Return a result as one of an operation that is called again: what it writes, or a new tensor without storage."""
    if isinstance(result, list | tuple):
        return type(result)([_anew(each, func, args, kwargs) for each in result])
    if not isinstance(result, Tensor):
        return result
    if func._schema.is_mutable:
        return kwargs.get("out", args[0])
    return torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device="meta")


@dataclass
class RecordedChain:
    """The graph of a step: inputs of a `ChainFunction`, then the numbers that change, fp64 `[n]`.

    lifted: places of these among all numbers of the step.
    """

    graph: fx.GraphModule
    lifted: tuple[int, ...]

    def fits(self, inputs: Sequence[Tensor]) -> bool:
        """Return whether the graph is that of inputs of these shapes."""
        env: Any = self.graph.shape_env
        return bool(env.evaluate_guards_for_args(self._stand_ins, inputs, ignore_static=False))

    @property
    def _stand_ins(self) -> list[Any]:
        nodes = [node for node in self.graph.graph.nodes if node.op == "placeholder"]
        return [node.meta["val"] for node in nodes][:-1]


def record_chain(
    function: ChainFunction, settings: Settings, inputs: Sequence[Tensor], numbers: Numbers, changing: Iterable[int]
) -> RecordedChain:
    """Record the graph of a step.

    Args:
        function: the step.
        settings: of the step.
        inputs: tensors as the function takes them, whose shapes stand for others. Nothing is written to them.
        numbers: of the step with these settings.
        changing: places of the numbers that are to be inputs.

    Raises:
        ValueError: if the graph cannot be that of other steps and values, with why as the end of a sentence.
    """
    from torch.fx.experimental import _config
    from torch.fx.experimental.proxy_tensor import make_fx

    try:
        shapes: Any = _config
        with torch.no_grad(), shapes.patch(use_duck_shape=False):
            graph = make_fx(function.bind(settings), tracing_mode="symbolic", _allow_non_fake_inputs=True)(*inputs)
    except Exception as error:
        raise ValueError(_asks_for_values(error)) from error
    lifted = tuple(sorted(changing))
    _lift(graph, numbers, lifted)
    return RecordedChain(graph, lifted)


def _asks_for_values(error: Exception) -> str:
    words = (str(error).strip().splitlines() or [""])[0]
    return f"one of its transforms asks for values while it runs ({type(error).__name__}: {words})"


def _lift(module: fx.GraphModule, numbers: Numbers, lifted: Sequence[int]) -> None:
    """Make numbers of a graph the elements of one more input."""
    graph, place = module.graph, 0
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(inputs[-1]):
        vector = graph.placeholder("numbers")
    mode = inputs[0].meta["val"].fake_mode
    vector.meta["val"] = mode.from_tensor(torch.empty(max(len(lifted), 1), dtype=torch.float64), static_shapes=True)
    for node in [node for node in graph.nodes if node.op == "call_function"]:
        own = [leaf for leaf in tree_leaves((node.args, node.kwargs)) if type(leaf) is float]
        count = len(own)
        if differences(own, numbers.values[place : place + count]):
            raise ValueError("its operations on tensors without values are not those on tensors with values")
        here = [i - place for i in lifted if place <= i < place + count]
        place += count
        if here:
            _lift_of(graph, node, vector, [lifted.index(i + place - count) for i in here], here)
    if place != len(numbers.values):
        raise ValueError("its operations on tensors without values are not those on tensors with values")
    graph.lint()
    module.recompile()


SECOND = {"add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_"}
"""Operations whose second argument may be a number or a tensor, under one name."""

OVERLOADS: Mapping[Any, Any] = {
    aten.lerp.Scalar: aten.lerp.Tensor,
    aten.lerp_.Scalar: aten.lerp_.Tensor,
    aten.clamp.default: aten.clamp.Tensor,
    aten.clamp_.default: aten.clamp_.Tensor,
    aten.clamp_min.default: aten.clamp_min.Tensor,
    aten.clamp_min_.default: aten.clamp_min_.Tensor,
    aten.pow.Tensor_Scalar: aten.pow.Tensor_Tensor,
    aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Scalar: aten.div.Tensor,
}
"""Operations that take a tensor in the place of a number under another name."""

PRODUCTS = {aten.addcmul: aten.mul.Tensor, aten.addcmul_: aten.mul.Tensor}
QUOTIENTS = {aten.addcdiv: aten.div.Tensor, aten.addcdiv_: aten.div.Tensor}


def _lift_of(graph: fx.Graph, node: fx.Node, vector: fx.Node, indices: Sequence[int], places: Sequence[int]) -> None:
    """Replace the numbers at some places of a node's arguments by elements of a vector."""
    packet, name = node.target.overloadpacket, node.target._opname  # type: ignore[union-attr]
    dtype = node.meta["val"].dtype
    dtype = dtype if node.target in OVERLOADS or dtype == torch.float64 else torch.float32
    with graph.inserting_before(node):
        numbers = [_element(graph, vector, index, dtype) for index in indices]
        args, kwargs, seen = list(node.args), dict(node.kwargs), -1
        for i, arg in enumerate(args):
            if type(arg) is float:
                seen += 1
                if seen in places:
                    args[i] = numbers[places.index(seen)]
        for key, arg in list(kwargs.items()):
            if type(arg) is not float:
                continue
            seen += 1
            if seen not in places:
                continue
            number = numbers[places.index(seen)]
            if key == "alpha" and name in SECOND:
                del kwargs[key]
                args[1] = graph.call_function(aten.mul.Tensor, (args[1], number))
            elif key == "value" and packet in {**PRODUCTS, **QUOTIENTS}:
                del kwargs[key]
                inner = {**PRODUCTS, **QUOTIENTS}[packet]
                term = graph.call_function(inner, (args[1], args[2]))
                args = [args[0], graph.call_function(aten.mul.Tensor, (term, number))]
                node.target = aten.add_.Tensor if name.endswith("_") else aten.add.Tensor
            else:
                raise ValueError(f"a number that changes from step to step is an argument of {node.target}")
    if name not in SECOND and node.target in OVERLOADS:
        if any(type(arg) is float for arg in args[1:]):  # both ends of a clamp are numbers, or both are tensors
            with graph.inserting_before(node):
                args = [_constant(graph, arg, vector, dtype) if type(arg) is float else arg for arg in args]
        node.target = OVERLOADS[node.target]
    elif name not in SECOND and node.target not in (aten.add.Tensor, aten.add_.Tensor):
        raise ValueError(f"a number that changes from step to step is an argument of {node.target}")
    node.args, node.kwargs = tuple(args), kwargs


def _element(graph: fx.Graph, vector: fx.Node, index: int, dtype: torch.dtype) -> fx.Node:
    element = graph.call_function(aten.select.int, (vector, 0, index))
    return graph.call_function(aten._to_copy.default, (element,), {"dtype": dtype})


def _constant(graph: fx.Graph, value: Any, vector: fx.Node, dtype: torch.dtype) -> fx.Node:
    zero = graph.call_function(aten.select.int, (vector, 0, 0))
    return graph.call_function(aten.full_like.default, (zero, value), {"dtype": dtype})


def _scaled(value: Any) -> Any:
    """Return a hyper-parameter that is a little smaller."""
    if isinstance(value, float):
        return value * (1 - 2.0**-10)
    return tuple(map(_scaled, value)) if isinstance(value, tuple) else value
