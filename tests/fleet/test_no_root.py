"""A bootstrap needs no root: a namespace machine on which only an ordinary user can log in, with an sshd of his own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.namespaces import SUBNET, NamespaceMachine, Network
from tests.support.sshd import Operator, wait_for

pytestmark = pytest.mark.e2e
UID = 4217
PATH = "/usr/local/bin:/usr/bin:/bin"

_BOOT = """
set -e
hostname "$1"; mount --bind "$2" /proc/sys/kernel/random/boot_id; mount --bind "$3" /etc/passwd; uid=$4; shift 4
exec setpriv --reuid "$uid" --regid "$uid" --clear-groups --no-new-privs "$@"
"""


@dataclass
class UsersMachine(NamespaceMachine):
    """Nobody is root here: sshd is started by the user, who can't become anybody else."""

    @property
    def user(self) -> str:
        return "oper"

    def configure(self) -> None:
        super().configure()
        for path in (self.folder, *self.folder.rglob("*")):
            os.chown(path, UID, UID, follow_symlinks=False)

    def power_on(self) -> None:
        """Boot into a passwd file that knows this user alone."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.boot_id = self.folder / "boot_id"
        self.boot_id.write_text("a-boot\n")
        passwd = self.folder / "passwd"
        passwd.write_text(f"root:x:0:0:root:/root:/bin/sh\noper:x:{UID}:{UID}::{self.home}:/bin/sh\n")
        self.prefix = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount", "--propagation", "private"]
        self.prefix += ["sh", "-c", _BOOT, "sh", self.name, str(self.boot_id), str(passwd), str(UID)]
        self.start()


def a_python_for_everybody() -> bool:
    """Whether an ordinary user finds a Python from 3.11 on."""
    python = shutil.which("python3", path=PATH)
    code = "import sys, venv; sys.exit(sys.version_info < (3, 11))"
    return python is not None and subprocess.run([python, "-c", code], timeout=20).returncode == 0


def test_a_bootstrap_without_root(op: Operator, net: Network, ground: Path, snapshot: dict[str, str]) -> None:
    if not a_python_for_everybody():
        # A Python in root's home can't be run by another user, however the bootstrap is written.
        pytest.skip("there is no Python from 3.11 on that an ordinary user could use")
    for folder in (ground, *ground.iterdir()):
        folder.chmod(0o711) if folder.is_dir() else None
    machine = UsersMachine(
        net.folder / "users", f"{SUBNET}.{11 + len(net.machines)}", 2222, op.key, name="users", environ={"PATH": PATH}
    )
    net.machines["users"] = machine
    machine.plug_in()
    op.llorch("pool", "add", "users", machine.address, "-y")
    done = op.llorch(
        "pool", "bootstrap", "users", "-y", "--source", "carry", "--extras", "none", timeout=300, environ=snapshot
    )
    command = str(machine.home / ".local/share/llorch/pool/current/bin/llorch-pool")
    assert command in done.stdout
    assert {path.lstat().st_uid for path in (machine.home / ".local").rglob("*")} == {UID}
    assert json.loads(op.llorch("pool", "devices", "-p", "users", "--json").stdout)[0]["device"] == "cpu"
    op.llorch("model", "download", "demo", "-p", "users")
    op.llorch("model", "verify", "demo", "-p", "users")
    assert (machine.home / ".local/bin/llorch-pool").exists()
    wait_for(lambda: not machine.processes(), 10)
