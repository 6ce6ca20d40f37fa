"""Wrong flags of `tpx bench latency|throughput|load`: one error each, before a rank starts."""

from __future__ import annotations

import pytest
from launching import ROOT

from tpx.cli.main import main

DEMO = str(ROOT / "examples" / "models" / "tpx-demo")
LATENCY_WORDS, THROUGHPUT_WORDS = (("latency", "--model", DEMO), ("throughput", "--model", DEMO))
TOKENS = "hint: write `{0} 128`, or `{0} 64:256` for lengths from 64 to 256"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((*LATENCY_WORDS, "--batch", "0,1"), "`--batch 0,1` cannot be read\n\n"
         "hint: write different numbers of sequences: `1,4,16`"),
        ((*LATENCY_WORDS, "--batch", "4,4"), "`--batch 4,4` cannot be read\n\n"
         "hint: write different numbers of sequences: `1,4,16`"),
        ((*LATENCY_WORDS, "--input-len", "3:5"),
         "`--input-len 3:5` is no whole number from 1 up"),
        ((*LATENCY_WORDS, "--output-len", "1"), "`--output-len 1` is no whole number from 2 up"),
        ((*LATENCY_WORDS, "--rounds", "0"), "`--rounds 0` is no whole number from 1 up"),
        ((*LATENCY_WORDS, "--dtype", "int8"), "`--dtype int8` is unknown\n\n"
         "hint: use `auto`, `bfloat16` or `float32`"),
        ((*LATENCY_WORDS, "--use-kernels", "yes"), "`--use-kernels yes` is unknown\n\n"
         "hint: use `on`, `off` or `both`"),
        ((*LATENCY_WORDS, "--prefix-cache", "1"), "`--prefix-cache 1` is unknown\n\n"
         "hint: use `on`, `off` or `both`"),
        ((*LATENCY_WORDS, "--peer", "vllm"), "`--peer vllm` is unknown\n\n"
         "hint: use `transformers`"),
        ((*LATENCY_WORDS, "--nproc", "no"), "`--nproc no` is no number of ranks\n\n"
         "hint: give a whole number from 1 up, or `auto`: one rank a GPU, two on CPU"),
        ((*LATENCY_WORDS, "--device", "tpu"), "`--device tpu` is unknown\n\n"
         "hint: use `cpu` or `cuda`"),
        ((*LATENCY_WORDS, "--html", "no/where.html"), "`--html no/where.html` cannot be written\n\n"
         "hint: give a file in a folder that is there"),
        ((*LATENCY_WORDS, "--input-len", "500", "--device", "cpu"),
         "a prompt of 500 tokens and 128 after it are more than the model's 512 positions\n\n"
         "hint: lower `--input-len` or `--output-len`"),
        ((*LATENCY_WORDS, "--graphs", "both", "--device", "cpu"),
         "`--graphs both` is about CUDA graphs, and the ranks run on a CPU\n\n"
         "hint: leave it out, or use `--device cuda`"),
        ((*THROUGHPUT_WORDS, "--input-len", "9:5"), "`--input-len 9:5` is no number of tokens\n\n"
         + TOKENS.format("--input-len")),
        ((*THROUGHPUT_WORDS, "--output-len", "5:"), "`--output-len 5:` is no number of tokens\n\n"
         + TOKENS.format("--output-len")),
        ((*THROUGHPUT_WORDS, "--rate", "0"), "`--rate 0` is no rate\n\n"
         "hint: write requests a second, such as `--rate 4`, or `--rate inf`"),
        ((*THROUGHPUT_WORDS, "--rate", "fast"), "`--rate fast` is no rate\n\n"
         "hint: write requests a second, such as `--rate 4`, or `--rate inf`"),
        ((*THROUGHPUT_WORDS, "--rate", "4", "--peer", "transformers"),
         "`--peer transformers` takes all requests at once, and `--rate 4` does not send them so"
         "\n\nhint: write `--rate inf`, or leave out `--peer`"),
        ((*THROUGHPUT_WORDS, "--requests", "0"), "`--requests 0` is no whole number from 1 up"),
        ((*THROUGHPUT_WORDS, "--batch", "1,2"), "`--batch 1,2` is no whole number from 1 up"),
        ((*THROUGHPUT_WORDS, "--seed", "-1"), "`--seed -1` is no whole number from 0 up"),
        ((*THROUGHPUT_WORDS, "--seed", str(2**64)), f"`--seed {2**64}` is more than 2**64 - 1"),
        ((*THROUGHPUT_WORDS, "--prefix-len", "9", "--input-len", "4:16"),
         "`--prefix-len 9` is longer than a prompt of `--input-len 4:16`\n\n"
         "hint: use `--prefix-len 4` or less"),
    ],
)  # fmt: skip
def test_wrong_values(capsys, words, text):
    assert main(["bench", *words]) == 2
    assert capsys.readouterr().err.partition(": ")[2] == f"{text}\n"


def test_a_peer_that_is_not_installed(capsys, monkeypatch):
    monkeypatch.setattr("tpx.cli.bench_asked.find_spec", lambda name: None)
    assert main(["bench", *LATENCY_WORDS, "--peer", "transformers"]) == 2
    assert capsys.readouterr().err == (
        "error: `--peer transformers` needs the package `transformers`, which is not installed\n\n"
        "hint: type `pip install transformers`, or leave out `--peer`\n"
    )
