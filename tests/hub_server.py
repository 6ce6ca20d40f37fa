"""A server on this machine that speaks the Hub's API for one repository, and can misbehave.

Shards are answered with a redirect to a signed address on another host, as the Hub does.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

HUB_ID = "owner/name"


class Request(NamedTuple):
    """kind: api, head, file or cdn. start, stop: the bytes asked for. token: whether one came."""

    kind: str
    name: str
    start: int = 0
    stop: int = 0
    token: bool = False


Fault = Callable[[Request], str | None]


class HubServer(ThreadingHTTPServer):
    """files: bytes by name, of `commit`. fault: what goes wrong with a request for bytes, by the
    names that Handler.send_bytes knows, or a status; None: nothing."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes], commit: str = "a" * 40):
        super().__init__(("127.0.0.1", 0), Handler)
        self.commits: dict[str, dict[str, bytes]] = {commit: files}
        self.refs = {"main": commit}
        self.fault: Fault = lambda request: None
        self.api_status = 200, ""  # and the Hub's code of the error
        self.retry_after: dict[str, str] = {"Retry-After": "0"}
        self.resolve_fails: list[int] = []  # statuses of the next requests for an address
        self.signatures = 0  # addresses given out
        self.expired = 0  # of them, those that no longer hold
        self.salt = ""  # in the ETags, which change with it
        self.requests: list[Request] = []
        self.lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def take(self) -> list[Request]:
        """The requests since the last time."""
        with self.lock:
            found, self.requests = self.requests, []
        return found

    def etag(self, data: bytes) -> str:
        return hashlib.sha256(data + self.salt.encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: HubServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:  # the client went away
            pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/models/(\w+/\w+)(?:/(revision|tree)/(.+))?", path):
            self.api(*found.groups())
        elif found := re.fullmatch(r"/(\w+/\w+)/resolve/(\w+)/(.+)", path):
            self.resolve(*found.groups())
        elif found := re.fullmatch(r"/cdn/(\d+)/(\w+)/(.+)", path):
            signature, commit, name = found.groups()
            self.send_bytes("cdn", commit, name, int(signature) < self.server.expired)
        else:
            self.send(404)

    def note(self, kind: str, name: str, start: int = 0, stop: int = 0) -> Request:
        request = Request(kind, name, start, stop, "Authorization" in self.headers)
        with self.server.lock:
            self.server.requests.append(request)
        return request

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def api(self, hub_id: str, what: str | None, revision: str | None) -> None:
        server, (status, code) = self.server, self.server.api_status
        self.note("api", what or "model")
        commit = server.refs.get(revision or "main", revision)
        if status != 200:
            return self.send(status, X_Error_Code=code, **server.retry_after)
        if hub_id != HUB_ID:
            return self.send(404, X_Error_Code="RepoNotFound")
        if commit not in server.commits:
            return self.send(404, X_Error_Code="RevisionNotFound")
        files = server.commits[commit]
        told: object = {"id": hub_id, "sha": commit, "siblings": [{"rfilename": n} for n in files]}
        if what == "tree":
            told = [
                {"type": "file", "path": name, "size": len(data), "oid": server.etag(data)[:40]}
                for name, data in files.items()
            ]
        return self.send(200, json.dumps(told).encode(), Content_Type="application/json")

    def resolve(self, hub_id: str, revision: str, name: str) -> None:
        server = self.server
        commit = server.refs.get(revision, revision)
        data = server.commits.get(commit, {}).get(name)
        if data is None:
            return self.send(404, X_Error_Code="EntryNotFound")
        if not name.endswith(".safetensors"):
            return self.send_bytes("file", commit, name, False)
        self.note("head", name)
        if server.resolve_fails:
            return self.send(server.resolve_fails.pop(0), **server.retry_after)
        with server.lock:
            server.signatures += 1
        return self.send(
            302,
            Location=f"http://localhost:{server.server_port}/cdn/{server.signatures}/{commit}/{name}",
            X_Repo_Commit=commit,
            X_Linked_Size=str(len(data)),
            X_Linked_Etag=f'"{server.etag(data)}"',
        )

    def send_bytes(self, kind: str, commit: str, name: str, expired: bool) -> None:
        server, data = self.server, self.server.commits[commit][name]
        given = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (int(given[1]), int(given[2]) + 1) if given else (0, len(data))
        request = self.note(kind, name, start, stop)
        fault = "403" if expired else (server.fault(request) if kind == "cdn" else None)
        body, size = data[start:stop], len(data)
        headers = {"ETag": f'"{server.etag(data)}"', "X-Repo-Commit": commit}
        if fault is not None and fault.isdecimal():
            return self.send(int(fault), b"later", **server.retry_after)
        if fault == "whole":
            given, body = None, data
        if fault == "shifted":
            start, stop = start + 1, stop + 1
        if fault == "size":
            size += 1
        if fault == "short":
            body = body[: len(body) // 2]
        if fault == "long":
            body += b"more"
        if fault == "gzip":
            headers["Content-Encoding"] = "gzip"
        if fault == "etag":
            headers["ETag"] = '"another"'
        if given and fault != "silent":
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self.send_response(206 if given else 200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            cut = fault == "cut"
            self.wfile.write(body[: len(body) // 2] if cut else body)
            self.close_connection = self.close_connection or cut
        return None


@contextmanager
def hub_server(files: dict[str, bytes]) -> Iterator[HubServer]:
    server = HubServer(files)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def connect(server: HubServer, cache: Path, patch: Callable[[object, str, object], None]) -> None:
    """Points the Hub's client of this process, which read its environment long ago, to `server` and
    to another cache. patch: monkeypatch.setattr, or setattr."""
    from huggingface_hub import constants

    patch(constants, "ENDPOINT", server.endpoint)
    template = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    patch(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch(constants, "HF_HUB_CACHE", str(cache))
