"""Errors: what people see, and the table of codes that planning refuses with."""

from __future__ import annotations

import ast
import re

import pytest
from guards import ROOT, sources

from tpx.errors import PlanError, TpxError
from tpx.plan.codes import CODES, PROOFS, READING

# Raise errors for flags, measurements, a checkpoint cut before, the Hub or a search, not for what a
# plan says.
OTHERS = {"auto", "wants", "links", "topology", "device", "explain", "cost", "why", "diff"}
OTHERS |= {"hf", "hf_form", "hf_export", "fetch", "manifest", "presharded"}


def calls(text: str):
    """Every call that makes a PlanError or CheckpointError."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in ("PlanError", "CheckpointError"):
                yield node


def uncoded(files: dict[str, str]) -> list[str]:
    return [
        f"{path}:{node.lineno}"
        for path, text in files.items()
        for node in calls(text)
        if not any(keyword.arg == "code" for keyword in node.keywords)
    ]


def proving() -> dict[str, str]:
    """The files that refuse a plan for what it says."""
    files = sources(ROOT / "tpx", "plan")
    kept = {path: text for path, text in files.items() if path[5:-3] not in OTHERS}
    return kept | {"mesh.py": (ROOT / "tpx" / "mesh.py").read_text()}


def test_every_refusal_of_a_plan_has_a_code():
    assert uncoded(proving()) == []
    assert uncoded({"a.py": "PlanError('a', 'b')"}) == ["a.py:1"]
    assert uncoded({"a.py": "PlanError('a', 'b', code='P101')"}) == []


def test_the_table_of_codes_is_complete_and_every_code_is_used():
    files = proving()
    said = {code for path, text in files.items() if "codes" not in path
            for code in re.findall(r'"(P[0-9]{3})"', text)}  # fmt: skip
    assert said == CODES.keys()
    assert len(set(CODES.values())) == len(CODES)
    assert list(CODES) == sorted(CODES)
    text = files["plan/codes.py"]
    assert len(re.findall(r'^    "P[0-9]{3}": ', text, re.MULTILINE)) == len(CODES)


def test_each_code_belongs_to_one_proof_or_to_reading():
    listed = [code for codes in (*PROOFS.values(), READING) for code in codes]
    assert sorted(listed) == sorted(CODES)
    assert list(PROOFS) == [f"C{n}" for n in range(1, 15)]


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (TpxError("m"), "error: m"),
        (TpxError("m", "h"), "error: m\n\nhint: h"),
        (PlanError("m", "h", code="P201"), "error[P201]: m\n\nhint: h"),
    ],
)
def test_an_error_is_shown_with_its_code_and_hint(error, shown):
    assert error.render() == shown


def test_docs_list_every_code():
    text = (ROOT / "docs" / "plans.md").read_text()
    assert re.findall(r"^\| `(P[0-9]{3})` \| (.*) \|$", text, re.MULTILINE) == list(CODES.items())


def test_a_code_survives_the_way_between_ranks():
    from tpx.agree import difference

    said = {"hint": "h", "code": "P201", "exit_code": 2}
    error = difference([{"given": {}}, {"error": ["PlanError", "m", said]}])
    assert error.render() == "error[P201]: rank `1`: m\n\nhint: h"
