"""`tpx generate`: checks a file of requests, and starts ranks for those that are not done."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ..errors import RequestError
from ..launch.command import SAMPLING, TEXT_OPTIONS, generation
from ..launch.named import named
from ..launch.options import Options
from ..launch.preflight import Job, preflight
from ..launch.supervise import supervise
from ..params import SamplingParams
from ..plan.prepare import Prepared
from ..requests_file import EXAMPLE, IDS, Line, located, read_requests
from ..results_file import ANEW, Done, Made, begin, check_output, look
from .generate_bar import Bar
from .generate_checks import check_lines, model_digest
from .generate_flags import USAGE, Asked, parse, print_help, typed
from .launch import before_the_start

RANKS = "tpx.generate_file"


def run(argv: Sequence[str]) -> int:
    """-> the exit code. Raises TpxError for everything that is wrong before a rank starts."""
    asked = parse(argv)
    if asked is None:
        print_help()
        return 0
    asked = asked._replace(options=named(asked.options, USAGE))
    flags = flags_of(asked.options)
    check_output(asked.target, asked.source)
    done, made = look(asked.target, asked.restart)
    made = made if done.digests else None
    if made is not None:
        check_flags(asked.target, made.flags, flags)
    total = check_input(asked, done)
    over = len(done.digests) == total
    job = preflight(for_ranks(asked, total, over))
    now = made_with(asked, flags, job)
    if made is not None:
        check_model(asked.target, made, now)
    check_lines(asked.source, lines_of(asked), done.digests, prepared(job))
    begin(asked.target, now, done)
    if done.torn and not asked.restart:
        say(f"cut off {done.torn:,} bytes at the end of `{asked.target}`: a line was not whole")
    if over:
        say(f"nothing to do: all {total:,} requests of `{asked.source}` are in `{asked.target}`")
        return 0
    return work(asked, job, Bar(total, len(done.digests)))


def flags_of(options: Options) -> dict[str, Any]:
    """What the command line says of requests that do not, by option. Raises RequestError."""
    params = SamplingParams(**generation(options).sampling)
    given = {field: getattr(params, name) for field, name in SAMPLING.items()}
    return {"chat": options.chat, "dtype": options.dtype or "auto", **given}


def lines_of(asked: Asked) -> Iterator[Line]:
    return read_requests(asked.source, generation(asked.options).sampling, asked.options.chat)


def check_input(asked: Asked, done: Done) -> int:
    """How many requests there are. Raises RequestError where one cannot be read, has the id of
    another, or is done and says something else now."""
    seen: dict[str | int, int] = {}
    for line in lines_of(asked):
        with located(asked.source, line.number):
            if line.id in seen:
                raise RequestError(
                    f"`id` is `{line.id}`, as in line {seen[line.id]}", f"give another one; {IDS}"
                )
            if done.digests.get(line.id, line.digest) != line.digest:
                raise RequestError(
                    f"request `{line.id}` is in `{asked.target}`, and said something else there",
                    f"write it as it was, or give it an `id` of its own; {ANEW}",
                )
        seen[line.id] = line.number
    if not seen:
        raise RequestError(f"`{asked.source}` has no request", EXAMPLE)
    for name in done.digests:
        if name not in seen:
            raise RequestError(
                f"`{asked.target}` has a result for `{name}`, and `{asked.source}` no such request",
                f"put it back; {ANEW}",
            )
    return len(seen)


def check_flags(target: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    for field, value in new.items():
        if old.get(field) != value:
            was, now = typed(field, old.get(field)), typed(field, value)
            raise RequestError(
                f"`{target}` was begun with {was}, and now there is {now}",
                f"write {was}; {ANEW}",
            )


def check_model(target: str, made: Made, now: Made) -> None:
    if made.weights != now.weights:
        was = f"`{made.model}`" if made.model != now.model else "an earlier state of it"
        raise RequestError(
            f"`{target}` was begun with another model than `{now.model}`: {was}",
            f"name that one: `--model`; {ANEW}",
        )


def for_ranks(asked: Asked, total: int, dry: bool) -> Options:
    """dry: nothing is written, since no rank will start."""
    options = asked.options
    source, target = (os.path.abspath(path) for path in asked[:2])
    _, chat, dtype, sampling, engine = generation(options)
    told = json.dumps([source, target, total, chat, dtype, sampling, engine])
    default = Options()
    own = {field: getattr(default, field) for field in TEXT_OPTIONS}  # a script has none of them
    return replace(options, **own, target=RANKS, module=True, args=(told,), dry_run=dry)


def prepared(job: Job) -> Prepared:
    assert job.model.prepared is not None, f"{job.model=}"
    return job.model.prepared


def made_with(asked: Asked, flags: dict[str, Any], job: Job) -> Made:
    return Made(str(asked.options.model), model_digest(prepared(job)), flags)


def work(asked: Asked, job: Job, bar: Bar) -> int:
    """Runs the job; -> its exit code."""
    for line in before_the_start(job):
        say(line)
    if bar.before:
        say(f"{bar.before:,} of {bar.total:,} requests are done in `{asked.target}`: going on")
    ending = supervise(job, asked.options, bar.draw)
    if ending.text:
        say(ending.text)
    if ending.exit_code == 0:
        say(bar.summary())
    elif bar.done:
        say(f"{bar.done:,} of {bar.total:,} requests are in `{asked.target}`: "
            "the same command goes on from there")  # fmt: skip
    return ending.exit_code


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
