"""What an optimizer remembers of a step while it is made: written ahead, so that no end of it goes unseen."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from optstate.distributed.agreement import LostProcessError, listed

__all__ = ["STEP", "Consistency", "InconsistentStateError"]

STEP = "step()"


class InconsistentStateError(RuntimeError):
    """A step broke off after some parameters were updated, here or on another device, and before others were.

    Also raised where a step would have to be whole and is not: a backward pass has updated, `step()` did not follow.
    """


class Consistency:
    """Marks that are set before the first write of a step, and taken away by its end, a load, or the user's word alone.

    An exception or an interrupt between any two lines therefore leaves a mark; nothing has to run for it to be seen.
    A step is half made if a parameter is unfinished, or if some are updated and what updates them still runs.
    """

    def __init__(self, reason: str = "") -> None:
        self.reason = reason
        """Why a step broke off, in words, where something could still be said; else empty."""
        self.updated: set[str] = set()
        """Names of the parameters that the step in progress has updated."""
        self.running: set[Hashable] = set()
        """What updates and has not ended: `step()`, or backward passes by the number autograd gives them."""
        self.evaluating = False
        """Whether parameters hold weights to evaluate with, and not those that are trained."""
        self._unfinished: dict[str, bool] = {}  # names of parameters, and whether their writing has begun here

    # --- the marks of a step, in the order in which they are set and taken away ---------------------------------

    def begin(self, what: Hashable) -> None:
        """Mark that `step()` or a backward pass is about to update."""
        if not self.written:
            self.running.clear()  # what broke off earlier changed nothing
        self.running.add(what)

    def begin_asking(self, names: Iterable[str]) -> None:
        """Mark that other devices may write these parameters as soon as they have what this one is about to send."""
        for name in names:
            if name not in self.updated:
                self._unfinished.setdefault(name, False)

    def begin_writing(self, name: str) -> None:
        """Mark that a parameter or its state is about to be written."""
        self._unfinished[name] = True

    def begin_writing_all(self, names: Iterable[str]) -> None:
        """Mark that parameters or their state are about to be written."""
        self._unfinished.update(dict.fromkeys(names, True))

    def finish_all(self, names: Sequence[str]) -> None:
        """Mark that parameters and their state are updated."""
        self.updated.update(names)
        for name in names:
            self._unfinished.pop(name, None)

    def finish(self, name: str) -> None:
        """Mark that a parameter and its state are updated."""
        self.updated.add(name)
        self._unfinished.pop(name, None)

    def refused_everywhere(self) -> None:
        """Note that all devices refused a gradient: parameters that are not being written here are so nowhere."""
        for name in [name for name, writing in self._unfinished.items() if not writing]:
            del self._unfinished[name]

    def end(self, what: Hashable) -> None:
        """Take the mark of a backward pass away: it ended well, and nothing around it can fail any more."""
        self.running.discard(what)

    def close(self) -> None:
        """Take all marks of the step away: it is whole."""
        self.updated.clear()
        self._unfinished.clear()
        self.running.clear()

    def forget(self) -> None:
        """Take every mark away: the state was loaded, or the user goes on with what there is."""
        self.close()
        self.reason = ""

    # --- what is said of them -----------------------------------------------------------------------------------

    @property
    def written(self) -> bool:
        """Whether the step in progress may have written something."""
        return bool(self.updated or self._unfinished)

    @property
    def broken(self) -> str:
        """Why weights and state may be those of half a step; empty if they are not."""
        if self.reason:
            return self.reason
        if self._unfinished:
            which = listed(list(self._unfinished))
            return f"{self._count()} updated, then the update of {which} was interrupted and may be made in part"
        if self.updated and self.running:
            return f"{self._count()} updated, then {STEP if STEP in self.running else 'the backward pass'} failed"
        return ""

    @property
    def reason_of_copy(self) -> str:
        """Why a copy that is made now would be inconsistent; empty if it would not."""
        opened = f"{self._count()} updated, and it was copied before step() closed the step" if self.updated else ""
        return self.broken or opened

    def broke_off(self, name: str, reason: str) -> None:
        """Remember at which parameter a step failed after others were updated, and why."""
        half = " and may itself be updated in part" if self._unfinished.get(name) else ""
        self.reason = f"{self._count()} updated, then {name!r} failed{half}: {reason}"

    def disagreed(self, difference: str) -> None:
        """Remember that devices do not go on alike after others were updated."""
        self.reason = f"{self._count()} updated, then {difference}"

    def lost(self, names: Sequence[str], step: int, error: LostProcessError) -> InconsistentStateError:
        """Remember that another process did not take part in a step of these parameters; gives what to raise."""
        which = listed(names) if names else "no parameter"
        self.reason = f"{self._count()} updated, then step {step} of {which} failed: {error}"
        return InconsistentStateError(
            f"step {step} broke off at {which}: {error}. Weights may be updated in part, here or on other devices: "
            "load the last checkpoint in new processes"
        )

    def require_unbroken(self, action: str) -> None:
        """Raise for what must not be done after a step that broke off, or while averaged weights are evaluated.

        Raises:
            InconsistentStateError: after a step that broke off.
            RuntimeError: between `eval()` and `train()`.
        """
        self.require_trained_weights(action)
        if self.broken:
            raise InconsistentStateError(
                f"{action}() refused, a step broke off half-way: {self.broken}. "
                "Load the last checkpoint, or call accept_partial_step() to go on with the weights as they are"
            )

    def require_trained_weights(self, action: str) -> None:
        """Raise RuntimeError between `eval()` and `train()`, while parameters hold averaged weights."""
        if self.evaluating:
            raise RuntimeError(
                f"{action}() refused: parameters hold averaged weights since eval(). Call the optimizer's train() first"
            )

    def require_going_on(self, action: str) -> None:
        """Like `require_unbroken`, for the next gradient of a backward pass, in the middle of a step."""
        if self.reason or self._unfinished or self.evaluating:
            self.require_unbroken(action)

    def require_whole(self, action: str) -> None:
        """Raise InconsistentStateError unless the last step that updated something was closed."""
        self.require_unbroken(action)
        if self.updated:
            raise InconsistentStateError(
                f"{action}() refused inside a step: a backward pass has updated {len(self.updated)} parameters, and "
                "step() did not follow. Call step() first; if that loss was not meant to train these parameters, "
                "freeze them while it is used (requires_grad_(False)), or leave their update to step()"
            )

    def _count(self) -> str:
        return f"{len(self.updated)} parameters were"
