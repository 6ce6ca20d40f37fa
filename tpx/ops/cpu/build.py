"""Builds C++ with the machine's own compiler, once a machine, and opens the result.

It is plain C++ without torch's headers, so that this takes a few seconds and needs nothing but
a compiler. The cache is keyed by the source, the flags and what the processor can do.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

LOG = logging.getLogger("tpx")
FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "native.cpp", FOLDER / "lanes.h", FOLDER / "products.h")
COMPILERS = ("c++", "g++", "clang++")
# OpenMP's threads are torch's own: its library has the name that the linker asks for. Never
# -ffast-math: it would turn off the subnormal numbers of the whole process.
FLAGS = ("-O3", "-march=native", "-std=gnu++17", "-ffp-contract=fast", "-fopenmp", "-fPIC")
LOST = "packed experts are unpacked by torch at every step, several times slower"


class BuildError(Exception):
    """Why there is no library, in words that follow a colon."""


class Code(NamedTuple):
    """sources: the first is compiled, and includes the others. The library has its name."""

    sources: tuple[Path, ...]
    flags: tuple[str, ...]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The built operations; None where they cannot be built, which is logged once."""
    try:
        return open_library(cache_folder())
    except (BuildError, OSError) as error:
        LOG.warning(f"no C++ operations on this CPU, {LOST}: {error}")
        return None


def cache_folder() -> Path:
    """Beside what torch itself fetches and keeps."""
    return Path(torch.hub.get_dir()).parent / "tpx"


def open_library(folder: Path, code: Code | None = None) -> ctypes.CDLL:
    """From the folder, built there first if need be; None: the operations. Raises BuildError and
    OSError."""
    code = code or Code(SOURCES, FLAGS)
    target = folder / f"{code.sources[0].stem}-{fingerprint(code)}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:  # ranks wait for the one that builds
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                compile_to(target, code)
    return ctypes.CDLL(str(target))


def compile_to(target: Path, code: Code) -> None:
    """Builds a file of another name and renames it: whatever has the name `target` is whole."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise BuildError(f"none of {', '.join(f'`{name}`' for name in COMPILERS)} is installed")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / target.name
        command = [compiler, *code.flags, "-shared", str(code.sources[0]), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode != 0:
            said = [line for line in done.stderr.splitlines() if "error" in line]
            raise BuildError(f"`{compiler}` failed: {said[0] if said else done.returncode}")
        os.replace(built, target)


def fingerprint(code: Code | None = None) -> str:
    """Of all that the built file depends on, but for the compiler's version."""
    sources, flags = code or Code(SOURCES, FLAGS)
    parts = (*(file.read_text() for file in sources), *flags, platform.machine(), processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What the first processor is and can do, as far as the kernel says; "" where it does not."""
    try:
        first, _, _ = cpuinfo.read_text().partition("\n\n")
    except OSError:
        return ""
    told = (line.partition(":") for line in first.splitlines())
    names = ("cpu family", "model", "flags", "Features", "CPU part")
    return "".join(value for name, _, value in told if name.strip() in names)
