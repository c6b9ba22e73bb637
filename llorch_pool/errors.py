"""Failures of llorch-pool, each with an exit code and a next step.

LlorchError
└── PoolError             what went wrong, what to do next, exit code
    └── AbortedError      the operator left (Ctrl-C, closed connection) or the deadline passed
"""

from __future__ import annotations

from llorch_wire.errors import LlorchError
from llorch_wire.pool import RC_FAILED, RC_INTERRUPTED, RC_TIMEOUT, RC_USAGE, Failure


class PoolError(LlorchError):
    """A failure that an operator can act on. `detail` may hold several lines (a log's tail, a table of figures)."""

    def __init__(
        self, message: str, *, next_step: str = "", detail: str = "", rc: int = RC_FAILED, code: str = "failed"
    ) -> None:
        super().__init__(message)
        self.message = message
        self.next_step = next_step
        self.detail = detail
        self.rc = rc
        self.code = code

    def failure(self) -> Failure:
        """The same as a message on the wire."""
        return Failure(code=self.code, message=self.message, next_step=self.next_step, detail=self.detail)


def usage_error(message: str, next_step: str = "") -> PoolError:
    """A bad argument: exit code 2."""
    return PoolError(message, next_step=next_step, rc=RC_USAGE, code="usage")


class AbortedError(PoolError):
    """The command was told to stop before it was done."""

    def __init__(self, reason: str, *, deadline: bool = False) -> None:
        super().__init__(
            reason,
            next_step="Run it again with a larger --timeout." if deadline else "",
            rc=RC_TIMEOUT if deadline else RC_INTERRUPTED,
            code="timeout" if deadline else "aborted",
        )
