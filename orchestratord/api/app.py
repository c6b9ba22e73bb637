"""The FastAPI app: every route, one way to fail, one description. Read `create_app` first."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.types import ASGIApp

from llorch_wire.errors import ApiError
from orchestratord.api import errors, meta, pages, schemas, tasks, workers
from orchestratord.api.auth import Keyring
from orchestratord.api.context import RequestContext
from orchestratord.api.openai import routes as openai_routes
from orchestratord.api.openai.requests import ChatOptions, CompletionOptions, openapi_schema
from orchestratord.api.services import Services
from orchestratord.metrics import Metrics
from orchestratord.runtime import Orchestrator
from orchestratord.settings import Settings

DESCRIPTION = """
LLM inference on your own machines: one endpoint, a durable queue, streams that outlive every process.

`/v2` is the native API, `/v1` speaks to OpenAI's client libraries. Both make the same tasks.
"""


def create_app(orchestrator: Orchestrator, settings: Settings, metrics: Metrics) -> FastAPI:
    """The app over one orchestrator. It starts nothing and holds no state but its collaborators."""
    app = FastAPI(
        title="orchestratord",
        version=meta.package_version(),
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry={"logs": False},  # its records would carry exception messages, which may quote a prompt
    )
    app.state.services = Services(orchestrator, settings, Keyring(settings), metrics)
    routers = (tasks.router, workers.router, openai_routes.router, meta.router, pages.router)
    for router in routers:
        app.include_router(router)
    errors.install(app, [*app.routes, *(route for router in routers for route in router.routes)])
    app.add_middleware(RequestContext, answer=_answer, max_active=settings.max_connections)
    # FastAPI documents replacing the method as the way to a schema of one's own.
    app.openapi = lambda: _openapi(app)
    return app


def _answer(error: ApiError, path: str) -> ASGIApp:
    return errors.error_response(error, openai=errors.speaks_openai(path))


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's description of the routes, with the schemas that they refer to and the key they need."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        components = document.setdefault("components", {})
        components["schemas"] = schemas.components() | {
            options.__name__: openapi_schema(options) for options in (ChatOptions, CompletionOptions)
        }
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}, {}]
        app.openapi_schema = document
    return app.openapi_schema
