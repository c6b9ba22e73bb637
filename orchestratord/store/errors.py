"""What the store raises.

LlorchError
├── StoreUnavailableError   Redis can't be reached in time, or refuses writes (full, read-only, loading)
├── StoreUrlError           the Redis URL isn't one
└── LogGapError             a caller tried to append tokens, or the end, beyond the end of a log
"""

from __future__ import annotations

from llorch_wire.errors import LlorchError


class StoreUnavailableError(LlorchError):
    """Redis can't be reached in time, or refuses writes. What was asked for may or may not have happened; every
    method of the store may be called again with the same arguments."""

    retriable = True


class StoreUrlError(LlorchError):
    """The Redis URL can't be understood; the message names the forms that are."""

    retriable = False


class LogGapError(LlorchError):
    """Tokens, or the terminal event, were to be appended beyond the end of a task's log. Nothing was written."""

    def __init__(self, task_id: str, expected_index: int, first_index: int) -> None:
        super().__init__(
            f"task {task_id}: the next token of the log is {expected_index}, but the batch starts at {first_index}: "
            "read the generation again from the log's end"
        )
        self.task_id = task_id
        self.expected_index = expected_index
        self.first_index = first_index
