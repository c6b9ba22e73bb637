"""Workers that come back after a reboot: one systemd user unit that runs `llorch-pool worker restore` at boot.

A user unit starts at boot only where the user manager lingers (`loginctl enable-linger`). Where either is missing,
`enable` says which and what to do, and the worker is started all the same.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from pathlib import Path

from llorch_pool.context import Context
from llorch_pool.ending import end_process
from llorch_pool.errors import AbortedError, PoolError
from llorch_pool.files import write_atomic
from llorch_pool.launch import start
from llorch_pool.lifecycle import inspect
from llorch_pool.paths import python_at_boot
from llorch_pool.process import is_alive
from llorch_pool.registry import Registry, WorkerRecord
from llorch_pool.spawn import discard
from llorch_pool.user_manager import lingering, user_manager_answers
from llorch_wire.pool import WorkerInfo

UNIT = "llorch-pool-restore.service"
READY_TIMEOUT_S = 900.0


def unit_text(context: Context) -> str:
    """The unit. Workers it starts stay when it is stopped (KillMode=process): `worker stop` ends them."""
    kept = ("XDG_STATE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "LLORCH_MODELS", "LLORCH_HOSTNAME", "PATH")
    environment = "".join(
        f"Environment={_quoted(f'{name}={context.environ[name]}')}\n" for name in kept if context.environ.get(name)
    )
    return (
        "[Unit]\nDescription=Bring llorch workers back after a reboot\nAfter=network-online.target\n\n"
        "[Service]\nType=oneshot\nRemainAfterExit=yes\nKillMode=process\nTimeoutStartSec=infinity\n"
        f"{environment}ExecStart={_quoted(python_at_boot()).replace('$', '$$')} -m llorch_pool worker restore\n\n"
        "[Install]\nWantedBy=default.target\n"
    )


def _quoted(value: str) -> str:
    r"""As systemd.syntax(7) wants it: quotes and backslashes escaped, `%` doubled. (`$` is plain in Environment=.)"""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


def enable(context: Context) -> str:
    """Make the next boot bring workers back. Returns "" when it will, otherwise why it won't and what to do."""
    systemctl, loginctl = shutil.which("systemctl"), shutil.which("loginctl")
    if systemctl is None:
        return (
            f"this machine has no systemd: run `{_by_hand()}` at boot by its own means (cron's @reboot, the "
            "container's start command)"
        )
    if not user_manager_answers():
        return (
            "the systemd user manager does not answer here (`systemctl --user status` shows why): run "
            f"`{_by_hand()}` at boot by other means, for example cron's @reboot"
        )
    if not lingering() and loginctl is not None:
        subprocess.run([loginctl, "enable-linger"], capture_output=True, timeout=10)
    folder = _config_home(context) / "systemd" / "user"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / UNIT, unit_text(context).encode(), mode=0o644)
    for arguments in (["daemon-reload"], ["enable", UNIT]):
        done = subprocess.run([systemctl, "--user", *arguments], capture_output=True, text=True, timeout=20)
        if done.returncode != 0:
            return f"`systemctl --user {' '.join(arguments)}` failed: {done.stderr.strip()[:300]}"
    if not lingering():
        user = pwd.getpwuid(os.getuid()).pw_name
        return (
            f"user services of {user} only start at login here: an administrator runs `loginctl enable-linger {user}`"
        )
    return ""


def _by_hand() -> str:
    """What the unit does, as it is typed; with its path, for cron knows little of PATH."""
    program = Path(python_at_boot()).with_name("llorch-pool")
    return f"{program if program.exists() else 'llorch-pool'} worker restore"


def _config_home(context: Context) -> Path:
    value = context.environ.get("XDG_CONFIG_HOME", "")
    return Path(value) if value.startswith("/") else Path(context.environ.get("HOME") or Path.home()) / ".config"


def restore(context: Context) -> list[WorkerInfo]:
    """Start every worker that was spawned with --on-boot and died with the last boot, under its old name and key."""
    registry = Registry(context.paths.workers)
    back: list[WorkerInfo] = []
    for record in registry.all():
        if not record.on_boot or inspect(record, registry).state != "rebooted":
            continue
        info = _restore_one(context, registry, record.worker_id)
        if info is not None:
            back.append(info)
    return back


def _restore_one(context: Context, registry: Registry, worker_id: str) -> WorkerInfo | None:
    with registry.held(worker_id, context):
        record: WorkerRecord = registry.load(worker_id)
        if inspect(record, registry).state != "rebooted":
            return None
        context.log(f"{worker_id}: starting it again after the reboot")
        try:
            return start(context, registry, record, READY_TIMEOUT_S, registered=False)
        except AbortedError:
            discard(context, registry, worker_id)
            raise
        except PoolError as error:
            # The entry stays as it was, so that the next restore (or an operator) can try again.
            current = registry.load(worker_id)
            if current.identity is not None and is_alive(current.identity):
                end_process(context, registry, current, current.identity, grace_s=0)
            registry.save(record)
            context.log(f"{worker_id}: {error.message} {error.next_step}", "error")
            return None
