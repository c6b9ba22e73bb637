"""The pools that this operator knows: `$XDG_CONFIG_HOME/llorch/pools.json`, and pinned host keys beside it.

Written atomically under a lock, so that two commands at once don't lose each other's change. Read `Pools` first.
What it imports is loaded before a command's connection starts (see llorch.fleet.head_start): plain json, no msgspec.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llorch.config import config_home
from llorch.errors import CliError, UsageProblem

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HOST = re.compile(r"[A-Za-z0-9_\[:][A-Za-z0-9_.:%\[\]-]{0,252}")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@\\-]{0,63}")
LOCK_DEADLINE_S = 10.0


class Pool(NamedTuple):
    """One machine. `host` may be a name from ~/.ssh/config; `command` is how llorch-pool is started there."""

    name: str
    host: str
    user: str = ""
    port: int = 0
    identity_file: str = ""
    command: str = "llorch-pool"
    orchestrator: str = ""
    """URL of orchestratord as this machine sees it; "" takes the one that --orchestrator or settings give."""
    host_key: str = ""
    """Fingerprint of the pinned host key; "" leaves host keys to the user's own known_hosts."""
    version: str = ""
    added_at_ms: int = 0

    @property
    def address(self) -> str:
        """As people write it: user@host:port."""
        user = f"{self.user}@" if self.user else ""
        return f"{user}{self.host}" + (f":{self.port}" if self.port else "")

    @property
    def key_alias(self) -> str:
        """The name under which the host's key is pinned: the pool's, so that a renamed host stays known."""
        return f"llorch-pool-{self.name}"


def _decoded(content: bytes) -> dict[str, Pool]:
    """The pools of a file; what this version doesn't know is left out. Raises ValueError that names what is wrong."""
    document: Any = json.loads(content)
    found: Any = document.get("pools", {}) if isinstance(document, dict) else None
    if not isinstance(found, dict):
        raise ValueError("it must be an object with an object `pools`")
    return {name: _pool(name, fields) for name, fields in found.items()}


def _pool(name: str, fields: Any) -> Pool:
    if not isinstance(fields, dict):
        raise ValueError(f"pools.{name} must be an object")
    known = {key: value for key, value in fields.items() if key in Pool._fields}
    for key in Pool._fields:
        default = Pool._field_defaults.get(key, "")
        if key not in known and key not in Pool._field_defaults:
            raise ValueError(f"pools.{name}.{key} is missing")
        if type(known.get(key, default)) is not type(default):
            raise ValueError(f"pools.{name}.{key} must be a {'string' if isinstance(default, str) else 'number'}")
    return Pool(**known)


class Pools:
    """The registry in one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.known_hosts = folder / "known_hosts"

    @classmethod
    def open(cls, environ: Mapping[str, str] | None = None) -> Pools:
        """The registry that the environment names."""
        return cls(config_home(os.environ if environ is None else environ))

    @property
    def file(self) -> Path:
        """The registry's file."""
        return self._folder / "pools.json"

    def all(self) -> dict[str, Pool]:
        """Every pool by name. Raises CliError for a file that can't be read."""
        try:
            return _decoded(self.file.read_bytes())
        except FileNotFoundError:
            return {}
        except (ValueError, OSError) as error:
            raise CliError(f"{self.file} can't be read: {error}", next_step=f"correct or remove {self.file}") from error

    def get(self, name: str) -> Pool:
        """One pool. Raises UsageProblem that names those that there are."""
        pools = self.all()
        if name not in pools:
            there = ", ".join(sorted(pools)) or "none yet"
            raise UsageProblem(f"no pool {name!r} (there is: {there})", next_step="llorch pool list")
        return pools[name]

    def chosen(self, names: list[str], everything: bool) -> list[Pool]:
        """The pools that `-p` and `--all` name; with neither, the only one there is. Raises UsageProblem."""
        pools = self.all()
        if everything and names:
            raise UsageProblem("-p and --all exclude each other", next_step="leave one of them out")
        if names:
            return [self.get(name) for name in dict.fromkeys(names)]
        if not pools:
            raise UsageProblem("no pool is known yet", next_step="llorch pool add NAME user@host")
        if not everything and len(pools) > 1:
            raise UsageProblem(
                f"which pool? There is: {', '.join(sorted(pools))}", next_step="name one with -p, or give --all"
            )
        return [pools[name] for name in sorted(pools)]

    def put(self, pool: Pool) -> None:
        """Add or replace a pool."""
        self._change(lambda pools: pools | {pool.name: pool})

    def update(self, name: str, **changes: str) -> None:
        """Change fields of a pool, if it is still there."""

        def changed(pools: dict[str, Pool]) -> dict[str, Pool]:
            return pools | {name: pools[name]._replace(**changes)} if name in pools else pools

        self._change(changed)

    def remove(self, name: str) -> Pool:
        """Forget a pool and its host key."""
        pool = self.get(name)
        self._change(lambda pools: {key: value for key, value in pools.items() if key != name})
        self.pin(pool.key_alias, [])
        return pool

    def pin(self, alias: str, keys: list[str]) -> None:
        """Make `keys` (`type base64`) the only ones known for `alias`; none forgets it."""
        with self._locked():
            try:
                lines = self.known_hosts.read_text().splitlines()
            except FileNotFoundError:
                lines = []
            kept = [line for line in lines if line.split(" ", 1)[0] != alias]
            self._write(self.known_hosts, "".join(f"{line}\n" for line in [*kept, *(f"{alias} {key}" for key in keys)]))

    def _change(self, change: Callable[[dict[str, Pool]], dict[str, Pool]]) -> None:
        with self._locked():
            pools = {name: pool._asdict() for name, pool in change(self.all()).items()}
            self._write(self.file, json.dumps({"version": 1, "pools": pools}, indent=2, ensure_ascii=False) + "\n")

    @contextlib.contextmanager
    def _locked(self) -> Generator[None]:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(self._folder / "pools.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            end = time.monotonic() + LOCK_DEADLINE_S
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise CliError(
                            f"another llorch has held {self._folder}/pools.lock for {LOCK_DEADLINE_S:g} s",
                            next_step="wait for it, or end it",
                        ) from None
                    time.sleep(0.02)
            yield
        finally:
            os.close(handle)

    def _write(self, path: Path, text: str) -> None:
        from tempfile import mkstemp

        handle, name = mkstemp(prefix=f".{path.name}.", dir=self._folder)
        try:
            with os.fdopen(handle, "w") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def check_pool_name(name: str) -> str:
    """`name`, if it can be one. Raises UsageProblem."""
    if not _NAME.fullmatch(name):
        raise UsageProblem(
            f"{name!r} can't be the name of a pool",
            next_step="use 1 to 64 letters, digits, dots, dashes or underscores, the first a letter or digit",
        )
    return name


def parse_address(text: str) -> tuple[str, str, int]:
    """(user, host, port) of `[user@]host[:port]`; "" and 0 where not given. Raises UsageProblem.

    A name from ~/.ssh/config is a host; an IPv6 address with a port needs brackets.
    """
    user, at, rest = text.rpartition("@")
    host, port = rest, ""
    dangling = rest.endswith(":") and not rest.endswith("::")
    if rest.startswith("["):
        inner, closed, behind = rest[1:].partition("]")
        host, port = (inner, behind.removeprefix(":")) if closed else (rest, "")
    elif rest.count(":") == 1:
        host, _, port = rest.partition(":")
    good = (
        not dangling
        and bool(_HOST.fullmatch(host))
        and (not port or (port.isascii() and port.isdigit() and 0 < int(port) < 65536))
    )
    good = good and (not at or bool(_USER.fullmatch(user)))
    if not good:
        raise UsageProblem(f"{text!r} is not [user@]host[:port]", next_step="llorch pool add NAME user@host")
    return user, host, int(port or 0)
