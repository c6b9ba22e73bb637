"""Where webhooks may go, and how they are signed and spaced."""

from __future__ import annotations

import hashlib
import hmac
from ipaddress import ip_address

import pytest

from orchestratord.jobs.addresses import BlockedAddressError, check_url, is_public, refusal_of, resolve
from orchestratord.jobs.webhooks import delay_ms, delivery_id, sign


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "192.88.98.1"])
def test_public_addresses(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "198.18.0.1", "::1", "::", "fe80::1", "fc00::1", "ff02::1", "::ffff:127.0.0.1",
        "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2001:db8::1",
        "fec0::1", "feff::1", "3fff::1", "3fff:fff::1", "5f00::1", "192.88.99.1", "::ffff:192.88.99.1",
        "2002:c058:6301::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/", "https://localhost:8443/x", "http://a.localhost/", "http://[::1]/", "http://10.0.0.1/",
        "http://169.254.169.254/latest", "http://printer.local/", "http://db.internal/", "http://2130706433/",
        "http://0x7f.1/", "http://127.1/", "http://[::ffff:127.0.0.1]/", "http://LOCALHOST./",
    ],
)  # fmt: skip
def test_private_callbacks_are_refused_unless_allowed(url: str) -> None:
    refusal = refusal_of(url, allow_private=False, has_secret=True)
    assert refusal is not None and "private" in refusal and url not in refusal
    assert refusal_of(url, allow_private=True, has_secret=True) is None


@pytest.mark.parametrize(
    "url",
    ["ftp://example.com", "http:///x", "http://user:pw@example.com/", "http://h:99999/", "http://h:0/", "http://a b/"],
)
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"^(is|must)") as caught:
        check_url(url, allow_private=True)
    assert url not in str(caught.value) and "pw" not in str(caught.value)


def test_a_callback_needs_a_secret() -> None:
    refusal = refusal_of("https://example.com/hook", allow_private=False, has_secret=False)
    assert refusal is not None and "LLORCH_WEBHOOK_SECRET" in refusal
    assert refusal_of("https://example.com/hook", allow_private=False, has_secret=True) is None


async def test_a_name_that_means_this_machine_is_blocked_when_it_is_resolved() -> None:
    with pytest.raises(BlockedAddressError):
        await resolve("localhost", 80, allow_private=False)
    assert await resolve("localhost", 80, allow_private=True) in ("127.0.0.1", "::1")


def test_a_receiver_can_check_the_signature() -> None:
    body = b'{"type":"task.completed"}'
    expected = hmac.new(b"s3cret-key", b"1700000000.abc." + body, hashlib.sha256).hexdigest()
    assert sign("s3cret-key", 1_700_000_000, "abc", body) == f"v1={expected}"
    assert delivery_id("t1") == delivery_id("t1") != delivery_id("t2")


def test_pauses_double_up_to_an_hour() -> None:
    pauses = [delay_ms(tries, 0.0) for tries in range(1, 20)]
    assert pauses[:4] == [2_000, 4_000, 8_000, 16_000] and pauses[-1] == 3_600_000
    assert delay_ms(1, 1.0) == 2_500
