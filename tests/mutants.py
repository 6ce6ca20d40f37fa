"""All single edits of a plan, what the checker says of each, and what running it shows.

The checker: accepted, unsound (P1 to P3) or unclear (P4). The oracle resolves with proofs off and
runs on real ranks (tests/oracle.py): right, wrong, or no meaning where there is nothing to run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from make_checkpoint import make_checkpoint
from oracle import Model, Oracle
from parity import config

from tpx.errors import PlanError
from tpx.mesh import AXES, Mesh
from tpx.plan.load import parse_plan
from tpx.plan.proofs import prove
from tpx.plan.types import DISPATCHES, STYLES, Plan, Rule
from tpx.plan.write import to_yaml

# Edits that the checker once accepted although the plan ran wrongly, or called unsound although it
# ran rightly: (plan, kind, edit). A sample always has them.
SLIPPED: tuple[tuple[str, str, str], ...] = (
    ("dp2-ep2-gather", "mesh factor moved", "a factor 2 from ep to etp"),
    ("ep4", "dispatch swapped", "auto -> all_to_all"),
    ("dp2-tp2-ep2-etp2", "mesh factor moved", "a factor 2 from etp to ep"),
)
# Checkpoints that the oracle runs on, by what is awkward about them: blocks that etp does not
# divide and a rank without one; heads and experts that tp and ep do not divide.
CHECKPOINTS = {
    "3 blocks": config(64, 3, 4, 2, heads=8, kv_heads=2, head_dim=8, vocab=131),
    "6 heads, 6 experts": config(64, 4, 6, 2, heads=6, kv_heads=2, head_dim=8, vocab=131),
}


class Mutant(NamedTuple):
    """One edit of a shipped plan. text: the file. taken: as the oracle takes it at its word; None
    where it has no meaning: no such mesh, a word that nobody knows."""

    plan: str
    kind: str
    edit: str
    text: str
    taken: Plan | None

    @property
    def name(self) -> tuple[str, str, str]:
        return self.plan, self.kind, self.edit


class Verdict(NamedTuple):
    """checker: accepted, unsound or unclear. oracle: right, wrong or no meaning. Each with why."""

    checker: str
    reason: str
    oracle: str
    why: str

    @property
    def fault(self) -> str | None:
        """A gate that it breaks."""
        if self.checker == "accepted" and self.oracle != "right":
            return f"accepted, but {self.oracle}"
        if self.checker == "unsound" and self.oracle == "right":
            return "called unsound, but right"
        return None


def mutants(plan: Plan, name: str) -> list[Mutant]:
    """Every single edit of a shipped plan, each once."""
    edits = (_styles, _factors, _dispatches, _dropped, _doubled, _swapped, _typos, _uneven)
    return [mutant for edit in edits for mutant in edit(plan, name)]


def _made(plan: Plan, name: str, kind: str, edit: str, rules: list[Rule]) -> Mutant:
    taken = Plan(plan.path, plan.model, plan.mesh, tuple(rules), plan.limits)
    return Mutant(name, kind, edit, to_yaml(taken), taken)


def _replaced(plan: Plan, at: int, rule: Rule) -> list[Rule]:
    return [rule if i == at else other for i, other in enumerate(plan.rules)]


def _styled(rule: Rule, like: Rule) -> Rule:
    """`rule` with the style and options of `like`."""
    return Rule(rule.pattern, like.style, rule.line, like.dispatch, like.uneven)


def _styles(plan: Plan, name: str) -> Iterator[Mutant]:
    for i, rule in enumerate(plan.rules):
        for style in STYLES:
            if style != rule.style:
                changed = Rule(rule.pattern, style, rule.line)
                edit = f"{rule.pattern}: {rule.style} -> {style}"
                yield _made(plan, name, "style swapped", edit, _replaced(plan, i, changed))


def _factors(plan: Plan, name: str) -> Iterator[Mutant]:
    """Each prime factor of an axis goes to each other axis."""
    sizes = {axis: getattr(plan.mesh, axis) for axis in AXES}
    for source, target in itertools.permutations(AXES, 2):
        for prime in (2, 3):
            if sizes[source] % prime == 0:
                moved = sizes | {
                    source: sizes[source] // prime,
                    target: sizes[target] * prime,
                }
                edit = f"a factor {prime} from {source} to {target}"
                shown = ", ".join(f"{a}: {n}" for a, n in moved.items() if n > 1) or "tp: 1"
                lines = to_yaml(plan).splitlines(keepends=True)
                text = "".join(
                    f"mesh: {{{shown}}}\n" if line.startswith("mesh:") else line for line in lines
                )
                mesh = forced_mesh(moved)
                taken = mesh and Plan(plan.path, plan.model, mesh, plan.rules, plan.limits)
                yield Mutant(name, "mesh factor moved", edit, text, taken)


def forced_mesh(sizes: dict[str, int]) -> Mesh | None:
    """A mesh whatever its laws say; None where the two views have different sizes."""
    dense, expert = sizes["dp"] * sizes["tp"], sizes["edp"] * sizes["ep"] * sizes["etp"]
    if dense != expert:
        return None
    mesh = object.__new__(Mesh)
    for axis, size in sizes.items():
        object.__setattr__(mesh, axis, size)
    return mesh


def _dispatches(plan: Plan, name: str) -> Iterator[Mutant]:
    for i, rule in enumerate(plan.rules):
        for word in DISPATCHES if rule.style == "expert" else ():
            if word != rule.dispatch:
                changed = Rule(rule.pattern, rule.style, rule.line, word, rule.uneven)
                edit = f"{rule.dispatch} -> {word}"
                yield _made(plan, name, "dispatch swapped", edit, _replaced(plan, i, changed))


def _dropped(plan: Plan, name: str) -> Iterator[Mutant]:
    for i, rule in enumerate(plan.rules):
        kept = [other for j, other in enumerate(plan.rules) if j != i]
        yield _made(plan, name, "rule dropped", rule.pattern, kept)


def _doubled(plan: Plan, name: str) -> Iterator[Mutant]:
    """Word for word, and as one of its own alternatives."""
    for rule in plan.rules:
        yield _made(plan, name, "rule doubled", rule.pattern, [*plan.rules, rule])
        head, brace, tail = rule.pattern.partition("{")
        if brace:
            first, end = tail.split(",")[0], tail.partition("}")[2]
            again = Rule(f"{head}{first}{end}", rule.style, 0, rule.dispatch, rule.uneven)
            yield _made(plan, name, "rule doubled", again.pattern, [*plan.rules, again])


def _swapped(plan: Plan, name: str) -> Iterator[Mutant]:
    """The styles of two rules change places."""
    for (i, one), (j, two) in itertools.combinations(enumerate(plan.rules), 2):
        if one.style != two.style:
            rules = list(plan.rules)
            rules[i], rules[j] = _styled(one, two), _styled(two, one)
            edit = f"{one.pattern} <-> {two.pattern}"
            yield _made(plan, name, "two rules swapped", edit, rules)


def _typos(plan: Plan, name: str) -> Iterator[Mutant]:
    """A letter too many in each name of a pattern, each style, and each other word of the file."""
    text = to_yaml(plan)
    for i, rule in enumerate(plan.rules):
        names = rule.pattern.split(".")
        for j, word in enumerate(names):
            if word != "*":
                typo = ".".join([*names[:j], f"{word}x", *names[j + 1 :]])
                changed = Rule(typo, rule.style, rule.line, rule.dispatch, rule.uneven)
                yield _made(plan, name, "typo", typo, _replaced(plan, i, changed))
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        words = line.partition(":")[2] if line.startswith(("  ", "model:")) else line
        words = words.replace("{", " ").replace("}", " ").replace(",", " ").replace(":", " ")
        for word in dict.fromkeys(words.split()):
            if word[0].isalpha():
                at = line.index(word, line.index(":") if line.startswith(("  ", "model:")) else 0)
                typo = f"{line[:at]}{word}x{line[at + len(word) :]}"
                wrong = "".join([*lines[:number], typo, *lines[number + 1 :]])
                yield Mutant(name, "typo", typo.strip(), wrong, None)


def _uneven(plan: Plan, name: str) -> Iterator[Mutant]:
    for i, rule in enumerate(plan.rules):
        if rule.style == "expert":
            changed = Rule(rule.pattern, rule.style, rule.line, rule.dispatch, not rule.uneven)
            edit = f"{rule.uneven} -> {not rule.uneven}"
            yield _made(plan, name, "uneven flipped", edit, _replaced(plan, i, changed))


def checker(text: str, world: int, model: Model) -> tuple[str, str]:
    """-> (accepted, unsound or unclear; the code and message)."""
    try:
        plan = parse_plan(text, "mutant.yaml")
        prove(plan, model.spec, model.layout, model.index, world, model.family)
    except PlanError as error:
        code = str(error.code)
        return "unclear" if code.startswith("P4") else "unsound", f"{code} {error.message}"
    return "accepted", ""


def judge(mutant: Mutant, world: int, oracle: Oracle) -> Verdict:
    """Both verdicts. world: of the plan without the edit."""
    said, reason = checker(mutant.text, world, oracle.model)
    if mutant.taken is None or mutant.taken.mesh.world != world:
        return Verdict(said, reason, "no meaning", "no such mesh or word")
    shown, why = oracle.run(mutant.taken)
    return Verdict(said, reason, shown, why)


def make(folder: Path, name: str) -> Path:
    """Writes one of CHECKPOINTS."""
    make_checkpoint(folder, CHECKPOINTS[name], seed=3)
    return folder
