"""Where a webhook may go. Pure but for `resolve`: read `check_url` (at admission) and `is_public` first.

A name is looked up once for each delivery and the connection goes to exactly the address that was judged, so that a
name can't mean a public address when it is checked and a private one when it is used.
"""

from __future__ import annotations

import asyncio
import socket
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from urllib.parse import SplitResult, urlsplit

from aiohttp.abc import AbstractResolver, ResolveResult

from llorch_wire.errors import LlorchError

RESOLVE_S = 5.0

# Never a receiver, although `is_global` says yes: addresses that translate to any IPv4 address behind them.
_NAT64 = ("64:ff9b::", "64:ff9b:1::")
# Nor these, whatever `is_global` of this Python says: old site-local addresses, which some networks still route
# inside (RFC 3879); documentation (RFC 9637); segment routing (RFC 9602); relays of 6to4, which are gone (RFC 7526).
_NEVER = tuple(map(ip_network, ("fec0::/10", "3fff::/20", "5f00::/16", "192.88.99.0/24")))


class BlockedAddressError(LlorchError):
    """The webhook's address is private, loopback, link-local or otherwise not on the public internet."""


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Whether an address is one that anybody on the internet reaches; what it embeds must be public too."""
    if isinstance(address, IPv6Address):
        embedded = address.ipv4_mapped or address.sixtofour
        if embedded is None and address.teredo is not None:
            embedded = address.teredo[1]
        if embedded is not None:
            return is_public(embedded)
        if str(address).startswith(_NAT64):
            return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
    if any(address in network for network in _NEVER):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def check_url(url: str, *, allow_private: bool) -> SplitResult:
    """The parts of a callback URL. Raises ValueError, in words for the client, without quoting the URL."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError("is not a URL") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be an http:// or https:// URL with a host")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must not hold a user or a password")
    if port == 0 or any(ord(char) <= 0x20 or ord(char) == 0x7F for char in url):
        raise ValueError("is not a URL")
    if not allow_private and not _may_be_public(parts.hostname):
        raise ValueError("must not point to a private or loopback address (--allow-private-callbacks permits it)")
    return parts


def refusal_of(url: str, *, allow_private: bool, has_secret: bool) -> str | None:
    """Why a task with this callback_url isn't admitted, in words for the client; None when it is."""
    if not has_secret:
        return "`callback_url` needs LLORCH_WEBHOOK_SECRET at orchestratord, which signs the deliveries"
    try:
        check_url(url, allow_private=allow_private)
    except ValueError as error:
        return f"`callback_url` {error}"
    return None


def _may_be_public(host: str) -> bool:
    """False for literals and names that can't be public; other names are judged when they are resolved."""
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith((".localhost", ".local", ".internal")):
        return False
    try:
        return is_public(ip_address(name))
    except ValueError:
        return not name.replace(".", "").isdigit() and not name.startswith("0x")  # 2130706433, 0x7f.1: odd loopbacks


async def resolve(host: str, port: int, *, allow_private: bool) -> str:
    """One address of a host that may be connected to. Raises BlockedAddressError, OSError, TimeoutError.

    Every address of the name must be public: a name that mixes is not trusted for its public half.
    """
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(RESOLVE_S):
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(info[4][0]).partition("%")[0] for info in found]
    if not addresses:
        raise OSError("the name has no address")
    if not allow_private and not all(is_public(ip_address(address)) for address in addresses):
        raise BlockedAddressError("the receiver's address is not public")
    return addresses[0]


class PinnedResolver(AbstractResolver):
    """An aiohttp resolver that answers with one address, whatever it is asked."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """The pinned address."""
        pinned = socket.AF_INET6 if ":" in self._address else socket.AF_INET
        return [
            ResolveResult(
                hostname=host, host=self._address, port=port, family=pinned, proto=0, flags=socket.AI_NUMERICHOST
            )
        ]

    async def close(self) -> None:
        """Nothing to close."""
