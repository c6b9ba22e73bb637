"""Failures of the command line: what to say, which command to type next, and the exit code.

    LlorchError
    └── CliError                exit 1   anything that failed, with a next step
        ├── UsageProblem        exit 2   what was typed, or a setting, can't work
        ├── PartialFailure      exit 3   a part of a fleet failed
        ├── AccessProblem       exit 4   a key or a host key was not accepted
        ├── Unreachable         exit 5   nobody answered
        ├── TimedOut            exit 124 the time given was over
        └── ApiFailure          exit 1, 2 or 4, by the code in orchestratord's answer

Ctrl-C is exit 130. `llorch.cli.main` prints these, and nothing else does.
"""

from __future__ import annotations

from enum import IntEnum

from llorch_wire.errors import LlorchError


class ExitCode(IntEnum):
    """What the shell sees."""

    OK = 0
    FAILED = 1
    USAGE = 2
    PARTIAL = 3
    ACCESS = 4
    UNREACHABLE = 5
    TIMEOUT = 124
    INTERRUPTED = 130


class CliError(LlorchError):
    """Something failed. `next_step` is a command to type or, where there is none, what to do, in words."""

    exit_code: ExitCode = ExitCode.FAILED

    def __init__(self, message: str, *, next_step: str) -> None:
        super().__init__(message)
        self.message = message
        self.next_step = next_step
        self.kind = "failed"
        """What a failure is called where machines read it: auth, refused, timeout, ..."""


class UsageProblem(CliError):  # noqa: N818 - reads as what it is where it is raised
    """What was typed, or a setting, can't work."""

    exit_code = ExitCode.USAGE


class PartialFailure(CliError):  # noqa: N818
    """A part of a fleet failed; the rest did what was asked."""

    exit_code = ExitCode.PARTIAL


class AccessProblem(CliError):  # noqa: N818
    """A key, or a host's identity, was not accepted."""

    exit_code = ExitCode.ACCESS


class Unreachable(CliError):  # noqa: N818
    """Nobody answered; or, `connected`, somebody did and the connection broke before the answer was whole."""

    exit_code = ExitCode.UNREACHABLE

    def __init__(self, message: str, *, next_step: str, connected: bool = False) -> None:
        super().__init__(message, next_step=next_step)
        self.connected = connected


class TimedOut(CliError):  # noqa: N818
    """The time given was over."""

    exit_code = ExitCode.TIMEOUT


class ApiFailure(CliError):  # noqa: N818
    """orchestratord answered with an error object.

    `status` is the HTTP status, `code` one of `llorch_wire.errors.ErrorCode` as text (a newer daemon may send others).
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        next_step: str,
        param: str | None = None,
        retriable: bool = False,
        retry_after_ms: int | None = None,
    ) -> None:
        super().__init__(f"{message} ({code})" if code else message, next_step=next_step)
        self.status = status
        self.code = code
        self.param = param
        self.retriable = retriable
        self.retry_after_ms = retry_after_ms
        if status in (401, 403):
            self.exit_code = ExitCode.ACCESS
        elif status in (400, 413):
            self.exit_code = ExitCode.USAGE
