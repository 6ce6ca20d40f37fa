"""A process that compiles kernels into Triton's cache on disk: jobs on stdin, answers on stdout.

One JSON line a job (see compiling.Job), one for its answer; it ends when stdin does. It is run by
its path and imports kernels' source files without their packages, so that neither tpx nor torch,
which takes seconds, is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import time
from types import ModuleType
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a compiler prints is no answer
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


def answer(job: dict[str, Any]) -> dict[str, Any]:
    """error: "" where all is in the cache now. torch: whether something imported it."""
    began, error = time.perf_counter(), ""
    try:
        compile_one(job)
    except Exception as raised:  # of the compiler, or a foreign module: any kind
        cause = f" ({raised.__cause__})" if raised.__cause__ else ""
        error = f"{type(raised).__name__}: {raised}{cause}"
    seconds = round(time.perf_counter() - began, 3)
    return {"error": error, "seconds": seconds, "torch": "torch" in sys.modules}


def compile_one(job: dict[str, Any]) -> None:
    """As JITFunction.preload and _do_compile do it, which need a device's driver."""
    compiler = importlib.import_module("triton.compiler")
    said = json.loads(job["data"])
    source = compiler.ASTSource(
        kernel_of(job),
        {name: as_tuple(kind) for name, kind in said["signature"].items()},
        pairs(said["constant_keys"], map(constant, said["constant_vals"])),
        pairs(said["attrs_keys"], said["attrs_vals"]),
    )
    backends = importlib.import_module("triton.backends.compiler")
    target = backends.GPUTarget(*job["target"])
    options = {name: as_tuple(value) for name, value in said["options"].items()}
    compiled = compiler.compile(source, target=target, options=options)
    if job["launcher"] and target.backend == "cuda":
        build_launcher(compiled)


def build_launcher(compiled: Any) -> None:
    """The C module that passes the arguments of one signature, which a host's compiler makes."""
    nvidia = importlib.import_module("triton.backends.nvidia.driver")
    try:
        nvidia.CudaLauncher(compiled.src, compiled.metadata)
    except Exception as error:  # no compiler, no driver
        raise RuntimeError("compiled, but for its launcher") from error


def kernel_of(job: dict[str, Any]) -> Any:
    """The JITFunction, of the module by the name that it has in the process that launches it."""
    for name, folders in job["packages"]:
        if name not in sys.modules:
            package = ModuleType(name)  # stands for it, so that its __init__ does not run
            package.__path__ = folders
            sys.modules[name] = package
    name = job["module"]
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, job["file"])
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    found: Any = sys.modules[name]
    for part in job["kernel"].split("."):
        found = getattr(found, part)
    return found


def pairs(keys: list[list[int]], values: Any) -> dict[tuple[int, ...], Any]:
    return dict(zip(map(tuple, keys), values, strict=True))


def constant(value: Any) -> Any:
    tl = importlib.import_module("triton.language")
    if isinstance(value, dict) and "constexpr" in value:
        return tl.constexpr(value["constexpr"])
    return tl.dtype(value) if tl.dtype.is_dtype(value) else as_tuple(value)


def as_tuple(value: Any) -> Any:
    """JSON has lists for tuples, and a kernel's arguments hold no list."""
    return tuple(map(as_tuple, value)) if isinstance(value, list) else value


if __name__ == "__main__":
    main()
