"""orchestratord for fleet tests, and small calls to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.sshd import wait_for

WORKER_KEY = "worker-key-of-the-fleet-tests"


@dataclass
class Orchestrator:
    """A running orchestratord."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    headers: dict[str, str]

    def call(self, method: str, path: str, body: Any = None, timeout: float = 20) -> Any:
        """JSON answer; raises urllib's HTTPError."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **self.headers}
        request = urllib.request.Request(self.url + path, data=data, method=method, headers=headers)
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return json.load(response)

    def workers(self) -> dict[str, dict[str, Any]]:
        """What it knows, by id."""
        return {worker["worker_id"]: worker for worker in self.call("GET", "/v2/workers")["workers"]}

    def state(self, worker_id: str) -> str:
        """State of a worker, "" when it is unknown."""
        return str(self.workers().get(worker_id, {}).get("state", ""))

    def submit(self, **fields: Any) -> str:
        """Id of a new task on the demo model."""
        body = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 8, "seed": 7, **fields}
        return str(self.call("POST", "/v2/tasks", body)["task_id"])

    def task(self, task_id: str) -> dict[str, Any]:
        """A task as it is."""
        return self.call("GET", f"/v2/tasks/{task_id}")

    def finish(self, task_id: str, seconds: float = 60) -> dict[str, Any]:
        """Wait until a task ended."""
        wait_for(lambda: self.task(task_id)["status"] in ("completed", "failed", "cancelled"), seconds, f"{task_id}")
        return self.task(task_id)


@contextmanager
def orchestrator(
    folder: Path, host: str = "127.0.0.1", environ: Mapping[str, str] | None = None
) -> Iterator[Orchestrator]:
    """Start orchestratord with an embedded Redis; ends it and its Redis."""
    folder.mkdir(parents=True, exist_ok=True)
    ready, log = folder / "ready.json", folder / "orchestratord.log"
    # A key of tenant admin as well: without one, only loopback would be let in.
    headers = {"Authorization": "Bearer admin-key-of-the-fleet-tests"}
    environment = {
        **os.environ,
        "LLORCH_WORKER_KEY": WORKER_KEY,
        "LLORCH_API_KEYS": "admin=admin-key-of-the-fleet-tests",
        **(environ or {}),
    }
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "orchestratord",
                "--host",
                host,
                "--port",
                "0",
                "--ready-file",
                str(ready),
                "--data-dir",
                str(folder / "data"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env=environment,
            cwd=folder,
        )
    try:

        def up() -> bool:
            assert process.poll() is None, log.read_text()
            return ready.exists()

        wait_for(up, 60, "orchestratord")
        yield Orchestrator(json.loads(ready.read_text())["url"], process, log, headers)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(5)


def http_error(error: urllib.error.HTTPError) -> str:
    """Body of an error answer."""
    return error.read().decode()
