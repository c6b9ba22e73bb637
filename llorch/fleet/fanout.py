"""One command on many pools at once. Read `run` and `settle` first.

At most 32 hosts at a time; a host that fails doesn't stop the others. Ctrl-C cancels every connection in order and
comes back within 2 s with nothing left running there.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Generic, TypeVar

from llorch.errors import CliError, PartialFailure
from llorch.fleet.live import Live
from llorch.fleet.pools import Pool
from llorch.output import say

PARALLEL_HOSTS = 32
LEAVE_S = 2.5

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What a pool answered, or why it didn't."""

    pool: Pool
    value: T | None = None
    error: CliError | None = None

    @property
    def ok(self) -> bool:
        """Whether it did what was asked."""
        return self.error is None


Work = Callable[[Pool, Live, threading.Event], T]


def run(pools: Sequence[Pool], work: Work[T], *, quiet: bool = False) -> list[Outcome[T]]:
    """Do `work` on every pool and return the outcomes in the pools' order. Raises KeyboardInterrupt after Ctrl-C."""
    live = Live([pool.name for pool in pools], quiet=quiet)
    cancel = threading.Event()
    threads = ThreadPoolExecutor(min(PARALLEL_HOSTS, max(1, len(pools))), thread_name_prefix="pool")
    try:
        with _ctrl_c_sets(cancel):
            jobs = [threads.submit(_one, pool, work, live, cancel) for pool in pools]
            _await(jobs, cancel)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        live.close()
    if cancel.is_set():
        raise KeyboardInterrupt
    return [job.result() for job in jobs]


def _one(pool: Pool, work: Work[T], live: Live, cancel: threading.Event) -> Outcome[T]:
    from llorch.fleet.ssh import Interrupted

    try:
        return Outcome(pool, work(pool, live, cancel))
    except CliError as error:
        live.failed(pool.name)
        return Outcome(pool, error=error)
    except Interrupted:
        return Outcome(pool, error=CliError(f"{pool.name}: interrupted", next_step="run it again"))


def _await(jobs: list[Future[Any]], cancel: threading.Event) -> None:
    """Wait in short steps: a thread that waits for good could not see a signal."""
    pending: set[Future[Any]] = set(jobs)
    while pending and not cancel.is_set():
        _, pending = wait(pending, timeout=0.1)
    if pending:
        wait(pending, timeout=LEAVE_S)


@contextmanager
def _ctrl_c_sets(cancel: threading.Event) -> Generator[None]:
    """The first Ctrl-C cancels in order, the second ends at once. Outside the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupted(number: int, frame: FrameType | None) -> None:
        if cancel.is_set():
            signal.default_int_handler(number, frame)
        cancel.set()

    before = {number: signal.signal(number, interrupted) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def settle(outcomes: Sequence[Outcome[Any]]) -> None:
    """Say what failed; raise what the whole command comes to: nothing, the one failure, or PartialFailure (exit 3).

    When every pool failed in the same way, that way's exit code is the command's.
    """
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if not failed:
        return
    if len(outcomes) == 1 and failed[0].error is not None:
        raise failed[0].error
    for outcome in failed:
        if outcome.error is not None:
            say(f"error: {outcome.error.message}")
            say(f"next:  {outcome.error.next_step}")
    codes = {outcome.error.exit_code for outcome in failed if outcome.error is not None}
    text = f"{len(failed)} of {len(outcomes)} pools failed: {', '.join(outcome.pool.name for outcome in failed)}"
    if len(failed) == len(outcomes) and len(codes) == 1 and failed[0].error is not None:
        error = CliError(text, next_step=failed[0].error.next_step)
        error.exit_code = codes.pop()
        raise error
    raise PartialFailure(text, next_step="llorch pool doctor -p " + " -p ".join(o.pool.name for o in failed))
