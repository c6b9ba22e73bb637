"""Failure codes, what they mean over HTTP, and the exceptions that carry them. One enum, one table.

    LlorchError
    └── ApiError            a typed refusal or failure: code, message, param, retriable, retry_after_ms

Everything that answers a client maps its failures here and nowhere else (see `STATUS`).
"""

from __future__ import annotations

from enum import StrEnum


class ErrorCode(StrEnum):
    """Every code that may stand in an `error` object or an `error` event."""

    INVALID_PARAMS = "INVALID_PARAMS"
    DEADLINE_UNMET = "DEADLINE_UNMET"
    CONTEXT_LENGTH_EXCEEDED = "CONTEXT_LENGTH_EXCEEDED"
    UNAUTHORIZED = "UNAUTHORIZED"
    FORBIDDEN = "FORBIDDEN"
    NOT_FOUND = "NOT_FOUND"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    METHOD_NOT_ALLOWED = "METHOD_NOT_ALLOWED"
    CONFLICT = "CONFLICT"
    GONE = "GONE"
    PAYLOAD_TOO_LARGE = "PAYLOAD_TOO_LARGE"
    QUEUE_FULL = "QUEUE_FULL"
    QUOTA_EXCEEDED = "QUOTA_EXCEEDED"
    RATE_LIMITED = "RATE_LIMITED"
    NO_WORKERS = "NO_WORKERS"
    STORE_UNAVAILABLE = "STORE_UNAVAILABLE"
    DRAINING = "DRAINING"
    WORKER_LOST = "WORKER_LOST"
    WORKER_TIMEOUT = "WORKER_TIMEOUT"
    VRAM_OOM = "VRAM_OOM"
    TIMEOUT = "TIMEOUT"
    DEADLINE_MISSED = "DEADLINE_MISSED"
    RETRIES_EXHAUSTED = "RETRIES_EXHAUSTED"
    INTERNAL = "INTERNAL"


STATUS: dict[ErrorCode, int] = {
    ErrorCode.INVALID_PARAMS: 400,
    ErrorCode.DEADLINE_UNMET: 400,
    ErrorCode.CONTEXT_LENGTH_EXCEEDED: 400,
    ErrorCode.UNAUTHORIZED: 401,
    ErrorCode.FORBIDDEN: 403,
    ErrorCode.NOT_FOUND: 404,
    ErrorCode.MODEL_NOT_FOUND: 404,
    ErrorCode.METHOD_NOT_ALLOWED: 405,
    ErrorCode.CONFLICT: 409,
    ErrorCode.GONE: 410,
    ErrorCode.PAYLOAD_TOO_LARGE: 413,
    ErrorCode.QUEUE_FULL: 429,
    ErrorCode.QUOTA_EXCEEDED: 429,
    ErrorCode.RATE_LIMITED: 429,
    ErrorCode.NO_WORKERS: 503,
    ErrorCode.STORE_UNAVAILABLE: 503,
    ErrorCode.DRAINING: 503,
    # These end a stream; a unary /v1 answer that waits for the stream's end reports them with these statuses.
    ErrorCode.WORKER_LOST: 502,
    ErrorCode.WORKER_TIMEOUT: 504,
    ErrorCode.VRAM_OOM: 503,
    ErrorCode.TIMEOUT: 504,
    ErrorCode.DEADLINE_MISSED: 504,
    ErrorCode.RETRIES_EXHAUSTED: 502,
    ErrorCode.INTERNAL: 500,
}
"""HTTP status of each code."""

RETRIABLE: frozenset[ErrorCode] = frozenset(
    {
        ErrorCode.QUEUE_FULL,
        ErrorCode.QUOTA_EXCEEDED,
        ErrorCode.RATE_LIMITED,
        ErrorCode.NO_WORKERS,
        ErrorCode.STORE_UNAVAILABLE,
        ErrorCode.DRAINING,
        ErrorCode.WORKER_LOST,
        ErrorCode.WORKER_TIMEOUT,
        ErrorCode.VRAM_OOM,
        ErrorCode.TIMEOUT,
        ErrorCode.INTERNAL,
    }
)
"""Codes after which the same request may succeed later without a change."""


class LlorchError(Exception):
    """Root of every exception that the programs raise on purpose."""


class ApiError(LlorchError):
    """A failure with a code that a client sees.

    `param` names the offending field, dotted (`placement.pin_pool`, `messages.0.content`). `retry_after_ms` becomes
    `Retry-After` and `X-Backoff-Ms`. The message says what to do next and never quotes a prompt or a key.
    """

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        *,
        param: str | None = None,
        retry_after_ms: int | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.retry_after_ms = retry_after_ms

    @property
    def status(self) -> int:
        """HTTP status of this failure."""
        return STATUS[self.code]

    @property
    def retriable(self) -> bool:
        """Whether the same request may succeed later."""
        return self.code in RETRIABLE
