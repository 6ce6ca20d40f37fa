"""The flags of `tpx bench latency|throughput|load`, and what they ask for."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..bench.asked import Asked, Lengths, ways_of
from ..errors import PlanError
from ..launch.options import nproc, whole, words
from ..params import MAX_SEED

AT_ONCE = 256  # sequences that run at the same time, where nothing else is said
PEERS = ("transformers",)
Add = Callable[..., Any]


def add_parsers(commands: Any) -> None:
    said = "time to the first token and time a token, of some sequences at once"
    add = _parser(commands, "latency", said, rounds=5)
    add("--batch", default="1,2,4,8,16", metavar="A,B,...",
        help="sequences at once (default: 1,2,4,8,16)")  # fmt: skip
    _lengths(add, "N")
    _peer(add)
    said = "tokens a second of many requests of mixed lengths, at once or at a rate"
    add = _parser(commands, "throughput", said, rounds=3)
    add("--requests", default="64", metavar="N", help="how many (default: 64)")
    add("--rate", default="inf", metavar="R|inf", help="requests a second (default: inf)")
    add("--batch", default=str(AT_ONCE), metavar="N",
        help=f"most sequences at once (default: {AT_ONCE})")  # fmt: skip
    _lengths(add, "A[:B]")
    add("--prefix-len", default="0", metavar="N", help="tokens that all prompts begin with alike")
    add("--seed", default="0", metavar="N", help="of lengths, prompts and arrivals (default: 0)")
    _peer(add)
    said = "seconds from a process to its first token, by part, and memory"
    _parser(commands, "load", said, rounds=3)


def _parser(commands: Any, name: str, said: str, rounds: int) -> Add:
    add: Add = commands.add_parser(name, help=said, description=f"Measures {said}.").add_argument
    add("--model", required=True, metavar="PATH|ID", help="a folder or a Hugging Face id")
    add("--tp-plan", default="auto", metavar="PLAN", help="auto (default), a name or a YAML file")
    add("--nproc", default="1", metavar="N|auto", help="ranks (default: 1)")
    add("--device", metavar="cpu|cuda", help="default: cuda where a GPU is visible")
    add("--dtype", metavar="auto|float32", help="what is computed in (default: the checkpoint's)")
    add("--rounds", default=str(rounds), metavar="N",
        help=f"of which the median counts (default: {rounds})")  # fmt: skip
    add("--use-kernels", metavar="on|off|both", help="on a CPU the C++ operations (default: on)")
    add("--graphs", metavar="on|off|both", help="CUDA graphs of decode steps (default: on)")
    add("--prefix-cache", metavar="on|off|both", help="(default: off)")
    add("--json", action="store_true", help="print all that was found")
    add("--html", metavar="FILE", help="also write a page with plots")
    add("--traceback", action="store_true", help="show every frame of an error")
    return add


def _lengths(add: Add, metavar: str) -> None:
    add("--input-len", default="128", metavar=metavar, help="tokens of a prompt (default: 128)")
    add("--output-len", default="128", metavar=metavar, help="tokens to write (default: 128)")


def _peer(add: Add) -> None:
    add("--peer", metavar="transformers", help="measure it too, in the same run")


def latency(args: argparse.Namespace) -> Asked:
    asked = _common(args)._replace(
        input=one_length("--input-len", args.input_len, 1),
        output=one_length("--output-len", args.output_len, 2),
        batches=read_batches(args.batch),
    )
    return asked._replace(peer=read_peer(args.peer))


def throughput(args: argparse.Namespace) -> Asked:
    asked = _common(args)._replace(
        input=read_lengths("--input-len", args.input_len),
        output=read_lengths("--output-len", args.output_len),
        batches=(whole(1)("--batch", args.batch),),
        requests=whole(1)("--requests", args.requests),
        rate=read_rate(args.rate),
        shared=whole(0)("--prefix-len", args.prefix_len),
        seed=read_seed(args.seed),
        peer=read_peer(args.peer),
    )
    if asked.shared > asked.input.least:
        raise PlanError(
            f"`--prefix-len {asked.shared}` is longer than a prompt of `--input-len "
            f"{args.input_len}`",
            f"use `--prefix-len {asked.input.least}` or less",
        )
    if asked.peer and asked.rate is not None:
        raise PlanError(
            f"`--peer {args.peer}` takes all requests at once, and `--rate {args.rate}` does not "
            "send them so",
            "write `--rate inf`, or leave out `--peer`",
        )
    return asked


def load(args: argparse.Namespace) -> Asked:
    return _common(args)._replace(input=Lengths(16, 16), output=Lengths(1, 1))


def _common(args: argparse.Namespace) -> Asked:
    ranks(args)
    device(args)
    switch = words("on", "off", "both")
    given = {
        "use_kernels": switch("--use-kernels", args.use_kernels or "on"),
        "graphs": switch("--graphs", args.graphs or "on"),
        "prefix_cache": switch("--prefix-cache", args.prefix_cache or "off"),
    }
    return Asked(
        bench=args.bench_command,
        file="",
        dtype=words("auto", "bfloat16", "float32")("--dtype", args.dtype) if args.dtype else None,
        ways=ways_of(given),
        rounds=whole(1)("--rounds", args.rounds),
    )


def ranks(args: argparse.Namespace) -> str:
    return nproc("--nproc", args.nproc)


def device(args: argparse.Namespace) -> str | None:
    return words("cpu", "cuda")("--device", args.device) if args.device else None


def read_batches(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and int(part) > 0 for part in parts) or len({*parts}) < len(parts):
        raise PlanError(
            f"`--batch {text}` cannot be read", "write different numbers of sequences: `1,4,16`"
        )
    return tuple(sorted(map(int, parts)))


def read_lengths(flag: str, text: str) -> Lengths:
    least, colon, most = text.partition(":")
    if not least.isdecimal() or not (most if colon else least).isdecimal():
        found = Lengths(0, 0)
    else:
        found = Lengths(int(least), int(most or least))
    if not 1 <= found.least <= found.most:
        raise PlanError(
            f"`{flag} {text}` is no number of tokens",
            f"write `{flag} 128`, or `{flag} 64:256` for lengths from 64 to 256",
        )
    return found


def one_length(flag: str, text: str, least: int) -> Lengths:
    number = whole(least)(flag, text)
    return Lengths(number, number)


def read_rate(text: str) -> float | None:
    """Requests a second; None: all at once."""
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not rate > 0:
        raise PlanError(
            f"`--rate {text}` is no rate",
            "write requests a second, such as `--rate 4`, or `--rate inf`",
        )
    return None if math.isinf(rate) else rate


def read_seed(text: str) -> int:
    seed = whole(0)("--seed", text)
    if seed > MAX_SEED:
        raise PlanError(f"`--seed {text}` is more than 2**64 - 1")
    return seed


def read_peer(text: str | None) -> bool:
    if text is None:
        return False
    words(*PEERS)("--peer", text)
    if find_spec(text) is None:
        raise PlanError(
            f"`--peer {text}` needs the package `{text}`, which is not installed",
            f"type `pip install {text}`, or leave out `--peer`",
        )
    return True


def check_page(path: str | None) -> None:
    """Before minutes of measuring are lost."""
    if path is not None and (not Path(path).parent.is_dir() or Path(path).is_dir()):
        raise PlanError(
            f"`--html {path}` cannot be written", "give a file in a folder that is there"
        )


def check_tokens(asked: Asked, positions: int) -> None:
    if asked.most_tokens > positions:
        raise PlanError(
            f"a prompt of {asked.input.most} tokens and {asked.output.most} after it are more than "
            f"the model's {positions:,} positions",
            "lower `--input-len` or `--output-len`",
        )


def check_graphs(args: argparse.Namespace, device: str) -> None:
    if args.graphs and device == "cpu":
        raise PlanError(
            f"`--graphs {args.graphs}` is about CUDA graphs, and the ranks run on a CPU",
            "leave it out, or use `--device cuda`",
        )
