"""Bytes read once a node: every rank gets the shards that it would have read for itself."""

from __future__ import annotations

import json
import os
import select
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from byte_plans import UNFILLED, Bare, Drawn, drawn
from exchange_cases import MOST, Listed, Memory, Table, blank, check_drawn
from hypothesis import given, settings, strategies as st
from launching import finish, start, write_script
from make_checkpoint import make_checkpoint
from ranks import ranks
from tiny import tiny_config
from torch import distributed

from tpx.comm import Groups
from tpx.errors import CheckpointError
from tpx.exchange import load_shared
from tpx.index import TensorMeta
from tpx.mesh import Mesh
from tpx.plan.find import plans_for_world
from tpx.plan.once import NodePlan, Round, plan_node
from tpx.plan.prepare import prepare
from tpx.plan.spans import Copy, Span
from tpx.plan.types import Part, Shard
from tpx.read import Arena, Files, ReadStats, load_spans
from tpx.record import Record

CPU = torch.device("cpu")


DTYPES, SHORT = st.sampled_from([torch.bfloat16, torch.float32]), st.sampled_from([1 << 30, 700])


def plans_of(most_ranks: int) -> st.SearchStrategy[Drawn]:
    return st.integers(1, most_ranks).flatmap(lambda world: drawn(world, longest=3000))


@settings(max_examples=30, deadline=None)
@given(plans_of(4), DTYPES, SHORT)
def test_any_plans_shards_are_filled_as_they_should_be(case, dtype, short):
    check_drawn(case, dtype, short)


@pytest.mark.soak
@settings(max_examples=1000, deadline=None)
@given(plans_of(8), DTYPES, SHORT)
def test_many_more_plans_shards_are_filled(case, dtype, short):
    check_drawn(case, dtype, short)


class Watched(Memory):
    """Says when each byte is read, by its offset."""

    def __init__(self, files: dict[str, bytes]):
        super().__init__(files)
        self.begun = [threading.Event() for _ in files["a"]]

    def preadv(self, file: str, buffers: Sequence[memoryview], offset: int) -> int:
        self.begun[offset].set()
        return super().preadv(file, buffers, offset)


class Waits:
    """A group whose exchange of round k lasts until round k + 1 is being read."""

    rank, size = 0, 2

    def __init__(self, source: Watched):
        self.source, self.round = source, 0

    def all_to_all_into(self, *_: object) -> None:
        self.round += 1
        assert all(event.wait(10) for event in self.source.begun[self.round :][:1])
        assert not any(event.is_set() for event in self.source.begun[self.round + 1 :])


def test_one_round_is_read_while_the_one_before_is_exchanged():
    source = Watched({"a": bytes(6)})
    given = (((), (Copy("p", 0, 0, 1, 1, 0, 0),)), ((), ()))
    steps = [Round((Span("a", at, 1, ()), None), given) for at in range(6)]
    group = Waits(source)
    load_shared(Listed(steps, MOST), source, blank(Bare({}), torch.float32), group, ReadStats())
    assert group.round == 6


class Noted:
    """Files, with a note of each read."""

    def __init__(self, files: Files):
        self.files, self.reads = files, list[tuple[str, int, int]]()

    def preadv(self, file: str, buffers: Sequence[memoryview], offset: int) -> int:
        got = self.files.preadv(file, buffers, offset)
        self.reads.append((file, offset, got))
        return got


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(vocab_size=131, hidden_size=128)
    return make_checkpoint(tmp_path_factory.mktemp("exchange") / "model", config, seed=5)


def load_both(folder: str, plan: str) -> tuple[list[tuple[str, int, int]], NodePlan, ReadStats]:
    """Loads shared and alone, and compares; -> the reads of the rounds, the plan, what was read."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    prepared = prepare(folder, plan, world)
    plans = [prepared.rank_plan(each) for each in range(world)]
    shared, alone = plan_node(plans, "always", most=MOST), plan_node(plans, "never")
    groups = Groups(prepared.plan.mesh, rank, CPU, world)
    group, stats = groups["node"], ReadStats()
    arenas = [Arena(plans[rank], torch.float32, CPU) for _ in range(2)]
    with Files(prepared.folder, prepared.index.files) as files:
        load_spans(shared.own[rank], files, arenas[0], stats)
        noted = Noted(files)
        load_shared(shared.rounds, noted, arenas[0], group, stats)
        load_spans(alone.own[rank], files, arenas[1], ReadStats())
        assert load_shared(alone.rounds, files, arenas[1], group, ReadStats()) == 0
    for name in arenas[0].slots:
        assert torch.equal(*(arena.slot(name) for arena in arenas)), name
    groups.close()
    return noted.reads, shared, stats


def check_plan(folder: Path, plan: str, world: int) -> None:
    found = ranks(world).run(load_both, str(folder), plan)
    node = found[0][1]
    assert all(other == node for _, other, _ in found)
    assert [stats.bytes_read for _, _, stats in found] == list(node.bytes_read)
    assert sum(node.bytes_read) < sum(node.bytes_alone)
    reads = sorted(read for reads, _, _ in found for read in reads)
    assert sum(nbytes for _, _, nbytes in reads) == sum(node.rounds.bytes_read()) > 0
    for (file, offset, nbytes), (other, after, _) in pairwise(reads):
        assert file != other or offset + nbytes <= after, "a byte was read twice"


@pytest.mark.parametrize(("plan", "world"), [("tp2-etp2", 2), ("tp4-ep2-etp2", 4)])
def test_shards_are_those_of_ranks_that_read_alone(checkpoint, plan, world):
    check_plan(checkpoint, plan, world)


SHIPPED = [(name, world) for world in (2, 4) for name in plans_for_world("gpt_oss", world)]


@pytest.mark.more
@pytest.mark.parametrize(("plan", "world"), SHIPPED)
def test_shards_of_every_shipped_plan(checkpoint, plan, world):
    check_plan(checkpoint, plan, world)


def replicated_memory() -> int:
    """Every rank needs every byte, so that a round gives and takes as much as one can."""
    group = Groups(Mesh(tp=4, ep=4), distributed.get_rank(), CPU, 4)["node"]
    data = bytes(40 << 20)
    meta = TensorMeta("t", "a", "U8", (len(data),), 0, len(data))
    shard = Shard((len(data),), "U8", (Part(meta, (((0, len(data)),),), (0,)),), "", 1, ())
    node = plan_node([Bare({"t": shard})] * 4, "always")
    arena = blank(Bare({"t": shard}), torch.float32)
    stats = ReadStats()
    load_shared(node.rounds, Memory({"a": data}), arena, group, stats)
    assert not arena.data.any()
    return stats.host_peak


@pytest.mark.more
def test_memory_beside_the_arena_is_bounded():
    """Two reads, and what a round gives and takes: at most a read to and from each rank."""
    assert max(ranks(4).run(replicated_memory)) <= (2 + 2 * 4) * 2**20


def gives_nothing() -> tuple[list[Record], int]:
    """Three rounds: rank 0 gives a byte to rank 1, nobody gives, rank 1 reads for itself alone."""
    rank = distributed.get_rank()
    groups = Groups(Mesh(tp=2, ep=2), rank, CPU, 2)
    bytes_ = bytes(range(8))
    own, given = Copy("p", 1, 0, 2, 1, 0, 0), Copy("p", 3, 4, 1, 1, 0, 0)
    alone = Span("a", 0, 3, (own,))
    steps = [
        Round((Span("a", 0, 4, ()), None), (((), (given,)), ((), ()))),
        Round((None, None), (((), ()), ((), ()))),
        Round((None, alone), (((), ()), ((), (own,)))),
    ]
    arena = blank(Bare({"p": Shard((6,), "U8", (), "replicate", 1, ())}), torch.float32)
    seen = list[int]()
    stats = ReadStats(seen.append)
    rounds = Listed(steps, MOST)
    with groups.recording() as records:
        came = load_shared(rounds, Memory({"a": bytes_}), arena, groups["node"], stats)
    expected = [UNFILLED] * 6 if rank == 0 else [1, 2, UNFILLED, UNFILLED, 3, UNFILLED]
    assert arena.flat("p").tolist() == expected
    assert (stats.bytes_read, stats.bytes_kept) == ((4, 0), (3, 3))[rank]
    assert seen == ([4, 4, 4], [0, 0, 3])[rank]
    groups.close()
    return records, came


def test_rounds_in_which_a_rank_reads_gives_or_takes_nothing():
    for rank, (records, came) in enumerate(ranks(2).run(gives_nothing)):
        sent = [8 if rank == 0 else 0, 0, 0]
        assert records == [
            Record("load.exchange", "all_to_all", "node", (nbytes,), "uint8", nbytes)
            for nbytes in sent
        ]
        assert came == rank


def test_a_rank_that_cannot_read_names_file_tensor_and_byte():
    """Whose byte it is, also where only another rank keeps it."""
    taken = Copy("theirs", 8, 0, 8, 1, 0, 0)
    step = Round((Span("a", 100, 16, ()), None), (((), (taken,)), ((), ())))
    arena = blank(Bare({}), torch.float32)
    with pytest.raises(CheckpointError) as raised:
        load_shared(
            Listed([step], MOST), Memory({"a": bytes(110)}), arena, Table(2).seat(0), ReadStats()
        )
    assert raised.value.message == "`a` ends at byte `110`, inside `theirs`"


FAILS = """
    import errno, json, os, sys, time
    from pathlib import Path
    import torch
    from tpx.exchange import load_shared
    from tpx.plan.once import plan_node
    from tpx.plan.prepare import prepare
    from tpx.read import Arena, Files, ReadStats
    from tpx.worker import Worker

    alive = open("alive", "w")  # for as long as this rank lives
    worker = Worker("cpu")
    rank, world = worker.place.rank, worker.place.world
    prepared = prepare(sys.argv[1], "tp4-ep4", world)
    plans = [prepared.rank_plan(each) for each in range(world)]
    group = worker.groups(prepared.plan.mesh)["node"]
    rounds = plan_node(plans, "always", most=4096).rounds
    mine = [step.reads[rank] for step in rounds if step.reads[rank] is not None]
    bad, preadv = mine[len(mine) // 2], os.preadv

    def failing(file, buffers, offset):
        if rank == 2 and offset == bad.offset:
            copies = next(step.gives[rank] for step in rounds if step.reads[rank] == bad)
            name = min((c for each in copies for c in each), key=lambda c: c.source).parameter
            Path("failed").write_text(json.dumps([time.time(), bad.file, bad.offset, name]))
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(file, buffers, offset)

    os.preadv = failing
    arena = Arena(plans[rank], torch.bfloat16, worker.device)
    with Files(prepared.folder, prepared.index.files) as files:
        load_shared(rounds, files, arena, group, ReadStats())
"""


@pytest.mark.soak  # test_launch_faults.py has a broken disk in `make test-more`
def test_a_disk_error_of_one_rank_ends_all_with_its_error(tmp_path, checkpoint):
    script = write_script(tmp_path, FAILS)
    os.mkfifo(tmp_path / "alive")
    alive = os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)
    job, hung_up = start("launch", "--nproc", 4, script, checkpoint, cwd=tmp_path), select.poll()
    hung_up.register(alive, 0)
    assert hung_up.poll(60_000), "some rank runs on"
    ended = time.time()
    os.close(alive)
    done = finish(job)
    failed, file, byte, name = json.loads((tmp_path / "failed").read_text())
    assert done.returncode == CheckpointError.exit_code
    assert done.stderr == (
        f"error: rank 2: `{file}` cannot be read at byte `{byte}`, in `{name}`: "
        "Input/output error\n\nhint: check the disk that holds it\n"
    )
    assert ended - failed < 5
