"""Why a model can't be loaded, in one sentence with the next step. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NEXT_STEP = "correct config.json, or download the model again"


class LoadError(Exception):
    """The model can't be loaded; nothing changes by trying again. `code` is a short name for the kind of problem."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def wrong_field(key: str, value: object, wanted: str) -> LoadError:
    """For a field of config.json that no model can be built from."""
    shown = json.dumps(value, default=str)
    shown = shown if len(shown) <= 80 else shown[:80] + "…"
    return LoadError("CONFIG_CORRUPT", f"config.json: `{key}` is {shown}, but must be {wanted}; {NEXT_STEP}.")


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is no such file. Raises LoadError for anything else."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise LoadError("CONFIG_CORRUPT", f"{path} is not valid JSON; download the model again.") from error
    if not isinstance(value, dict):
        raise LoadError("CONFIG_CORRUPT", f"{path} is not a JSON object; download the model again.")
    return value
