"""What every loop and relay of one orchestratord shares. Built once by `Orchestrator`; holds no logic."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from orchestratord.observations import Observations
from orchestratord.store.store import Store
from orchestratord.store.types import RunningTask
from orchestratord.values import RuntimeSettings

if TYPE_CHECKING:
    from orchestratord.committer import Committer
    from orchestratord.fleet import FleetView
    from orchestratord.followers import Followers
    from orchestratord.relays import Relays
    from orchestratord.replicas import Replicas
    from orchestratord.watch import Watch
    from orchestratord.worker_client import WorkerClient


class Spawn(Protocol):
    """Runs a coroutine in the runtime's task group; what it raises is logged, never lost."""

    def __call__(self, work: Coroutine[Any, Any, None], *, name: str) -> None: ...


@dataclass
class House:
    """The services of one process."""

    store: Store
    settings: RuntimeSettings
    observations: Observations
    client: WorkerClient
    committer: Committer = field(init=False)
    followers: Followers = field(init=False)
    fleet: FleetView = field(init=False)
    relays: Relays = field(init=False)
    replicas: Replicas = field(init=False)
    watch: Watch = field(init=False)
    spawn: Spawn = field(init=False)
    wake_dispatcher: Callable[[str | None], None] = field(init=False)

    migrations: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    """(worker_id, reason) of attempts sent back, not yet told to the fleet feed."""

    def now_ms(self) -> int:
        """Wall clock; only for figures that people read, never for a lease."""
        return time.time_ns() // 1_000_000

    def first_token(self, task: RunningTask) -> None:
        """The first token of a task is in its log."""
        self.observations.measure("ttft_s", max(0, self.now_ms() - task.created_at_ms) / 1000, task.priority)
