"""Redis URLs."""

from __future__ import annotations

import pytest

from orchestratord.store.connection import parse_url
from orchestratord.store.errors import StoreUrlError


@pytest.mark.parametrize(
    ("url", "kind", "shown"),
    [
        ("redis://user:hush@host:6380/2", "single", "redis://host:6380/2"),
        ("redis://:hush@[::1]", "single", "redis://::1:6379"),
        ("rediss://host", "single", "rediss://host:6379"),
        ("unix:///run/redis.sock?db=1", "single", "unix:///run/redis.sock"),
        ("redis+sentinel://a:1,b/llorch/3", "sentinel", "redis+sentinel://a:1,b:26379/llorch"),
        ("redis+cluster://user:hu%40sh@a:1,[::1]:2", "cluster", "redis+cluster://a:1,::1:2"),
    ],
)
def test_urls_are_understood_and_shown_without_secrets(url: str, kind: str, shown: str) -> None:
    target = parse_url(url)
    assert (target.kind, target.shown) == (kind, shown)


def test_parts_of_a_sentinel_url() -> None:
    target = parse_url("redis+sentinel://me:hu%40sh@a:1,b:2/my%20service/3?sentinel_password=p")
    assert target.nodes == (("a", 1), ("b", 2))
    assert (target.service, target.db, target.username, target.password) == ("my service", 3, "me", "hu@sh")
    assert target.sentinel_password == "p"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "host:6379",
        "http://user:hush@host",
        "redis://",
        "redis://user:hush@",
        "unix://",
        "redis+sentinel://user:hush@a:1",
        "redis+sentinel://a:1/s/x",
        "redis+cluster://user:hush@a:1,,b:2",
        "redis+cluster://a:hush",
        "redis://host:99999999",
    ],
)
def test_what_is_no_redis_url_is_refused_with_the_forms_and_without_secrets(url: str) -> None:
    with pytest.raises(StoreUrlError, match="use redis://") as caught:
        parse_url(url)
    assert "hush" not in str(caught.value)
    assert not caught.value.retriable
