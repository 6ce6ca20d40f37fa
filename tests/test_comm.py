"""Collectives on real ranks: values, gradients, records, and the same bits everywhere."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from ranks import ranks
from torch import distributed
from torch.autograd.profiler import profile

from tpx.comm import Group, Groups
from tpx.mesh import GROUPS, Mesh
from tpx.record import Record

CPU = torch.device("cpu")
Loss = Callable[[torch.Tensor], torch.Tensor]


def groups_of(mesh: Mesh) -> Groups:
    return Groups(mesh, distributed.get_rank(), CPU)


def everyone() -> Group:
    """The default group: no process group is made."""
    return groups_of(Mesh(tp=distributed.get_world_size(), edp=distributed.get_world_size()))["tp"]


def token(rank: int, row: int) -> list[float]:
    """A row that names its rank and place."""
    return [100.0 * rank + row, -row, rank]


def rows(rank: int, count: int) -> torch.Tensor:
    return torch.tensor([token(rank, row) for row in range(count)]).view(count, 3)


def test_a_group_of_one_returns_its_input_and_records_nothing():
    groups = Groups.alone(CPU)
    x = torch.ones(2, 3)
    with groups.recording() as records:
        for group in [*(groups[name] for name in GROUPS), groups.none]:
            assert (group.rank, group.size, group.ranks) == (0, 1, (0,))
            assert group.all_reduce(x, "a") is x
            assert group.copy(x) is x
            assert group.all_gather(x, "b", [2]) is x
            assert group.reduce_scatter(x, "c") is x
            assert group.all_to_all(x, [2], [2], "d") is x
            assert group.broadcast(x, 0, "e") is x
            assert group.gather_bytes(b"yes", "f") == [b"yes"]
    assert records == []
    groups.close()


def values() -> None:
    group, world = everyone(), distributed.get_world_size()
    me = group.rank
    x = rows(me, 2)
    total = group.all_reduce(x, "sum")
    assert torch.equal(total, sum(rows(r, 2) for r in range(world)))
    assert torch.equal(x, rows(me, 2)), "the input was changed"
    assert torch.equal(group.all_gather(x, "g"), torch.cat([rows(r, 2) for r in range(world)]))

    sizes = [(r + 2) % world for r in range(world)]  # one rank has none
    uneven = group.all_gather(rows(me, sizes[me]), "u", sizes)
    assert torch.equal(uneven, torch.cat([rows(r, sizes[r]) for r in range(world)]))
    assert group.all_gather(rows(me, 0), "none", [0] * world).shape == (0, 3)

    stacked = torch.cat([rows(me, 1) + 10 * r for r in range(world)])
    expected = sum(rows(r, 1) + 10 * me for r in range(world))
    assert torch.equal(group.reduce_scatter(stacked, "rs"), expected)

    for src in range(world):
        assert torch.equal(group.broadcast(x.t(), src, "b"), rows(src, 2).t())
    data = [b"", b"\0\1" * 70, b"x"] * 2
    assert group.gather_bytes(data[me], "bytes") == data[:world]
    assert group.gather_bytes(b"", "nothing") == [b""] * world


def exchange() -> None:
    """Rank s sends (s * d) % 3 rows to rank d: none from rank 0, and none to it."""
    group, world = everyone(), distributed.get_world_size()
    me = group.rank
    send = [(me * d) % 3 for d in range(world)]
    receive = [(s * me) % 3 for s in range(world)]
    x = torch.cat([rows(me, n) + 1000 * d for d, n in enumerate(send)])
    expected = torch.cat([rows(s, n) + 1000 * me for s, n in enumerate(receive)])
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.uint8):
        out = group.all_to_all(x.to(dtype), send, receive, "x")
        assert out.dtype == dtype
        assert torch.equal(out, expected.to(dtype))


def test_values_carry_the_rank_and_row_they_came_from():
    for world in (2, 4):
        ranks(world).run(values)
        ranks(world).run(exchange)


class Setting:
    """What every rank knows of all ranks' inputs x_r, and weights that make losses differ."""

    def __init__(self):
        self.group, self.world = everyone(), distributed.get_world_size()
        generator = torch.Generator().manual_seed(7)
        self.inputs = torch.rand(self.world, self.world * 2, 3, generator=generator)
        self.weights = torch.rand(self.world, self.world**2 * 2, 3, generator=generator)

    def loss(self, out: torch.Tensor, rank: int) -> torch.Tensor:
        return (out.square() * self.weights[rank][: len(out)]).sum()

    def compare(self, ours: Loss, theirs: Loss) -> None:
        """ours(x): this rank's share of the loss, by collectives; theirs(xs): all of it, by none.
        The gradients of this rank's input must agree."""
        x = self.inputs[self.group.rank].clone().requires_grad_()
        ours(x).backward()
        xs = self.inputs.clone().requires_grad_()
        theirs(xs).backward()
        assert torch.allclose(x.grad, xs.grad[self.group.rank])


def reduce_gradients() -> None:
    s = Setting()
    group, me = s.group, s.group.rank
    # Every rank has the whole loss of the sum.
    s.compare(
        lambda x: s.loss(group.all_reduce(x, "r"), 0),
        lambda xs: s.loss(xs.sum(0), 0),
    )
    s.compare(
        lambda x: s.loss(group.reduce_scatter(x, "s"), me),
        lambda xs: sum(s.loss(xs.sum(0)[2 * r : 2 * r + 2], r) for r in range(s.world)),
    )
    # One replicated x, of which each rank computes another part of the loss.
    s.inputs[:] = s.inputs[0].clone()
    s.compare(
        lambda x: s.loss(group.copy(x), me),
        lambda xs: sum(s.loss(xs[me], r) for r in range(s.world)),
    )


def gather_gradients() -> None:
    """Ranks that go on differently have losses that add; alike, each has the whole loss."""
    s = Setting()
    group, me = s.group, s.group.rank
    s.compare(
        lambda x: s.loss(group.all_gather(x, "g"), me),
        lambda xs: sum(s.loss(xs.flatten(0, 1), r) for r in range(s.world)),
    )
    s.compare(
        lambda x: s.loss(group.all_gather(x, "g", alike=True), 0),
        lambda xs: s.loss(xs.flatten(0, 1), 0),
    )
    sizes = list(range(s.world))  # rank r gathers its first r rows
    s.compare(
        lambda x: s.loss(group.all_gather(x[:me], "g", sizes), me),
        lambda xs: sum(s.loss(torch.cat([x[:r] for r, x in enumerate(xs)]), q) for q in sizes),
    )
    s.compare(
        lambda x: s.loss(group.all_gather(x[:me], "g", sizes, alike=True), 0),
        lambda xs: s.loss(torch.cat([x[:r] for r, x in enumerate(xs)]), 0),
    )


def exchange_gradients() -> None:
    """Rank r sends d rows to rank d, one after another, and gets r rows from each."""
    s = Setting()
    group, me = s.group, s.group.rank
    send, receive = list(range(s.world)), [me] * s.world
    starts = [sum(send[:d]) for d in send]
    s.compare(
        lambda x: s.loss(group.all_to_all(x[: sum(send)], send, receive, "t"), me),
        lambda xs: sum(
            s.loss(torch.cat([x[starts[d] : starts[d] + d] for x in xs]), d) for d in send
        ),
    )


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("gradients", [reduce_gradients, gather_gradients, exchange_gradients])
def test_gradients_equal_those_of_one_rank(gradients: Callable[[], None], world: int):
    ranks(world).run(gradients)


def reduced(dtype: torch.dtype) -> list[torch.Tensor]:
    group = everyone()
    generator = torch.Generator().manual_seed(group.rank)
    lengths = (1, 3, 100, 2880, 10007)
    return [group.all_reduce(torch.randn(n, generator=generator).to(dtype), "sum") for n in lengths]


def test_all_reduce_gives_every_rank_the_same_bits():
    for dtype in (torch.float32, torch.bfloat16):
        first, *others = ranks(4).run(reduced, dtype)
        for other in others:
            assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))
        assert any(x.isfinite().all() and x.std() > 0 for x in first[1:])


MESHES = [
    Mesh(dp=2, tp=2, ep=4),
    Mesh(dp=2, tp=2, ep=2, etp=2),
    Mesh(dp=2, tp=2, edp=2, ep=2),
    Mesh(tp=4, ep=2, etp=2),
    Mesh(tp=4, edp=2, ep=2),
    Mesh(dp=4, ep=4),
]


def members(mesh: Mesh) -> dict[str, tuple[tuple[int, ...], int, list[int]]]:
    """Of each group: its ranks, this one's place, and the ranks that a gather really reaches."""
    groups = groups_of(mesh)
    me = torch.tensor([distributed.get_rank()])
    found = {
        name: (
            groups[name].ranks,
            groups[name].rank,
            groups[name].all_gather(me, name).tolist(),
        )
        for name in GROUPS
    }
    groups.close()
    return found


def test_groups_are_those_of_the_mesh():
    for mesh in MESHES:
        for rank, found in enumerate(ranks(4).run(members, mesh)):
            for name in GROUPS:
                expected = mesh.group(name, rank)
                assert found[name] == (expected, expected.index(rank), list(expected))


def sharing() -> tuple[int, int, int]:
    """Open files before a mesh has groups, while it has, and after; tp and expert are the same."""
    files = [len(os.listdir("/proc/self/fd"))]
    groups = groups_of(Mesh(dp=2, tp=2, edp=2, ep=2))
    for name in GROUPS[:-1]:
        groups[name].all_reduce(torch.ones(1), "sum")
    assert groups["tp"]._process_group is groups["expert"]._process_group
    files.append(len(os.listdir("/proc/self/fd")))
    groups.close()
    del groups
    files.append(len(os.listdir("/proc/self/fd")))
    return tuple(files)


def test_names_with_the_same_ranks_share_a_process_group_and_close_ends_all():
    for before, during, after in ranks(4).run(sharing):
        assert before < during
        assert after == before


def recorded() -> tuple[list[Record], list[Record] | None, list[str]]:
    groups = groups_of(Mesh(tp=2, ep=2))
    group = groups["tp"]
    x = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
    group.all_reduce(x, "before")
    with (
        groups.recording() as records,
        profile(use_kineto=False) as profiler,  # Kineto would import a second's worth of modules
    ):
        assert groups.records is records
        sizes = [2, 1]
        mine = x[: sizes[group.rank]]
        group.all_gather(group.copy(group.all_reduce(mine.sum(0), "sum")).view(1, 3), "gather")
        group.all_gather(mine, "uneven", sizes)
        group.all_to_all(x, [1, 1], [1, 1], "exchange")
        group.reduce_scatter(group.copy(x), "scatter").sum().backward()
        groups["expert"].broadcast(x, 1, "tell")
        group.gather_bytes(b"abc", "digest")
    group.all_reduce(x, "after")
    spans = {event.name for event in profiler.function_events}
    names = [record.name for record in records if record.name in spans]
    after = groups.records
    groups.close()
    return records, after, names


def test_records_say_what_was_put_in_while_recording():
    for rank, (records, after, spans) in enumerate(ranks(2).run(recorded)):
        mine = 2 - rank
        assert records == [
            Record("sum", "all_reduce", "tp", (3,), "bfloat16", 6),
            Record("gather", "all_gather", "tp", (1, 3), "bfloat16", 6),
            Record("uneven", "all_gather", "tp", (mine, 3), "bfloat16", 6 * mine),
            Record("exchange", "all_to_all", "tp", (2, 3), "bfloat16", 12),
            Record("scatter", "reduce_scatter", "tp", (2, 3), "bfloat16", 12),
            Record("scatter.backward", "all_gather", "tp", (1, 3), "bfloat16", 6),
            Record("copy.backward", "all_reduce", "tp", (2, 3), "bfloat16", 12),
            Record("tell", "broadcast", "expert", (2, 3), "bfloat16", 12),
            Record("digest.lengths", "all_gather", "tp", (1,), "int64", 8),
            Record("digest", "all_gather", "tp", (3,), "uint8", 3),
        ]
        assert after is None
        assert spans == [record.name for record in records]
