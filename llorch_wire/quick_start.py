"""Imports that cost less, for the programs that start anew for every command. Read `import_msgspec` first."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from types import ModuleType


def import_msgspec() -> None:
    """Import msgspec without typing_extensions and inspect: 6 of 27 ms.

    msgspec takes from typing_extensions what Pythons before 3.11 lack, and from typing where there is none.
    """
    with hidden("typing_extensions"):
        import msgspec as _  # noqa: F401


@contextmanager
def hidden(name: str) -> Generator[None]:
    """Within, importing the module `name` fails as if it were not installed, unless it is imported already."""
    if name in sys.modules:
        yield
        return
    modules: dict[str, ModuleType | None] = sys.modules  # pyright: ignore[reportAssignmentType]
    modules[name] = None  # the import system's own mark for "there is none"
    try:
        yield
    finally:
        del modules[name]
