"""Whether a step broke off half-way, and what is said of it."""

from __future__ import annotations

from collections.abc import Sequence

from optstate.collectives import LostProcessError, listed

__all__ = ["Consistency", "InconsistentStateError", "reason_of"]


class InconsistentStateError(RuntimeError):
    """A step broke off after some parameters were updated, here or on another device, and before others were."""


class Consistency:
    """What an optimizer remembers of a step that did not end well.

    reason: why it is inconsistent; "" while it is not. writing: whether the step in progress may have begun to write.
    """

    def __init__(self) -> None:
        self.reason = ""
        self.writing = False

    def broke_off(self, updated: int, then: str) -> None:
        """Remember what happened after so many parameters had been updated."""
        self.reason = f"{updated} parameters were updated, then {then}"

    def lost(self, names: Sequence[str], step: int, updated: int, error: LostProcessError) -> InconsistentStateError:
        """Remember that another process did not take part in a step of these parameters; gives what to raise."""
        which = listed(names) if names else "no parameter"
        self.broke_off(updated, f"step {step} of {which} failed: {error}")
        return InconsistentStateError(
            f"step {step} broke off at {which}: {error}. Weights may be updated in part, here or on other devices: "
            "load the last checkpoint in new processes"
        )

    def require(self, action: str) -> None:
        """Raise InconsistentStateError for what must not be done after a step that broke off."""
        if self.reason:
            raise InconsistentStateError(
                f"{action}() refused, a step broke off half-way: {self.reason}. "
                "Load the last checkpoint, or call accept_partial_step() to go on with the weights as they are"
            )


def reason_of(error: BaseException) -> str:
    """What an error says, or else what it is."""
    return str(error) or type(error).__name__
