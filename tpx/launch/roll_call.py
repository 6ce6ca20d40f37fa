"""Before ranks start on several machines: every launcher reaches the first, and all are alike.

Machine 0 listens at the meeting point, the others come and say what they are; all get the whole
list and judge it alike. Torch's own meeting follows at the same port: it would wait in silence for
a machine that does not come, and start ranks of different versions.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from ..errors import LaunchError
from ..version import __version__
from .links_file import library_versions

if TYPE_CHECKING:
    from .preflight import Job

Facts = dict[str, str]
PATIENCE = 600.0  # seconds, torch's own
QUIET = 5.0  # seconds until the user is told who is waited for
AGAIN = 0.2  # seconds between two attempts to connect
ONE_CALL = 10.0  # seconds in which a machine that connected says what it is
MOST = 2**22  # bytes that one says
WORDS = {"plan": "the plan", "ranks": "the number of ranks", "device": "the device"}


class Call(NamedTuple):
    """host, port: of machine 0. facts: of this machine, compared with the others'."""

    host: str
    port: int
    node: int
    nodes: int
    facts: Facts
    patience: float = PATIENCE


def call_of(job: Job) -> Call | None:
    """None: one machine, or machines that number themselves when they meet."""
    if job.nodes[1] == 1 or job.rendezvous.backend != "static":
        return None
    host, _, port = job.rendezvous.endpoint.rpartition(":")
    facts = {"tpx": __version__, "device": job.device}
    facts |= library_versions("nccl" if job.device == "cuda" else "gloo")
    if job.model.prepared is not None:
        facts |= {"plan": job.model.prepared.digest[:12], "ranks": str(job.nproc)}
    patience = float(job.rendezvous.configs.get("timeout", PATIENCE))
    return Call(host.strip("[]"), int(port), job.node_rank, job.nodes[1], facts, patience)


def roll_call(call: Call, tell: Callable[[str], None]) -> dict[int, Facts]:
    """-> the facts of every machine, the same on all. Raises LaunchError (7) where one does not
    come, and (3) where two have the same number."""
    return gather(call, tell) if call.node == 0 else report(call, tell)


def differ(found: list[str]) -> LaunchError:
    return LaunchError(
        f"the machines differ: {found[0]}" + (f"; {len(found) - 1} more" * (len(found) > 1)),
        "start the same on all of them, with the same versions; `--preflight warn` starts all the "
        "same",
    )


def differences(everyone: Mapping[int, Facts]) -> list[str]:
    """A phrase for each fact in which a machine differs from machine 0."""
    first, found = everyone[0], []
    for name in first:
        node = next((n for n, facts in everyone.items() if facts.get(name) != first[name]), None)
        if node is not None:
            other = everyone[node].get(name, "none")
            found.append(f"{WORDS.get(name, name)} is `{first[name]}` on machine 0 and `{other}` "
                         f"on machine {node}")  # fmt: skip
    return found


def gather(call: Call, tell: Callable[[str], None]) -> dict[int, Facts]:
    """Machine 0: waits for the others, and gives each the whole list."""
    began, told = time.monotonic(), False
    found, callers = {0: call.facts}, list[socket.socket]()
    with ExitStack() as to_close:
        server = to_close.enter_context(listen(call))
        server.settimeout(AGAIN)
        while len(found) < call.nodes:
            missing = [node for node in range(call.nodes) if node not in found]
            waited = time.monotonic() - began
            if waited > call.patience:
                raise did_not_come(call, missing)
            if waited > QUIET and not told:
                told = True
                tell(f"waiting for {machines(missing)} at {call.host}:{call.port}")
            try:
                caller, _ = server.accept()
            except TimeoutError:
                continue
            callers.append(to_close.enter_context(caller))
            welcome(caller, found, call)
        answer(callers, {"nodes": {str(node): facts for node, facts in found.items()}})
    return found


def listen(call: Call) -> socket.socket:
    """At every address, as torch's own store."""
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", call.port), family=socket.AF_INET6, dualstack_ipv6=True
            )
        return socket.create_server(("", call.port))
    except OSError as error:
        raise LaunchError(
            f"port {call.port} cannot be listened at ({error.strerror})",
            "name another one on all machines: `--master-port PORT`",
        ) from None


def did_not_come(call: Call, missing: list[int]) -> LaunchError:
    return LaunchError(
        f"{machines(missing)} did not come to `{call.host}:{call.port}` in {call.patience:g} s",
        f"start `tpx launch ... --node-rank {missing[0]}` there, and let it reach that port",
        exit_code=7,
    )


def welcome(caller: socket.socket, found: dict[int, Facts], call: Call) -> None:
    """One other machine; whatever else connects is not heard."""
    said = hear(caller)
    if not isinstance(said, dict) or not isinstance(said.get("node"), int):
        return
    node, facts = said["node"], said.get("facts")
    if node not in found and 0 <= node < call.nodes and isinstance(facts, dict):
        found[node] = facts
        return
    wrong = f"machine {node} came twice" if node in found else f"there is no machine {node}"
    answer([caller], {"wrong": wrong})
    raise LaunchError(wrong, numbered(call))


def numbered(call: Call) -> str:
    return f"`--node-rank` is 0 to {call.nodes - 1}, another one on each machine"


def report(call: Call, tell: Callable[[str], None]) -> dict[int, Facts]:
    """Another machine: says what it is, and hears of all."""
    with connect(call, tell) as server:
        answer([server], {"node": call.node, "facts": call.facts})
        server.settimeout(call.patience)
        said = hear(server)
    if isinstance(said, dict) and "wrong" in said:
        raise LaunchError(str(said["wrong"]), numbered(call))
    if not isinstance(said, dict) or "nodes" not in said:
        raise LaunchError(
            f"machine 0 ended, or what answers at `{call.host}:{call.port}` is no `tpx launch`",
            "see what machine 0 says; give the same `--preflight` on all machines",
            exit_code=7,
        )
    return {int(node): facts for node, facts in said["nodes"].items()}


def connect(call: Call, tell: Callable[[str], None]) -> socket.socket:
    """Machine 0 may start later than this one."""
    began, told = time.monotonic(), False
    while True:
        try:
            return socket.create_connection((call.host, call.port), timeout=ONE_CALL)
        except OSError as error:
            reason = error.strerror or str(error)
        waited = time.monotonic() - began
        if waited > call.patience:
            raise LaunchError(
                f"machine 0 does not answer at `{call.host}:{call.port}`: {reason}, for "
                f"{call.patience:g} s",
                "start `tpx launch ... --node-rank 0` there, and open that port",
                exit_code=7,
            )
        if waited > QUIET and not told:
            told = True
            tell(f"waiting for machine 0 at {call.host}:{call.port}: {reason}")
        time.sleep(AGAIN)


def answer(to: list[socket.socket], said: object) -> None:
    for one in to:
        try:
            one.sendall(json.dumps(said).encode() + b"\n")
        except OSError:
            continue  # it has ended, and torch's meeting will miss it


def hear(one: socket.socket) -> object:
    """One line of JSON; None where it is none."""
    if one.gettimeout() in (None, 0.0):
        one.settimeout(ONE_CALL)
    try:
        with one.makefile("rb") as lines:
            return json.loads(lines.readline(MOST))
    except (OSError, ValueError):
        return None


def machines(numbers: list[int]) -> str:
    return f"machine{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
