"""A small network of "machines" on one: network namespaces with a bridge, each with its own name, sshd and boot id.

    10.217.1.1     this machine (the bridge): operator, orchestratord, the local hub
    10.217.1.11..  machine i: `ip netns` + `unshare --uts --mount`, one sshd

The file system is shared, so each machine gets its own home by sshd's SetEnv. Needs root and iproute2. A lock keeps two
test runs from using the same addresses.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.sshd import Machine, wait_for

SUBNET = "10.217.1"
GATEWAY = f"{SUBNET}.1"
BRIDGE = "llorch-br"


def missing_tools() -> str:
    """Why no namespaces can be made here, "" when they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool, package in (("ip", "iproute2"), ("unshare", "util-linux"), ("mount", "mount")):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (apt-get install {package})"
    probe = subprocess.run(["ip", "netns", "add", "llorch-probe"], capture_output=True, text=True, timeout=10)
    if probe.returncode:
        return f"network namespaces are not allowed here: {probe.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", "llorch-probe"], capture_output=True, timeout=10)
    return ""


def ip(*arguments: str, check: bool = True) -> None:
    """Run `ip`."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=20)
    if check:
        assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


@dataclass
class NamespaceMachine(Machine):
    """A machine in a network namespace of its own."""

    name: str = ""
    boot_id: Path = field(default_factory=Path)

    @property
    def namespace(self) -> str:
        """Name for `ip netns`."""
        return f"llorch-{self.name}"

    @property
    def link(self) -> str:
        """The bridge's end of its cable (15 characters at most)."""
        return f"ll-{self.name}"[:15]

    def plug_in(self) -> None:
        """Make the namespace and its cable."""
        ip("netns", "add", self.namespace)
        ip("link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", self.namespace)
        ip("link", "set", self.link, "master", BRIDGE)
        ip("link", "set", self.link, "up")
        ip("-n", self.namespace, "addr", "add", f"{self.host}/24", "dev", "eth0")
        ip("-n", self.namespace, "link", "set", "eth0", "up")
        ip("-n", self.namespace, "link", "set", "lo", "up")
        self.power_on()

    def power_on(self) -> None:
        """Boot: a new boot id, then sshd."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.boot_id = self.folder / "boot_id"
        self.boot_id.write_text(f"{uuid.uuid4()}\n")
        # `exec` all the way: the process that is started is sshd itself in the end.
        script = 'hostname "$1" && mount --bind "$2" /proc/sys/kernel/random/boot_id && shift 2 && exec "$@"'
        self.prefix = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount", "--propagation", "private"]
        self.prefix += ["sh", "-c", script, "sh", self.name, str(self.boot_id)]
        self.start()

    def power_off(self) -> None:
        """Everything in the namespace is gone at once, sshd too."""
        self.kill_everything()
        self.stop()
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not self.pids(), 10, "processes outlive the power cut")

    def pids(self) -> list[int]:
        """Every process in the namespace."""
        done = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, timeout=10)
        return [int(line) for line in done.stdout.split()]

    def cut(self) -> None:
        """Pull the cable: nothing gets through, nobody is told."""
        ip("link", "set", self.link, "down")

    def heal(self) -> None:
        """Plug the cable in again."""
        ip("link", "set", self.link, "up")

    def unplug(self) -> None:
        """Take everything away."""
        with suppress(AssertionError):
            self.power_off()
        ip("link", "del", self.link, check=False)
        ip("netns", "del", self.namespace, check=False)


@dataclass
class Network:
    """The bridge and the machines on it."""

    folder: Path
    authorized_key: Path
    machines: dict[str, NamespaceMachine] = field(default_factory=dict)

    def machine(self, name: str, **options: Any) -> NamespaceMachine:
        """A new machine that is up."""
        host = f"{SUBNET}.{11 + len(self.machines)}"
        made = NamespaceMachine(self.folder / name, host, 22, self.authorized_key, name=name, **options)
        self.machines[name] = made
        made.plug_in()
        return made


@contextmanager
def network(folder: Path, authorized_key: Path) -> Iterator[Network]:
    """Make the bridge; take it and every machine away at the end."""
    lock = (Path(tempfile.gettempdir()) / "llorch-test-network.lock").open("w")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _sweep()
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("addr", "add", f"{GATEWAY}/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        made = Network(folder, authorized_key)
        try:
            yield made
        finally:
            for machine in made.machines.values():
                machine.unplug()
            _sweep()


def _sweep() -> None:
    """What an earlier run that was killed left behind."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=10).stdout
    for line in listed.splitlines():
        name = line.split()[0] if line.split() else ""
        if name.startswith("llorch-"):
            done = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, timeout=10)
            for pid in done.stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            ip("netns", "del", name, check=False)
    ip("link", "del", BRIDGE, check=False)
