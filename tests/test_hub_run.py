"""Running from the Hub: LLM and `tpx launch` fetch what their ranks read, and say where it is."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from hub_case import more
from hub_server import HUB_ID, connect, files_of, hub_server
from huggingface_hub import close_session, constants
from launching import environment, tpx as run_tpx
from ranks import ranks
from rich.console import Console
from tiny import open_llm, tiny_checkpoint

import tpx
from tpx import hub
from tpx.cli.flags import parse
from tpx.errors import PlanError, RequestError
from tpx.launch.fetch_bar import fetch_bar
from tpx.launch.preflight import preflight
from tpx.plan.fetch import blocks_of
from tpx.plan.prepare import prepare
from tpx.worker import Place, ranks_here

COMMIT = "a" * 40
PROMPTS, GREEDY = [[7, 8, 9], "the end"], tpx.SamplingParams(max_tokens=8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def server(tiny, tmp_path, monkeypatch):
    with hub_server(files_of(tiny)) as found:
        connect(found, tmp_path / "hub", monkeypatch.setattr)
        monkeypatch.chdir(tmp_path)
        yield found
        close_session()


def texts(llm: tpx.LLM) -> list[str]:
    with llm:
        return [completion.text for completion in llm.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("download", ["partial", *more("full", None)])
def test_an_llm_from_the_hub(server, tiny, tmp_path, download):
    llm = tpx.LLM(HUB_ID, "tp1", dtype="float32", device="cpu", download=download)
    assert hub.is_partial(llm.prepared.folder) == (download == "partial")
    assert texts(llm) == texts(open_llm(tiny, "tp1"))


def in_a_rank(endpoint: str, cache: str) -> list[str]:
    """What tests do with monkeypatch, in a process that other tests will use."""

    class Server:
        pass

    server, before = Server(), {}
    server.endpoint = endpoint

    def patch(owner: object, name: str, value: object) -> None:
        before[name] = getattr(owner, name)
        setattr(owner, name, value)

    connect(server, Path(cache), patch)
    try:
        return texts(tpx.LLM(HUB_ID, "tp2", dtype="float32", device="cpu", download="partial"))
    finally:
        for name, value in before.items():
            setattr(constants, name, value)
        close_session()


def test_ranks_of_one_machine_fetch_once(server, tiny, tmp_path):
    found = ranks(2).run(in_a_rank, server.endpoint, str(tmp_path / "hub"))
    assert found == 2 * [texts(open_llm(tiny, "tp1"))]
    requests = [request for request in server.take() if request.kind == "cdn"]
    prepared = prepare(HUB_ID, "tp2", 2)
    needed = blocks_of([prepared.rank_plan(rank) for rank in range(2)])
    headers = [request for request in requests if request.stop == 1 << 16]
    assert len(headers) == len(needed)
    assert len(requests) - len(headers) == len(needed)  # a request each: they are small


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (Place(0, 1, 0, 1), range(1)),
        (Place(6, 8, 2, 4), range(4, 8)),
        (Place(3, 8, 2, 4), range(3, 4)),  # ranks that are not consecutive
        (Place(0, 8, 2, 4), range(1)),
        (Place(7, 8, 1, 4), range(7, 8)),
    ],
)
def test_the_ranks_of_this_machine(place, expected):
    assert ranks_here(place) == expected


def test_a_download_that_nobody_knows():
    with pytest.raises(RequestError) as error:
        tpx.LLM("folder", download="partly")
    assert error.value.message == "`download` is `partly`"
    assert error.value.hint == "did you mean `partial`?"


def job(*words: str):
    options = parse([*words])
    assert options is not None
    return preflight(options, {})


@pytest.mark.parametrize(("download", "partial"), [("partial", True), *more(("auto", False))])
def test_launch_fetches_before_a_rank_starts(server, tmp_path, capsys, download, partial):
    words = ("--device=cpu", "--nproc=2", "--tp-plan=tp2", f"--download={download}")
    found = Path(job("--model", HUB_ID, *words).environment["TPX_MODEL"])
    assert hub.is_partial(found) == partial
    said = capsys.readouterr().err.splitlines()  # the Hub's client has a bar of its own
    assert sum(line.startswith("fetch: ") for line in said) == partial
    prepared = prepare(HUB_ID, "tp2", 2)
    if partial:
        needed = blocks_of([prepared.rank_plan(rank) for rank in range(2)])
        assert hub.missing(found, needed) == {}
    server.take()
    again = job("--model", HUB_ID, *words).environment["TPX_MODEL"]
    assert (Path(again), server.take()) == (found, [])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "ranks"),
    [
        (("--node-rank", "1"), range(2, 4)),
        *more((("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:29999"), range(0))),
    ],
)
def test_a_machine_fetches_for_its_own_ranks(server, words, ranks):
    meeting = words if words[0] != "--node-rank" else (*words, "--master-addr", "127.0.0.1")
    plan = ("--tp-plan=dp2-tp2-ep4", "--nproc=2", "--nnodes=2", "--device=cpu")
    found = job("--model", HUB_ID, "--download=partial", *plan, *meeting)
    folder = Path(found.environment["TPX_MODEL"])
    prepared = prepare(HUB_ID, "dp2-tp2-ep4", 4)
    everything = blocks_of([prepared.rank_plan(rank) for rank in range(4)])
    assert hub.missing(folder, blocks_of([prepared.rank_plan(rank) for rank in ranks])) == {}
    assert bool(hub.missing(folder, everything)) == (not ranks)


@pytest.mark.parametrize("flag", ["--revision", "--download"])
def test_flags_of_a_hub_id_need_a_model_and_a_plan(tmp_path, monkeypatch, flag):
    monkeypatch.chdir(tmp_path)
    Path("script.py").write_text("")
    with pytest.raises(PlanError) as error:
        job("--device=cpu", flag, "full", "script.py")
    assert error.value.message == (
        f"`{flag} full` is for a model and a plan, and they are not both named"
    )
    assert error.value.hint == (
        f"add `--model` and `--tp-plan`, or write `{flag[2:]}=` in the script's `tpx.LLM`"
    )


def test_a_bar_on_a_terminal_alone():
    screen, pipe = io.StringIO(), io.StringIO()
    with fetch_bar(console=Console(file=screen, force_terminal=True, width=80)) as bar:
        bar.report(1_000_000, 2_000_000)
        bar.report(2_000_000, 2_000_000)
    assert "2.0/2.0 MB" in screen.getvalue()
    for line in (True, False):
        with fetch_bar(line, Console(file=pipe, width=80)) as bar:
            bar.report(1_000_000, 2_000_000)
            bar.report(2_000_000, 2_000_000)
    assert re.fullmatch(r"fetch: 2\.0 MB in 0\.\d s\n", pipe.getvalue())


@pytest.mark.more
def test_verify_fetches_what_it_runs(server, tmp_path):
    environ = environment(HF_ENDPOINT=server.endpoint, HF_HUB_CACHE=str(tmp_path / "hub"))
    words = ("verify", "--model", HUB_ID, "--tp-plan", "tp2", "--device", "cpu")
    done = run_tpx(*words, cwd=tmp_path, env=environ)
    assert done.returncode == 0, done.stderr
    assert "equal: no module leaves the tolerance" in done.stdout


@pytest.mark.more
def test_launch_generates_from_the_hub(server, tiny, tmp_path):
    environ = environment(HF_ENDPOINT=server.endpoint, HF_HUB_CACHE=str(tmp_path / "hub"))
    words = ("--tp-plan", "tp2", "--device", "cpu", "--nproc", "2", "--prompt", "the end")
    words += ("--max-new-tokens", "8")
    partial = ("--model", HUB_ID, "--download", "partial")
    done = run_tpx("launch", *partial, *words, cwd=tmp_path, env=environ)
    assert done.returncode == 0, done.stderr
    local = run_tpx("launch", "--model", tiny, *words, cwd=tmp_path)
    assert done.stdout == local.stdout
    assert "fetch: " in done.stderr
