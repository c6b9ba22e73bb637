"""Failures of llorch-pool, each with an exit code and a next step.

LlorchError
└── PoolError             what went wrong, what to do next, exit code
    └── AbortedError      the operator left (Ctrl-C, closed connection) or the deadline passed
"""

from __future__ import annotations

import errno
import os

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


_AFTER = {
    errno.EACCES: "Give this user access to it (`ls -ld` shows its owner and mode), and run it again.",
    errno.EPERM: "Give this user access to it (`ls -ld` shows its owner and mode), and run it again.",
    errno.EROFS: "Remount it writable, or set XDG_STATE_HOME and LLORCH_MODELS to another disk.",
    errno.EISDIR: "A file belongs there: move the folder away, and run it again.",
    errno.ENOTDIR: "A folder belongs there: move the file away, and run it again.",
    errno.EMFILE: "Allow more open files (`ulimit -n`), and run it again.",
}


def refused_by_the_system(error: OSError) -> PoolError:
    """What the operating system did not let us do: where, why, and what helps."""
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    why = error.strerror or str(error) or type(error).__name__
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return disk_full(names[0] if names else "")
    return PoolError(
        f"{' -> '.join(names)}: {why}" if names else f"the system refuses: {why}",
        next_step=_AFTER.get(error.errno or 0, "Look at that path there; `llorch-pool doctor` checks every folder."),
        code="system",
    )


def disk_full(path: str) -> PoolError:
    """The disk that holds `path` ("": it isn't known) is full."""
    return PoolError(
        f"no space left on the disk{f' that holds {path}' if path else ''}",
        next_step="Free space (`llorch-pool model list` shows sizes, `llorch-pool model remove NAME` deletes), "
        "and run it again.",
        code="disk_full",
    )


class AbortedError(PoolError):
    """The command was told to stop before it was done."""

    def __init__(self, reason: str, *, deadline: bool = False) -> None:
        super().__init__(
            reason,
            next_step="Run it again with a larger --timeout." if deadline else "",
            rc=RC_TIMEOUT if deadline else RC_INTERRUPTED,
            code="timeout" if deadline else "aborted",
        )
