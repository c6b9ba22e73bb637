"""The pages for people: the dashboard at `/` and the API's description at `/docs`.

Nothing on them comes from elsewhere, and the content security policy says so.
"""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from llorch_wire.errors import ApiError, ErrorCode

router = APIRouter(include_in_schema=False)

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_ASSETS = {
    "dashboard.js": "text/javascript; charset=utf-8",
    "docs.js": "text/javascript; charset=utf-8",
    "sse.js": "text/javascript; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
}


@router.head("/", response_model=None)
@router.get("/", response_model=None)
async def dashboard(request: Request) -> Response:
    """The dashboard. The page is public; what it shows needs the key that is typed into it."""
    return _file("index.html", "text/html; charset=utf-8")


@router.head("/docs", response_model=None)
@router.get("/docs", response_model=None)
async def docs(request: Request) -> Response:
    """The API's reference, drawn from /openapi.json."""
    return _file("docs.html", "text/html; charset=utf-8")


@router.head("/dashboard/{name}", response_model=None)
@router.get("/dashboard/{name}", response_model=None)
async def asset(request: Request) -> Response:
    """A script or a style sheet of these pages."""
    name = str(request.path_params["name"])
    if name not in _ASSETS:
        raise ApiError(ErrorCode.NOT_FOUND, "no such file")
    return _file(name, _ASSETS[name])


def _file(name: str, media_type: str) -> Response:
    content = files("orchestratord.dashboard").joinpath(name).read_bytes()
    return Response(content, headers=_HEADERS, media_type=media_type)
