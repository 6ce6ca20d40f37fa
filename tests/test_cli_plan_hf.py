"""`tpx plan import-hf` and `export-hf`: what they print, and wrong files word for word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from headers import layout_of, make_config, write_folder

from tpx.cli.main import main
from tpx.errors import PlanError
from tpx.plan.cuts import assign
from tpx.plan.find import read_plan
from tpx.plan.hf_form import read_form
from tpx.plan.load import parse_plan
from tpx.plan.types import Plan

CONFIG = make_config(num_key_value_heads=8, vocab_size=128)
EXPERTS = "layers.*.mlp.experts"
EP = dict.fromkeys((f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.gate_up_proj_bias"), "grouped_gemm")
EP |= dict.fromkeys((f"{EXPERTS}.down_proj", f"{EXPERTS}.down_proj_bias"), "grouped_gemm")
EP[EXPERTS] = "ep_dispatch_experts"  # with the four above transformers' own base_model_ep_plan


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "model", CONFIG)


def meaning(plan: Plan) -> object:
    """All that a plan says of a model, whatever its lines look like."""
    rules = assign(plan, layout_of(CONFIG)).rule_of
    return plan.mesh, {name: (r.style, r.dispatch, r.uneven) for name, r in rules.items()}


def tpx(capsys, *words: object) -> tuple[int, str, str]:
    code = main(["plan", *map(str, words)])
    out, error = capsys.readouterr()
    return code, out, error


def test_export_prints_a_config_of_theirs_and_import_reads_it(capsys, folder, tmp_path):
    code, out, error = tpx(capsys, "export-hf", "tp2-ep2", "--model", folder, "--json")
    assert (code, error) == (0, "")
    found = json.loads(out)
    assert list(found) == ["tp_size", "tp_plan", "ep_size", "ep_plan", "ep_implementation"]
    assert found["tp_plan"] == {
        "model.embed_tokens": "embedding_rowwise",
        "model.layers.*.self_attn.q_proj": "colwise",
        "model.layers.*.self_attn.k_proj": "colwise",
        "model.layers.*.self_attn.v_proj": "colwise",
        "model.layers.*.self_attn.o_proj": "rowwise",
        "model.layers.*.self_attn.sinks": "colwise",
        "model.layers.*.self_attn": "local_params",
        "lm_head": "colwise_gather_output",
    }
    assert found["ep_plan"] == {f"model.{key}": word for key, word in EP.items()}
    assert (found["tp_size"], found["ep_size"], found["ep_implementation"]) == (2, 2, "auto")
    (tmp_path / "theirs.json").write_text(out)
    target = tmp_path / "ours.yaml"
    code, out, error = tpx(capsys, "import-hf", tmp_path / "theirs.json", "--model", folder,
                           "--out", target)  # fmt: skip
    assert (code, out, error) == (0, "", "")
    assert target.read_text().startswith(f"# imported from {tmp_path}/theirs.json\ntpx: 1\n")
    assert meaning(read_plan(str(target), "gpt_oss")) == meaning(read_plan("tp2-ep2", "gpt_oss"))


def test_export_prints_python_that_says_the_same(capsys, folder):
    _, code, _ = tpx(capsys, "export-hf", "ep2", "--model", folder)
    _, text, _ = tpx(capsys, "export-hf", "ep2", "--model", folder, "--json")
    head, _, call = code.partition("\n\n")
    assert head == "from transformers.distributed import DistributedConfig"
    given: dict[str, object] = {}
    exec(call, {"DistributedConfig": dict}, given)
    assert given["distributed_config"] == json.loads(text)
    assert json.loads(text)["tp_plan"]["lm_head"] == "replicate"  # theirs cuts it by default
    _, text, _ = tpx(capsys, "export-hf", "tp2", "--model", folder, "--json")
    assert json.loads(text).keys() == {"tp_size", "tp_plan"}


def test_a_configs_own_plans_are_imported(capsys, folder):
    config = CONFIG | {"base_model_tp_plan": None, "base_model_ep_plan": EP}
    (folder / "config.json").write_text(json.dumps(config))
    code, out, error = tpx(capsys, "import-hf", "--model", folder, "--world", 4)
    assert code == 0
    said = (
        "tp_plan does not name model.embed_tokens, model.layers.*.self_attn.{q,k,v,o}_proj, "
        "model.layers.*.self_attn.sinks, lm_head: every rank holds it whole"
    )
    assert error == f"note: {said}\n"
    assert out.startswith(f"# imported from {folder}/config.json\n# {said}\ntpx: 1\n")
    assert meaning(parse_plan(out, "p")) == meaning(read_plan("ep4", "gpt_oss"))
    again = tpx(capsys, "import-hf", folder / "config.json", "--model", folder, "--world", 4)
    assert again[1] == out


def test_an_ep_plan_goes_before_a_tp_plan_and_needs_an_ep_size(capsys, folder, tmp_path):
    path = tmp_path / "f.json"
    rules = {f"model.{EXPERTS}": "replicate"}
    path.write_text(json.dumps({"tp_plan": rules, "ep_plan": EP, "tp_size": 2, "ep_size": 2}))
    _, out, _ = tpx(capsys, "import-hf", path, "--model", folder)
    assert parse_plan(out, "p").mesh.ep == 2
    path.write_text(json.dumps({"tp_plan": rules, "ep_plan": EP, "tp_size": 2, "ep_size": 1}))
    _, out, error = tpx(capsys, "import-hf", path, "--model", folder)
    assert parse_plan(out, "p").mesh.edp == 2
    assert error.splitlines()[-1] == "note: `ep_plan` is left out, as it is there: `ep_size` is 1"


MISTAKES: dict[str, tuple[str, str, str]] = {
    "no JSON": (
        "{",
        "`F` is not JSON: line 1: Expecting property name enclosed in double quotes",
        'write it as `{"model.layers.*.self_attn.q_proj": ...}`',
    ),
    "no object": (
        "[]",
        "`F` is not JSON: it holds no object",
        'write it as `{"model.layers.*.self_attn.q_proj": ...}`',
    ),
    "deep": (
        "[" * 100_000,
        "`F` is not JSON: it is nested too deep",
        'write it as `{"model.layers.*.self_attn.q_proj": ...}`',
    ),
    "a key twice": (
        '{"lm_head": "colwise_rep", "lm_head": "replicate"}',
        "`F` has the key `lm_head` twice",
        "delete one of the two",
    ),
    "no word": (
        '{"lm_head": 3}',
        "`F`: `tp_plan` gives `lm_head` the style `3`",
        "a style is a word, such as `colwise`",
    ),
    "no dict": (
        '{"tp_plan": "auto", "tp_size": 2}',
        '`F`: `tp_plan` is `"auto"`, not an object of names and styles',
        'write it as `{"model.layers.*.self_attn.q_proj": "colwise"}`',
    ),
    "no size": (
        '{"tp_plan": {}, "tp_size": "2"}',
        '`F`: `tp_size` is `"2"`, not a number of ranks',
        "write it as `2`",
    ),
    "data parallel": (
        '{"tp_plan": {}, "tp_size": 2, "fsdp_size": 2}',
        "`F`: `fsdp_size` is `2`, which has no equal here",
        "leave it out: tensor and expert parallelism alone are imported",
    ),
    "experts over other ranks": (
        '{"tp_plan": {}, "tp_size": 2, "ep_size": 4}',
        "`F`: `ep_size` 4 beside `tp_size` 2 deals experts over ranks that also shard the dense "
        "part (FSDP), which has no equal here",
        "use `ep_size` 2, or write a plan with dp",
    ),
    "a kernel": (
        '{"tp_plan": {}, "tp_size": 2, "ep_implementation": "deepgemm_megamoe"}',
        "`F`: `ep_implementation` is `deepgemm_megamoe`, which has no equal here",
        "use `auto`, `all_reduce` or `all_to_all`",
    ),
    "a field": (
        '{"tp_plan": {}, "tp_sise": 2}',
        "`F` has `tp_sise`, which is no field of a DistributedConfig",
        "use `tp_plan`, `ep_plan`, `tp_size`, `ep_size` or `ep_implementation`",
    ),
    "how many": (
        '{"lm_head": "colwise_rep"}',
        "`F` does not say for how many ranks it is",
        "add `--world 2`",
    ),
    "a config without plans": (
        '{"model_type": "gpt_oss"}',
        "`F` has neither `base_model_tp_plan` nor `base_model_ep_plan`",
        "transformers keeps them in its config class: write that dict to a JSON file, and give "
        "the file",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_wrong_file_is_an_error(capsys, folder, tmp_path, case):
    text, message, hint = MISTAKES[case]
    path = tmp_path / "f.json"
    path.write_text(text)
    code, out, error = tpx(capsys, "import-hf", path, "--model", folder)
    assert (code, out) == (2, "")
    assert error == f"error: {message.replace('`F`', f'`{path}`')}\n\nhint: {hint}\n"


def test_wrong_words_on_the_command_line_are_errors(capsys, folder, tmp_path):
    path = tmp_path / "f.json"
    path.write_bytes(b'{"a\xff": 1}')
    with pytest.raises(PlanError, match=r"is not JSON: byte 3 is not UTF-8"):
        read_form(path)
    path.write_text('{"tp_plan": {}, "tp_size": 2}')
    for words, message, hint in (
        (["--world", 0], "`--world` is `0`", "give the number of ranks, 1 or more"),
        (["--world", 4], f"`--world 4` is not what `{path}` says: 2 ranks", "leave out `--world`"),
        (["--out", tmp_path], f"file `{tmp_path}` cannot be written: Is a directory",
         "give another one: `--out FILE`"),
    ):  # fmt: skip
        code, _, error = tpx(capsys, "import-hf", path, "--model", folder, *words)
        assert (code, error) == (2, f"error: {message}\n\nhint: {hint}\n")
    code, _, error = tpx(capsys, "import-hf", tmp_path / "none.json", "--model", folder)
    assert error == (
        f"error: file `{tmp_path}/none.json` cannot be read: No such file or directory\n\n"
        "hint: give a file of JSON\n"
    )


def test_an_import_that_would_compute_wrongly_is_refused(capsys, folder, tmp_path):
    """Without sinks, as the dict that circulates for this model has it."""
    rules = {f"model.layers.*.self_attn.{p}_proj": "colwise" for p in "qkv"}
    rules["model.layers.*.self_attn.o_proj"] = "rowwise"
    path = tmp_path / "f.json"
    path.write_text(json.dumps(rules))
    code, out, error = tpx(capsys, "import-hf", path, "--model", folder, "--world", 2)
    assert (code, out) == (2, "")
    assert "`model.layers.*.self_attn.sinks` holds it whole" in error
