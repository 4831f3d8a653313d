"""One rule for parameters that have state on one side only, in what was saved or here; all loaders follow it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from enum import Enum, auto

__all__ = ["Gap", "rule", "warn_of"]


class Gap(Enum):
    """What becomes of one parameter's state."""

    FILL = auto()
    """It was saved, and is loaded: a frozen parameter keeps it until it trains again."""

    NONE = auto()
    """There is none on either side: it is made when the parameter trains."""

    DROP = auto()
    """A frozen parameter has state here, and nothing was saved: what is here is of another run. It begins anew when it
    trains again, as it would have done in the saved run."""

    ANEW = auto()
    """It trains here, and nothing was saved, as PyTorch and most libraries make state at the first update: it begins at
    step 0."""


def rule(name: str, *, saved: bool, here: bool, trains: bool, complete: bool) -> Gap:
    """Decide what becomes of the state of one parameter.

    Args:
        name: of the parameter.
        saved: whether the saved run has state of the parameter.
        here: whether the optimizer has state of the parameter.
        trains: whether the parameter requires gradients now.
        complete: whether the saved run kept state for all parameters that trained, as this library does from the
            beginning; torch.distributed.checkpoint leaves out parameters that are frozen when it saves.

    Raises:
        ValueError: where a complete run kept nothing and the parameter trains here. It was frozen, or state was lost.
    """
    if saved:
        return Gap.FILL
    if not trains:
        return Gap.DROP if here else Gap.NONE
    if complete:
        raise ValueError(
            f"the saved state has nothing for {name!r}, which trains here: it was frozen or lost; "
            "freeze it before loading if it was, and unfreeze it afterwards"
        )
    return Gap.ANEW


def warn_of(anew: Sequence[str], dropped: Sequence[str]) -> None:
    """Say which parameters go on without a past."""
    if anew:
        warnings.warn(f"the saved state has nothing for {_listed(anew)}: begun anew, at step 0", stacklevel=4)
    if dropped:
        warnings.warn(
            f"the saved state has nothing for {_listed(dropped)}, frozen here: what was kept is dropped, and begins "
            "anew when it trains again (torch.distributed.checkpoint does not load the state of what is frozen)",
            stacklevel=4,
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
