"""Builds the kernels' repositories as the Hugging Face Hub has them: one folder a variant.

    python scripts/build_kernels.py                       # kernels/*/build/torch-cuda
    python scripts/build_kernels.py --out /tmp/tpx-moe --only tpx-moe

A variant is a copy of torch-ext/<package> with a metadata.json. Its operations are registered with
torch under a name made of the files' digest, so that two builds live in one process. Kernels in
Triton are compiled where they run: there is nothing else to build.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent / "kernels"
BACKENDS = ("cuda", "cpu")  # on a CPU a package runs its torch references
SUFFIXES = {".py", ".json"}
OPS = Path("_ops.py")  # holds the name that torch.library knows the operations under


def repositories(root: Path = ROOT) -> list[Path]:
    return sorted(path.parent for path in root.glob("*/torch-ext"))


def source_files(package: Path) -> list[Path]:
    """What a variant holds, from the package's folder."""
    found = [path for path in sorted(package.rglob("*")) if path.suffix in SUFFIXES]
    return [path.relative_to(package) for path in found]


def digest(package: Path) -> str:
    """Seven letters that change with any file."""
    sha = hashlib.sha256()
    for name in source_files(package):
        sha.update(f"{name.as_posix()}\0".encode() + (package / name).read_bytes() + b"\0")
    return sha.hexdigest()[:7]


def build(repository: Path, backend: str = "cuda", out: Path | None = None) -> Path:
    """Writes out/torch-<backend> and nothing else; out: the repository's build/. -> that folder."""
    [package] = (repository / "torch-ext").glob("*/__init__.py")
    package = package.parent
    variant = (out or repository / "build") / f"torch-{backend}"
    if variant.exists():
        shutil.rmtree(variant)
    for name in source_files(package):
        (variant / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(package / name, variant / name)
    unique = f"_{package.name}_{backend}_{digest(package)}"
    (variant / OPS).write_text(renamed((package / OPS).read_text(), package.name, unique))
    metadata = json.loads((repository / "metadata.json").read_text())
    metadata |= {"id": unique, "backend": {"type": backend}}
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return variant


def renamed(text: str, name: str, unique: str) -> str:
    line = f'NAMESPACE = "{name}"\n'
    assert text.count(line) == 1, f"{OPS} has no line {line!r}"
    return text.replace(line, f'NAMESPACE = "{unique}"\n')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [path.name for path in repositories()]
    parser.add_argument("--only", choices=names, help="one of them (default: all)")
    parser.add_argument("--backend", choices=BACKENDS, default=BACKENDS[0])
    parser.add_argument("--out", type=Path, help="with --only: where to (default: its build/)")
    args = parser.parse_args()
    if args.out and not args.only:
        parser.error("--out needs --only")
    for repository in repositories():
        if args.only in (None, repository.name):
            print(build(repository, args.backend, args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
