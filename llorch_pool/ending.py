"""How workers end. Read `stop_workers` first. (What they leave behind: `leftovers`.)

stop:  POST /drain, /shutdown ─ it ends, or the grace is over ─▶ SIGTERM ─ 5 s ─▶ SIGKILL to the group and to
       every process that carries the worker's marker
       (without a grace: POST /shutdown and SIGTERM at once)
"""

from __future__ import annotations

import contextlib
import signal
import time

import msgspec

from llorch_pool.context import Context
from llorch_pool.errors import PoolError, usage_error
from llorch_pool.http_call import NoReplyError, call
from llorch_pool.lifecycle import marked_here, side_by_side
from llorch_pool.process import Identity, is_alive, send
from llorch_pool.registry import Registry, WorkerRecord
from llorch_wire.pool import Progress, StopOutcome

TERM_WAIT_S = 5.0
YIELD_S = 5.0
LEAVE_TIMEOUT_S = 1.0


def stop_workers(
    context: Context, registry: Registry, worker_ids: list[str], grace_s: float, *, force: bool = False
) -> list[StopOutcome]:
    """Stop the named workers side by side.

    Raises PoolError for an unknown id, and without `force` for a supervised worker, before anything is stopped.
    """
    records = [registry.load(worker_id) for worker_id in dict.fromkeys(worker_ids)]
    if grace_s < 0:
        raise usage_error("--grace must not be negative", "Give seconds, 0 to stop without draining.")
    for record in records:
        if not force and (pid := record.live_supervisor_pid):
            raise PoolError(
                f"{record.worker_id} is run by `{record.supervisor}` (pid {pid}), which would start it again",
                next_step=f"Stop that one (Ctrl-C where it runs, or `kill {pid}`), or give the worker no more tasks: "
                f"`llorch worker drain {record.worker_id}`. With --force it is stopped all the same.",
                code="supervised",
            )
    return side_by_side(lambda record: _stop(context, registry, record.worker_id, grace_s), records)


def _stop(context: Context, registry: Registry, worker_id: str, grace_s: float) -> StopOutcome:
    started = time.monotonic()
    record = registry.load(worker_id)
    if record.identity is not None and not record.ready and not record.supervisor:
        # Its spawning command holds the lock and waits for it: end the process, and that command cleans up.
        end_process(context, registry, record, record.identity, grace_s=0)
    with registry.held(worker_id, context):
        try:
            record = registry.load(worker_id)
        except PoolError:  # another command stopped it and removed the entry while this one waited for the lock
            return StopOutcome(worker_id=worker_id, how="was-dead", took_ms=_since(started))
        process = record.identity
        how: str = "was-dead"
        if process is not None and is_alive(process):
            registry.save(msgspec.structs.replace(record, stopping=True))
            how = end_process(context, registry, record, process, grace_s)
        kill_marked(registry, worker_id)
        registry.remove(worker_id)
    return msgspec.convert({"worker_id": worker_id, "how": how, "took_ms": _since(started)}, StopOutcome)


def _since(started: float) -> int:
    return round((time.monotonic() - started) * 1000)


def end_process(
    context: Context,
    registry: Registry,
    record: WorkerRecord,
    process: Identity,
    grace_s: float,
    term_wait_s: float = TERM_WAIT_S,
) -> str:
    """Drain, terminate, kill. Returns how it ended; afterwards the process is gone."""
    if grace_s > 0 and _drain(context, registry, record, process, grace_s):
        return "drained"
    if grace_s <= 0:
        _say_that_it_is_for_good(registry, record)
    # The first asks it to finish, the second not to wait for that: it has had its grace. (Sent at once, both would be
    # delivered as one.)
    for patience_s in (0.2, term_wait_s - 0.2):
        send(process, signal.SIGTERM)
        if _gone_within(context, process, patience_s):
            return "terminated"
    send(process, signal.SIGKILL, group=True)
    _gone_within(context, process, TERM_WAIT_S)
    return "killed"


def _say_that_it_is_for_good(registry: Registry, record: WorkerRecord) -> None:
    """Have it take itself off orchestratord's list; SIGTERM alone may be a restart, and would leave it there as lost.

    Best effort: one that can't answer is signalled all the same.
    """
    if not record.url:
        return
    key = registry.secrets(record.worker_id).get("LLORCH_WORKER_KEY")
    with contextlib.suppress(NoReplyError):
        call("POST", f"{record.url}/shutdown", key=key, body={}, timeout_s=LEAVE_TIMEOUT_S)


def _drain(context: Context, registry: Registry, record: WorkerRecord, process: Identity, grace_s: float) -> bool:
    """Ask it to finish what it has and to leave. True once it is gone; False when it can't, or the grace is over.

    What still runs shortly before the end of the grace yields, so that it goes on elsewhere instead of being cut.
    """
    if not record.url:
        return False
    key = registry.secrets(record.worker_id).get("LLORCH_WORKER_KEY")
    end = time.monotonic() + grace_s
    try:
        body = {"deadline_ms": round(max(0.0, grace_s - YIELD_S) * 1000)}
        if call("POST", f"{record.url}/drain", key=key, body=body).status >= 400:
            return False
        call("POST", f"{record.url}/shutdown", key=key, body={})
    except NoReplyError:
        return not is_alive(process)
    while is_alive(process):
        left = end - time.monotonic()
        if left <= 0:
            return False
        context.progress(Progress(phase="draining", text=record.worker_id, eta_s=round(left, 1)))
        context.wait(0.05)
    return True


def _gone_within(context: Context, process: Identity, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while is_alive(process):
        if time.monotonic() >= end:
            return False
        if context.aborted:  # the signal has been sent: only the confirmation is given up
            time.sleep(0.02)
        else:
            context.wait(0.02)
    return True


def kill_marked(registry: Registry, worker_id: str) -> int:
    """SIGKILL to whatever still carries this worker's marker: an engine whose supervisor is gone."""
    killed = 0
    for marked_id, found in marked_here(registry):
        if marked_id == worker_id:
            killed += send(found.process, signal.SIGKILL)
    return killed
