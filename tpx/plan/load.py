"""A plan file -> Plan: the grammar of plans, each mistake with its file and line.

Knows no checkpoint: whether the rules fit a model is proved elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from ..errors import PlanError, did_you_mean
from ..mesh import AXES, Mesh
from .patterns import expand
from .strict_yaml import Mapping, Node, Scalar, Sequence, read_yaml
from .types import DISPATCHES, STYLES, Limits, Plan, Rule

TOP_LEVEL = ("tpx", "model", "mesh", "modules", "limits")
EXAMPLES = {
    "tpx": "`tpx: 1`",
    "model": "`model:` with the `model_type` of `config.json`",
    "mesh": "`mesh: {tp: 2, ep: 2}`",
    "modules": "`modules:` with one `pattern: style` a line below it, indented",
    "limits": "`limits: {memory: 80GB}`",
}
NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")
SHARE = re.compile(r"0|1|0\.[0-9]+")
BYTES = re.compile(r"([1-9][0-9]{0,17}) ?(|[KMGT]i?B)")
UNITS: dict[str, int] = {"": 1} | {
    f"{letter}{i}B": (1024 if i else 1000) ** power
    for power, letter in enumerate("KMGT", start=1)
    for i in ("", "i")
}


def read_size(text: str) -> int | None:
    """The bytes of `80GB`, `80GiB` or a bare number; None where it is none of them."""
    match = BYTES.fullmatch(text)
    return int(match[1]) * UNITS[match[2]] if match else None


def load_plan(path: Path, name: str | None = None) -> Plan:
    """The plan in a file, which messages call `name` (default: its path). Raises PlanError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PlanError(
            f"plan file `{path}` cannot be read: {error.strerror}",
            "give a path to a .yaml file, or a shipped plan's name",
            code="P412",
        ) from error
    return _plan(read_yaml(data, name or str(path)), name or str(path))


def parse_plan(text: str, name: str) -> Plan:
    """The plan in `text`, which messages call `name`. Raises PlanError."""
    return _plan(read_yaml(text.encode(), name), name)


class Field(NamedTuple):
    """A key of the file and what stands there; `plan` is the plan's name, for messages."""

    plan: str
    key: str
    node: Node

    def wrong(self, wanted: str, hint: str | None = None) -> PlanError:
        found = {Mapping: "a mapping", Sequence: "a list"}.get(type(self.node))
        if isinstance(self.node, Scalar):
            found = f"`{self.node.text}`" if self.node.text else "empty"
        return PlanError(
            f"plan `{self.plan}`, line {self.node.line}: `{self.key}` is {found}, not {wanted}",
            hint,
            code="P409",
        )

    def mapping(self, known: Collection[str] | None = None) -> dict[str, Field]:
        """Its fields by key; with `known`, any other key is an error."""
        if not isinstance(self.node, Mapping):
            hint = f"write {EXAMPLES[self.key]}" if self.key in EXAMPLES else None
            raise self.wrong("a mapping", hint)
        for key, _ in self.node.items:
            if known is not None and key.text not in known:
                inside = f" in `{self.key}`" if self.key else ""
                raise PlanError(
                    f"plan `{self.plan}`, line {key.line}: unknown key `{key.text}`{inside}",
                    did_you_mean(key.text, known),
                    code="P401",
                )
        return {key.text: Field(self.plan, key.text, value) for key, value in self.node.items}

    def word(self, choices: Collection[str] | None = None) -> str:
        if not isinstance(self.node, Scalar) or not self.node.text:
            raise self.wrong("a word")
        if choices is not None and self.node.text not in choices:
            hint = did_you_mean(self.node.text, choices)
            raise PlanError(
                f"plan `{self.plan}`, line {self.node.line}: unknown {self.key} `{self.node.text}`",
                hint,
                code="P401",
            )
        return self.node.text

    def integer(self) -> int:
        if not isinstance(self.node, Scalar) or not NUMBER.fullmatch(self._plain()):
            raise self.wrong(
                "a whole number in plain decimal",
                "write digits alone: no leading zero, sign, quotes or underscores",
            )
        return int(self._plain())

    def share(self) -> float:
        if not SHARE.fullmatch(self._plain()):
            raise self.wrong("a share from 0 to 1", "write it as `0.02`")
        return float(self._plain())

    def nbytes(self) -> int:
        count = read_size(self._plain())
        if count is None:
            raise self.wrong("a number of bytes", "write it as `80GB` or `80GiB`")
        return count

    def flag(self) -> bool:
        if self._plain() not in ("true", "false"):
            raise self.wrong("`true` or `false`")
        return self._plain() == "true"

    def _plain(self) -> str:
        return self.node.text if isinstance(self.node, Scalar) and self.node.plain else ""


def _plan(node: Node, name: str) -> Plan:
    if not isinstance(node, Mapping):
        raise PlanError(
            f"plan `{name}`, line {node.line}: a plan is a mapping with the keys "
            "`tpx`, `model`, `mesh` and `modules`",
            "start from a copy of a shipped plan, such as `tp2-ep2`",
            code="P411",
        )
    fields = Field(name, "", node).mapping(TOP_LEVEL)
    for key in TOP_LEVEL[:4]:
        if key not in fields:
            raise PlanError(f"plan `{name}` has no `{key}`", f"add {EXAMPLES[key]}", code="P410")
    if fields["tpx"].word() != "1":
        raise fields["tpx"].wrong("version `1`, the only one there is", "write `tpx: 1`")
    limits = fields.get("limits")
    rules = _rules(fields["modules"])
    return Plan(
        path=name,
        model=fields["model"].word(),
        mesh=_mesh(fields["mesh"], rules),
        rules=rules,
        limits=_limits(limits) if limits else Limits(),
    )


def _mesh(field: Field, rules: tuple[Rule, ...]) -> Mesh:
    sizes = {axis: size.integer() for axis, size in field.mapping(AXES).items()}
    try:
        return Mesh(**sizes)
    except PlanError as error:
        message = f"plan `{field.plan}`, line {field.node.line}: {error.message}"
        code = error.code
        if code == "P305" and any(rule.dispatch == "gather" for rule in rules):
            code = "P417"  # gathered tokens are the same on all ranks, whatever the mesh
        raise PlanError(message, error.hint, code=code) from None


def _rules(field: Field) -> tuple[Rule, ...]:
    rules = tuple(_rule(field.plan, key, node) for key, node in _pairs(field))
    if not rules:
        raise field.wrong("a mapping of patterns to styles", f"write {EXAMPLES['modules']}")
    return rules


def _pairs(field: Field) -> tuple[tuple[Scalar, Node], ...]:
    field.mapping()
    assert isinstance(field.node, Mapping)
    return field.node.items


def _rule(plan: str, key: Scalar, node: Node) -> Rule:
    try:
        expand(key.text)
    except ValueError as error:
        raise PlanError(
            f"plan `{plan}`, line {key.line}: pattern `{key.text}` cannot be read: {error}",
            "`*` is one name between dots and `{a,b}` are alternatives; nothing else is special",
            code="P411",
        ) from None
    if not isinstance(node, Mapping):
        field = Field(plan, "style", node)
        if isinstance(node, Sequence):
            raise Field(plan, key.text, node).wrong("a style", f"write `{key.text}: colwise`")
        return Rule(key.text, field.word(STYLES), key.line)
    options = Field(plan, key.text, node).mapping(("style", "dispatch", "uneven"))
    if "style" not in options:
        raise PlanError(
            f"plan `{plan}`, line {key.line}: `{key.text}` has no `style`",
            "write `{style: expert}` with the other options beside it",
            code="P410",
        )
    style = options["style"].word(STYLES)
    for option in ("dispatch", "uneven"):
        if option in options and style != "expert":
            raise PlanError(
                f"plan `{plan}`, line {key.line}: `{option}` does not belong to style `{style}`",
                f"write `{key.text}: {style}`; `dispatch` and `uneven` go with `expert`",
                code="P413",
            )
    return Rule(
        key.text,
        style,
        key.line,
        options["dispatch"].word(DISPATCHES) if "dispatch" in options else "auto",
        options["uneven"].flag() if "uneven" in options else False,
    )


def _limits(field: Field) -> Limits:
    found = field.mapping(("memory", "context", "batch", "max_replicated"))
    return Limits(
        memory=found["memory"].nbytes() if "memory" in found else None,
        context=found["context"].integer() if "context" in found else None,
        batch=found["batch"].integer() if "batch" in found else None,
        max_replicated=found["max_replicated"].share() if "max_replicated" in found else None,
    )
