"""The position in a training step: in which pass, and in which module or at which parameter."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["Position", "phase_of"]

LOSS = "loss"


class Position:
    """The position of a module in its forward and backward passes, followed without a trace in its graph.

    Nodes of a graph are numbered as they are made, so the numbers at which modules begin and end tell, in the backward
    pass, which module a node is from. What is made from the output projection on, up to the loss and in the loss's
    part of the backward pass, counts as logits. The projection is what the module offers as `get_output_embeddings()`,
    else the last module without children, but with parameters, that a forward pass runs: known after the first.
    """

    def __init__(self, module: nn.Module) -> None:
        self.phase = ""
        """"forward", "backward" or "update"."""
        self._passes = 0
        self._names = {part: name for name, part in module.named_modules()}
        self._params: dict[Any, str] = {param: name for name, param in module.named_parameters()}
        self._head = _declared_head(module)
        self._head_known = self._head is not None
        self._running: list[str] = []
        self._after_head = False
        self._last: nn.Module | None = None
        self._updating = ""
        self._starts: list[int] = []
        self._owners: list[str] = []

    # --- following --------------------------------------------------------------------------------------------

    @contextmanager
    def following(self) -> Iterator[None]:
        """Attach hooks to every module; remove them at the end."""
        with ExitStack() as hooks:
            for part in self._names:
                hooks.callback(part.register_forward_pre_hook(self._enter, prepend=True).remove)
                hooks.callback(part.register_forward_hook(self._leave, always_call=True).remove)
            yield

    @contextmanager
    def during(self, phase: str, name: str = "") -> Iterator[None]:
        """Set the phase inside, and the parameter that is updated in it."""
        before = self.phase, self._updating
        self.phase, self._updating = phase, name
        self._passes += phase != "update"
        self._after_head = False
        try:
            yield
        finally:
            self.phase, self._updating = before

    def begin_step(self) -> None:
        """Note that another step begins."""
        if not self._head_known and self._last is not None:
            self._head, self._head_known = self._last, True
        self._passes = 0

    def _enter(self, part: nn.Module, _: Any) -> None:
        self._running.append(self._names[part])
        self._mark()

    def _leave(self, part: nn.Module, *_: Any) -> None:
        if self._names[part] in self._running:  # a recomputation may stop in the middle
            while self._running.pop() != self._names[part]:
                pass
        if self.phase == "forward":
            if not list(part.children()) and list(part.parameters(recurse=False)):
                self._last = part
            self._after_head = self._after_head or part is self._head
        self._mark()

    def _mark(self) -> None:
        """Note that nodes made from here on belong to the module that runs."""
        self._starts.append(torch._C._autograd._get_sequence_nr())
        self._owners.append(self._owner())

    def _owner(self) -> str:
        if self._after_head:
            return LOSS
        return self._running[-1] if self._running else ""

    # --- where ------------------------------------------------------------------------------------------------

    def where(self) -> tuple[str, str]:
        """Return the place and the kind of what is made there.

        A place is the number of the pass through the module, and the phase, with a name after a colon where one is
        known: `1 forward:layers.0`.
        """
        place, kind = self._phase_and_kind()
        return f"{self._passes} {place}", kind

    def _phase_and_kind(self) -> tuple[str, str]:
        if self.phase == "forward":
            return self._where_forward()
        if self.phase != "backward":
            return _join(self.phase, self._updating), "scratch"
        node: Any = torch._C._current_autograd_node()
        if self._running or node is None:  # recomputing
            return _join("backward", self._running[-1] if self._running else ""), "activations"
        if node.name().endswith("AccumulateGrad"):
            return _join("backward", self._params.get(node.variable, "")), "scratch"
        owner = self._owner_of(node._sequence_nr())
        return _join("backward", owner), "logits" if owner == LOSS else "activations"

    def _where_forward(self) -> tuple[str, str]:
        if self._after_head:
            return LOSS, "logits"
        name = self._running[-1] if self._running else ""
        in_head = self._head is not None and name == self._names[self._head]
        return _join("forward", name), "logits" if in_head else "activations"

    def _owner_of(self, number: int) -> str:
        place = bisect_right(self._starts, number)
        return self._owners[place - 1] if place else ""


def _declared_head(module: nn.Module) -> nn.Module | None:
    offer = getattr(module, "get_output_embeddings", None)
    head = offer() if callable(offer) else None
    return head if isinstance(head, nn.Module) and head in set(module.modules()) else None


def _join(phase: str, name: str) -> str:
    return f"{phase}:{name}" if name else phase


def phase_of(place: str) -> str:
    """Return a place without the number of the pass."""
    return place.partition(" ")[2]
