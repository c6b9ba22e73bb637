"""What the daemon says about itself: health, readiness, metrics, version, capabilities.

`/health` is about this process alone (restart it when it fails); `/ready` is about taking traffic (Redis included).
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from llorch_wire import PROTOCOL_VERSION
from llorch_wire.tasks import MAX_METADATA, MAX_STOPS
from orchestratord.api import schemas
from orchestratord.api.services import services
from orchestratord.api.tasks import json_response
from orchestratord.metrics import CONTENT_TYPE

router = APIRouter(tags=["meta"])


def package_version() -> str:
    """Version of the installed package."""
    try:
        return version("llorch")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0+source"


@router.head("/health", include_in_schema=False)
@router.get("/health", **schemas.HEALTH)
async def health(request: Request) -> Response:
    """The process lives; `status` is starting, ready or draining."""
    return json_response({"status": services(request).orchestrator.state, "version": package_version()})


@router.head("/ready", include_in_schema=False)
@router.get("/ready", **schemas.READY)
async def ready(request: Request) -> Response:
    """200 when requests should come here, else 503 with the reason."""
    is_ready, reason = await services(request).orchestrator.ready()
    headers = {} if is_ready else {"Retry-After": "1"}
    return json_response({"ready": is_ready, "reason": reason}, 200 if is_ready else 503, headers)


@router.get("/metrics", **schemas.METRICS)
async def metrics(request: Request) -> Response:
    """Prometheus text."""
    s = services(request)
    s.keyring.operator(request)
    return Response(await s.metrics.render(s.orchestrator), media_type=CONTENT_TYPE)


@router.get("/v2/meta/version", **schemas.VERSION)
async def get_version(request: Request) -> Response:
    """Versions of the program and of the protocol between the programs."""
    return json_response(
        {
            "version": package_version(),
            "protocol_version": PROTOCOL_VERSION,
            "replica_id": services(request).orchestrator.replica_id,
        }
    )


@router.get("/v2/meta/capabilities", **schemas.CAPABILITIES)
async def get_capabilities(request: Request) -> Response:
    """What this server can do and within which bounds."""
    s = services(request)
    s.keyring.refuse_browsers(request)
    settings = s.settings
    return json_response(
        {
            "workloads": ["completion"],
            "inputs": ["prompt", "messages", "prompt_token_ids"],
            "priorities": ["interactive", "batch"],
            "placement_modes": ["auto", "prefer", "pin"],
            "response_formats": ["text"],
            "openai": ["/v1/models", "/v1/chat/completions", "/v1/completions"],
            "features": ["resume", "cancel", "idempotency", "deadlines", "sessions", "preemption", "webhooks"],
            "requires_key": s.keyring.needs_client_key,
            "limits": {
                "max_body_bytes": settings.max_body_bytes,
                "max_stop_strings": MAX_STOPS,
                "max_metadata": MAX_METADATA,
                "max_queued": settings.max_queued,
                "max_queued_per_model": settings.max_queued_per_model,
                "max_queued_per_tenant": settings.max_queued_per_tenant,
                "default_max_tokens": settings.default_max_tokens,
                "retention_s": settings.retention_s,
            },
        }
    )
