"""Compiles kernels for a GPU that is not here: python compile_moe.py CAPABILITY DTYPE [all].

Prints a list of what each became, as JSON: registers, bytes of shared memory and of stack,
instructions and what the innermost loop holds. In a process of its own, since the tests' process
interprets kernels.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "torch-ext"))

import triton
from tpx_moe import configs, gemm_kernels, pack_kernels, reduce_kernels, route_kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
WIDTH = 2880
SIXTEENS = {"rows", "x_stride", "out_stride", "split_stride", "y_stride"}  # are multiples of 16
FLOATS = {"alpha", "limit", "eps"}
INTEGERS = {"pairs", "span", "experts", "tokens", "columns", "granules", "stride"}
INTEGERS |= SIXTEENS
WORDS = {"codes": "i16", "scales": "i32", "ids": "i32", "slots": "i32", "order": "i32"}
WORDS |= {"starts": "i32", "blocks": "u8", "packed": "u8"}


def compiled(
    kernel: Any, capability: int, dtype: str, warps: int, stages: int, **fixed: Any
) -> Any:
    parts = fixed.get("GATED") is False and not fixed["SORTED"]  # of down, in decode

    def kind(name: str) -> str:
        if name in fixed:
            return "constexpr"
        if name == "out" and parts:
            return "*fp32"
        if name in FLOATS:
            return "fp32"
        return "i32" if name in INTEGERS else f"*{WORDS.get(name, dtype)}"

    names = kernel.arg_names
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (i,): aligned
        for i, name in enumerate(names)
        if name in SIXTEENS or kind(name).startswith("*")
    }
    source = ASTSource(
        kernel,
        {name: kind(name) for name in names},
        {(names.index(name),): value for name, value in fixed.items()},
        attributes,
    )
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def gemms(capability: int, dtype: str, table: configs.Table) -> list[dict[str, Any]]:
    found = []
    asm, dependent = dtype == "bf16" and capability >= 80, capability >= 90
    for many, ways in ((False, table.decode), (True, table.sorted)):
        for way in ways:
            for gated, tile in ((True, way.gate_up), (False, way.down)):
                fixed = {
                    **{"COLUMNS": WIDTH, "BN": tile.rows, "BT": tile.tokens, "SPLIT": tile.split},
                    **{"GRANULES": tile.granules, "PARTED": tile.parted, "HALVINGS": tile.halvings},
                    **{"GATED": gated, "SORTED": many, "BY_PAIR": True, "TOP_K": 4, "SLOTS": 4},
                    **{"EXPERTS": 32, "CHOOSE": 0 if many else 32, "ALONE": way.upto == 1},
                    **{"HAS_SLOTS": False},
                    **{"slots": None, "HAS_BIAS": True},
                    **{"EXACT": False, "ASM": asm, "DEPENDENT": dependent, "EARLY": not gated},
                    **{"LATE": tile.late, "AHEAD": tile.ahead},
                }
                unused = ("logits", "ids", "weights") if many else ("order", "starts")
                fixed |= dict.fromkeys(unused)
                kernel = compiled(
                    gemm_kernels.expert_gemm, capability, dtype, tile.warps, tile.stages, **fixed
                )
                lane = tile.rows * 64 * tile.granules / (32 * tile.warps)
                name = "gate_up" if gated else "down"
                what = {"name": name, "tile": tile._asdict(), "weights": lane}
                found.append({**what, **told(kernel)})
    return found


def others(capability: int, dtype: str) -> list[dict[str, Any]]:
    dependent = {"DEPENDENT": capability >= 90}
    every = {"E": 32, "TOP_K": 4, "SLOTS": 4, **dependent}
    norm = {"WIDTH": WIDTH, "HAS_NORM": True}
    jobs: dict[str, tuple[Any, int, dict[str, Any]]] = {
        "logits": (
            route_kernels.logits_kernel,
            4,
            {**norm, "BLOCK": 1024, "E": 32, "EACH": 2, **dependent},
        ),
        "choose": (route_kernels.choose_kernel, 1, {**every, "ROWS": 1, "EXPERTS": 32}),
        "sort": (
            route_kernels.sort_kernel,
            8,
            {"slots": None, "COUNT": 4096, "CHUNK": 2048, "HAS_SLOTS": False, **dependent},
        ),
        "reduce": (
            reduce_kernels.reduce_kernel,
            16,
            {
                **{"WIDTH": WIDTH, "BLOCK": 4096, "TOP_K": 4, "SPLIT": 2, "HAS_SLOTS": False},
                **{"slots": None, "HAS_RESIDUAL": True, "HAS_NORM": True, **dependent},
            },
        ),
    }
    layout = {"PLACES": pack_kernels.CODE, "TILE": 64, "PARTS": 4, "WORDS": 16}
    jobs["pack"] = (pack_kernels.pack_kernel, 4, {"PAIRS": True, **layout})
    if capability >= 80:  # below, tokens are routed one by one
        many = {**every, **norm, "ROWS": 16, "EXPERTS": 32, "BLOCK": 256}
        jobs["route"] = (route_kernels.route_kernel, 4, many)
    return [
        {"name": name, **told(compiled(kernel, capability, dtype, warps, 3, **fixed))}
        for name, (kernel, warps, fixed) in jobs.items()
    ]


def told(kernel: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        text = tool("nvdisasm", "-c", file.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    loop = inner_loop(text)
    return {
        "registers": int(registers),
        "shared": kernel.metadata.shared,
        "stack": int(stack),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", text)),
        "loop": len(loop),
        "products": sorted({op for op in loop if "MMA" in op}),
    }


def tool(name: str, *arguments: str) -> str:
    command = [str(TOOLS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def inner_loop(text: str) -> list[str]:
    """Operations of the longest innermost loop with products of matrices, of assembly text."""
    labels: dict[str, int] = {}
    operations: list[str] = []
    loops: list[list[str]] = []
    for line in text.splitlines():
        if label := re.match(r"^\.(L_x_\d+):", line):
            labels[label[1]] = len(operations)
        elif found := re.match(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*);", line):
            operations.append(found[1])
            target = re.search(r"\(\.(L_x_\d+)\)", found[2])
            if found[1].startswith("BRA") and target and target[1] in labels:
                loops.append(operations[labels[target[1]] :])
    return max((loop for loop in loops if any("MMA" in op for op in loop)), key=len, default=[])


if __name__ == "__main__":
    capability, dtype = int(sys.argv[1]), sys.argv[2]
    device = "NVIDIA_H100_80GB_HBM3" if capability == 90 else f"sm_{capability}"
    results = gemms(capability, dtype, configs.table((device,), WIDTH))
    print(json.dumps(results + others(capability, dtype)))
