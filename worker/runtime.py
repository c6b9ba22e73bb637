"""The worker as a whole: one engine under supervision, its generations, the HTTP server, and the registration.

Read `Worker.run` first. Everything long-lived is a task of its group; `stop` is the only way out, besides an engine
that can't ever be loaded.

    starting ──engine ready──▶ ready ──drain──▶ draining ──deadline──▶ what still runs yields ──stop──▶ end
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version

import structlog
from starlette.types import ASGIApp

from llorch_wire.errors import ErrorCode
from llorch_wire.events import WorkerStartedEvent
from llorch_wire.worker import ExecuteRequest, Heartbeat, Orders, WorkerHealth, WorkerRegistration, WorkerStatus
from worker import vram
from worker.engine.protocol import EngineReady, StepOutput
from worker.generation import Generation
from worker.generations import Generations
from worker.http_server import serving
from worker.metrics import LiveState, WorkerMetrics
from worker.model_files import ModelDigest, ModelFolder, digest
from worker.refusals import FAILED, STARTING, unavailable
from worker.registration import Registration
from worker.server import build_app
from worker.settings import Settings, reachable_host
from worker.supervisor import Supervisor
from worker.template_renderer import TemplateRenderer
from worker.throughput import Throughput
from worker.tokenizer import ModelTokenizer
from worker.validation import Validator

TICK_S = 0.25
FLUSH_DEADLINE_S = 3.0
PROTOCOL_VERSION = 1


class Worker:
    """One llorch-worker. Make it in the main thread, bind first (`listen`), then `run`."""

    def __init__(self, settings: Settings, folder: ModelFolder, tokenizer: ModelTokenizer, sock: socket.socket) -> None:
        self._settings = settings
        self._folder = folder
        self._sock = sock
        self._clock: Callable[[], float] = time.monotonic
        self._started_at = self._clock()
        self._log = structlog.get_logger("worker")
        port = sock.getsockname()[1]
        self.url = settings.advertise_url or f"http://{reachable_host(settings)}:{port}"
        self.worker_id = settings.worker_id or f"{socket.gethostname()}-{port}"
        self.exit_code = 0
        self._idle_since = self._started_at
        self._draining = False
        self._drain_ordered = False
        self._drain_deadline: float | None = None
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()
        self._digest: ModelDigest | None = None
        self._vram_total_bytes = 0
        self._preparing: dict[tuple[str, int], asyncio.Future[None]] = {}
        self._throughput = Throughput()
        self._supervisor = Supervisor(
            settings.engine_module,
            settings.engine_arguments(),
            folder.path,
            self,
            self._clock,
            stall_timeout_s=settings.engine_stall_timeout,
            load_timeout_s=settings.load_timeout,
        )
        self.metrics = WorkerMetrics(self._live_state)
        self.generations = Generations(
            self._supervisor,
            self.metrics,
            self._clock,
            tokenizer.token_text,
            orphan_grace_s=settings.orphan_grace_ms / 1000,
        )
        self._renderer = (
            TemplateRenderer(tokenizer.chat_template, tokenizer.named_tokens) if tokenizer.chat_template else None
        )
        self._validator = Validator(tokenizer, self._renderer, folder.name)
        self._registration = (
            Registration(settings.orchestrator, self, key=settings.key.get_secret_value() if settings.key else None)
            if settings.orchestrator
            else None
        )

    async def run(self) -> int:
        """Serve until `stop`; the process' exit status."""
        async with asyncio.TaskGroup() as group, serving(group, self._app(), self._sock):
            tasks = [
                group.create_task(self._supervise()),
                group.create_task(self._tick_forever()),
                group.create_task(self._inspect()),
            ]
            if self._renderer is not None:
                tasks.append(group.create_task(self._renderer.warm_up()))
            if self._registration is not None:
                tasks.append(group.create_task(self._registration.run()))
            try:
                await self._stopping.wait()
                await self._finish_work()
            finally:
                for task in tasks:
                    task.cancel()
                if self._renderer is not None:
                    await self._renderer.aclose()
        self._remove_ready_file()
        return self.exit_code

    def stop(self) -> None:
        """Drain and end; the second call doesn't wait for running work."""
        if self._stopping.is_set():
            self._hurry.set()
        self._stopping.set()

    # -- for the server -------------------------------------------------------------------------------------------

    async def start(self, request: ExecuteRequest, correlation_id: str) -> Generation:
        """Start a new attempt. Raises Refused: 503 where this worker can't take it now, 409, 400."""
        key = (request.task_id, request.attempt)
        if (other := self._preparing.get(key)) is not None:
            await asyncio.shield(other)
            if (generation := self.generations.find(*key)) is not None:
                return generation
        self._check_accepting()
        self.generations.check_startable(*key)
        with self.generations.reserve_slot(request.task_id), self._announce(key):
            ready = self._supervisor.ready
            assert ready is not None
            job = await self._validator.prepare(request, ready)
            self._check_accepting()  # much can happen while a long prompt is tokenized
            instance_id = self._supervisor.instance_id
            assert instance_id is not None
            started = WorkerStartedEvent(
                task_id=request.task_id,
                attempt=request.attempt,
                instance_id=instance_id,
                tokens_in=len(job.sequence.prompt_token_ids),
                determinism=ready.determinism,
            )
            return self.generations.start(job, started, correlation_id)

    def health(self) -> WorkerHealth:
        """State of this worker, from memory."""
        ready, supervisor = self._supervisor.ready, self._supervisor
        return WorkerHealth(
            status=self.status,
            worker_id=self.worker_id,
            instance_id=supervisor.instance_id,
            model=self._folder.name,
            model_digest=None if self._digest is None else self._digest.value,
            device=None if ready is None else ready.device,
            dtype=None if ready is None else ready.dtype,
            attention=None if ready is None else ready.attention,
            determinism=None if ready is None else ready.determinism,
            vram_bytes=supervisor.stats.vram_bytes or (0 if ready is None else ready.vram_bytes),
            context_length=0 if ready is None else ready.context_length,
            slots_total=0 if ready is None else ready.slots_total,
            slots_free=self._slots_offered(),
            kv_blocks_total=0 if ready is None else ready.kv_blocks_total,
            kv_blocks_free=self._kv_blocks_free(),
            uptime_s=round(self._clock() - self._started_at, 3),
            version=_version(),
            detail=supervisor.detail or (ready.attention_notice or None if ready is not None else None),
            engine_restarts=supervisor.restarts,
        )

    def drain(self, deadline_s: float | None) -> None:
        """Take no new work; what runs at the deadline yields (None: it may take as long as it wants)."""
        self._draining = True
        self._drain_deadline = None if deadline_s is None else self._clock() + deadline_s
        self._changed()

    def undrain(self) -> None:
        """Take work again."""
        self._draining = self._drain_ordered = False
        self._drain_deadline = None
        self._changed()

    def shut_down(self) -> None:
        """Drain, deregister, end."""
        if self._registration is not None:
            self._registration.leave_at_end = True
        self.stop()

    # -- for the registration -------------------------------------------------------------------------------------

    @property
    def status(self) -> WorkerStatus:
        """What this worker is to the outside."""
        state = self._supervisor.state
        if state == "ready" and self._digest is None:
            return "starting"  # a worker that can't say which weights it runs isn't ready
        return "draining" if state == "ready" and (self._draining or self._stopping.is_set()) else state

    def registration(self) -> WorkerRegistration | None:
        """What to register with; None while no engine has come up yet."""
        ready, instance_id = self._supervisor.ready, self._supervisor.instance_id
        if ready is None or instance_id is None or self._digest is None or self._supervisor.state != "ready":
            return None
        flags = ready.capabilities
        features = [name for name in flags.__struct_fields__ if getattr(flags, name)]
        if self._renderer is not None:
            features.append("chat")
        return WorkerRegistration(
            worker_id=self.worker_id,
            instance_id=instance_id,
            url=self.url,
            pool=self._settings.pool,
            model=self._folder.name,
            model_digest=self._digest.value,
            dtype=ready.dtype,
            device=ready.device,
            vram_total_bytes=self._vram_total_bytes if ready.device.startswith("cuda") else 0,
            vram_used_bytes=ready.vram_bytes,
            context_length=ready.context_length,
            slots_total=ready.slots_total,
            kv_blocks_total=ready.kv_blocks_total,
            kv_block_tokens=ready.kv_block_tokens,
            determinism=ready.determinism,
            attention=ready.attention,
            features=features,
            version=_version(),
            protocol_version=PROTOCOL_VERSION,
        )

    def heartbeat(self) -> Heartbeat:
        """What runs here now."""
        return Heartbeat(
            instance_id=self._supervisor.instance_id or "none",
            status=self.status,
            running=self.generations.running(),
            slots_free=self._slots_offered(),
            kv_blocks_free=self._kv_blocks_free(),
            tokens_per_second=self._throughput.tokens_per_second,
            vram_used_bytes=self._supervisor.stats.vram_bytes,
        )

    def obey(self, orders: Orders) -> None:
        """Do what a heartbeat's answer says."""
        for attempt in orders.cancel:
            self.generations.cancel(attempt.task_id, attempt.attempt, "cancel")
        if orders.drain and not self._draining:
            self._drain_ordered = True
            self.drain(None)
        elif not orders.drain and self._drain_ordered:
            self.undrain()

    # -- for the supervisor ---------------------------------------------------------------------------------------

    def engine_ready(self, instance_id: str, ready: EngineReady) -> None:
        """A new engine instance takes work."""
        self.generations.slots_total = ready.slots_total
        self._log.info(
            "engine ready",
            instance_id=instance_id,
            device=ready.device,
            dtype=ready.dtype,
            attention=ready.attention,
            notice=ready.attention_notice,
            slots=ready.slots_total,
            context_length=ready.context_length,
        )
        self._announce_ready()

    def engine_step(self, output: StepOutput) -> None:
        """One step's tokens."""
        self._throughput.add(len(output.tokens))
        self.generations.step(output)

    def engine_down(self, message: str) -> None:
        """Everything that ran ends with an error; the orchestrator continues it elsewhere."""
        self.generations.engine_down(message)

    def engine_state(self) -> None:
        """Tell whoever watches."""
        if self._supervisor.state != "ready" and self._supervisor.detail is not None:
            self._log.info("engine", state=self._supervisor.state, detail=self._supervisor.detail)
        self._changed()

    # -- inside ---------------------------------------------------------------------------------------------------

    def _check_accepting(self) -> None:
        status = self.status
        if status == "draining":
            raise unavailable(ErrorCode.DRAINING, "this worker takes no new work; ask another")
        if status != "ready":
            code = STARTING if status == "starting" else FAILED
            raise unavailable(code, f"the engine isn't ready: {self._supervisor.detail or status}")

    @contextmanager
    def _announce(self, key: tuple[str, int]) -> Generator[None]:
        """Let the same attempt, should it come twice at a time, wait for the first."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._preparing[key] = done
        try:
            yield
        finally:
            if self._preparing.get(key) is done:
                del self._preparing[key]
            done.set_result(None)

    def _slots_offered(self) -> int:
        return self.generations.slots_free if self.status == "ready" else 0

    def _kv_blocks_free(self) -> int:
        ready, stats = self._supervisor.ready, self._supervisor.stats
        if ready is None or self._supervisor.state != "ready":
            return 0
        return ready.kv_blocks_total if stats.steps == 0 else stats.kv_blocks_free

    def _live_state(self) -> LiveState:
        ready = self._supervisor.ready
        return LiveState(
            status=self.status,
            slots_total=0 if ready is None else ready.slots_total,
            slots_used=self.generations.slots_used,
            running=self.generations.num_running,
            streams=self.generations.num_readers,
            retained=self.generations.num_retained,
            kv_blocks_total=0 if ready is None else ready.kv_blocks_total,
            engine_restarts=self._supervisor.restarts,
            tokens_per_second=self._throughput.tokens_per_second,
            engine=self._supervisor.stats,
        )

    def _changed(self) -> None:
        if self._registration is not None:
            self._registration.wake()

    async def _supervise(self) -> None:
        failure = await self._supervisor.run()
        self._log.error("the model can't be loaded", code=failure.code, detail=failure.message)
        if self._supervisor.restarts == 0 and not self._settings.stay_on_load_failure:
            self.exit_code = 1
            self._hurry.set()
            self._stopping.set()

    async def _tick_forever(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now = self._clock()
            self._throughput.tick(now)
            self.generations.tick()
            if self._drain_deadline is not None and now >= self._drain_deadline:
                self._drain_deadline = None
                self._preempt_all()
            if self.status != "ready":
                self._idle_since = now
            idle_s = now - max(self.generations.busy_at, self._idle_since)
            if self._settings.idle_timeout is not None and idle_s > self._settings.idle_timeout:
                self._log.info("idle, ending", idle_s=round(idle_s))
                self.shut_down()

    async def _inspect(self) -> None:
        device = self._settings.device or "cuda"
        self._vram_total_bytes = await asyncio.to_thread(vram.total_bytes, device)
        self._digest = await asyncio.to_thread(digest, self._folder.path)
        self._log.info("model digest", digest=self._digest.value, method=self._digest.method)
        self._announce_ready()

    def _announce_ready(self) -> None:
        """Once the engine is ready and the digest known, in whichever order; again after each restart."""
        if self.status == "ready":
            self._write_ready_file()
            self._changed()

    def _preempt_all(self) -> None:
        count = self.generations.preempt_all()
        if count:
            self._log.info("running work yields", generations=count)

    async def _finish_work(self) -> None:
        """Let running work end, or yield at the deadline; let its readers read; say goodbye."""
        self._changed()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.drain_timeout):
                while self.generations.num_running and not self._hurry.is_set():  # noqa: ASYNC110
                    await asyncio.sleep(0.02)  # polled: two conditions, and it matters only at the end
        self._preempt_all()
        with suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_DEADLINE_S):
                while self.generations.num_readers and not self._hurry.is_set():  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        if self._registration is not None:
            await self._registration.say_goodbye()

    def _app(self) -> ASGIApp:
        key = self._settings.key
        secret = None if key is None else key.get_secret_value()
        return build_app(self, key=secret, max_body_bytes=self._settings.max_body_bytes)

    def _write_ready_file(self) -> None:
        """Atomically, so that whoever polls it never reads half of it."""
        path = self._settings.ready_file
        if path is None:
            return
        content = {
            "worker_id": self.worker_id,
            "url": self.url,
            "pid": os.getpid(),
            "instance_id": self._supervisor.instance_id,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        with draft.open("w", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)

    def _remove_ready_file(self) -> None:
        path = self._settings.ready_file
        if path is not None:
            with suppress(OSError, ValueError):
                if json.loads(path.read_text("utf-8")).get("pid") == os.getpid():
                    path.unlink()


def _version() -> str:
    try:
        return version("llorch")
    except PackageNotFoundError:
        return ""
