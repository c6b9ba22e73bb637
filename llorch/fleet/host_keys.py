"""Which key a host has, and what its fingerprint is. Read `offered` first.

ssh itself fetches the key (not ssh-keyscan), so that jump hosts and ~/.ssh/config count: it connects without offering
any credential, writes the key to a file of its own, and is refused.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

from llorch.errors import CliError
from llorch.fleet import connection, failures
from llorch.fleet.pools import Pool

TIMEOUT_S = 25.0


class HostKey(NamedTuple):
    """`key` is `type base64`, as known_hosts has it; `fingerprint` is SHA256:... as ssh shows it."""

    key: str
    kind: str
    fingerprint: str


def offered(pool: Pool) -> HostKey:
    """The key that the host shows right now. Raises CliError (classified) when it can't be reached."""
    with tempfile.TemporaryDirectory(prefix="llorch-key-") as folder:
        known = Path(folder) / "known_hosts"
        arguments = ["-T"]
        for setting in (
            *connection.RUNS_A_COMMAND,
            "BatchMode=yes",
            f"ConnectTimeout={connection.CONNECT_TIMEOUT_S}",
            "ControlMaster=no",
            "ControlPath=none",
            "ClearAllForwardings=yes",
            # Safe only because the file is new and thrown away, and nothing is sent: the key is shown, then pinned.
            "StrictHostKeyChecking=accept-new",
            f"UserKnownHostsFile={connection.config_value(known)}",
            "GlobalKnownHostsFile=/dev/null",
            f"HostKeyAlias={pool.key_alias}",
            "CheckHostIP=no",
            "HashKnownHosts=no",
            "PreferredAuthentications=none",
        ):
            arguments += ["-o", setting]
        process = connection.popen([*arguments, *connection.target(pool), "--", pool.host, "exit"])
        try:
            _, stderr = process.communicate(timeout=TIMEOUT_S)
        except BaseException as error:
            process.kill()
            process.communicate()
            if isinstance(error, TimeoutError) or type(error).__name__ == "TimeoutExpired":
                raise failures.transport(pool, 255, "timed out") from None
            raise
        try:
            line = known.read_text(encoding="utf-8", errors="surrogateescape").strip().splitlines()[0]
        except (FileNotFoundError, IndexError):
            raise failures.transport(pool, process.returncode, stderr.decode("utf-8", "replace")) from None
        return HostKey(line.split(" ", 1)[1], line.split(" ")[1], _fingerprint(known))


def _fingerprint(known_hosts: Path) -> str:
    process = connection.popen(["-l", "-f", str(known_hosts)], program="ssh-keygen")
    out, err = process.communicate(timeout=10)
    words = out.decode("utf-8", "replace").split()
    if process.returncode or len(words) < 2:
        raise CliError(
            f"ssh-keygen can't read the host key: {err.decode('utf-8', 'replace').strip()[:200]}",
            next_step="ssh-keygen --help",
        )
    return words[1]
