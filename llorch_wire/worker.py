"""What orchestratord and a worker say to each other, besides the events of a generation.

Read `ExecuteRequest` first: it starts, continues or re-attaches to one attempt of a task.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias
from urllib.parse import urlsplit

from pydantic import AfterValidator, ConfigDict, Field, StringConstraints, model_validator

from llorch_wire.events import Determinism
from llorch_wire.tasks import (
    INT64_MAX,
    ChatMessage,
    Identifier,
    Model,
    PromptText,
    SamplingFields,
    TaskId,
    TokenId,
)

WorkerStatus: TypeAlias = Literal["starting", "ready", "draining", "failed"]
WorkerId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]


def _worker_url(url: str) -> str:
    """`url`, if a connection can be tried there. Raises ValueError."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        if ":" not in host:  # an IPv6 address was checked by urlsplit
            host = host.encode("idna").decode()
    except ValueError:
        host, port = "", 0
    if not host or port == 0 or not {"@", "?", "#", "\\"}.isdisjoint(url):
        raise ValueError("must be http(s)://host[:port], as orchestratord reaches it")
    return url


WorkerUrl = Annotated[
    str, StringConstraints(pattern=r"^https?://[^\s/]+$", max_length=512), AfterValidator(_worker_url)
]


class Reply(Model):
    """Base of messages that a newer peer may extend: unknown fields are ignored, so that versions can differ by one."""

    model_config = ConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True)


class WorkerRegistration(Reply):
    """Body of `POST /v2/workers/register`. `instance_id` is new at every engine start."""

    worker_id: WorkerId
    instance_id: Identifier
    url: WorkerUrl
    pool: Identifier = "local"
    model: Identifier
    model_digest: Identifier
    dtype: Identifier
    device: Identifier
    vram_total_bytes: int = Field(0, ge=0)
    vram_used_bytes: int = Field(0, ge=0)
    context_length: int = Field(ge=1)
    slots_total: int = Field(ge=1, le=65536)
    kv_blocks_total: int = Field(0, ge=0)
    kv_block_tokens: int = Field(0, ge=0)
    determinism: Determinism = "prefix"
    attention: str = ""
    features: list[str] = Field(default_factory=list, max_length=64)
    version: str = ""
    protocol_version: int = 1


class RegisterReply(Reply):
    """How often to heartbeat, for how long silence is forgiven, and every replica's URL."""

    lease_ms: int
    heartbeat_ms: int
    replicas: list[str]


class RunningAttempt(Reply):
    """One generation in a worker: `index` is the index of the next token it will emit."""

    task_id: str
    attempt: int
    index: int


class Heartbeat(Reply):
    """Body of `POST /v2/workers/{id}/heartbeat`. 404 means: register again."""

    instance_id: Identifier
    status: WorkerStatus = "ready"
    running: list[RunningAttempt] = Field(default_factory=list)
    slots_free: int = 0
    kv_blocks_free: int = 0
    tokens_per_second: float = 0.0
    vram_used_bytes: int = 0


class AttemptRef(Reply):
    """Names one attempt of a task."""

    task_id: str
    attempt: int


class Orders(Reply):
    """What the orchestrator wants of a worker."""

    drain: bool = False
    cancel: list[AttemptRef] = Field(default_factory=list)


class HeartbeatReply(Reply):
    """Answer to a heartbeat."""

    orders: Orders
    replicas: list[str]
    lease_ms: int
    heartbeat_ms: int


class ExecuteRequest(SamplingFields):
    """Body of a worker's `POST /execute`.

    - New attempt: prompt | messages | prompt_token_ids, sampling, seed, `resume_token_ids` (tokens already generated:
      generation continues at index len(resume_token_ids); max_tokens counts them).
    - The same task_id and attempt again re-attaches to the generation, `?after=<i>` skips tokens up to index i (-1:
      none). Where that generation has another seed, or began further on than what is asked for, a failover has undone
      it: a start replaces it, an attach is 404.
    - `attach_instance_id` set: attach only; another instance or an unknown attempt is 404 and starts nothing.
    - A higher attempt fences a lower one of the same task.
    """

    task_id: TaskId
    attempt: int = Field(ge=1, le=2**53)
    model: Identifier | None = None
    prompt: PromptText | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=4096)
    prompt_token_ids: list[TokenId] | None = Field(None, min_length=1, max_length=2**20)
    seed: int = Field(0, ge=-(2**63), le=INT64_MAX)
    resume_token_ids: list[TokenId] = Field(default_factory=list, max_length=2**20)
    cache_salt: str = Field("", max_length=256)
    attach_instance_id: Identifier | None = None

    @model_validator(mode="after")
    def _one_input(self) -> ExecuteRequest:
        given = [n for n in ("prompt", "messages", "prompt_token_ids") if getattr(self, n) is not None]
        if self.attach_instance_id is None and len(given) != 1:
            got = " and ".join(given) if given else "none of them"
            raise ValueError(f"exactly one of prompt, messages and prompt_token_ids is needed; got {got}")
        return self


class CancelRequest(Model):
    """Body of a worker's `POST /cancel`. `preempt` ends the run with a `preempted` event at a token boundary."""

    task_id: TaskId
    attempt: int = Field(ge=1, le=2**53)
    reason: Literal["cancel", "preempt", "fenced", "deadline"] = "cancel"


class CancelReply(Reply):
    """`found` is false when no such attempt ran; it is remembered and refused should its /execute come later."""

    found: bool
    tokens_out: int = 0


class AckRequest(Model):
    """Body of a worker's `POST /ack`: the terminal event of this attempt is safe in the log and may be forgotten."""

    task_id: TaskId
    attempt: int = Field(ge=1, le=2**53)


class DrainRequest(Model):
    """Body of a worker's `POST /drain` and of `POST /v2/workers/{id}/drain`."""

    deadline_ms: int = Field(30_000, ge=0, le=24 * 3600 * 1000)


class WorkerHealth(Reply):
    """Answer of a worker's `GET /health`, given while the engine is busy, loading or gone."""

    status: WorkerStatus
    worker_id: str
    instance_id: str | None = None
    model: str
    model_digest: str | None = None
    device: str | None = None
    dtype: str | None = None
    attention: str | None = None
    determinism: Determinism | None = None
    vram_bytes: int = 0
    context_length: int = 0
    slots_total: int = 0
    slots_free: int = 0
    kv_blocks_total: int = 0
    kv_blocks_free: int = 0
    uptime_s: float = 0.0
    version: str = ""
    detail: str | None = None
    """Why it is starting or failed, in words: load progress, the engine's last error, what to do."""
    engine_restarts: int = 0
