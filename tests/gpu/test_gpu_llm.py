"""The demo checkpoint on a GPU, on torch's reference operations, against the CPU."""

from __future__ import annotations

import pytest
import torch
from parity import DEMO, prompts, relative_error

import tpx

pytestmark = pytest.mark.gpu


def run(device: str, dtype: str) -> tuple[list, list[tuple[int, ...]]]:
    params = tpx.SamplingParams(max_tokens=32, ignore_eos=True)
    with tpx.LLM(DEMO, tp_plan="tp1", dtype=dtype, device=device) as llm:
        rows = [row.cpu().numpy() for row in llm.logits(prompts(1000))]
        return rows, [tuple(c.token_ids) for c in llm.generate(prompts(1000), params)]


def test_float32_agrees_with_the_cpu():
    torch.set_float32_matmul_precision("highest")
    cpu, tokens = run("cpu", "float32")
    gpu, gpu_tokens = run("cuda", "float32")
    assert max(relative_error(g, c) for g, c in zip(gpu, cpu, strict=True)) <= 1e-4
    assert gpu_tokens == tokens
