"""`tpx plan auto`: the table on 80 columns, the plan on the output, and why another is not it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoint_files import lay_out
from headers import write_folder
from launching import environment

from tpx.cli import plan_auto
from tpx.cli.main import main
from tpx.plan.load import load_plan, parse_plan
from tpx.plan.prepare import prepare

DATA = Path(__file__).parent / "data"


@pytest.fixture(autouse=True)
def _on_paper(monkeypatch, tmp_path):
    """80 columns, no GPU, no measured table of this machine."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(plan_auto, "smallest_gpu", lambda: None)


@pytest.fixture(scope="module")
def gpt_oss_120b(tmp_path_factory):
    return str(lay_out(DATA / "gpt-oss-120b.json.gz", tmp_path_factory.mktemp("120b")))


@pytest.fixture
def small(tmp_path):
    return str(write_folder(tmp_path / "small"))


def rough(text: str) -> str:
    """Decimal fractions to two digits that count: what is estimated may move a little."""
    return re.sub(r" *[0-9]+\.[0-9]+", lambda found: f" {float(found[0]):.2g}", text)


def auto(capsys, model, *words) -> tuple[int, str, str]:
    code = main(["plan", "auto", "--model", str(model), *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


HEAD = """\
gpt_oss on 8 ranks (1x8) of h100
decode, 8 sequences of 8,192 tokens in all, 42.95 GB a rank

   mesh                           ms weights compute      KV   links      a rank
 1 dp2-tp4-edp2-etp4           3.009  0.8794   1.296  0.1016  0.7321    19.71 GB
      embed_tokens whole
 2 dp4-tp2-edp4-etp2           3.038   1.139   1.296  0.1016  0.5023    36.20 GB
      embed_tokens whole
"""
TAIL = """\
the fullest rank of dp2-tp4-edp2-etp4
    weights                       17.56 GB  exact
    KV cache                     306.71 MB  exact
    buffers                        1.84 GB  estimated

links: stated figures: not measured; `tpx bench links` on the ranks themselves measures them
structure is fact, speed is an estimate: the first may take 2.415 ms to 7.156 ms a token
4 other meshes within 10%: measure before you rely on the order
"""
REASON = """\
# Chosen for 8 ranks by time on h100: dp 2 x tp 4 x edp 2 x etp 4.
# The fullest rank holds 17.560 GB of weights and 0.307 GB of KV cache
# (at 8 sequences of 8,192 tokens in all).
# 3.009 ms a token, an estimate: weights 879 us, compute 1.296 ms, KV 102 us, links 732 us.
# Next of 26 that fit: dp 4 x tp 2 x edp 4 x etp 2, 29.2 us more.
tpx: 1
"""


def test_the_plan_is_the_output_and_the_table_stands_beside_it(
    capsys, gpt_oss_120b, tmp_path, monkeypatch
):
    words = ("--world", 8, "--memory", "40GiB", "--phase", "decode")
    code, out, err = auto(capsys, gpt_oss_120b, *words)
    assert code == 0
    assert rough(err).startswith(rough(HEAD))
    assert rough(TAIL) in rough(err)
    assert max(map(len, (*out.splitlines(), *err.splitlines()))) <= 100
    table = err.partition("\n\n")[2].partition("\n\n")[0]
    assert max(map(len, table.splitlines())) <= 80
    assert rough(out).startswith(rough(REASON))
    assert "uneven: true" in out
    monkeypatch.chdir(tmp_path)
    path = Path("plan.yaml")
    again, printed, _ = auto(capsys, gpt_oss_120b, *words, "--out", path)
    assert (again, path.read_text()) == (0, out)
    assert printed == f"{err}wrote {path}\n"
    assert load_plan(path, "auto") == parse_plan(out, "auto")
    assert prepare(gpt_oss_120b, str(path), 8).plan.mesh.tp == 4


def test_1024_ranks_are_answered_in_seconds_without_hardware(capsys, gpt_oss_120b):
    words = ("--world", 1024, "--topology", "128x8,inter=50", "--device", "h200")
    before = time.process_time()
    code, _, err = auto(capsys, gpt_oss_120b, *words)
    assert code == 0
    assert time.process_time() - before < 5
    assert err.startswith("gpt_oss on 1,024 ranks (128x8) of h200\n")
    assert "    dp           1024    128          8           50  network\n" in err
    assert re.search(r"\n5,\d{3} candidates on 4\d\d meshes, ", err)


def test_a_cpu_is_ranked_by_memory_and_says_so(capsys, small):
    code, out, err = auto(capsys, small, "--world", 2, "--device", "cpu")
    assert code == 0
    assert out.startswith("# Chosen for 2 ranks by memory: tp 2 x ep 2.\n")
    assert "the speed of cpu is not known: ranked by memory, then by traffic" in err
    assert "   mesh                        B/token  links ms  weights+KV\n" in err
    assert prepare(small, "auto", 2).plan == parse_plan(out, "auto")


def test_json_holds_the_same_values_and_every_figures_source(capsys, gpt_oss_120b):
    words = ("--world", 8, "--phase", "decode", "--json")
    _, out, _ = auto(capsys, gpt_oss_120b, *words)
    data = json.loads(out)
    first = data["candidates"][0]
    assert first["mesh"] == {"dp": 2, "tp": 4, "edp": 2, "ep": 1, "etp": 4}
    assert first["whole"] == "embed_tokens whole"
    assert round(first["seconds"]["seconds"] * 1e3, 3) == 3.009
    assert first["bytes"]["weights"] == 17_559_901_440
    assert (first["bytes"]["exact"], first["bytes"]["estimated"]) == (
        ["weights", "kv"],
        ["buffers"],
    )
    assert data["links"] == {"measured": False, "note": data["links"]["note"]}
    assert data["figures"]["read"]["source"].startswith("measured 2026-11, torch 2.11.0: a copy")
    assert data["plan"].startswith("# Chosen for 8 ranks by time on h100")


@pytest.mark.parametrize(
    ("what", "lines"),
    [
        ("tp=4", ["dp2-tp4-edp2-etp4 (embed_tokens whole) is what was chosen"]),
        ("tp=3", ["no mesh has tp 3: tp 3 does not divide 8 ranks"]),
        ("tp=2,etp=4",
         ["no mesh has tp 2 and etp 4: etp 4 does not divide tp 2, so ranks that add partial sums "
          "of an expert would hold different tokens"]),
        ("dp=2,tp=2",
         ["no mesh has dp 2 and tp 2: dp x tp and edp x ep x etp must each make 8 ranks"]),
        ("dp=8,edp=8",
         ["dp8-edp8, the smallest with dp 8 and edp 8, passes the proofs and does not fit: its "
          "fullest rank needs 69.869 GB, 26.919 GB more than 42.950 GB",
          "  weights     65.249 GB  exact",
          "  KV cache     0.307 GB  exact",
          "  buffers      4.313 GB  estimated",
          "for 8 sequences of 8,192 tokens in all"]),
        ("tp=8,etp=8",
         ["tp8-etp8 (embed_tokens whole), the best with tp 8 and etp 8, passes the proofs and "
          "fits, and costs more",
          "3.332 ms a token, against 3.009 ms of dp2-tp4-edp2-etp4 (embed_tokens whole): 323 us "
          "or 10.7% more",
          "  weights     742 us against    879 us  -138 us",
          "  compute   1.296 ms against  1.296 ms  +0 us",
          "  KV          102 us against    102 us  +0 us",
          "  links     1.192 ms against    732 us  +460 us"]),
        ("tp=8,dispatch=gather",
         ["tp 8 and dispatch gather is refused by proof P406: plan `auto`: dispatch `gather` does "
          "not fit the mesh: the 8 ranks of an expert group lie in one tp group and see the same "
          "tokens",
          "hint: leave `dispatch` out, or say `auto`"]),
    ],
)  # fmt: skip
def test_why_not(capsys, gpt_oss_120b, what, lines):
    words = ("--world", 8, "--memory", "40GiB", "--phase", "decode", "--why-not", what)
    code, out, err = auto(capsys, gpt_oss_120b, *words)
    assert (code, rough(out).splitlines(), err) == (0, [rough(line) for line in lines], "")


def test_why_not_a_plan_by_its_name_or_what_experts_do_not_divide(capsys, small):
    _, out, _ = auto(capsys, small, "--world", 2, "--device", "cpu", "--why-not", "tp2")
    assert out.splitlines()[0] == (
        "`plans/gpt_oss/tp2.yaml` (tp2-edp2) passes the proofs and fits, and costs more"
    )
    _, out, _ = auto(capsys, small, "--world", 4, "--device", "cpu", "--why-not", "tp2-ep2")
    assert out.startswith("`plans/gpt_oss/tp2-ep2.yaml` is refused by proof ")
    assert "is for 2 ranks (tp 2 x ep 2), and there are 4" in out
    _, out, _ = auto(capsys, small, "--world", 6, "--device", "cpu", "--why-not", "ep=3")
    assert out.startswith("ep 3 is refused by proof ")
    assert "cuts num_local_experts 8 over ep 3, and 8 / 3 is 2.667" in out
    _, out, _ = auto(capsys, small, "--world", 2, "--why-not", "tp=2,ep=2", "--json")
    assert json.loads(out)["why_not"]["kind"] in ("chosen", "cost")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--memory", "80"), "`--memory 80` is no size\n\nhint: write `--memory 80GB` or `80GiB`"),
        (("--phase", "x"),
         "`--phase x` is unknown\n\nhint: use `decode`, `prefill` or `balanced`"),
        (("--context", "0"), "`--context 0` is no whole number from 1 up"),
        (("--batch", "-1"), "`--batch -1` is no whole number from 1 up"),
        (("--context", "257"),
         "`--context 257` is more than the model's 256 positions\n\n"
         "hint: use a context of 256 or less"),
        (("--topology", "3"),
         "`--topology 3` cannot be read\n\nhint: write nodes x GPUs a node: `2x8`, or "
         "`2x8,intra=360,inter=40` with speeds in GB/s"),
        (("--topology", "2x8"),
         "`--topology 2x8` has 16 ranks, and `--world` is 8\n\n"
         "hint: use `--world 16`, or another topology"),
        (("--device", "h300"),
         "`--device h300` is unknown\n\nhint: did you mean `h200` or `h100`?"),
        (("--links", "none"),
         "`none` cannot be read (No such file or directory)\n\n"
         "hint: `tpx bench links --out FILE` writes one"),
        (("--why-not", "pp=2"),
         "`--why-not pp=2` names no axis `pp`\n\n"
         "hint: use `dp`, `tp`, `edp`, `ep`, `etp` or `dispatch`"),
        (("--why-not", "tp=none"),
         "`--why-not tp=none` gives `tp` the size `none`\n\n"
         "hint: give a whole number from 1 up: `tp=2`"),
        (("--why-not", "tp=2,tp=4"),
         "`--why-not tp=2,tp=4` names `tp` twice\n\nhint: name it once"),
        (("--why-not", "dispatch=gathr"),
         "`--why-not dispatch=gathr` has no dispatch `gathr`\n\nhint: did you mean `gather`?"),
        (("--out", "/none/x.yaml"),
         "`/none/x.yaml` cannot be written (No such file or directory)\n\n"
         "hint: give another file: `--out FILE`"),
    ],
)  # fmt: skip
def test_wrong_values(capsys, small, words, text):
    code, out, err = auto(capsys, small, "--world", 8, *words)
    assert (code, out) == (2, "")
    assert err.partition(": ")[2] == f"{text}\n"


def test_a_wrong_world(capsys, small):
    code, _, err = auto(capsys, small, "--world", 0)
    assert (code, err.partition(": ")[2]) == (
        2, "`--world` is `0`\n\nhint: give the number of ranks, 1 or more\n"
    )  # fmt: skip


def test_it_needs_no_torch(small, tmp_path):
    code = (
        "import sys; from tpx.cli.main import main; code = main(sys.argv[1:]);"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    words = ["plan", "auto", "--model", small, "--world", "4"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
