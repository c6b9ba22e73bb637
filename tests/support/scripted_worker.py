"""A worker without a model: it speaks the whole protocol, and its tokens derive from (seed, position) alone.

    python -m tests.support.scripted_worker --port 0 --orchestrator URL --worker-id w1 --slots 8 --token-ms 5

One loop makes a token for every running generation each `token_ms`, as an engine does (scripted_engine); which ones is
known beforehand (scripted_tokens). `GET /scripted/stats` counts; `GET /scripted/computed` lists what each attempt
computed, so that a test can show that no position was computed twice. A prompt may begin with a directive, for faults
of its own:

    !refuse            400 CONTEXT_LENGTH_EXCEEDED          !error CODE N    an `error` event after N tokens
    !exit N            the process (or instance) dies       !stall N         nothing more comes after N tokens
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import uuid
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from pydantic import ValidationError

from llorch_wire.events import WorkerStartedEvent, encode_data
from llorch_wire.sse import HEADERS, KEEP_ALIVE, MEDIA_TYPE, frame
from llorch_wire.worker import AckRequest, CancelRequest, DrainRequest, ExecuteRequest
from orchestratord.patience import end_tasks
from tests.support.scripted_engine import Generation, ScriptedEngine
from tests.support.scripted_tokens import directive_of, prompt_tokens

KEEP_ALIVE_S = 0.5


class ScriptedWorker(ScriptedEngine):
    """The worker. In a test: `async with ScriptedWorker(...) as worker`; faults: `freeze`, `die`, `restart`."""

    def __init__(
        self,
        orchestrators: list[str],
        worker_id: str = "w1",
        *,
        model: str = "scripted",
        pool: str = "local",
        slots: int = 8,
        token_ms: float = 5.0,
        host: str = "127.0.0.1",
        port: int = 0,
        orphan_grace_s: float = 30.0,
        key: str | None = None,
        digest: str = "scripted-digest",
        dtype: str = "float32",
        heartbeats: bool = True,
    ) -> None:
        self.orchestrators = list(orchestrators)
        super().__init__(slots=slots, token_ms=token_ms, orphan_grace_s=orphan_grace_s)
        self.worker_id, self.model, self.pool = worker_id, model, pool
        self.host, self.port = host, port
        self.key, self.digest, self.dtype = key, digest, dtype
        self.heartbeats = heartbeats
        self.instance_id = uuid.uuid4().hex
        self.draining = False
        self.cancelled: dict[tuple[str, int], None] = {}
        self.standalone = False
        self._runner: web.AppRunner | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._restarting: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{self.host}:{self.port}"

    # ---- life

    async def __aenter__(self) -> ScriptedWorker:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._restarting is not None:
            await self._restarting
        await self.die()

    async def start(self) -> None:
        """Listen, register, work."""
        app = web.Application(client_max_size=16 * 2**20, middlewares=[self._gate])
        app.add_routes(
            [
                web.post("/execute", self._execute),
                web.post("/cancel", self._cancel),
                web.post("/ack", self._ack),
                web.post("/drain", self._drain),
                web.post("/undrain", self._undrain),
                web.post("/shutdown", self._shutdown),
                web.get("/health", self._health),
                web.get("/scripted/stats", self._stats),
                web.get("/scripted/computed", self._computed),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.0, handler_cancellation=True)
        await self._runner.setup()
        self._listener = socket.create_server((self.host, self.port))
        self.port = self._listener.getsockname()[1]
        await web.SockSite(self._runner, self._listener).start()
        self._tasks = [asyncio.create_task(self.generate()), asyncio.create_task(self.forget_unread())]
        if self.heartbeats:
            self._tasks.append(asyncio.create_task(self._beat()))

    async def die(self) -> None:
        """As by SIGKILL: nothing is said, every connection breaks, everything is forgotten."""
        await end_tasks(self._tasks)
        self._tasks = []
        if self._runner is not None:
            # No new ones, then what was just accepted gets its handler: before Python 3.12 a connection whose server is
            # closed in between is lost with its socket open.
            asyncio.get_running_loop().remove_reader(self._listener)
            for _ in range(3):
                await asyncio.sleep(0)
            for handler in list(self._runner.server.connections if self._runner.server else ()):
                if handler.transport is not None:
                    handler.transport.abort()
            self.thawed.set()
            await self._runner.cleanup()
            self._runner = None
        self.generations.clear()
        self.cancelled.clear()

    async def restart(self) -> None:
        """Come back at the same address and id as another instance."""
        await self.die()
        self.instance_id = uuid.uuid4().hex
        self.thaw()
        await self.start()

    def crash(self) -> None:
        """Die as a process does; within a test, come back at once as another instance."""
        if self.standalone:
            os._exit(70)
        self._restarting = asyncio.create_task(self.restart())

    # ---- what it answers

    @web.middleware
    async def _gate(self, request: web.Request, handler: Any) -> web.StreamResponse:
        await self.thawed.wait()
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return _refuse(401, "UNAUTHORIZED", "authorization", "wrong key")
        return await handler(request)

    async def _execute(self, request: web.Request) -> web.StreamResponse:
        try:
            body = ExecuteRequest.model_validate_json(await request.read())
        except ValidationError:
            return _refuse(400, "INVALID_PARAMS", "body", "not an execute request")
        known = self.generations.get(body.task_id)
        after = int(request.query["after"]) if "after" in request.query else None
        generation = known if known is not None and known.request.attempt == body.attempt else None
        starts = body.attach_instance_id is None
        wanted = len(body.resume_token_ids) if starts or after is None else after + 1
        if generation is not None and (generation.request.seed != body.seed or generation.first_index > wanted):
            generation = None  # of a history that a failover has undone
        if body.attach_instance_id is not None:
            if generation is None or body.attach_instance_id != self.instance_id:
                return _refuse(404, "NOT_FOUND", "attempt", "no such generation here")
            self.counts["attaches"] += 1
        elif generation is None:
            refused = self._refusal(body, known)
            if refused is not None:
                return refused
            generation = self.begin(body)
        after = generation.first_index - 1 if after is None else after
        if after >= generation.next_index:
            return _refuse(409, "CONFLICT", "after", "ahead of this generation")
        return await self._stream(request, generation, max(0, after + 1 - generation.first_index))

    def _refusal(self, body: ExecuteRequest, known: Generation | None) -> web.Response | None:
        directive = directive_of(body)
        if directive[:1] == ["refuse"]:
            return _refuse(
                400, "CONTEXT_LENGTH_EXCEEDED", "prompt", "`prompt`: 9000 tokens are too many", "context_length"
            )
        if (body.task_id, body.attempt) in self.cancelled or (known and known.request.attempt > body.attempt):
            return _refuse(409, "CONFLICT", "attempt", "cancelled or fenced")
        if known is not None:
            self.give_up(known)
        if self.draining or len(self.running) >= self.slots:
            return _refuse(503, "DRAINING" if self.draining else "OVERLOADED", "slots", "no free slot")
        return None

    async def _stream(self, request: web.Request, generation: Generation, position: int) -> web.StreamResponse:
        response = web.StreamResponse(headers={**HEADERS, "Content-Type": MEDIA_TYPE})
        try:
            await response.prepare(request)
        except ConnectionError:  # it left while this process was stopped
            return response
        started = WorkerStartedEvent(
            task_id=generation.request.task_id,
            attempt=generation.request.attempt,
            instance_id=self.instance_id,
            tokens_in=prompt_tokens(generation.request),
            determinism="exact",
        )
        generation.readers += 1
        try:
            await response.write(frame(started.EVENT, encode_data(started)))
            while True:
                while generation.mute:
                    await asyncio.sleep(0.05)
                news = generation.news
                chunk = b"".join(generation.frames[position:])
                position = len(generation.frames)
                if chunk:
                    await response.write(chunk)
                elif generation.terminal:
                    break
                else:
                    try:
                        async with asyncio.timeout(KEEP_ALIVE_S):
                            await news.wait()
                    except TimeoutError:
                        await response.write(KEEP_ALIVE)
                await self.thawed.wait()
        except ConnectionError:
            pass
        finally:
            generation.readers -= 1
            generation.unread_since = asyncio.get_running_loop().time()
        with contextlib.suppress(ConnectionError):
            await response.write_eof()
        return response

    async def _cancel(self, request: web.Request) -> web.Response:
        body = CancelRequest.model_validate_json(await request.read())
        generation = self.generations.get(body.task_id)
        found = generation is not None and generation.request.attempt == body.attempt and not generation.terminal
        self.counts["preempts" if body.reason == "preempt" else "cancels"] += 1
        if found and generation is not None:
            if body.reason == "preempt":
                self.give_up(generation)
            else:
                self.end(generation, "CANCELLED")
        elif body.reason != "preempt":
            self.cancelled[body.task_id, body.attempt] = None
        return web.json_response({"found": found, "tokens_out": generation.next_index if generation else 0})

    async def _ack(self, request: web.Request) -> web.Response:
        body = AckRequest.model_validate_json(await request.read())
        generation = self.generations.get(body.task_id)
        self.counts["acks"] += 1
        found = generation is not None and generation.request.attempt == body.attempt and generation.terminal
        if found:
            del self.generations[body.task_id]
        return web.json_response({"found": found})

    async def _drain(self, request: web.Request) -> web.Response:
        DrainRequest.model_validate_json(await request.read())
        self.draining = True
        return await self._health(request)

    async def _undrain(self, request: web.Request) -> web.Response:
        self.draining = False
        return await self._health(request)

    async def _shutdown(self, _request: web.Request) -> web.Response:
        if self.standalone:
            asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), signal.SIGTERM)
        return web.json_response({}, status=202)

    async def _health(self, _request: web.Request) -> web.Response:
        return web.json_response(
            {
                "status": "draining" if self.draining else "ready",
                "worker_id": self.worker_id,
                "instance_id": self.instance_id,
                "model": self.model,
                "slots_total": self.slots,
                "slots_free": self.slots - len(self.running),
            }
        )

    async def _stats(self, _request: web.Request) -> web.Response:
        return web.json_response({**self.counts, "running": len(self.running), "instance_id": self.instance_id})

    async def _computed(self, _request: web.Request) -> web.Response:
        return web.json_response([list(row) for row in self.computed_ranges()])

    # ---- registration

    async def _beat(self) -> None:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        timeout = aiohttp.ClientTimeout(total=1.5)
        async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
            registered, turn, interval_s = False, 0, 1.0
            while True:
                await self.thawed.wait()
                base = self.orchestrators[turn % len(self.orchestrators)]
                path = f"/v2/workers/{self.worker_id}/heartbeat" if registered else "/v2/workers/register"
                body = self._heartbeat_body() if registered else self.registration()
                try:
                    async with session.post(base + path, json=body) as reply:
                        answer = await reply.json()
                        if reply.status == 404 and registered:
                            registered = False
                            continue
                        reply.raise_for_status()
                except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
                    turn += 1
                    await asyncio.sleep(0.1)
                    continue
                registered = True
                interval_s = answer["heartbeat_ms"] / 1000
                self._learn(answer)
                await asyncio.sleep(interval_s)

    def _learn(self, answer: dict[str, Any]) -> None:
        self.orchestrators = list(dict.fromkeys([*self.orchestrators, *answer.get("replicas", [])]))
        orders = answer.get("orders")
        if orders is None:
            return
        self.draining = orders["drain"]
        for order in orders["cancel"]:
            generation = self.generations.get(order["task_id"])
            if generation is not None and generation.request.attempt == order["attempt"] and not generation.terminal:
                self.end(generation, "CANCELLED")

    def registration(self) -> dict[str, Any]:
        """Body of its registration."""
        return {
            "worker_id": self.worker_id, "instance_id": self.instance_id, "url": self.url, "pool": self.pool,
            "model": self.model, "model_digest": self.digest, "dtype": self.dtype, "device": "cpu",
            "context_length": 8192, "slots_total": self.slots, "determinism": "exact", "version": "scripted",
        }  # fmt: skip

    def _heartbeat_body(self) -> dict[str, Any]:
        running = [
            {"task_id": g.request.task_id, "attempt": g.request.attempt, "index": g.next_index} for g in self.running
        ]
        return {
            "instance_id": self.instance_id,
            "status": "draining" if self.draining else "ready",
            "running": running,
            "slots_free": self.slots - len(running),
        }


def _refuse(status: int, code: str, field_name: str, message: str, constraint: str = "") -> web.Response:
    fault = {"field": field_name, "constraint": constraint or code.lower(), "message": message}
    return web.json_response({"errors": [fault], "code": code}, status=status)


def main(kind: type[ScriptedWorker] = ScriptedWorker) -> None:
    """Run one in this process until SIGTERM."""
    parser = argparse.ArgumentParser(description="A worker without a model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--orchestrator", action="append", required=True, help="URL; may be given several times")
    parser.add_argument("--worker-id", default="w1")
    parser.add_argument("--model", default="scripted")
    parser.add_argument("--pool", default="local")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--token-ms", type=float, default=5.0)
    parser.add_argument("--orphan-grace-ms", type=int, default=30_000)
    parser.add_argument("--ready-file", type=Path)
    arguments = parser.parse_args()
    asyncio.run(_serve(kind, arguments))


async def _serve(kind: type[ScriptedWorker], arguments: argparse.Namespace) -> None:
    worker = kind(
        arguments.orchestrator,
        arguments.worker_id,
        model=arguments.model,
        pool=arguments.pool,
        slots=arguments.slots,
        token_ms=arguments.token_ms,
        host=arguments.host,
        port=arguments.port,
        orphan_grace_s=arguments.orphan_grace_ms / 1000,
        key=os.environ.get("LLORCH_WORKER_KEY") or None,
    )
    worker.standalone = True
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with worker:
        if arguments.ready_file is not None:
            ready = arguments.ready_file.with_suffix(".part")
            ready.write_text(json.dumps({"url": worker.url, "pid": os.getpid(), "worker_id": worker.worker_id}))
            ready.replace(arguments.ready_file)
        print(json.dumps({"url": worker.url, "pid": os.getpid()}), flush=True)
        await stop.wait()


if __name__ == "__main__":
    sys.exit(main())
