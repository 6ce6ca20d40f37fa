"""Source: a range of a file on the Hub is exactly what was asked, or an error that says why."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from hub_server import HUB_ID, HubServer, Request, connect, hub_server
from huggingface_hub import close_session

from tpx.errors import CheckpointError
from tpx.hub.client import Patience, wanted_wait
from tpx.hub.source import WHOLE, Found, Source

NAME = "model.safetensors"
DATA = bytes(range(256)) * 4000  # more than arrives in one piece
COMMIT = "a" * 40
QUICK = Patience(attempts=3, first=0.001)


@pytest.fixture(scope="module", autouse=True)
def session():
    yield
    close_session()


@pytest.fixture
def server(tmp_path, monkeypatch):
    with hub_server({NAME: DATA}) as found:
        connect(found, tmp_path, monkeypatch.setattr)
        yield found


def read(source: Source, start: int = 1000, stop: int = 900_000) -> bytes:
    return b"".join(source.read(start, stop, threading.Event()))


def make(found: Found | None = None) -> Source:
    return Source(HUB_ID, COMMIT, NAME, found, QUICK)


def refusal(call: Callable[[], object]) -> tuple[str, str | None]:
    with pytest.raises(CheckpointError) as error:
        call()
    return error.value.message, error.value.hint


def once(server: HubServer, fault: str) -> None:
    """The first request for bytes goes wrong."""
    waiting = [fault]
    server.fault = lambda request: waiting.pop() if waiting else None


def ranges(requests: list[Request]) -> list[tuple[int, int]]:
    return [(request.start, request.stop) for request in requests if request.kind == "cdn"]


def test_a_range(server):
    source = make()
    assert source.ask() == Found(len(DATA), server.etag(DATA))
    assert read(source) == DATA[1000:900_000]
    assert read(source, 7, 7) == b""
    assert [request.kind for request in server.take()] == ["head", "cdn"]


@pytest.mark.parametrize(
    ("fault", "resumed"),
    [
        ("429", 1000), ("500", 1000), ("503", 1000), ("403", 1000), ("401", 1000),
        ("cut", 450_500), ("short", 450_500),
    ],
)  # fmt: skip
def test_what_fails_in_transit_goes_on_where_it_stopped(server, fault, resumed):
    once(server, fault)
    assert read(make()) == DATA[1000:900_000]
    requests = server.take()
    [first, second] = ranges(requests)
    assert first == (1000, 900_000)
    assert second[1] == 900_000
    # A cut connection may lose what was on its way.
    assert 1000 <= second[0] <= resumed
    assert (second[0] == resumed) or fault == "cut"
    assert [request.kind for request in requests].count("head") == 1 + (fault in ("401", "403"))


def test_an_address_that_is_not_told_at_once(server):
    server.resolve_fails = [503, 429]
    assert read(make()) == DATA[1000:900_000]
    server.resolve_fails = 3 * [503]
    assert refusal(lambda: make().ask())[0] == (
        f"`{NAME}` of `{HUB_ID}` cannot be fetched from byte 0 on: it was answered with 503, "
        "3 times"
    )
    server.resolve_fails = [400]
    assert refusal(lambda: make().ask())[0] == (
        f"`{HUB_ID}` at revision `{COMMIT}` is not in the Hub's cache and cannot be fetched "
        "(HTTPStatusError)"
    )


def test_an_address_that_expires_between_two_ranges_is_asked_for_again(server):
    source = make()
    assert read(source, 0, 10) == DATA[:10]
    server.expired = server.signatures + 1
    assert read(source, 10, 20) == DATA[10:20]
    kinds = [request.kind for request in server.take()]
    assert kinds == ["head", "cdn", "cdn", "head", "cdn"]


@pytest.mark.parametrize(
    ("fault", "answer"),
    [
        ("whole", "the whole file (200, not 206)"),
        ("404", "404, not 206"),
        ("shifted", "`bytes 1001-900000/1024000` where `bytes 1000-899999/1024000` was asked"),
        ("size", "`bytes 1000-899999/1024001` where `bytes 1000-899999/1024000` was asked"),
        ("silent", "no `Content-Range`"),
        ("gzip", "the encoding `gzip`, which was not asked for"),
        ("long", "more than the 899000 bytes that were asked"),
    ],
)
def test_an_answer_that_was_not_asked_for(server, fault, answer):
    server.fault = lambda request: fault
    message = f"the Hub answers a range of `{NAME}` with {answer}"
    assert refusal(lambda: read(make())) == (message, WHOLE)


def test_an_etag_that_changes_between_two_ranges(server):
    source = make()
    read(source, 0, 10)
    once(server, "etag")
    assert refusal(lambda: read(source, 10, 20)) == (
        f"`{NAME}` of `{HUB_ID}` changed on the Hub while it was fetched: ETag "
        f'`"{server.etag(DATA)}"`, then `"another"`',
        "start again",
    )


def test_an_etag_that_changes_between_two_addresses(server):
    source = make()
    found = source.ask()
    server.salt = "changed"
    once(server, "403")
    assert refusal(lambda: read(source)) == (
        f"`{NAME}` of `{HUB_ID}` changed on the Hub while it was fetched: 1024000 bytes, ETag "
        f"`{found.etag}`, then 1024000 bytes, ETag `{server.etag(DATA)}`",
        "start again",
    )
    assert refusal(lambda: read(make(found)))[0].startswith(f"`{NAME}` of `{HUB_ID}` changed")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("503", "it was answered with 503"), ("403", "it was answered with 403")],
)
def test_patience_ends(server, fault, reason):
    server.fault = lambda request: fault
    assert refusal(lambda: read(make())) == (
        f"`{NAME}` of `{HUB_ID}` cannot be fetched from byte 1000 on: {reason}, 3 times",
        "check the network and start again: what has come is kept",
    )
    assert ranges(server.take()) == 3 * [(1000, 900_000)]


def test_nobody_answers(server):
    source = make(Found(len(DATA), server.etag(DATA)))
    server.shutdown()
    server.server_close()
    assert refusal(lambda: read(source))[0] == (
        f"`{NAME}` of `{HUB_ID}` cannot be fetched from byte 1000 on: the connection failed "
        "(ConnectError), 3 times"
    )


def test_the_token_goes_to_the_hub_alone(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    read(make())
    assert [(r.kind, r.token) for r in server.take()] == [("head", True), ("cdn", False)]


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, None),
        ({"RateLimit": '"resolvers";r=0;t=55'}, 55.0),
        ({"RateLimit": "limit"}, None),
        ({}, None),
    ],
)
def test_what_a_server_asks_to_wait(headers, seconds):
    assert wanted_wait(headers) == seconds


def test_waits_grow_to_a_bound():
    patience = Patience(first=0.5, most=300.0)
    assert [patience.seconds(n, None) for n in (1, 2, 3)] == [0.5, 1.0, 2.0]
    assert (patience.seconds(20, None), patience.seconds(1, 7.0)) == (300.0, 7.0)
    assert patience.seconds(1, 1e9) == 300.0


def test_reading_ends_where_another_has_failed(server):
    ending = threading.Event()
    server.fault = lambda request: ending.set() or "503"
    server.retry_after = {}
    assert b"".join(make().read(0, 10, ending)) == b""
    assert len(ranges(server.take())) == 1
