"""CPU against GPU on one checkpoint: float32 must agree, bfloat16 must be no worse on the GPU.

    python scripts/check_gpu.py examples/models/tpx-demo --tokens 400 --prompts 8

float32 on both, TF32 off: the largest difference of logits is at most 1e-4 of the largest logit.
bfloat16 on both devices is compared with float32 on the CPU. The largest difference, and the root
mean square of all, belong to the few tokens that were routed to other experts, and it is chance
which device has them; so they are printed, and the bar is on the median token.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

import tpx

BAR = 1e-4
EQUAL = 1.02  # two devices that round alike differ by so much on a few thousand tokens
TEXTS = sorted(Path(__file__).parent.parent.glob("docs/*.md"))


class Difference(NamedTuple):
    """Of logits. largest: as a share of the largest logit. rms: root mean square, as a share of the
    logits'. median: of the tokens, each with its own rms."""

    largest: float
    rms: float
    median: float

    def __str__(self) -> str:
        return f"largest {self.largest:.2e}, rms {self.rms:.3e}, median token {self.median:.3e}"


def prompts(model: str, tokens: int, count: int) -> list[list[int]]:
    """Windows of docs/ where the checkpoint has a tokenizer, else random ids."""
    if (Path(model) / "tokenizer.json").is_file():
        text = "".join(path.read_text() for path in TEXTS)
        ids = tpx.LLM(model, tp_plan="tp1", device="cpu").tokenizer.encode(text)
        step = max(1, (len(ids) - tokens) // max(1, count - 1))
        return [ids[i * step : i * step + tokens] for i in range(count)]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, 1000, (count, tokens), generator=generator).tolist()


def logits(model: str, ids: list[list[int]], dtype: str, device: str) -> torch.Tensor:
    """[tokens, vocab] float32 on the CPU; prints what loading and the forward cost."""
    start = time.perf_counter()
    with tpx.LLM(model, tp_plan="tp1", dtype=dtype, device=device) as llm:
        loaded = time.perf_counter()
        rows = torch.cat(llm.logits(ids))
        done = time.perf_counter()
    print(f"{device:5} {dtype:9} load {loaded - start:6.1f} s, forward {done - loaded:6.1f} s")
    return rows


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> Difference:
    apart = ours - theirs
    largest = apart.abs().max() / theirs.abs().max()
    rms = apart.square().mean().sqrt() / theirs.square().mean().sqrt()
    tokens = apart.square().mean(1).sqrt() / theirs.square().mean(1).sqrt()
    return Difference(float(largest), float(rms), float(tokens.median()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=1)
    args = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.model}")
    ids = prompts(args.model, args.tokens, args.prompts)
    cpu = logits(args.model, ids, "float32", "cpu")
    gpu = difference(logits(args.model, ids, "float32", "cuda"), cpu)
    cpu_bf16 = difference(logits(args.model, ids, "bfloat16", "cpu"), cpu)
    gpu_bf16 = difference(logits(args.model, ids, "bfloat16", "cuda"), cpu)
    print(f"float32  on the GPU: {gpu}  (bar: largest {BAR:.0e})")
    print(f"bfloat16 on the CPU: {cpu_bf16}")
    print(f"bfloat16 on the GPU: {gpu_bf16}  (bar: median {EQUAL} of the CPU's)")
    return 0 if gpu.largest <= BAR and gpu_bf16.median <= EQUAL * cpu_bf16.median else 1


if __name__ == "__main__":
    sys.exit(main())
