"""Options that commands of several modules share."""

from __future__ import annotations

from typing import Annotated

import typer

UrlOption = Annotated[str | None, typer.Option("--url", help="orchestratord's address.", show_default=False)]
