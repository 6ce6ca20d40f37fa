"""`tpx plan explain` on 80 columns and as JSON, and what it says to wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoint_files import lay_out
from headers import make_config, write_folder

from tpx.cli.main import main
from tpx.plan.find import shipped_plans
from tpx.plan.prepare import prepare

DATA = Path(__file__).parent / "data"


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture(scope="module")
def gpt_oss_120b(tmp_path_factory):
    return lay_out(DATA / "gpt-oss-120b.json.gz", tmp_path_factory.mktemp("120b"))


def tpx(capsys, *argv) -> tuple[int, str, str]:
    code = main(["plan", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


RULE = """\
  10  model.layers.*.self_attn.o_proj                   rowwise    212.54 MB
      36 x o_proj.weight        BF16        2880x4096 → 2880x1024
      36 x o_proj.bias          BF16             2880
           all_reduce over tp of 4, 5,760 bytes a token
"""
MEMORY = """\
memory a rank  8 sequences of 8,192 tokens, steps of 512
                             ranks 0-1       ranks 2-3
      weights                 16.69 GB        16.01 GB  exact
      KV cache               613.42 MB       613.42 MB  exact
      page rounding            7.23 MB         7.23 MB  exact
      logits                   6.43 MB         6.43 MB  exact
      activations            830.34 MB       830.34 MB  estimated
      total                   18.15 GB        17.47 GB  estimated
      activations are fullest in attention: the reference holds all scores

a rank keeps
      ranks 0-1        16.69 GB  16,691,201,280 bytes, 25.6% of 65.25 GB
      ranks 2-3        16.01 GB  16,013,788,416 bytes, 24.5% of 65.25 GB

whole on every rank  0.08% of the weights, 53.72 MB
      model.layers.*.mlp.router                    26.55 MB
           no style cuts it
      model.layers.*.mlp.experts.down_proj_bias    26.54 MB
           `expert` cuts it where `ep` is over 1
"""


def test_explain_draws_120b(capsys, gpt_oss_120b):
    argv = ["tp4-etp4", "--model", gpt_oss_120b, "--context", 8192, "--batch", 8]
    code, out, _ = tpx(capsys, "explain", *argv)
    assert code == 0
    assert RULE in out
    assert MEMORY in out
    proofs = out.partition("\nproved\n")[2]
    assert [line.split()[1] for line in proofs.splitlines() if line.startswith("✓")] == [
        proof.name for proof in prepare(gpt_oss_120b, "tp4-etp4", 4).proofs
    ]


@pytest.mark.parametrize("name", shipped_plans("gpt_oss"))
def test_explain_fits_80_columns(capsys, gpt_oss_120b, name):
    code, out, _ = tpx(capsys, "explain", name, "--model", gpt_oss_120b)
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80


def test_phases_that_differ_are_told_apart(capsys, tmp_path):
    path = tmp_path / "mixed.yaml"
    text = shipped_plans("gpt_oss")["dp2-tp2-ep4"].read_text()
    path.write_text(text.replace("dispatch: all_to_all", "dispatch: auto"))
    _, out, _ = tpx(capsys, "explain", path, "--model", write_folder(tmp_path))
    assert "           prefill: 6 collectives, " in out
    assert "           decode: 5 collectives, " in out
    assert "           all_reduce over tp of 2, 128 bytes a token\n" in out


def test_1024_ranks_are_a_page_and_fit_80_columns(capsys, gpt_oss_120b, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("big.yaml")
    text = shipped_plans("gpt_oss")["dp2-tp2-ep2-etp2"].read_text()
    path.write_text(text.replace("dp: 2, tp: 2, ep: 2, etp: 2", "dp: 128, tp: 8, ep: 128, etp: 8"))
    _, out, _ = tpx(capsys, "explain", path, "--model", gpt_oss_120b)
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) < 120
    assert "dp127 rank 1016 ep127 etp0  …                     rank 1023 ep127 etp7" in lines
    assert "                         256 as rank 0   768 as rank 2" in lines
    assert "      ranks 0-1, 8-9, ... (256)" in lines


def test_json_holds_every_number(capsys, gpt_oss_120b):
    argv = ["tp4-etp4", "--model", gpt_oss_120b, "--context", 8192, "--batch", 8, "--json"]
    _, out, _ = tpx(capsys, "explain", *argv)
    found = json.loads(out)
    assert found["load"] == {
        "context": 8192, "batch": 8, "sequences_a_rank": 8, "step_tokens": 512
    }  # fmt: skip
    first, odd = found["ranks"]
    assert (first["ranks"], odd["ranks"]) == ([[0, 1]], [[2, 3]])
    assert (first["weights"], odd["weights"]) == (16_691_201_280, 16_013_788_416)
    parts = ("weights", "kv_cache", "pages", "logits", "activations")
    for each in (first, odd):
        assert each["total"] == sum(each[name] for name in parts)
        assert each["activations"] == max(each["moments"].values())
    assert first["logits"] == 8 * 201_088 * 4
    assert found["bytes_a_token"] == {"prefill": 420_480, "decode": 420_480}
    rule = next(rule for rule in found["rules"] if rule["style"] == "rowwise")
    assert rule["collectives"] == ["attention"]
    for at, each in enumerate(found["ranks"]):
        kinds = [kind for rule in found["rules"] for kind in rule["parameters"]]
        assert sum(kind["each"][at] for kind in kinds) == each["weights"]
    names = [module["name"] for module in found["replicated"]["modules"]]
    assert names[:2] == ["model.layers.*.mlp.router", "model.layers.*.mlp.experts.down_proj_bias"]


def test_limits_of_the_plan_are_what_memory_is_counted_for(capsys, tmp_path):
    path = tmp_path / "mine.yaml"
    text = shipped_plans("gpt_oss")["tp2-ep2"].read_text()
    path.write_text(text + "limits: {context: 64, batch: 5}\n")
    argv = ["explain", path, "--model", write_folder(tmp_path), "--json"]
    load = json.loads(tpx(capsys, *argv)[1])["load"]
    assert (load["context"], load["batch"]) == (64, 5)
    load = json.loads(tpx(capsys, *argv, "--context", 16)[1])["load"]
    assert (load["context"], load["batch"]) == (16, 5)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--context", "0"],
         "error: a context of `0` tokens, and the model has 256 positions\n\n"
         "hint: give `--context` from 1 to 256\n"),
        (["--context", "257"],
         "error: a context of `257` tokens, and the model has 256 positions\n\n"
         "hint: give `--context` from 1 to 256\n"),
        (["--batch", "0"],
         "error: a batch of `0` sequences\n\n"
         "hint: give `--batch` the sequences that are in work at once, 1 or more\n"),
        (["--batch", "many"],
         "error: `tpx plan explain`: argument --batch: invalid int value: 'many'\n\n"
         "hint: see `tpx plan explain --help`\n"),
        (["--rank", "1"],
         "error: `--rank` names the rank to simulate, or whose spans to print\n\n"
         "hint: add `--simulate` or `--io`\n"),
        (["--simulate", "--rank", "2"],
         "error: `--rank` is `2`, and the plan has none such\n\nhint: give 0 to 1\n"),
        (["--html", "/no/such/folder/x.html"],
         "error: `--html /no/such/folder/x.html` cannot be written: No such file or directory\n\n"
         "hint: give a file in a folder that is there\n"),
        (["--htlm", "x.html"],
         "error: `tpx plan explain` has no argument `--htlm`\n\n"
         "hint: did you mean `--html` or `--help`?\n"),
    ],
)  # fmt: skip
def test_wrong_input_is_told_in_words(capsys, tmp_path, argv, text):
    code, out, err = tpx(capsys, "explain", "tp2", "--model", write_folder(tmp_path), *argv)
    assert (code, out, err) == (2, "", text)


def test_a_page_over_a_folder_is_refused(capsys, tmp_path):
    argv = ["explain", "tp2", "--model", write_folder(tmp_path), "--html", tmp_path]
    code, _, err = tpx(capsys, *argv)
    assert (code, err) == (
        2,
        f"error: `--html {tmp_path}` cannot be written: Is a directory\n\n"
        "hint: give a file in a folder that is there\n",
    )


def test_a_plan_for_another_model_is_refused(capsys, tmp_path):
    path = tmp_path / "other.yaml"
    text = shipped_plans("gpt_oss")["tp2"].read_text()
    path.write_text(text.replace("model: gpt_oss", "model: mixtral"))
    for command in (["explain", path], ["diff", "tp2", path]):
        code, out, err = tpx(capsys, *command, "--model", write_folder(tmp_path))
        assert (code, out) == (2, "")
        assert err == (
            f"error[P109]: plan `{path}` is for model `mixtral`, and `config.json` says `gpt_oss`\n"
            "\nhint: use a plan for `gpt_oss`, or write `model: gpt_oss`\n"
        )


def test_a_simulated_rank_records_what_the_plan_predicts(capsys, tmp_path):
    folder = write_folder(tmp_path, make_config())
    argv = ["explain", "dp2-tp2-ep2-etp2", "--model", folder, "--simulate", "--rank", 3]
    code, out, _ = tpx(capsys, *argv)
    assert code == 0
    assert "simulated  rank 3, prefill of 16 tokens, hidden size 32\n" in out
    assert "differs" not in out
    assert max(map(len, out.splitlines())) <= 80
    _, out, _ = tpx(capsys, *argv, "--json")
    prefill, decode = json.loads(out)["simulations"]
    assert (prefill["phase"], decode["phase"]) == ("prefill", "decode")
    assert prefill["equal"]
    assert prefill["calls"]
