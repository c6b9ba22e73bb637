"""A worker without a model: it speaks the whole protocol, and its tokens derive from (seed, position) alone.

    python -m tests.support.scripted_worker --port 0 --orchestrator URL --worker-id w1 --slots 8 --token-ms 5

One loop makes a token for every running generation each `token_ms`, as an engine does. `expected` says what a task must
yield, whoever generates it. `GET /scripted/stats` counts; `GET /scripted/computed` lists what each attempt computed, so
that a test can show that no position was computed twice. A prompt may begin with a directive, for faults of its own:

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from pydantic import ValidationError

from llorch_wire.events import (
    EndEvent,
    ErrorEvent,
    PreemptedEvent,
    TokenEvent,
    WorkerStartedEvent,
    encode_data,
)
from llorch_wire.sse import HEADERS, KEEP_ALIVE, MEDIA_TYPE, frame
from llorch_wire.worker import AckRequest, CancelRequest, DrainRequest, ExecuteRequest
from orchestratord.patience import end_tasks

VOCABULARY = 4_096
EOS_ID = 2
KEEP_ALIVE_S = 0.5


def mix(seed: int, position: int) -> int:
    """64 well-mixed bits of (seed, position): splitmix64's finalizer (Steele, Lea, Flood: OOPSLA 2014)."""
    z = (seed * 0x9E3779B97F4A7C15 + position * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def length(seed: int, max_tokens: int, ignore_eos: bool) -> int:
    """How many tokens a task yields: all that it may, or fewer, by its seed."""
    return max_tokens if ignore_eos or mix(seed, -1) % 4 == 0 else 1 + mix(seed, -2) % max_tokens


def token(seed: int, index: int, last: int, ends_by_eos: bool) -> TokenEvent:
    """The token at an index. The text is a word, and empty for EOS."""
    if index == last and ends_by_eos:
        return TokenEvent(t="", i=index, id=EOS_ID)
    token_id = 3 + mix(seed, index) % (VOCABULARY - 3)
    return TokenEvent(t=f" w{token_id}", i=index, id=token_id)


def expected(seed: int, max_tokens: int, *, ignore_eos: bool = False) -> tuple[list[TokenEvent], str]:
    """Every token of an undisturbed task, and its stop reason."""
    count = length(seed, max_tokens, ignore_eos)
    by_eos = count < max_tokens
    tokens = [token(seed, index, count - 1, by_eos) for index in range(count)]
    return tokens, "EOS" if by_eos else "MAX_TOKENS"


@dataclass
class Generation:
    """One attempt."""

    request: ExecuteRequest
    first_index: int
    total: int
    by_eos: bool
    directive: list[str]
    frames: list[bytes] = field(default_factory=list)
    terminal: bool = False
    next_index: int = 0
    readers: int = 0
    unread_since: float = 0.0
    mute: bool = False
    """Fault: connections stay open and give nothing, not even comments; new ones are as mute."""
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def publish(self, *frames: bytes, terminal: bool = False) -> None:
        """New output; wakes every reader."""
        self.frames += frames
        self.terminal = self.terminal or terminal
        news, self.news = self.news, asyncio.Event()
        news.set()


class ScriptedWorker:
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
        self.worker_id, self.model, self.pool, self.slots = worker_id, model, pool, slots
        self.token_s, self.host, self.port = token_ms / 1000, host, port
        self.orphan_grace_s, self.key, self.digest, self.dtype = orphan_grace_s, key, digest, dtype
        self.heartbeats = heartbeats
        self.instance_id = uuid.uuid4().hex
        self.draining = False
        self.frozen = False
        self.generations: dict[str, Generation] = {}
        self.cancelled: dict[tuple[str, int], None] = {}
        self.computed: list[Generation] = []
        self.counts = {"executes": 0, "attaches": 0, "cancels": 0, "preempts": 0, "acks": 0, "tokens": 0, "orphans": 0}
        self.standalone = False
        self._runner: web.AppRunner | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._restarting: asyncio.Task[None] | None = None
        self._thawed = asyncio.Event()
        self._thawed.set()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{self.host}:{self.port}"

    @property
    def running(self) -> list[Generation]:
        """Generations that hold a slot."""
        return [generation for generation in self.generations.values() if not generation.terminal]

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
        self._tasks = [asyncio.create_task(self._engine()), asyncio.create_task(self._grace())]
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
            self._thawed.set()
            await self._runner.cleanup()
            self._runner = None
        self.generations.clear()
        self.cancelled.clear()

    async def restart(self) -> None:
        """Come back at the same address and id as another instance."""
        await self.die()
        self.instance_id = uuid.uuid4().hex
        self.frozen = False
        self._thawed.set()
        await self.start()

    def freeze(self) -> None:
        """As by SIGSTOP: sockets stay open, nothing is answered, nothing comes."""
        self.frozen = True
        self._thawed.clear()

    def thaw(self) -> None:
        """As by SIGCONT."""
        self.frozen = False
        self._thawed.set()

    # ---- the engine

    async def _engine(self) -> None:
        while True:
            await asyncio.sleep(self.token_s)
            await self._thawed.wait()
            for generation in self.running:
                self._step(generation)

    def _step(self, generation: Generation) -> None:
        request, index = generation.request, generation.next_index
        made = index - generation.first_index
        match generation.directive:
            case ["stall", after] if made >= int(after):
                return
            case ["error", code, after] if made >= int(after):
                event = ErrorEvent(code=code, message="scripted failure", retriable=code in ("INTERNAL", "VRAM_OOM"))
                generation.publish(frame(event.EVENT, encode_data(event)), terminal=True)
                return
            case ["exit", after] if made >= int(after):
                if self.standalone:
                    os._exit(70)
                generation.directive = ["stall", "0"]
                self._restarting = asyncio.create_task(self.restart())
                return
        if index < generation.total:
            event = token(request.seed, index, generation.total - 1, generation.by_eos)
            generation.next_index += 1
            self.counts["tokens"] += 1
            generation.publish(frame("token", encode_data(event)))
        if generation.next_index >= generation.total:
            self._end(generation, "EOS" if generation.by_eos else "MAX_TOKENS")

    @staticmethod
    def _end(generation: Generation, reason: Any) -> None:
        event = EndEvent(
            stop_reason=reason,
            tokens_in=prompt_tokens(generation.request),
            tokens_out=generation.next_index,
            determinism="exact",
        )
        generation.publish(frame(event.EVENT, encode_data(event)), terminal=True)

    async def _grace(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(0.2)
            await self._thawed.wait()
            for task_id, generation in list(self.generations.items()):
                if generation.readers == 0 and loop.time() - generation.unread_since > self.orphan_grace_s:
                    self.counts["orphans"] += 1
                    self._end(generation, "CANCELLED")
                    del self.generations[task_id]

    # ---- what it answers

    @web.middleware
    async def _gate(self, request: web.Request, handler: Any) -> web.StreamResponse:
        await self._thawed.wait()
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return _refuse(401, "UNAUTHORIZED", "authorization", "wrong key")
        return await handler(request)

    async def _execute(self, request: web.Request) -> web.StreamResponse:
        try:
            body = ExecuteRequest.model_validate_json(await request.read())
        except ValidationError:
            return _refuse(400, "INVALID_PARAMS", "body", "not an execute request")
        known = self.generations.get(body.task_id)
        generation = known if known is not None and known.request.attempt == body.attempt else None
        if body.attach_instance_id is not None:
            if generation is None or body.attach_instance_id != self.instance_id:
                return _refuse(404, "NOT_FOUND", "attempt", "no such generation here")
            self.counts["attaches"] += 1
        elif generation is None:
            refused = self._refusal(body, known)
            if refused is not None:
                return refused
            generation = self._begin(body)
        after = int(request.query.get("after", generation.first_index - 1))
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
            self._yield(known)
        if self.draining or len(self.running) >= self.slots:
            return _refuse(503, "DRAINING" if self.draining else "OVERLOADED", "slots", "no free slot")
        return None

    def _begin(self, body: ExecuteRequest) -> Generation:
        max_tokens = body.max_tokens or 64
        total = length(body.seed, max_tokens, body.ignore_eos)
        resumed = len(body.resume_token_ids)
        wanted = [token(body.seed, i, total - 1, total < max_tokens).id for i in range(resumed)]
        assert wanted == list(body.resume_token_ids), "resumed with tokens that this seed doesn't give"
        generation = Generation(body, resumed, total, total < max_tokens, directive_of(body), next_index=resumed)
        generation.unread_since = asyncio.get_running_loop().time()
        self.generations[body.task_id] = generation
        self.computed.append(generation)
        self.counts["executes"] += 1
        if resumed >= total:
            self._end(generation, "EOS" if generation.by_eos else "MAX_TOKENS")
        return generation

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
                await self._thawed.wait()
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
                self._yield(generation)
            else:
                self._end(generation, "CANCELLED")
        elif body.reason != "preempt":
            self.cancelled[body.task_id, body.attempt] = None
        return web.json_response({"found": found, "tokens_out": generation.next_index if generation else 0})

    @staticmethod
    def _yield(generation: Generation) -> None:
        if not generation.terminal:
            event = PreemptedEvent(tokens_out=generation.next_index)
            generation.publish(frame(event.EVENT, encode_data(event)), terminal=True)

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

    def computed_ranges(self) -> list[tuple[str, int, int, int]]:
        """(task_id, attempt, first index, index after the last) of every attempt that ran here."""
        return [(g.request.task_id, g.request.attempt, g.first_index, g.next_index) for g in self.computed]

    # ---- registration

    async def _beat(self) -> None:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        timeout = aiohttp.ClientTimeout(total=1.5)
        async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
            registered, turn, interval_s = False, 0, 1.0
            while True:
                await self._thawed.wait()
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
                self._end(generation, "CANCELLED")

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


def prompt_tokens(request: ExecuteRequest) -> int:
    """A count that any worker gives alike."""
    if request.prompt_token_ids is not None:
        return len(request.prompt_token_ids)
    text = request.prompt or "".join(message.text() for message in request.messages or ())
    return max(1, len(text) // 4)


def directive_of(request: ExecuteRequest) -> list[str]:
    """The words after `!` of a prompt's first line."""
    first = (request.prompt or "").split("\n", 1)[0]
    return first[1:].split() if first.startswith("!") else []


def _refuse(status: int, code: str, field_name: str, message: str, constraint: str = "") -> web.Response:
    fault = {"field": field_name, "constraint": constraint or code.lower(), "message": message}
    return web.json_response({"errors": [fault], "code": code}, status=status)


def main() -> None:
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
    asyncio.run(_serve(arguments))


async def _serve(arguments: argparse.Namespace) -> None:
    worker = ScriptedWorker(
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
