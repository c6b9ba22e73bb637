"""What is done to a town, by name, for each deployment of Redis. Read `faults_of`."""

from __future__ import annotations

from tests.chaos.support.process_faults import (
    cut_replica,
    cut_replica_from_redis,
    cut_replica_from_workers,
    cut_worker,
    engine_kill,
    real_worker_kill,
    replica_kill,
    replica_stop,
    replica_term,
    worker_drain,
    worker_kill,
    worker_stop,
)
from tests.chaos.support.redis_faults import (
    aof_rewrite,
    cluster_node_kill,
    redis_kill,
    redis_pause,
    redis_reset,
    script_flush,
    sentinel_failover,
    sentinel_failover_lagging,
    sentinel_master_pause,
)
from tests.chaos.support.scene import Fault

REPLICA_FAULTS: dict[str, Fault] = {
    "replica_kill": replica_kill, "replica_stop": replica_stop, "replica_term": replica_term,
}  # fmt: skip
WORKER_FAULTS: dict[str, Fault] = {
    "worker_kill": worker_kill, "worker_stop": worker_stop, "worker_drain": worker_drain,
}  # fmt: skip
REAL_FAULTS: dict[str, Fault] = {"engine_kill": engine_kill, "real_worker_kill": real_worker_kill}
REDIS_FAULTS: dict[str, Fault] = {
    "redis_reset": redis_reset, "script_flush": script_flush, "aof_rewrite": aof_rewrite,
}  # fmt: skip
SINGLE_FAULTS: dict[str, Fault] = {"redis_kill": redis_kill, "redis_pause": redis_pause}
SENTINEL_FAULTS: dict[str, Fault] = {
    "sentinel_failover": sentinel_failover,
    "sentinel_failover_lagging": sentinel_failover_lagging,
    "sentinel_master_pause": sentinel_master_pause,
}
PARTITION_FAULTS: dict[str, Fault] = {
    **SINGLE_FAULTS,
    "cut_worker": cut_worker,
    "cut_replica_from_redis": cut_replica_from_redis,
    "cut_replica_from_workers": cut_replica_from_workers,
    "cut_replica": cut_replica,
}
CLUSTER_FAULTS: dict[str, Fault] = {**SINGLE_FAULTS, "cluster_node_kill": cluster_node_kill}


def faults_of(kind: str, *, real_worker: bool) -> dict[str, Fault]:
    """Every kind of fault that a deployment of Redis goes through."""
    own = {
        "redis": SINGLE_FAULTS, "sentinel": SENTINEL_FAULTS, "cluster": CLUSTER_FAULTS, "partition": PARTITION_FAULTS,
    }[kind]  # fmt: skip
    real = REAL_FAULTS if real_worker else {}
    return {**REPLICA_FAULTS, **WORKER_FAULTS, **real, **REDIS_FAULTS, **own}
