"""A supervisor's worker: claimed by the process that becomes it, listed, left to its supervisor, forgotten."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from llorch_pool import foreground, leftovers, lifecycle, process
from llorch_pool.context import Context
from llorch_pool.dispatch import execute
from llorch_pool.errors import PoolError
from llorch_pool.foreground import device_for
from llorch_pool.registry import MARKER, Registry
from llorch_pool.spawn import list_devices
from llorch_wire import pool as wire
from llorch_wire.pool import DeviceInfo
from tests.unit.llorch_pool.conftest import Events, write_model

# Stands for the interpreter that the worker is started with: says what it is, and stays until stdin is closed.
WORKER = """#!{python} -I
import json, os, sys
print(json.dumps({{"argv": sys.argv[1:], "pid": os.getpid(), "environ": dict(os.environ)}}), flush=True)
sys.stdin.read()
"""
START = """
import sys
from llorch_pool import foreground
sys.executable = sys.argv[1]
sys.exit(foreground.main(sys.argv[2:]))
"""
ROOT = Path(__file__).resolve().parents[3]
SECRET = "k3y-of-the-workers"


class Life:
    """One start of a worker under this test as its supervisor."""

    def __init__(self, stub: Path, environ: dict[str, str], *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(stub), *arguments],
            env={**environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def said(self) -> dict[str, Any]:
        """What the worker was given, once it has taken the process over."""
        assert self.process.stdout is not None and self.process.stderr is not None
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        return json.loads(line)

    def failed(self) -> tuple[int, str]:
        _, words = self.process.communicate(timeout=30)
        return self.process.returncode, words

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate(timeout=30)


Start = Callable[..., Life]


@pytest.fixture
def start(tmp_path: Path, environ: dict[str, str]) -> Iterator[Start]:
    stub = tmp_path / "python"
    stub.write_text(WORKER.format(python=sys.executable))
    stub.chmod(0o755)
    model = write_model(tmp_path / "acme")
    lives: list[Life] = []

    def begin(worker_id: str = "up-1-1", *more: str, env: dict[str, str] | None = None, model: Path = model) -> Life:
        words = ["worker", "spawn", str(model), "--foreground", "--supervisor", "llorch up", "--id", worker_id]
        words += ["--port", "20123", "--orchestrator", "http://127.0.0.1:8080", "--log", str(tmp_path / "w.log")]
        lives.append(Life(stub, {**environ, **(env or {})}, *words, *more, "--", "--threads", "3"))
        return lives[-1]

    yield begin
    for life in lives:
        life.kill()


@pytest.fixture
def registry(context: Context) -> Registry:
    return Registry(context.paths.workers)


def test_the_process_becomes_the_worker(start: Start, registry: Registry, tmp_path: Path) -> None:
    life = start(env={"LLORCH_WORKER_KEY": SECRET, "SOMETHING": "of the supervisor"})
    worker = life.said()
    assert worker["pid"] == life.process.pid
    record = registry.load("up-1-1")
    assert record.identity == process.identify(life.process.pid)
    assert (record.supervisor, record.live_supervisor_pid) == ("llorch up", os.getpid())
    assert (record.url, record.log, record.model) == ("http://127.0.0.1:20123", str(tmp_path / "w.log"), "acme")
    assert record.device == "cpu" and record.need_bytes > 0
    argv = worker["argv"]
    assert argv[:5] == ["-P", "-m", "worker", "--model", str(tmp_path / "acme")]
    assert argv[-2:] == ["--threads", "3"], "the supervisor's flags come last, so they count"
    assert "--device" not in argv and "--pool" not in argv, "what nobody asked for is the worker's to find"
    assert argv[argv.index("--ready-file") + 1] == str(registry.file("up-1-1", "ready"))
    assert not [word for word in argv if SECRET in word]
    assert worker["environ"]["SOMETHING"] == "of the supervisor"
    assert worker["environ"]["LLORCH_WORKER_KEY"] == SECRET
    assert worker["environ"][MARKER] == f"{registry.folder}:up-1-1"
    assert registry.secrets("up-1-1") == {"LLORCH_WORKER_KEY": SECRET}
    assert stat.S_IMODE(registry.file("up-1-1", "env").stat().st_mode) == 0o600


def test_it_is_listed_with_who_runs_it_and_promises_memory_until_it_is_ready(start: Start, registry: Registry) -> None:
    pid = start().said()["pid"]
    (info,) = lifecycle.list_workers(registry)
    assert (info.worker_id, info.pid, info.state) == ("up-1-1", pid, "starting")
    assert (info.supervisor, info.supervisor_pid) == ("llorch up", os.getpid())
    assert f"`llorch up` (pid {os.getpid()}) runs it" in info.detail
    (cpu,) = [device for device in list_devices(registry) if device.kind == "cpu"]
    assert cpu.promised_bytes == info.need_bytes
    ready = registry.file("up-1-1", "ready")
    for written, promised in ((pid + 1, info.need_bytes), (pid, 0)):
        ready.write_text(json.dumps({"worker_id": "up-1-1", "pid": written, "url": info.url}))
        (cpu,) = [device for device in list_devices(registry) if device.kind == "cpu"]
        assert cpu.promised_bytes == promised, "the port file of an earlier life says nothing of this one"


def test_after_a_crash_the_same_id_is_claimed_again(start: Start, registry: Registry, environ: dict[str, str]) -> None:
    first = start(env={"LLORCH_WORKER_KEY": SECRET})
    mark = first.said()["environ"][MARKER]
    engine = subprocess.Popen(
        [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"],
        env={**environ, MARKER: mark},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert engine.stdout is not None
    engine.stdout.readline()
    first.kill()
    (dead,) = lifecycle.list_workers(registry)
    assert dead.state == "exited" and f"`llorch up` (pid {os.getpid()}) starts it again" in dead.detail
    second = start()
    worker = second.said()
    assert engine.wait(30) == -9, "what the first life left still held its memory"
    engine.communicate()
    (info,) = lifecycle.list_workers(registry)
    assert (info.worker_id, info.pid, info.url) == ("up-1-1", worker["pid"], dead.url)
    assert registry.secrets("up-1-1") == {}, "the key of a life that had one"


def test_a_live_worker_of_that_name_is_left_alone(start: Start, registry: Registry) -> None:
    pid = start().said()["pid"]
    rc, words = start().failed()
    assert rc == 2
    assert f"worker up-1-1 runs already (pid {pid})" in words and "llorch-pool worker stop up-1-1" in words
    assert registry.load("up-1-1").pid == pid


def test_a_model_that_does_not_fit_is_refused_with_figures(start: Start, registry: Registry, tmp_path: Path) -> None:
    large = write_model(tmp_path / "large")
    config = json.loads((large / "config.json").read_text())
    (large / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))
    rc, words = start(model=large).failed()
    assert rc == 1
    assert "no device here has that much" in words and "KV cache" in words and "fewer workers" in words
    assert registry.all() == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--id", "../x"), "can't be the name of a worker"),
        (("--port", "0"), "needs a --port above 0"),
        (("--slots", "0"), "--slots 0 is not between"),
        (("--device", "cuda:7"), "no device 'cuda:7'"),
        (("--host", "0.0.0.0"), "needs a key"),
        (("--orchestrator", "ftp://x"), "--orchestrator"),
        (("--nonsense",), "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_input_is_named(start: Start, registry: Registry, more: tuple[str, ...], said: str) -> None:
    rc, words = start("up-1-1", *more).failed()
    assert rc == 2 and said in words, words
    assert registry.all() == []


def test_a_registry_that_can_not_be_written_does_not_stop_a_worker(start: Start, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    life = start(env={"XDG_STATE_HOME": str(tmp_path / "file")})
    worker = life.said()
    assert "--ready-file" not in worker["argv"] and MARKER not in worker["environ"]
    life.kill()
    again = start(env={"XDG_STATE_HOME": str(tmp_path / "file")})
    again.said()
    again.process.kill()
    _, words = again.process.communicate(timeout=30)
    assert "can't be put on record" in words and "will not show it" in words


def test_stopping_is_left_to_the_supervisor_unless_forced(
    start: Start, registry: Registry, context: Context, events: Events
) -> None:
    life = start()
    life.said()
    with pytest.raises(PoolError, match=rf"run by `llorch up` \(pid {os.getpid()}\)") as raised:
        execute(context, wire.WorkerStop(worker_ids=["up-1-1"], grace_s=0))
    assert "llorch worker drain up-1-1" in raised.value.next_step and "--force" in raised.value.next_step
    assert execute(context, wire.WorkerStop(all=True, grace_s=0)) == []
    assert "up-1-1 stays" in events.logs()
    assert life.process.poll() is None
    (outcome,) = execute(context, wire.WorkerStop(worker_ids=["up-1-1"], grace_s=0, force=True))
    assert outcome.how == "terminated"
    assert life.process.wait(30) == -15 and registry.all() == []


def test_a_supervisor_that_is_gone_protects_nothing(start: Start, registry: Registry, context: Context) -> None:
    life = start()
    life.said()
    record = registry.load("up-1-1")
    registry.save(msgspec.structs.replace(record, supervisor_start_time=1))
    (info,) = lifecycle.list_workers(registry)
    assert (info.supervisor, info.supervisor_pid) == ("llorch up", 0)
    assert execute(context, wire.WorkerStop(all=True, grace_s=0))[0].how == "terminated"
    life.kill()


def test_cleanup_removes_dead_ones_and_leaves_live_ones(start: Start, registry: Registry, context: Context) -> None:
    dead, live = start("up-1-1"), start("up-1-2")
    dead.said(), live.said()
    dead.kill()
    report = leftovers.cleanup(context, registry, dry_run=False)
    assert (report.entries, report.strays) == (["up-1-1"], [])
    assert [record.worker_id for record in registry.all()] == ["up-1-2"]
    assert live.process.poll() is None


def test_a_clean_stop_forgets_its_own_dead_only(
    start: Start, registry: Registry, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lives = {name: start(name) for name in ("up-1-1", "up-1-2", "up-2-1")}
    for life in lives.values():
        life.said()
    lives["up-1-1"].kill()
    lives["up-2-1"].kill()
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    words = ["worker", "release", "--supervisor", "llorch up", "--prefix", "up-1-"]
    assert foreground.is_meant(words) and foreground.main(words) == 0
    assert {record.worker_id for record in registry.all()} == {"up-1-2", "up-2-1"}


def test_resolve_says_where_a_model_is(tmp_path: Path, environ: dict[str, str]) -> None:
    def resolve(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "llorch_pool", "model", "resolve", *words]
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=30, cwd=ROOT)

    folder = write_model(tmp_path / "somewhere" / "_mine")
    (tmp_path / "config" / "llorch").mkdir(parents=True)
    (tmp_path / "config" / "llorch" / "config.toml").write_text(f'[aliases]\n"quick" = "file:{folder}"\n')
    for ref in (f"file:{folder}", str(folder), "quick"):
        assert json.loads(resolve("--", ref).stdout)["path"] == str(folder)
    assert not (tmp_path / "data" / "llorch" / "models" / "_mine").exists(), "used where it is"
    unknown = resolve("nobody")
    assert unknown.returncode == 2 and "no model 'nobody'" in unknown.stderr


def test_which_command_lines_are_meant() -> None:
    assert foreground.is_meant(["worker", "spawn", "m", "--foreground"])
    assert not foreground.is_meant(["worker", "spawn", "m", "--", "--foreground"])
    assert not foreground.is_meant(["worker", "list"])
    assert not foreground.is_meant([])


def gpu(index: int, free: int) -> DeviceInfo:
    return DeviceInfo(
        device=f"GPU-{index}", kind="cuda", index=index, name="g", memory_total_bytes=100, memory_free_bytes=free
    )


CPU = DeviceInfo(device="cpu", kind="cpu", index=0, name="c", memory_total_bytes=100, memory_free_bytes=100)
GPUS = [gpu(0, 50), gpu(1, 10), gpu(2, 40), CPU]


@pytest.mark.parametrize(
    ("asked", "visible", "found", "wanted"),
    [
        (None, None, GPUS, None),
        ("cuda", None, GPUS, "cuda"),
        ("mps", None, [CPU], "cpu"),
        ("cpu", "1", GPUS, "cpu"),
        (None, "1", GPUS, "GPU-1"),
        (None, "1,2", GPUS, "GPU-2"),
        ("cuda", " GPU-1 ", GPUS, "GPU-1"),
        ("cuda:1", "2,0", GPUS, "GPU-0"),
        ("GPU-2", "1", GPUS, "GPU-2"),
        (None, "", GPUS, "cpu"),
        (None, "-1", GPUS, "cpu"),
        (None, "1,-1,2", GPUS, "GPU-1"),
        ("cuda", "0", [CPU], "cuda"),
    ],
)
def test_cuda_visible_devices_counts(
    asked: str | None, visible: str | None, found: list[DeviceInfo], wanted: str | None
) -> None:
    assert device_for(asked, visible, found) == wanted


@pytest.mark.parametrize(("asked", "visible"), [("cuda", ""), ("cuda:1", "0"), (None, "7")])
def test_a_gpu_that_is_not_visible_is_refused(asked: str | None, visible: str) -> None:
    with pytest.raises(PoolError) as raised:
        device_for(asked, visible, GPUS)
    assert raised.value.rc == 2
