"""How a request becomes a running generation: is this worker taking work, is there a slot, is the request right.

Read `Intake.start` first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from contextlib import contextmanager

from llorch_wire.errors import ErrorCode
from llorch_wire.events import WorkerStartedEvent
from llorch_wire.worker import ExecuteRequest, WorkerStatus
from worker.generation import Generation
from worker.generations import Generations
from worker.refusals import FAILED, STARTING, unavailable
from worker.supervisor import Supervisor
from worker.validation import Validator


class Intake:
    """Starts attempts. Preparing one (tokenizing, rendering a chat) is the only part that awaits; its slot is held."""

    def __init__(
        self,
        generations: Generations,
        supervisor: Supervisor,
        validator: Validator,
        status: Callable[[], WorkerStatus],
    ) -> None:
        self._generations = generations
        self._supervisor = supervisor
        self._validator = validator
        self._status = status
        self._preparing: dict[tuple[str, int], asyncio.Event] = {}

    async def start(self, request: ExecuteRequest, correlation_id: str) -> Generation:
        """Start a new attempt, or find it where it came twice at a time.

        Raises Refused: 503 where this worker can't take it now, 409 for an attempt that is over, 400.
        """
        key = (request.task_id, request.attempt)
        while (other := self._preparing.get(key)) is not None:
            await other.wait()
            generation = self._generations.find(*key)
            if generation is not None and generation.is_history_of(request.seed, len(request.resume_token_ids)):
                return generation
        self._check_accepting()
        self._generations.check_startable(*key)
        with self._generations.reserve_slot(request.task_id), self._announce(key):
            ready = self._supervisor.ready
            assert ready is not None
            job = await self._validator.prepare(request, ready)
            self._check_accepting()  # much can happen while a long prompt is tokenized
            instance_id = self._supervisor.instance_id
            assert instance_id is not None
            started = WorkerStartedEvent(
                task_id=request.task_id,
                attempt=request.attempt,
                instance_id=instance_id,
                tokens_in=len(job.sequence.prompt_token_ids),
                determinism=ready.determinism,
            )
            return self._generations.start(job, started, correlation_id)

    def _check_accepting(self) -> None:
        status = self._status()
        if status == "draining":
            raise unavailable(ErrorCode.DRAINING, "this worker takes no new work; ask another")
        if status != "ready":
            code = STARTING if status == "starting" else FAILED
            raise unavailable(code, f"the engine isn't ready: {self._supervisor.detail or status}")

    @contextmanager
    def _announce(self, key: tuple[str, int]) -> Generator[None]:
        done = self._preparing[key] = asyncio.Event()
        try:
            yield
        finally:
            del self._preparing[key]
            done.set()
