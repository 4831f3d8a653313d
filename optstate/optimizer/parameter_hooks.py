"""Gradient hooks on parameters: put there, taken over from an older optimizer, taken away, and found missing."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from optstate.integrations import engines
from optstate.optimizer.step_runner import StepRunner

__all__ = ["ParameterHooks"]


class Receiver(Protocol):
    """What gets the gradients of hooked parameters."""

    def on_gradient(self, runner: StepRunner, param: Tensor) -> None: ...

    def remove(self) -> None: ...


class GradientHook:
    """A gradient hook that does not keep the optimizer alive."""

    def __init__(self, receiver: Receiver, runner: StepRunner) -> None:
        self.receiver, self.runner = weakref.ref(receiver), weakref.ref(runner)

    def __call__(self, param: Tensor) -> None:
        receiver, runner = self.receiver(), self.runner()
        if receiver is not None and runner is not None:
            receiver.on_gradient(runner, param)


class ParameterHooks:
    """The hooks of one receiver.

    hooked: the handle of each parameter's hook. kept: parameters that hold a gradient on purpose, as it is added to.
    """

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = weakref.ref(receiver)
        self.hooked: dict[Tensor, RemovableHandle] = {}
        self._handles: dict[int, RemovableHandle] = {}  # by their ids, without the parameters, which must not stay
        weakref.finalize(receiver, _remove_all, self._handles).atexit = False  # what is gone leaves nothing behind
        self.kept: set[Tensor] = set()
        self._frozen: list[Tensor] = []  # those without a hook, when they were last looked at

    def attach(self, runner: StepRunner) -> None:
        """Attach hooks to every parameter that trains and has none, or has lost it."""
        self.add(runner, [p for p in runner.params() if p.requires_grad and not self._is_hooked(p)])

    def attach_unfrozen(self, runner: StepRunner) -> None:
        """Attach hooks to parameters that began to train after fusing; lost hooks stay lost, `lost` reports them.

        Raises:
            RuntimeError: as `add`; if a parameter that trains was put into the groups after the optimizer was built.
        """
        without = self._frozen + runner.parameters.strangers
        for param in without:
            if param.requires_grad:
                self.add(runner, [p for p in without if p.requires_grad])
                return

    def add(self, runner: StepRunner, params: list[Tensor]) -> None:
        """Attach hooks to these parameters.

        Raises:
            RuntimeError: if they belong to an engine under which a fused update would be wrong, or one was put into the
                groups after the optimizer was built.
        """
        receiver = self._receiver()
        assert receiver is not None
        if params:
            for param in params:
                runner.leaf(param)
            engines.refuse_live_objects(params)
            self._replace_older(runner, params)
            engines.refuse_parameters(params, runner.name)
        hook = GradientHook(receiver, runner)
        for param in params:
            handle = param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            self._handles[handle.id] = self.hooked[param] = handle
            if param.grad is not None:
                self.kept.add(param)
        self._frozen = [param for param in runner.params() if param not in self.hooked]

    def _replace_older(self, runner: StepRunner, params: list[Tensor]) -> None:
        """Take the hooks over from optimizers that were fused earlier: a second fit, or a notebook cell run again."""
        hooks = (hook for p in params for hook in (getattr(p, "_post_accumulate_grad_hooks", None) or {}).values())
        found = {hook.receiver(): hook.runner() for hook in hooks if isinstance(hook, GradientHook)}
        receiver: Any = self._receiver()
        for older, theirs in found.items():
            if older is None or older is receiver or theirs is None:
                continue
            which = f"{type(theirs.optimizer).__name__} over {len(theirs.params())} parameters"
            theirs.replaced_by = weakref.ref(receiver)
            older.remove()
            warnings.warn(
                f"an older {which} was fused over parameters of this {type(runner.optimizer).__name__}: only this one "
                "updates from now on. Call fused.remove() on the older one, or delete it, before you fuse a new one",
                stacklevel=6,
            )

    def release(self, params: Iterable[Tensor]) -> None:
        """Leave the gradients of these parameters alone from now on."""
        for param in params:
            handle = self.hooked.pop(param, None)
            if handle is not None:
                handle.remove()
                del self._handles[handle.id]
            self.kept.discard(param)

    def lost(self, held: Iterable[Tensor]) -> list[Tensor]:
        """Return the parameters whose hooks are gone, or dead. held: those that hold a gradient after a backward."""
        lost = []
        for param, handle in self.hooked.items():
            if param.requires_grad and not _is_on(param, handle):
                lost.append(param)
        for param in held:
            if self._is_hooked(param) and param not in self.kept:  # a swapped tensor keeps a dead hook
                lost.append(param)
        return lost

    def _is_hooked(self, param: Tensor) -> bool:
        handle = self.hooked.get(param)
        return handle is not None and _is_on(param, handle)


def _remove_all(handles: Mapping[int, RemovableHandle]) -> None:
    """Take hooks away."""
    for handle in handles.values():
        handle.remove()


def _is_on(param: Tensor, handle: RemovableHandle) -> bool:
    """Whether the hook of a handle is among those of the parameter."""
    hooks = getattr(param, "_post_accumulate_grad_hooks", None)
    return hooks is not None and handle.id in hooks
