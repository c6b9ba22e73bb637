"""What a route needs, found through the app that serves the request: no globals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from starlette.requests import Request

from orchestratord.api.auth import Keyring
from orchestratord.metrics import Metrics
from orchestratord.runtime import Orchestrator
from orchestratord.settings import Settings


@dataclass(frozen=True, slots=True)
class Services:
    """One app's collaborators."""

    orchestrator: Orchestrator
    settings: Settings
    keyring: Keyring
    metrics: Metrics


def services(request: Request) -> Services:
    """The collaborators of the app that serves this request."""
    return cast(Services, request.app.state.services)
