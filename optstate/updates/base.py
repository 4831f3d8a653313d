"""The base class of transforms, the lazy update that they pass on, and the context that they may read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from types import GeneratorType
from typing import Any, ClassVar, cast

from torch import Tensor

from optstate import kernels
from optstate.kernels import Piece, Product, Scalar, WeightCodec
from optstate.spec import ANY_MATRIX, ParamSpec
from optstate.stores import Guard, Requests, Slot, Statistic, Store
from optstate.updates.hyper import Hyper, Rule

__all__ = ["Context", "State", "Transform", "Update", "run_transform"]

State = Mapping[str, Statistic]
"""The statistics of one parameter by slot name, as a transform gets them."""


@dataclass(slots=True)
class Update(Product):
    """The lazy update of one parameter: `scale * clamp(dense, -bound, bound) * factors[0] * ... + decay * param`.

    The parameter becomes `param - lr * update`. The decay is kept apart so that transforms can scale it along with the
    rest while it still multiplies the parameter, as the official AdaLomo code does. Other attributes: see `Product`.

    Attributes:
        decay: coefficient of the parameter; 0.0 for none.
    """

    decay: Scalar = 0.0

    def scaled(self, scale: Scalar) -> Update:
        """Return the whole update, decay included, times one number."""
        decay = self.decay
        if not isinstance(decay, float) or decay != 0.0:
            decay = _times(decay, scale)
        return Update(self.dense, self.factors, _times(self.scale, scale), self.bound, self.finite, decay)

    def rescaled(self, scale: Scalar) -> Update:
        """Return the update with everything but its decay times one number."""
        return Update(self.dense, self.factors, _times(self.scale, scale), self.bound, self.finite, self.decay)

    def times(self, *factors: Tensor) -> Update:
        """Return the update with everything but its decay times row factors, column factors or full tensors."""
        return Update(self.dense, (*self.factors, *factors), self.scale, self.bound, self.finite, self.decay)

    @property
    def has_decay(self) -> bool:
        """Whether the update has a decay term; a 0-d tensor counts even if it holds zero."""
        return isinstance(self.decay, Tensor) or self.decay != 0.0

    def is_gradient(self, ctx: Context) -> bool:
        """Return whether the update is still the gradient itself, times nothing but the global clip's coefficient."""
        return self.dense is ctx.grad and not self.factors and self.scale is ctx.grad_scale and not self.has_decay

    def piece(self, piece: Piece) -> Update:
        """Return the update restricted to one piece of the parameter."""
        of = Product.piece(self, piece)
        return Update(of.dense, of.factors, of.scale, of.bound, of.finite, self.decay)

    def values(self, ctx: Context) -> Tensor:
        """Return the update, its decay included, as one fp32 tensor that is not to be written.

        Every element is a finite number, also where the gradient is not and the host does not know it yet.
        """
        whole = self.whole(ctx)
        return kernels.values(whole if ctx.guard.finite is None else replace(whole, finite=ctx.guard.finite))

    def whole(self, ctx: Context) -> Update:
        """Return the update with its decay term added into the dense part, for transforms that are not linear.

        Costs one fp32 tensor of the parameter's (or slice's) size, and nothing if there is no decay.
        """
        if isinstance(self.decay, float) and self.decay == 0.0:
            return self
        dense = kernels.multiply_out(self)
        kernels.add_weight(dense, ctx.param.detach(), self.decay, ctx.codec, ctx.start)
        return Update(dense, finite=self.finite)


@dataclass
class Context:
    """What a transform may know of the step besides the update and its own statistics.

    Attributes:
        spec: the parameter's specification.
        param: local shard (or slice) of the parameter before this step; not to be written.
        grad: local shard (or slice) of the gradient; not to be written.
        group: the param group's hyper-parameters.
        step: count of this parameter's updates, 1 at the first.
        guard: decides what happens where the gradient is not finite.
        grad_scale: coefficient of a global norm clip, already in the first update's scale.
        codec: reads and writes the parameter's value; None if the value is what the parameter holds.
        start: flat index of the slice's first element.
        is_whole: whether `param` is all of the parameter, neither a shard nor a slice, so that its sums are totals.
        param_squares: sum of squares of the whole parameter before this step, once known; 0-d.
        clock: `step` as the device counts it, int64, 0-d, for steps that a CUDA graph replays; None if the host counts.
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
    clock: Tensor | None = field(default=None, repr=False)

    def read(self, number: float | Hyper | None) -> Any:
        """Return the current value of a transform's hyper-parameter field."""
        if not isinstance(number, Hyper):
            return number
        entry = self.group[number.name]
        return entry if number.index is None else entry[number.index]

    def tensor(self, number: Scalar) -> Tensor:
        """Return a number as a 0-d tensor in the statistics' dtype on the parameter's device."""
        if isinstance(number, Tensor):
            return number
        return self.param.new_tensor(number, dtype=self.spec.accumulator)

    def check_finite(self, finite: Tensor) -> Requests[None]:
        """Tell the guard whether the gradient is finite on all devices; drive with `yield from`.

        Args:
            finite: 0-d bool, whether the part on this device is finite.
        """
        if self.spec.region is not None:
            bad = yield finite.logical_not().to(self.spec.accumulator)
            finite = bad == 0
        self.guard.check(finite)

    def mean_square(self, update: Product) -> Requests[Tensor]:
        """Return the mean square of an update over the whole parameter, 0-d; drive with `yield from`."""
        total = kernels.sum_of_squares(update)
        if not self.is_whole:
            total = yield total
        return total / self.spec.numel

    def param_mean_square(self) -> Requests[Tensor]:
        """Return the mean square of the parameter before this step, 0-d; drive with `yield from`.

        The sum is already known if the chain declares `reads_param`.
        """
        if self.param_squares is None:
            self.param_squares = kernels.weight_sum_of_squares(self.param.detach(), self.codec)
            if not self.is_whole:
                self.param_squares = yield self.param_squares
        return self.param_squares / self.spec.numel


class Transform:
    """One step of a recipe: takes an update and returns the next. Subclasses are frozen dataclasses.

    A transform writes nothing but its own statistics. Where a transform needs a sum over the whole parameter, its
    `__call__` is a generator that yields the local sum and is sent back the total (see `optstate.stores.Requests`).
    """

    elementwise: ClassVar[bool] = True
    """Whether each element of the result depends on that element alone, so that the chain may run slice by slice."""

    asks_nothing: ClassVar[bool] = False
    """Whether a transform that cannot run slice by slice nevertheless needs nothing of other parts of a parameter."""

    reads_param: ClassVar[bool] = False
    """Whether the parameter's mean square is needed, which is then requested together with the chain's first sum."""

    absorbs_decay: ClassVar[bool] = False
    """Whether the transform is not linear: an earlier weight decay is added to the dense part (`Update.whole`)."""

    applies_lr: ClassVar[bool] = False
    """Whether the transform multiplies by the learning rate, so that the optimizer does not do so at the end."""

    prepares: ClassVar[bool] = False
    """Whether `prepare` moves the statistics in stores of exact sums, and all that is left is elementwise."""

    rules: ClassVar[Mapping[str, Rule | tuple[Rule, ...]]] = {}
    """The fields that are hyper-parameters, each with its rule; a tuple of numbers has a tuple of rules."""

    def __post_init__(self) -> None:
        for name, rule in self.rules.items():
            value = getattr(self, name)
            bound = rule.bind(value) if isinstance(rule, Rule) else bind_all(name, rule, value)
            object.__setattr__(self, name, bound)
        self.check_slots({})

    @property
    def period(self) -> int:
        """Steps after which the same work begins again, the dearest at the first of them: 1 where all are alike."""
        return 1

    @property
    def hypers(self) -> tuple[Hyper, ...]:
        """Every hyper-parameter that the transform reads."""
        found: list[Hyper] = []
        for f in fields(cast(Any, self)):
            value = getattr(self, f.name)
            for item in value if isinstance(value, tuple) else (value,):
                found += [item] if isinstance(item, Hyper) else getattr(item, "hypers", ())
        return tuple(found)

    @property
    def hyper(self) -> dict[str, Any]:
        """The defaults that the transform adds to every param group."""
        return collect_defaults(self.hypers)

    def slots(self, spec: ParamSpec, group: Mapping[str, Any]) -> dict[str, Slot]:
        """Return the statistics kept for a parameter, by slot name.

        Args:
            spec: the parameter's specification.
            group: hyper-parameters, which decide a slot's `beta` and `smallest_weight`, and nothing that has a size; a
                missing one counts with its default.
        """
        return {}

    def check_slots(self, group: Mapping[str, Any]) -> None:
        """Check that every store can hold its statistic with a group's hyper-parameters.

        Raises:
            TypeError: if a store is none.
            ValueError: if a store cannot hold its statistic.
        """
        for name, slot in self.slots(ANY_MATRIX, group).items():
            if not isinstance(slot.store, Store):
                raise TypeError(f"the store of {name!r} is {slot.store!r}: give one of optstate.stores, such as Full()")
            slot.store.check(slot.signed, slot.smallest_weight)

    def temporaries(self, spec: ParamSpec, head: bool) -> int:
        """Return how many fp32 tensors of the parameter's size are needed where the chain cannot run slice by slice.

        Args:
            spec: the parameter's specification.
            head: whether the transform gets the gradient itself, at most clipped by value.
        """
        return 0

    def prepare(self, update: Update, state: State, ctx: Context) -> Requests[None]:
        """Move the statistics in stores of exact sums, before the transform is called slice by slice.

        Args:
            update: what the transform would be called with, of the whole local shard.
            state: the statistics in stores of exact sums alone; the later calls get a `MovedStatistic` for each.
            ctx: of the whole local shard.
        """
        yield from ()

    def __call__(self, update: Update, state: State, ctx: Context) -> Update | Requests[Update]:
        raise NotImplementedError


def bind_all(name: str, rules: tuple[Rule, ...], values: Any) -> tuple[Hyper | None, ...]:
    """Bind each number of a tuple field, such as Adam's betas, to its rule.

    Raises:
        ValueError: if `values` is no tuple or list with a number for each rule.
    """
    if not isinstance(values, tuple | list) or len(values) != len(rules):
        raise ValueError(f"{name}={values!r} must be {len(rules)} numbers")
    return tuple(rule.bind(value) for rule, value in zip(rules, values, strict=True))


def collect_defaults(hypers: tuple[Hyper, ...]) -> dict[str, Any]:
    """Return the param-group defaults of several hyper-parameters; those with an index share a tuple.

    Raises:
        ValueError: if two hyper-parameters give one key different defaults, or a number and a tuple.
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
            raise ValueError(
                f"{name!r} is a number for one step of the recipe and a tuple for another; give one of them a key of "
                f'its own: updates.hyper("my_{name}", {known[None]!r})'
            )
        defaults[name] = tuple(known.get(i, 0.0) for i in range(max(places) + 1)) if places else known[None]
    return defaults


def run_transform(transform: Transform, update: Update, state: State, ctx: Context) -> Requests[Update]:
    """Call a transform, whether or not its `__call__` is a generator; drive with `yield from`.

    Raises:
        TypeError: if the transform declares `elementwise = False`, this device has a part of the parameter, and the
            transform changes the update and asks for nothing of the other parts.
    """
    result = transform(update, state, ctx)
    alone = transform.elementwise or transform.reads_param or transform.asks_nothing
    if ctx.spec.region is not None and not alone:
        return (yield from _require_sums(transform, result, update, ctx.spec))
    if isinstance(result, GeneratorType):
        result = yield from result
    return cast(Update, result)


def _require_sums(
    transform: Transform, result: Update | Requests[Update], update: Update, spec: ParamSpec
) -> Requests[Update]:
    """Finish a transform of a parameter of which this device has a part; refuse one that asks for nothing."""
    asked = False
    if not isinstance(result, Update):
        reply = None
        while True:
            try:
                request = result.send(reply)
            except StopIteration as stop:
                result = cast(Update, stop.value)
                break
            asked = True
            reply = yield request
    if not asked and result is not update:
        raise TypeError(
            f"{type(transform).__name__} is not elementwise, and asks for nothing of the other parts of {spec.name!r}, "
            f"of which this device has {spec.local_shape} of {spec.shape}: it would compute from this part alone. Have "
            "it ask: total = yield local, or whole = yield stores.Whole(local, ctx.spec)"
        )
    return result


def _times(a: Scalar, b: Scalar) -> Scalar:
    if not isinstance(b, Tensor):
        b = float(b)
    if isinstance(a, float):
        if a == 1.0:
            return b
        if a == 0.0:  # a decay that is switched off stays a number, so that kernels can skip it
            return a
    return a * b
