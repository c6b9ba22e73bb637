"""A living worker rotates the file that its output was redirected to."""

from __future__ import annotations

from pathlib import Path

import aiohttp

from tests.support.worker_process import WorkerProcess, execute, request, scripted_model

LIMIT = 4096


async def test_a_running_worker_bounds_its_log(tmp_path: Path, session: aiohttp.ClientSession):
    model = scripted_model(tmp_path / "model", slots=2, step_ms=1)
    worker = WorkerProcess.scripted(tmp_path / "w", model, env={"LLORCH_WORKER_LOG_MAX_BYTES": str(LIMIT)})
    await worker.start()
    try:
        log, older = worker.log_file, Path(f"{worker.log_file}.1")
        for count, wanted in ((1, b"of 1\n"), (2, b"of 2\n")):
            with log.open("ab") as handle:  # as the engine's and the supervisor's lines come, through O_APPEND
                handle.writelines(b"line %d of %d\n" % (line, count) for line in range(LIMIT // 8))
            await worker.until(
                lambda wanted=wanted: older.exists() and wanted in older.read_bytes() and log.stat().st_size < LIMIT,
                "a rotated log",
            )
            assert older.read_bytes().count(f" of {count}\n".encode()) == LIMIT // 8
        assert Path(f"{log}.2").exists()
        stream = await execute(session, worker.url, request(max_tokens=3))
        assert stream.end["tokens_out"] == 3
    finally:
        assert await worker.stop() == 0
    assert log.stat().st_size < LIMIT
