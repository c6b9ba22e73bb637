"""What a scripted worker generates: a pure function of (seed, position), so that any other goes on with the same text.

`expected` says what a task must yield, whoever generates it.
"""

from __future__ import annotations

from llorch_wire.events import TokenEvent
from llorch_wire.worker import ExecuteRequest

VOCABULARY = 4_096
EOS_ID = 2


def mix(seed: int, position: int) -> int:
    """64 well-mixed bits of (seed, position): splitmix64's finalizer (Steele, Lea, Flood: OOPSLA 2014)."""
    z = (seed * 0x9E3779B97F4A7C15 + position * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def length(seed: int, max_tokens: int, ignore_eos: bool) -> int:
    """How many tokens a task yields: all that it may, or fewer, by its seed."""
    return max_tokens if ignore_eos or mix(seed, -1) % 4 == 0 else 1 + mix(seed, -2) % max_tokens


def token(seed: int, index: int, last: int, ends_by_eos: bool) -> TokenEvent:
    """The token at an index. The text is a word, and empty for EOS."""
    if index == last and ends_by_eos:
        return TokenEvent(t="", i=index, id=EOS_ID)
    token_id = 3 + mix(seed, index) % (VOCABULARY - 3)
    return TokenEvent(t=f" w{token_id}", i=index, id=token_id)


def expected(seed: int, max_tokens: int, *, ignore_eos: bool = False) -> tuple[list[TokenEvent], str]:
    """Every token of an undisturbed task, and its stop reason."""
    count = length(seed, max_tokens, ignore_eos)
    by_eos = count < max_tokens
    tokens = [token(seed, index, count - 1, by_eos) for index in range(count)]
    return tokens, "EOS" if by_eos else "MAX_TOKENS"


def prompt_tokens(request: ExecuteRequest) -> int:
    """A count that any worker gives alike."""
    if request.prompt_token_ids is not None:
        return len(request.prompt_token_ids)
    text = request.prompt or "".join(message.text() for message in request.messages or ())
    return max(1, len(text) // 4)


def directive_of(request: ExecuteRequest) -> list[str]:
    """The words after `!` of a prompt's first line."""
    first = (request.prompt or "").split("\n", 1)[0]
    return first[1:].split() if first.startswith("!") else []
