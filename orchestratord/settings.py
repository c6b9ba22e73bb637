"""Every setting of orchestratord: where it comes from, what it may be, and what to say when it is wrong.

Read `load` first: flag > `LLORCH_*` environment > `./llorch.toml` > `$XDG_CONFIG_HOME/llorch/config.toml` > default.
In a TOML file the settings stand in the table `[orchestratord]`; `api_keys`, `worker_key` and `redis_url` may also
stand at the top, where other programs look too. Keys never appear in a repr, a log line or an error.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError

from llorch_wire.layers import Layers, SettingsError, explain, values

DEFAULT_TENANT = "default"
ADMIN_TENANT = "admin"
ENV_PREFIX = "LLORCH_"
TOML_TABLE = "orchestratord"
TOP_LEVEL = frozenset({"api_keys", "worker_key", "redis_url"})
SECRET = frozenset({"api_keys", "worker_key", "redis_url", "jobs_redis_url", "webhook_secret"})

_TENANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY = re.compile(r"[!-+\--~]{8,512}")  # printable ASCII without space and comma


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whose tasks these are. `weight` is the tenant's share relative to the others, > 0."""

    name: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One client key and the tenant that it stands for."""

    tenant: Tenant
    key: SecretStr


def parse_api_keys(text: str) -> tuple[ApiKey, ...]:
    """Parse `tenant[:weight]=key,…`. Raises ValueError that counts entries and never quotes a key."""
    keys: list[ApiKey] = []
    weights: dict[str, float] = {}
    seen: set[str] = set()
    for number, entry in enumerate(filter(None, (part.strip() for part in text.split(","))), start=1):
        left, separator, key = entry.partition("=")
        name, colon, weight_text = left.strip().partition(":")
        if not separator or not _TENANT_NAME.fullmatch(name):
            raise ValueError(f"entry {number} must read tenant[:weight]=key, with a tenant of A-Z a-z 0-9 . _ -")
        if not _KEY.fullmatch(key):
            raise ValueError(f"entry {number} (tenant {name}): a key is 8 to 512 printable characters without spaces")
        if key in seen:
            raise ValueError(f"entry {number} (tenant {name}): this key stands there twice; every key must differ")
        weight = _weight(weight_text, number, name) if colon else weights.get(name, 1.0)
        if weights.setdefault(name, weight) != weight:
            raise ValueError(f"entry {number}: tenant {name} has two weights; give it one")
        seen.add(key)
        keys.append(ApiKey(Tenant(name, weight), SecretStr(key)))
    return tuple(keys)


def _weight(text: str, number: int, name: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and 0 < weight <= 1e6):
        raise ValueError(f"entry {number} (tenant {name}): a weight is a number above 0 and at most 1000000")
    return weight


def _keys_before(value: object) -> object:
    return parse_api_keys(value) if isinstance(value, str) else value


def _secret_before(value: object) -> object:
    if isinstance(value, str) and value and not _KEY.fullmatch(value):
        raise ValueError("must be 8 to 512 printable characters without spaces and commas")
    return value or None


def _default_data_dir() -> Path:
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "llorch" / "orchestratord"


Secret = Annotated[SecretStr | None, BeforeValidator(_secret_before), Field(repr=False)]
Url = Annotated[SecretStr | None, Field(repr=False)]
Ms = Annotated[int, Field(ge=1, le=24 * 3600 * 1000)]


class Settings(BaseModel):
    """Validated settings. Names are flags (`--redis-url`), variables (`LLORCH_REDIS_URL`) and TOML keys alike."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    # where
    host: str = Field("127.0.0.1", min_length=1, description="address to bind")
    port: int = Field(8080, ge=0, le=65535, description="port to bind; 0 takes a free one")
    advertise_url: str | None = Field(
        None, pattern=r"^https?://[^\s/]+$", description="URL at which workers reach this replica, if not the bound one"
    )
    replica_id: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$", description="name of this replica; made up when not given"
    )
    redis_url: Url = Field(
        None, description="redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://; embedded when not given"
    )
    jobs_redis_url: Url = Field(
        None, description="single-node Redis for background jobs, needed where redis-url is a cluster"
    )
    data_dir: Path = Field(default_factory=_default_data_dir, description="folder of the embedded Redis")
    redis_memory_mb: int | None = Field(
        None,
        ge=16,
        le=2**30,
        description="memory of the embedded Redis in MiB; a quarter of what there is when not given",
    )
    ready_file: Path | None = Field(None, description="JSON {url, pid}, renamed into place once requests are taken")

    # keys: no flags for these, a command line is public
    api_keys: Annotated[tuple[ApiKey, ...], BeforeValidator(_keys_before)] = Field((), repr=False)
    worker_key: Secret = Field(None)
    webhook_secret: Secret = Field(None)

    # log
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level to log")
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="json or console lines; auto: console on a terminal"
    )

    # bounds
    max_body_bytes: int = Field(8 * 2**20, ge=1024, le=2**30, description="largest request body")
    body_timeout_ms: Ms = Field(30_000, description="deadline for reading one request body")
    send_timeout_ms: Ms = Field(15_000, description="a reader that takes nothing for this long is cut off")
    keep_alive_ms: Ms = Field(5_000, description="comment on a silent stream this often")
    max_connections: int = Field(4096, ge=16, le=2**20, description="requests at once; more are refused with 429")
    max_queued_per_model: int = Field(10_000, ge=1, le=10**7, description="waiting tasks of one model")
    max_queued_per_tenant: int = Field(5_000, ge=1, le=10**7, description="waiting tasks of one tenant")
    max_queued: int = Field(50_000, ge=1, le=10**7, description="waiting tasks in total")
    queue_policy: Literal["reject", "drop_oldest_batch"] = Field(
        "reject", description="what a full queue does with one more interactive task"
    )
    when_no_workers: Literal["wait", "reject"] = Field(
        "wait", description="a known model that nothing serves at the moment: queue the task, or refuse it with 503"
    )
    default_max_tokens: int = Field(512, ge=1, le=2**31 - 1, description="max_tokens of a request that names none")
    max_failures: int = Field(5, ge=1, le=100, description="failed attempts without progress before a task is stopped")
    drain_timeout_ms: Ms = Field(5_000, description="time a graceful stop may take")

    # pace (docs/internals.md): change them together or not at all
    replica_lease_ms: Ms = Field(2_000, description="lease of this replica")
    replica_renew_ms: Ms = Field(500, description="renewal of that lease")
    worker_lease_ms: Ms = Field(4_000, description="lease of a worker")
    worker_heartbeat_ms: Ms = Field(1_000, description="pace of a worker's heartbeats")
    stall_timeout_ms: Ms = Field(2_500, description="silence of a worker's stream before it is probed")
    probe_timeout_ms: Ms = Field(1_000, description="deadline of such a probe")
    sweep_interval_ms: Ms = Field(500, description="pace of retries, deadlines and worker leases")
    dispatch_interval_ms: Ms = Field(500, description="longest pause between two dispatches")

    # background jobs
    retention_s: int = Field(24 * 3600, ge=1, le=10 * 365 * 86400, description="how long a finished task is kept")
    retention_count: int = Field(100_000, ge=0, le=10**8, description="how many finished tasks are kept at most")
    allow_private_callbacks: bool = Field(False, description="allow callback_url on private and loopback addresses")
    webhook_attempts: int = Field(8, ge=1, le=50, description="deliveries tried before a webhook is given up")

    @property
    def redis_memory_bytes(self) -> int | None:
        """`redis_memory_mb` in bytes."""
        return None if self.redis_memory_mb is None else self.redis_memory_mb * 2**20

    @property
    def is_loopback(self) -> bool:
        """Whether the bound address can be reached from this machine only."""
        return is_loopback_host(self.host)

    def tenants(self) -> tuple[Tenant, ...]:
        """Every configured tenant once; the default one where no keys are set."""
        return tuple(dict.fromkeys(key.tenant for key in self.api_keys)) or (Tenant(DEFAULT_TENANT),)


def is_loopback_host(host: str) -> bool:
    """Whether a host names this machine's loopback: `localhost`, `*.localhost`, 127.0.0.0/8, ::1."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False


def redacted_url(url: str) -> str:
    """A URL without its user, password and query, fit for a log line."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


LAYERS = Layers(
    frozenset(Settings.model_fields), TOML_TABLE, ENV_PREFIX, top_level={name: name for name in sorted(TOP_LEVEL)}
)


def load(
    flags: Mapping[str, object],
    *,
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    serves: bool = True,
) -> Settings:
    """Merge flags (name → value, None: not given), environment and files. Raises SettingsError.

    Where nothing is served over HTTP (`serves=False`), the address and the keys are not held against each other.
    """
    merged = LAYERS.merge(flags, os.environ if environ is None else environ, cwd or Path.cwd())
    try:
        settings = Settings.model_validate(values(merged))
    except ValidationError as error:
        raise explain(error, merged) from None
    if serves:
        _check_keys(settings)
    _check_together(settings)
    return settings


def _check_keys(settings: Settings) -> None:
    worker_key = settings.worker_key.get_secret_value() if settings.worker_key else None
    if worker_key and any(entry.key.get_secret_value() == worker_key for entry in settings.api_keys):
        raise SettingsError("LLORCH_WORKER_KEY: is one of LLORCH_API_KEYS too; clients and workers need different keys")
    missing = [
        name for name, value in (("LLORCH_API_KEYS", settings.api_keys), ("LLORCH_WORKER_KEY", worker_key)) if not value
    ]
    if missing and not settings.is_loopback:
        raise SettingsError(
            f"--host {settings.host}: refused, since anybody on the network could use it without a key. Set "
            f"{' and '.join(missing)} (LLORCH_API_KEYS='tenant=key,…'; a key: `openssl rand -hex 24`), "
            "or bind --host 127.0.0.1"
        )
    if missing == ["LLORCH_WORKER_KEY"]:
        raise SettingsError(
            "LLORCH_WORKER_KEY: must be set where LLORCH_API_KEYS is, since a worker is sent every client's prompts "
            "and without a key anybody could register one. Give orchestratord and its workers the same new key "
            "(`openssl rand -hex 24`)"
        )


def _check_together(settings: Settings) -> None:
    url = settings.redis_url.get_secret_value() if settings.redis_url else ""
    if url.startswith("redis+cluster:") and settings.jobs_redis_url is None:
        raise SettingsError(
            "--jobs-redis-url: needed with a Redis Cluster, on which background jobs can't run; give a single Redis"
        )
    if settings.replica_renew_ms * 2 > settings.replica_lease_ms:
        raise SettingsError("--replica-renew-ms: must be at most half of --replica-lease-ms")
    if settings.worker_heartbeat_ms * 2 > settings.worker_lease_ms:
        raise SettingsError("--worker-heartbeat-ms: must be at most half of --worker-lease-ms")
