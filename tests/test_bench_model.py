"""`tpx bench latency|throughput|load`: what is asked, and what is told."""

from __future__ import annotations

import json
import random
import re

import bench_found
import pytest
from launching import ROOT
from test_plan_html import ASKS, Page, contrast

from tpx.bench.asked import Asked, Lengths, Way, ways_of
from tpx.cli.bench import each_load
from tpx.cli.bench_page import TEMPLATE, page
from tpx.cli.bench_plots import y_ticks
from tpx.cli.bench_table import draw, merged

DEMO = str(ROOT / "examples" / "models" / "tpx-demo")
OFF = {"use_kernels": "on", "graphs": "on", "prefix_cache": "off"}


def asked(**changes) -> Asked:
    return Asked("latency", "found.json", None, ways_of(OFF), 3)._replace(**changes)


def test_ranks_read_what_was_asked():
    whole = asked(ways=ways_of({**OFF, "graphs": "both"}), input=Lengths(3, 9), batches=(1, 8))
    assert Asked.from_json(whole.to_json()) == whole


def test_what_is_compared_is_in_the_name():
    assert ways_of(OFF) == [Way("tpx", True, True, False)]
    assert ways_of({"use_kernels": "both", "graphs": "off", "prefix_cache": "both"}) == [
        Way("tpx, kernels on, prefix cache on", True, False, True),
        Way("tpx, kernels on, prefix cache off", True, False, False),
        Way("tpx, kernels off, prefix cache on", False, False, True),
        Way("tpx, kernels off, prefix cache off", False, False, False),
    ]


def test_prompts_are_new_in_each_round_and_alike_on_all_ranks():
    one = asked(input=Lengths(5, 9), output=Lengths(2, 4), shared=3, seed=7)
    first, again, next_one = (one.questions(50, 100, number) for number in (0, 0, 1))
    assert first == again
    assert first != next_one
    assert {len(q.prompt) for q in first} == {5, 6, 7, 8, 9}
    assert {q.tokens for q in first} == {2, 3, 4}
    assert len({tuple(q.prompt[:3]) for q in first + next_one}) == 1
    assert len({tuple(q.prompt[3:]) for q in first + next_one}) == 100
    assert all(0 <= token < 100 for q in first for token in q.prompt)


def test_arrivals_have_the_rate_that_was_asked():
    times = asked(requests=4000, rate=8.0).arrivals()
    assert times == sorted(times)
    assert times[0] == 0
    assert times[-1] == pytest.approx(500, rel=0.1)
    assert asked(requests=3).arrivals() == [0, 0, 0]


def test_the_ways_of_a_load_take_turns_in_a_process_each():
    two = asked(ways=ways_of({**OFF, "use_kernels": "both"}), rounds=2)
    names = [[way.name for way in one.ways] for one in each_load(two)]
    assert names == [["tpx, kernels on"], ["tpx, kernels off"]] * 2


LATENCY = """\
EPYC (AVX2), 2 ranks, 4 threads
tpx-demo, bfloat16, plan tp2: dp 1 x tp 2
tpx 0.1.0, torch 2.13.0, Python 3.11.7; load average 0.5 before, 1.2 after
a plain read: 15.6 GB/s

128 tokens after 128, greedy; median of 3 rounds

batch  way                              first  a token   floor  share    tok/s
    1  tpx, kernels on                   20.0    4.000   0.500  12.5%    242.4
    1  tpx, kernels off                 2,000    400.0   0.500   0.1%      2.4
    1  transformers                      80.0     16.0   0.500   3.1%     60.6
   16  tpx, kernels on                   20.0    4.000   0.500  12.5%   3878.4
   16  tpx, kernels off                 2,000    400.0   0.500   0.1%     38.8
   16  transformers                      80.0     16.0   0.500   3.1%    969.6

first: ms until all have a token; a token: ms of a step after that; floor: ms to
read what a step of tpx reads; tok/s: of all sequences, prompts included

transformers 5.23.0, 4 threads
  1 at once: grouped_mm experts, dynamic cache
  16 at once: eager experts, static cache
  sonicmoe experts, dynamic cache did not run: sonic-moe requires the `kernel...
batch 1: tpx is 4.00 times as fast as transformers
batch 16: tpx is 4.00 times as fast as transformers
batch 1: the same tokens in all 1 sequence
batch 16: the same tokens in 13 of 16 sequences; others differ from token 42 on"""

THROUGHPUT = """\
64 requests all at once, 64 to 256 tokens in, 128 out, at most 16 at a time;
median of 3 rounds

way                             seconds    output    in all    floor  share
tpx                                8.00    1024.0    3072.0    0.400   5.0%
transformers                      64.00     128.0     384.0    0.400   0.6%

output, in all: tokens a second, without and with prompts; floor: seconds to
read what full decode steps read, and until the last request has come

ms                                  to the first token                 a token
                                   p50     p90     p99     p50     p90     p99
tpx                               12.3   500.0   2,250    12.3   500.0   2,250

transformers 5.23.0, 4 threads
  16 at once: eager experts, static cache
tpx is 8.00 times as fast as transformers
batch 16: the same tokens in all 64 sequences"""

LOAD = """\
median of 3 processes

                                           tpx
process                                 0.10 s
imports                                 1.50 s
plan, groups, kernels                   0.25 s
load                                    1.00 s
first token                             0.02 s
in all                                  2.87 s
read                                  15.50 MB
read in a second                      15.50 MB
floor of load, share             0.010 s, 1.0%
held, all ranks                       15.50 MB
host memory, peak                    400.00 MB"""


def loaded() -> dict:
    found = [bench_found.one_load("tpx", seconds) for seconds in (1.0, 9.0, 0.5)]
    return merged(found, asked(bench="load"))


def test_one_start_is_one_process():
    found = loaded()
    found["asked"]["rounds"] = 1
    assert "median of 1 process" in draw(found)


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (bench_found.latency(), LATENCY),
        (bench_found.throughput(), THROUGHPUT),
        (loaded(), LOAD),
    ],
    ids=["latency", "throughput", "load"],
)
def test_the_tables_fit_80_columns(found, text):
    lines = draw(found)
    assert "\n".join(lines).endswith(text)
    assert max(map(len, lines)) <= 80


FOUND = [bench_found.latency(), bench_found.throughput(), loaded()]


@pytest.mark.parametrize("found", FOUND, ids=lambda found: found["bench"])
def test_the_page_carries_the_numbers_and_asks_for_nothing(found):
    text = page(found)
    told = Page(text)
    assert json.loads(told.json) == json.loads(json.dumps(found))
    assert all(line in told.text for line in draw(found))
    for _, attributes in told.tags:
        assert not [name for name in ASKS & attributes.keys() if attributes[name][:5] != "data:"]
    assert "url(" not in text
    assert all(a.get("aria-hidden") or a["role"] == "img" for t, a in told.tags if t == "svg")


def test_every_measured_point_is_drawn_with_its_value():
    titles = re.findall(r"<title>([^<]*)</title>", page(bench_found.latency()))
    assert "tpx, kernels on: 3,878 tokens a second at 16" in titles
    assert "transformers: 60.6 tokens a second at 1" in titles
    assert "tpx, kernels off: 400 ms at 16" in titles
    titles = re.findall(r"<title>([^<]*)</title>", page(loaded()))
    assert "plan, groups, kernels: 0.25" in titles


def test_a_models_name_stays_text():
    found = bench_found.latency()
    found["model"] = {**found["model"], "name": "<script>alert(1)</script>&$title"}
    assert "<script>alert" not in page(found)
    assert "<script>alert(1)</script>&$title" in Page(page(found)).text


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_what_is_drawn_stands_out_in_both_modes(mode):
    """WCAG 2.2: 4.5 to 1 for text, and for marks as well, whose numbers stand on them."""
    blocks = re.findall(r":root \{(.*?)\}", TEMPLATE.read_text(), re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[mode == "dark"]))
    for name in ("ink", "soft", *(f"s{number}" for number in range(5))):
        assert contrast(colours["paper"], colours[name]) >= 4.5, f"{mode} {name}"


def test_an_axis_holds_all_that_is_drawn():
    source = random.Random(1)
    for _ in range(200):
        values = [10 ** source.uniform(-6, 6) for _ in range(source.randint(1, 5))]
        ticks = y_ticks(values)
        assert ticks[0] <= min(values) * (1 + 1e-9)
        assert max(values) <= ticks[-1] * (1 + 1e-9)


def test_answers_are_compared_token_by_token():
    from tpx.bench.contest import agreement

    told = agreement([[1, 2, 3], [4, 5, 6], [7, 8, 9]], [[1, 2, 3], [4, 5, 0], [7, 0, 9]])
    assert told == {"sequences": 3, "same": 1, "first_difference": 1}
    assert agreement([[1]], [[1]]) == {"sequences": 1, "same": 1, "first_difference": None}


def test_percentiles_lie_between_the_nearest_values():
    from tpx.bench.throughput import percentiles

    assert percentiles([]) is None
    assert percentiles([2.0]) == {"p50": 2.0, "p90": 2.0, "p99": 2.0}
    assert percentiles([float(n) for n in range(101)]) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}


def test_a_peer_gets_its_requests_in_batches_and_their_order():
    from tpx.bench.throughput import in_batches

    questions = asked().questions(5, 100, 0)
    sizes = []

    def peer(some):
        sizes.append(len(some))
        return [q.prompt for q in some], 0.5

    answers, seconds = in_batches(peer, questions, 2)
    assert (sizes, answers, seconds) == ([2, 2, 1], [q.prompt for q in questions], 1.5)


def test_without_kernels_a_cpu_runs_the_references():
    import torch

    from tpx.ops.cpu import native, references

    x = torch.zeros(1)
    before = native(x)
    with references(), references():
        assert native(x) is None
    assert native(x) is before


def test_the_largest_cache_is_found_where_the_kernel_says_it(tmp_path):
    from tpx.bench.floor import largest_cache

    assert largest_cache(tmp_path) == 0
    for index, text in enumerate(("32K", "1M", "32M", "?")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{text}\n")
    assert largest_cache(tmp_path) == 32 << 20
