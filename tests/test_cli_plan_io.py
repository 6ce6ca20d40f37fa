"""`tpx plan explain --io`: spans and bytes on 80 columns and as JSON, and errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoint_files import lay_out
from headers import make_config, write_folder

from tpx.cli.main import main
from tpx.plan.forms import arena_nbytes, slots, stored_nbytes
from tpx.plan.prepare import prepare
from tpx.plan.spans import spans

DATA = Path(__file__).parent / "data"


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("io") / "model", make_config(), shards=3)


def explain(capsys, plan, folder, *argv) -> tuple[int, str, str]:
    code = main(["plan", "explain", str(plan), "--model", str(folder), "--io", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


FILES = """\
reads of files  runs at most 32 KiB apart are read as one
                            spans      bytes   smallest    largest    dropped
      model-00000-of-00002.safetensors
        rank 0, the most      505    2.10 GB  132.48 kB  289.57 MB  878.61 MB
        rank 2, the least     536    2.08 GB      832 B  289.57 MB  889.58 MB
      model-00001-of-00002.safetensors
        rank 0, the most      635    2.34 GB  132.48 kB  143.12 MB    1.21 GB
        rank 2, the least     672    2.31 GB      832 B  141.00 MB    1.22 GB
      model-00002-of-00002.safetensors
        rank 0, the most      470    2.01 GB  132.48 kB  289.57 MB  866.80 MB
        rank 2, the least     498    1.99 GB      832 B  289.57 MB  877.87 MB
"""
TOTALS = """
bytes read, kept and held
                               read alone    read once         kept         held
      ranks 0-1                   6.45 GB      3.44 GB      3.50 GB      3.50 GB
      ranks 2-3                   6.38 GB      3.44 GB      3.39 GB      3.39 GB
      the node                   25.67 GB     13.76 GB     13.79 GB     13.79 GB
      of what is kept               1.86x        1.00x
      kept as the checkpoint stores it; held as the model runs

each byte is read once a node, on h100, estimated:
        0.91 s  if each rank reads for itself
        0.49 s  if each byte is read once and sent, 4.19 MB at a time
      a rank reads 7.10 GB/s: InstantTensor's report: 8 H200 read 56.9 GB/s
        from memory
      a rank sends 360.00 GB/s: NVIDIA's data sheet: NVLink 4, 450 GB/s each
        way, of which NCCL moves about 80%
"""
SPANS = """
spans  27, in order
               offset          bytes  into
      model-00000-of-00002.safetensors
              138,726         67,584  embed_tokens.weight
              402,918         65,536  layers.0.self_attn.q_proj.weight
              566,758        376,848  layers.0.self_attn.k_proj.weight and 4
            9,332,214      4,194,304  layers.0.mlp.experts.gate_up_proj_blocks
           21,915,126      2,097,152  layers.0.mlp.experts.down_proj_blocks
      and 17 more; `--json` has all
      model-00001-of-00002.safetensors
           27,469,634         39,312  …ers.1.mlp.experts.gate_up_proj_bias and 7
           28,033,234        262,144  layers.2.mlp.experts.gate_up_proj_scales
           28,819,666        131,072  layers.2.mlp.experts.down_proj_scales
           29,090,002          4,096  layers.2.mlp.experts.down_proj_bias
           29,233,362         67,584  lm_head.weight
"""


def test_a_node_of_20b_is_drawn_with_what_sharing_gains(capsys, tmp_path):
    folder = lay_out(DATA / "gpt-oss-20b.json.gz", tmp_path / "20b")
    code, out, _ = explain(capsys, "tp4-etp4", folder, "--device", "h100")
    assert code == 0
    assert out.endswith(FILES + TOTALS)
    assert max(map(len, (FILES + TOTALS).splitlines())) <= 80


def test_the_first_and_last_spans_of_a_rank_are_drawn(capsys, tmp_path):
    config = make_config(hidden_size=1024, intermediate_size=2048, num_hidden_layers=3)
    folder = write_folder(tmp_path / "large", config, shards=2)
    _, out, _ = explain(capsys, "tp4-ep4", folder, "--device", "cpu", "--rank", 2)
    assert SPANS in out
    assert max(map(len, SPANS.splitlines())) <= 80


def test_json_has_every_span_of_the_rank_that_is_named(capsys, small):
    _, out, _ = explain(capsys, "tp4-etp4", small, "--device", "cpu", "--rank", 3, "--json")
    found = json.loads(out)["io"]
    plan = prepare(str(small), "tp4-etp4", 4).rank_plan(3)
    [rank] = found["ranks"]
    expected = spans(plan)
    assert rank["spans"] == [
        s._asdict() | {"copies": [copy._asdict() for copy in s.copies]} for s in expected
    ]
    assert rank["alone"] == sum(span.nbytes for span in expected)
    assert rank["kept"] == stored_nbytes(plan)
    assert rank["held"] == arena_nbytes(slots(plan, "bfloat16"))
    assert [file["file"] for file in rank["files"]] == sorted({span.file for span in expected})
    assert sum(file["nbytes"] for file in rank["files"]) == rank["alone"]
    assert (found["device"], found["shared"], found["node"], found["nodes"]) == ("cpu", False, 0, 1)
    assert found["bytes"]["read"] == found["bytes"]["alone"]
    assert found["amplification"] == found["bytes"]["read"] / found["bytes"]["kept"]


def test_a_node_is_the_ranks_of_it_alone(capsys, small):
    argv = ["--topology", "2x2", "--rank", 3, "--device", "cpu"]
    _, out, _ = explain(capsys, "dp2-tp2-ep4", small, *argv, "--json")
    found = json.loads(out)["io"]
    assert (found["node"], found["nodes"]) == (1, 2)
    prepared = prepare(str(small), "dp2-tp2-ep4", 4)
    assert found["bytes"]["kept"] == sum(stored_nbytes(prepared.rank_plan(r)) for r in (2, 3))
    _, out, _ = explain(capsys, "dp2-tp2-ep4", small, *argv)
    assert "\n      node 1 of 2  " in out


def test_one_rank_shares_nothing(capsys, small):
    _, out, _ = explain(capsys, "tp1", small, "--device", "cpu", "--rank", 0)
    assert out.endswith("\nnothing to share: no two ranks of the node need the same bytes\n")
    assert "\nspans  3, in order\n" in out
    assert "more; `--json`" not in out


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--io", "--topology", "3x1"],
         "error: `--topology 3x1` has 3 ranks, and `--world` is 2\n\n"
         "hint: use `--world 3`, or another topology\n"),
        (["--io", "--device", "h1000"],
         "error: `--device h1000` is unknown\n\nhint: did you mean `h100` or `h200`?\n"),
        (["--device", "cpu"], "error: `--device` is what `--io` reads for\n\nhint: add `--io`\n"),
        (["--topology", "1x2"],
         "error: `--topology` is what `--io` reads for\n\nhint: add `--io`\n"),
        (["--io", "--rank", "2"],
         "error: `--rank` is `2`, and the plan has none such\n\nhint: give 0 to 1\n"),
    ],
)  # fmt: skip
def test_errors(capsys, small, argv, text):
    assert main(["plan", "explain", "tp2", "--model", str(small), *argv]) == 2
    assert capsys.readouterr() == ("", text)
