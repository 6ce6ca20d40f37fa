"""CPU against GPU on one checkpoint: float32 must agree, bfloat16 must be no worse on the GPU.

    python scripts/check_gpu.py examples/models/tpx-demo --tokens 300

float32 on both, TF32 off: the largest difference of logits is at most 1e-4 of the largest logit.
bfloat16 on the GPU, against float32 on the CPU, is no further off than bfloat16 on the CPU.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

import tpx

BAR = 1e-4


def logits(model: str, ids: list[int], dtype: str, device: str) -> torch.Tensor:
    """[tokens, vocab] float32 on the CPU; prints what loading and the forward cost."""
    start = time.perf_counter()
    with tpx.LLM(model, tp_plan="tp1", dtype=dtype, device=device) as llm:
        loaded = time.perf_counter()
        rows = llm.logits([ids])[0].cpu()
        done = time.perf_counter()
    print(f"{device:5} {dtype:9} load {loaded - start:6.1f} s, forward {done - loaded:6.1f} s")
    return rows


def share(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.model}")
    ids = torch.randint(
        2, 1000, (args.tokens,), generator=torch.Generator().manual_seed(0)
    ).tolist()
    cpu = logits(args.model, ids, "float32", "cpu")
    gpu = share(logits(args.model, ids, "float32", "cuda"), cpu)
    cpu_bf16 = share(logits(args.model, ids, "bfloat16", "cpu"), cpu)
    gpu_bf16 = share(logits(args.model, ids, "bfloat16", "cuda"), cpu)
    print(f"float32  GPU against CPU            {gpu:.2e} of the largest logit (bar {BAR:.0e})")
    print(f"bfloat16 CPU against float32 on CPU {cpu_bf16:.2e}")
    print(f"bfloat16 GPU against float32 on CPU {gpu_bf16:.2e} (no larger than the line above)")
    return 0 if gpu <= BAR and gpu_bf16 <= cpu_bf16 else 1


if __name__ == "__main__":
    sys.exit(main())
