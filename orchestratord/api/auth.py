"""Who is calling: keys, tenants, operators.

    endpoint                     no keys set (loopback only)     keys set
    /v2/tasks…, /v1/…            tenant `default`                an API key; its tenant's tasks only
    worker register, heartbeat   anybody                         the worker key; nobody where none is set
    operators' endpoints         anybody                         the worker key, or an API key of tenant `admin`
    /health /ready / /docs       anybody                         anybody

Read `Keyring.caller` first. A presented key is compared against every known one in constant time, as digests, so that
neither its length nor the place of the first difference shows. Without keys, a browser is the danger: any web page
may post to 127.0.0.1, so requests from another origin, or under a host name that isn't loopback, are refused. A worker
is sent the prompts of every tenant: once clients need a key, workers do too (`settings` refuses to start otherwise).
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.requests import Request

from llorch_wire.errors import ApiError, ErrorCode
from orchestratord.settings import ADMIN_TENANT, DEFAULT_TENANT, Settings, Tenant, is_loopback_host


@dataclass(frozen=True, slots=True)
class Caller:
    """What the presented key is good for. `tenant` is None for a worker's key."""

    tenant: Tenant | None
    is_worker: bool
    is_operator: bool


class Keyring:
    """The keys of the settings, as SHA-256 digests."""

    def __init__(self, settings: Settings) -> None:
        self._clients = [(_digest(entry.key.get_secret_value()), entry.tenant) for entry in settings.api_keys]
        self._worker = _digest(settings.worker_key.get_secret_value()) if settings.worker_key else None

    @property
    def needs_client_key(self) -> bool:
        """Whether clients need a key."""
        return bool(self._clients)

    @property
    def is_open(self) -> bool:
        """Whether no key is set at all."""
        return not self._clients and self._worker is None

    def caller(self, authorization: str | None) -> Caller:
        """Who presents this `Authorization` header. Raises ApiError 401 for a key that nobody has.

        A key is looked at only where it could mean something: without client keys set, whatever a client library
        sends by habit is as good as nothing.
        """
        presented = _bearer(authorization)
        digest = _digest(presented) if presented is not None else b""
        tenant: Tenant | None = None
        for known, owner in self._clients:  # every one, always: the time tells nothing
            if hmac.compare_digest(known, digest):
                tenant = owner
        is_worker = self._worker is not None and hmac.compare_digest(self._worker, digest)
        if not self._clients and not is_worker:
            tenant = Tenant(DEFAULT_TENANT)
        elif tenant is None and not is_worker and presented is not None:
            raise unauthorized("this key is not known; check LLORCH_API_KEYS of orchestratord")
        is_admin = tenant is not None and tenant.name == ADMIN_TENANT
        return Caller(tenant, is_worker, is_worker or is_admin or self.is_open)

    def client(self, request: Request) -> Tenant:
        """The tenant that calls a client endpoint. Raises ApiError 401 or 403."""
        self.refuse_browsers(request)
        caller = self.caller(request.headers.get("authorization"))
        if caller.tenant is not None:
            request.state.tenant = caller.tenant.name
            return caller.tenant
        if caller.is_worker and self._clients:
            raise ApiError(ErrorCode.FORBIDDEN, "the worker key is not a client key; use one of LLORCH_API_KEYS")
        if caller.is_worker:
            return Tenant(DEFAULT_TENANT)
        raise unauthorized("send a key: `Authorization: Bearer <key>`")

    def worker(self, request: Request) -> None:
        """Let a worker through. Raises ApiError 401 or 403."""
        self.refuse_browsers(request)
        if self.is_open:
            return
        if self._worker is None:
            raise unauthorized(
                "clients have keys here and workers have none, so no worker is let in: set LLORCH_WORKER_KEY, the same "
                "for orchestratord and its workers (a key: `openssl rand -hex 24`)"
            )
        if self.caller(request.headers.get("authorization")).is_worker:
            return
        if request.headers.get("authorization") is None:
            raise unauthorized("send the worker key: `Authorization: Bearer <LLORCH_WORKER_KEY>`")
        raise ApiError(ErrorCode.FORBIDDEN, "this needs the worker key (LLORCH_WORKER_KEY)")

    def operator(self, request: Request) -> Caller:
        """Let an operator through. Raises ApiError 401 or 403."""
        self.refuse_browsers(request)
        caller = self.caller(request.headers.get("authorization"))
        if caller.is_operator:
            return caller
        if request.headers.get("authorization") is None:
            raise unauthorized("send the worker key or a key of tenant `admin`: `Authorization: Bearer <key>`")
        raise ApiError(ErrorCode.FORBIDDEN, "this needs the worker key or an API key of tenant `admin`")

    def refuse_browsers(self, request: Request) -> None:
        """Without client keys: refuse web pages of other origins and rebound host names. Raises ApiError 403."""
        if self._clients:
            return
        host = request.headers.get("host", "")
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:  # a bracket without its other half, or with no IPv6 address in it
            raise ApiError(ErrorCode.INVALID_PARAMS, "the Host header names no host", param="Host") from None
        if not is_loopback_host(name):
            raise ApiError(
                ErrorCode.FORBIDDEN,
                "without keys only loopback host names are served; set LLORCH_API_KEYS to serve others",
                param="Host",
            )
        origin = request.headers.get("origin")
        if origin is not None and _authority(origin) != host:
            raise ApiError(
                ErrorCode.FORBIDDEN,
                "without keys no web page of another origin is served; set LLORCH_API_KEYS",
                param="Origin",
            )


def unauthorized(message: str) -> ApiError:
    """A 401."""
    return ApiError(ErrorCode.UNAUTHORIZED, message)


def _authority(origin: str) -> str | None:
    """The host and port of an origin; None where it has none, or is none."""
    try:
        return urlsplit(origin).netloc or None
    except ValueError:
        return None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _bearer(authorization: str | None) -> str | None:
    """The key in the header. Raises ApiError 401 for another scheme."""
    if authorization is None:
        return None
    scheme, _, key = authorization.strip().partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise unauthorized("the Authorization header must read `Bearer <key>`")
    return key.strip()
