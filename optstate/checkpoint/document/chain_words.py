"""What a parameter goes through, as a file says it in words: taken apart into transforms. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

__all__ = ["ChainWords", "TransformWords", "parse_chain"]


@dataclass(frozen=True)
class TransformWords:
    """One transform: its name, and the words in brackets that decide its rule.

    words: switches and functions by name, numbers and choices as `rank=4`, inner chains as `inner=[...]`.
    """

    name: str
    words: tuple[str, ...] = ()

    def inner(self, field: str = "inner") -> ChainWords:
        """Return the chain that it runs inside; no transforms if there is none."""
        start = f"{field}=["
        return parse_chain(next((word[len(start) : -1] for word in self.words if word.startswith(start)), ""))


@dataclass(frozen=True)
class ChainWords:
    """The transforms of a chain in order; none where the file does not tell them, or gradients stay as they are."""

    transforms: tuple[TransformWords, ...] = ()

    def has(self, name: str, word: str = "") -> bool:
        """Whether a transform of this name is among them, with this word if one is given."""
        return any(each.name == name and (not word or word in each.words) for each in self.transforms)

    def ends_with(self, *last: TransformWords) -> bool:
        """Whether these are the last transforms, word for word."""
        return self.transforms[-len(last) :] == last


@lru_cache(maxsize=1024)
def parse_chain(text: str) -> ChainWords:
    """Take apart what `str(chain)` gives: "add_decayed_weights > momentum(nesterov, heavy_ball)"."""
    if text in ("", "gradient"):
        return ChainWords()
    return ChainWords(tuple(map(_parse_transform, _split(text, " > "))))


def _parse_transform(text: str) -> TransformWords:
    name, bracket, rest = text.partition("(")
    return TransformWords(name, tuple(_split(rest.removesuffix(")"), ", ")) if bracket else ())


def _split(text: str, separator: str) -> list[str]:
    """Split at a separator outside of all brackets."""
    parts, depth, begin, i = [], 0, 0, 0
    while i < len(text):
        depth += (text[i] in "([") - (text[i] in ")]")
        if depth == 0 and text.startswith(separator, i):
            parts.append(text[begin:i])
            i = begin = i + len(separator)
        else:
            i += 1
    return [*parts, text[begin:]]
