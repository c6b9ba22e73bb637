"""Every Redis key of the store is built here: by `key` in Python and by the same few lines in Lua (`LUA_KEY`).

    key("queue", "llama 3", "batch", "acme")  ->  {o}:queue:llama%203:batch:acme

All keys carry the hash tag `{o}`, so that one script may touch them all on Redis Cluster. Parts that come from outside
are percent-encoded (RFC 3986 unreserved characters stay), so that no part can pose as two. docs/redis-state.md lists
every kind with what it holds.
"""

from __future__ import annotations

from urllib.parse import quote, unquote

TAG = "{o}"

KINDS = (
    "task",
    "payload",
    "idem",
    "log",
    "queue",
    "queues",
    "waiting-in",
    "waiting",
    "retry",
    "deadlines",
    "done",
    "webhooks",
    "tasks-by",
    "sequence",
    "version",
    "vtime",
    "vtime-left",
    "active",
    "models",
    "workers",
    "workers-of",
    "worker",
    "worker-leases",
    "running",
    "stopping",
    "drains",
    "replicas",
    "replica-urls",
    "replica-leases",
    "owned",
    "orphans",
    "attended",
    "unattended",
    "session",
    "prefix",
    "prefix-age",
    "rates",
    "fleet",
)
"""Every kind of key; `audit` reports a key of any other kind."""

ANCHOR = f"{TAG}:sequence"
"""What every script gets as KEYS[1], so that Redis Cluster sends it to the node that holds the tag's slot."""

LUA_KEY = """
local function encode(part)
  return (string.gsub(part, '[^%w_%.%-~]', function(c) return string.format('%%%02X', string.byte(c)) end))
end
local function key(kind, ...)
  local text = '{o}:' .. kind
  for i = 1, select('#', ...) do text = text .. ':' .. encode((select(i, ...))) end
  return text
end
"""


def encode(part: str) -> str:
    """One part of a key, percent-encoded."""
    return quote(part, safe="")


def key(kind: str, *parts: str) -> str:
    """The key of `kind` for the given parts."""
    return ":".join([TAG, kind, *(encode(part) for part in parts)])


def split(text: str) -> tuple[str, list[str]]:
    """Kind and parts of a key that `key` built. Raises ValueError for any other text."""
    tag, *rest = text.split(":")
    if tag != TAG or not rest:
        raise ValueError(f"not a key of this store: {text[:200]!r}")
    return rest[0], [unquote(part) for part in rest[1:]]


def hint_channel(name: str) -> str:
    """Pub/sub channel of a hint."""
    return f"{TAG}:hint:{name}"


def hint_name(channel: str) -> str:
    """Name of the hint that `hint_channel` made the channel from."""
    return channel.removeprefix(f"{TAG}:hint:")
