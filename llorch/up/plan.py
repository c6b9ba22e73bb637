"""What `llorch up` starts, with which arguments, and when it starts it again. Pure: no I/O, no clock.

Read `commands` and `restart_delay_s` first.
"""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

RESTART_WINDOW_S = 60.0
RESTARTS_AT_ONCE = 2
RESTART_DELAY_MAX_S = 30.0

WORKER_DRAIN_S = 10.0
"""How long a stop lets running generations end; what is left goes on at the next `llorch up`."""

SUPERVISOR = "llorch up"
"""What `llorch-pool worker list` says of our workers."""

Kind: TypeAlias = Literal["redis", "orchestratord", "worker"]


@dataclass(frozen=True, slots=True)
class UpOptions:
    """What was asked for, checked. `model` is `demo`, an absolute folder or a downloaded model's name."""

    data_dir: Path
    workers: int = 1
    model: str = "demo"
    host: str = "127.0.0.1"
    port: int = 8080
    redis_url: str | None = None
    ready_file: Path | None = None
    slots: int | None = None
    threads: int = 1
    device: str | None = None
    advertised_host: str | None = None
    """Where other machines reach a stack that is bound to every address."""


class PartPlan(NamedTuple):
    """One child: its command line and what its environment needs besides this process' own."""

    kind: Kind
    name: str
    argv: Sequence[str]
    environment: dict[str, str]


def module(name: str, *arguments: str) -> list[str]:
    """`python -P -m name …`: -P, because a folder `worker/` where the user happens to be is not ours."""
    return [sys.executable, "-P", "-m", name, *arguments]


def redis_plan(data_dir: Path, url_file: Path) -> PartPlan:
    """The embedded Redis."""
    argv = module("orchestratord", "redis", "--data-dir", str(data_dir / "redis"), "--ready-file", str(url_file))
    return PartPlan("redis", "redis", argv, {})


def orchestratord_plan(options: UpOptions, port: int, redis_url: str, keys: dict[str, str]) -> PartPlan:
    """orchestratord. The Redis URL may hold a password, so it goes through the environment, as keys do."""
    argv = module("orchestratord", "--host", options.host, "--port", str(port))
    if options.advertised_host is not None:
        argv += ["--advertise-url", local_url(options.advertised_host, port)]
    return PartPlan("orchestratord", "orchestratord", argv, {**keys, "LLORCH_REDIS_URL": redis_url})


def worker_plan(options: UpOptions, worker_id: str, port: int, orchestrator: str, keys: dict[str, str]) -> PartPlan:
    """One worker, always on loopback: its orchestratord is on this machine.

    llorch-pool finds a device with room for it, puts it on record, and becomes it: the process stays our child.
    """
    argv = module("llorch_pool", "worker", "spawn", options.model, "--foreground", "--supervisor", SUPERVISOR)
    argv += ["--id", worker_id, "--host", "127.0.0.1", "--port", str(port), "--orchestrator", orchestrator]
    argv += ["--log", str(log_file(options.data_dir, worker_id))]
    for flag, value in (("--device", options.device), ("--slots", options.slots)):
        if value is not None:
            argv += [flag, str(value)]
    argv += ["--", "--threads", str(options.threads), "--drain-timeout", f"{WORKER_DRAIN_S:g}"]
    kept = {name: value for name, value in keys.items() if name == "LLORCH_WORKER_KEY"}
    return PartPlan("worker", worker_id, argv, {**kept, "OMP_NUM_THREADS": str(options.threads)})


def release_command(prefix: str) -> list[str]:
    """Takes the workers that have ended off llorch-pool's record; theirs are the ids that begin with `prefix`."""
    return module("llorch_pool", "worker", "release", "--supervisor", SUPERVISOR, "--prefix", prefix)


def log_file(data_dir: Path, part: str) -> Path:
    """Where a part's output goes."""
    return data_dir / "logs" / f"{part}.log"


def restart_delay_s(deaths: Sequence[float], now: float) -> float:
    """How long to wait before a part that has just died starts again.

    `deaths` are the times of its deaths, in seconds on the clock of `now`, the latest included. The first two within a
    minute are answered at once, from the third on with 1, 2, 4 … 30 s.
    """
    recent = sum(1 for at in deaths if now - at < RESTART_WINDOW_S)
    if recent <= RESTARTS_AT_ONCE:
        return 0.0
    return min(2.0 ** min(recent - RESTARTS_AT_ONCE - 1, 16), RESTART_DELAY_MAX_S)


def threads_per_worker(cores: int, workers: int) -> int:
    """All cores but one divided among workers, at least one each.

    The spare one is for Redis, orchestratord and the workers' HTTP sides: a compute thread that has to share its core
    holds up all the others at every barrier.
    """
    return max(1, (cores - 1) // max(1, workers))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def is_wildcard(host: str) -> bool:
    """Whether an address means every address of this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        return False


def local_url(host: str, port: int) -> str:
    """The URL at which this machine reaches what is bound to `host`; a wildcard is reached over loopback."""
    name = host.strip("[]")
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return f"http://{name}:{port}"
    if address.is_unspecified:
        name = "127.0.0.1" if address.version == 4 else "::1"
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"
