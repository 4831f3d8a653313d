"""A step on paper, the context it is made in, and what makes it: `Update`, `Context`, `Transform`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import GeneratorType
from typing import Any, ClassVar, cast

from torch import Tensor

from optstate import kernels
from optstate.kernels import Piece, Product, Scalar, WeightCodec
from optstate.spec import ParamSpec
from optstate.stores import Guard, Requests, Slot, Statistic, Store
from optstate.updates.hyper import Hyper, Rule

__all__ = ["Context", "State", "Transform", "Update", "run"]

State = Mapping[str, Statistic]


@dataclass(slots=True)
class Update(Product):
    """The step still on paper: `scale * clamp(dense, bound) * factors[0] * ... + decay * param`.

    The parameter becomes `param - lr * update`. `decay` is kept apart so that it can be scaled along with the
    rest and still multiply the parameter, as the official AdaLomo code does.
    """

    decay: Scalar = 0.0

    def scaled(self, scale: Scalar) -> Update:
        """The whole update, decay included, times one number."""
        decay = self.decay
        if not isinstance(decay, float) or decay != 0.0:
            decay = _times(decay, scale)
        return Update(self.dense, self.factors, _times(self.scale, scale), self.bound, self.finite, decay)

    def rescaled(self, scale: Scalar) -> Update:
        """The update without its decay times one number."""
        return Update(self.dense, self.factors, _times(self.scale, scale), self.bound, self.finite, self.decay)

    def times(self, *factors: Tensor) -> Update:
        """The update without its decay times row, column or full factors."""
        return Update(self.dense, (*self.factors, *factors), self.scale, self.bound, self.finite, self.decay)

    @property
    def has_decay(self) -> bool:
        """Whether there is a decay term, possibly of size zero if only the device knows."""
        return isinstance(self.decay, Tensor) or self.decay != 0.0

    def is_gradient(self, ctx: Context) -> bool:
        """Whether this is still the gradient as it came, times nothing but the global clip's coefficient."""
        return self.dense is ctx.grad and not self.factors and self.scale is ctx.grad_scale and not self.has_decay

    def piece(self, piece: Piece) -> Update:
        """The same update of a piece of the parameter."""
        of = Product.piece(self, piece)
        return Update(of.dense, of.factors, of.scale, of.bound, of.finite, self.decay)

    def whole(self, ctx: Context) -> Update:
        """The same update with the decay term added into the dense part, for transforms that are not linear in it.

        Costs one tensor of the parameter's (or slice's) size in fp32, and nothing if there is no decay.
        """
        if isinstance(self.decay, float) and self.decay == 0.0:
            return self
        dense = kernels.evaluate(self)
        kernels.add_weight(dense, ctx.param.detach(), self.decay, ctx.codec, ctx.start)
        return Update(dense, finite=self.finite)


@dataclass
class Context:
    """What a transform may know besides the update and its own state.

    param, grad: local shard (or slice) of the parameter before this step and of its gradient; not to be written.
    group: the param group's hyper-parameters.
    step: 1-based count of this parameter's updates.
    grad_scale: coefficient of a global norm clip, already in the first update's scale.
    codec: how the parameter's value is read and written, None for plainly; start: flat index of the slice at hand.
    is_whole: whether `param` is all of the parameter, neither a shard nor a slice, so that local sums are the totals.
    """

    spec: ParamSpec
    param: Tensor
    grad: Tensor
    group: Mapping[str, Any]
    step: int
    guard: Guard
    grad_scale: Scalar = 1.0
    codec: WeightCodec | None = None
    start: int = 0
    is_whole: bool = False
    param_squares: Tensor | None = field(default=None, repr=False)

    def read(self, number: float | Hyper | None) -> Any:
        """The current value of a transform's hyper-parameter field."""
        if not isinstance(number, Hyper):
            return number
        entry = self.group[number.name]
        return entry if number.index is None else entry[number.index]

    def tensor(self, number: Scalar) -> Tensor:
        """`number` as a 0-d tensor in the statistics' dtype on the parameter's device."""
        if isinstance(number, Tensor):
            return number
        return self.param.new_tensor(number, dtype=self.spec.accumulator)

    def check_finite(self, finite: Tensor) -> Requests[None]:
        """Tell the guard whether this part of the gradient is finite, a 0-d bool; all devices must agree on it."""
        if self.spec.region is not None:
            bad = yield finite.logical_not().to(self.spec.accumulator)
            finite = bad == 0
        self.guard.check(finite)

    def mean_square(self, update: Product) -> Requests[Tensor]:
        """Mean square of an update over the whole parameter; drive with `yield from`."""
        total = kernels.sum_of_squares(update)
        if not self.is_whole:
            total = yield total
        return total / self.spec.numel

    def param_mean_square(self) -> Requests[Tensor]:
        """Mean square of the parameter before this step; requested early if the chain declares `reads_param`."""
        if self.param_squares is None:
            self.param_squares = kernels.weight_sum_of_squares(self.param.detach(), self.codec)
            if not self.is_whole:
                self.param_squares = yield self.param_squares
        return self.param_squares / self.spec.numel


class Transform:
    """One thing that happens to a gradient on its way to becoming a step. Subclasses are frozen dataclasses.

    Called with an update, it returns the next one. It touches nothing but its own slots. Where it needs a sum
    over the whole parameter it is a generator and yields the local part (see `optstate.stores.Requests`).
    """

    elementwise: ClassVar[bool] = True
    """Each element of the result depends on that element alone, so the chain may run slice by slice."""

    reads_param: ClassVar[bool] = False
    """Needs the parameter's mean square; it is then requested together with the chain's first sum."""

    absorbs_decay: ClassVar[bool] = False
    """Not linear in the update: a weight decay before it is added to the dense part first (`Update.whole`)."""

    applies_lr: ClassVar[bool] = False
    """Multiplies by the learning rate itself, so the optimizer does not do so at the end."""

    prepares: ClassVar[bool] = False
    """Implements `prepare`: apart from statistics in stores of exact sums, which are moved there, it is elementwise."""

    rules: ClassVar[Mapping[str, Rule | tuple[Rule, ...]]] = {}
    """Fields that are hyper-parameters, or tuples of them."""

    def __post_init__(self) -> None:
        for name, rule in self.rules.items():
            value = getattr(self, name)
            bound = rule.bind(value) if isinstance(rule, Rule) else bind_all(name, rule, value)
            object.__setattr__(self, name, bound)
        self.check_slots({})

    @property
    def hypers(self) -> tuple[Hyper, ...]:
        """Every hyper-parameter the transform reads."""
        found: list[Hyper] = []
        for f in fields(cast(Any, self)):
            value = getattr(self, f.name)
            for item in value if isinstance(value, tuple) else (value,):
                found += [item] if isinstance(item, Hyper) else getattr(item, "hypers", ())
        return tuple(found)

    @property
    def hyper(self) -> dict[str, Any]:
        """Defaults the transform adds to every param group."""
        return collect(self.hypers)

    def slots(self, spec: ParamSpec) -> dict[str, Slot]:
        """The statistics kept for this parameter."""
        return self.declared_slots({})

    def declared_slots(self, group: Mapping[str, Any]) -> dict[str, Slot]:
        """The statistics kept, with a group's hyper-parameters where it has them, else with the defaults."""
        return {}

    def check_slots(self, group: Mapping[str, Any]) -> None:
        """Raise TypeError or ValueError if a store cannot hold what it is given with these hyper-parameters."""
        for name, slot in self.declared_slots(group).items():
            if not isinstance(slot.store, Store):
                raise TypeError(f"the store of {name!r} is {slot.store!r}: give one of optstate.stores, such as Full()")
            slot.store.check(slot.signed, slot.smallest_weight)

    def guards(self, spec: ParamSpec) -> bool:
        """Whether the transform itself notices a gradient that is not finite, before it writes anything."""
        return False

    def temporaries(self, spec: ParamSpec, head: bool) -> int:
        """How many fp32 tensors of the parameter's size it needs where the chain cannot run slice by slice.

        head: whether it gets the gradient itself, at most clipped by value.
        """
        return 0

    def prepare(self, update: Update, state: State, ctx: Context) -> Requests[None]:
        """Move the statistics in stores of exact sums, the only ones in `state`. The transform is then called slice by
        slice, with `MovedStatistic`s in their place."""
        yield from ()

    def __call__(self, update: Update, state: State, ctx: Context) -> Update | Requests[Update]:
        raise NotImplementedError


def bind_all(name: str, rules: tuple[Rule, ...], values: Any) -> tuple[Hyper | None, ...]:
    """Bind a tuple of numbers, such as Adam's betas."""
    if not isinstance(values, tuple | list) or len(values) != len(rules):
        raise ValueError(f"{name}={values!r} must be {len(rules)} numbers")
    return tuple(rule.bind(value) for rule, value in zip(rules, values, strict=True))


def collect(hypers: tuple[Hyper, ...]) -> dict[str, Any]:
    """Group defaults of several hyper-parameters; those with an index share a tuple.

    Raises:
        ValueError: if two of them give one key different defaults.
    """
    entries: dict[str, dict[int | None, Any]] = {}
    for h in hypers:
        known = entries.setdefault(h.name, {})
        if known.setdefault(h.index, h.value) != h.value:
            raise ValueError(
                f"two steps of the recipe give {h.name!r} different defaults, {known[h.index]!r} and {h.value!r}; "
                f'name one of them: updates.hyper("my_{h.name}", {h.value!r})'
            )
    defaults: dict[str, Any] = {}
    for name, known in entries.items():
        places = [index for index in known if index is not None]
        if None in known and places:
            raise ValueError(f"{name!r} is a number for one step of the recipe and a tuple for another: rename one")
        defaults[name] = tuple(known.get(i, 0.0) for i in range(max(places) + 1)) if places else known[None]
    return defaults


def run(transform: Transform, update: Update, state: State, ctx: Context) -> Requests[Update]:
    """Call a transform that may or may not be a generator; drive with `yield from`."""
    result = transform(update, state, ctx)
    if isinstance(result, GeneratorType):
        result = yield from result
    return cast(Update, result)


def _times(a: Scalar, b: Scalar) -> Scalar:
    if not isinstance(b, Tensor):
        b = float(b)
    if isinstance(a, float):
        if a == 1.0:
            return b
        if a == 0.0:  # a decay that is switched off stays a number, so that kernels can skip it
            return a
    return a * b
