"""What a bootstrap downloads from, served on loopback: a package index (PEP 503), and Pythons as uv takes them.

`Index` serves the wheels of a folder, under one name or as several builds (`/cu130/torch/`), and remembers what was
asked for. `python_archive` packs a real CPython of this machine as uv's downloads are packed.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

_LEFT_OUT = re.compile(r"/(test|tests|idlelib|tkinter|lib2to3|site-packages|__pycache__|config-[^/]*)(/|$)|\.a$")


class Index:
    """A server over a folder: `<name>/` lists the wheels of a package, `files/...` are the folder's files."""

    def __init__(self, folder: Path) -> None:
        self.requests: list[str] = []
        requests = self.requests

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = unquote(self.path)
                requests.append(path)
                found = answer(folder, path)
                self.send_response(404 if found is None else 200)
                kind = "application/octet-stream" if "/files/" in path else "text/html"
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(found or b"")))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(found or b"")

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Index:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join(10)
        self._server.server_close()


def answer(folder: Path, path: str) -> bytes | None:
    """The body for a path; None: there is nothing. `/<anything>/<package>/` lists, `/files/<name>` gives a file."""
    if path.startswith("/files/"):
        file = folder / path.removeprefix("/files/")
        return file.read_bytes() if file.is_file() else None
    package = re.sub(r"[-_.]+", "-", path.strip("/").rpartition("/")[2]).lower()
    build = path.strip("/").partition("/")[0]
    names = [
        file.name
        for file in sorted(folder.glob("*.whl"))
        if re.sub(r"[-_.]+", "-", file.name.split("-")[0]).lower() == package
        and ("+" not in file.name or f"+{build}-" in file.name)
    ]
    if not names:
        return None
    links = "".join(f'<a href="/files/{name.replace("+", "%2B")}">{name}</a><br>\n' for name in names)
    return f"<!DOCTYPE html><html><body>{links}</body></html>".encode()


def python_archive(python: str, folder: Path, url: str) -> str:
    """Pack the installation of `python` into `folder` and describe it there, for a server of `folder` at `url`.

    Returns its full version. The description is `downloads.json` (UV_PYTHON_DOWNLOADS_JSON_URL).
    """
    code = "import sys, platform; print(sys.base_prefix, platform.python_version(), platform.machine())"
    prefix, version, machine = subprocess.run(
        [python, "-I", "-c", code], capture_output=True, text=True, check=True, timeout=30
    ).stdout.split()
    name = f"cpython-{version}-{machine}-unknown-linux-gnu-install_only.tar.gz"

    def kept(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        return None if _LEFT_OUT.search(entry.name) else entry

    with tarfile.open(folder / name, "w:gz", compresslevel=1) as tar:
        for part in ("bin", "lib"):
            tar.add(Path(prefix) / part, f"python/{part}", filter=kept)
    major, minor, patch = (int(number) for number in version.split("."))
    described = {
        "name": "cpython", "arch": {"family": machine, "variant": None}, "os": "linux", "libc": "gnu",
        "major": major, "minor": minor, "patch": patch, "prerelease": "", "url": f"{url}/files/{name}",
        "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(), "variant": None, "build": "20240101",
    }  # fmt: skip
    key = f"cpython-{version}-linux-{machine}-gnu"
    (folder / "downloads.json").write_text(json.dumps({key: described}))
    return version
