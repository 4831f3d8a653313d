"""Everything that is wrong or odd in the structure of a safetensors file or sharded set, and a second opinion on it.

The second opinion is that of the `safetensors` library, whose parser is written in Rust and reads the file for most
other programs. Where the two disagree, one of them is wrong, or lax: a person should know. What is known of that:

- The library keeps the last of two equal names, of tensors and in metadata; here that is an error.
- It ignores fields of an entry that it does not know, however large their numbers; here numbers must be in range.
- It takes more dimensions than are read here (1000), and lengths above 2**63 in a tensor without elements, which torch
  then cannot make.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from optstate.checkpoint.files.issues import Issue, IssueLog
from optstate.checkpoint.files.opened_file import opened_at
from optstate.checkpoint.files.safetensors_header import log_header, tensor_place
from optstate.checkpoint.files.safetensors_index import log_index, read_index
from optstate.text import has_controls, shown

__all__ = ["CONTROLS", "second_opinion", "structural_issues"]

CONTROLS = "its name has control characters, which change what a terminal shows"

MOST_ISSUES = 1000  # a hostile file may have millions


class _EnoughError(Exception):
    """Ends a search that finds no end."""


def structural_issues(path: str | os.PathLike[str]) -> list[Issue]:
    """Return all that is wrong or odd in the structure of a safetensors file, a sharded index or its folder.

    "error" is what `read_header` and `read_index` refuse, and a name with control characters, which they accept so that
    one can look into the file; "warning" is what is odd.

    Raises:
        CheckpointError: if there is nothing to go through: no such file, another kind of file, no JSON.
    """
    issues: list[Issue] = []

    def collect(issue: Issue) -> None:
        issues.append(issue)
        if len(issues) == MOST_ISSUES:
            raise _EnoughError

    log = IssueLog(collect)
    try:
        headers = list(log_index(path, log).shards.values()) if _is_set(path) else [log_header(path, log)]
        for name in (entry.name for each in headers for entry in each.tensors if has_controls(entry.name)):
            collect(Issue("error", tensor_place(name), CONTROLS))
    except _EnoughError:
        issues.append(Issue("error", "file", f"more than {MOST_ISSUES} findings: the rest was not looked at"))
    return issues


def second_opinion(path: str | os.PathLike[str], issues: Sequence[Issue]) -> list[Issue]:
    """Return a warning if the `safetensors` library takes what is refused here, or refuses what is taken.

    Args:
        path: a safetensors file; or a sharded set, whose files are looked at if nothing is wrong with the set.
        issues: what `structural_issues` found. Names with control characters are read by both.
    """
    ours = next((issue for issue in issues if issue.severity == "error" and issue.what != CONTROLS), None)
    if _is_set(path):
        files = [header.path for header in read_index(path).shards.values()] if ours is None else []
    else:
        files = [os.fspath(path)]
    found = []
    for file in files:
        theirs = refusal_by_safetensors(file)
        if not opened_at(file).is_at(file):  # replaced since it was read here: of that version nothing was said
            continue
        where = f"shard '{shown(os.path.basename(file))}'" if _is_set(path) else "file"
        if ours is None and theirs:
            what = f"the safetensors library refuses it, and nothing is wrong with it here: {shown(theirs)}"
            found.append(Issue("warning", where, what))
        elif ours is not None and not theirs:
            what = "the safetensors library reads it all the same: programs that use it see no error"
            found.append(Issue("warning", where, what))
    return found


def refusal_by_safetensors(path: str | os.PathLike[str]) -> str:
    """Return why the `safetensors` library refuses a file; "" if the library opens it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np"):
            return ""
    except (SafetensorError, OSError) as error:
        return str(error) or type(error).__name__


def _is_set(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a sharded set: a folder, or an index."""
    return os.path.isdir(path) or os.fspath(path).endswith(".json")
