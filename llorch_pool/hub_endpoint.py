"""The Hub's address as HF_ENDPOINT gives it. It may hold a user and a password, for a mirror: they are never shown."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from llorch_pool.errors import usage_error

_USERINFO = re.compile(r"//[^/?#\s]*@")


@dataclass(frozen=True, repr=False)
class Endpoint:
    """Where the Hub is. `whole` may hold a password and goes to the Hub's client alone; `shown` is without it."""

    whole: str
    shown: str
    basic: str = ""
    """What the Authorization header holds for the user and password of the address; "" where it has none."""


def endpoint(text: str) -> Endpoint:
    """The address, checked. Raises a usage error that names HF_ENDPOINT, without a password in it."""
    whole = text.strip().rstrip("/")
    try:
        parts = urlsplit(whole)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        raise _refusal(whole) from None
    if not good or parts.query or parts.fragment or not whole.isprintable() or " " in whole:
        raise _refusal(whole)
    basic = ""
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        basic = "Basic " + base64.b64encode(login.encode()).decode()
    return Endpoint(whole, without_password(whole), basic)


def without_password(text: str) -> str:
    """`text` with the user and password taken out of every URL in it."""
    return _USERINFO.sub("//", text)


def _refusal(text: str) -> Exception:
    # What stands before an @ may be a password, also where the rest is no URL.
    shown = without_password(text).rpartition("@")[2]
    return usage_error(
        f"HF_ENDPOINT {shown!r} is not a URL like https://huggingface.co",
        "Correct HF_ENDPOINT, or unset it to ask the Hub itself.",
    )
