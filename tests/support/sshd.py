"""Real sshd processes for tests: on loopback for anybody, with their own configuration, host keys and state folders.

Nothing of the machine's own sshd or of the user's ~/.ssh is read or changed: the client is given a configuration of
its own by `-F` through `ssh_wrapper`, a small `ssh` that stands first on PATH.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"


def missing_tools() -> str:
    """Why no sshd can be run here, "" when it can."""
    if not Path(SSHD).exists():
        return "sshd is not installed (apt-get install openssh-server)"
    if shutil.which("ssh") is None or shutil.which("ssh-keygen") is None:
        return "ssh is not installed (apt-get install openssh-client)"
    return ""


def free_port(host: str = "127.0.0.1") -> int:
    """A port that is free right now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def wait_for(what: Callable[[], bool], seconds: float = 15.0, why: str = "") -> None:
    """Poll until `what` holds; AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, f"not within {seconds} s: {why or what}"
        time.sleep(0.02)


def keygen(path: Path) -> Path:
    """A new ed25519 key pair without passphrase."""
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)], check=True, timeout=20
    )
    return path


def listens(host: str, port: int) -> bool:
    """Whether something accepts connections there."""
    try:
        with socket.create_connection((host, port), timeout=0.5):
            return True
    except OSError:
        return False


@dataclass
class Machine:
    """One "machine": an sshd with its own host key, home and state."""

    folder: Path
    host: str
    port: int
    authorized_key: Path
    environ: dict[str, str] = field(default_factory=dict)
    extra_config: str = ""
    prefix: list[str] = field(default_factory=list)
    """Command that sshd is started under (a network namespace)."""
    process: subprocess.Popen[bytes] | None = None

    @property
    def user(self) -> str:
        """Who can log in: sshd that isn't root only lets its own user in."""
        return pwd.getpwuid(os.getuid()).pw_name

    @property
    def address(self) -> str:
        """As `llorch pool add` takes it."""
        return f"{self.user}@{self.host}:{self.port}"

    @property
    def home(self) -> Path:
        """$HOME of logins."""
        return self.folder / "home"

    @property
    def state(self) -> Path:
        """Where llorch-pool keeps entries of workers on this machine."""
        return self.home / ".local" / "state" / "llorch"

    @property
    def models(self) -> Path:
        """Where llorch-pool keeps models on this machine."""
        return self.home / ".local" / "share" / "llorch" / "models"

    def configure(self) -> None:
        """Write configuration and keys."""
        self.home.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        if not (self.folder / "host_key").exists():
            keygen(self.folder / "host_key")
        shutil.copy(self.authorized_key.with_suffix(".pub"), self.folder / "authorized_keys")
        # Logins read nothing of the real user's home: HOME is set before the shell starts.
        environ = {
            "HOME": str(self.home),
            "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            "OMP_NUM_THREADS": "1",
            **self.environ,
        }
        # Only the first SetEnv line counts, so all of them stand on one.
        pairs = " ".join(f'"{name}={value}"' for name, value in environ.items())
        (self.folder / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress {self.host}\nHostKey {self.folder}/host_key\n"
            f"AuthorizedKeysFile {self.folder}/authorized_keys\nPidFile none\nUsePAM no\nStrictModes no\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n"
            "PermitUserEnvironment no\nPrintMotd no\nMaxStartups 200\nMaxSessions 50\nUseDNS no\nLogLevel ERROR\n"
            f"SetEnv {pairs}\n{self.extra_config}"
        )

    def start(self) -> Machine:
        """Start sshd and wait until it listens."""
        self.configure()
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        log = (self.folder / "sshd.log").open("ab")
        with log:
            self.process = subprocess.Popen(
                [*self.prefix, SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_for(lambda: self._up(), 15, (self.folder / "sshd.log").read_text())
        return self

    def _up(self) -> bool:
        assert self.process is not None and self.process.poll() is None, (self.folder / "sshd.log").read_text()
        return listens(self.host, self.port)

    def stop(self) -> None:
        """End sshd and every session of it."""
        if self.process is not None:
            for number in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(self.process.pid, number)
                except ProcessLookupError:
                    break
                try:
                    self.process.wait(3)
                except subprocess.TimeoutExpired:
                    continue
            self.process.wait(5)
            self.process = None

    def processes(self) -> list[tuple[int, str]]:
        """(pid, command line) of everything that runs on this machine, sshd's own processes left out.

        Logins inherit HOME from the machine, and what they start does from them.
        """
        mark = f"HOME={self.home}".encode()
        found: list[tuple[int, str]] = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if mark not in (entry / "environ").read_bytes().split(b"\0"):
                    continue
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
                if (entry / "stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                    continue
            except (OSError, ProcessLookupError):
                continue
            if command and "sshd" not in command.split()[0]:
                found.append((int(entry.name), command))
        return found

    def kill_everything(self) -> None:
        """SIGKILL to all that runs on this machine: a power cut."""
        for pid, _ in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        wait_for(lambda: not self.processes(), 10)


@dataclass
class Operator:
    """The machine that llorch runs on: its own ssh client configuration, key and llorch folders."""

    folder: Path
    key: Path

    @property
    def environ(self) -> dict[str, str]:
        """Environment for `llorch`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("LLORCH_", "SSH_"))}
        (self.folder / "run").mkdir(exist_ok=True, mode=0o700)
        return {
            **kept,
            "PATH": f"{self.folder / 'bin'}:{Path(sys.executable).parent}:{kept['PATH']}",
            "HOME": str(self.folder),
            "XDG_CONFIG_HOME": str(self.folder / "config"),
            "XDG_RUNTIME_DIR": "",
            "TMPDIR": str(self.folder / "tmp"),
        }

    def llorch(
        self, *arguments: str, timeout: float = 120, environ: Mapping[str, str] | None = None, check: int | None = 0
    ) -> subprocess.CompletedProcess[str]:
        """Run `llorch`; `check` is the exit code that it must have (None: any)."""
        done = subprocess.run(
            [sys.executable, "-m", "llorch", *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
            env={**self.environ, **(environ or {})},
            cwd=self.folder,
        )
        if check is not None:
            assert done.returncode == check, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, *arguments: str, environ: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start `llorch` in the background."""
        return subprocess.Popen(
            [sys.executable, "-m", "llorch", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**self.environ, **(environ or {})},
            cwd=self.folder,
        )

    def add(self, name: str, machine: Machine, *options: str) -> None:
        """`llorch pool add`, agreeing to the host key."""
        self.llorch("pool", "add", name, machine.address, "-y", *options)

    def close(self) -> None:
        """End shared connections."""
        for path in (self.folder / "tmp").glob("llorch-*/*"):
            subprocess.run(["ssh", "-o", f"ControlPath={path}", "-O", "exit", "x"], capture_output=True, timeout=10)


@contextmanager
def operator(folder: Path) -> Iterator[Operator]:
    """An operator with a new key. TMPDIR is short: control sockets must fit into 107 bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    key = keygen(folder / "id_test")
    binaries = folder / "bin"
    binaries.mkdir()
    real = shutil.which("ssh") or "/usr/bin/ssh"
    config = folder / "ssh_config"
    config.write_text(f"IdentityFile {key}\nIdentitiesOnly yes\nIdentityAgent none\n")
    wrapper = binaries / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {real} -F {config} "$@"\n')
    wrapper.chmod(0o755)
    (folder / "tmp").mkdir()
    found = Operator(folder, key)
    try:
        yield found
    finally:
        found.close()
