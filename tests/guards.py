"""The rules that the source tree keeps, as functions from a tree to a list of violations.

Each takes the files' texts, so that a test can show that it fails on a tree that breaks the rule.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent

# A module imports only from its own layer or those above (docs/structure.md); first match counts.
LAYERS = [
    (0, r"tpx\.(errors|split|mesh|version)"),
    (1, r"tpx\.(families(\..*)?|files|new_folder|strict_json|index|hub(\..*)?|config)"),
    (1, r"tpx\.kernels(\..*)?"),
    (2, r"tpx\.(plan|launch)(\..*)?"),
    (3, r"tpx\.(mxfp4|read(\..*)?|shard|batch|ops(\..*)?)"),
    (4, r"tpx\.(record|comm|exchange)"),
    (5, r"tpx\.(moe|layers)(\..*)?"),
    (6, r"tpx\.(models(\..*)?|text)"),
    (7, r"tpx\.(params|results|engine(\..*)?)"),
    (8, r"tpx(\.(worker|llm|agree|answer|arguments|prompts|generate|cli(\..*)?|__main__))?"),
    (8, r"tpx\.(async_engine|session|feed|batches|reports)"),
    (8, r"tpx\.(requests_file|results_file|generate_file)"),
    (8, r"tpx\.(bench(\..*)?|simulate|recording|narrow|verify|blame|trial|selftest)"),
]
TORCH_FREE = (
    r"tpx|tpx\.(errors|split|mesh|version|files|new_folder|strict_json|index|config|params)"
    r"|tpx\.families(\..*)?|tpx\.plan(\..*)?|tpx\.hub(\..*)?|tpx\.launch(\..*)?|tpx\.cli(\..*)?"
    r"|tpx\.(requests_file|results_file)|tpx\.bench\.asked"
    r"|tpx\.kernels(\..*)?|tpx\.engine\.(request|pool|blocks|scheduler)"
)
USES_DISTRIBUTED = {"tpx/comm.py", "tpx/worker.py", "tpx/launch/elastic.py"}
READS_ENVIRONMENT = r"tpx/(launch/.*|worker)\.py"
KNOWS_A_FAMILY = r"tpx/(families|models)/(gpt_oss|__init__)\.py"
MOST_LINES = 300


def sources(root: Path = ROOT, *folders: str) -> dict[str, str]:
    """The Python files below `folders`, by path from the root."""
    found = (path for folder in folders for path in sorted((root / folder).rglob("*.py")))
    return {path.relative_to(root).as_posix(): path.read_text() for path in found}


def module_name(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def imports(path: str, text: str) -> Iterator[tuple[str, int]]:
    """Every module that a file imports anywhere, absolute, with its line."""
    package = module_name(path).split(".")
    if not path.endswith("__init__.py"):
        package = package[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, node.module] if node.module else base)
            if node.module is None or stem == "tpx":
                yield from ((f"{stem}.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield stem, node.lineno


def layer(module: str) -> int | None:
    return next((n for n, pattern in LAYERS if re.fullmatch(pattern, module)), None)


def layer_violations(files: dict[str, str]) -> list[str]:
    found = []
    for path, text in files.items():
        own = layer(module_name(path))
        if own is None:
            found.append(f"{path}: belongs to no layer")
            continue
        for module, line in imports(path, text):
            other = layer(module) if module.split(".")[0] == "tpx" else None
            if other is not None and other > own:
                found.append(f"{path}:{line}: layer {own} imports {module} of layer {other}")
    return found


def torch_violations(files: dict[str, str]) -> list[str]:
    """Files that must not need torch, and files that must not need torch.distributed."""
    found = []
    for path, text in files.items():
        free = re.fullmatch(TORCH_FREE, module_name(path)) and path != "tpx/launch/elastic.py"
        for module, line in imports(path, text):
            if free and module.split(".")[0] == "torch":
                found.append(f"{path}:{line}: imports {module}")
            if module.startswith("torch.distributed") and path not in USES_DISTRIBUTED:
                found.append(f"{path}:{line}: imports {module}")
        if path not in USES_DISTRIBUTED and re.search(r"\btorch\.distributed\.", text):
            found.append(f"{path}: uses torch.distributed")
    return found


def environment_violations(files: dict[str, str]) -> list[str]:
    return [
        path
        for path, text in files.items()
        if re.search(r"os\.(environ|getenv)|from os import", text)
        and not re.fullmatch(READS_ENVIRONMENT, path)
    ]


def family_violations(files: dict[str, str]) -> list[str]:
    return [
        path
        for path, text in files.items()
        if re.search(r"gpt.oss", text, re.IGNORECASE) and not re.fullmatch(KNOWS_A_FAMILY, path)
    ]


def length_violations(files: dict[str, str]) -> list[str]:
    lengths = {path: text.count("\n") for path, text in files.items()}
    return [f"{path}: {lines} lines" for path, lines in lengths.items() if lines > MOST_LINES]


def shadowing_packages(root: Path = ROOT) -> list[str]:
    """An __init__.py in one of these would shadow an installed package when run from the root; and
    a kernel's repository is no package."""
    folders = ("kernels", "plans", "launch")
    found = [folder for folder in folders if (root / folder / "__init__.py").exists()]
    below = sorted((root / "kernels").glob("*/**/__init__.py"))
    bare = [path.relative_to(root).parent for path in below]
    return found + [path.as_posix() for path in bare if not {"torch-ext", "build"} & {*path.parts}]


def shell_blocks(markdown: str) -> list[str]:
    """A page's ```sh blocks, each a script that a reader runs from the repository's root."""
    return re.findall(r"^```sh\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)
