"""Seconds of a collective: measured tables, stated figures, and tables of something else."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given, strategies as st

from tpx.errors import PlanError
from tpx.launch.links_file import find_links, library_versions, links_path
from tpx.plan.curve import Curve
from tpx.plan.device import DEVICES, device_of, find_device
from tpx.plan.links import UNEVEN, Key, Links, Table, read_table, stale, to_json
from tpx.plan.topology import Span, Topology, read_topology

H100 = DEVICES["h100"]
NODE, TWO = Topology(1, 8), Topology(2, 8)
INSIDE, ACROSS = Span(8, 1, 8), Span(16, 2, 8)
OPS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
SIZES = [2**power for power in range(10, 27, 2)]


def straight(alpha: float, beta: float) -> Curve:
    return Curve.of(SIZES, [alpha + beta * n for n in SIZES])


def test_a_straight_line_is_found_again():
    curve = straight(1e-5, 1e-11)
    assert curve.alpha == pytest.approx(1e-5)
    assert curve.beta == pytest.approx(1e-11)
    assert curve.seconds(2**30) == pytest.approx(1e-5 + 1e-11 * 2**30)
    assert curve.seconds(1) == pytest.approx(1e-5, rel=1e-3)


def test_measured_points_are_given_back_and_between_two_logarithms_are_straight():
    curve = Curve.of([1000, 100_000], [1e-5, 1e-3])
    assert (curve.seconds(1000), curve.seconds(100_000)) == (1e-5, 1e-3)
    assert curve.seconds(10_000) == pytest.approx(1e-4)
    assert curve.residual == 1.0  # two points tell nothing of the error between them


def test_noise_is_taken_off_and_shows_in_the_residual():
    curve = Curve.of([1, 2, 4, 8], [1.0, 3.0, 2.0, 4.0])
    assert curve.times == (1.0, 2.0, 2.0, 4.0)
    assert curve.residual > 0.2 > straight(1e-5, 1e-12).residual


@given(
    times=st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=9),
    sizes=st.tuples(st.floats(1, 1e9), st.floats(1, 1e9)),
)
def test_more_bytes_are_never_faster(times, sizes):
    curve = Curve.of(SIZES[: len(times)], times)
    low, high = sorted(sizes)
    assert curve.seconds(low) <= curve.seconds(high) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("nbytes", "seconds"), [([], []), ([1, 1], [1, 1]), ([1, 2], [1]), ([0], [1]), ([1], [0])]
)
def test_what_is_no_curve_is_refused(nbytes, seconds):
    with pytest.raises(ValueError):
        Curve.of(nbytes, seconds)


@pytest.mark.parametrize(("ranks", "microseconds"), [(2, 6.8), (4, 10), (8, 16)])
def test_the_stated_start_of_an_all_reduce_is_the_published_one(ranks, microseconds):
    time = Links(H100, NODE).time("all_reduce", Span(ranks, 1, ranks), 8192)
    assert time.seconds * 1e6 == pytest.approx(microseconds, rel=0.1)
    assert (time.measured, time.band) == (False, 1.0)


@pytest.mark.parametrize(
    ("op", "span", "seconds"),
    [
        ("all_reduce", INSIDE, 2 * 7 / 8 * 1e9 / 360e9),
        ("reduce_scatter", INSIDE, 7 / 8 * 1e9 / 360e9),
        ("all_gather", INSIDE, 7 * 1e9 / 360e9),
        ("all_to_all", INSIDE, 7 / 8 * 1e9 / 360e9),
        # Eight ports leave a node together, 320 GB/s; of all-to-all half of the bytes leave it.
        ("all_reduce", ACROSS, 2 * 15 / 16 * 1e9 / 320e9),
        ("all_gather", ACROSS, 15 * 1e9 / 320e9),
        ("all_to_all", ACROSS, 8 / 16 * 1e9 / 40e9),
        ("all_reduce", Span(2, 2, 1), 2 / 2 * 1e9 / 40e9),
    ],
)
def test_stated_bytes_take_what_the_formula_says(op, span, seconds):
    links = Links(H100, TWO)
    first_byte = links.time(op, span, 0).seconds
    assert links.time(op, span, 1e9).seconds - first_byte == pytest.approx(seconds)
    assert 5e-6 < first_byte < 1e-4


@given(
    op=st.sampled_from(OPS),
    nbytes=st.floats(0, 1e9),
    nodes=st.integers(1, 16),
    per_node=st.integers(1, 8),
    speeds=st.lists(st.integers(1, 1000), min_size=4, max_size=4),
)
def test_more_bandwidth_is_never_slower(op, nbytes, nodes, per_node, speeds):
    span = Span(nodes * per_node, nodes, per_node)
    (slow_in, fast_in), (slow_out, fast_out) = sorted(speeds[:2]), sorted(speeds[2:])
    slow = read_topology(f"{nodes}x8,intra={slow_in},inter={slow_out}")
    fast = read_topology(f"{nodes}x8,intra={fast_in},inter={fast_out}")
    if span.ranks > 1:
        before, after = (Links(H100, t).time(op, span, nbytes).seconds for t in (slow, fast))
        assert after <= before


def table(device: str = "h100", **versions: str) -> Table:
    curves = {(op, 8, 8): straight(1e-5, 1e-11) for op in OPS}
    curves[UNEVEN, 8, 8] = straight(2e-5, 2e-11)
    return Table(Key(device, "1x8", versions or library_versions("nccl")), curves)


def test_a_measured_table_is_used_where_it_tells_and_uneven_rows_for_all_to_all():
    links = Links(H100, TWO, table())
    time = links.time("all_reduce", INSIDE, 2**20)
    assert time.measured
    assert time.seconds == pytest.approx(1e-5 + 1e-11 * 2**20)
    assert time.band == pytest.approx(straight(1e-5, 1e-11).residual)
    assert links.time("all_to_all", INSIDE, 2**20).seconds == pytest.approx(2e-5 + 2e-11 * 2**20)
    assert not links.time("all_reduce", ACROSS, 2**20).measured
    told = Links(H100, read_topology("2x8,intra=100"), table())
    assert not told.time("all_reduce", INSIDE, 2**20).measured


def test_a_table_of_another_device_or_library_is_stale():
    here = Key("h100", "1x8", {"torch": "2.13.0", "nccl": "2.29"})
    assert stale(here, here) is None
    assert stale(here._replace(topology="1x4"), here) is None  # groups are known by their span
    assert stale(here._replace(device="h200"), here) == (
        "they were measured on `h200`, not on `h100`"
    )
    assert stale(here._replace(versions={"torch": "2.11.0", "nccl": "2.29"}), here) == (
        "they were measured with torch 2.11.0, and here is 2.13.0"
    )
    assert stale(here._replace(versions={"torch": "2.13.0"}), here) == (
        "they were measured with nccl none, and here is 2.29"
    )


def keep(path, one: Table):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(to_json(*one)))
    return path


def test_a_table_is_found_in_the_cache_and_a_stale_one_is_said(tmp_path):
    environ = {"XDG_CACHE_HOME": str(tmp_path)}
    missing = find_links(H100, TWO, environ=environ)
    assert missing.table is None
    assert missing.note == (
        "links: stated figures: not measured; `tpx bench links` on the ranks themselves measures "
        "them"
    )
    path = keep(links_path("h100", "1x8", environ), table())
    assert path == tmp_path / "tpx" / "links" / "h100-1x8.json"
    found = find_links(H100, TWO, environ=environ)  # one node tells about groups inside nodes
    assert found.table == table()
    assert found.note == f"links: measured, `{path}`"
    keep(path, table(torch="1.0"))
    refused = find_links(H100, TWO, environ=environ)
    assert refused.table is None
    assert refused.note.startswith(
        f"links: stated figures: `{path}` is not used, since they were measured with "
    )


def test_a_table_that_is_named_may_be_of_other_libraries_but_not_of_another_device(tmp_path):
    path = keep(tmp_path / "mine.json", table(torch="1.0"))
    found = find_links(H100, NODE, str(path), {})
    assert found.table is not None
    assert found.note.startswith(f"links: measured, `{path}`; they were measured with ")
    with pytest.raises(PlanError) as error:
        find_links(DEVICES["h200"], NODE, str(path), {})
    assert (error.value.message, error.value.hint) == (
        f"`--links {path}` is of `h100`, and the plan is for `h200`",
        "use `--device h100`, or another table",
    )


def test_without_a_cache_folder_it_is_in_the_home(tmp_path):
    environ = {"HOME": str(tmp_path)}
    path = links_path("NVIDIA Some GPU", "2x4", environ)
    assert path == tmp_path / ".cache/tpx/links/nvidia-some-gpu-2x4.json"


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"tpx_links": 2, "key": {}, "curves": []}',
             '{"tpx_links": 1, "key": {}, "curves": [{"op": "x"}]}']
)  # fmt: skip
def test_a_file_that_is_no_table(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(PlanError) as error:
        read_table(path)
    assert error.value.message == f"`{path}` holds no measured links"
    os.unlink(path)
    with pytest.raises(PlanError) as error:
        read_table(path)
    assert error.value.message == f"`{path}` cannot be read (No such file or directory)"
    assert error.value.hint == "`tpx bench links --out FILE` writes one"


def test_devices_are_known_by_their_products_and_every_figure_has_a_source():
    assert device_of("NVIDIA H200", 5).name == "h200"
    assert device_of("NVIDIA H100 80GB HBM3", 5).memory == (5, "B", "the driver")
    assert device_of("NVIDIA H100 PCIe", 5).read is None
    unknown = device_of("NVIDIA B200", 7)
    assert (unknown.name, unknown.read, unknown.matmul) == ("NVIDIA B200", None, None)
    for device in DEVICES.values():
        assert all(figure.source and figure.unit for figure in device.figures().values())
    with pytest.raises(PlanError) as error:
        find_device("h10")
    assert (error.value.message, error.value.hint) == (
        "`--device h10` is unknown", "did you mean `h100`?"
    )  # fmt: skip
