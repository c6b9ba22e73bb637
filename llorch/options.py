"""Options that commands of several modules share."""

from __future__ import annotations

import math
from typing import Annotated

import typer


def finite(value: float | None) -> float | None:
    """Callback of every option that is a decimal number: nan and inf pass typer's own limits, and JSON has neither."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


UrlOption = Annotated[str | None, typer.Option("--url", help="orchestratord's address.", show_default=False)]
