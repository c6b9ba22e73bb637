"""A stand-in for one part of the stack, for tests of supervision: starts at once and answers what `llorch up` asks.

    stub_part.py redis READY_FILE | orchestratord PORT WORKERS_FOLDER | worker ID PORT WORKERS_FOLDER [MODE]

A worker registers by leaving a file in a folder that the stand-in for orchestratord lists. MODE `exit` ends at once
with status 1; `deaf` ignores SIGTERM.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps(self.server.answer(self.path)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    answer: Any = None


def write(path: Path, value: object) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value))
    temporary.replace(path)


def main() -> None:
    kind = sys.argv[1]
    if kind == "redis":
        write(Path(sys.argv[2]), {"url": "unix:///nowhere/stub.sock", "pid": os.getpid()})
        signal.pause()
    elif kind == "orchestratord":
        folder = Path(sys.argv[3])

        def answer(path: str) -> object:
            if path == "/v2/workers":
                return {"workers": [json.loads(found.read_text()) for found in folder.glob("*.json")]}
            return {"ready": True}

        server = Server(("127.0.0.1", int(sys.argv[2])), Answers)
        server.answer = answer
        server.serve_forever()
    else:
        worker_id, port, folder = sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
        mode = sys.argv[5] if len(sys.argv) > 5 else ""
        if mode == "exit":
            print(json.dumps({"level": "error", "event": "the weights are damaged", "file": "model.safetensors"}))
            sys.exit(1)
        if mode == "deaf":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        instance = str(uuid.uuid4())
        server = Server(("127.0.0.1", port), Answers)
        server.answer = lambda path: {"status": "ready", "instance_id": instance, "model": "stub"}
        write(folder / f"{worker_id}.json", {"worker_id": worker_id, "instance_id": instance, "state": "ready"})
        server.serve_forever()


if __name__ == "__main__":
    main()
