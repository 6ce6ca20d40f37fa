"""Which rank holds up the others, from what each of them has entered; and what a rank tells."""

from __future__ import annotations

import faulthandler
import json
import os
import threading
import time
from pathlib import Path

import pytest
import torch
from ranks import ranks

from tpx.comm import Groups
from tpx.launch import beat
from tpx.launch.hang import Entry, Frame, GroupState, Stand, explain, read_stand, waits
from tpx.mesh import Mesh

HERE = Frame("/job/script.py", 8, "step", "time.sleep(60)")
INSIDE = Frame(f"{Path(torch.__file__).parent}/site-packages/torch/distributed.py", 3, "all_reduce")


def group(entered: int, ended: int, op: str = "all_reduce", name: str = "0", **more) -> GroupState:
    entries = tuple(Entry(seq, op, ((4,),)) for seq in range(1, entered + 1))
    told = {"words": "default_pg", "ranks": (0, 1, 2), "entries": entries}
    return GroupState(name=name, entered=entered, ended=ended, **told | more)


def rank(number: int, *groups: GroupState, **more) -> Stand:
    return Stand(number, (INSIDE, HERE), groups=groups, **more)


def said(*stands: Stand) -> str:
    error = explain(stands, 120.0, Path("/runs/1/hang"))
    assert error.exit_code == 6
    assert error.hint == (
        "the stacks of all ranks are in `/runs/1/hang`; `--hang-timeout SECONDS` gives a step more "
        "time, and 0 as much as it takes"
    )
    return error.message


def test_the_rank_that_has_not_come_is_named_and_where_it_is():
    assert said(rank(0, group(3, 2)), rank(1, group(2, 2)), rank(2, group(3, 2))) == (
        "rank 1 has not entered all_reduce 3, ranks 0 and 2 wait for it, and nothing has moved for "
        "120 s: rank 1 is at `/job/script.py`, line 8, in `step`: `time.sleep(60)`"
    )


def test_collective_group_and_layer_have_the_names_of_tpx():
    inside = {"module": "model.layers.17.mlp", "collective": ("moe.combine", "ep")}
    found = said(rank(0, group(412, 411, ranks=(0, 1)), **inside), rank(1, group(411, 411)))
    assert found.startswith(
        "rank 1 has not entered `moe.combine` (all_reduce 412 of group `ep`) in "
        "`model.layers.17.mlp`, rank 0 waits for it, and nothing has moved for 120 s: "
    )
    found = said(rank(0, group(2, 1, words="tp")), rank(1, group(1, 1, words="tp")))
    assert found.startswith("rank 1 has not entered all_reduce 2 of group `tp`, rank 0 waits")


def test_a_rank_that_waits_itself_is_not_the_cause():
    """Rank 0 waits for 1, which waits for 2 in another group."""
    pair = {"name": "1", "ranks": (1, 2), "words": "ep"}
    found = said(
        rank(0, group(5, 4, ranks=(0, 1))),
        rank(1, group(4, 4, ranks=(0, 1)), group(9, 8, **pair)),
        rank(2, group(8, 8, **pair)),
    )
    assert found.startswith("rank 2 has not entered all_reduce 9 of group `ep`, rank 1 waits for")


def test_the_ranks_of_other_collectives_are_not_missing():
    found = waits([rank(0, group(3, 2, ranks=(0, 1))), rank(1, group(2, 2)), rank(2)])
    assert [(wait.waiting, wait.missing, wait.seq) for wait in found] == [((0,), (1,), 3)]


def test_a_rank_that_has_ended_is_the_cause_before_one_that_runs():
    found = said(rank(0, group(3, 2)), rank(1), Stand(2, gone="has ended with exit code 0"))
    assert found.endswith("and nothing has moved for 120 s: rank 2 has ended with exit code 0")


def test_ranks_in_different_collectives_are_told_the_fewest_first():
    stands = [rank(0, group(3, 2)), rank(1, group(3, 2, "broadcast")), rank(2, group(3, 2))]
    assert said(*stands) == (
        "ranks entered different collectives: rank 1 `broadcast of [4]` at `/job/script.py`, line "
        "8, ranks 0 and 2 `all_reduce of [4]` at `/job/script.py`, line 8, and nothing has moved "
        "for 120 s"
    )


def test_ranks_that_wait_for_each_other_are_told():
    tp, ep = {"name": "1", "words": "tp", "ranks": (0, 1)}, {"name": "2", "words": "ep",
                                                            "ranks": (0, 1)}  # fmt: skip
    found = said(
        rank(0, group(3, 2, **tp), group(1, 1, **ep)), rank(1, group(2, 2, **tp), group(2, 1, **ep))
    )
    assert found == (
        "ranks wait for each other, rank 0 in all_reduce 3 of group `tp` for rank 1, rank 1 in "
        "all_reduce 2 of group `ep` for rank 0, and nothing has moved for 120 s"
    )


def test_where_all_have_come_it_is_another_machine_or_the_network():
    stands = [rank(number, group(3, 2, ranks=(0, 1))) for number in range(2)]
    assert said(*stands) == (
        "ranks 0 and 1 wait for the network or a device in all_reduce 3, and nothing has moved for "
        "120 s"
    )
    assert said(rank(0, group(3, 2))) == (
        "rank 0 waits for ranks 1 and 2 of another machine in all_reduce 3, and nothing has moved "
        "for 120 s"
    )


def test_ranks_that_gloo_let_go_wait_in_a_later_collective():
    stands = [rank(0, group(4, 3)), rank(1, group(3, 2))]
    assert said(*stands) == (
        "rank 1 waits for rank 2 of another machine in all_reduce 3, rank 0 in a later one, and "
        "nothing has moved for 120 s"
    )


def test_of_steps_whose_collectives_nobody_sees_the_fewest_are_told():
    at = "rank 1 is at `/job/script.py`, line 8, in `step`: `time.sleep(60)`"
    stands = [rank(0, steps=42), rank(1, steps=41), rank(2, steps=42)]
    assert said(*stands) == (
        "rank 1 has not begun step 42, ranks 0 and 2 are in it, and nothing has moved for 120 s: "
        + at
    )
    ended = Stand(2, gone="has ended with exit code 0")
    assert said(rank(0, steps=42), rank(1, steps=41), ended) == (
        "rank 2 has not begun step 42, rank 0 is in it, and nothing has moved for 120 s: "
        "rank 2 has ended with exit code 0"
    )
    assert said(rank(0, steps=2), rank(1, steps=2)).startswith(
        "nothing has moved for 120 s: rank 0 "
    )


def test_where_nothing_is_told_the_places_are():
    assert said(Stand(0, (HERE,)), Stand(1)) == (
        "nothing has moved for 120 s: rank 0 is at `/job/script.py`, line 8, in `step`: "
        "`time.sleep(60)`, rank 1 gives no answer"
    )


def test_stacks_are_read_where_a_rank_has_told_nothing(tmp_path):
    with (tmp_path / "rank1.stacks").open("w") as file:
        held = threading.Thread(target=time.sleep, args=(0.2,))
        held.start()
        faulthandler.dump_traceback(file, all_threads=True)
        held.join()
    frame = read_stand(1, tmp_path).frames[0]
    assert frame.file == __file__
    assert frame.function == "test_stacks_are_read_where_a_rank_has_told_nothing"
    assert read_stand(2, tmp_path) == Stand(2)


class Stack(torch.nn.Module):
    """Two layers, each with one collective; rank 1 does not come to the second."""

    def __init__(self, groups: Groups, told: list):
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer(groups, told, number) for number in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.layers[0](x))


class Layer(torch.nn.Module):
    def __init__(self, groups: Groups, told: list, number: int):
        super().__init__()
        self.groups, self.told, self.number = groups, told, number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (self.groups.rank, self.number) == (1, 1):
            while not (self.told[0] / "stand.0").exists():
                time.sleep(0.005)
            self.tell()
        return self.groups["tp"].all_reduce(x, "o_proj")

    def tell(self) -> None:
        os.environ["RANK"] = str(self.groups.rank)
        beat.write(self.told[0] / f"stand.{self.groups.rank}", json.dumps(beat.stand()))


def stand_in_a_collective(folder: Path) -> None:
    """Each rank writes where it stands, rank 0 from a thread once it waits."""
    rank = torch.distributed.get_rank()
    groups = Groups(Mesh(tp=2, ep=2), rank, torch.device("cpu"))
    model = Stack(groups, [folder])

    before = {name: ended for name, (_, ended) in beat.counts().items()}

    def tell() -> None:  # the first has ended, and the second has not
        while not any(a > b > before.get(name, 0) for name, (a, b) in beat.counts().items()):
            time.sleep(0.005)
        model.layers[0].tell()

    thread = threading.Thread(target=tell)
    if rank == 0:
        thread.start()
    model(torch.ones(3))
    if rank == 0:
        thread.join()


@pytest.mark.more
def test_ranks_tell_what_they_entered_and_in_which_layer(tmp_path):
    ranks(2).run(stand_in_a_collective, tmp_path)
    for number in range(2):
        (tmp_path / f"stand.{number}").rename(tmp_path / f"rank{number}.json")
    first, second = (read_stand(number, tmp_path) for number in range(2))
    assert (first.module, first.collective) == ("layers.1", ("o_proj", "tp"))
    assert (second.module, second.collective) == ("layers.1", None)
    [wait] = waits([first, second])
    assert (wait.waiting, wait.missing, wait.group.ranks) == ((0,), (1,), (0, 1))
    found = explain([first, second], 9.0, tmp_path).message
    assert found.startswith(
        f"rank 1 has not entered `o_proj` (all_reduce {wait.seq} of group `tp`) in `layers.1`, "
        "rank 0 waits for it, and nothing has moved for 9 s: rank 1 is at "
    )
    assert "in `tell`" in found
