"""What the runner of an optimizer's steps needs of the hooks of a fused backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor

__all__ = ["FusedHooks"]


class FusedHooks(Protocol):
    """What a runner needs of the hooks that call it inside the backward pass."""

    @property
    def clip_grad_norm(self) -> float | None: ...

    @property
    def handle(self) -> Any: ...

    def attach(self) -> None: ...

    def abandon(self) -> None: ...

    def close_step(self) -> None: ...

    def look_again(self) -> None: ...

    def follow(self, replaced: Mapping[Tensor, Tensor], gone: Iterable[Tensor]) -> None: ...
