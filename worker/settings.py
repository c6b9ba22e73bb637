"""Every setting of llorch-worker: where it comes from, what it may be, and what to say when it is wrong.

Read `load` first: flag > `LLORCH_WORKER_*` environment > `./llorch.toml` > `$XDG_CONFIG_HOME/llorch/config.toml` >
default. In a TOML file the settings stand in the table `[worker]`. The key has no flag: a command line is public.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError

from llorch_wire.layers import Layers, SettingsError, explain, flag_name, values

ENV_PREFIX = "LLORCH_WORKER_"
TOML_TABLE = "worker"
SHARED = {
    "key": ("LLORCH_WORKER_KEY", "worker_key"),
    "orchestrator": ("LLORCH_ORCHESTRATOR", "orchestrator"),
    "pool": ("LLORCH_POOL", "pool"),
    "log_level": ("LLORCH_LOG_LEVEL", None),
    "log_format": ("LLORCH_LOG_FORMAT", None),
}
"""Settings that other programs know too: their common variable, and their name at the top of a TOML file."""
NO_FLAG = frozenset({"key", "log_max_bytes"})

_KEY = re.compile(r"[!-+\--~]{8,512}")  # printable ASCII without space and comma
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(b|kib|mib|gib|kb|mb|gb|k|m|g)?", re.IGNORECASE)
_UNITS = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30}
_ENGINES = {"torch": "worker.engine.main"}
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d{1,3})?", re.ASCII)
_DTYPES = ("auto", "float32", "bfloat16", "float16")


def _urls(value: object) -> object:
    urls = [url.strip().rstrip("/") for url in value.split(",")] if isinstance(value, str) else value
    if isinstance(urls, list | tuple):
        urls = tuple(url for url in urls if url != "")
        for url in urls:
            parts = urlsplit(url) if isinstance(url, str) else None
            if parts is None or parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
                raise ValueError("must be http(s)://host:port, several separated by commas")
    return urls


def _key(value: object) -> object:
    if isinstance(value, str) and value and not _KEY.fullmatch(value):
        raise ValueError("must be 8 to 512 printable characters without spaces and commas")
    return value or None


def _device(value: object) -> object:
    if isinstance(value, str) and not _DEVICE.fullmatch(value):
        raise ValueError("must be auto, cpu, mps, cuda or cuda:N, such as cuda:0 for the first GPU")
    return value


def _dtype(value: object) -> object:
    if isinstance(value, str) and value not in _DTYPES:
        raise ValueError(f"must be one of {', '.join(_DTYPES)}")
    return value


def _bytes(value: object) -> object:
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise ValueError("must be a size such as 512MiB, 2GiB or a number of bytes")
    unit = (match[2] or "").lower()
    decimal = len(unit) == 2  # kB, MB, GB
    scale = {"k": 10**3, "m": 10**6, "g": 10**9}[unit[0]] if decimal else _UNITS[unit[:1]]
    return int(float(match[1]) * scale)


Size = Annotated[int, BeforeValidator(_bytes)]


class Settings(BaseModel):
    """Validated settings. `slots` becomes `--slots`, `LLORCH_WORKER_SLOTS` and `[worker] slots`."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    # what and where
    model: str = Field(min_length=1, description="`demo`, a model folder, or the name of a downloaded model")
    model_name: str | None = Field(
        None, min_length=1, max_length=256, description="name clients ask for; default: the folder's name"
    )
    orchestrator: Annotated[tuple[str, ...], BeforeValidator(_urls)] = Field(
        (), description="URL of orchestratord, several separated by commas; without one the worker serves by itself"
    )
    worker_id: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$", description="name of this worker; default: host-port"
    )
    pool: str = Field("local", min_length=1, max_length=256, description="pool that this worker belongs to")
    host: str = Field("127.0.0.1", min_length=1, description="address to bind")
    port: int = Field(0, ge=0, le=65535, description="port to bind; 0 takes a free one")
    advertise_url: str | None = Field(
        None, pattern=r"^https?://[^\s/]+$", description="URL at which orchestratord reaches this worker"
    )
    ready_file: Path | None = Field(
        None, description="JSON {worker_id, url, pid, instance_id}, renamed into place once work is taken"
    )
    key: Annotated[SecretStr | None, BeforeValidator(_key)] = Field(None, repr=False)

    # engine
    engine: str = Field("torch", pattern=r"^[A-Za-z_][\w.]*$", description="`torch`, or the module of another engine")
    device: Annotated[str | None, BeforeValidator(_device)] = Field(
        None, description="cuda, cuda:N, cpu or mps; by default the best that is there"
    )
    dtype: Annotated[str | None, BeforeValidator(_dtype)] = Field(
        None, description="float32, bfloat16 or float16; by default what suits the device"
    )
    slots: int | None = Field(None, ge=1, le=65536, description="generations at a time")
    max_model_len: int | None = Field(None, ge=1, description="longest prompt plus answer, in tokens")
    kv_memory: Size | None = Field(None, ge=2**20, description="memory for the KV cache, such as 2GiB")
    attention: str | None = Field(None, min_length=1, max_length=64, description="attention path, strictly this one")
    max_batch_tokens: int | None = Field(None, ge=1, description="tokens in one forward pass")
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads of the engine")
    deterministic: bool = Field(False, description="batch-invariant kernels: exact continuations, slower")
    no_prefix_cache: bool = Field(False, description="switch the prefix cache off")

    # behaviour
    orphan_grace_ms: int = Field(
        30_000, ge=0, le=24 * 3600 * 1000, description="a generation that nobody reads goes on for this long"
    )
    idle_timeout: float | None = Field(None, gt=0, description="seconds without work after which the worker ends")
    drain_timeout: float = Field(25.0, ge=0, le=24 * 3600, description="seconds that a stop waits for running work")
    engine_stall_timeout: float = Field(
        60.0, gt=0, description="seconds without a sign of life after which a busy engine is replaced"
    )
    load_timeout: float = Field(1800.0, gt=0, description="seconds that loading the model may take")
    stay_on_load_failure: bool = Field(
        False, description="keep answering /health when the model can't be loaded, instead of ending with status 1"
    )
    max_body_bytes: Size = Field(8 * 2**20, ge=1024, le=2**30, description="largest request body")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level to log")
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="json or console lines; auto: console on a terminal"
    )
    log_max_bytes: Size = Field(
        50 * 2**20, ge=0, description="size at which the log file behind stderr is rotated; 0: never"
    )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches the bound address."""
        return is_loopback_host(self.host)

    @property
    def engine_module(self) -> str:
        """Module that `python -m` starts as the engine process."""
        return _ENGINES.get(self.engine, self.engine)

    def engine_arguments(self) -> list[str]:
        """Flags for the engine process, only those that were given."""
        arguments: list[str] = []
        for name in (
            "device",
            "dtype",
            "slots",
            "max_model_len",
            "kv_memory",
            "attention",
            "max_batch_tokens",
            "threads",
        ):
            value = getattr(self, name)
            if value is not None:
                arguments += [flag_name(name), str(value)]
        return arguments + [flag_name(name) for name in ("deterministic", "no_prefix_cache") if getattr(self, name)]


def is_loopback_host(host: str) -> bool:
    """Whether a host names this machine's loopback: `localhost`, 127.0.0.0/8, ::1."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def reachable_host(settings: Settings) -> str:
    """Host for the URL that others use: the bound one, or for a wildcard the address that faces the orchestrator."""
    host = settings.host.strip("[]")
    try:
        wildcard = ipaddress.ip_address(host).is_unspecified
    except ValueError:
        wildcard = False
    if not wildcard:
        return f"[{host}]" if ":" in host else host
    target = urlsplit(settings.orchestrator[0]).hostname if settings.orchestrator else None
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connect sends nothing on UDP
            probe.connect((target or "192.0.2.1", 9))
            return str(probe.getsockname()[0])
    except OSError:
        return socket.gethostname()


LAYERS = Layers(
    frozenset(Settings.model_fields),
    TOML_TABLE,
    ENV_PREFIX,
    shared_env={name: variable for name, (variable, _) in SHARED.items()},
    top_level={name: top for name, (_, top) in SHARED.items() if top is not None},
)


def load(flags: Mapping[str, object], *, environ: Mapping[str, str] | None = None, cwd: Path | None = None) -> Settings:
    """Merge flags (name → value, None: not given), environment and files. Raises SettingsError."""
    merged = LAYERS.merge(flags, os.environ if environ is None else environ, cwd or Path.cwd())
    if "model" not in merged:
        raise SettingsError("--model is missing: give a model folder, or `--model demo` for the bundled model")
    try:
        settings = Settings.model_validate(values(merged))
    except ValidationError as error:
        raise explain(error, merged) from None
    if settings.key is None and not settings.is_loopback:
        raise SettingsError(
            f"--host {settings.host}: refused, since anybody on the network could use this worker without a key. "
            "Set LLORCH_WORKER_KEY, the same for orchestratord (a key: `openssl rand -hex 24`), "
            "or bind --host 127.0.0.1"
        )
    return settings
