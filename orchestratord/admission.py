"""Admission: a validated request becomes a task for the queue, or a typed refusal. Pure: id, seed and time are given.

Read `admit` first. Refusals are ApiErrors that name the field and the way out, and never quote a prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import orjson

from llorch_wire.errors import ApiError, ErrorCode
from llorch_wire.tasks import INPUT_FIELDS, SamplingFields, TaskRequest
from orchestratord.forecast import Forecast
from orchestratord.settings import Tenant
from orchestratord.store.types import NewTask, PlacementSpec, QueueLimits, Refused, WorkerView

PREFIX_CHARS = (*range(0, 2_049, 256), 3_072, 4_096, 6_144, 8_192, 12_288, 16_384, 24_576, 32_768)
"""Where the prompt's leading pieces end, in characters: close together where system prompts end, wider later."""

CHARS_PER_TOKEN = 3
_SAMPLING = frozenset(SamplingFields.model_fields)
_CONFLICTS = {
    "conflict": (
        "this task_id or Idempotency-Key was used with another body: use a new one, or send the same body",
        "task_id",
    ),
    "conflict_pair": (
        "this task_id and this Idempotency-Key don't belong to the same task: send only one of them, or a new key",
        "task_id",
    ),
    "conflict_keys": (
        "this task was sent with too many different Idempotency-Keys: use one of those, or none",
        "Idempotency-Key",
    ),
}


@dataclass(frozen=True)
class AdmissionPolicy:
    """What admission decides by, besides the request."""

    default_max_tokens: int = 1_024
    max_prompt_bytes: int = 4 * 2**20
    wait_for_workers: bool = True


@dataclass(frozen=True)
class Drawn:
    """What the caller drew or read for this request."""

    task_id: str
    seed: int
    now_ms: int
    correlation_id: str
    idempotency_key: str | None = None
    salt: str = ""
    fingerprint: str = ""
    """Of a larger request that this one is a part of; it counts as part of the body."""
    attended_by: str | None = None
    """The replica whose client streams the task from the beginning."""


def admit(
    request: TaskRequest,
    tenant: Tenant,
    policy: AdmissionPolicy,
    drawn: Drawn,
    *,
    known_models: Collection[str],
    workers: Sequence[WorkerView],
    forecast: Forecast | None,
    ms_per_token: float | None,
) -> NewTask:
    """The task as it will stand in the queue.

    `workers` are all that are registered, `forecast` is when a task admitted now would start (None: nothing measured).
    Raises ApiError MODEL_NOT_FOUND, INVALID_PARAMS, NO_WORKERS, DEADLINE_UNMET, PAYLOAD_TOO_LARGE.
    """
    check_model(request.model, known_models)
    _check_placement(request, workers, policy)
    max_tokens = _max_tokens(request, policy)
    _check_deadline(request, max_tokens, forecast, ms_per_token)
    payload = _payload(request, max_tokens, cache_salt=_digest(f"{tenant.name}\0{drawn.salt}".encode()))
    if len(payload) > policy.max_prompt_bytes:
        raise ApiError(
            ErrorCode.PAYLOAD_TOO_LARGE,
            f"the prompt is larger than {policy.max_prompt_bytes} bytes: shorten it",
            param=_input_field(request),
        )
    return NewTask(
        task_id=request.task_id or drawn.task_id,
        tenant=tenant.name,
        weight=tenant.weight,
        model=request.model,
        priority=request.priority,
        payload=payload,
        seed=drawn.seed if request.seed is None else request.seed,
        max_tokens=max_tokens,
        prompt_tokens_estimate=estimate_prompt_tokens(request),
        deadline_at_ms=None if request.deadline_ms is None else drawn.now_ms + request.deadline_ms,
        session_id=request.session_id,
        placement=_placement(request),
        on_disconnect=request.on_disconnect,
        callback_url=request.callback_url,
        metadata=dict(request.metadata),
        idempotency_key=drawn.idempotency_key,
        own_id=request.task_id is not None,
        attended_by=drawn.attended_by if request.on_disconnect == "cancel" else None,
        body_hash=body_hash(request, drawn.fingerprint),
        prefix_hashes=prefix_hashes(request, salt=f"{tenant.name}\0{drawn.salt}"),
        correlation_id=drawn.correlation_id,
    )


def check_model(model: str, known_models: Collection[str]) -> None:
    """Raises ApiError MODEL_NOT_FOUND, naming the known ones, for a model that no worker ever registered."""
    if model in known_models:
        return
    names = sorted(known_models)
    known = ", ".join(f"`{name}`" for name in names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    message = (
        f"no worker ever served this model; known models: {known}"
        if names
        else "no worker has registered yet, so no model is known: start one with `llorch-worker --model ...`"
    )
    raise ApiError(ErrorCode.MODEL_NOT_FOUND, message, param="model")


def refusal(refused: Refused, limits: QueueLimits, known_models: Collection[str], wait_ms: int, model: str) -> ApiError:
    """What to answer when the store refused. `wait_ms` is when a place may be free, from measured rates."""
    if refused.reason in _CONFLICTS:
        message, param = _CONFLICTS[refused.reason]
        return ApiError(ErrorCode.CONFLICT, message, param=param)
    if refused.reason == "memory":
        return ApiError(
            ErrorCode.STORE_UNAVAILABLE,
            "the store is nearly out of memory: try again later, or raise Redis' maxmemory (--redis-memory-mb)",
            retry_after_ms=max(wait_ms, 5_000),
        )
    if refused.reason == "model_unknown":
        try:
            check_model(model, [name for name in known_models if name != model])
        except ApiError as error:
            return error
    scope, limit = {
        "queue_full_total": ("the queue", limits.total),
        "queue_full_model": ("this model's queue", limits.per_model),
    }.get(refused.reason, ("this tenant's queue", limits.per_tenant))
    return ApiError(
        ErrorCode.QUEUE_FULL,
        f"{scope} is full ({refused.limit or limit} waiting tasks): try again after the time given",
        retry_after_ms=max(1_000, min(wait_ms, 60_000)),
    )


def body_hash(request: TaskRequest, fingerprint: str = "") -> str:
    """sha256 of the canonical request (sorted keys, defaults filled in, without task_id) and of the fingerprint."""
    canonical = orjson.dumps(request.model_dump(exclude={"task_id"}), option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(canonical + fingerprint.encode()).hexdigest()


def estimate_prompt_tokens(request: TaskRequest) -> int:
    """A guess, good enough to charge by until a worker has counted."""
    if request.prompt_token_ids is not None:
        return len(request.prompt_token_ids)
    if request.messages is not None:
        return sum(len(message.text()) // CHARS_PER_TOKEN + 4 for message in request.messages)
    return max(1, len(request.prompt or "") // CHARS_PER_TOKEN)


def prefix_hashes(request: TaskRequest, *, salt: str) -> tuple[str, ...]:
    """Chained hashes of the prompt's leading pieces, longest prefix last. None for a prompt shorter than one piece.

    Two requests share a hash exactly when they share the model, the salt and all text up to that piece's end.
    """
    if request.prompt_token_ids is not None:
        text = " ".join(map(str, request.prompt_token_ids[: PREFIX_CHARS[-1]]))
    elif request.messages is not None:
        text = "".join(f"{message.role}\0{message.text()}\0" for message in request.messages)
    else:
        text = request.prompt or ""
    hashes: list[str] = []
    chain = _digest(f"{request.model}\0{salt}".encode())
    for start, end in pairwise(PREFIX_CHARS):
        if end > len(text):
            break
        chain = _digest(chain.encode() + text[start:end].encode())
        hashes.append(chain)
    return tuple(hashes)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _input_field(request: TaskRequest) -> str:
    return next(name for name in INPUT_FIELDS if getattr(request, name) is not None)


def _payload(request: TaskRequest, max_tokens: int, *, cache_salt: str) -> bytes:
    """JSON object of what a worker needs, less what names the attempt (task_id, attempt, seed, resumed tokens)."""
    chosen = {*_SAMPLING, "model", _input_field(request)}
    body = request.model_dump(include=chosen, exclude_defaults=True, exclude_none=True)
    return orjson.dumps({**body, "max_tokens": max_tokens, "cache_salt": cache_salt})


def _placement(request: TaskRequest) -> PlacementSpec:
    placement = request.placement
    return PlacementSpec(
        mode=placement.mode,
        pin_pool=placement.pin_pool,
        pin_worker=placement.pin_worker,
        prefer_pools=tuple(placement.prefer_pools),
        avoid_pools=tuple(placement.avoid_pools),
        allow_fallback=placement.allow_fallback,
    )


def _check_placement(request: TaskRequest, workers: Sequence[WorkerView], policy: AdmissionPolicy) -> None:
    placement = request.placement
    pinned = next((w for w in workers if w.worker_id == placement.pin_worker), None)
    if pinned is not None and pinned.model != request.model:
        raise ApiError(
            ErrorCode.INVALID_PARAMS,
            f"worker `{pinned.worker_id}` serves `{pinned.model}`, so a task pinned there can't run `{request.model}`: "
            "pin another worker or name that model",
            param="placement.pin_worker",
        )
    if pinned is not None and placement.pin_pool not in (None, pinned.pool):
        raise ApiError(
            ErrorCode.INVALID_PARAMS,
            f"worker `{pinned.worker_id}` is in pool `{pinned.pool}`, not in `{placement.pin_pool}`: pin one of them",
            param="placement.pin_pool",
        )
    if policy.wait_for_workers:
        return
    live = [w for w in workers if w.model == request.model and w.state == "ready"]
    allowed = [
        w
        for w in live
        if placement.mode != "pin"
        or (placement.pin_worker in (None, w.worker_id) and placement.pin_pool in (None, w.pool))
    ]
    if not allowed:
        raise ApiError(
            ErrorCode.NO_WORKERS,
            f"no worker that may run this task serves `{request.model}` now: start one, or try again later",
            param="placement" if live else "model",
            retry_after_ms=5_000,
        )


def _max_tokens(request: TaskRequest, policy: AdmissionPolicy) -> int:
    """As asked for, or the default. Raises ApiError 400 where at least more are asked for than the default allows."""
    if request.max_tokens is not None:
        return request.max_tokens
    if request.min_tokens > policy.default_max_tokens:
        raise ApiError(
            ErrorCode.INVALID_PARAMS,
            f"`min_tokens` must not be larger than max_tokens, which is {policy.default_max_tokens} where it is left "
            "out: give max_tokens too",
            param="min_tokens",
        )
    return policy.default_max_tokens


def _check_deadline(
    request: TaskRequest, max_tokens: int, forecast: Forecast | None, ms_per_token: float | None
) -> None:
    if request.deadline_ms is None or forecast is None:
        return
    surely = request.min_tokens
    if request.ignore_eos and not request.stop and not request.stop_token_ids:
        surely = max_tokens
    wait_ms, work_ms = round(forecast.p50_ms), round(surely * (ms_per_token or 0.0))
    if wait_ms + work_ms <= request.deadline_ms:
        return
    # Not a matter of when it is sent where its tokens alone take too long.
    if work_ms > request.deadline_ms:
        why = f"{surely} tokens take about {work_ms} ms here"
        way_out = "give it more time or ask for fewer tokens"
    else:
        why = f"the queue is too long: about {wait_ms} ms until it starts"
        why += f", and {work_ms} ms for {surely} tokens" if work_ms else ""
        way_out = "give it more time or send it later"
    raise ApiError(
        ErrorCode.DEADLINE_UNMET,
        f"{why}; its deadline is {request.deadline_ms} ms: {way_out}",
        param="deadline_ms",
    )
