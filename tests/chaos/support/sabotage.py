"""orchestratord with one of its mechanisms switched off, to show that the suite then fails: read `MECHANISMS`.

    python -m tests.chaos.support.sabotage MECHANISM[,MECHANISM] [flags of orchestratord]

Nothing of this is in the product: the switch is made in this process alone, before the real program starts.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import msgspec

from orchestratord.cli import main
from orchestratord.committer import Committer
from orchestratord.cursor import Cursor
from orchestratord.recovery import Recovery
from orchestratord.relay import Relay
from orchestratord.relays import Relays
from orchestratord.replicas import Replicas
from orchestratord.store.store import Store
from orchestratord.store.types import TokenBatch
from orchestratord.values import StreamItem
from tests.chaos.support.replacing import replace


def none() -> None:
    """Everything as it is: the control."""


def disowning() -> None:
    """A replica that has slept goes on with tasks that others have adopted."""

    def stop_disowned(_self: Relays, _task_id: str, _attempt: int) -> bool:
        return False

    replace(Relays, stop_disowned=stop_disowned)


def persist_before_forward() -> None:
    """Readers get tokens before they are in the log."""
    append = Committer.append
    under_way: set[asyncio.Task[Any]] = set()

    async def forward_first(self: Committer, batch: TokenBatch) -> str:
        task = asyncio.create_task(append(self, batch))
        under_way.add(task)
        task.add_done_callback(lambda done: (under_way.discard(done), done.exception()))
        return "appended"

    replace(Committer, append=forward_first)


def adoption() -> None:
    """Nobody takes over a dead replica's tasks."""

    async def adopt(_self: Recovery) -> int:
        return 0

    async def reconcile(_self: Replicas, **_: Any) -> None:
        return None

    replace(Recovery, adopt=adopt)
    replace(Replicas, _reconcile=reconcile)


def attempt_fencing() -> None:
    """Whoever writes passes for the present attempt."""
    append, complete, requeue = Store.append, Store.complete, Store.requeue

    async def present(self: Store, task_id: str, attempt: int) -> int:
        record = await self.task(task_id, None)
        return attempt if record is None else record.attempt

    async def append_any(self: Store, batches: Any) -> Any:
        return await append(
            self, [msgspec.structs.replace(b, attempt=await present(self, b.task_id, b.attempt)) for b in batches]
        )

    async def complete_any(self: Store, task_id: str, attempt: int, *args: Any, **options: Any) -> Any:
        return await complete(self, task_id, await present(self, task_id, attempt), *args, **options)

    async def requeue_any(self: Store, task_id: str, attempt: int, *args: Any, **options: Any) -> Any:
        return await requeue(self, task_id, await present(self, task_id, attempt), *args, **options)

    replace(Store, append=append_any, complete=complete_any, requeue=requeue_any)


def overlap_stripping() -> None:
    """Readers get what the log holds, twice where two owners of an attempt both wrote it."""

    def fresh_tokens(self: Cursor, attempt: int, tokens: Any) -> list[StreamItem]:
        items = [StreamItem(token, f"{attempt}-{token.i + 1}") for token in tokens]
        if items:
            self.position = max(self.position, (attempt, tokens[-1].i + 1))
            self.next_index = tokens[-1].i + 1
        return items

    replace(Cursor, fresh_tokens=fresh_tokens)


def same_seed() -> None:
    """Another attempt is another throw of the dice."""
    body = Relay._body

    def reseeded(self: Relay) -> bytes:
        request = msgspec.json.decode(body(self))
        if self.task.attempt > 1 and "resume_token_ids" in request:
            request |= {"seed": request["seed"] + self.task.attempt}
        return msgspec.json.encode(request)

    replace(Relay, _body=reseeded)


MECHANISMS: dict[str, Callable[[], None]] = {
    mechanism.__name__: mechanism
    for mechanism in (
        none, disowning, persist_before_forward, adoption, attempt_fencing, overlap_stripping, same_seed,
    )
}  # fmt: skip


if __name__ == "__main__":
    for name in sys.argv[1].split(","):
        MECHANISMS[name]()
    sys.exit(main(sys.argv[2:]))
