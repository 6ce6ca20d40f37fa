"""Compiles the kernels for a device that is not here: compile_attention.py CAPABILITY DTYPE.

Prints one JSON line a kernel: name, registers, spilled bytes, shared memory, instructions. Runs
as a process of its own, since the tests' process runs kernels in the interpreter.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parent.parent / "torch-ext"))
from tpx_attention import decode_kernels, linear_kernels, prefill_kernels, sample_kernels

INTEGERS = {
    **dict.fromkeys(("slots_ptr", "top_k_ptr", "ids_ptr", "lows_ptr", "aboves_ptr"), "*i64"),
    **dict.fromkeys(("parts_ptr", "keys_ptr", "ties_ptr", "kept_ptr"), "*i64"),
    **dict.fromkeys(("masses_ptr", "equals_ptr"), "*i64"),
    **dict.fromkeys(("tables_ptr", "lengths_ptr", "starts_ptr", "firsts_ptr"), "*i32"),
}
WIDE = {
    **dict.fromkeys(
        ("logits_ptr", "peaks_ptr", "tops_ptr", "part_ptr", "partial_ptr", "lse_ptr"), "*fp32"
    ),
    **dict.fromkeys(("temperature_ptr", "top_p_ptr", "u_ptr"), "*fp64"),
    **dict.fromkeys(("eps", "scale"), "fp32"),
}
HEADS = {"KV": 8, "GROUP": 8, "D": 64, "PAGE": 16, "PLAIN": False}
ALL = {"HAS_NORM": True, "HAS_BIAS": True, "HAS_RESIDUAL": True}
TERMS = {"HAS_BIAS": True, "HAS_RESIDUAL": True}


def kernels(dependent: bool):
    """(name, function, constants, warps, stages) at the shapes that ship."""
    end = {"DEPENDENT": dependent}
    gemv = {"BLOCK_K": 1024, "TILES": 3, **ALL, **end}
    yield "gemv 1", linear_kernels.gemv, {"ROWS": 1, "BLOCK_N": 4, **gemv}, 4, 1
    yield "gemv 4", linear_kernels.gemv, {"ROWS": 4, "BLOCK_N": 4, **gemv}, 4, 1
    skinny = {"BLOCK_N": 32, "BLOCK_K": 128, "STEPS": 23, "PLAIN": False, **TERMS, **end}
    for rows in (8, 16):
        sizes = {"BLOCK_T": rows, "SPLITS": 1, **skinny}
        yield f"skinny {rows}", linear_kernels.skinny, sizes, 2, 4
    yield "reduce", linear_kernels.reduce, {"SPLITS": 4, "BLOCK": 512, **TERMS, **end}, 4, 1
    yield "rms_norm", linear_kernels.rms_norm, {"BLOCK_K": 1024, "TILES": 3, **end}, 4, 1
    decode = {**HEADS, "HEADS": 16, "NEW": True, "EARLY": True, **end}
    for name, sizes in (
        ("window", {"WINDOW": 128, "BLOCK": 128, "SPLITS": 1}),
        ("full", {"WINDOW": 0, "BLOCK": 128, "SPLITS": 32}),
    ):
        yield f"decode {name}", decode_kernels.decode, {**decode, **sizes}, 4, 1
    combine = {"D": 64, "SPLITS": 32, "BLOCK": 32, **end}
    yield "combine", decode_kernels.combine, combine, 1, 1
    prefill = {**HEADS, "SEARCH": 4, **end}
    for name, window, block, warps in (("window", 128, 64, 4), ("full", 0, 128, 8)):
        sizes = {"WINDOW": window, "BLOCK_M": block, "BLOCK_Q": block // 8, "BLOCK_N": warps * 8}
        yield f"prefill {name}", prefill_kernels.prefill, {**prefill, **sizes}, warps, 2
    write = {"KV": 8, "GROUP": 8, "D": 64, "TOKENS": 2, **end}
    for each, warps in ((1, 1), (8, 4)):
        sizes = {"EACH": each, "HEADS": 8 * each}
        yield f"rope_write {each}", prefill_kernels.rope_write, {**write, **sizes}, warps, 1
    ids = {"CHUNK": 2048, **end}
    yield "peaks", sample_kernels.peaks, ids, 4, 1
    chunk = {"CHUNKS": 128, **ids}
    yield "search", sample_kernels.search, {"BY_MASS": True, "FIRST": False, **ids}, 4, 1
    yield "tally", sample_kernels.tally, {"BY_MASS": True, "BY_COUNT": False, **chunk}, 4, 1
    yield "draw", sample_kernels.draw, chunk, 4, 1


def build(function, constants, warps: int, stages: int, capability: int, dtype: str):
    names = function.arg_names
    signature, attributes = {}, {}
    for i, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer = f"*{dtype}" if name.endswith("_ptr") else "i32"
        signature[name] = INTEGERS.get(name) or WIDE.get(name) or pointer
        if signature[name].startswith("*") or name in ("K", "N", "q_stride"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=attributes,
    )
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled) -> dict[str, int]:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run(tools / "cuobjdump", "-res-usage", file.name)
        code = _run(tools / "nvdisasm", file.name)
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert numbers, usage
    return {
        "registers": int(numbers[1]),
        "stack": int(numbers[2]),
        "shared": compiled.metadata.shared,
        "instructions": len(re.findall(r"/\*[0-9a-f]{4,}\*/", code)),
        "wide_loads": len(re.findall(r"LDG\.E\S*\.128|LDGSTS\S*\.128", code)),
    }


def _run(*command: object) -> str:
    return subprocess.run([str(x) for x in command], capture_output=True, text=True).stdout


def main() -> None:
    capability, dtype = int(sys.argv[1]), sys.argv[2]
    for name, *what in kernels(dependent=capability >= 90):
        compiled = build(*what, capability, dtype)
        print(json.dumps({"name": name, **resources(compiled)}), flush=True)


if __name__ == "__main__":
    main()
