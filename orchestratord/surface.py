"""What the two halves of the orchestrator's surface share: the house, its state, and one meaning of a lost Redis."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable
from typing import TYPE_CHECKING, TypeVar

import structlog

from llorch_wire.errors import ApiError, ErrorCode
from orchestratord.house import House
from orchestratord.store.errors import StoreUnavailableError
from orchestratord.values import RuntimeState

if TYPE_CHECKING:
    from orchestratord.recovery import Recovery

T = TypeVar("T")

STORE_RETRY_MS = 1_000


class Surface:
    """Base of `TaskSurface` and `FleetSurface`."""

    def __init__(self, house: House, recovery: Recovery) -> None:
        self._house = house
        self._store = house.store
        self._settings = house.settings
        self._recovery = recovery
        self._state: RuntimeState = "starting"
        self._served: Counter[str] = Counter()
        """Tasks of calls that can't be resumed, by how many: they end with this replica, at the latest."""
        self._ending: set[str] = set()
        """Those of them that are being ended because this replica stops."""
        self.observations = house.observations
        self._log = structlog.get_logger("orchestratord")

    async def _stored(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except StoreUnavailableError as error:
            self.observations.count("store_errors", "request")
            raise store_unavailable() from error


def store_unavailable() -> ApiError:
    """What a client is told while Redis is away."""
    return ApiError(
        ErrorCode.STORE_UNAVAILABLE, "Redis doesn't answer or takes no writes: try again", retry_after_ms=STORE_RETRY_MS
    )
