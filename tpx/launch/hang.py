"""Which rank holds the others up, from where each of them stands. Reads what beat.py writes.

A rank waits where it has entered a collective that has not ended. The cause is a rank that has not
entered one that others wait in, and that waits in none itself.
"""

from __future__ import annotations

import json
import re
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import LaunchError

LIBRARIES = (sysconfig.get_path("stdlib"), "site-packages", "dist-packages", "<frozen")
OWN = ("tpx/launch/shim.py", "tpx/launch/beat.py", "tpx/comm.py")


class Entry(NamedTuple):
    """A collective as one rank entered it."""

    seq: int
    op: str
    sizes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[str, ...] = ()

    def __str__(self) -> str:
        shapes = ", ".join(str(list(size)) for size in self.sizes)
        return f"{self.op} of {shapes}" if shapes else self.op


class GroupState(NamedTuple):
    """One process group as one of its ranks sees it; name: torch's, the same on all its ranks."""

    name: str
    words: str
    ranks: tuple[int, ...] | None
    entered: int
    ended: int
    entries: tuple[Entry, ...] = ()

    @property
    def waits(self) -> bool:
        return self.entered > self.ended

    def entry(self, seq: int) -> Entry | None:
        return next((entry for entry in self.entries if entry.seq == seq), None)


class Frame(NamedTuple):
    file: str
    line: int
    function: str
    text: str = ""


class Stand(NamedTuple):
    """Where one rank stands; frames: of its main thread, the innermost first. collective: its name
    and its group's, as tpx.comm has them. steps: that it has begun, see beat.tick."""

    rank: int
    frames: tuple[Frame, ...] = ()
    module: str | None = None
    collective: tuple[str, str] | None = None
    groups: tuple[GroupState, ...] = ()
    steps: int = 0
    gone: str | None = None  # why there is nothing to know, such as `ended with exit code 0`

    @property
    def waits(self) -> bool:
        return any(group.waits for group in self.groups)

    def group(self, name: str) -> GroupState | None:
        return next((group for group in self.groups if group.name == name), None)


class Wait(NamedTuple):
    """Ranks that wait for others in one collective; missing: its ranks that have not entered it."""

    group: GroupState
    seq: int
    waiting: tuple[int, ...]
    missing: tuple[int, ...]


def read_stand(rank: int, folder: Path) -> Stand:
    """From `rank<N>.json`, else from `rank<N>.stacks`, which a busy interpreter leaves too."""
    try:
        data = json.loads((folder / f"rank{rank}.json").read_text())
    except (OSError, ValueError):
        return Stand(rank, read_stacks(folder / f"rank{rank}.stacks"))
    return Stand(
        rank,
        tuple(Frame(**frame) for frame in data["frames"]),
        data["module"],
        tuple(data["collective"]) if data["collective"] else None,
        tuple(read_group(group) for group in data["groups"]),
        data["steps"],
    )


def read_group(data: dict[str, Any]) -> GroupState:
    entries = tuple(
        Entry(entry["seq"], entry["op"], tuple(map(tuple, entry["sizes"])), tuple(entry["dtypes"]))
        for entry in data["entries"]
    )
    ranks = None if data["ranks"] is None else tuple(data["ranks"])
    return GroupState(**{**data, "entries": entries, "ranks": ranks})


def read_stacks(path: Path) -> tuple[Frame, ...]:
    """The main thread's frames, which faulthandler writes last."""
    text = path.read_text() if path.exists() else ""
    last = re.split(r"^(?:Current thread|Thread) .*$", text, flags=re.MULTILINE)[-1]
    found = re.findall(r'^  File "(.*)", line (\d+) in (.*)$', last, re.MULTILINE)
    return tuple(Frame(file, int(line), function) for file, line, function in found)


def waits(stands: Sequence[Stand]) -> list[Wait]:
    """Of each process group in which a rank waits."""
    found = []
    states = {g.name: g for stand in stands for g in stand.groups if g.waits}
    for name, state in states.items():
        seen = {stand.rank: stand.group(name) for stand in stands}
        held = {rank: g for rank, g in seen.items() if g is not None and g.waits}
        seq = min(g.ended for g in held.values()) + 1
        members = state.ranks if state.ranks is not None else tuple(seen)
        waiting = tuple(rank for rank, g in held.items() if g.ended < seq <= g.entered)
        missing = [rank for rank in members if rank in seen and behind(seen[rank], seq)]
        found.append(Wait(state, seq, waiting, tuple(missing)))
    return found


def behind(state: GroupState | None, seq: int) -> bool:
    return state is None or state.entered < seq


def explain(stands: Sequence[Stand], seconds: float, folder: Path) -> LaunchError:
    """The one error of a job in which nothing has moved for so long."""
    by_rank = {stand.rank: stand for stand in stands}
    found, still = waits(stands), f"nothing has moved for {seconds:.0f} s"
    said = (
        missing_rank(found, by_rank, still)
        or different(found, by_rank, still)
        or circle(found, by_rank, still)
        or fewest_steps(found, by_rank, still)
        or all_wait(found, by_rank, still)
    )
    hint = (
        f"the stacks of all ranks are in `{shorter(folder)}`; `--hang-timeout SECONDS` gives a "
        "step more time, and 0 as much as it takes"
    )
    return LaunchError(said, hint, exit_code=6)


def missing_rank(found: Sequence[Wait], by_rank: Mapping[int, Stand], still: str) -> str | None:
    """A rank that others wait for and that waits for nobody, first one that has ended."""
    ranks = dict.fromkeys(rank for wait in found for rank in wait.missing)
    free = [by_rank[rank] for rank in ranks if not by_rank[rank].waits]
    if not free:
        return None
    cause = min(free, key=lambda stand: stand.gone is None)
    wait = next(wait for wait in found if cause.rank in wait.missing)
    verb = "waits" if len(wait.waiting) == 1 else "wait"
    return (
        f"rank {cause.rank} has not entered {name_wait(wait, by_rank)}, {and_list(wait.waiting)} "
        f"{verb} for it, and {still}: rank {cause.rank} {whereabouts(cause)}"
    )


def different(found: Sequence[Wait], by_rank: Mapping[int, Stand], still: str) -> str | None:
    """What the ranks entered, where they entered different collectives as the same one."""
    for wait in found:
        entries: dict[str, list[int]] = {}
        for rank in wait.waiting:
            entry = entry_of(wait, by_rank[rank])
            if entry is not None:
                entries.setdefault(str(entry), []).append(rank)
        if len(entries) > 1:
            fewest = sorted(entries.items(), key=lambda item: (len(item[1]), item[1]))
            each = (
                f"{and_list(ranks)} `{entry}` at {position(by_rank[ranks[0]].frames)}"
                for entry, ranks in fewest
            )
            return f"ranks entered different collectives: {', '.join(each)}, and {still}"
    return None


def circle(found: Sequence[Wait], by_rank: Mapping[int, Stand], still: str) -> str | None:
    """Ranks that wait for each other in several collectives."""
    if not found or not all(wait.missing for wait in found):
        return None
    each = (
        f"{and_list(wait.waiting)} in {name_wait(wait, by_rank)} for {and_list(wait.missing)}"
        for wait in found
    )
    return f"ranks wait for each other, {', '.join(each)}, and {still}"


def fewest_steps(found: Sequence[Wait], by_rank: Mapping[int, Stand], still: str) -> str | None:
    """The rank that has begun the fewest steps, where no collective is seen: a GPU has them."""
    most = max(stand.steps for stand in by_rank.values())
    ahead = [rank for rank, stand in by_rank.items() if stand.steps == most]
    if found or len(ahead) == len(by_rank):
        return None
    cause = min(by_rank.values(), key=lambda stand: (stand.gone is None, stand.steps))
    verb = "is" if len(ahead) == 1 else "are"
    return (
        f"rank {cause.rank} has not begun step {most}, {and_list(ahead)} {verb} in it, and "
        f"{still}: rank {cause.rank} {whereabouts(cause)}"
    )


def all_wait(found: Sequence[Wait], by_rank: Mapping[int, Stand], still: str) -> str:
    """Nobody of this machine is missing."""
    if not found:
        places = (f"rank {rank} {whereabouts(stand)}" for rank, stand in by_rank.items())
        return f"{still}: {', '.join(places)}"
    wait = next(wait for wait in found if not wait.missing)
    elsewhere = sorted(set(wait.group.ranks or ()) - set(by_rank))
    whom = f"{and_list(elsewhere)} of another machine" if elsewhere else "the network or a device"
    said = (
        f"{and_list(wait.waiting)} {'waits' if len(wait.waiting) == 1 else 'wait'} for {whom} in "
        f"{name_wait(wait, by_rank)}"
    )
    later = [rank for rank in by_rank if rank not in wait.waiting and is_later(wait, by_rank[rank])]
    return (
        f"{said}, {and_list(later)} in a later one, and {still}"
        if later
        else f"{said}, and {still}"
    )


def is_later(wait: Wait, stand: Stand) -> bool:
    """Gloo lets a rank go that has all it needs, before the others have."""
    group = stand.group(wait.group.name)
    return group is not None and group.waits and group.ended >= wait.seq


def entry_of(wait: Wait, stand: Stand) -> Entry | None:
    group = stand.group(wait.group.name)
    return group.entry(wait.seq) if group is not None else None


def name_wait(wait: Wait, by_rank: Mapping[int, Stand]) -> str:
    """`moe.combine` (all_reduce 412 of group `ep`) in `model.layers.17.mlp`."""
    stand = by_rank[wait.waiting[0]]
    entry = entry_of(wait, stand)
    op = f"{entry.op if entry else 'collective'} {wait.seq}"
    words = wait.group.words
    name, label = stand.collective or (None, "" if words in ("default_pg", "undefined") else words)
    told = f"{op} of group `{label}`" if label else op
    told = f"`{name}` ({told})" if name else told
    return f"{told} in `{stand.module}`" if stand.module else told


def whereabouts(stand: Stand) -> str:
    """`is at script.py, line 8, in step: time.sleep(60)`."""
    if stand.gone is not None:
        return stand.gone
    if not stand.frames:
        return "gives no answer"
    frame = place(stand.frames)
    text = f": `{frame.text}`" if frame.text else ""
    return f"is at {position(stand.frames)}, in `{frame.function}`{text}"


def position(frames: Sequence[Frame]) -> str:
    frame = place(frames)
    return f"`{shorter(Path(frame.file))}`, line {frame.line}"


def place(frames: Sequence[Frame]) -> Frame:
    """The innermost that is neither Python's, torch's nor part of how tpx calls them."""
    for frame in frames:
        if not any(part in frame.file for part in (*LIBRARIES, *OWN)):
            return frame
    return frames[0]


def shorter(path: Path) -> str:
    """From the current folder, where it is in it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def and_list(ranks: Sequence[int]) -> str:
    """`rank 0`, or `ranks 0, 1 and 2`."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
