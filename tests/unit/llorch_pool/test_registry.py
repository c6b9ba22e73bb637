"""Entries, secrets, locks, logs and what cleanup takes away."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llorch_pool import leftovers, lifecycle, likely_cause, on_boot, paths, spawn
from llorch_pool.context import Context
from llorch_pool.errors import PoolError
from llorch_pool.log_rotation import rotate
from llorch_pool.registry import Registry, WorkerRecord
from llorch_wire.pool import WorkerSpawn


@pytest.fixture
def registry(context: Context) -> Registry:
    return Registry(context.paths.workers)


def record(worker_id: str = "w1", **fields: Any) -> WorkerRecord:
    return WorkerRecord(worker_id=worker_id, model="m", **fields)


def test_an_entry_comes_back_as_it_was_and_secrets_are_private(registry: Registry) -> None:
    registry.save(record(pid=4, url="http://h:1"))
    registry.write_secrets("w1", {"LLORCH_WORKER_KEY": "secret-key"})
    assert registry.load("w1") == record(pid=4, url="http://h:1")
    assert registry.secrets("w1") == {"LLORCH_WORKER_KEY": "secret-key"}
    assert registry.file("w1", "env").stat().st_mode & 0o777 == 0o600
    assert registry.folder.stat().st_mode & 0o777 == 0o700
    registry.remove("w1")
    assert registry.all() == [] and not registry.file("w1", "env").exists()


@pytest.mark.parametrize("worker_id", ["../x", "a/b", "", ".hidden", "a b", "x" * 200])
def test_ids_that_are_no_file_names(registry: Registry, worker_id: str) -> None:
    with pytest.raises(PoolError, match="can't be the name"):
        registry.file(worker_id, "json")


def test_a_damaged_entry_hides_nothing_else_and_is_cleaned_up(context: Context, registry: Registry) -> None:
    registry.save(record())
    registry.file("bad", "json").write_text("{")
    assert [entry.worker_id for entry in registry.all()] == ["w1"]
    with pytest.raises(PoolError, match="can't be read"):
        registry.load("bad")
    leftovers.cleanup(context, registry, dry_run=False)
    assert not registry.file("bad", "json").exists()


def test_states_without_a_process(context: Context, registry: Registry) -> None:
    import os

    from llorch_pool import process

    me = process.identify(os.getpid())
    assert me is not None
    cases = {
        "rebooted": record(pid=1, start_time=1, boot_id="another"),
        "pid-reused": record(pid=me.pid, start_time=me.start_time - 1, boot_id=me.boot_id),
        "exited": record(pid=2**22 + 5, start_time=1, boot_id=me.boot_id),
        "starting": record(pid=me.pid, start_time=me.start_time, boot_id=me.boot_id),
        "unresponsive": record(
            pid=me.pid, start_time=me.start_time, boot_id=me.boot_id, ready=True, url="http://127.0.0.1:9"
        ),
    }
    for state, entry in cases.items():
        assert lifecycle.inspect(entry, registry).state == state


def test_cleanup_keeps_what_lives_and_what_comes_back(context: Context, registry: Registry) -> None:
    registry.save(record("dead", pid=2**22 + 5, start_time=1, boot_id="x", log=""))
    registry.save(record("back", pid=5, start_time=1, boot_id="earlier", on_boot=True))
    registry.file("gone", "log").write_text("an old log\n")
    registry.file("gone", "env").write_text("{}")
    planned = leftovers.cleanup(context, registry, dry_run=True)
    assert planned.entries == ["dead"] and set(planned.files) == {"gone.log", "gone.env"}
    assert registry.file("gone", "log").exists()
    leftovers.cleanup(context, registry, dry_run=False)
    assert [entry.worker_id for entry in registry.all()] == ["back"] and not registry.file("gone", "log").exists()


def test_one_command_at_a_time_changes_a_worker(new_context: Callable[..., Context], registry: Registry) -> None:
    order: list[str] = []
    inside = threading.Event()

    def second() -> None:
        inside.wait(5)
        with registry.held("w1", new_context()):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with registry.held("w1", new_context()):
        inside.set()
        with pytest.raises(PoolError, match="not done within"), registry.held("w1", new_context(timeout_s=0.2)):
            pass
        order.append("first")
    thread.join(5)
    assert order == ["first", "second"]


def test_rotation_loses_no_line(tmp_path: Path) -> None:
    log = tmp_path / "w.log"
    with log.open("ab", buffering=0) as writer:
        for number in range(400):
            writer.write(b"line %d\n" % number)
            if number % 20 == 19:
                rotate(log, limit=100, keep=30)
    lines = [line for path in tmp_path.iterdir() for line in path.read_text().splitlines()]
    assert sorted(lines) == sorted(f"line {number}" for number in range(400))


def test_rotation_keeps_ten(tmp_path: Path) -> None:
    log = tmp_path / "w.log"
    for _ in range(14):
        log.write_bytes(b"x" * 200)
        rotate(log, limit=100, keep=10)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["w.log", *(f"w.log.{n}" for n in range(1, 11))])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried", "device ran out of memory"),
        ("the engine ended with signal 9", "main memory"),
        ("ModuleNotFoundError: No module named 'torch'", "not installed"),
        ("can't listen on 127.0.0.1:80: Address already in use", "port is in use"),
        ("The NVIDIA driver on your system is too old", "driver"),
        ("error: unrecognized arguments: --x", "different versions"),
    ],
)
def test_the_likely_cause_of_a_failed_start(line: str, words: str) -> None:
    cause = likely_cause.explain(f"something\n{line}")
    assert cause is not None and words in cause.text and cause.next_step
    assert likely_cause.explain("nothing that is known") is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"slots": 0}, "--slots"),
        ({"idle_timeout_s": 0}, "--idle-timeout"),
        ({"idle_timeout_s": float("nan")}, "--idle-timeout"),
        ({"idle_timeout_s": float("inf")}, "--idle-timeout"),
        ({"ready_timeout_s": float("nan")}, "--ready-timeout"),
        ({"ready_timeout_s": 0.0}, "--ready-timeout"),
        ({"engine": "magic"}, "no engine"),
        ({"port": 70000}, "--port"),
        ({"worker_key": "short"}, "worker key"),
        ({"worker_key": "has a space inside"}, "worker key"),
        ({"worker_id": "a b"}, "name of a worker"),
        ({"orchestrator": "ftp://x"}, "--orchestrator"),
        ({"orchestrator": "http://user:pw@x"}, "--orchestrator"),
        ({"advertise_url": "http://x:1"}, "needs --port"),
        ({"host": "0.0.0.0"}, "needs a key"),
        ({"model": "nothing-here"}, "no model 'nothing-here'"),
        ({"model": "hf:bad"}, "org/name"),
        ({"model": "file:relative"}, "absolute path"),
        ({"model": "file:/no/such/folder"}, "no folder"),
    ],
)
def test_what_spawn_refuses_names_the_option(context: Context, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(PoolError) as caught:
        spawn.spawn(context, WorkerSpawn(**{"model": "demo", **fields}))
    assert words in f"{caught.value.message} {caught.value.next_step}" and caught.value.next_step
    assert "has a space" not in str(caught.value)
    assert Registry(context.paths.workers).all() == []


def test_a_process_names_its_own_installation_and_the_boot_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bootstrap removes an installation that no process names; what runs at boot must outlive such a bootstrap."""
    program = tmp_path / "venvs" / "v1" / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.symlink_to(sys.executable)
    for name in (program, tmp_path / "current" / "bin" / "python"):
        monkeypatch.setattr(sys, "executable", str(name))
        if not (tmp_path / "current").exists():
            assert paths.python_at_boot() == str(program)
            (tmp_path / "current").symlink_to(tmp_path / "venvs" / "v1")
        assert paths.python() == str(program)
        assert paths.python_at_boot() == str(tmp_path / "current" / "bin" / "python")
    monkeypatch.setattr(sys, "executable", "/bin/python")
    assert paths.python_at_boot().endswith("/bin/python")


def test_the_unit_for_boot_quotes_what_it_holds(context: Context, tmp_path: Path) -> None:
    import shutil
    import subprocess

    context.environ = {**context.environ, "LLORCH_MODELS": '/data/my "models" 100% $HOME'}
    text = on_boot.unit_text(context)
    assert 'Environment="LLORCH_MODELS=/data/my \\"models\\" 100%% $HOME"' in text
    if shutil.which("systemd-analyze"):
        unit = tmp_path / on_boot.UNIT
        unit.write_text(text)
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=60
        )
        assert not [line for line in done.stderr.splitlines() if on_boot.UNIT in line], done.stderr
