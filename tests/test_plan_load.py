"""Plan files: the grammar, and each mistake with its line, word for word."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from tpx.errors import PlanError
from tpx.mesh import Mesh
from tpx.plan.find import read_plan, shipped_plans
from tpx.plan.load import load_plan, parse_plan
from tpx.plan.types import DISPATCHES, Limits, Plan, Rule
from tpx.plan.write import to_yaml

HEAD = "tpx: 1\nmodel: m\nmesh: {tp: 2, ep: 2}\n"
GOOD = HEAD + "modules:\n  a: colwise\n"


def refusal(text: str) -> tuple[str, str | None]:
    with pytest.raises(PlanError) as error:
        parse_plan(text, "p.yaml")
    assert error.value.exit_code == 2
    return error.value.message, error.value.hint


def test_a_plan_is_rules_with_their_lines():
    text = HEAD + (
        "modules:\n"
        "  # a comment\n"
        "  a.*.{b,c}: colwise\n"
        "  d: {style: expert, dispatch: gather, uneven: true}\n"
        "limits: {memory: 80GB, context: 8192, batch: 4, max_replicated: 0.02}\n"
    )
    assert parse_plan(text, "p.yaml") == Plan(
        "p.yaml",
        "m",
        Mesh(tp=2, ep=2),
        (Rule("a.*.{b,c}", "colwise", 6), Rule("d", "expert", 7, "gather", True)),
        Limits(80_000_000_000, 8192, 4, 0.02),
    )


@pytest.mark.parametrize(
    ("said", "nbytes"),
    [("1024", 1024), ("16GiB", 16 << 30), ("70 GB", 70 * 10**9), ("3kB", None), ("1.5GB", None)],
)
def test_memory_is_a_number_with_a_unit(said, nbytes):
    text = f"{GOOD}limits: {{memory: {said}}}\n"
    if nbytes is None:
        assert (
            refusal(text)[0]
            == f"plan `p.yaml`, line 6: `memory` is `{said}`, not a number of bytes"
        )
    else:
        assert parse_plan(text, "p").limits.memory == nbytes


NUMBER_HINT = "write digits alone: no leading zero, sign, quotes or underscores"
COPY_HINT = "start from a copy of a shipped plan, such as `tp2-ep2`"
MISTAKES = {
    "empty file": ("", "plan `p.yaml` is empty", COPY_HINT),
    "only comments": ("# a\n", "plan `p.yaml` is empty", COPY_HINT),
    "a list at the top": (
        "- tpx: 1\n",
        "plan `p.yaml`, line 1: a plan is a mapping with the keys `tpx`, `model`, `mesh` and "
        "`modules`",
        COPY_HINT,
    ),
    "duplicate key": (
        GOOD + "  b: rowwise\n  a: rowwise\n",
        "plan `p.yaml`, line 7: key `a` is already on line 5",
        "delete one of the two",
    ),
    "leading zero": (
        "tpx: 1\nmodel: m\nmesh: {tp: 010}\nmodules: {a: colwise}\n",
        "plan `p.yaml`, line 3: `tp` is `010`, not a whole number in plain decimal",
        NUMBER_HINT,
    ),
    "hexadecimal": (
        "tpx: 1\nmodel: m\nmesh: {tp: 0x2}\nmodules: {a: colwise}\n",
        "plan `p.yaml`, line 3: `tp` is `0x2`, not a whole number in plain decimal",
        NUMBER_HINT,
    ),
    "quoted number": (
        'tpx: 1\nmodel: m\nmesh: {tp: "2"}\nmodules: {a: colwise}\n',
        "plan `p.yaml`, line 3: `tp` is `2`, not a whole number in plain decimal",
        NUMBER_HINT,
    ),
    "underscore": (
        "tpx: 1\nmodel: m\nmesh:\n  tp: 1_0\nmodules: {a: colwise}\n",
        "plan `p.yaml`, line 4: `tp` is `1_0`, not a whole number in plain decimal",
        NUMBER_HINT,
    ),
    "a list where a mapping belongs": (
        HEAD + "modules:\n  - a: colwise\n",
        "plan `p.yaml`, line 5: `modules` is a list, not a mapping",
        "write `modules:` with one `pattern: style` a line below it, indented",
    ),
    "mesh as a word": (
        "tpx: 1\nmodel: m\nmesh: tp2\nmodules: {a: colwise}\n",
        "plan `p.yaml`, line 3: `mesh` is `tp2`, not a mapping",
        "write `mesh: {tp: 2, ep: 2}`",
    ),
    "a list as style": (
        HEAD + "modules:\n  a: [colwise]\n",
        "plan `p.yaml`, line 5: `a` is a list, not a style",
        "write `a: colwise`",
    ),
    "no style": (
        HEAD + "modules:\n  a:\n",
        "plan `p.yaml`, line 5: `style` is empty, not a word",
        None,
    ),
    "no modules": (
        "tpx: 1\nmodel: m\nmesh: {tp: 1}\n",
        "plan `p.yaml` has no `modules`",
        "add `modules:` with one `pattern: style` a line below it, indented",
    ),
    "unknown top-level key": (
        GOOD + "module: {}\n",
        "plan `p.yaml`, line 6: unknown key `module`",
        "did you mean `modules` or `model`?",
    ),
    "unknown axis": (
        "tpx: 1\nmodel: m\nmesh: {pp: 2}\nmodules: {a: colwise}\n",
        "plan `p.yaml`, line 3: unknown key `pp` in `mesh`",
        "use `dp`, `tp`, `edp`, `ep` or `etp`",
    ),
    "unknown style": (
        HEAD + "modules:\n  a: colwize\n",
        "plan `p.yaml`, line 5: unknown style `colwize`",
        "did you mean `colwise`?",
    ),
    "unknown dispatch": (
        HEAD + "modules:\n  a: {style: expert, dispatch: alltoall}\n",
        "plan `p.yaml`, line 5: unknown dispatch `alltoall`",
        "did you mean `all_to_all`?",
    ),
    "dispatch without expert": (
        HEAD + "modules:\n  a: {style: vocab, dispatch: auto}\n",
        "plan `p.yaml`, line 5: `dispatch` does not belong to style `vocab`",
        "write `a: vocab`; `dispatch` and `uneven` go with `expert`",
    ),
    "options without style": (
        HEAD + "modules:\n  a: {uneven: true}\n",
        "plan `p.yaml`, line 5: `a` has no `style`",
        "write `{style: expert}` with the other options beside it",
    ),
    "uneven as yes": (
        HEAD + "modules:\n  a: {style: expert, uneven: yes}\n",
        "plan `p.yaml`, line 5: `uneven` is `yes`, not `true` or `false`",
        None,
    ),
    "another version": (
        GOOD.replace("tpx: 1", "tpx: 2"),
        "plan `p.yaml`, line 1: `tpx` is `2`, not version `1`, the only one there is",
        "write `tpx: 1`",
    ),
    "anchor": (
        HEAD + "modules:\n  a: &x colwise\n  b: *x\n",
        "plan `p.yaml`, line 5: an anchor, `&x`, which plans do not have",
        "write the value out",
    ),
    "alias": (
        HEAD + "modules:\n  a: *x\n",
        "plan `p.yaml`, line 5: an alias, `*x`, which plans do not have",
        "write the value out",
    ),
    "tag": (
        HEAD + "modules:\n  a: !!str colwise\n",
        "plan `p.yaml`, line 5: a tag, `tag:yaml.org,2002:str`, which plans do not have",
        "delete it",
    ),
    "a key that is a list": (
        HEAD + "modules:\n  [a, b]: colwise\n",
        "plan `p.yaml`, line 5: a key that is not a word, which plans do not have",
        "write `name: value`",
    ),
    "two documents": (
        GOOD + "---\na: b\n",
        "plan `p.yaml`, line 6: a second document, which plans do not have",
        "keep one plan in a file",
    ),
    "a tab": (
        HEAD + "modules:\n\ta: colwise\n",
        "plan `p.yaml`, line 5: this is not YAML: found character '\\t' that cannot start any "
        "token",
        "write one `name: value` a line",
    ),
    "NUL": (
        GOOD + "  b\0: colwise\n",
        "plan `p.yaml`, line 6: a character that YAML does not allow",
        "delete it",
    ),
    "a mesh that cannot be": (
        "tpx: 1\nmodel: m\nmesh: {tp: 2}\nmodules: {a: colwise}\n",
        "plan `p.yaml`, line 3: the mesh has two views of different sizes: dp 1 x tp 2 = 2, "
        "edp 1 x ep 1 x etp 1 = 1",
        "make dp*tp equal edp*ep*etp; an axis that is left out is 1",
    ),
    "half a star": (
        HEAD + "modules:\n  a.b*: colwise\n",
        "plan `p.yaml`, line 5: pattern `a.b*` cannot be read: `*` stands for a whole name "
        "between dots, not for a part: `b*`",
        "`*` is one name between dots and `{a,b}` are alternatives; nothing else is special",
    ),
    "open brace": (
        HEAD + 'modules:\n  "a.{b": colwise\n',
        "plan `p.yaml`, line 5: pattern `a.{b` cannot be read: its braces do not pair, or lie "
        "inside each other",
        "`*` is one name between dots and `{a,b}` are alternatives; nothing else is special",
    ),
    "empty alternative": (
        HEAD + 'modules:\n  "a.{b,}": colwise\n',
        "plan `p.yaml`, line 5: pattern `a.{b,}` cannot be read: a name between its dots, or in "
        "its braces, is empty",
        "`*` is one name between dots and `{a,b}` are alternatives; nothing else is special",
    ),
    "a regular expression": (
        HEAD + 'modules:\n  "a.[0-9]+": colwise\n',
        "plan `p.yaml`, line 5: pattern `a.[0-9]+` cannot be read: `[0-9]+` is no name of a module",
        "`*` is one name between dots and `{a,b}` are alternatives; nothing else is special",
    ),
    "too many alternatives": (
        HEAD + f'modules:\n  "{"{a,b}" * 9}": colwise\n',
        f"plan `p.yaml`, line 5: pattern `{'{a,b}' * 9}` cannot be read: it stands for more than "
        "256 names",
        "`*` is one name between dots and `{a,b}` are alternatives; nothing else is special",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_told_with_its_line(case):
    text, message, hint = MISTAKES[case]
    assert refusal(text) == (message, hint)


def test_a_file_of_more_than_a_megabyte_is_refused():
    assert (
        refusal("# " + "x" * 1_000_000)[0]
        == "plan `p.yaml` has 1,000,002 bytes, more than 1,000,000"
    )


@pytest.mark.parametrize("deep", ["[" * 100_000, "{a: " * 40 + "b" + "}" * 40])
def test_more_than_32_levels_are_refused(deep):
    assert refusal(HEAD + "modules: " + deep) == (
        "plan `p.yaml`, line 4: more than 32 levels, which plans do not have",
        "a plan has three",
    )


def test_bytes_that_are_not_utf8_have_a_line(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(HEAD.encode() + b"\xff\n")
    with pytest.raises(PlanError) as error:
        load_plan(path)
    assert error.value.message == f"plan `{path}`, line 4: a byte that is not UTF-8"


@settings(deadline=None)
@given(st.binary(max_size=60) | st.text(alphabet="tpx:1{}[]*&!-#'\"|>\n ,am", max_size=60))
def test_whatever_is_in_a_file_is_a_plan_or_a_plan_error(data):
    text = data.decode("latin-1") if isinstance(data, bytes) else data
    with pytest.raises(PlanError):
        parse_plan(text, "p.yaml")


def test_every_shipped_plan_is_written_back_as_the_same_plan():
    for name in shipped_plans("gpt_oss"):
        plan = read_plan(name, "gpt_oss")
        assert plan.path == f"plans/gpt_oss/{name}.yaml"
        again = parse_plan(to_yaml(plan, "a comment\nof two lines"), plan.path)
        assert [(r.pattern, r.style, r.dispatch, r.uneven) for r in again.rules] == [
            (r.pattern, r.style, r.dispatch, r.uneven) for r in plan.rules
        ]
        assert (again.mesh, again.limits, again.model) == (plan.mesh, plan.limits, plan.model)


@settings(deadline=None)
@given(
    memory=st.none() | st.integers(1, 10**15),
    context=st.none() | st.integers(1, 10**6),
    share=st.none() | st.integers(0, 1000).map(lambda n: n / 1000),
    rules=st.lists(
        st.tuples(st.sampled_from(["expert"]), st.sampled_from(DISPATCHES), st.booleans()),
        min_size=1,
        max_size=4,
    ),
)
def test_any_plan_is_written_back_as_the_same_plan(memory, context, share, rules):
    made = tuple(Rule(f"a{i}", *rule[:1], 5 + i, *rule[1:]) for i, rule in enumerate(rules))
    plan = Plan("p", "m", Mesh(tp=2, ep=2), made, Limits(memory, context, None, share))
    assert parse_plan(to_yaml(plan), "p") == plan
