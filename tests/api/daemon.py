"""An `orchestratord` process for tests: started on a free port, stopped, reaped."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

DEADLINE_S = 60.0
ROOT = Path(__file__).resolve().parents[2]


class Daemon:
    """One `orchestratord` process."""

    def __init__(self, folder: Path, *flags: str, env: dict[str, str] | None = None) -> None:
        self.folder, self.flags, self.env = folder, flags, env or {}
        self.ready_file, self.log_file = folder / "ready.json", folder / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""

    async def start(self) -> Daemon:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LLORCH_")}
        environment |= {"PYTHONPATH": str(ROOT), "XDG_CONFIG_HOME": str(self.folder), **self.env}
        command = [sys.executable, "-m", "orchestratord", "--port", "0", "--data-dir", str(self.folder / "data")]
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--ready-file", str(self.ready_file), *self.flags],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.folder, env=environment,
            )  # fmt: skip
        async with asyncio.timeout(DEADLINE_S):
            while not self.ready_file.exists():
                assert self.process.poll() is None, self.log()
                await asyncio.sleep(0.02)
        ready = json.loads(self.ready_file.read_text())
        assert ready["pid"] == self.process.pid
        self.url = ready["url"]
        return self

    def log(self) -> str:
        return self.log_file.read_text()

    async def ended(self) -> int:
        assert self.process is not None
        async with asyncio.timeout(DEADLINE_S):
            while (status := self.process.poll()) is None:
                await asyncio.sleep(0.01)
        return status

    async def stop(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return await self.ended()
