"""The worker as a whole: one engine under supervision, its generations, the HTTP server, and the registration.

Read `Worker.run` first. Everything long-lived is a task of its group; `stop` is the only way out, besides an engine
that can't ever be loaded.

    starting ──engine ready──▶ ready ──drain──▶ draining ──deadline──▶ what still runs yields ──stop──▶ end
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from contextlib import suppress

import structlog
from starlette.types import ASGIApp

from llorch_wire.worker import ExecuteRequest, Heartbeat, Orders, WorkerHealth, WorkerRegistration
from worker import ready_file, vram
from worker.engine.protocol import EngineReady, StepOutput
from worker.generation import Generation
from worker.generations import Generations
from worker.http_server import serving
from worker.intake import Intake
from worker.metrics import WorkerMetrics
from worker.model_files import ModelFilesError, ModelFolder, digest
from worker.own_log import OwnLog
from worker.portrait import Portrait
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
STDERR = 2


class Worker:
    """One llorch-worker. Make it in the main thread, bind first (`listen`), then `run`."""

    def __init__(self, settings: Settings, folder: ModelFolder, tokenizer: ModelTokenizer, sock: socket.socket) -> None:
        self._settings = settings
        self._folder = folder
        self._sock = sock
        self._clock: Callable[[], float] = time.monotonic
        self._log = structlog.get_logger("worker")
        port = sock.getsockname()[1]
        self.url = settings.advertise_url or f"http://{reachable_host(settings)}:{port}"
        self.worker_id = settings.worker_id or f"{socket.gethostname()}-{port}"
        self.exit_code = 0
        self._idle_since = self._clock()
        self._drain_ordered = False
        self._drain_deadline: float | None = None
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()
        self._registering: asyncio.Task[None] | None = None
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
        self._portrait = Portrait(
            self._supervisor,
            self._throughput,
            self._clock,
            worker_id=self.worker_id,
            url=self.url,
            pool=settings.pool,
            model=folder.name,
            chat=tokenizer.chat_template is not None,
        )
        self.metrics = WorkerMetrics(lambda: self._portrait.live_state(self.generations))
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
        validator = Validator(tokenizer, self._renderer, folder.name)
        self._intake = Intake(self.generations, self._supervisor, validator, lambda: self._portrait.status)
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
            if (log := OwnLog.behind(STDERR, self._settings.log_max_bytes)) is not None:
                tasks.append(group.create_task(log.keep_bounded(self._log)))
            if self._renderer is not None:
                tasks.append(group.create_task(self._renderer.warm_up()))
            if self._registration is not None:
                self._registering = group.create_task(self._registration.run())
                tasks.append(self._registering)
            try:
                await self._stopping.wait()
                await self._finish_work()
            finally:
                for task in tasks:
                    task.cancel()
                if self._renderer is not None:
                    await self._renderer.aclose()
        if self._settings.ready_file is not None:
            ready_file.remove(self._settings.ready_file)
        return self.exit_code

    def stop(self) -> None:
        """Drain and end; the second call doesn't wait for running work."""
        if self._stopping.is_set():
            self._hurry.set()
        self._stopping.set()
        self._portrait.draining = True

    # -- for the server -------------------------------------------------------------------------------------------

    async def start(self, request: ExecuteRequest, correlation_id: str) -> Generation:
        """Start a new attempt. Raises Refused."""
        return await self._intake.start(request, correlation_id)

    def health(self) -> WorkerHealth:
        """State of this worker, from memory."""
        return self._portrait.health(self.generations)

    def drain(self, deadline_s: float | None) -> None:
        """Take no new work; what runs at the deadline yields (None: it may take as long as it wants)."""
        self._portrait.draining = True
        self._drain_deadline = None if deadline_s is None else self._clock() + deadline_s
        self._changed()

    def undrain(self) -> None:
        """Take work again."""
        self._portrait.draining = self._stopping.is_set()
        self._drain_ordered = False
        self._drain_deadline = None
        self._changed()

    def shut_down(self) -> None:
        """Drain, deregister, end."""
        if self._registration is not None:
            self._registration.leave_at_end = True
        self.stop()

    # -- for the registration -------------------------------------------------------------------------------------

    def registration(self) -> WorkerRegistration | None:
        """What to register with; None while no engine is up."""
        return self._portrait.registration()

    def heartbeat(self) -> Heartbeat:
        """What runs here now."""
        return self._portrait.heartbeat(self.generations)

    def obey(self, orders: Orders) -> None:
        """Do what a heartbeat's answer says."""
        for attempt in orders.cancel:
            self.generations.cancel(attempt.task_id, attempt.attempt, "cancel")
        if orders.drain and not self._portrait.draining:
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

    def _changed(self) -> None:
        if self._registration is not None:
            self._registration.wake()

    async def _supervise(self) -> None:
        failure = await self._supervisor.run()
        if self._supervisor.ready is None and not self._settings.stay_on_load_failure:
            self._fail(f"the model can't be loaded: {failure.message}")

    async def _tick_forever(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now = self._clock()
            self._throughput.tick(now)
            self.generations.tick()
            if self._drain_deadline is not None and now >= self._drain_deadline:
                self._drain_deadline = None
                self._preempt_all()
            if self._portrait.status != "ready":
                self._idle_since = now
            idle_s = now - max(self.generations.busy_at, self._idle_since)
            if self._settings.idle_timeout is not None and idle_s > self._settings.idle_timeout:
                self._log.info("idle, ending", idle_s=round(idle_s))
                self.shut_down()

    async def _inspect(self) -> None:
        """What is known without the engine: the GPU's size and the model's digest. Both read from slow places."""
        device = self._settings.device or "cuda"
        self._portrait.vram_total_bytes = await asyncio.to_thread(vram.total_bytes, device)
        try:
            found = await asyncio.to_thread(digest, self._folder.path, self._stopping.is_set)
        except ModelFilesError as error:
            if not self._stopping.is_set():
                self._fail(str(error))
            return
        self._portrait.digest = found.value
        self._log.info("model digest", digest=found.value, method=found.method)
        self._announce_ready()

    def _fail(self, reason: str) -> None:
        """End the process: it can't ever serve."""
        self._log.error("giving up", reason=reason)
        self.exit_code = 1
        self._hurry.set()
        self._stopping.set()

    def _announce_ready(self) -> None:
        """Once the engine is ready and the digest known, in whichever order; again after each restart."""
        if self._portrait.status == "ready":
            path = self._settings.ready_file
            if path is not None:
                try:
                    ready_file.write(
                        path, worker_id=self.worker_id, url=self.url, instance_id=self._supervisor.instance_id
                    )
                except OSError as error:
                    self._log.error("the ready file can't be written", path=str(path), reason=error.strerror)
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
            # In a hurry too: it is bounded, and without it the orchestrator would wait for the lease to run out. No
            # heartbeat may come after it: that would be answered with "unknown", and the worker register once more.
            if self._registering is not None:
                self._registering.cancel()
            with suppress(TimeoutError):
                await self._registration.say_goodbye()

    def _app(self) -> ASGIApp:
        key = self._settings.key
        secret = None if key is None else key.get_secret_value()
        return build_app(self, key=secret, max_body_bytes=self._settings.max_body_bytes)
