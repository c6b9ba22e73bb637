"""The one file that starts ssh, through plumbum, and with which options. Read `options` and `popen` first."""

from __future__ import annotations

import contextlib
import os
import select
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from zlib import crc32

from llorch.errors import UsageProblem
from llorch.fleet.pools import Pool, Pools

CONNECT_TIMEOUT_S = 10
RUNS_A_COMMAND = (
    # Whatever ~/.ssh/config says, stdin is ours, ssh stays in the foreground and a command runs. OpenSSH before 8.7
    # doesn't know these three. All unknown ones are to be ignored, not only they: what stands here takes the place of
    # an IgnoreUnknown in ~/.ssh/config, which would make what that one lets pass an error.
    "IgnoreUnknown=*",
    "StdinNull=no",
    "ForkAfterAuthentication=no",
    "SessionType=default",
    "RemoteCommand=none",
    "RequestTTY=no",
)


def control_folder() -> Path:
    """A short, private folder for control sockets: a unix socket's path may have 107 bytes, %C takes 40 of them."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    # Some logins (su, cron, containers) name a folder that nobody has made.
    if runtime.startswith("/") and len(runtime) < 30 and os.access(runtime, os.W_OK | os.X_OK):
        folder = Path(runtime) / "llorch"
    else:
        from tempfile import gettempdir

        folder = Path(gettempdir()) / f"llorch-{os.getuid()}"
    if len(str(folder)) > 40:
        folder = Path("/tmp") / f"llorch-{os.getuid()}"  # noqa: S108 - its owner and mode are checked below
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    stat = folder.lstat()
    if stat.st_uid != os.getuid() or stat.st_mode & 0o077 or not folder.is_dir() or folder.is_symlink():
        raise UsageProblem(f"{folder} belongs to somebody else or is open to others", next_step=f"remove {folder}")
    return folder


def options(pool: Pool, pools: Pools, *, shared: bool = True) -> list[str]:
    """ssh's options for a pool; the user's ~/.ssh/config, agent and jump hosts count for everything else."""
    settings = [
        *RUNS_A_COMMAND,
        "BatchMode=yes",
        f"ConnectTimeout={CONNECT_TIMEOUT_S}",
        "ServerAliveInterval=5",
        "ServerAliveCountMax=3",
        "ForwardAgent=no",
        "ForwardX11=no",
        "ClearAllForwardings=yes",
        "PermitLocalCommand=no",
    ]
    if pool.host_key:
        settings += [
            "StrictHostKeyChecking=yes",
            f"UserKnownHostsFile={config_value(pools.known_hosts)}",
            "GlobalKnownHostsFile=/dev/null",
            f"HostKeyAlias={pool.key_alias}",
            "CheckHostIP=no",
        ]
    if shared:
        settings += [
            "ControlMaster=auto",
            f"ControlPath={config_value(control_folder())}/{_mark(pool)}%C",
            "ControlPersist=60",
        ]
    else:
        settings += ["ControlMaster=no", "ControlPath=none"]
    arguments = ["-T"]
    for setting in settings:
        arguments += ["-o", setting]
    return arguments + target(pool)


def _mark(pool: Pool) -> str:
    """The pin is part of a shared connection's name: one that was made under another pin is not used."""
    return f"{crc32(f'{pool.name} {pool.host_key}'.encode()):08x}"


def is_connected(pool: Pool) -> bool:
    """Whether a shared connection to the pool seems to be up, as far as can be told without asking ssh."""
    return any(path.is_socket() for path in control_folder().glob(f"{_mark(pool)}*"))


def target(pool: Pool) -> list[str]:
    """Options that say where: port, user, key."""
    arguments: list[str] = []
    if pool.port:
        arguments += ["-p", str(pool.port)]
    if pool.user:
        arguments += ["-l", pool.user]
    if pool.identity_file:
        arguments += ["-i", pool.identity_file]
    return arguments


def config_value(path: Path) -> str:
    """A path as ssh's -o takes it: quoted where it has spaces, `%` doubled."""
    text = str(path).replace("%", "%%")
    return f'"{text}"' if " " in text else text


def popen(arguments: Sequence[str], *, program: str = "ssh", **kwargs: Any) -> subprocess.Popen[bytes]:
    """Start ssh (or one of its helpers) in a session of its own, with pipes. Raises UsageProblem if it isn't there."""
    plumbum = _plumbum()
    try:
        command = plumbum.local[program]
    except plumbum.CommandNotFound:
        raise UsageProblem(f"there is no `{program}` on this machine", next_step="install OpenSSH's client") from None
    process: Any = command.popen(list(arguments), new_session=True, **kwargs)
    return process


def _plumbum() -> ModuleType:
    """plumbum, without the HTTP client that it imports for file URLs: 18 ms of every command.

    plumbum marks urllib.request as lazy for the Pythons that have lazy imports; here it gets a stand-in that imports
    the real one when something of it is used.
    """
    name = "urllib.request"
    try:
        Path.cwd()
    except FileNotFoundError:  # it was removed; plumbum insists on one, and nothing here is relative to it
        os.chdir("/")
    if "plumbum" in sys.modules or name in sys.modules:
        return import_module("plumbum")

    def real(attribute: str) -> Any:
        return getattr(import_module(name), attribute)

    stand_in: Any = ModuleType(name)
    stand_in.__getattr__ = real
    sys.modules[name] = stand_in
    try:
        return import_module("plumbum")
    finally:
        del sys.modules[name]


def remote_command(pool: Pool, verb: str) -> str:
    """The constant remote command: where llorch-pool is (as recorded at bootstrap), and `rpc` or `stream`."""
    return f"exec {shlex.quote(pool.command)} {verb}"


def open_rpc(pool: Pool, pools: Pools) -> subprocess.Popen[bytes]:
    """ssh with `llorch-pool rpc` at its other end, which waits for a request."""
    return popen(_rpc(pool, pools))


def open_rpc_early(pool: Pool, pools: Pools) -> subprocess.Popen[bytes]:
    """The same before plumbum is loaded: that takes as long as the whole answer of a pool that is connected.

    Raises OSError where there is no ssh.
    """
    pipe = subprocess.PIPE
    arguments = ["ssh", *_rpc(pool, pools)]
    return subprocess.Popen(arguments, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True)


def _rpc(pool: Pool, pools: Pools) -> list[str]:
    return [*options(pool, pools), "--", pool.host, remote_command(pool, "rpc")]


def close_quietly(stream: Any) -> None:
    """Close a pipe whose other end may be gone."""
    with contextlib.suppress(OSError, ValueError):
        if stream is not None:
            stream.close()


def finish(process: subprocess.Popen[bytes], patience_s: float = 1.0) -> int | None:
    """Close the lifeline and see the process off. Its status, None if it had to be killed."""
    close_quietly(process.stdin)
    status: int | None = None
    try:
        status = _ended(process, patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
    close_quietly(process.stdout)
    close_quietly(process.stderr)
    return status


def _ended(process: subprocess.Popen[bytes], seconds: float) -> int:
    """The status, as soon as there is one. (Popen.wait looks now and then; a pidfd tells.) Raises TimeoutExpired."""
    if hasattr(os, "pidfd_open") and process.poll() is None:
        with contextlib.suppress(OSError):  # a kernel before 5.3
            handle = os.pidfd_open(process.pid)
            try:
                select.select([handle], [], [], seconds)
                seconds = 0.0
            finally:
                os.close(handle)
    return process.wait(seconds)
