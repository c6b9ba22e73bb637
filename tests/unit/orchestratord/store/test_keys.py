"""Keys are built alike in Python and in Lua, and no part can pose as two."""

from __future__ import annotations

import fakeredis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestratord.store.keys import LUA_KEY, hint_channel, hint_name, key, split

PARTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=4)


@given(PARTS)
def test_a_key_can_be_taken_apart(parts: list[str]) -> None:
    assert split(key("queue", *parts)) == ("queue", parts)


def test_lua_builds_the_same_keys() -> None:
    client = fakeredis.FakeRedis()
    for parts in (["a"], ["demo/tiny model", "x:y"], ["é%{}~-._"], ["\x00\n ", "日本"], []):
        assert client.eval(f"{LUA_KEY} return key('task', unpack(ARGV))", 0, *parts) == key("task", *parts).encode()
    client.close()


def test_every_key_has_the_hash_tag() -> None:
    assert key("task", "{x}").startswith("{o}:task:") and "{x}" not in key("task", "{x}")
    assert hint_name(hint_channel("log:a")) == "log:a"


@pytest.mark.parametrize("text", ["", "x", "{o}", "{p}:task:a"])
def test_other_text_is_no_key(text: str) -> None:
    with pytest.raises(ValueError, match="not a key"):
        split(text)
