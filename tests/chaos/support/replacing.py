"""Other methods for a class, in this process alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def replace(owner: type, **methods: Callable[..., Any]) -> None:
    """Give a class other methods. One that it doesn't have would switch nothing off, and is an error."""
    for name, method in methods.items():
        if not callable(getattr(owner, name, None)):
            raise AttributeError(f"{owner.__name__}.{name}: there is no such method to replace")
        setattr(owner, name, method)
