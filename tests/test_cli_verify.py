"""`tpx verify` as a command: its report, its exit codes, and mistakes before a rank starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import tpx
from tiny import tiny_checkpoint

from tpx.cli.main import main
from tpx.cli.verify import told
from tpx.launch.report import Ending
from tpx.plan.prepare import prepare
from tpx.trial import Fault, Verdict

GIB = 1 << 30


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def test_the_command_runs_a_plan_on_real_ranks(tiny, tmp_path):
    done = tpx("verify", "--tp-plan", "tp2-etp2", "--model", tiny, "--device", "cpu",
               "--prompt", "the end", cwd=tmp_path)  # fmt: skip
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert lines[0] == (
        "plan `plans/gpt_oss/tp2-etp2.yaml` on 2 ranks, against one rank, in float32: tp 2 x etp 2"
    )
    assert lines[1] == "3 tokens to prefill, then one to decode; 52 outputs of modules compared"
    assert lines[2].startswith("logits differ by ")
    assert lines[3:] == ["equal: no module leaves the tolerance of 1e-04"]
    assert list(tmp_path.iterdir()) == []


def test_the_report_says_what_was_run_and_where_it_differs(tiny):
    prepared = prepare(tiny, "tp2", 2)
    fault = Fault("prefill", 1, "experts", "model.layers.1.mlp", (1,), 0.234)
    lines = told(prepared, Verdict(0.125, fault, 52, (24,), 1, 64, 5_000_000_000, True), 4 * GIB)
    assert lines[1:] == [
        "the checkpoint's 5,000,000,000 bytes are more than 4,294,967,296 (`--max-bytes`), so "
        "random weights were run: 1 of 2 layers, hidden size 64 in place of 64, the same names, "
        "heads, experts and plan",
        "24 tokens to prefill, then one to decode; 52 outputs of modules compared",
        "logits differ by 1.2e-01 of the largest at most",
        "different: layer 1, experts (`model.layers.1.mlp`) is the first to leave the tolerance of "
        "1e-04: 2.3e-01 of its largest value, on rank 1, in prefill",
    ]
    tie = fault._replace(layer=None, module="router", ranks=(0, 1), tie=True)
    lines = told(prepared, Verdict(0.125, tie, 52, (3, 2), 1, 64, 1000, False), GIB)
    assert lines[1:3] == [
        "the first 1 of 2 layers",
        "3 and 2 tokens to prefill, then one to decode; 52 outputs of modules compared",
    ]
    assert lines[4].startswith("different: router (`model.layers.1.mlp`) is the first")
    assert ", on ranks 0, 1, in prefill" in lines[4]
    assert lines[5] == (
        "a token's experts differ though the router's logits are equal to rounding: a tie, "
        "which another `--prompt` avoids"
    )


MISTAKES = {
    "layers": (
        ("--layers", "3"),
        "`--layers 3` of a model that has 2",
        "give a number from 1 to 2",
    ),
    "no ranks": (
        ("--nproc", "0"),
        "`--nproc` is `0`",
        "give the number of ranks, 1 or more",
    ),
    "another world": (("--nproc", "3"), "plan `plans/gpt_oss/tp2.yaml` is for 2 ranks", None),
    "bytes": (
        ("--max-bytes", "much"),
        "`--max-bytes much` is no number of bytes",
        "write `--max-bytes 4GiB`",
    ),
    "ids": (
        ("--prompt", "3,999"),
        "prompt `0` has token id `999` at place `1`, outside the vocabulary of `263`",
        "ids go from 0 to 262",
    ),
    "auto": (
        ("--tp-plan", "auto"),
        "`auto` plans for a number of ranks, and none is given",
        "add `--nproc 2`",
    ),
    "plan": (
        ("--tp-plan", "tp3"),
        "there is no plan `tp3` for `gpt_oss`",
        None,
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_found_before_a_rank_starts(tiny, capsys, case):
    words, message, hint = MISTAKES[case]
    code = main(["verify", "--tp-plan", "tp2", "--model", str(tiny), *words])
    out, error = capsys.readouterr()
    assert (code, out) == (2, "")
    assert message in error
    assert hint is None or error.endswith(f"\n\nhint: {hint}\n")


@pytest.mark.parametrize(
    ("ending", "fault", "code"),
    [
        (Ending(0), None, 0),
        (Ending(0), Fault("decode", 0, "router", "r", (1,), 0.5), 1),
        (Ending(5, "error: rank 1 was killed"), None, 5),
    ],
)
def test_the_exit_code_is_the_answer_or_the_ranks_failure(
    tiny, capsys, monkeypatch, ending, fault, code
):
    def supervise(job, full_traceback):
        assert (job.nproc, job.command.name) == (2, "tpx.verify")
        verdict = Verdict(0.5, fault, 52, (12,), 2, 64, 1000, False)
        (job.run_dir / "verify.json").write_text(verdict.to_json())
        return ending

    monkeypatch.setattr("tpx.cli.verify.supervise", supervise)
    words = ["verify", "--tp-plan", "tp2", "--model", str(tiny), "--device", "cpu"]
    assert main(words) == code
    out, error = capsys.readouterr()
    assert ("different: layer 0, router" in out) == (code == 1)
    assert error == (f"{ending.text}\n" if ending.text else "")
