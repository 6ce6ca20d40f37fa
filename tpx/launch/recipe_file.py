"""A recipe's file -> Recipe: each mistake with its line."""

from __future__ import annotations

from typing import NamedTuple

from ..errors import PlanError, did_you_mean
from ..plan.device import DEVICES
from ..plan.load import NUMBER
from ..plan.strict_yaml import Mapping, Node, Scalar, read_yaml

KEYS = ("tpx", "model", "plan", "device", "nodes", "ranks", "options", "environment", "verified")
NEEDED = ("tpx", "model", "plan", "device", "ranks", "verified")
VERIFIED = ("date", "versions", "figure")
SEE = "see the recipes in `launch/`"


class Verified(NamedTuple):
    """date: of the run; versions: of what it ran on; figure: what was measured."""

    date: str
    versions: str
    figure: str


class Recipe(NamedTuple):
    """ranks: of all machines together. options: flags of `tpx launch`, without their dashes.
    verified: None where nobody has run it on that hardware."""

    name: str
    model: str
    plan: str
    device: str
    nodes: int
    ranks: int
    options: dict[str, str]
    environment: dict[str, str]
    verified: Verified | None

    def flags(self) -> dict[str, str]:
        """By name, without dashes; `true` for one that takes no value."""
        ranks = {"nnodes": str(self.nodes), "nproc": str(self.ranks // self.nodes)}
        return {"model": self.model, "tp-plan": self.plan, **ranks, **self.options}


def read_recipe(data: bytes, name: str) -> Recipe:
    """The recipe in `data`, which messages call `name`. Raises PlanError with the line."""
    try:
        node = read_yaml(data, name)
    except PlanError as error:
        message = error.message.replace("plan", "recipe", 1).replace("which plans", "which recipes")
        hint = error.hint if "plan" not in (error.hint or "plan") else SEE
        raise PlanError(message, hint) from None
    fields = mapping(name, "recipe", node, KEYS)
    for key in NEEDED:
        if key not in fields:
            raise PlanError(f"recipe `{name}` has no `{key}`", SEE)
    text = {key: word(name, key, fields[key]) for key in NEEDED if key != "verified"}
    if text["tpx"] != "1":
        raise wrong(name, "tpx", fields["tpx"], "version `1`, the only one there is")
    if text["device"] not in DEVICES:
        hint = did_you_mean(text["device"], DEVICES)
        raise wrong(name, "device", fields["device"], "a device that is known", hint)
    ranks = number(name, "ranks", fields["ranks"])
    nodes = number(name, "nodes", fields["nodes"]) if "nodes" in fields else 1
    if ranks % nodes:
        raise wrong(name, "ranks", fields["ranks"], f"a multiple of `nodes`, {nodes}")
    return Recipe(
        name,
        text["model"],
        text["plan"],
        text["device"],
        nodes,
        ranks,
        texts(name, "options", fields),
        texts(name, "environment", fields),
        verified(name, fields["verified"]),
    )


def mapping(name: str, key: str, node: Node, known: tuple[str, ...] = ()) -> dict[str, Node]:
    if not isinstance(node, Mapping):
        raise wrong(name, key, node, "a mapping")
    for entry, _ in node.items:
        if known and entry.text not in known:
            raise PlanError(
                f"recipe `{name}`, line {entry.line}: unknown key `{entry.text}`",
                did_you_mean(entry.text, known),
            )
    return {entry.text: value for entry, value in node.items}


def word(name: str, key: str, node: Node) -> str:
    if not isinstance(node, Scalar) or not node.text:
        raise wrong(name, key, node, "a word")
    return node.text


def number(name: str, key: str, node: Node) -> int:
    text = node.text if isinstance(node, Scalar) and node.plain else ""
    if not NUMBER.fullmatch(text) or text == "0":
        raise wrong(name, key, node, "a whole number from 1 up")
    return int(text)


def texts(name: str, key: str, fields: dict[str, Node]) -> dict[str, str]:
    """A mapping of words to words; empty where it is left out."""
    if key not in fields:
        return {}
    found = mapping(name, key, fields[key])
    return {inner: word(name, inner, value) for inner, value in found.items()}


def verified(name: str, node: Node) -> Verified | None:
    if isinstance(node, Scalar) and node.plain and node.text == "null":
        return None
    fields = mapping(name, "verified", node, VERIFIED)
    for key in VERIFIED:
        if key not in fields:
            raise wrong(name, "verified", node, f"with a `{key}`", "write `null` until it was run")
    return Verified(*(word(name, key, fields[key]) for key in VERIFIED))


def wrong(name: str, key: str, node: Node, wanted: str, hint: str | None = None) -> PlanError:
    found = f"`{node.text}`" if isinstance(node, Scalar) and node.text else "something else"
    if isinstance(node, Scalar) and not node.text:
        found = "empty"
    return PlanError(f"recipe `{name}`, line {node.line}: `{key}` is {found}, not {wanted}", hint)
