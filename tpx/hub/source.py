"""One file on the Hub, read by ranges. An answer is exactly what was asked, or it is refused.

What fails in transit is asked for again from the byte where it stopped, a bounded number of times;
a signed address that has expired is resolved again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ..errors import CheckpointError
from .client import LATER, AskAgain, Patience, client_errors, in_transit, wanted_wait

PIECE = 1 << 18  # bytes that are handed on at a time
EXPIRED = (401, 403)
WHOLE = 'fetch whole files: `--download full`, or `tpx.LLM(..., download="full")`'


class Found(NamedTuple):
    """What the Hub says of a file. etag: of its content, the same at every address of it."""

    size: int
    etag: str


class Source:
    """One file of a commit. found: what the Hub said of it before, which must still hold."""

    def __init__(
        self,
        hub_id: str,
        commit: str,
        name: str,
        found: Found | None = None,
        patience: Patience | None = None,
    ):
        self.hub_id, self.commit, self.name = hub_id, commit, name
        self.patience = patience or Patience()
        self._lock = threading.Lock()
        self._address: str | None = None
        self._etag_there: str | None = None  # as that address gives it, often another one
        self._found = found

    def ask(self) -> Found:
        """What the Hub says of the file."""
        failures = 0
        while True:
            try:
                self._where()
                assert self._found is not None
                return self._found
            except AskAgain as error:
                failures += 1
                self._wait(error, failures, 0, threading.Event())

    def read(self, start: int, stop: int, ending: threading.Event) -> Iterator[bytes]:
        """The bytes [start, stop) in order. Raises CheckpointError; ends early once `ending` is
        set."""
        at, failures = start, 0
        while at < stop and not ending.is_set():
            try:
                for piece in self._answer(at, stop):
                    at += len(piece)
                    failures = 0
                    yield piece
            except AskAgain as error:
                failures += 1
                self._wait(error, failures, at, ending)

    def _answer(self, start: int, stop: int) -> Iterator[bytes]:
        """One request's bytes; raises AskAgain where they end early."""
        from huggingface_hub import get_session

        address = self._where()
        asked = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        at = start
        try:
            headers = self._headers(address) | asked
            with get_session().stream("GET", address, headers=headers, timeout=_timeout()) as got:
                self._check(got, address, start, stop)
                for piece in got.iter_raw(PIECE):
                    at += len(piece)
                    if at > stop:
                        raise self._refused(f"more than the {stop - start} bytes that were asked")
                    yield piece
        except in_transit() as error:
            raise AskAgain(f"the connection failed ({type(error).__name__})") from error
        if at < stop:
            raise AskAgain(f"the answer ended {stop - at} bytes early")

    def _check(self, got: Any, address: str, start: int, stop: int) -> None:
        status, headers = got.status_code, got.headers
        if status in EXPIRED:
            self._forget(address)
            raise AskAgain(f"it was answered with {status}", wait=0.0)
        if status in LATER:
            raise AskAgain(f"it was answered with {status}", wanted_wait(headers))
        if status == 200:
            raise self._refused("the whole file (200, not 206)")
        if status != 206:
            raise self._refused(f"{status}, not 206")
        encoding = headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            raise self._refused(f"the encoding `{encoding}`, which was not asked for")
        assert self._found is not None, "an address comes with a size"
        expected = f"bytes {start}-{stop - 1}/{self._found.size}"
        if headers.get("Content-Range") != expected:
            said = headers.get("Content-Range")
            raise self._refused(
                f"`{said}` where `{expected}` was asked" if said else "no `Content-Range`"
            )
        etag = headers.get("ETag")
        with self._lock:
            if etag and address == self._address and etag != self._etag_there:
                if self._etag_there is not None:
                    raise self._changed(f"ETag `{self._etag_there}`", f"`{etag}`")
                self._etag_there = etag

    def _headers(self, address: str) -> dict[str, str]:
        """The user's token goes to the Hub alone, not to where it stores its files."""
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        own = urlsplit(address)[:2] == urlsplit(constants.ENDPOINT)[:2]
        return dict(build_hf_headers(token=None if own else False))

    def _where(self) -> str:
        """The file's address, asked for where there is none; it stays what it was said to be."""
        with self._lock:
            if self._address is None:
                address, found = self._resolve()
                if self._found is not None and found != self._found:
                    old = f"{self._found.size} bytes, ETag `{self._found.etag}`"
                    raise self._changed(old, f"{found.size} bytes, ETag `{found.etag}`")
                self._address, self._found, self._etag_there = address, found, None
            return self._address

    def _forget(self, address: str) -> None:
        with self._lock:
            if self._address == address:
                self._address = None

    def _resolve(self) -> tuple[str, Found]:
        from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

        url = hf_hub_url(self.hub_id, self.name, revision=self.commit)
        with client_errors(self.hub_id, self.commit):
            try:
                said = get_hf_file_metadata(url)
            except errors.OfflineModeIsEnabled:
                raise
            except errors.HfHubHTTPError as error:
                status = error.response.status_code
                if status not in LATER:
                    raise
                wait = wanted_wait(error.response.headers)
                raise AskAgain(f"it was answered with {status}", wait) from error
            except in_transit() as error:
                raise AskAgain(f"the connection failed ({type(error).__name__})") from error
        if said.size is None or not said.etag:
            raise self._refused("neither a size nor an ETag")
        if said.commit_hash not in (None, self.commit):
            raise self._changed(f"commit `{self.commit}`", f"`{said.commit_hash}`")
        return said.location, Found(said.size, said.etag)

    def _wait(self, error: AskAgain, failures: int, at: int, ending: threading.Event) -> None:
        """Until it is worth to ask again. Raises CheckpointError once it has failed too often."""
        if failures >= self.patience.attempts:
            raise CheckpointError(
                f"`{self.name}` of `{self.hub_id}` cannot be fetched from byte {at} on: "
                f"{error.reason}, {failures} times",
                "check the network and start again: what has come is kept",
            ) from error
        ending.wait(self.patience.seconds(failures, error.wait))

    def _refused(self, answer: str) -> CheckpointError:
        return CheckpointError(f"the Hub answers a range of `{self.name}` with {answer}", WHOLE)

    def _changed(self, before: str, after: str) -> CheckpointError:
        return CheckpointError(
            f"`{self.name}` of `{self.hub_id}` changed on the Hub while it was fetched: {before}, "
            f"then {after}",
            "start again",
        )


def _timeout() -> float:
    from huggingface_hub import constants

    return float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
