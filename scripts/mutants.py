"""Judges every single edit of every shipped plan and writes the table into docs/plans.md.

    python scripts/mutants.py                # all plans, all checkpoints; exits with 1 at a fault
    python scripts/mutants.py --plan tp2-ep2 --dry-run

An edit has two verdicts: the checker's, and that of a real run of the plan on gloo ranks with the
proofs off (tests/oracle.py). See docs/plans.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from mutants import CHECKPOINTS, Mutant, Verdict, judge, make, mutants  # noqa: E402
from oracle import Oracle  # noqa: E402

from tpx.plan.codes import CODES  # noqa: E402
from tpx.plan.find import shipped_plans  # noqa: E402
from tpx.plan.load import load_plan  # noqa: E402

PAGE = ROOT / "docs" / "plans.md"
BEGIN, END = "<!-- mutants: begin -->\n", "<!-- mutants: end -->\n"
CHECKER, ORACLE = ("accepted", "unsound", "unclear"), ("right", "wrong", "no meaning")
Judged = list[tuple[Mutant, Verdict]]


def judge_all(names: Iterable[str]) -> dict[str, Judged]:
    """By checkpoint."""
    plans = {name: load_plan(path) for name, path in shipped_plans("gpt_oss").items()}
    found: dict[str, Judged] = {}
    for checkpoint in CHECKPOINTS:
        with tempfile.TemporaryDirectory() as folder:
            oracle = Oracle(make(Path(folder), checkpoint))
            judged: Judged = []
            for name in sorted(names, key=lambda name: plans[name].mesh.world):
                begin, runs = time.monotonic(), oracle.runs
                edits = mutants(plans[name], name)
                judged += [(edit, judge(edit, plans[name].mesh.world, oracle)) for edit in edits]
                print(
                    f"{checkpoint}: {name}: {len(edits)} edits, {oracle.runs - runs} runs, "
                    f"{time.monotonic() - begin:.1f} s",
                    flush=True,
                )
            found[checkpoint] = judged
    return found


def table(judged: Judged) -> list[str]:
    """A row a kind of edit: how many have each pair of verdicts."""
    pairs = [(said, shown) for said in CHECKER for shown in ORACLE]
    count: Counter[tuple[str, str, str]] = Counter()
    for mutant, verdict in judged:
        count[mutant.kind, verdict.checker, verdict.oracle] += 1
    kinds = list(dict.fromkeys(mutant.kind for mutant, _ in judged))
    lines = [
        "| edit | edits | accepted: right | wrong | no meaning | unsound: right | wrong "
        "| no meaning | unclear: right | wrong | no meaning |",
        "|---|" + "---:|" * 10,
    ]
    for kind in kinds:
        cells = [count[kind, *pair] for pair in pairs]
        lines.append(f"| {kind} | {sum(cells)} | {' | '.join(map(str, cells))} |")
    total = [sum(count[kind, *pair] for kind in kinds) for pair in pairs]
    lines.append(f"| **all** | {sum(total)} | {' | '.join(map(str, total))} |")
    return lines


def reasons(judged: Judged) -> list[str]:
    """Edits that run rightly and are called unclear, by code, each with the first one."""
    by_code: dict[str, list[Mutant]] = defaultdict(list)
    for mutant, verdict in judged:
        if (verdict.checker, verdict.oracle) == ("unclear", "right"):
            by_code[verdict.reason.split()[0]].append(mutant)
    lines = ["| code | why it is refused | edits | one of them |", "|---|---|---:|---|"]
    for code, found in sorted(by_code.items()):
        one = found[0]
        lines.append(
            f"| {code} | {CODES[code]} | {len(found)} | {one.plan}, {one.kind}: `{one.edit}` |"
        )
    return lines


def page(found: dict[str, Judged]) -> str:
    every = [one for judged in found.values() for one in judged]
    wrong = sum(verdict.oracle != "right" for _, verdict in every)
    lines = [
        f"All single edits of the {len({m.plan for m, _ in every})} shipped plans, on "
        f"{len(found)} checkpoints ({'; '.join(found)}): {len(every):,} edits, of which {wrong:,} "
        "run wrongly or mean nothing.",
        "",
        *table(every),
        "",
        "Edits that run rightly and are refused all the same, as unclear:",
        "",
        *reasons(every),
    ]
    return "\n".join(lines) + "\n"


def write_page(text: str) -> None:
    whole = PAGE.read_text()
    before, _, rest = whole.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert rest, f"{PAGE} has no {BEGIN!r}"
    PAGE.write_text(f"{before}{BEGIN}{text}{END}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", action="append", choices=list(shipped_plans("gpt_oss")))
    parser.add_argument("--dry-run", action="store_true", help="print, and write nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.monotonic()
    found = judge_all(args.plan or shipped_plans("gpt_oss"))
    text = page(found)
    print(text)
    if not args.dry_run:
        write_page(text)
    faults = [
        f"{checkpoint}: {mutant.name}: {verdict}"
        for checkpoint, judged in found.items()
        for mutant, verdict in judged
        if verdict.fault
    ]
    print(f"{len(faults)} faults in {time.monotonic() - begin:.0f} s", *faults, sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
