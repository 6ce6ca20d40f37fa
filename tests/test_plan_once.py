"""Each byte once a node: every rank gets its shards, and no byte is read twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from byte_plans import Bare, apply, drawn, item, read, shards_of
from checkpoint_files import lay_out
from hypothesis import given, settings, strategies as st

from tpx.index import TensorMeta
from tpx.plan.device import CPU, DEVICES
from tpx.plan.find import read_plan
from tpx.plan.forms import stored_nbytes
from tpx.plan.once import MOST_ON_GPU, NodePlan, Rounds, plan_node
from tpx.plan.prepare import prepare
from tpx.plan.spans import GAP, Window, spans
from tpx.plan.types import Part, Shard

DATA = Path(__file__).parent / "data"
PLANS = Path(__file__).parent.parent / "plans/gpt_oss"
GAPS = st.sampled_from([0, 7, 3000])


def load(node: NodePlan, plans: list[Bare], files: dict[str, bytes]) -> list[dict[str, bytes]]:
    """What the ranks hold after their own spans and all rounds."""
    found = [shards_of(plan) for plan in plans]
    for rank, own in enumerate(node.own):
        for span in own:
            apply(span.copies, files[span.file][span.offset : span.end], found[rank])
    for each in node.rounds:
        for reader, span in enumerate(each.reads):
            for rank, copies in enumerate(each.gives[reader]):
                assert span is not None or not copies
                if span is not None:
                    apply(copies, files[span.file][span.offset : span.end], found[rank])
    return [{name: bytes(data) for name, data in shards.items()} for shards in found]


def times_read(node: NodePlan, files: dict[str, bytes]) -> dict[str, np.ndarray]:
    """Of each byte of each file, in the whole node."""
    times = {file: np.zeros(len(data), int) for file, data in files.items()}
    reads = [span for each in node.rounds for span in each.reads if span is not None]
    for span in [*reads, *(span for own in node.own for span in own)]:
        times[span.file][span.offset : span.end] += 1
    return times


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4).flatmap(lambda ranks: drawn(ranks, longest=3000)), GAPS)
def test_every_rank_gets_its_shards_and_no_byte_is_read_twice(case, gap):
    node = plan_node(case.plans, "always", gap, most=4096)
    assert load(node, case.plans, case.files) == case.expected
    times = times_read(node, case.files)
    for file, count in times.items():
        assert count.max(initial=0) <= 1, file
    alone = [spans(plan, gap) for plan in case.plans]
    for mine in alone:
        for span in mine:
            for copy in span.copies:
                for row in range(copy.rows):
                    start = span.offset + copy.source + row * copy.source_step
                    assert times[span.file][start : start + copy.nbytes].all()
    assert node.bytes_alone == tuple(sum(span.nbytes for span in mine) for mine in alone)
    assert node.choice.shared == any(True for _ in node.rounds)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 4).flatmap(lambda ranks: drawn(ranks, longest=3000)), GAPS)
def test_a_round_is_bounded_whole_elements_move_and_ranks_read_alike(case, gap):
    node = plan_node(case.plans, "always", gap, most=4096)
    read_by = [sum(span.nbytes for span in own) for own in node.own]
    spread = max(read_by) - min(read_by)
    for each in node.rounds:
        assert {len(each.reads), len(each.gives), *map(len, each.gives)} == {len(case.plans)}
        for reader, span in enumerate(each.reads):
            if span is None:
                continue
            read_by[reader] += span.nbytes
            assert 0 < span.nbytes <= 4096
            assert span.copies == each.gives[reader][reader]
            for rank, copies in enumerate(each.gives[reader]):
                for copy in copies:
                    size = item(case.plans[rank].shards[copy.parameter].dtype)
                    assert copy.source % size == copy.nbytes % size == copy.target % size == 0
    assert tuple(read_by) == node.bytes_read == node.bytes_once
    assert max(read_by) - min(read_by) <= max(spread, 4096)
    assert len(list(node.rounds)) == len(node.rounds)


@settings(max_examples=10, deadline=None)
@given(drawn(3, longest=3000))
def test_who_shares_nothing_reads_for_itself(case):
    node = plan_node(case.plans, "never")
    assert list(node.rounds) == []
    assert node.bytes_read == node.bytes_alone
    found = [read(own, plan, case.files) for own, plan in zip(node.own, case.plans, strict=True)]
    assert found == case.expected


def slices(*of: list[tuple[int, int]]) -> list[Bare]:
    """By rank, the range of bytes that it keeps of each of some tensors, which are far apart."""
    plans = []
    for ranges in of:
        shards = {}
        for number, (start, stop) in enumerate(ranges):
            meta = TensorMeta(f"t{number}", "a", "U8", (2 * 10**9,), 3 * 10**9 * number, 2 * 10**9)
            part = Part(meta, (((start, stop),),), (0,))
            shards[f"p{number}"] = Shard((stop - start,), "U8", (part,), "colwise", 1, ())
        plans.append(Bare(shards))
    return plans


def test_edges_where_slices_begin_and_end_a_little_apart_are_shared_too():
    """No read of 10 bytes for the first and the last rank alone, in the second tensor either."""
    plans = slices([(0, 9980)] * 2, [(10, 9990)] * 2, [(20, 10_000)] * 2)
    node = plan_node(plans, "always", most=4096)
    assert node.own == ((), (), ())
    assert node.rounds.windows == (Window("a", 0, 10_000), Window("a", 3 * 10**9, 10_000))
    first, second = node.rounds
    assert [read.nbytes for read in first.reads] == [4096, 4096, 1808]
    assert [[c.nbytes for c in copies] for copies in first.gives[0]] == [[4096], [4086], [4076]]
    assert [read.nbytes for read in second.reads] == [4096, 1808, 4096]


def test_slices_that_touch_are_not_shared():
    node = plan_node(slices([(0, 100)], [(100, 200)]), "always")
    assert (node.rounds.windows, node.choice.shared) == ((), False)
    assert node.own == node.alone


def test_what_one_rank_reads_between_two_shared_stretches_is_its_own():
    far = 10 * GAP
    plans = slices([(0, 3 * far)], [(0, far)], [(2 * far, 3 * far)])
    node = plan_node(plans, "always")
    assert node.rounds.windows == (Window("a", 0, far), Window("a", 2 * far, far))
    [[own], [], []] = node.own
    assert (own.offset, own.nbytes) == (far, far)


def test_what_one_rank_reads_before_and_after_a_shared_stretch_is_its_own():
    far = 10 * GAP
    plans = slices([(0, 3 * far)] * 2, [(0, far), (2 * far, 3 * far)])
    node = plan_node(plans, "always")
    second = 3 * 10**9
    assert node.rounds.windows == (Window("a", 0, far), Window("a", second + 2 * far, far))
    assert [(s.offset, s.nbytes) for s in node.own[0]] == [(far, 2 * far), (second, 2 * far)]


def test_the_longest_read_goes_to_who_has_read_least():
    windows = (Window("a", 0, 5000), Window("a", 9000, 100), Window("b", 0, 300))
    rounds = Rounds(windows, ((), ()), (50, 0), 4096)
    assert [[None if s is None else s.nbytes for s in each.reads] for each in rounds] == [
        [904, 4096], [300, 100]
    ]  # fmt: skip
    assert rounds.bytes_read() == (1204, 4196)


@pytest.mark.parametrize(("ranks", "device", "shared"), [
    (8, DEVICES["h100"], True), (2, DEVICES["h200"], True), (8, CPU, False), (2, CPU, False),
    (1, DEVICES["h100"], False),
])  # fmt: skip
def test_nvlink_pays_and_gloo_does_not(ranks, device, shared):
    """A gigabyte that every rank needs."""
    node = plan_node(slices(*[[(0, 10**9)]] * ranks), device=device)
    assert node.choice.shared is shared
    assert (node.choice.once < node.choice.alone) is shared
    assert sum(node.bytes_read) == (10**9 if shared else 10**9 * ranks)
    assert sum(node.bytes_once) == 10**9


def test_little_is_read_by_every_rank_rather_than_sent():
    """Two collectives take longer than to read 64 KiB."""
    choice = plan_node(slices(*[[(0, 1 << 16)]] * 8), device=DEVICES["h100"], most=4096).choice
    assert not choice.shared
    assert choice.once > 2 * 10e-6 > 2 * choice.alone


@pytest.fixture(scope="module")
def gpt_oss_120b(tmp_path_factory):
    return lay_out(DATA / "gpt-oss-120b.json.gz", tmp_path_factory.mktemp("120b"))


def test_120b_on_8_ranks_is_read_once_a_node(gpt_oss_120b, tmp_path):
    """At most 66 GB of a checkpoint of 65.25 GB, where ranks for themselves read 214 GB."""
    path = tmp_path / "tp8-etp8.yaml"
    text = (PLANS / "tp4-etp4.yaml").read_text()
    path.write_text(text.replace("tp: 4, etp: 4", "tp: 8, etp: 8"))
    prepared = prepare(str(gpt_oss_120b), str(path), 8)
    plans = [prepared.rank_plan(rank) for rank in range(8)]
    node = plan_node(plans, device=DEVICES["h100"])
    assert node.choice.shared
    assert sum(node.bytes_alone) == pytest.approx(214e9, rel=0.001)
    assert max(map(len, node.alone)) < 10_000  # and not a span for each of 26 million runs
    assert sum(node.bytes_read) <= 66e9
    checkpoint = sum(meta.nbytes for meta in prepared.index.tensors.values())
    assert sum(node.bytes_read) == checkpoint
    own = sum(copy.kept for mine in node.own for span in mine for copy in span.copies)
    first = next(iter(node.rounds))
    assert all(span is not None and span.nbytes <= MOST_ON_GPU for span in first.reads)
    assert own < sum(map(stored_nbytes, plans))


@pytest.mark.more
@pytest.mark.parametrize("name", sorted(path.stem for path in PLANS.glob("*.yaml")))
def test_shipped_plans_read_120b_once_and_fill_every_shard(gpt_oss_120b, name):
    world = read_plan(name, "gpt_oss").mesh.world
    prepared = prepare(str(gpt_oss_120b), name, world)
    plans = [prepared.rank_plan(rank) for rank in range(world)]
    node = plan_node(plans, "always", most=8 << 20)
    assert sum(node.bytes_once) == sum(meta.nbytes for meta in prepared.index.tensors.values())
    kept = [sum(c.kept for span in own for c in span.copies) for own in node.own]
    for each in node.rounds:
        for gives in each.gives:
            kept = [n + sum(c.kept for c in q) for n, q in zip(kept, gives, strict=True)]
    assert kept == [stored_nbytes(plan) for plan in plans]
