"""How a worker's attempt can end for its relay. One union; `relay` makes these, `settle` acts on them.

| outcome | who says so | what follows |
|---|---|---|
| Ended | worker's `end`, or an error that a retry can't mend | store.complete, then the worker may forget it |
| Faulted | worker's retriable error, a broken protocol | requeue as a failure, elsewhere |
| Yielded | worker's `preempted`, or a cancel that nobody asked for | requeue, no failure unless again and again |
| Lost | probe: no answer, or another engine instance | worker marked lost, requeue (a failure once it was delivered) |
| Vanished | worker: no such generation (404) | requeue; a failure if this relay had been reading it |
| Turned away | worker: 503, 409, or never reached | requeue with a pause, no failure |
| Fenced | the log: another attempt, or ended | stop the attempt at the worker |
| Disowned | another replica has adopted it | nothing: the other goes on |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from llorch_wire.events import EndEvent, ErrorEvent
from orchestratord.store.types import RequeueReason


@dataclass(frozen=True)
class Ended:
    """The attempt ended the task."""

    event: EndEvent | ErrorEvent


@dataclass(frozen=True)
class Faulted:
    """The attempt failed, another may succeed."""

    why: str
    crash: bool = False
    """The engine went down with it: a task that does this again and again is stopped sooner."""


@dataclass(frozen=True)
class Yielded:
    """The attempt stopped at a token boundary because it was asked to; `unasked`: not by anybody who knows the task."""

    unasked: bool = False


@dataclass(frozen=True)
class Lost:
    """The worker, or the engine instance that ran the attempt, is gone."""

    why: str
    reason: RequeueReason
    blameless: bool = False
    """The attempt can't have caused it."""


@dataclass(frozen=True)
class Vanished:
    """The worker is there, but knows no such generation."""


@dataclass(frozen=True)
class TurnedAway:
    """The worker did not take the attempt."""

    why: str
    retry_after_ms: int | None = None
    unreachable: bool = False


@dataclass(frozen=True)
class Fenced:
    """The log takes no more from this attempt."""


@dataclass(frozen=True)
class Disowned:
    """This replica isn't the owner any more."""


Outcome: TypeAlias = Ended | Faulted | Yielded | Lost | Vanished | TurnedAway | Fenced | Disowned


@dataclass(frozen=True)
class Broken:
    """A connection ended without an outcome; whether the attempt goes on is found out by asking the worker."""

    why: str
    sent: bool = True
