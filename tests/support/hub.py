"""A local server that speaks the Hub's protocol well enough for the real huggingface_hub client, faults included.

Run it in a thread with `with Hub(folder_of_repos) as hub:` or as a process with `python -m tests.support.hub --help`.

    GET  /api/models/<org>/<name>[/revision/<rev>]?blobs=true     sha, siblings with size, blobId, lfs
    HEAD|GET /<org>/<name>/resolve/<rev>/<path>                   ETag, X-Repo-Commit, X-Linked-*, Range, If-Range
    GET  /cdn/<sha256>                                            where large files are redirected to

`<root>/<org>/<name>/` holds a repository's files. Faults are set on the `Hub` object, or POSTed to /_faults as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import socket
import struct
import threading
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_BYTES = 4096
"""Files from this size on are stored "in LFS": sha256 is known and they are served by redirect."""


@dataclass
class Faults:
    """What goes wrong. Counters count down; 0 means: nothing."""

    token: str = ""
    """Repositories are private: without this token 401."""
    gated: bool = False
    """With a token or without, 403 with the code of a gated repository."""
    unavailable: int = 0
    """So many requests are answered 503 with Retry-After: 0."""
    cut_after: int = 0
    """A large file's answer ends with a reset after so many bytes, `cuts` times."""
    cuts: int = 0
    corrupt: int = 0
    """So many answers of large files have one byte changed."""
    slow_bytes_per_s: int = 0
    hold: bool = False
    """After `cut_after` bytes nothing more comes until `hold` ends."""


@dataclass
class Request:
    """One request as it came."""

    method: str
    path: str
    range: str
    if_range: str
    authorized: bool


@dataclass
class State:
    """Shared by all connections."""

    root: Path
    faults: Faults = field(default_factory=Faults)
    requests: list[Request] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    released: threading.Event = field(default_factory=threading.Event)

    def take(self, name: str) -> bool:
        """Use up one of a fault's tries."""
        with self.lock:
            left = getattr(self.faults, name)
            if left:
                setattr(self.faults, name, left - 1)
            return bool(left)


def commit_of(folder: Path) -> str:
    """A made-up commit: it changes whenever a file does."""
    digest = hashlib.sha1(usedforsecurity=False)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


def git_sha1(data: bytes) -> str:
    """Id of a git blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: State

    def log_message(self, format: str, *args: Any) -> None:
        del format, args

    def do_POST(self) -> None:
        changes = json.loads(self.rfile.read(int(self.headers.get("Content-Length", "0"))))
        with self.state.lock:
            for name, value in changes.items():
                setattr(self.state.faults, name, value)
        if not changes.get("hold", True):
            self.state.released.set()
        self._json(200, asdict(self.state.faults))

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def do_GET(self) -> None:
        self._serve(body=True)

    def _serve(self, *, body: bool) -> None:
        state = self.state
        url = urlsplit(self.path)
        path = unquote(url.path)
        authorized = bool(self.headers.get("Authorization"))
        with state.lock:
            state.requests.append(
                Request(self.command, path, self.headers.get("Range", ""), self.headers.get("If-Range", ""), authorized)
            )
        if path == "/_requests":
            return self._json(200, [asdict(request) for request in state.requests])
        if state.take("unavailable"):
            return self._json(503, {"error": "come back later"}, {"Retry-After": "0"})
        if path.startswith("/cdn/"):
            return self._cdn(path.removeprefix("/cdn/"), body=body)
        refusal = self._refusal()
        if refusal:
            return None
        if path.startswith("/api/models/"):
            return self._model(path.removeprefix("/api/models/"), "blobs" in parse_qs(url.query))
        return self._resolve(path, body=body)

    def _refusal(self) -> bool:
        faults = self.state.faults
        if faults.gated:
            headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted."}
            self._json(403, {"error": "gated"}, headers)
            return True
        if faults.token and self.headers.get("Authorization") != f"Bearer {faults.token}":
            self._json(401, {"error": "Invalid username or password."}, {"X-Error-Message": "Invalid credentials"})
            return True
        return False

    def _repo(self, repo: str, revision: str) -> Path | None:
        folder = self.state.root / repo
        if not folder.is_dir():
            # As the Hub does: whether a repository exists isn't told to those who may not see it.
            self._json(401, {"error": "not found"}, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Not found"})
            return None
        if revision not in ("main", commit_of(folder)):
            headers = {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"}
            self._json(404, {"error": f"Invalid rev id: {revision}"}, headers)
            return None
        return folder

    def _model(self, rest: str, blobs: bool) -> None:
        repo, _, revision = rest.partition("/revision/")
        folder = self._repo(repo, revision or "main")
        if folder is None:
            return
        siblings: list[dict[str, Any]] = []
        for path in sorted(folder.rglob("*")):
            if not path.is_file():
                continue
            entry: dict[str, Any] = {"rfilename": str(path.relative_to(folder))}
            if blobs:
                data = path.read_bytes()
                entry |= {"size": len(data), "blobId": git_sha1(data)}
                if len(data) >= LFS_BYTES:
                    sha256 = hashlib.sha256(data).hexdigest()
                    entry["lfs"] = {"size": len(data), "sha256": sha256, "pointerSize": 130}
            siblings.append(entry)
        self._json(200, {"id": repo, "modelId": repo, "sha": commit_of(folder), "private": False, "siblings": siblings})

    def _resolve(self, path: str, *, body: bool) -> None:
        repo, separator, rest = path.removeprefix("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        folder = self._repo(repo, revision) if separator else None
        if folder is None:
            if not separator:
                self._json(404, {"error": "no such page"})
            return
        file = folder / name
        if not file.is_file():
            self._json(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        data = file.read_bytes()
        headers = {"X-Repo-Commit": commit_of(folder), "Accept-Ranges": "bytes"}
        if len(data) < LFS_BYTES:
            self._bytes(data, f'"{git_sha1(data)}"', headers, body=body, faulty=False)
            return
        sha256 = hashlib.sha256(data).hexdigest()
        headers |= {
            "X-Linked-Size": str(len(data)),
            "X-Linked-ETag": f'"{sha256}"',
            "ETag": f'"{sha256}"',
            "Location": f"http://{self.headers['Host']}/cdn/{sha256}?path={repo}/{name}",
        }
        self._json(302, {}, headers)

    def _cdn(self, sha256: str, *, body: bool) -> None:
        query = parse_qs(urlsplit(self.path).query)
        data = (self.state.root / query["path"][0]).read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            self._json(404, {"error": "gone"})
            return
        if body and self.state.take("corrupt"):
            data = data[:-1] + bytes([data[-1] ^ 0xFF])
        self._bytes(data, f'"{sha256}"', {"Accept-Ranges": "bytes"}, body=body, faulty=True)

    def _bytes(self, data: bytes, etag: str, headers: dict[str, str], *, body: bool, faulty: bool) -> None:
        total, start = len(data), 0
        wanted = self.headers.get("Range", "")
        if wanted.startswith("bytes=") and self.headers.get("If-Range", etag) == etag:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            if start >= total:
                self._json(416, {}, {"Content-Range": f"bytes */{total}"})
                return
        headers = {**headers, "ETag": etag, "Content-Length": str(total - start)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        self.send_response(206 if start else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self._send(data[start:], faulty=faulty)

    def _send(self, data: bytes, *, faulty: bool) -> None:
        faults = self.state.faults
        cut = faulty and faults.cut_after and len(data) > faults.cut_after
        with contextlib.suppress(ConnectionError):
            if cut and faults.hold:
                self.wfile.write(data[: faults.cut_after])
                self.wfile.flush()
                self.state.released.wait(60)
                self.wfile.write(data[faults.cut_after :])
            elif cut and self.state.take("cuts"):
                self.wfile.write(data[: faults.cut_after])
                self.wfile.flush()
                # Linger 0: the peer gets a reset, not an orderly end.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
            elif faulty and faults.slow_bytes_per_s:
                step = max(1, faults.slow_bytes_per_s // 20)
                for at in range(0, len(data), step):
                    self.wfile.write(data[at : at + step])
                    self.wfile.flush()
                    if self.state.released.wait(0.05):
                        return
            else:
                self.wfile.write(data)

    def _json(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Type": "application/json"}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves in mid-answer is part of the tests, not worth a traceback."""
        del request, client_address


class Hub:
    """The server. `url` is what HF_ENDPOINT takes."""

    def __init__(self, root: Path, host: str = "127.0.0.1", port: int = 0) -> None:
        self.state = State(root)
        handler = type("Handler", (_Handler,), {"state": self.state})
        self._server = _Server((host, port), handler)
        self.url = f"http://{host}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def faults(self) -> Faults:
        """What goes wrong from now on."""
        return self.state.faults

    @property
    def requests(self) -> list[Request]:
        """Every request so far."""
        return self.state.requests

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.state.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


def main() -> None:
    """Serve until killed; prints the URL first."""
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    options = parser.parse_args()
    with Hub(options.root, options.host, options.port) as hub:
        print(hub.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
