"""What `tpx launch` runs without a script: every rank generates, rank 0 writes.

The text goes to stdout as it comes; the report (mesh, what each rank holds and read, speed) to
stderr. The model and plan come in TPX_MODEL and TPX_TP_PLAN, the rest as one JSON argument.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .kernels import describe
from .launch.command import Generation
from .launch.progress import wait_until_erased
from .llm import LLM
from .mesh import AXES, Coords, Mesh
from .params import SamplingParams
from .prompts import Prompt, no_tokenizer
from .results import Report
from .version import __version__
from .worker import progress_folder

WIDTH = 80


class Speed(NamedTuple):
    tokens: int
    seconds: float  # from the prompts to the last token


def main(argument: str) -> None:
    told = Generation(**json.loads(argument))
    with LLM(dtype=told.dtype, **told.engine) as llm:
        speaks = llm.worker.place.rank == 0
        console = Console(stderr=True, width=WIDTH, highlight=False, quiet=not speaks)
        if speaks:
            wait_until_erased(progress_folder())
        print_report(llm, console)
        prompts = [chat(llm, text) for text in told.prompts] if told.chat else told.prompts
        params = SamplingParams(**told.sampling)
        write = stream if len(prompts) == 1 else batch
        shown = [""] * len(prompts) if told.chat else told.prompts
        speed = write(llm, prompts, shown, params, speaks)
        console.print(speed_line(speed), style="dim")


def chat(llm: LLM, text: str) -> list[int]:
    """The prompt's ids, in the checkpoint's chat template. Raises RequestError."""
    if llm.tokenizer is None:
        raise no_tokenizer("`--prompt`", llm.prepared.folder)
    return llm.tokenizer.chat([{"role": "user", "content": text}])


def stream(
    llm: LLM, prompts: Sequence[Prompt], shown: Sequence[str], params: SamplingParams, speaks: bool
) -> Speed:
    """One prompt: its continuation is written piece by piece."""
    begin = time.perf_counter()
    say([shown[0]], speaks)
    pieces = llm.stream(prompts[0], params)
    result = None
    while result is None:
        try:
            say([next(pieces)], speaks)
        except StopIteration as end:
            result = end.value
    say(["\n"], speaks)
    return Speed(len(result.token_ids), time.perf_counter() - begin)


def batch(
    llm: LLM, prompts: Sequence[Prompt], shown: Sequence[str], params: SamplingParams, speaks: bool
) -> Speed:
    """Several prompts at once, written one after the other."""
    begin = time.perf_counter()
    results = llm.generate(prompts, params)
    seconds = time.perf_counter() - begin
    texts = [f"{prompt}{result.text}\n" for prompt, result in zip(shown, results, strict=True)]
    say(["\n".join(texts)], speaks)
    return Speed(sum(len(result.token_ids) for result in results), seconds)


def say(texts: Iterable[str], speaks: bool) -> None:
    if speaks:
        print(*texts, sep="", end="", flush=True)


def print_report(llm: LLM, console: Console) -> None:
    spec, report = llm.spec, llm.report
    dtype = str(llm.dtype).removeprefix("torch.")
    console.print(
        f"[bold]tpx {__version__}[/bold]  {llm.prepared.folder.name}: {spec.num_hidden_layers} "
        f"layers, {spec.num_local_experts} experts, top {spec.num_experts_per_tok}, {dtype}"
    )
    console.print(Text(f"mesh {report.mesh}, plan {shorter(report.plan)}", overflow="fold"))
    console.print(rank_table(report))
    for note in report.notes:
        console.print(Text(note))
    for line in describe(report.kernels):
        console.print(Text(line, overflow="fold"))
    console.print(f"{load_lines(report)}\n")


def rank_table(report: Report) -> Table:
    table = Table(box=None, padding=(0, 3, 0, 0), header_style="bold")
    for name in ("rank", "place", "device"):
        table.add_column(name)
    for name in ("read", "holds"):
        table.add_column(name, justify="right")
    for rank in report.ranks:
        where = place_name(report.mesh, rank.coords)
        table.add_row(
            str(rank.rank), where, rank.device, size(rank.bytes_read), size(rank.bytes_held)
        )
    if len(report.ranks) > 1:
        table.add_row("all", "", "", size(report.bytes_read), size(report.bytes_held))
    return table


def load_lines(report: Report) -> str:
    """How long the load took, what it read, and the memory that it needed for a while."""
    lines = [
        f"loaded in {report.seconds:.2f} s (read {report.read_seconds:.2f} s, copy "
        f"{report.copy_seconds:.2f} s, prepare {report.prepare_seconds:.2f} s)",
        f"read {report.read_amplification:.2f}x of what is kept, with at most "
        f"{report.host_peak / 1e6:,.1f} MB of host memory beside it",
    ]
    if report.device_peak is not None:
        lines.append(f"device memory at most {report.device_peak:.2f}x of what is held")
    return "\n".join(lines)


def shorter(path: str) -> str:
    """From the current folder, where it is in it."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def place_name(mesh: Mesh, coords: Coords) -> str:
    """`tp 1, ep 0`: the axes that the mesh cuts."""
    cut = [axis for axis in AXES if getattr(mesh, axis) > 1]
    return ", ".join(f"{axis} {getattr(coords, axis)}" for axis in cut)


def size(nbytes: int) -> str:
    """Exact bytes while they fit a column, else in MB."""
    return f"{nbytes:,} B" if nbytes < 10**10 else f"{nbytes / 1e6:,.1f} MB"


def speed_line(speed: Speed) -> str:
    rate = speed.tokens / speed.seconds
    return f"{speed.tokens} tokens in {speed.seconds:.2f} s: {rate:.1f} tokens a second"


if __name__ == "__main__":
    main(sys.argv[1])
