"""Plan patterns: `*` is one name between dots, `{a,b}` are alternatives, nothing else is special.

A pattern matches a parameter, or a module and so every parameter under it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

MOST_ALTERNATIVES = 256
LITERAL = re.compile(r"[A-Za-z0-9_-]+")
NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.|$)")


def expand(pattern: str) -> tuple[str, ...]:
    """The patterns without braces that it stands for. Raises ValueError, saying what is wrong."""
    found = [""]
    for piece in re.split(r"(\{[^{}]*\})", pattern):
        choices = [piece]
        if piece.startswith("{"):
            choices = [choice.strip() for choice in piece[1:-1].split(",")]
        found = [start + choice for start in found for choice in choices]
        if len(found) > MOST_ALTERNATIVES:
            raise ValueError(f"it stands for more than {MOST_ALTERNATIVES} names")
    for name in found:
        _check(name)
    return tuple(found)


def _check(name: str) -> None:
    if "{" in name or "}" in name:
        raise ValueError("its braces do not pair, or lie inside each other")
    for segment in name.split("."):
        if not segment:
            raise ValueError("a name between its dots, or in its braces, is empty")
        if segment != "*" and "*" in segment:
            raise ValueError(
                f"`*` stands for a whole name between dots, not for a part: `{segment}`"
            )
        if segment != "*" and not LITERAL.fullmatch(segment):
            raise ValueError(f"`{segment}` is no name of a module")


class Pattern:
    """One brace-free pattern, compiled."""

    __slots__ = ("_regex", "text")

    def __init__(self, text: str):
        self.text = text
        names = (r"[^.]+" if name == "*" else re.escape(name) for name in text.split("."))
        self._regex = re.compile(r"\.".join(names) + r"(?:\.|\Z)")

    def matches(self, name: str) -> bool:
        return self._regex.match(name) is not None


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a valid pattern matches, in their order."""
    compiled = [Pattern(text) for text in expand(pattern)]
    return [name for name in names if any(p.matches(name) for p in compiled)]


def generalised(name: str) -> str:
    """`model.layers.3.mlp` -> `model.layers.*.mlp`: layers that differ by number look alike."""
    return NUMBER.sub("*", name)


def first_stray(pattern: str, names: Iterable[str]) -> tuple[str, str, list[str]]:
    """Where a brace-free pattern that matches nothing goes astray.

    -> (the part that still matches, the first name that does not, the names that exist there).
    """
    names, segments = list(names), pattern.split(".")
    kept: list[str] = []
    for segment in segments:
        if not matching(".".join([*kept, segment]), names):
            return ".".join(kept), segment, sorted(set(_children(kept, names)))
        kept.append(segment)
    raise AssertionError(f"{pattern=} matches")


def _children(kept: list[str], names: list[str]) -> Iterator[str]:
    """What may follow the segments `kept`, with numbers as `*`."""
    inside = matching(".".join(kept), names) if kept else names
    for name in inside:
        segments = generalised(name).split(".")
        if len(segments) > len(kept):
            yield segments[len(kept)]
