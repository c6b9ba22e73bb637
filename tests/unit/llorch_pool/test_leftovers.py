"""Damaged entries of workers that run, what cleanup takes away and what it leaves alone, and lock files."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from llorch_pool import doctor, files, leftovers, models
from llorch_pool.context import Context
from llorch_pool.dispatch import execute
from llorch_pool.errors import PoolError
from llorch_pool.registry import MARKER, Registry, WorkerRecord
from llorch_wire.pool import ModelShow, WorkerCleanup, WorkerList, WorkerSpawn, WorkerStop
from tests.unit.llorch_pool.conftest import Events, write_model

SERVER = """
import http.server, json, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"worker_id": "w0", "status": sys.argv[1]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


@pytest.fixture
def registry(context: Context) -> Registry:
    registry = Registry(context.paths.workers)
    registry.save(WorkerRecord(worker_id="other", model="m"))
    return registry


@pytest.fixture
def worker(registry: Registry) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts a process that carries w0's marker and answers /health with a status; its entry is not written."""
    made: list[subprocess.Popen[str]] = []

    def start(status: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, status],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, MARKER: f"{registry.folder}:w0"},
        )
        made.append(process)
        assert process.stdout is not None
        url = f"http://127.0.0.1:{process.stdout.readline().strip()}"
        registry.file("w0", "ready").write_bytes(msgspec.json.encode({"worker_id": "w0", "url": url}))
        registry.file("w0", "log").write_text("its log\n")
        return process

    yield start
    for process in made:
        process.kill()
        process.communicate(timeout=10)


def test_a_damaged_entry_of_a_worker_that_serves_is_said_and_nothing_of_it_goes(
    context: Context, registry: Registry, worker: Callable[[str], subprocess.Popen[str]], events: Events
) -> None:
    process = worker("ready")
    registry.file("w0", "json").write_text("{")
    assert [info.worker_id for info in execute(context, WorkerList())] == ["other"]
    assert "not shown: the entry of worker w0 can't be read" in events.logs()
    assert f"pid {process.pid} runs and serves at http://" in events.logs()
    assert "llorch worker drain w0" in events.logs()
    for dry_run in (True, False):
        events.clear()
        report = execute(context, WorkerCleanup(dry_run=dry_run))
        assert report.strays == [] and "left alone: the entry of worker w0" in events.logs()
        assert not [name for name in report.files if name.startswith("w0")]
    assert process.poll() is None and registry.file("w0", "json").exists() and registry.file("w0", "ready").exists()
    found = doctor.check(context, fix=True)
    assert any(finding.level == "error" and "serves at" in finding.text and not finding.fixed for finding in found)
    assert process.poll() is None
    events.clear()
    execute(context, WorkerStop(all=True, grace_s=0))
    assert "not stopped: the entry of worker w0" in events.logs() and process.poll() is None


def test_no_second_worker_is_started_under_its_name(
    context: Context,
    registry: Registry,
    worker: Callable[[str], subprocess.Popen[str]],
    tmp_path: Path,
) -> None:
    process = worker("ready")
    registry.file("w0", "json").write_text("{")
    model = write_model(tmp_path / "model", numbers=100)
    with pytest.raises(PoolError, match=f"can't be read .* but pid {process.pid} runs"):
        execute(context, WorkerSpawn(model=f"file:{model}", worker_id="w0"))
    assert registry.file("w0", "json").read_text() == "{" and process.poll() is None


def test_a_worker_that_serves_without_an_entry_is_left_alone_and_said(
    context: Context, registry: Registry, worker: Callable[[str], subprocess.Popen[str]], events: Events
) -> None:
    process = worker("ready")
    report = leftovers.cleanup(context, registry, dry_run=False)
    assert report.strays == [] and "left alone: worker w0 has no entry, but pid" in events.logs()
    assert process.poll() is None


def test_once_it_is_drained_cleanup_ends_it(
    context: Context, registry: Registry, worker: Callable[[str], subprocess.Popen[str]], events: Events
) -> None:
    process = worker("draining")
    registry.file("w0", "json").write_text("{")
    planned = leftovers.cleanup(context, registry, dry_run=True)
    assert [stray.pid for stray in planned.strays] == [process.pid] and process.poll() is None
    leftovers.cleanup(context, registry, dry_run=False)
    assert process.wait(10) != 0 and not registry.file("w0", "json").exists()


@pytest.mark.parametrize("kind", ["folder", "folder with something in it", "unreadable"])
def test_an_entry_that_is_no_file_of_ours_is_a_damaged_one(
    context: Context, registry: Registry, events: Events, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    entry = registry.file("w0", "json")
    if kind == "unreadable":
        entry.write_text("{}")
        read = Path.read_bytes

        def refused(path: Path) -> bytes:
            if path == entry:  # root could read any mode
                raise PermissionError(13, "Permission denied", str(path))
            return read(path)

        monkeypatch.setattr(Path, "read_bytes", refused)
    else:
        entry.mkdir()
    if kind == "folder with something in it":
        (entry / "x").touch()
    assert [info.worker_id for info in execute(context, WorkerList())] == ["other"]
    assert registry.damaged() == [entry] and "nothing of it runs" in events.logs()
    with pytest.raises(PoolError, match="can't be read"):
        registry.load("w0")
    events.clear()
    leftovers.cleanup(context, registry, dry_run=False)
    assert entry.exists() == (kind == "folder with something in it")
    assert ("can't be removed" in events.logs()) == entry.exists()


def test_cleanup_removes_the_locks_that_nobody_holds(context: Context, registry: Registry) -> None:
    context.paths.partial.mkdir(parents=True)
    model = context.paths.partial / "no-such.lock"
    gone, kept, held = (registry.file(name, "lock") for name in ("gone", "other", "busy"))
    for path in (gone, kept, held, model, registry.folder / "spawn.lock"):
        path.touch()
    registry.save(WorkerRecord(worker_id="other", model="m", pid=os.getpid(), on_boot=True, boot_id="earlier"))
    with held.open() as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        planned = leftovers.cleanup(context, registry, dry_run=True)
        assert set(planned.files) == {"gone.lock", "no-such.lock"} and gone.exists() and model.exists()
        leftovers.cleanup(context, registry, dry_run=False)
        assert not gone.exists() and not model.exists()
        assert kept.exists() and held.exists() and (registry.folder / "spawn.lock").exists()
    leftovers.cleanup(context, registry, dry_run=False)
    assert not held.exists()


def test_names_that_never_were_leave_no_lock(context: Context, registry: Registry) -> None:
    with pytest.raises(PoolError, match="no model"):
        models.remove(context, "never", force=False)
    with pytest.raises(PoolError, match="no model"):
        execute(context, ModelShow(name="never"))
    with registry.held("never", context):
        pass
    with registry.held("other", context):
        pass
    assert not list(context.paths.partial.iterdir())
    assert [path.name for path in registry.folder.glob("*.lock")] == ["other.lock"]


def test_a_lock_whose_file_is_removed_is_held_by_one_at_a_time(
    new_context: Callable[..., Context], tmp_path: Path
) -> None:
    path = tmp_path / "x.lock"
    inside: list[int] = []
    most: list[int] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(25):
                with files.locked(path, new_context(), what="x", keep=lambda: False):
                    inside.append(1)
                    most.append(len(inside))
                    os.sched_yield()
                    inside.pop()
                files.drop_free_lock(path)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failed and len(most) == 100 and max(most) == 1 and not path.exists()


def test_a_file_that_another_machine_removed_is_opened_anew(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NFS says it."""
    flock = fcntl.flock
    told: list[bool] = []

    def stale_once(handle: int, operation: int) -> None:
        if not told:
            told.append(True)
            raise OSError(errno.ESTALE, "Stale file handle")
        flock(handle, operation)

    monkeypatch.setattr(files.fcntl, "flock", stale_once)
    with files.locked(tmp_path / "x.lock", context, what="x"):
        assert told


def test_a_file_that_was_opened_before_its_removal_is_not_the_lock(
    new_context: Callable[..., Context], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that waits has the old file open: what it locks then is nobody's lock."""
    path = tmp_path / "x.lock"
    flock = fcntl.flock
    removed: list[bool] = []

    def removed_before(handle: int, operation: int) -> None:
        if not removed:
            removed.append(True)
            path.unlink()
        flock(handle, operation)

    monkeypatch.setattr(files.fcntl, "flock", removed_before)
    with (
        files.locked(path, new_context(), what="x"),
        pytest.raises(PoolError, match="not done within"),
        files.locked(path, new_context(timeout_s=0.2), what="x"),
    ):
        raise AssertionError("two holders")
