"""Canonical parameter names: the names without the prefixes that wrappers add. Imports no torch.

Compiling a model, wrapping it for several devices, checkpointing its activations or giving it adapters puts words into
the names of its parameters. A name decides how a weight is rounded, and which statistic is whose: it must be the same
for the same parameter, wrapped or not.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

__all__ = ["CanonicalNames", "by_place", "canonical_names", "same_names"]

WRAPPERS = frozenset(
    (
        "_orig_mod",  # torch.compile
        "_fsdp_wrapped_module",  # FSDP1
        "_fpw_module",  # FSDP of fairscale and torch_xla
        "_checkpoint_wrapped_module",  # torch's checkpoint_wrapper
        "_forward_module",  # Lightning's Fabric and strategies
        "_original_module",  # the same
        "_module",  # Opacus
    )
)
"""Attributes under which wrappers hold the wrapped module; no model uses these words, so they are always dropped."""

MODULE = "module"  # DataParallel, DistributedDataParallel, DeepSpeed, Megatron, AveragedModel
ADAPTED = ("base_layer", "original_module")  # PEFT: what stands beside an adapter
BASE = ("base_model", "model")  # PEFT: a model with adapters
ADAPTERS = ("lora_", "ia3_", "hada_", "lokr_", "vera_", "oft_", "boft_", "modules_to_save", "trainable_tokens_")
DEFAULT = "default"  # PEFT's name of an adapter that was given none, and which it leaves out when it saves
WORDS = frozenset((MODULE, DEFAULT, BASE[0], *ADAPTED))
"""Without one of these words a name has nothing of wrappers and adapters that models may use, too."""


def canonical_names(given: Sequence[str], taken: Collection[str] = ()) -> list[str]:
    """Return the names of one optimizer's parameters without the words that wrappers put into them.

    Words that models use, too, such as `module`, stay where parameters could not be told apart without them. Equal
    names stay equal.

    Args:
        given: the names of all parameters that are added at once.
        taken: canonical names of the parameters that the optimizer has already.

    Returns:
        One canonical name per given name, in order.
    """
    unwrapped = [_without_wrappers(name) for name in given]
    while unwrapped and all(name.startswith(f"{MODULE}.") for name in unwrapped):
        unwrapped = [name.removeprefix(f"{MODULE}.") for name in unwrapped]
    bare = [_bare(name) for name in unwrapped]
    meant: dict[str, set[str]] = {}
    for name, short in zip(unwrapped, bare, strict=True):
        meant.setdefault(short, set()).add(name)
    ambiguous = {short for short, names in meant.items() if len(names) > 1 or short in taken}
    return [name if short in ambiguous else short for name, short in zip(unwrapped, bare, strict=True)]


def same_names(a: Sequence[str], b: Sequence[str]) -> list[bool]:
    """Return for each pair of names in two lists of equal length whether both name the same parameter."""
    pairs = zip(a, b, canonical_names(a), canonical_names(b), strict=True)
    return [one == other or short == short_other for one, other, short, short_other in pairs]


def by_place(place: int) -> str:
    """Return the name of a parameter that was given without a name, by its place in the optimizer from 0 on."""
    return f"param_{place}"


class CanonicalNames:
    """The canonical names of one optimizer's parameters, and the given names that they come from.

    Args:
        expected: given names of all parameters that are about to be added, so that all are seen together.
    """

    def __init__(self, expected: Sequence[str] = ()) -> None:
        different = list(dict.fromkeys(expected))
        self._known = dict(zip(different, canonical_names(different), strict=True))
        self._given: dict[str, str] = {}

    def __bool__(self) -> bool:
        return bool(self._known)

    def __contains__(self, name: str) -> bool:
        return name in self._given

    def canonical(self, given: Sequence[str]) -> list[str]:
        """Return the canonical names of parameters that are about to be added, one per given name."""
        new = [name for name in given if name not in self._known]
        found = dict(zip(new, canonical_names(new, self._given.keys()), strict=True)) if new else {}
        return [found[name] if name in found else self._known[name] for name in given]

    def use(self, given: Sequence[str], names: Sequence[str]) -> None:
        """Note that these canonical names, made of these given names, now belong to parameters."""
        self._known.update(zip(given, names, strict=True))
        self._given.update(zip(names, given, strict=True))

    def free(self, name: str) -> None:
        """Note that this canonical name no longer belongs to a parameter."""
        self._given.pop(name, None)

    def given(self, name: str) -> str:
        """Return the given name that a canonical name comes from, or the canonical name itself if unknown."""
        return self._given.get(name, name)


def _without_wrappers(name: str) -> str:
    """Return a name without the words that only wrappers use; its last word, the parameter's own, stays."""
    *path, own = name.split(".")
    if WRAPPERS.isdisjoint(path):
        return name
    return ".".join([*(word for word in path if word not in WRAPPERS), own])


def _bare(name: str) -> str:
    """Return a name without the words that wrappers and adapters use but models may use, too."""
    words = name.split(".")
    if WORDS.isdisjoint(words):
        return name
    kept: list[str] = []
    for place, word in enumerate(words):
        last = place == len(words) - 1
        if word == DEFAULT and kept and kept[-1].startswith(ADAPTERS):
            continue
        if not last and (word == MODULE or word in ADAPTED):
            continue
        kept.append(word)
        if not last and tuple(kept[-2:]) == BASE:
            del kept[-2:]
    return ".".join(kept)
