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
import stat
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llorch.config import config_home
from llorch.errors import CliError, UsageProblem

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HOST = re.compile(r"[A-Za-z0-9_:][A-Za-z0-9_.:%-]{0,252}")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@\\-]{0,63}")
# In no field: a NUL ends a program's argument, and a lone surrogate is how bytes that aren't UTF-8 look.
_UNFIT = re.compile("[\0\ud800-\udfff]")
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
        """As people write it, and as `parse_address` reads it: user@host:port."""
        user = f"{self.user}@" if self.user else ""
        host = f"[{self.host}]" if self.port and ":" in self.host else self.host
        return f"{user}{host}" + (f":{self.port}" if self.port else "")

    @property
    def ssh_command(self) -> str:
        """The plain ssh command that goes where llorch goes, to be typed into a shell."""
        from shlex import join

        port = ["-p", str(self.port)] if self.port else []
        key = ["-i", self.identity_file] if self.identity_file else []
        return join(["ssh", *port, *key, f"{self.user}@{self.host}" if self.user else self.host])

    @property
    def key_alias(self) -> str:
        """The name under which the host's key is pinned: the pool's, so that a renamed host stays known."""
        return f"llorch-pool-{self.name}"


def _decoded(content: bytes) -> dict[str, Pool]:
    """The pools of a file; what this version doesn't know is left out. Raises ValueError that names what is wrong."""
    try:
        document: Any = json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    found: Any = document.get("pools", {}) if isinstance(document, dict) else None
    if not isinstance(found, dict):
        raise ValueError("it must be an object with an object `pools`")
    return {name: _pool(name, fields) for name, fields in found.items()}


def _pool(name: str, fields: Any) -> Pool:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name[:80]!r} can't be the name of a pool")
    if not isinstance(fields, dict):
        raise ValueError(f"pools.{name} must be an object")
    known = {key: value for key, value in fields.items() if key in Pool._fields}
    for key in Pool._fields:
        default = Pool._field_defaults.get(key, "")
        if key not in known and key not in Pool._field_defaults:
            raise ValueError(f"pools.{name}.{key} is missing")
        if type(known.get(key, default)) is not type(default):
            raise ValueError(f"pools.{name}.{key} must be a {'string' if isinstance(default, str) else 'number'}")
    pool = Pool(**known)
    if wrong := _wrong_field(name, pool):
        raise ValueError(f"pools.{name}.{wrong} can't be {known[wrong]!r:.80}")
    return pool


def _wrong_field(name: str, pool: Pool) -> str:
    """The first field that no `pool add` would have written, "" if there is none."""
    good = {
        "name": pool.name == name,
        "host": _is_host(pool.host),
        "user": not pool.user or bool(_USER.fullmatch(pool.user)),
        "port": 0 <= pool.port < 65536,
    }
    fit = {key: not (isinstance(value, str) and _UNFIT.search(value)) for key, value in pool._asdict().items()}
    return next((key for key in Pool._fields if not (good.get(key, True) and fit[key])), "")


def _read_regular(path: Path) -> bytes:
    """A file's content. Raises OSError also for what is no file: a fifo would be waited for without end."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError("it is not a regular file")
        with os.fdopen(handle, "rb", closefd=False) as stream:
            return stream.read()
    finally:
        os.close(handle)


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
            return _decoded(_read_regular(self.file))
        except FileNotFoundError:
            return {}
        except (ValueError, OSError) as error:
            raise _unreadable(self.file, error) from error

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
        """Forget a pool and its host key: the key first, so that what fails in between can be run again."""
        with self._locked():
            pools = self.all()
            pool = pools.pop(name, None) or self.get(name)
            self._write_pins(pool.key_alias, [])
            self._write_pools(pools)
        return pool

    def pin(self, alias: str, keys: list[str]) -> None:
        """Make `keys` (`type base64`) the only ones known for `alias`; none forgets it."""
        with self._locked():
            self._write_pins(alias, keys)

    def _write_pins(self, alias: str, keys: list[str]) -> None:
        try:
            # Whatever bytes others have left there stay as they are.
            lines = _read_regular(self.known_hosts).decode("utf-8", "surrogateescape").split("\n")
        except FileNotFoundError:
            lines = []
        except OSError as error:
            raise _unreadable(self.known_hosts, error) from error
        kept = [line for line in lines if line and line.split(" ", 1)[0] != alias]
        self._write(self.known_hosts, "".join(f"{line}\n" for line in [*kept, *(f"{alias} {key}" for key in keys)]))

    def _change(self, change: Callable[[dict[str, Pool]], dict[str, Pool]]) -> None:
        with self._locked():
            self._write_pools(change(self.all()))

    def _write_pools(self, pools: Mapping[str, Pool]) -> None:
        content = {"version": 1, "pools": {name: pool._asdict() for name, pool in pools.items()}}
        self._write(self.file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

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

        path = Path(os.path.realpath(path))  # a link stays one: settings are often kept in another folder
        handle, name = mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", errors="surrogateescape") as stream:
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
    host, port = rest, "-"
    if rest.startswith("["):
        host, _, behind = rest[1:].partition("]")
        colon, port = behind[:1], behind[1:] if behind else "-"
        host = host if colon in ("", ":") and rest.count("]") == 1 else ""
    elif rest.count(":") == 1:
        host, _, port = rest.partition(":")
    number = int(port) if port.isascii() and port.isdigit() and len(port) < 6 else 0
    good = _is_host(host) and (port == "-" or 0 < number < 65536)
    if not good or (at and not _USER.fullmatch(user)):
        raise UsageProblem(f"{text!r} is not [user@]host[:port]", next_step="llorch pool add NAME user@host")
    return user, host, number


def _is_host(text: str) -> bool:
    """A name, an IPv4 address, or an IPv6 address, which has two colons or more."""
    dangling = text.endswith(":") and not text.endswith("::")
    return bool(_HOST.fullmatch(text)) and text.count(":") != 1 and not dangling


def _unreadable(path: Path, error: Exception) -> CliError:
    return CliError(f"{path} can't be read: {error}", next_step=f"correct or remove {path}")
