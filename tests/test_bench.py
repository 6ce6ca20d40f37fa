"""`tpx bench links`: which groups are measured, how bytes are dealt, and the table that is kept."""

from __future__ import annotations

import os

import pytest
from launching import environment, tpx
from ranks import ranks

from tpx.cli.bench_links import draw, read_sizes
from tpx.cli.main import main
from tpx.launch.links_file import library_versions, links_path
from tpx.mesh import Mesh
from tpx.plan.curve import Curve
from tpx.plan.links import UNEVEN, Key, Table, read_table

OPS = ["all_reduce", "all_gather", "reduce_scatter", "all_to_all", UNEVEN]


def ways_of_two_nodes(sizes: list[int]) -> list[tuple[tuple[str, int, int], tuple[int, ...]]]:
    """On four ranks that take themselves for two nodes of two."""
    from tpx.bench.links import measure
    from tpx.worker import Worker

    os.environ["LOCAL_WORLD_SIZE"] = "2"
    found = measure(Worker("cpu"), sizes)
    assert all(min(curve.times) > 0 for curve in found.values())
    return [(way, curve.nbytes) for way, curve in found.items()]


@pytest.mark.more
def test_each_kind_of_group_is_measured_once():
    """Two neighbours, all four, and two ranks of different nodes; not four in another order."""
    told = ranks(4).run(ways_of_two_nodes, [1024])
    assert told[0] == told[1] == told[2] == told[3]
    ways = [way for way, _ in told[0]]
    assert ways == [(op, n, k) for n, k in ((2, 2), (4, 2), (2, 1)) for op in OPS]
    assert {nbytes for _, nbytes in told[0]} == {(1024,)}


def put_in(nbytes: int) -> list[tuple[int, list[int]]]:
    """What each op puts in, and what it records."""
    import torch

    from tpx.bench.links import calls
    from tpx.comm import Groups

    found = []
    groups = Groups(Mesh(tp=2, edp=2), torch.distributed.get_rank(), torch.device("cpu"))
    for op in OPS:
        call, count = calls(groups["tp"], op, nbytes)
        with groups.recording() as records:
            call()
        found.append((count, [record.nbytes for record in records]))
        assert records[0].op == op.removesuffix("_uneven")
    groups.close()
    return found


@pytest.mark.parametrize("nbytes", [1, 1024, 10_000])
def test_a_rank_puts_in_what_is_written_down(nbytes):
    """At least an element for each rank; uneven rows are as many in all."""
    for told in ranks(2).run(put_in, nbytes):
        assert told == [(max(4, nbytes), [max(4, nbytes)])] * len(OPS)


@pytest.mark.more
def test_on_two_ranks_a_table_is_measured_drawn_and_found_by_the_planner(tmp_path):
    env = environment(XDG_CACHE_HOME=str(tmp_path / "cache"))
    words = ("--nproc", 2, "--device", "cpu", "--sizes", "1KiB,16KiB")
    done = tpx("bench", "links", *words, cwd=tmp_path, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    path = links_path("cpu", "1x2", {"XDG_CACHE_HOME": str(tmp_path / "cache")})
    table = read_table(path)
    assert table.key == Key("cpu", "1x2", library_versions("gloo"))
    assert [*table.curves] == [(op, 2, 2) for op in OPS]
    lines = done.stdout.splitlines()
    assert lines[0].startswith("cpu, 1x2 (nodes x GPUs), torch ")
    assert lines[2] == "groups of 2 ranks of one node"
    assert lines[-1] == f"wrote {path}"
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]  # and no folder of a run


DRAWN = """\
h100, 1x8 (nodes x GPUs), torch 2.13.0, nccl 2.29; microseconds

groups of 8 ranks of one node
    put in    all-reduce    all-gather  red.-scatter    all-to-all    uneven a2a
   1.02 kB          10.0          10.0          10.0          10.0          10.0
   1.05 MB          20.5          20.5          20.5          20.5          20.5
      GB/s           100           100           100           100           100
      band          100%          100%          100%          100%          100%

groups of 2 ranks at least 1 on a node
    put in    all-reduce    all-gather  red.-scatter    all-to-all    uneven a2a
"""


def test_the_table_fits_80_columns():
    sizes = (2**10, 2**20)
    curve = Curve.of(sizes, [1e-5 + n / 1e11 for n in sizes])
    curves = {(op, n, k): curve for n, k in ((8, 8), (2, 1)) for op in OPS}
    lines: list[str] = []
    draw(Table(Key("h100", "1x8", {"torch": "2.13.0", "nccl": "2.29"}), curves), lines.append)
    text = "\n".join(lines)
    assert text.startswith(DRAWN)
    assert max(map(len, text.splitlines())) <= 80


def test_sizes_are_read_in_order():
    assert read_sizes("64KiB,1KB,2MiB") == [1000, 65536, 2**21]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--nproc", "1", "--device", "cpu"),
         "links are measured between ranks, and there is one\n\nhint: use `--nproc 2`"),
        (("--sizes", "1KiB,1KiB"), "`--sizes 1KiB,1KiB` cannot be read\n\n"
         "hint: write different sizes such as `1KiB,64KiB,4MiB`"),
        (("--sizes", "big"), "`--sizes big` cannot be read\n\n"
         "hint: write different sizes such as `1KiB,64KiB,4MiB`"),
        (("--device", "tpu"), "`--device tpu` is unknown\n\nhint: use `cpu` or `cuda`"),
        (("--nproc", "0"), "`--nproc 0` is no number of ranks\n\n"
         "hint: give a whole number from 1 up, or `auto`: one rank a GPU, two on CPU"),
    ],
)  # fmt: skip
def test_wrong_values(capsys, words, text):
    assert main(["bench", "links", *words]) == 2
    assert capsys.readouterr().err.partition(": ")[2] == f"{text}\n"
