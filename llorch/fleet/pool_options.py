"""What `llorch pool add` makes of its options, before anything is connected to."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from urllib.parse import urlsplit

from llorch.errors import UsageProblem


def again(*words: str) -> str:
    """`pool add` with these words, as it is to be typed into a shell the next time."""
    return shlex.join(["llorch", "pool", "add", *words])


def absolute(identity: str) -> str:
    """A key file's path, which must mean the same in every folder. "" stays. Raises UsageProblem."""
    if not identity:
        return ""
    path = Path(os.path.expanduser(identity))  # noqa: PTH111 - Path's raises for a `~name` that nobody has
    try:
        found = str(path if path.is_absolute() else Path.cwd() / path)
        found.encode()
    except (FileNotFoundError, UnicodeEncodeError):
        raise UsageProblem(
            f"--identity {identity}: the folder that it is relative to is gone, or its path is not UTF-8",
            next_step="give the whole path",
        ) from None
    return found


def checked_url(url: str) -> str:
    """orchestratord's URL without its trailing slash, checked as `worker spawn` does. Raises UsageProblem.

    A wrong one isn't shown: it may hold a password.
    """
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        good = good and "@" not in parts.netloc and not parts.query and not parts.fragment
        good = good and url.isascii() and url.isprintable() and " " not in url
    except ValueError:
        good = False
    if not good:
        raise UsageProblem("--orchestrator is not a URL like http://host:8080", next_step="llorch pool add --help")
    return url.rstrip("/")
