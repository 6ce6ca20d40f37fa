"""A checkpoint on the Hub: headers for planning, then the blocks that ranks read, and no others."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from headers import make_config, write_folder
from hub_case import (
    COMMIT,
    LATER,
    SIZES,
    bytes_asked,
    check_bytes,
    fetch,
    more,
    nbytes,
    random_files,
    refusal,
    shards,
)
from hub_server import HUB_ID, HubServer, connect, files_of, hub_server
from huggingface_hub import close_session, constants

from tpx import hub
from tpx.index import CheckpointIndex
from tpx.plan.fetch import blocks_of, check_fetched, fetched
from tpx.plan.find import plans_for_world
from tpx.plan.prepare import prepare
from tpx.plan.spans import spans


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return random_files(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", autouse=True)
def session():
    yield
    close_session()


@pytest.fixture
def server(files, tmp_path, monkeypatch):
    with hub_server(dict(files)) as found:
        connect(found, tmp_path / "hub", monkeypatch.setattr)
        yield found


def test_planning_reads_headers_alone(server, files, tmp_path):
    prepared = prepare(HUB_ID, "ep4", 4)
    write_folder(tmp_path / "same", make_config(**SIZES), shards=2)
    assert prepared.index.header_digest == CheckpointIndex.open(tmp_path / "same").header_digest
    assert prepared.folder == tmp_path / "hub" / "tpx--models--owner--name" / COMMIT
    assert hub.is_partial(prepared.folder)
    assert (prepared.folder / "tokenizer.json").read_text() == "{}"
    for name, data in shards(files).items():
        stat = (prepared.folder / name).stat()
        assert stat.st_size == len(data)
        assert stat.st_blocks * 512 <= 1 << 16
    asked = [(r.start, r.stop) for r in server.take() if r.kind == "cdn"]
    assert asked == 2 * [(0, 1 << 16)]
    prepare(HUB_ID, "tp2", 2)
    assert server.take() == []


@pytest.mark.parametrize("ranks", [[0], *more([1, 2])])
def test_a_load_fetches_the_blocks_of_its_ranks_once(server, files, monkeypatch, ranks):
    prepared = prepare(HUB_ID, "ep4", 4)
    server.take()
    told: list[tuple[int, int]] = []
    with fetched(prepared, ranks, "partial", lambda *report: told.append(report)) as there:
        check_bytes(there, ranks, files)
    needed = blocks_of([prepared.rank_plan(rank) for rank in ranks])
    asked = {
        (r.name, number)
        for r in server.take()
        if r.kind == "cdn"
        for number in range(r.start // hub.BLOCK, -(-r.stop // hub.BLOCK))
    }
    assert asked == {(name, number) for name, blocks in needed.items() for number in blocks}
    assert told[-1][0] == told[-1][1] == nbytes(needed, files)
    assert nbytes(needed, files) < sum(map(len, shards(files).values()))
    server.shutdown()  # a second start asks nobody
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = prepare(HUB_ID, "ep4", 4)
    check_bytes(fetch(again, ranks), ranks, files)
    assert server.take() == []


def test_several_at_once_fetch_once(server, files):
    prepared = prepare(HUB_ID, "ep4", 4)
    server.take()
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: fetch(prepared, [2], "partial"), range(3)))
    check_bytes(found[0], [2], files)
    needed = blocks_of([prepared.rank_plan(2)])
    assert bytes_asked(server.take()) == nbytes(needed, files)


def test_a_commit_stays_until_its_branch_is_named(server, files):
    first = prepare(HUB_ID, "ep4", 4)
    changed = {name: data[:-1] + b"!" for name, data in shards(files).items()}
    server.commits[LATER], server.refs["main"] = files | changed, LATER
    check_bytes(fetch(first, [0], "partial"), [0], files)
    assert prepare(HUB_ID, "ep4", 4).folder == first.folder
    assert prepare(HUB_ID, "ep4", 4, COMMIT).folder == first.folder
    newer = prepare(HUB_ID, "ep4", 4, "main")
    assert newer.folder == first.folder.with_name(LATER)
    assert prepare(HUB_ID, "ep4", 4).folder == newer.folder
    check_bytes(fetch(newer, [3], "partial"), [3], files | changed)


@pytest.mark.more
def test_a_branch_that_is_named_while_the_hub_is_away(server, monkeypatch):
    folder = prepare(HUB_ID, "ep4", 4, "main").folder
    server.api_status = 503, ""
    assert prepare(HUB_ID, "ep4", 4, "main").folder == folder
    server.api_status = 404, "RevisionNotFound"
    message, _ = refusal(lambda: prepare(HUB_ID, "ep4", 4, "main"))
    assert message == "`owner/name` has no revision `main` on the Hub"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.take()
    assert prepare(HUB_ID, "ep4", 4, "main").folder == folder
    assert server.take() == []


def test_a_file_that_changes_between_plan_and_load(server, files):
    prepared = prepare(HUB_ID, "ep4", 4)
    server.salt = "changed"
    name = next(iter(blocks_of([prepared.rank_plan(0)])))
    message, hint = refusal(lambda: fetch(prepared, [0], "partial"))
    assert message.startswith(f"`{name[:5]}")
    assert " of `owner/name` changed on the Hub while it was fetched: " in message
    assert hint == "start again"


@pytest.mark.parametrize(
    ("ranks", "download", "partial"),
    [
        ([0], "auto", True),  # 4 of 16 experts, and what is replicated
        (range(4), "auto", False),
        *more((range(4), "partial", True), ([0], "full", False)),
    ],
)
def test_blocks_or_whole_files(server, files, tmp_path, ranks, download, partial):
    prepared = prepare(HUB_ID, "ep4", 4)
    found = fetch(prepared, ranks, download)
    whole = tmp_path / "hub" / "models--owner--name" / "snapshots" / COMMIT
    assert found.folder == (prepared.folder if partial else whole)
    assert hub.is_partial(found.folder) == partial
    if partial:
        return
    assert files_of(whole) == files
    server.take()
    again = prepare(HUB_ID, "ep4", 4)
    assert fetch(again, [0], download).folder == again.folder == whole
    assert server.take() == []


@pytest.mark.more
def test_whole_files_that_are_there_are_used(server, tmp_path):
    whole = hub.find_model(HUB_ID, download="full")
    assert whole == tmp_path / "hub" / "models--owner--name" / "snapshots" / COMMIT
    server.take()
    assert prepare(HUB_ID, "ep4", 4).folder == whole
    assert [request.kind for request in server.take()] == ["api"]  # which commit it is now
    assert not (tmp_path / "hub" / "tpx--models--owner--name").exists()


def test_a_rank_never_reads_a_hole(server):
    prepared = fetch(prepare(HUB_ID, "ep4", 4), [0], "partial")
    check_fetched(prepared.folder, prepared.rank_plan(0))
    message, hint = refusal(lambda: check_fetched(prepared.folder, prepared.rank_plan(3)))
    shard, block = next(
        (name, min(blocks))
        for name, blocks in hub.missing(prepared.folder, blocks_of([prepared.rank_plan(3)])).items()
    )
    assert message == (
        f"`{shard}` of `{prepared.folder}` holds no byte from {block * hub.BLOCK} on that rank 3 "
        "reads"
    )
    assert hint == "name the model by its Hub id, which fetches them"


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "there is no `owner/name` on the Hub that you may read"),
        (404, "RevisionNotFound", "`owner/name` has no revision `x` on the Hub"),
        (403, "GatedRepo", "`owner/name` needs permission on the Hub"),
        (
            503,
            "",
            "`owner/name` at revision `x` is not in the Hub's cache and cannot be fetched "
            "(HfHubHTTPError)",
        ),
    ],
)
def test_a_repository_that_cannot_be_read(server, status, code, message):
    server.api_status = status, code
    assert refusal(lambda: prepare(HUB_ID, "ep4", 4, "x"))[0] == message


@pytest.mark.more
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_every_shipped_plan_byte_for_byte(server: HubServer, files, world):
    """Each machine of one rank: every byte that the reader takes is the Hub's."""
    for plan in plans_for_world("gpt_oss", world):
        prepared = prepare(HUB_ID, plan, world)
        for rank in range(world):
            with fetched(prepared, [rank], "partial") as there:
                for span in spans(there.rank_plan(rank)):
                    with (there.folder / span.file).open("rb") as file:
                        file.seek(span.offset)
                        expected = files[span.file][span.offset : span.end]
                        assert file.read(span.nbytes) == expected
