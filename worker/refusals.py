"""What this worker answers when it won't do something: one exception, one JSON shape.

    {"errors": [{"field", "constraint", "message", "value"?}], "code": "…", "message": "…", "retry_after_ms"?}

`code` is one of llorch_wire's ErrorCode, or OVERLOADED, STARTING, FAILED, which only workers say.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ValidationError

from llorch_wire.errors import STATUS, ErrorCode, LlorchError
from llorch_wire.tasks import problems

OVERLOADED, STARTING, FAILED = "OVERLOADED", "STARTING", "FAILED"


@dataclass(frozen=True, slots=True)
class FieldError:
    """One thing wrong. `value` only for short numbers and ids, never for text that a client wrote."""

    field: str | None
    constraint: str
    message: str
    value: int | float | str | None = None

    def as_json(self) -> dict[str, object]:
        """As it stands in the answer; no `value` where there is none to show."""
        shown: dict[str, object] = {"field": self.field, "constraint": self.constraint, "message": self.message}
        return shown if self.value is None else {**shown, "value": self.value}


class Refused(LlorchError):  # noqa: N818 (it is an answer, not a fault)
    """A request that gets an error answer. Read the constructors below for what there is."""

    def __init__(self, status: int, code: str, *errors: FieldError, retry_after_s: int | None = None) -> None:
        super().__init__("; ".join(error.message for error in errors))
        self.status = status
        self.code = code
        self.errors = errors
        self.retry_after_s = retry_after_s

    def as_json(self) -> dict[str, object]:
        """Body of the answer."""
        body: dict[str, object] = {"errors": [error.as_json() for error in self.errors], "code": self.code}
        body["message"] = str(self)
        if self.retry_after_s is not None:
            body["retry_after_ms"] = self.retry_after_s * 1000
        return body


def invalid(field: str | None, constraint: str, message: str, value: int | float | None = None) -> Refused:
    """400 for one field."""
    return Refused(400, ErrorCode.INVALID_PARAMS, FieldError(field, constraint, message, value))


def invalid_body(error: ValidationError) -> Refused:
    """400 for a body that pydantic refused."""
    found = [FieldError(p.field, p.constraint, p.message) for p in problems(error)]
    return Refused(400, ErrorCode.INVALID_PARAMS, *found)


def context_exceeded(field: str, tokens: int, context_length: int) -> Refused:
    """400 for a prompt that leaves no room for an answer."""
    message = (
        f"`{field}`: {tokens} tokens leave no room for an answer in this model's context of {context_length}; "
        f"send at most {context_length - 1}"
    )
    return Refused(400, ErrorCode.CONTEXT_LENGTH_EXCEEDED, FieldError(field, "context_length", message, value=tokens))


def refused(code: ErrorCode, message: str, *, field: str | None = None) -> Refused:
    """The status that belongs to a code, with one message."""
    return Refused(STATUS[code], code, FieldError(field, str(code).lower(), message))


def unavailable(code: str, message: str, *, retry_after_s: int = 1) -> Refused:
    """503: the same request may succeed later, or elsewhere now."""
    return Refused(503, code, FieldError(None, code.lower(), message), retry_after_s=retry_after_s)
