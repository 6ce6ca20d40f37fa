"""`tpx verify`: runs a plan on real ranks against one rank, and says where they differ."""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..errors import PlanError
from ..hub import HEADERS, find_model
from ..launch.options import Options
from ..launch.preflight import preflight
from ..launch.supervise import supervise
from ..plan.find import read_plan
from ..plan.load import read_size
from ..plan.prepare import Prepared, prepare
from ..prompts import Prompt
from ..trial import FILE, LAYERS, TOKENS, TOLERANCE, Fault, Verdict, make_trial

MAX_BYTES = "4GiB"
IDS = re.compile(r"\d+(,\d+)*")


def add_parser(subparsers: Any) -> None:
    command = subparsers.add_parser(
        "verify", help="run a plan on real ranks, and compare each module with one rank's"
    )
    add = command.add_argument
    add("--tp-plan", required=True, metavar="PLAN", help="auto, a plan's name or a YAML file")
    add("--model", required=True, metavar="PATH|ID", help="a folder or a Hugging Face id")
    add("--nproc", type=int, metavar="N", help="ranks (default: as many as the plan needs)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where a GPU is visible")
    add("--prompt", metavar="TEXT|IDS", help=f"text, or token ids as 3,1,4 (default: {TOKENS} ids)")
    add("--layers", type=int, metavar="K", help=f"the first K (random weights: {LAYERS})")
    add("--max-bytes", default=MAX_BYTES, metavar="SIZE",
        help=f"a larger checkpoint gives way to random weights (default: {MAX_BYTES})")  # fmt: skip
    add("--traceback", action="store_true", help="show every frame of an error")


def run(args: argparse.Namespace) -> int:
    """-> 0 where the ranks give what one rank gives, 1 where they do not; or the ranks' failure.
    Raises TpxError for everything that is wrong before a rank starts."""
    most = read_bytes("--max-bytes", args.max_bytes)
    prepared = prepare(args.model, args.tp_plan, world_of(args))
    if prepared.presharded is not None:
        raise prepared.presharded.refuse()
    trial = make_trial(prepared, read_prompt(args.prompt), args.layers, most)
    with tempfile.TemporaryDirectory(prefix="tpx-verify-") as folder:
        options = Options(
            nproc=str(prepared.world),
            device=args.device,
            model=args.model,
            tp_plan=args.tp_plan,
            download=HEADERS,
            run_dir=f"{folder}/run",
            target="tpx.verify",
            module=True,
            args=(json.dumps(trial._asdict()),),
            traceback=args.traceback,
        )
        ending = supervise(preflight(options), options)
        if ending.exit_code:
            print(ending.text, file=sys.stderr)
            return ending.exit_code
        verdict = Verdict.from_json(Path(options.run_dir or "", FILE).read_text())
    print("\n".join(told(prepared, verdict, most)))
    return 0 if verdict.fault is None else 1


def world_of(args: argparse.Namespace) -> int:
    if args.nproc is not None:
        if args.nproc < 1:
            raise PlanError(f"`--nproc` is `{args.nproc}`", "give the number of ranks, 1 or more")
        return int(args.nproc)
    if args.tp_plan == "auto":
        raise PlanError("`auto` plans for a number of ranks, and none is given", "add `--nproc 2`")
    from ..config import read_config
    from ..families import family_of

    family = family_of(read_config(find_model(args.model)))
    return read_plan(args.tp_plan, family.model_type).mesh.world


def read_prompt(text: str | None) -> Prompt | None:
    if text is not None and IDS.fullmatch(text):
        return [int(word) for word in text.split(",")]
    return text


def read_bytes(flag: str, text: str) -> int:
    found = read_size(text)
    if found is None:
        raise PlanError(f"`{flag} {text}` is no number of bytes", f"write `{flag} {MAX_BYTES}`")
    return found


def told(prepared: Prepared, verdict: Verdict, most: int) -> list[str]:
    """The lines of the report."""
    ranks, spec = prepared.world, prepared.spec
    lines = [
        f"plan `{prepared.plan.path}` on {ranks} rank{'s' * (ranks > 1)}, against one rank, in "
        f"float32: {prepared.plan.mesh}"
    ]
    if verdict.random:
        lines.append(
            f"the checkpoint's {verdict.stored:,} bytes are more than {most:,} (`--max-bytes`), so "
            f"random weights were run: {verdict.layers} of {spec.num_hidden_layers} layers, hidden "
            f"size {verdict.hidden} in place of {spec.hidden_size}, the same names, heads, experts "
            "and plan"
        )
    elif verdict.layers < spec.num_hidden_layers:
        lines.append(f"the first {verdict.layers} of {spec.num_hidden_layers} layers")
    count = " and ".join(map(str, verdict.tokens)) if len(verdict.tokens) < 9 else "several"
    lines.append(
        f"{count} tokens to prefill, then one to decode; {verdict.compared:,} outputs of modules "
        "compared"
    )
    lines.append(f"logits differ by {verdict.error:.1e} of the largest at most")
    if verdict.fault is None:
        return [*lines, f"equal: no module leaves the tolerance of {TOLERANCE:.0e}"]
    return [*lines, *blamed(verdict.fault)]


def blamed(fault: Fault) -> list[str]:
    where = "" if fault.layer is None else f"layer {fault.layer}, "
    ranks = f"rank{'s' * (len(fault.ranks) > 1)} {', '.join(map(str, fault.ranks))}"
    lines = [
        f"different: {where}{fault.module} (`{fault.name}`) is the first to leave the tolerance of "
        f"{TOLERANCE:.0e}: {fault.error:.1e} of its largest value, on {ranks}, in {fault.phase}"
    ]
    if fault.tie:
        lines.append(
            "a token's experts differ though the router's logits are equal to rounding: a tie, "
            "which another `--prompt` avoids"
        )
    return lines
