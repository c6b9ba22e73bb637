"""Ports: is one free, and which one to take. Read `choose_port` first."""

from __future__ import annotations

import errno
import secrets
import socket
from collections.abc import Iterable
from pathlib import Path

from llorch.errors import UsageProblem

FIRST_PORT = 20_000


def port_is_free(host: str, port: int) -> bool:
    """Whether a server could bind here now. Raises UsageProblem for a host that is none of this machine's."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        raise UsageProblem(
            f"{host!r} is not an address or a known name", next_step="llorch up --host 127.0.0.1"
        ) from None
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except PermissionError:
            raise UsageProblem(f"port {port} needs root", next_step="llorch up --port 8080") from None
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise UsageProblem(
                    f"{host} is not an address of this machine", next_step="llorch up --host 0.0.0.0"
                ) from None
            return False
    return True


def choose_port(taken: set[int], at_least: int | None = None) -> int:
    """A free loopback port below the range that the kernel gives to outgoing connections.

    One from that range could be taken by any connection in the moment between a child's death and its restart.
    """
    try:
        top = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError):
        top = 32768
    if at_least is not None:
        candidates: Iterable[int] = range(at_least, min(at_least + 200, 65536))
    else:
        low = min(FIRST_PORT, max(1024, top - 2000))
        candidates = (low + secrets.randbelow(max(1, top - low)) for _ in range(500))
    for port in candidates:
        if port not in taken and port_is_free("127.0.0.1", port):
            return port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def outward_address() -> str:
    """This machine's address on its way to others, loopback where there is no way. Nothing is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # TEST-NET-1 (RFC 5737): connect on UDP only looks up the route
            return str(probe.getsockname()[0])
    except OSError:
        return "127.0.0.1"
