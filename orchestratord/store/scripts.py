"""The Lua scripts of `lua/`, made whole: keys and field lists first, then the shared parts a script asks for, then it.

A script asks with a line `--@include tasks`, which stands for `lua/_tasks.lua`. `_lib.lua` is always in front.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources
from typing import NamedTuple

from orchestratord.store import codec
from orchestratord.store.keys import LUA_KEY

_INCLUDE = "--@include "


class Script(NamedTuple):
    """One script: its whole text and the SHA-1 by which Redis knows it."""

    text: str
    sha: str


def _names(name: str, fields: tuple[str, ...]) -> str:
    return f"local {name} = {{ {', '.join(repr(field) for field in fields)} }}\n"


def _read(name: str) -> str:
    return (resources.files("orchestratord.store") / "lua" / f"{name}.lua").read_text("utf-8")


@cache
def load(name: str) -> Script:
    """The script `lua/<name>.lua`. Raises FileNotFoundError."""
    body = _read(name)
    included = [line.removeprefix(_INCLUDE) for line in body.splitlines() if line.startswith(_INCLUDE)]
    lists = {
        "RUNNING_FIELDS": codec.RUNNING_FIELDS,
        "QUEUED_FIELDS": codec.QUEUED_FIELDS,
        "RECORD_FIELDS": codec.RECORD_FIELDS,
        "WORKER_FIELDS": codec.WORKER_FIELDS,
    }
    shared = [_read("_lib"), *(_read(f"_{part}") for part in included)]
    used = "".join([*shared, body])
    head = "".join(_names(list_name, fields) for list_name, fields in lists.items() if list_name in used)
    text = "\n".join([LUA_KEY, head, *shared, body])
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())
