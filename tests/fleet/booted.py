"""A namespace machine that is booted with systemd's user manager, as a real one with lingering is. Needs root.

ip netns ── unshare (hostname, mounts) ── /run, /var/lib/systemd: empty, its own
                 ├── systemd --user      the user manager; starts default.target, as at boot
                 └── sshd                sessions get XDG_RUNTIME_DIR, as pam_systemd sets it
"""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tests.support.namespaces import NamespaceMachine
from tests.support.sshd import wait_for

SYSTEMD = Path("/lib/systemd/systemd")
RUNTIME = "/run/user/0"
_HIERARCHIES = (Path("/sys/fs/cgroup/systemd"), Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"))

_BOOT = """
set -e
hostname "$1"; mount --bind "$2" /proc/sys/kernel/random/boot_id; home=$3; linger=$4; groups=$5; shift 5
for group in $groups; do echo $$ > "$group/cgroup.procs"; done
mount -t tmpfs tmpfs /run; mkdir -p /run/systemd/system /run/sshd; mkdir -p -m 700 /run/user/0
mount --bind "$linger" /var/lib/systemd
env -i HOME="$home" PATH=/usr/local/bin:/usr/bin:/bin XDG_RUNTIME_DIR=/run/user/0 /lib/systemd/systemd --user \
  --log-target=console </dev/null >"$home/../manager.log" 2>&1 &
exec "$@"
"""


def missing_tools() -> str:
    """Why no user manager can be run here, "" when it can."""
    if not SYSTEMD.exists() or shutil.which("systemctl") is None:
        return "systemd is not installed (apt-get install systemd)"
    if Path("/run/systemd/system").exists():
        return "this machine is run by systemd itself: another manager would be in its way"
    if not _writable():
        return "control groups can't be made here"
    return ""


def _writable() -> list[Path]:
    return [path for path in _HIERARCHIES if (path / "cgroup.procs").exists() and os.access(path, os.W_OK)]


@dataclass
class BootedMachine(NamespaceMachine):
    """`lingers`: an administrator has enabled lingering for the user."""

    lingers: bool = True

    @property
    def control_groups(self) -> list[Path]:
        """One group in each hierarchy: what the manager takes for the root of its own."""
        return [path / f"llorch-{self.name}" for path in _writable()]

    def power_on(self) -> None:
        """Boot: a new boot id, the user manager, sshd."""
        self.environ = {**self.environ, "XDG_RUNTIME_DIR": RUNTIME}
        self.home.mkdir(parents=True, exist_ok=True)
        linger = self.folder / "var-lib-systemd" / "linger"
        linger.mkdir(parents=True, exist_ok=True)
        if self.lingers:
            (linger / self.user).touch()
        for group in self.control_groups:
            group.mkdir(exist_ok=True)
        super().power_on()
        wait_for(lambda: self.user_manager("is-system-running").strip() in ("running", "degraded"), 20, self.log())

    def start(self) -> BootedMachine:
        """Start what boots, in place of sshd alone."""
        groups = " ".join(str(group) for group in self.control_groups)
        # Not `ip netns exec`: it mounts another /sys, without the control groups.
        self.prefix = ["nsenter", f"--net=/run/netns/{self.namespace}", "unshare", "--uts", "--mount"]
        self.prefix += ["--propagation", "private"]
        self.prefix += ["sh", "-c", _BOOT, "sh", self.name, str(self.boot_id), str(self.home)]
        self.prefix += [str(self.folder / "var-lib-systemd"), groups]
        super().start()
        return self

    def log(self) -> str:
        """What the manager said."""
        with suppress(OSError):
            return (self.folder / "manager.log").read_text()
        return ""

    def user_manager(self, *arguments: str) -> str:
        """`systemctl --user ...` on the machine."""
        assert self.process is not None
        command = ["nsenter", "--target", str(self.process.pid), "--mount", "--net", "--uts"]
        command += ["env", "-i", "PATH=/usr/bin:/bin", f"XDG_RUNTIME_DIR={RUNTIME}", "systemctl", "--user", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        return done.stdout + done.stderr

    def power_off(self) -> None:
        """Everything is gone at once, the manager too; its groups with it."""
        super().power_off()
        wait_for(self._groups_gone, 10, "processes are left in its control groups")

    def _groups_gone(self) -> bool:
        for group in self.control_groups:
            for folder in [*sorted(group.rglob("*/"), reverse=True), group]:
                with suppress(OSError):  # not empty yet, or a file
                    folder.rmdir()
        return not any(group.exists() for group in self.control_groups)
