"""How the launchers of several machines find each other, and a free port on one machine."""

from __future__ import annotations

import errno
import socket
import uuid
from typing import NamedTuple

from ..errors import LaunchError, PlanError
from .options import Options

HERE = "127.0.0.1"
DEFAULT_PORT = 29500  # torchrun's
ADDRESS = "<address of machine 0>"


class Rendezvous(NamedTuple):
    """As torch's LaunchConfig takes it."""

    backend: str
    endpoint: str
    run_id: str
    configs: dict[str, str | int | bool]
    local_addr: str | None


def node_range(nnodes: str) -> tuple[int, int]:
    least, _, most = nnodes.partition(":")
    return int(least), int(most or least)


def rendezvous(options: Options) -> Rendezvous:
    """On one machine, by itself, on a free port, unless the command line says where.

    Raises PlanError where several machines have no meeting point, LaunchError where a port is in
    use or a name does not resolve.
    """
    several = node_range(options.nnodes)[1] > 1
    placed = options.rdzv_endpoint or options.master_port or options.master_addr
    if options.standalone or not (several or placed):
        return Rendezvous("c10d", f"{HERE}:0", f"tpx-{uuid.uuid4()}", {"is_host": True}, HERE)
    if several and not (options.rdzv_endpoint or options.master_addr):
        raise PlanError(
            f"`--nnodes {options.nnodes}` needs an address at which the machines meet",
            "on every machine `--master-addr HOST_OF_NODE_0 --node-rank 0` (1, 2, ...), "
            "or `--rdzv-backend c10d --rdzv-endpoint HOST:PORT`",
        )
    backend = options.rdzv_backend or "static"
    configs: dict[str, str | int | bool] = dict(read_conf(options.rdzv_conf))
    address = options.master_addr or HERE
    endpoint = options.rdzv_endpoint or f"{address}:{options.master_port or DEFAULT_PORT}"
    if backend == "static":
        configs["rank"] = options.node_rank
        check_endpoint(endpoint, hosts_it=options.node_rank == 0)
    local_addr = options.local_addr or (None if several else HERE)
    return Rendezvous(backend, endpoint, options.rdzv_id or "none", configs, local_addr)


def meeting_elsewhere(options: Options, nodes: int) -> Rendezvous:
    """Where machines that are not here would meet: nothing is looked up."""
    if nodes == 1:
        return rendezvous(Options())
    host = options.master_addr or ADDRESS
    endpoint = options.rdzv_endpoint or f"{host}:{options.master_port or DEFAULT_PORT}"
    return Rendezvous("static", endpoint, options.rdzv_id or "none", {}, None)


def read_conf(text: str) -> dict[str, str]:
    pairs = (pair.partition("=") for pair in text.split(",") if pair)
    return {key.strip(): value.strip() for key, _, value in pairs}


def check_endpoint(endpoint: str, hosts_it: bool) -> None:
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdecimal():
        raise PlanError(f"`{endpoint}` is no meeting point", "write `HOST:PORT`")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        raise LaunchError(
            f"host `{host}` is unknown here ({error.strerror})",
            "give an address that every machine can reach",
            exit_code=7,
        ) from None
    if hosts_it and not any(can_bind(family, address) for family, _, _, _, address in found):
        raise LaunchError(
            f"port {port} of `{host}` is in use",
            "leave out `--master-port`, and a free port is found, or name another one",
        )


def can_bind(family: socket.AddressFamily, address: object) -> bool:
    """False where somebody listens there; an address of another machine counts as free."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)  # type: ignore[arg-type]
        except OSError as error:
            return error.errno != errno.EADDRINUSE
    return True
