"""What a worker says about itself: in `/health`, at registration, in heartbeats and in `/metrics`.

Read `Portrait.health` first. Everything comes from memory, so that `/health` answers while the engine is busy or gone.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from llorch_wire import PROTOCOL_VERSION
from llorch_wire.worker import Heartbeat, WorkerHealth, WorkerRegistration, WorkerStatus
from worker.generations import Generations
from worker.metrics import LiveState
from worker.supervisor import Supervisor
from worker.throughput import Throughput


class Portrait:
    """A worker's state in the words of the protocol. `digest` and `vram_total_bytes` are set once they are known."""

    def __init__(
        self,
        supervisor: Supervisor,
        throughput: Throughput,
        clock: Callable[[], float],
        *,
        worker_id: str,
        url: str,
        pool: str,
        model: str,
        chat: bool,
    ) -> None:
        self._supervisor = supervisor
        self._throughput = throughput
        self._clock = clock
        self._worker_id = worker_id
        self._url = url
        self._pool = pool
        self._model = model
        self._chat = chat
        self._started_at = clock()
        self.digest: str | None = None
        self.vram_total_bytes = 0
        self.draining = False

    @property
    def status(self) -> WorkerStatus:
        """What this worker is to the outside."""
        state = self._supervisor.state
        if state != "ready":
            return state
        if self.digest is None:
            return "starting"  # a worker that can't say which weights it runs isn't ready
        return "draining" if self.draining else "ready"

    def health(self, generations: Generations) -> WorkerHealth:
        """State of this worker, from memory."""
        ready, supervisor = self._supervisor.ready, self._supervisor
        return WorkerHealth(
            status=self.status,
            worker_id=self._worker_id,
            instance_id=supervisor.instance_id,
            model=self._model,
            model_digest=self.digest,
            device=None if ready is None else ready.device,
            dtype=None if ready is None else ready.dtype,
            attention=None if ready is None else ready.attention,
            determinism=None if ready is None else ready.determinism,
            vram_bytes=supervisor.stats.vram_bytes or (0 if ready is None else ready.vram_bytes),
            context_length=0 if ready is None else ready.context_length,
            slots_total=0 if ready is None else ready.slots_total,
            slots_free=self._slots_offered(generations),
            kv_blocks_total=0 if ready is None else ready.kv_blocks_total,
            kv_blocks_free=self._kv_blocks_free(),
            uptime_s=round(self._clock() - self._started_at, 3),
            version=_version(),
            detail=self._detail(),
            engine_restarts=supervisor.restarts,
        )

    def registration(self) -> WorkerRegistration | None:
        """What to register with; None while no engine has come up yet."""
        ready, instance_id = self._supervisor.ready, self._supervisor.instance_id
        if ready is None or instance_id is None or self.digest is None or self._supervisor.state != "ready":
            return None
        flags = ready.capabilities
        features = [name for name in flags.__struct_fields__ if getattr(flags, name)]
        if self._chat:
            features.append("chat")
        return WorkerRegistration(
            worker_id=self._worker_id,
            instance_id=instance_id,
            url=self._url,
            pool=self._pool,
            model=self._model,
            model_digest=self.digest,
            dtype=ready.dtype,
            device=ready.device,
            vram_total_bytes=self.vram_total_bytes if ready.device.startswith("cuda") else 0,
            vram_used_bytes=ready.vram_bytes,
            context_length=ready.context_length,
            slots_total=ready.slots_total,
            kv_blocks_total=ready.kv_blocks_total,
            kv_block_tokens=ready.kv_block_tokens,
            determinism=ready.determinism,
            attention=ready.attention,
            features=features,
            version=_version(),
            protocol_version=PROTOCOL_VERSION,
        )

    def heartbeat(self, generations: Generations) -> Heartbeat:
        """What runs here now."""
        return Heartbeat(
            instance_id=self._supervisor.instance_id or "none",
            status=self.status,
            running=generations.running(),
            slots_free=self._slots_offered(generations),
            kv_blocks_free=self._kv_blocks_free(),
            tokens_per_second=self._throughput.tokens_per_second,
            vram_used_bytes=self._supervisor.stats.vram_bytes,
        )

    def live_state(self, generations: Generations) -> LiveState:
        """What a scrape of `/metrics` reads."""
        ready = self._supervisor.ready
        return LiveState(
            status=self.status,
            slots_total=0 if ready is None else ready.slots_total,
            slots_used=generations.slots_used,
            running=generations.num_running,
            streams=generations.num_readers,
            retained=generations.num_retained,
            kv_blocks_total=0 if ready is None else ready.kv_blocks_total,
            engine_restarts=self._supervisor.restarts,
            tokens_per_second=self._throughput.tokens_per_second,
            engine=self._supervisor.stats,
        )

    def _detail(self) -> str | None:
        """Why it isn't ready; where it is, which attention paths were skipped and why."""
        if self._supervisor.detail is not None or self._supervisor.ready is None:
            return self._supervisor.detail
        return "reading the model's files" if self.digest is None else self._supervisor.ready.attention_notice or None

    def _slots_offered(self, generations: Generations) -> int:
        return generations.slots_free if self.status == "ready" else 0

    def _kv_blocks_free(self) -> int:
        ready, stats = self._supervisor.ready, self._supervisor.stats
        if ready is None or self._supervisor.state != "ready":
            return 0
        return ready.kv_blocks_total if stats.steps == 0 else stats.kv_blocks_free


def _version() -> str:
    try:
        return version("llorch")
    except PackageNotFoundError:
        return ""
