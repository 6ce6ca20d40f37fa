"""What `tpx generate` runs: every rank generates, rank 0 reads the requests and writes the results.

What is asked comes as one JSON argument, the model and plan in TPX_MODEL and TPX_TP_PLAN.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Container, Iterable, Iterator
from typing import Any, NamedTuple

from rich.console import Console

from .errors import RequestError
from .generate import WIDTH, print_report
from .launch.progress import Writer, wait_until_erased
from .llm import LLM
from .params import Request
from .prompts import no_tokenizer
from .requests_file import Line, located, read_requests
from .results_file import PROGRESS, ResultsFile
from .worker import progress_folder


class Told(NamedTuple):
    """source, target: the files. total: requests. sampling: arguments of SamplingParams for
    requests that do not say. engine: of LLM, for its engine's sizes."""

    source: str
    target: str
    total: int
    chat: bool
    dtype: str | None
    sampling: dict[str, Any]
    engine: dict[str, Any]


def main(argument: str) -> None:
    told = Told(*json.loads(argument))
    with LLM(dtype=told.dtype, **told.engine) as llm:
        if llm.worker.place.rank == 0:
            lead(llm, told)
        else:
            follow(llm.generate_batch(()))


def follow(results: Iterable[object]) -> None:
    for _ in results:
        pass


def lead(llm: LLM, told: Told) -> None:
    """Rank 0's part. Its record of progress counts requests, and the tokens written."""
    wait_until_erased(progress_folder())
    print_report(llm, Console(stderr=True, width=WIDTH, highlight=False))
    results = ResultsFile(told.target)
    writer, tokens, done = Writer(progress_folder() / PROGRESS), 0, results.done.digests
    writer.update("generate", len(done), told.total, tokens)
    digests: dict[str | int, str] = {}  # of requests that are under way
    for result in llm.generate_batch(remaining(llm, told, done, digests)):
        results.add(result, digests.pop(result.id))
        tokens += sum(len(completion.token_ids) for completion in result.completions)
        writer.update("generate", len(done), told.total, tokens)
    results.close()


def remaining(
    llm: LLM, told: Told, done: Container[str | int], digests: dict[str | int, str]
) -> Iterator[Request]:
    """Requests that are not done, as the ranks have room for them. Raises RequestError."""
    for line in read_requests(told.source, told.sampling, told.chat):
        if line.id in digests:
            raise RequestError(f"`{told.source}` changed while it was read", "start again")
        if line.id not in done:
            with located(told.source, line.number):
                prompt = prompt_of(llm, line)
            digests[line.id] = line.digest
            yield Request(prompt, line.params, line.id)


def prompt_of(llm: LLM, line: Line) -> str | list[int]:
    if line.prompt is not None:
        return line.prompt
    if llm.tokenizer is None:
        raise no_tokenizer("`messages`", llm.prepared.folder)
    return llm.tokenizer.chat(line.messages or [])


if __name__ == "__main__":
    main(sys.argv[1])
