"""How far this rank is, written several times a second; where it stands, written when asked.

shim.py loads this file by its path, so it needs the standard library only: what it knows of torch
it finds among the modules that the script has imported. Nothing here raises into the script.
"""

from __future__ import annotations

import faulthandler
import json
import linecache
import os
import pickle
import signal
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PERIOD = 0.2  # seconds between two records
STACKS = signal.SIGRTMIN + 11  # writes all stacks, even while a loop in C holds the interpreter
ASK = "ask"  # a file that is there once the ranks shall say where they stand
RECENT = 32  # collectives of a group that are told
FRAMES = 40
STEP, COMPILE = "step", "compile"  # what `tick` may be told
RECORDERS = (  # of torch's flight recorder: gloo's, NCCL's
    ("_dump_fr_trace_json", "_dump_fr_trace"),
    ("_dump_nccl_trace_json", "_dump_nccl_trace"),
)


class Ticks:
    """What this process has said of itself. phase: what it is at, "" for nothing that other ranks
    could wait for; counts: signs of progress, by phase."""

    def __init__(self) -> None:
        self.phase = ""
        self.counts: dict[str, int] = {}


TICKS = Ticks()


def tick(phase: str = "") -> None:
    """This rank advances: it begins a STEP, or to COMPILE one more kernel, or has ended them ("").
    Costs less than a microsecond, and does nothing more where no launcher listens."""
    TICKS.phase = phase
    TICKS.counts[phase] = TICKS.counts.get(phase, 0) + 1


def ticks() -> Ticks:
    """The script's: this file may be loaded twice, by shim.py and as tpx.launch.beat."""
    found: Ticks = getattr(sys.modules.get("tpx.launch.beat"), "TICKS", TICKS)
    return found


class Beat:
    """folder: of the job's records of this kind; of this rank are `<attempt>-<rank>` (a record),
    and once asked `<rank>.json` and `<rank>.stacks`. All are missing where the disk is full."""

    def __init__(self, folder: Path, rank: str):
        self._attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._longest = 0
        self._ask, self._stand = folder / ASK, folder / f"{rank}.json"
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tpx-beat", daemon=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stacks = (folder / f"{rank}.stacks").open("w")
            faulthandler.register(STACKS, stacks, all_threads=True)
            self._file = os.open(
                folder / f"{self._attempt}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644
            )
            self._tell()
        except OSError:
            return
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(1)

    def _run(self) -> None:
        answered = False
        while not self._end.wait(PERIOD):
            try:
                self._tell()
                if not answered and self._ask.exists():
                    write(self._stand, json.dumps(stand()))
                    answered = True
            except Exception:  # a full disk, or a module that is half imported
                continue

    def _tell(self) -> None:
        """modules: imported so far, which grows while a script is starting."""
        seen, alone = ticks(), os.environ.get("WORLD_SIZE") == "1"  # nobody waits for it
        told = {"pid": os.getpid(), "attempt": int(self._attempt), "modules": len(sys.modules),
                "counts": counts(), "phase": "" if alone else seen.phase,
                "ticks": dict(seen.counts)}  # fmt: skip
        data = json.dumps(told).encode()
        self._longest = max(self._longest, len(data))
        os.pwrite(self._file, data.ljust(self._longest), 0)  # one call: a record is whole


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


def recorders() -> Iterator[tuple[str, Any, Any]]:
    """Of each recorder its name, and its two functions: of counts alone, and of everything."""
    distributed = sys.modules.get("torch.distributed")
    initialized = getattr(distributed, "is_initialized", None)
    if initialized is None or not initialized():
        return
    c10d = sys.modules.get("torch._C._distributed_c10d")
    for short, long in RECORDERS:
        if hasattr(c10d, short) and hasattr(c10d, long):
            yield short, getattr(c10d, short), getattr(c10d, long)


def counts() -> dict[str, list[int]]:
    """Of each process group the collectives that this rank entered, and those that have ended."""
    found: dict[str, list[int]] = {}
    for name, short, _ in recorders():
        status = json.loads(short(includeCollectives=False)).get("pg_status", {})
        for group, state in status.items():
            ends = (state.get(f"last_{end}_collective") for end in ("enqueued", "completed"))
            found[f"{name}.{group}"] = [max(0, int(end or 0)) for end in ends]  # -1: none yet
    return found


def stand() -> dict[str, Any]:
    """Where the script's thread is, in which torch module and collective, and each group's latest
    collectives."""
    frames = list(script_frames())
    return {
        "rank": int(os.environ["RANK"]),
        "frames": [told_frame(frame) for frame in frames[:FRAMES]],
        "module": module_path(frames),
        "collective": collective(frames),
        "groups": groups(),
        "phase": ticks().phase,
        "steps": ticks().counts.get(STEP, 0),
    }


def script_frames() -> Iterator[types.FrameType]:
    """Of the main thread, the innermost first."""
    main = threading.main_thread().ident
    frame = sys._current_frames().get(main) if main is not None else None
    while frame is not None:
        yield frame
        frame = frame.f_back


def told_frame(frame: types.FrameType) -> dict[str, Any]:
    code = frame.f_code
    text = linecache.getline(code.co_filename, frame.f_lineno).strip()
    return {"file": code.co_filename, "line": frame.f_lineno, "function": code.co_name,
            "text": text}  # fmt: skip


def module_path(frames: list[types.FrameType]) -> str | None:
    """`model.layers.3.mlp`: of the innermost torch module among the frames, in the outermost."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    owners = (frame.f_locals.get("self") for frame in frames)
    modules = [owner for owner in owners if isinstance(owner, torch.nn.Module)]
    if not modules:
        return None
    for name, module in modules[-1].named_modules():
        if module is modules[0]:
            return name or type(module).__name__
    return type(modules[0]).__name__


def collective(frames: list[types.FrameType]) -> list[str] | None:
    """The name of the collective that the frames are in, and of its group, as tpx.comm has them."""
    for frame in frames:
        if frame.f_globals.get("__name__") == "tpx.comm" and "name" in frame.f_locals:
            seen = frame.f_locals
            group = seen.get("group", seen.get("self"))
            return [str(seen["name"]), str(getattr(group, "name", ""))]
    return None


def groups() -> list[dict[str, Any]]:
    """Each process group of this rank: its name, ranks, counts and latest collectives. What a
    version of torch does not tell is left out."""
    ranks, known = group_ranks(), counts()
    found = []
    for name, _, long in recorders():
        entries: dict[str, list[dict[str, Any]]] = {}
        everything = pickle.loads(long(True, False, False))  # no stacks, which take seconds
        for entry in everything.get("entries", []):
            if not entry.get("is_p2p") and "collective_seq_id" in entry:
                entries.setdefault(str(entry.get("pg_id")), []).append(entry)
        for number, of_group in entries.items():
            short, words = of_group[-1].get("process_group") or (number, "")
            latest = int(of_group[-1]["collective_seq_id"])
            entered, ended = known.get(f"{name}.{number}", [latest, latest])
            found.append({
                "name": short, "words": words, "ranks": ranks.get(short), "entered": entered,
                "ended": ended, "entries": [told_entry(entry) for entry in of_group[-RECENT:]],
            })  # fmt: skip
    return found


def told_entry(entry: dict[str, Any]) -> dict[str, Any]:
    op = str(entry.get("profiling_name", "collective")).rpartition(":")[2]
    return {"seq": entry["collective_seq_id"], "op": op.removeprefix("_"),
            "sizes": entry.get("input_sizes") or [],
            "dtypes": entry.get("input_dtypes") or []}  # fmt: skip


def group_ranks() -> dict[str, list[int]]:
    """The ranks of each process group by torch's name of it; torch has no public way to list."""
    distributed = sys.modules.get("torch.distributed")
    world = getattr(getattr(distributed, "distributed_c10d", None), "_world", None)
    names = getattr(world, "pg_names", {})
    members = getattr(world, "pg_group_ranks", {})
    return {name: sorted(members[group]) for group, name in names.items() if group in members}
