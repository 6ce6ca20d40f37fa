"""Runs a script or module as one rank, and leaves a record where it ends with an error.

Started by path, needs the standard library only, and prints nothing itself: the launcher reads the
records of all ranks and prints one. What runs here sees what `python SCRIPT` would show it.
Arguments: the launcher's pid, `script` or `module`, its path or name, its arguments.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and sys.path[0] == __file__.rpartition("/")[0]:
    del sys.path[0]  # this folder, which the script must not import from

import ctypes
import importlib.util
import io
import json
import os
import runpy
import select
import signal
import time
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent.parent
PR_SET_PDEATHSIG = 1  # linux/prctl.h
GRACE = 2.0  # seconds for all ranks to find the same TpxError, so that it is shown as one


def main(launcher: int, kind: str, target: str, args: list[str]) -> object:
    """-> what to give to sys.exit."""
    die_with(launcher)
    beat = start_beat()
    if importlib.util.find_spec("tpx") is None:  # a source tree that is not installed
        sys.path.append(str(PACKAGE.parent))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # whole lines, so that ranks do not mix
    code = run(run_script if kind == "script" else run_module, target, args)
    try:
        sys.stdout.flush()
    except BrokenPipeError as error:
        code = code or record_error(error)
    if output_is_closed():
        drop_output()
    beat.stop()
    return code


def start_beat() -> Any:
    """beat.py's thread, under a name of its own: the script has not imported tpx."""
    path = Path(__file__).with_name("beat.py")
    spec = importlib.util.spec_from_file_location("_tpx_beat", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Beat(Path(os.environ["TPX_RUN_DIR"], "beats"), os.environ["RANK"])


def run(start: Callable[[str, list[str]], None], target: str, args: list[str]) -> object:
    """Starts the script, and records how it ended if not well."""
    try:
        start(target, args)
    except SystemExit as error:
        if error.code not in (None, 0):
            code = error.code if isinstance(error.code, int) else 1
            record({"kind": "exit", "exit_code": code & 0xFF})
        return error.code
    except KeyboardInterrupt as error:
        sys.last_value = error  # as the interpreter does; worker.stop looks at it
        return 128 + signal.SIGINT
    except BaseException as error:
        sys.last_value = error
        return record_error(error)
    return 0


def die_with(launcher: int) -> None:
    """No rank outlives its launcher, even one that was killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it died before the line above
        os._exit(128 + signal.SIGKILL)


def run_script(path: str, args: list[str]) -> None:
    """In a module __main__ that stays, as `python path` does: pickle and atexit find it there."""
    main_module = types.ModuleType("__main__")
    main_module.__dict__.update(__file__=os.path.abspath(path), __cached__=None)
    main_module.__builtins__ = sys.modules["builtins"]  # type: ignore[attr-defined]
    sys.modules["__main__"] = main_module
    sys.argv = [path, *args]
    if not sys.flags.safe_path:
        sys.path.insert(0, os.path.dirname(os.path.realpath(path)))
    with open(path, "rb") as file:
        code = compile(file.read(), os.path.abspath(path), "exec", dont_inherit=True)
    exec(code, main_module.__dict__)


def run_module(name: str, args: list[str]) -> None:
    sys.argv = [name, *args]
    if not sys.flags.safe_path:
        sys.path.insert(0, os.getcwd())
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def record_error(error: BaseException) -> int:
    """-> this rank's exit code."""
    if isinstance(error, BrokenPipeError) and output_is_closed():
        record({"kind": "pipe"})
        return 128 + signal.SIGPIPE
    known = sys.modules.get("tpx.errors")
    last = "".join(traceback.format_exception_only(error)).strip()
    data: dict[str, Any] = {
        "kind": "raised",
        "class": type(error).__name__,
        "message": last,
        "chain": [f"{type(e).__name__}: {e}" for e in chain(error)],
        "traceback": format_error(error, trim=True),
        "full_traceback": format_error(error, trim=False),
    }
    if known is None or not isinstance(error, known.TpxError):
        record(data)
        return 1
    record({**data, "kind": "tpx", "message": error.message, "hint": error.hint,
            "code": error.code, "exit_code": error.exit_code})  # fmt: skip
    wait_for_the_others()
    return int(error.exit_code)


def chain(error: BaseException) -> list[BaseException]:
    """The error, and what it came from."""
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__ or current.__context__
    return found


def format_error(error: BaseException, trim: bool) -> str:
    """A traceback without this file's frames; trim: and none of tpx's or torch's, but the last."""
    told = traceback.TracebackException.from_exception(error, compact=True)
    for one in told_chain(told):
        frames = [f for f in one.stack if f.filename != __file__ and "runpy" not in f.filename]
        kept = [f for f in frames if not (trim and is_internal(f.filename))]
        one.stack = traceback.StackSummary.from_list(kept or frames[-1:])
    return "".join(told.format()).strip()


def told_chain(told: traceback.TracebackException | None) -> list[traceback.TracebackException]:
    if told is None:
        return []
    return [told, *told_chain(told.__cause__), *told_chain(told.__context__)]


def is_internal(filename: str) -> bool:
    path = Path(filename)
    return path.is_relative_to(PACKAGE) or "site-packages/torch" in path.as_posix()


def record(data: dict[str, Any]) -> None:
    """Writes <run dir>/errors/<attempt>-<rank>.json, whole or not at all; prints what cannot be
    written."""
    folder, attempt = records_folder()
    rank = int(os.environ["RANK"])
    path = folder / f"{attempt}-{rank}.json"
    part = path.with_suffix(".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"rank": rank, "time_ns": time.time_ns(), **data}))
        part.replace(path)
    except OSError:
        print(data.get("full_traceback", ""), file=sys.stderr)


def records_folder() -> tuple[Path, str]:
    return (
        Path(os.environ["TPX_RUN_DIR"]) / "errors",
        os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def wait_for_the_others() -> None:
    """Until every rank of this machine has a record, for a short time."""
    folder, attempt = records_folder()
    local_world = int(os.environ["LOCAL_WORLD_SIZE"])
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline:
        if len(list(folder.glob(f"{attempt}-*.json"))) >= local_world:
            return
        time.sleep(0.01)


def output_is_closed() -> bool:
    """Whether nobody reads what this process prints, such as after `| head -1`."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def drop_output() -> None:
    """Lets the interpreter flush into nothing, so that it does not complain at its end."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nothing, stream)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]))  # type: ignore[arg-type]
