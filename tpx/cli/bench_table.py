"""What `tpx bench latency|throughput|load` prints: tables of at most 80 columns."""

from __future__ import annotations

from collections import defaultdict
from statistics import median
from typing import Any

from ..bench.asked import Asked
from .plan_words import plural, size

Found = dict[str, Any]
PARTS = {
    "start": "process",
    "imports": "imports",
    "prepare": "plan, groups, kernels",
    "load": "load",
    "first_token": "first token",
}
WIDTH = 80
NAME = 30  # columns of a way's name


def draw(found: Found) -> list[str]:
    return [*head(found), "", *TABLES[found["bench"]](found)]


def head(found: Found) -> list[str]:
    machine, model = found["machine"], found["model"]
    ranks, threads = machine["ranks"], machine["threads"]
    before, after = found["load_average"]
    lines = [
        f"{machine['device']}, {plural(ranks, 'rank')}, {plural(threads, 'thread')}",
        f"{model['name']}, {model['dtype']}, plan {model['plan']}"
        + (f": {model['mesh']}" if ranks > 1 else ""),
        f"tpx {machine['tpx']}, torch {machine['torch']}, Python {machine['python']}; load "
        f"average {before:.1f} before, {after:.1f} after",
    ]
    if "read_rate" in found:
        lines.append(f"a plain read: {found['read_rate'] / 1e9:.1f} GB/s")
    return lines


def latency(found: Found) -> list[str]:
    asked = found["asked"]
    lines = [
        f"{asked['output'][1]} tokens after {asked['input'][1]}, greedy; median of "
        f"{plural(asked['rounds'], 'round')}",
        "",
        f"{'batch':>5}  {'way':<{NAME}}{'first':>8}{'a token':>9}{'floor':>8}{'share':>7}"
        f"{'tok/s':>9}",
    ]
    for row in found["rows"]:
        lines.append(
            f"{row['batch']:>5}  {row['way'][:NAME]:<{NAME}}{ms(row['first_token']):>8}"
            f"{ms(row['token']):>9}{ms(row['floor']):>8}{row['share']:>7.1%}"
            f"{row['tokens_per_second']:>9.1f}"
        )
    lines += [
        "",
        "first: ms until all have a token; a token: ms of a step after that; floor: ms to",
        "read what a step of tpx reads; tok/s: of all sequences, prompts included",
    ]
    return lines + beside_peer(found)


def throughput(found: Found) -> list[str]:
    asked = found["asked"]
    rate = "all at once" if asked["rate"] is None else f"at {asked['rate']:g} a second"
    lines = [
        f"{plural(asked['requests'], 'request')} {rate}, {span(asked['input'])} tokens in, "
        f"{span(asked['output'])} out, at most {asked['batches'][0]} at a time;",
        f"median of {plural(asked['rounds'], 'round')}",
        "",
        f"{'way':<{NAME}}{'seconds':>9}{'output':>10}{'in all':>10}{'floor':>9}{'share':>7}",
    ]
    for row in found["rows"]:
        lines.append(
            f"{row['way'][:NAME]:<{NAME}}{row['seconds']:>9.2f}{row['output_per_second']:>10.1f}"
            f"{row['total_per_second']:>10.1f}{row['floor']:>9.3f}{row['share']:>7.1%}"
        )
    lines += ["", "output, in all: tokens a second, without and with prompts; floor: seconds to",
              "read what full decode steps read, and until the last request has come"]  # fmt: skip
    return lines + served(found) + beside_peer(found)


def served(found: Found) -> list[str]:
    """Times that single requests saw."""
    rows = [row for row in found["rows"] if row["first_token"]]
    heads = "".join(f"{name:>8}" for _ in range(2) for name in ("p50", "p90", "p99"))
    lines = ["", f"{'ms':<{NAME}}{'to the first token':>24}{'a token':>24}", f"{'':<{NAME}}{heads}"]
    for row in rows:
        values = [*row["first_token"].values(), *(row["token"] or {}).values()]
        lines.append(f"{row['way'][:NAME]:<{NAME}}" + "".join(f"{ms(v):>8}" for v in values))
    return lines if rows else []


def load(found: Found) -> list[str]:
    ways = "".join(f"{row['way']:>22}" for row in found["rows"])
    rounds = found["asked"]["rounds"]
    lines = [
        f"median of {rounds} process{'' if rounds == 1 else 'es'}",
        "",
        f"{'':<24}{ways}",
    ]
    for part, name in PARTS.items():
        lines.append(_line(name, [f"{row['parts'][part]:.2f} s" for row in found["rows"]]))
    lines.append(_line("in all", [f"{row['seconds']:.2f} s" for row in found["rows"]]))
    lines.append(_line("read", [size(row["bytes_read"]) for row in found["rows"]]))
    lines.append(_line("read in a second", [size(row["rate"]) for row in found["rows"]]))
    floors = [f"{row['floor']:.3f} s, {row['share']:.1%}" for row in found["rows"]]
    lines.append(_line("floor of load, share", floors))
    lines.append(_line("held, all ranks", [size(row["bytes_held"]) for row in found["rows"]]))
    lines.append(_line("host memory, peak", [size(row["host_peak"]) for row in found["rows"]]))
    if any(row["device_peak"] for row in found["rows"]):
        lines.append(
            _line("device memory, peak", [size(row["device_peak"]) for row in found["rows"]])
        )
    return lines


def _line(name: str, values: list[str]) -> str:
    return f"{name:<24}" + "".join(f"{value:>22}" for value in values)


TABLES = {"latency": latency, "throughput": throughput, "load": load}


def beside_peer(found: Found) -> list[str]:
    peer = found["peer"]
    if not peer:
        return []
    lines = ["", f"{peer['name']} {peer['version']}, {plural(peer['threads'], 'thread')}"]
    lines += [f"  {batch} at once: {form}" for batch, form in peer["chosen"].items()]
    lines += [cut(f"  {form} did not run: {why}") for form, why in peer["refused"].items()]
    for batch, value in ratios(found):
        lines.append(f"{batch}tpx is {value:.2f} times as fast as {peer['name']}")
    return lines + [same(told) for told in found["same_tokens"]]


def ratios(found: Found) -> list[tuple[str, float]]:
    """(which batch, tpx's tokens a second over the peer's), of tpx's first way."""
    speed = "tokens_per_second" if found["bench"] == "latency" else "output_per_second"
    rows = defaultdict[int | None, dict[str, float]](dict)
    for row in found["rows"]:
        rows[row.get("batch")].setdefault("theirs" if row["way"] == found["peer"]["name"] else
                                          "ours", row[speed])  # fmt: skip
    return [
        (f"batch {batch}: " if batch else "", one["ours"] / one["theirs"])
        for batch, one in rows.items()
    ]


def same(told: Found) -> str:
    count, equal = told["sequences"], told["same"]
    if equal == count:
        return f"batch {told['batch']}: the same tokens in all {plural(count, 'sequence')}"
    return (
        f"batch {told['batch']}: the same tokens in {equal} of {plural(count, 'sequence')}; others "
        f"differ from token {told['first_difference'] + 1} on"
    )


def cut(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."


def span(lengths: list[int]) -> str:
    least, most = lengths
    return str(least) if least == most else f"{least} to {most}"


def ms(seconds: float) -> str:
    value = 1000 * seconds
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def merged(found: list[Found], asked: Asked) -> Found:
    """One result of `load` from one of each process: medians by way."""
    by_way = defaultdict[str, list[Found]](list)
    for one in found:
        by_way[one["row"]["way"]].append(one["row"])
    rows = [_median(way, rows) for way, rows in by_way.items()]
    told = asked._asdict() | {"ways": [way.name for way in asked.ways]}
    told = {name: told[name] for name in ("bench", "dtype", "ways", "rounds")}
    loads = [found[0]["load_average"][0], found[-1]["load_average"][1]]
    return {"bench": "load", "machine": found[0]["machine"], "load_average": loads,
            "model": found[0]["model"], "asked": told, "rows": rows}  # fmt: skip


def _median(way: str, rows: list[Found]) -> Found:
    values = {
        name: median(row[name] for row in rows)
        for name, value in rows[0].items()
        if isinstance(value, int | float)
    }
    parts = {name: median(row["parts"][name] for row in rows) for name in rows[0]["parts"]}
    return {"way": way, "parts": parts, **values, "rounds": [row["seconds"] for row in rows]}
