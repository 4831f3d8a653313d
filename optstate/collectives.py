"""What all processes do together: collectives whose failure is told from other errors, and agreeing on a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

__all__ = ["Agreement", "LostProcessError", "collective", "from_all"]

Groups = tuple[Any, ...]
"""Process groups, one for each dimension of a mesh: what goes over one after another reaches every process."""


class LostProcessError(RuntimeError):
    """A collective failed as another process is gone or late. `__cause__` is what the backend said."""


@contextmanager
def collective(otherwise: str = "") -> Iterator[None]:
    """Turn what a backend raises for a collective into a LostProcessError.

    otherwise: what else may have happened than that a process is gone or late, in words.
    """
    try:
        yield
    except RuntimeError as error:
        if type(error) is not RuntimeError and not isinstance(error, dist.DistError):  # memory, or a fake tensor's
            raise
        reason = "another process is gone, or late by more than the process group's timeout"
        raise LostProcessError(f"{reason}{', or ' if otherwise else ''}{otherwise}") from error


def from_all(mine: Any, groups: Groups) -> dict[int, Any]:
    """An object of every process of the groups by its rank. The host waits for it."""
    found = {dist.get_rank(): mine}
    for group in groups:
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, found, group=group)
        found = {rank: theirs for part in parts for rank, theirs in part.items()}
    return dict(sorted(found.items()))


class Agreement:
    """Sees to it that all processes step the same parameters together: else sums over them would mix up parameters, or
    wait for ever.

    A process asks the others when the parameters that it is about to step are a new set: at the first step, and rarely
    afterwards. A set that all have stepped before costs nothing. If it is new on some processes only, these ask while
    the others add up already, and the backend's timeout ends it.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()  # hashes: a run that drops layers at random makes ever new sets
        self._last: dict[Groups, tuple[str, ...]] = {}

    def difference(self, chosen: Mapping[Groups, Sequence[str]]) -> str:
        """In words, how the parameters that this process is about to step differ from other processes'; "" if not.

        chosen: their names, for the groups of processes that have the other parts of them.

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
        """What a process that does not answer may have missed."""
        before = self._last.get(groups)
        if before is None:
            return ""
        changes = ((set(names) - set(before), "gained a gradient"), (set(before) - set(names), "lost its gradient"))
        texts = [f"{listed(sorted(which))} {change}" for which, change in changes if which]
        return f"here only {' and '.join(texts)}" if texts else "here only gradients come in another order"


def listed(names: Sequence[str]) -> str:
    """The first name and the number of the others."""
    return f"{names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _difference(names: Mapping[int, Sequence[str]]) -> str:
    """Which parameters some processes have and others have not; `names` of each process, by rank."""
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
    few = ranks if len(ranks) <= len(others) else others
    shown = ", ".join(map(str, few[:8])) + (" ..." if len(few) > 8 else "")
    plural = "s" if len(few) > 1 else ""
    return f"on rank{plural} {shown} only" if few is ranks else f"on all ranks but {shown}"
