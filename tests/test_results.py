"""What a load reports of each rank, and of the job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ranks import ranks
from tiny import tiny_checkpoint

import tpx
from tpx.mesh import Mesh
from tpx.models.load import LoadReport
from tpx.plan.forms import stored_nbytes
from tpx.results import RankReport, Report


def rank_report(rank: int, **changes: Any) -> RankReport:
    given = {"bytes_read": 300, "bytes_kept": 200, "bytes_held": 400, "seconds": 2.0}
    given |= {"bytes_received": 0, "read_seconds": 1.5, "copy_seconds": 0.5, "prepare_seconds": 0.1}
    given |= {"device_peak": None, "host_peak": 1000}
    return RankReport(rank, Mesh(tp=2, edp=2).coords(rank), "cpu", **(given | changes))


def test_a_job_has_the_bytes_of_all_ranks_and_the_seconds_of_the_slowest():
    slower = rank_report(1, bytes_read=100, seconds=3.0, copy_seconds=0.7, host_peak=1500)
    report = Report(Mesh(tp=2, edp=2), "p", (), (rank_report(0), slower))
    assert (report.bytes_read, report.bytes_kept, report.bytes_held) == (400, 400, 800)
    assert [rank.read_amplification for rank in report.ranks] == [1.5, 0.5]
    assert report.read_amplification == 1.0
    assert (report.seconds, report.read_seconds) == (3.0, 1.5)
    assert (report.copy_seconds, report.prepare_seconds) == (0.7, 0.1)
    assert (report.device_peak, report.host_peak) == (None, 1500)


def test_the_peak_of_a_device_is_of_the_rank_that_came_highest():
    parts = tuple(rank_report(rank, device_peak=1 + rank / 100) for rank in range(2))
    assert Report(Mesh(tp=2, edp=2), "p", (), parts).device_peak == 1.01


def test_a_rank_that_keeps_nothing_reads_nothing_in_vain():
    assert rank_report(0, bytes_read=0, bytes_kept=0).read_amplification == 1.0


def test_all_that_a_load_counts_is_reported():
    assert set(RankReport._fields) == {"rank", "coords", "device", *LoadReport._fields}


def loaded(folder: Path) -> tuple[Report, int]:
    with tpx.LLM(folder, "tp2", device="cpu") as llm:
        rank_plan = llm.prepared.rank_plan(llm.groups["world"].rank)
        return llm.report, stored_nbytes(rank_plan)


def test_every_rank_has_the_report_of_all(tmp_path):
    (report, kept), (same, other) = ranks(2).run(loaded, tiny_checkpoint(tmp_path))
    assert report == same
    assert [rank.bytes_kept for rank in report.ranks] == [kept, other]
    assert report.bytes_read >= report.bytes_kept
    assert report.device_peak is None
    assert report.seconds >= report.read_seconds > 0
