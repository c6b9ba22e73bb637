"""What the store should do, in a few plain Python structures: the reference that the real scripts are compared with.

Nothing here knows Redis. Each method changes the model as the store's method of the same name should change the store,
and returns what that should return, reduced to what matters.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

LIVE = ("queued", "retry", "running")
CLASS_ORDER = {"interactive": 0, "batch": 1}
State = Literal["queued", "retry", "running", "completed", "failed", "cancelled"]


@dataclass
class Task:
    task_id: str
    tenant: str
    weight: float
    priority: str
    pool: str | None
    deadline: int | None
    key: str | None
    estimate: int
    sequence: int
    state: State = "queued"
    attempt: int = 0
    tokens: int = 0
    failures: int = 0
    worker: str | None = None
    instance: str | None = None
    digest: str | None = None
    owner: str = ""
    due: int = 0
    charged: float = 0.0

    @property
    def live(self) -> bool:
        return self.state in LIVE


@dataclass
class Worker:
    worker_id: str
    instance: str
    pool: str
    digest: str
    slots: int
    lease_end: int
    lost: bool = False
    stopping: dict[tuple[str, int], int] = field(default_factory=dict)


@dataclass
class Model:
    """The whole store, for one model name."""

    lease_ms: int
    replica_lease_ms: int
    now: int
    tasks: dict[str, Task] = field(default_factory=dict)
    workers: dict[str, Worker] = field(default_factory=dict)
    drained: set[str] = field(default_factory=set)
    replicas: dict[str, int] = field(default_factory=dict)
    """Lease ends; also of replicas that own tasks without having spoken."""
    speakers: set[str] = field(default_factory=set)
    keys: dict[tuple[str, str], str] = field(default_factory=dict)
    virtual: dict[str, float] = field(default_factory=dict)
    virtual_left: float = 0.0
    known: bool = False
    sequence: int = 0

    # --- what is derived

    def waiting(self) -> list[Task]:
        return sorted((task for task in self.tasks.values() if task.state == "queued"), key=lambda task: task.sequence)

    def running_on(self, worker_id: str) -> list[Task]:
        return [task for task in self.tasks.values() if task.state == "running" and task.worker == worker_id]

    def slots_used(self, worker: Worker) -> int:
        return len(self.running_on(worker.worker_id)) + len(worker.stopping)

    def is_ready(self, worker: Worker) -> bool:
        return not worker.lost and worker.lease_end > self.now and worker.worker_id not in self.drained

    def position(self, task: Task) -> int | None:
        if task.state not in ("queued", "retry"):
            return None
        ahead = [
            other
            for other in self.waiting()
            if (other.priority == task.priority and other.sequence < task.sequence)
            or CLASS_ORDER[other.priority] < CLASS_ORDER[task.priority]
        ]
        return len(ahead) + 1

    def active(self) -> set[str]:
        return {task.tenant for task in self.tasks.values() if task.live}

    # --- transitions

    def admit(self, task: Task, per_model: int, drop: bool) -> str:
        held = self.keys.get((task.tenant, task.key)) if task.key else None
        existing = self.tasks.get(held or task.task_id)
        if existing is not None:
            if existing.tenant != task.tenant or existing.task_id != task.task_id:
                return "conflict"
            if task.key:  # a key that comes with a known id stands for it from then on, beside others
                self.keys[(task.tenant, task.key)] = task.task_id
            return "known"
        if not self.known:
            return "model_unknown"
        if len(self.waiting()) >= per_model:
            victims = [other for other in self.waiting() if other.priority == "batch"]
            if not (drop and task.priority == "interactive" and victims):
                return "queue_full_model"
            self._finish(victims[0], "failed")
        active = self.active()
        if task.tenant not in active:
            floor = min((self.virtual.get(tenant, 0.0) for tenant in active), default=self.virtual_left)
            if self.virtual.get(task.tenant, 0.0) < floor:
                self.virtual[task.tenant] = floor
        self.sequence += 1
        task.sequence = self.sequence
        self.tasks[task.task_id] = task
        if task.key:
            self.keys[(task.tenant, task.key)] = task.task_id
        return "created"

    def claim(self, task_id: str, worker_id: str, replica: str, charge: float) -> bool:
        task, worker = self.tasks.get(task_id), self.workers.get(worker_id)
        if task is None or worker is None or task.state != "queued" or not self.is_ready(worker):
            return False
        if self.slots_used(worker) >= worker.slots or (task.deadline is not None and task.deadline <= self.now):
            return False
        if (task.pool and task.pool != worker.pool) or (task.tokens and task.digest != worker.digest):
            return False
        task.state, task.worker, task.instance = "running", worker_id, worker.instance
        task.digest, task.owner = worker.digest, replica
        task.attempt += 1
        self.replicas.setdefault(replica, self.now)
        task.charged += charge
        self.virtual[task.tenant] = self.virtual.get(task.tenant, 0.0) + charge / task.weight
        return True

    def append(self, task_id: str, attempt: int, first: int, count: int) -> str:
        task = self.tasks.get(task_id)
        if task is None or task.state != "running" or task.attempt != attempt:
            return "stale"
        if first + count <= task.tokens:
            return "covered"
        if first > task.tokens:
            return "gap"
        task.tokens = first + count
        return "appended"

    def complete(self, task_id: str, attempt: int, state: State) -> bool:
        task = self.tasks.get(task_id)
        if task is None or task.state != "running" or task.attempt != attempt:
            return False
        self._finish(task, state)
        return True

    def cancel(self, task_id: str) -> tuple[bool, bool] | None:
        """(changed, something runs), None when unknown."""
        task = self.tasks.get(task_id)
        if task is None:
            return None
        if not task.live:
            return False, False
        ran = task.state == "running"
        self._stop(task)
        self._finish(task, "cancelled")
        return True, ran

    def requeue(self, task_id: str, attempt: int, failure: bool, progressed: bool, backoff: int, most: int) -> str:
        task = self.tasks.get(task_id)
        if task is None or task.state != "running" or task.attempt != attempt:
            return "stale"
        task.failures = (0 if progressed else task.failures) + failure
        if (failure and task.failures >= most) or (task.deadline is not None and task.deadline <= self.now):
            self._finish(task, "failed")
            return "failed"
        self._settle(task)
        task.state = "retry" if backoff else "queued"
        task.due = self.now + backoff
        task.owner = ""
        return task.state

    def sweep(self) -> tuple[int, int, list[str], list[str]]:
        """(retried, expired while waiting, expired while running, workers lost)."""
        due = [task for task in self.tasks.values() if task.state == "retry" and task.due <= self.now]
        for task in due:
            task.state = "queued"
        late = [task for task in self.tasks.values() if task.live and task.deadline and task.deadline <= self.now]
        ran = sorted(task.task_id for task in late if task.state == "running")
        for task in late:
            self._stop(task)
            self._finish(task, "failed")
        lost = [worker for worker in self.workers.values() if not worker.lost and worker.lease_end <= self.now]
        for worker in lost:
            self._lose(worker)
        return len(due), len(late) - len(ran), ran, sorted(worker.worker_id for worker in lost)

    def register(self, worker_id: str, instance: str, pool: str, digest: str, slots: int) -> None:
        before = self.workers.get(worker_id)
        stopping = before.stopping if before is not None and before.instance == instance else {}
        self.workers[worker_id] = Worker(
            worker_id, instance, pool, digest, slots, self.now + self.lease_ms, stopping=stopping
        )
        self.known = True

    def heartbeat(
        self, worker_id: str, instance: str, runs: list[tuple[str, int]]
    ) -> tuple[bool, bool, list[tuple[str, int]]]:
        """(known, drain, what nobody wants)."""
        worker = self.workers.get(worker_id)
        if worker is None or worker.instance != instance:
            return False, False, []
        worker.lost, worker.lease_end = False, self.now + self.lease_ms
        worker.stopping = {
            attempt: at for attempt, at in worker.stopping.items() if attempt in runs or self.now - at <= 1000
        }
        wanted = [(task.task_id, task.attempt) for task in self.running_on(worker_id)]
        return True, worker_id in self.drained, [attempt for attempt in runs if attempt not in wanted]

    def mark_lost(self, worker_id: str, instance: str) -> bool:
        worker = self.workers.get(worker_id)
        if worker is None or worker.lost or worker.instance != instance:
            return False
        self._lose(worker)
        return True

    def remove_worker(self, worker_id: str) -> bool:
        self.drained.discard(worker_id)
        return self.workers.pop(worker_id, None) is not None

    def adoptable(self, replica: str) -> set[str]:
        dead = {name for name, lease_end in self.replicas.items() if lease_end <= self.now and name != replica}
        running = [task for task in self.tasks.values() if task.state == "running"]
        return {task.task_id for task in running if task.owner == "" or task.owner in dead}

    def adopt(self, replica: str, adopted: list[str]) -> None:
        for task_id in adopted:
            self.tasks[task_id].owner = replica
            self.replicas.setdefault(replica, self.now)
        for name, lease_end in list(self.replicas.items()):
            owns = any(task.state == "running" and task.owner == name for task in self.tasks.values())
            if lease_end <= self.now and name != replica and not owns:
                self.leave(name)

    def hand_over(self, replica: str) -> int:
        mine = [task for task in self.tasks.values() if task.state == "running" and task.owner == replica]
        for task in mine:
            task.owner = ""
        return len(mine)

    def speak(self, replica: str) -> None:
        self.replicas[replica] = self.now + self.replica_lease_ms
        self.speakers.add(replica)

    def leave(self, replica: str) -> None:
        self.replicas.pop(replica, None)
        self.speakers.discard(replica)

    def delete(self, task_id: str) -> bool:
        task = self.tasks.get(task_id)
        if task is None or task.live:
            return False
        del self.tasks[task_id]
        self.keys = {key: name for key, name in self.keys.items() if name != task_id}
        return True

    def _lose(self, worker: Worker) -> None:
        worker.lost = True
        worker.stopping = {}

    def _stop(self, task: Task) -> None:
        worker = self.workers.get(task.worker or "")
        if task.state == "running" and worker is not None and worker.instance == task.instance and not worker.lost:
            worker.stopping[(task.task_id, task.attempt)] = self.now

    def _settle(self, task: Task) -> None:
        if task.attempt == 0:
            return
        served = task.estimate + task.tokens
        self.virtual[task.tenant] = self.virtual.get(task.tenant, 0.0) + (served - task.charged) / task.weight
        task.charged = served

    def _finish(self, task: Task, state: State) -> None:
        self._settle(task)
        task.state = state
        if task.tenant not in self.active() and not self.active():
            self.virtual_left = self.virtual.get(task.tenant, 0.0)
