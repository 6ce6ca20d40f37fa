"""YAML as plans are written: mappings and plain words, each with its line; all else is an error.

PyYAML's own loaders drop duplicate keys, read 010 as 8 and follow anchors; this reads its event
stream instead, and keeps every scalar as the text that was written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import yaml

from ..errors import PlanError

MOST_BYTES = 1_000_000
MOST_LEVELS = 32


@dataclass(frozen=True, slots=True)
class Scalar:
    text: str
    line: int
    plain: bool  # written without quotes


@dataclass(frozen=True, slots=True)
class Sequence:
    items: tuple[Node, ...]
    line: int


@dataclass(frozen=True, slots=True)
class Mapping:
    items: tuple[tuple[Scalar, Node], ...]
    line: int


Node = Scalar | Sequence | Mapping


def read_yaml(data: bytes, name: str) -> Node:
    """The document in `data`, which messages call plan `name`. Raises PlanError with the line."""
    if len(data) > MOST_BYTES:
        raise PlanError(
            f"plan `{name}` has {len(data):,} bytes, more than {MOST_BYTES:,}",
            "a plan is a page of text; is this the right file?",
            code="P411",
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise PlanError(
            f"plan `{name}`, line {line}: a byte that is not UTF-8",
            "save the file as UTF-8",
            code="P411",
        ) from error
    try:
        return _document(yaml.parse(text, Loader=yaml.SafeLoader), name)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise PlanError(
            f"plan `{name}`, line {line}: this is not YAML: {error.problem or error.context}",
            "write one `name: value` a line",
            code="P411",
        ) from error
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise PlanError(
            f"plan `{name}`, line {line}: a character that YAML does not allow",
            "delete it",
            code="P411",
        ) from error


def _document(events: Iterator[yaml.Event], name: str) -> Node:
    found: Node | None = None
    for event in events:
        if isinstance(event, yaml.DocumentStartEvent):
            if found is not None:
                raise _wrong(name, event, "a second document", "keep one plan in a file")
            event = next(events)
            found = _node(event, events, name, 1)
    if found is None or (isinstance(found, Scalar) and not found.text):
        raise PlanError(
            f"plan `{name}` is empty",
            "start from a copy of a shipped plan, such as `tp2-ep2`",
            code="P411",
        )
    return found


def _node(event: yaml.Event, events: Iterator[yaml.Event], name: str, level: int) -> Node:
    if isinstance(event, yaml.AliasEvent):
        raise _wrong(name, event, f"an alias, `*{event.anchor}`", "write the value out")
    assert isinstance(event, yaml.NodeEvent)
    if event.anchor is not None:
        raise _wrong(name, event, f"an anchor, `&{event.anchor}`", "write the value out")
    tag = getattr(event, "tag", None)
    if tag is not None:
        raise _wrong(name, event, f"a tag, `{tag}`", "delete it")
    if level > MOST_LEVELS:
        raise _wrong(name, event, f"more than {MOST_LEVELS} levels", "a plan has three")
    line = _line(event)
    if isinstance(event, yaml.ScalarEvent):
        return Scalar(event.value, line, event.style is None)
    if isinstance(event, yaml.SequenceStartEvent):
        return Sequence(tuple(_sequence(events, name, level)), line)
    return Mapping(tuple(_mapping(events, name, level)), line)


def _sequence(events: Iterator[yaml.Event], name: str, level: int) -> Iterator[Node]:
    while not isinstance(event := next(events), yaml.SequenceEndEvent):
        yield _node(event, events, name, level + 1)


def _mapping(events: Iterator[yaml.Event], name: str, level: int) -> Iterator[tuple[Scalar, Node]]:
    lines: dict[str, int] = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        key = _node(event, events, name, level + 1)
        if not isinstance(key, Scalar):
            raise _wrong(name, event, "a key that is not a word", "write `name: value`")
        if key.text in lines:
            raise PlanError(
                f"plan `{name}`, line {key.line}: key `{key.text}` is already on line "
                f"{lines[key.text]}",
                "delete one of the two",
                code="P403",
            )
        lines[key.text] = key.line
        yield key, _node(next(events), events, name, level + 1)


def _wrong(name: str, event: yaml.Event, what: str, hint: str) -> PlanError:
    message = f"plan `{name}`, line {_line(event)}: {what}, which plans do not have"
    return PlanError(message, hint, code="P411")


def _line(event: yaml.Event) -> int:
    assert event.start_mark is not None
    return event.start_mark.line + 1
