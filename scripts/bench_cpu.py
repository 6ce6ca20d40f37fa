"""Tokens a second on a CPU: tpx against transformers, in one run.

    python scripts/bench_cpu.py --threads 1 2 --batch 1 16

Generates greedily after prompts of 32 tokens, with every `experts_implementation` that runs on this
CPU (the others are named, with why not). transformers has no packed experts on a CPU, so its are
dequantised at loading. All of them take turns, and each one's best round counts: a busy machine
only ever takes time away. The floor is the time to read, at the rate of a plain read in the same
run, what a step of tpx reads: attention, routers, head, and the packed experts that the batch's
tokens are expected to choose; it counts no arithmetic.
"""

from __future__ import annotations

import argparse
import platform
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import GptOssForCausalLM, Mxfp4Config
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import tpx

DEMO = Path(__file__).parent.parent / "examples" / "models" / "tpx-demo"
PROMPT = list(range(5, 37))
OURS = "tpx"

Generate = Callable[[int, int], None]  # sequences, tokens of each


class Setting(NamedTuple):
    dtype: str
    threads: int
    batch: int


def ours(llm: tpx.LLM, batch: int, tokens: int) -> None:
    params = tpx.SamplingParams(max_tokens=tokens, ignore_eos=True)
    results = llm.generate([PROMPT] * batch, params)
    assert all(len(result.token_ids) == tokens for result in results)


@torch.inference_mode()
def theirs(model: Any, batch: int, tokens: int) -> None:
    ids = torch.tensor([PROMPT] * batch)
    mask = torch.ones_like(ids)
    limits = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    out = model.generate(ids, attention_mask=mask, do_sample=False, **limits)
    assert out.shape[1] == len(PROMPT) + tokens


def load_theirs(folder: Path, dtype: str, implementation: str) -> Any:
    return GptOssForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        attn_implementation="eager",
        experts_implementation=implementation,
        quantization_config=Mxfp4Config(dequantize=True),
    ).eval()


def all_ways(folder: Path, llm: tpx.LLM, dtype: str, console: Console) -> dict[str, Generate]:
    """By name, those that generate a token here."""
    ways: dict[str, Generate] = {OURS: partial(ours, llm)}
    for implementation in ("eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()):
        try:
            model = load_theirs(folder, dtype, implementation)
            theirs(model, 1, 2)
        except Exception as error:
            console.print(f"{implementation} does not run: {str(error).splitlines()[0]}")
        else:
            ways[f"transformers {implementation}"] = partial(theirs, model)
    return ways


def race(ways: dict[str, Generate], setting: Setting, tokens: int, rounds: int) -> dict[str, float]:
    """Tokens a second of each way's best round."""
    best = dict.fromkeys(ways, 0.0)
    for generate in ways.values():
        generate(setting.batch, 2)
    for _ in range(rounds):
        for name, generate in ways.items():
            begin = time.perf_counter()
            generate(setting.batch, tokens)
            seconds = time.perf_counter() - begin
            best[name] = max(best[name], setting.batch * tokens / seconds)
    return best


def step_bytes(llm: tpx.LLM, batch: int) -> float:
    """Of weights that one decode step reads; uniform routing is assumed."""
    spec, total = llm.spec, 0.0
    missed = (1 - spec.num_experts_per_tok / spec.num_local_experts) ** batch
    for name, parameter in llm.model.named_parameters():
        if "embed_tokens" not in name:
            total += parameter.nbytes * ((1 - missed) if ".experts." in name else 1)
    return total


def read_rate() -> float:
    """Bytes a second of a plain read of 256 MB."""
    data, best = torch.ones(1 << 26), 0.0
    for _ in range(10):
        begin = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / (time.perf_counter() - begin))
    return best


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    warnings.simplefilter("ignore")  # of transformers, about kernels that it does not have
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console(width=110, highlight=False)
    console.print(
        f"{processor()} ({torch.backends.cpu.get_cpu_capability()}), Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, tpx {tpx.__version__}; {given.model.name}, "
        f"{given.tokens} tokens after {len(PROMPT)}, best of {given.rounds}"
    )
    table = Table("dtype", "threads", "batch", "way", box=None)
    for name in ("tokens a second", "tpx is", "floor", "reached"):
        table.add_column(name, justify="right")
    for dtype in given.dtype:
        llm = tpx.LLM(given.model, dtype=dtype, device="cpu")
        ways = all_ways(given.model, llm, dtype, console)
        for threads in given.threads:
            torch.set_num_threads(threads)
            rate = read_rate()
            for batch in given.batch:
                speeds = race(ways, Setting(dtype, threads, batch), given.tokens, given.rounds)
                floor = batch * rate / step_bytes(llm, batch)
                for name, speed in speeds.items():
                    row = [dtype, str(threads), str(batch), name, f"{speed:.1f}"]
                    row.append(f"{speeds[OURS] / speed:.2f} times" if name != OURS else "")
                    bound = [f"{floor:.0f}", f"{speed / floor:.1%}"] if name == OURS else ["", ""]
                    table.add_row(*row, *bound)
    console.print(table)


if __name__ == "__main__":
    main()
