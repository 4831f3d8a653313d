"""Agreement between processes: they fail together or not at all, and step the same parameters.

A collective that fails raises LostProcessError, so that callers can tell a lost process from any other error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

__all__ = [
    "Agreement",
    "DisagreementError",
    "Groups",
    "LostProcessError",
    "ProcessView",
    "collective",
    "describe_difference",
    "fail_together",
    "from_all",
    "listed",
    "reason_of",
]

Groups = tuple[Any, ...]
"""Process groups, one per dimension of a mesh: collectives over one after another reach every process of the mesh."""

ProcessView = dict[str, str]
"""Things that must be the same on all processes: a description of each, and its value on this process."""

LONGEST_WORDS = 200


class LostProcessError(RuntimeError):
    """Raised where a collective failed, mostly as a process is gone or late; `__cause__` is the backend's error."""


class DisagreementError(RuntimeError):
    """Raised on all processes where one of them failed, or where something is not the same on all of them.

    The process that failed raises its own error instead.
    """


@contextmanager
def collective(otherwise: str = "") -> Iterator[None]:
    """Turn an error that a backend raises for a collective into a LostProcessError.

    Args:
        otherwise: another possible reason than that a process is gone or late, in words for the message.
    """
    try:
        yield
    except RuntimeError as error:
        if type(error) is not RuntimeError and not isinstance(error, dist.DistError):  # memory, or a fake tensor's
            raise
        reason = "another process is gone, or late by more than the process group's timeout"
        said = f"the backend says: {_first_line(error)}"
        raise LostProcessError(f"{reason}{', or ' if otherwise else ''}{otherwise} ({said})") from error


def _first_line(error: BaseException) -> str:
    """Return the first line of an error's message, shortened; some backends append a stack."""
    line = str(error).strip().partition("\n")[0].strip()
    return line if len(line) <= LONGEST_WORDS else f"{line[:LONGEST_WORDS]}..."


def from_all(mine: Any, groups: Groups) -> dict[int, Any]:
    """Gather one object from every process of the groups, by rank; the host waits for the others."""
    found = {dist.get_rank(): mine}
    for group in groups:
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, found, group=group)
        found = {rank: theirs for part in parts for rank, theirs in part.items()}
    return dict(sorted(found.items()))


def reason_of(error: BaseException) -> str:
    """Return the message of an error, or the name of its class if it has none."""
    return str(error) or type(error).__name__


@contextmanager
def fail_together(
    doing: str, views: Iterable[Groups], say: Callable[[BaseException], str] = reason_of
) -> Iterator[dict[Groups, ProcessView]]:
    """Run the body on every process; if the body raises on one process, raise on all, so that none goes on or waits.

    The body gets a `View` for each of `views`, and notes in it what must be the same on all of these processes.

    Args:
        doing: the call, such as "save()", to notice processes that are at another call.
        views: the groups of processes that share something, in the same order on all of their processes; none where
            nothing is shared.
        say: turns a failure of this process into the words that the others are told.

    Raises:
        DisagreementError: if the body raised on another process only, or the processes noted different things.
        LostProcessError: if another process does not answer.
    """
    noted: dict[Groups, ProcessView] = {groups: {"the call": doing} for groups in views}
    failure: BaseException | None = None
    try:
        yield noted
    except BaseException as error:
        failure = error
    found = ""
    if not isinstance(failure, LostProcessError):
        try:
            found = describe_difference(noted, "" if failure is None else say(failure))
        except LostProcessError as error:
            failure = failure or error
    if failure is not None:
        raise failure
    if found:
        raise DisagreementError(found)


def describe_difference(views: Mapping[Groups, ProcessView], failure: str = "") -> str:
    """Return in words what failed on a process, or is not the same on all of them; "" if nothing. The host waits.

    A digest of each view goes to the others, and the whole view only where digests differ. A group's finding is told to
    the other groups that have a process in common with it.

    Args:
        views: what must be the same, by the groups of processes that share it.
        failure: what failed on this process, in words; "" if nothing did.

    Raises:
        LostProcessError: if another process does not answer.
    """
    found = ""
    again = []
    for groups, view in views.items():
        digest = hashlib.sha256(repr(list(view.items())).encode()).hexdigest()
        with collective():
            told = from_all((failure, digest, len(views) > 1), groups)
        failed = [f"rank {rank} failed: {reason}" for rank, (reason, *_) in told.items() if reason]
        if failed:
            found = found or failed[0]
        elif len({digest for _, digest, _ in told.values()}) > 1:
            with collective():
                everywhere = from_all(view, groups)
            found = found or _first_difference(everywhere)
        if any(several for *_, several in told.values()):
            again.append(groups)
    for groups in again:
        with collective():
            told = from_all(found, groups)
        found = found or next(filter(None, told.values()), "")
    return found


def _first_difference(views: Mapping[int, ProcessView]) -> str:
    """Return in words the first thing that is not the same on all processes, of whose views there is one per rank."""
    for what in dict.fromkeys(what for view in views.values() for what in view):
        having: dict[str, list[int]] = {}
        for rank, view in views.items():
            having.setdefault(view.get(what, "unknown"), []).append(rank)
        if len(having) > 1:
            parts = [f"{value} on {_ranks(ranks)}" for value, ranks in having.items()]
            shown = ", ".join(parts[:3]) + (f" and {len(parts) - 3} more" if len(parts) > 3 else "")
            return f"{what} is {shown}"
    return "the ranks have the same in another order"


class Agreement:
    """The check that all processes step the same parameters together.

    Without the check, sums would mix up parameters or wait for ever. A process asks the others when the parameters that
    it is about to step are a new set: at the first step, and rarely afterwards. A set that all have stepped before
    costs nothing. If the set is new on some processes only, these ask while the others add up already, and the
    backend's timeout ends the wait.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()  # hashes: a run that drops layers at random makes ever new sets
        self._last: dict[Groups, tuple[str, ...]] = {}

    def difference(self, chosen: Mapping[Groups, Sequence[str]]) -> str:
        """Return in words how the parameters about to be stepped differ from other processes'; "" if they do not.

        Args:
            chosen: names of the parameters, by the groups of processes that hold the other parts of them.

        Raises:
            LostProcessError: if another process does not answer.
        """
        first, found = not self._seen, ""
        for groups, params in chosen.items():
            names = tuple(params)
            key = hash((groups, names))
            if key not in self._seen:
                with collective(self._changed(groups, names)):
                    theirs = from_all(names, groups)
                if any(other != names for other in theirs.values()):
                    found = found or _difference(theirs)
                else:
                    self._seen.add(key)
            self._last[groups] = names
        if first and len(chosen) > 1:  # all are asking: none may go on while others have seen a difference
            for groups in chosen:
                with collective():
                    told = from_all(found, groups)
                found = found or next(filter(None, told.values()), "")
        return found

    def _changed(self, groups: Groups, names: Sequence[str]) -> str:
        """Return in words what a process that does not answer may have missed since the last step."""
        before = self._last.get(groups)
        if before is None:
            return ""
        changes = ((set(names) - set(before), "gained a gradient"), (set(before) - set(names), "lost its gradient"))
        texts = [f"{listed(sorted(which))} {change}" for which, change in changes if which]
        return f"here only {' and '.join(texts)}" if texts else "here only gradients come in another order"


def listed(names: Sequence[str]) -> str:
    """Return the first name and the number of the others, in words."""
    return f"{names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _difference(names: Mapping[int, Sequence[str]]) -> str:
    """Return in words which parameters some processes step and others do not; `names` holds each rank's."""
    having: dict[str, list[int]] = {}
    for rank, each in names.items():
        for name in each:
            having.setdefault(name, []).append(rank)
    alike: dict[str, list[str]] = {}
    for name, ranks in having.items():
        if len(ranks) < len(names):
            alike.setdefault(_where(ranks, [rank for rank in names if rank not in ranks]), []).append(name)
    if not alike:
        return "gradients do not come in the same order on all ranks"
    return f"there are gradients {', '.join(f'for {listed(some)} {where}' for where, some in list(alike.items())[:3])}"


def _where(ranks: Sequence[int], others: Sequence[int]) -> str:
    if len(ranks) <= len(others):
        return f"on {_ranks(ranks)} only"
    return f"on all ranks but {_numbers(others)}"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {_numbers(ranks)}"


def _numbers(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (" ..." if len(ranks) > 8 else "")
