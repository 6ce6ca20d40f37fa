"""Every collective goes through here: named, recorded, profiled, and with a gradient.

A Group knows its ranks and moves tensors between them; Groups makes those that a mesh implies. It
knows no model and no plan; the default process group starts and ends elsewhere (worker.py).
Backwards: all_reduce and copy (identity) are each other's, as are all_gather and reduce_scatter;
all_to_all's is the reverse all_to_all. Errors of torch pass through.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.functional import pad
from torch.profiler import record_function

from .mesh import GROUPS, Mesh
from .record import Log, Record, backward

# torch 2.13's names, or those that they replace.
_NEW = hasattr(distributed, "all_gather_single")
_all_gather = getattr(distributed, "all_gather_single" if _NEW else "all_gather_into_tensor")
_reduce_scatter = getattr(distributed, "reduce_scatter_single" if _NEW else "reduce_scatter_tensor")


class Group:
    """Some ranks that talk to each other, in the order of `ranks`; `rank` is this one's place.

    A group of one rank returns its input and records nothing. Inputs are left as they are.
    """

    def __init__(
        self,
        name: str,
        ranks: tuple[int, ...],
        rank: int,
        device: torch.device,
        process_group: Any = None,  # None: the default group
        log: Log | None = None,
    ):
        self.name = name
        self.ranks = ranks
        self.rank = ranks.index(rank)
        self.size = len(ranks)
        self.device = device
        self._process_group = process_group
        self._log = log or Log()

    def all_reduce(self, x: Tensor, name: str) -> Tensor:
        """The sum over the group, the same bits on every rank. Backward: identity."""
        return x if self.size == 1 else _call(_AllReduce, x, self, name)

    def copy(self, x: Tensor, name: str = "copy") -> Tensor:
        """x, of which every rank computes another part of the result. Backward: all_reduce, so that
        each rank gets the whole gradient (the function f of arXiv 1909.08053)."""
        return x if self.size == 1 else _call(_Copy, x, self, name)

    def all_gather(
        self, x: Tensor, name: str, sizes: Sequence[int] | None = None, *, alike: bool = False
    ) -> Tensor:
        """The rows of all ranks, concatenated on dim 0 in the group's order.

        sizes: rows of each rank, where they differ (they are padded on the way). Backward:
        reduce_scatter, for ranks that go on with different computations; alike: all ranks compute
        the same from the result, so each has its whole gradient and takes its own rows of it.
        """
        if self.size == 1:
            return x
        function = _AllGatherAlike if alike else _AllGather
        if sizes is None or len(set(sizes)) == 1:
            return _call(function, x, self, name, x)
        assert len(sizes) == self.size, f"{sizes=} {self.ranks=}"
        assert x.shape[0] == sizes[self.rank], f"{x.shape=} {sizes=} {self.rank=}"
        longest = max(sizes)
        padded = pad(x, (0, 0) * (x.dim() - 1) + (0, longest - x.shape[0]))
        parts = torch.split(_call(function, padded, self, name, x), longest)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def reduce_scatter(self, x: Tensor, name: str) -> Tensor:
        """This rank's part of the sum over the group; dim 0 is cut in equal parts.
        Backward: all_gather."""
        return x if self.size == 1 else _call(_ReduceScatter, x, self, name)

    def all_to_all(self, x: Tensor, send: list[int], receive: list[int], name: str) -> Tensor:
        """send[i] rows of x, in order, go to rank i of the group; receive[i] rows come from it and
        are returned in the same order. Backward: the reverse."""
        assert x.shape[0] == sum(send), f"{x.shape=} {send=}"
        return x if self.size == 1 else _call(_AllToAll, x, self, name, send, receive)

    def all_to_all_into(
        self, out: Tensor, x: Tensor, send: list[int], receive: list[int], name: str
    ) -> None:
        """As all_to_all, into `out`, of a group of several ranks. No gradient."""
        with self._collective("all_to_all", x, name), torch.no_grad():
            distributed.all_to_all_single(out, x, receive, send, group=self._process_group)

    def broadcast(self, x: Tensor, src: int, name: str) -> Tensor:
        """x of rank `src` of the group, on every rank; x has the same shape on all. No gradient."""
        if self.size == 1:
            return x
        with self._collective("broadcast", x, name), torch.no_grad():
            out = x.clone(memory_format=torch.contiguous_format)
            distributed.broadcast(out, self.ranks[src], group=self._process_group)
        return out

    def gather_bytes(self, data: bytes, name: str) -> list[bytes]:
        """What every rank gave, of any length, in the group's order."""
        if self.size == 1:
            return [data]
        length = torch.tensor([len(data)], device=self.device)
        sizes = self.all_gather(length, f"{name}.lengths").tolist()
        mine = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[: len(data)]
        joined = self.all_gather(mine.to(self.device), name, sizes).cpu()
        return [part.numpy().tobytes() for part in torch.split(joined, sizes)]

    def broadcast_bytes(self, data: bytes, src: int, name: str) -> bytes:
        """What rank `src` of the group gave, of any length."""
        if self.size == 1:
            return data
        length = torch.tensor([len(data)], device=self.device)
        size = int(self.broadcast(length, src, f"{name}.lengths"))
        if not size:
            return b""
        given = bytearray(data if self.rank == src else size)
        mine = torch.frombuffer(given, dtype=torch.uint8)
        return self.broadcast(mine.to(self.device), src, name).cpu().numpy().tobytes()

    @contextmanager
    def _collective(self, op: str, x: Tensor, name: str) -> Iterator[None]:
        """A profiler span, and a record if anybody listens, around one collective on x."""
        if self._log.records is not None:
            self._log.records.append(Record.of(name, op, self.name, x))
        with record_function(name):
            yield


def _call(function: Any, *args: Any) -> Tensor:
    out: Tensor = function.apply(*args)
    return out


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, name: str) -> Tensor:
        with group._collective("all_reduce", x, name):
            out = x.clone(memory_format=torch.contiguous_format)
            distributed.all_reduce(out, group=group._process_group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad, None, None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, name: str) -> Tensor:
        ctx.group, ctx.name = group, name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return ctx.group.all_reduce(grad, backward(ctx.name)), None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, name: str, put_in: Tensor) -> Tensor:
        """put_in: x before it was padded, for the record."""
        ctx.group, ctx.name = group, name
        return _gather(group, x, name, put_in)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return ctx.group.reduce_scatter(grad, backward(ctx.name)), None, None, None


class _AllGatherAlike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, name: str, put_in: Tensor) -> Tensor:
        ctx.place = group.rank, x.shape[0]
        return _gather(group, x, name, put_in)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        rank, rows = ctx.place
        return grad[rank * rows : (rank + 1) * rows], None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, name: str) -> Tensor:
        assert x.shape[0] % group.size == 0, f"{x.shape=} {group.size=}"
        ctx.group, ctx.name = group, name
        with group._collective("reduce_scatter", x, name):
            out = x.new_empty(x.shape[0] // group.size, *x.shape[1:])
            _reduce_scatter(out, x.contiguous(), group=group._process_group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return ctx.group.all_gather(grad, backward(ctx.name)), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, name: str, *sizes: list[int]) -> Tensor:
        ctx.group, ctx.name, (ctx.send, ctx.receive) = group, name, sizes
        out = x.new_empty(sum(ctx.receive), *x.shape[1:])
        group.all_to_all_into(out, x.contiguous(), ctx.send, ctx.receive, name)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        back = ctx.group.all_to_all(grad, ctx.receive, ctx.send, backward(ctx.name))
        return back, None, None, None, None


def _gather(group: Group, x: Tensor, name: str, put_in: Tensor) -> Tensor:
    with group._collective("all_gather", put_in, name):
        out = x.new_empty(x.shape[0] * group.size, *x.shape[1:])
        _all_gather(out, x.contiguous(), group=group._process_group)
    return out


class Groups:
    """The groups of one rank: groups["tp"], `none`, this rank alone, and groups["node"], those of
    its machine: `local_world` consecutive ranks, or itself where they do not make up the world.

    All ranks of the default process group, as many as the mesh has, must make it together, since
    each set of ranks becomes a process group once; names with the same set share it.
    """

    def __init__(self, mesh: Mesh, rank: int, device: torch.device, local_world: int = 1):
        self.mesh, self.rank, self.device = mesh, rank, device
        self._log = Log()
        self._made: dict[tuple[int, ...], Any] = {}
        self._made_on_host: dict[tuple[int, ...], Any] = {}
        self._host: dict[str, Group] = {}
        every = {name: mesh.groups(name) for name in GROUPS} | {"node": mesh.nodes(local_world)}
        for name, ranks in ((name, ranks) for name, found in every.items() for ranks in found):
            if 1 < len(ranks) < mesh.world and ranks not in self._made:
                self._made[ranks] = distributed.new_group(list(ranks), group_desc=name)
        mine = {name: next(g for g in found if rank in g) for name, found in every.items()}
        self._groups = {name: self._group(name, ranks) for name, ranks in mine.items()}
        self.none = self._group("none", (rank,))

    @staticmethod
    def alone(device: torch.device) -> Groups:
        """For a process by itself; needs no process group."""
        return Groups(Mesh(), 0, device)

    def __getitem__(self, name: str) -> Group:
        return self._groups[name]

    def host(self, name: str) -> Group:
        """A group's twin for tensors of the CPU; all ranks ask for it together the first time."""
        if name not in self._host:
            self._host[name] = self._host_group(name)
        return self._host[name]

    @property
    def records(self) -> list[Record] | None:
        """What was recorded since `recording` began; None: not recording."""
        return self._log.records

    @contextmanager
    def recording(self) -> Iterator[list[Record]]:
        """Every collective of these groups within, in the order this rank called them."""
        before = self._log.records
        records: list[Record] = []
        self._log.records = records
        try:
            yield records
        finally:
            self._log.records = before

    def close(self) -> None:
        """Ends the process groups made here; all ranks call it, and none uses them afterwards."""
        for ranks, process_group in [*self._made.items(), *self._made_on_host.items()]:
            if self.rank in ranks:
                distributed.destroy_process_group(process_group)
        self._made, self._made_on_host, self._host = {}, {}, {}

    def _group(self, name: str, ranks: tuple[int, ...]) -> Group:
        return Group(name, ranks, self.rank, self.device, self._made.get(ranks), self._log)

    def _host_group(self, name: str) -> Group:
        mine, cpu = self[name], torch.device("cpu")
        if self.device.type == "cpu" or mine.size == 1:
            return Group(name, mine.ranks, self.rank, cpu, mine._process_group, self._log)
        for ranks in self.mesh.groups(name):
            if ranks not in self._made_on_host:
                made = distributed.new_group(list(ranks), backend="gloo", group_desc=name)
                self._made_on_host[ranks] = made
        return Group(name, mine.ranks, self.rank, cpu, self._made_on_host[mine.ranks], self._log)
