"""The daemon put together: Redis, store, orchestrator, HTTP server and jobs in one task group. Read `serve` first.

who ends first            then
SIGTERM, SIGINT           not ready → streams end → running tasks handed over → server closed → exit 0
the same signal again     exit at once (130); tasks are adopted when this replica's lease has expired
orchestrator or server    an unexpected failure: everything else is cancelled, exit 1
the embedded Redis        restarted by its supervisor; the store reconnects
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from llorch_wire.errors import LlorchError
from llorch_wire.layers import SettingsError
from orchestratord.api.app import create_app
from orchestratord.api.server import BoundedServer, bind, make_server
from orchestratord.embedded_redis import EmbeddedRedis
from orchestratord.jobs.retention import Retention
from orchestratord.jobs.runner import Jobs
from orchestratord.jobs.webhooks import WebhookPolicy, Webhooks
from orchestratord.logging import describe_exception
from orchestratord.metrics import Metrics
from orchestratord.observations import Observations
from orchestratord.patience import end_tasks
from orchestratord.runtime import Orchestrator, RuntimeSettings
from orchestratord.settings import Settings, redacted_url
from orchestratord.store.errors import StoreUnavailableError
from orchestratord.store.store import Store
from orchestratord.store.types import QueueLimits

SERVER_GRACE_S = 2.0
LAST_CALLS_S = 1.0
"""A request that waits for Redis when the server closes gets its 503 after this, while there is time to send it."""
CONNECT_PAUSE_S = 0.5
EXIT_AT_ONCE = 130


@dataclass(frozen=True, slots=True)
class Parts:
    """What runs together in one daemon."""

    orchestrator: Orchestrator
    server: BoundedServer
    jobs: Jobs
    listener: socket.socket
    url: str
    store: Store


async def serve(settings: Settings) -> int:
    """Run until a signal. Returns the exit status. Raises SettingsError when it can't start as asked."""
    log = structlog.get_logger("orchestratord")
    _remove(settings.ready_file)
    listener = _bind(settings)
    url = settings.advertise_url or _url_of(listener)
    stopping = asyncio.Event()
    _on_signals(stopping)
    asyncio.get_running_loop().set_exception_handler(_on_loop_trouble)
    failure: BaseException | None = None
    try:
        with contextlib.closing(listener):
            await _live(settings, listener, url, stopping)
    except LlorchError:
        raise
    except Exception as error:
        failure = error.exceptions[0] if isinstance(error, ExceptionGroup) and len(error.exceptions) == 1 else error
    finally:
        _remove(settings.ready_file)
    if isinstance(failure, LlorchError):
        raise failure
    if failure is not None:
        log.error("stopped by a failure", **describe_exception(failure))
        return 1
    log.info("stopped")
    return 0


async def _live(settings: Settings, listener: socket.socket, url: str, stopping: asyncio.Event) -> None:
    """Build every part, run them, take them down in reverse."""
    async with contextlib.AsyncExitStack() as stack:
        redis_url = await stack.enter_async_context(_redis(settings))
        store = await _connect(redis_url, stopping)
        if store is None:
            return
        stack.push_async_callback(store.aclose)
        observations = Observations()
        orchestrator = Orchestrator(store, runtime_settings(settings, url), observations)
        metrics = Metrics(observations, [tenant.name for tenant in settings.tenants()])
        app = create_app(orchestrator, settings, metrics)
        jobs = _jobs(settings, redis_url, store, orchestrator, observations)
        server = make_server(app, max_connections=settings.max_connections, graceful_s=SERVER_GRACE_S)
        log = structlog.get_logger("orchestratord")
        log.info("starting", url=url, redis=redacted_url(redis_url), replica=orchestrator.replica_id)
        await _run(settings, Parts(orchestrator, server, jobs, listener, url, store), stopping)


async def _run(settings: Settings, parts: Parts, stopping: asyncio.Event) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(parts.orchestrator.run(), name="orchestrator")
        group.create_task(parts.server.serve(sockets=[parts.listener]), name="http")
        working = group.create_task(parts.jobs.run(), name="jobs")
        announcing = group.create_task(_announce(settings.ready_file, parts), name="announce")
        await stopping.wait()
        announcing.cancel()
        working.cancel()
        _remove(settings.ready_file)
        structlog.get_logger("orchestratord").info("stopping", deadline_ms=settings.drain_timeout_ms)
        await parts.orchestrator.stop(settings.drain_timeout_ms / 1000)
        parts.store.hurry(LAST_CALLS_S)
        parts.server.should_exit = True
        await end_tasks([announcing, working])


def runtime_settings(settings: Settings, url: str) -> RuntimeSettings:
    """The part of the settings that the runtime needs."""
    return RuntimeSettings(
        replica_id=settings.replica_id,
        replica_url=url,
        worker_key=settings.worker_key.get_secret_value() if settings.worker_key else None,
        replica_lease_ms=settings.replica_lease_ms,
        replica_renew_s=settings.replica_renew_ms / 1000,
        worker_lease_ms=settings.worker_lease_ms,
        worker_heartbeat_ms=settings.worker_heartbeat_ms,
        sweep_s=settings.sweep_interval_ms / 1000,
        dispatch_s=settings.dispatch_interval_ms / 1000,
        stall_s=settings.stall_timeout_ms / 1000,
        probe_s=settings.probe_timeout_ms / 1000,
        default_max_tokens=settings.default_max_tokens,
        max_failures=settings.max_failures,
        wait_for_workers=settings.when_no_workers == "wait",
        limits=QueueLimits(
            per_model=settings.max_queued_per_model,
            per_tenant=settings.max_queued_per_tenant,
            total=settings.max_queued,
            policy=settings.queue_policy,
        ),
    )


def _jobs(
    settings: Settings, redis_url: str, store: Store, orchestrator: Orchestrator, observations: Observations
) -> Jobs:
    """The background jobs, on their own Redis where one is given; in the embedded one they have a database apart."""
    url = settings.jobs_redis_url.get_secret_value() if settings.jobs_redis_url else redis_url
    if settings.jobs_redis_url is None and settings.redis_url is None:
        url += "?db=1"
    secret = settings.webhook_secret.get_secret_value() if settings.webhook_secret else None
    policy = WebhookPolicy(secret, settings.webhook_attempts, settings.allow_private_callbacks)
    webhooks = Webhooks(store, orchestrator, observations, policy)
    retention = Retention(store, observations, keep_s=settings.retention_s, keep_count=settings.retention_count)
    return Jobs(url, store, observations, webhooks, retention)


def _bind(settings: Settings) -> socket.socket:
    try:
        return bind(settings.host, settings.port)
    except OSError as error:
        reason = error.strerror or str(error)
        raise SettingsError(
            f"--host {settings.host} --port {settings.port}: can't be bound: {reason}. Choose another --port "
            "(0 takes a free one), or stop what listens there"
        ) from None


@contextlib.asynccontextmanager
async def _redis(settings: Settings) -> AsyncGenerator[str]:
    """The Redis to use: the given one, or an embedded one that lives as long as this daemon."""
    if settings.redis_url is not None:
        yield settings.redis_url.get_secret_value()
        return
    async with EmbeddedRedis(settings.data_dir, max_memory=settings.redis_memory_bytes) as embedded:
        yield embedded.url


async def _connect(url: str, stopping: asyncio.Event) -> Store | None:
    """A connected store, tried until it works; None when the daemon is stopped before. Raises StoreUrlError."""
    log = structlog.get_logger("orchestratord")
    complained = False
    while not stopping.is_set():
        try:
            return await Store.connect(url)
        except StoreUnavailableError as error:
            if not complained:
                log.warning("Redis doesn't answer yet; trying on", redis=redacted_url(url), reason=str(error))
                complained = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), CONNECT_PAUSE_S)
    return None


async def _announce(ready_file: Path | None, parts: Parts) -> None:
    """Say that requests are taken, once they are."""
    while not (parts.server.started and (await parts.orchestrator.ready())[0]):  # noqa: ASYNC110
        await asyncio.sleep(0.05)  # uvicorn tells nobody that it has started
    structlog.get_logger("orchestratord").info("ready", url=parts.url)
    if ready_file is not None:
        temporary = ready_file.with_name(f".{ready_file.name}.{os.getpid()}")
        temporary.write_text(json.dumps({"url": parts.url, "pid": os.getpid()}) + "\n", "utf-8")
        temporary.replace(ready_file)


def _on_signals(stopping: asyncio.Event) -> None:
    """First signal: stop gracefully. Second: leave at once; PDEATHSIG takes the embedded Redis along."""

    def on_signal() -> None:
        if stopping.is_set():
            os._exit(EXIT_AT_ONCE)
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)


def _on_loop_trouble(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """As the loop's own handler, which logs an error, but for one thing.

    When Redis stands still, a pipeline of arq's that watches a key can't be reset and is left to the garbage collector,
    which closes its connection and complains; Jobs has a new client by then.
    """
    if str(context.get("message")) == "Unclosed Pipeline client":
        structlog.get_logger("orchestratord.jobs").debug("a Redis pipeline was left to the garbage collector")
        return
    loop.default_exception_handler(context)


def _url_of(listener: socket.socket) -> str:
    """The URL at which the listener is reached from this machine; a wildcard address names the machine."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # noqa: S104 - read, not bound
        host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _remove(path: Path | None) -> None:
    if path is not None:
        path.unlink(missing_ok=True)
