"""Calls to workers that aren't there."""

from __future__ import annotations

import pytest

from orchestratord.worker_client import WorkerClient, WorkerUnreachableError


@pytest.mark.parametrize("url", ["http://..:1", f"http://{'x' * 300}:1", "http://[::1", "http://h:x"])
async def test_a_wrong_address_that_is_on_record_is_one_where_nobody_answers(url: str) -> None:
    """Every call failed in another way than expected, and what ran there ran for ever."""
    async with WorkerClient() as client:
        with pytest.raises(WorkerUnreachableError):
            async with client.execute(url, b"{}", after=-1, correlation_id="c"):
                pass
        assert await client.health(url) is None
        assert not await client.cancel(url, "t", 1, "fenced")
