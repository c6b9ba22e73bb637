"""What only a real server can do to the store: die, stand still, forget scripts, fill up, fail over."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable

import pytest

from orchestratord.store.errors import StoreUnavailableError, StoreUrlError
from orchestratord.store.store import Store
from orchestratord.store.types import Admitted, Refused
from tests.contract.values import (
    LEASE_MS,
    LIMITS,
    MODEL,
    T,
    admit,
    batch,
    claim,
    end,
    heartbeat,
    new_task,
    running,
    worker,
)
from tests.support.redis_server import ClusterGroup, RedisServer, cluster_group, redis_server, sentinel_group


@contextlib.asynccontextmanager
async def connected(url: str, **options: float) -> AsyncGenerator[Store]:
    store = await Store.connect(url, **options)
    try:
        yield store
    finally:
        await store.aclose()


async def eventually(attempt: Callable[[], Awaitable[object]], deadline_s: float = 20) -> None:
    """Tries until the store is there again."""
    async with asyncio.timeout(deadline_s):
        while True:
            try:
                await attempt()
                return
            except StoreUnavailableError:
                await asyncio.sleep(0.05)


async def lifecycle(store: Store, name: str) -> None:
    """Every kind of script once."""
    await worker(store, slots_total=16)
    await running(store, name, session_id="s", prefix_hashes=("p",), deadline_at_ms=T + 10**6)
    await store.append([batch(name, 1, 0, 3)])
    await store.requeue(name, 1, "worker_lost", failure=True, now_ms=T)
    await claim(store, name)
    await store.record_prompt_tokens(name, 2, 5)
    await store.append([batch(name, 2, 3, 1)])
    await store.heartbeat("w1", heartbeat(running=((name, 2),)), LEASE_MS, now_ms=T)
    await store.replica_heartbeat("r1", "http://r1", 2000, now_ms=T)
    await store.sweep(now_ms=T, healthy_ms=0)
    await store.hand_over("r1")
    assert [task.task_id for task in await store.adopt("r2", now_ms=T, healthy_ms=0)] == [name]
    assert await store.complete(name, 2, end(4), now_ms=T)
    assert await store.token_ids(name) == (1000, 1001, 1002, 1003)
    assert (await store.list_tasks("acme"))[0][0].task_id == name
    assert await store.queue(now_ms=T) == []
    await running(store, f"{name}-2")
    await store.cancel(f"{name}-2", None, now_ms=T)
    await store.release("w1", f"{name}-2", 1)
    await store.drain_worker("w1", 1000, now_ms=T)
    await store.undrain_worker("w1")
    assert await store.audit() == []


async def test_a_script_flush_goes_unnoticed(real_store: Store, server: RedisServer) -> None:
    await lifecycle(real_store, "a")
    with contextlib.closing(server.client()) as client:
        client.script_flush()
    await lifecycle(real_store, "b")


async def test_a_killed_connection_goes_unnoticed(real_store: Store, server: RedisServer) -> None:
    await worker(real_store)
    with contextlib.closing(server.client()) as client:
        for number in range(5):
            client.client_kill_filter(_type="normal", skipme=True)
            await admit(real_store, f"t{number}")
    assert real_store.healthy_for_s() < 5


@pytest.mark.parametrize("error", [AttributeError("'NoneType' has no attribute 'writelines'"), RuntimeError("closed")])
async def test_a_subscription_under_which_the_connection_goes_isnt_an_error(
    real_store: Store, error: Exception
) -> None:
    """redis-py (AttributeError) and uvloop (RuntimeError) raised when the reader dropped the connection just then."""
    async with real_store.hints() as hints:
        await hints.subscribe("queue")

        async def dropped(*_: object) -> None:
            raise error

        hints._pubsub.subscribe = dropped
        await hints.subscribe("fleet")  # returns after a while; the next connection makes it
        await hints.unsubscribe("fleet")


async def test_nothing_acknowledged_is_lost_by_sigkill() -> None:
    with redis_server(durable=True) as server:
        async with connected(server.url) as store:
            await worker(store)
            acknowledged: list[str] = []
            async with asyncio.TaskGroup() as group:

                async def submit() -> None:
                    with contextlib.suppress(StoreUnavailableError):
                        for number in range(10_000):
                            await admit(store, f"t{number}")
                            acknowledged.append(f"t{number}")

                group.create_task(submit())
                while len(acknowledged) < 50:
                    await asyncio.sleep(0.01)
                server.kill()
            server.start()
            await eventually(store.ping)
            for name in acknowledged:
                assert await store.task(name, None) is not None
            assert await store.audit() == []


async def test_a_server_that_is_gone_is_unavailable_and_one_that_is_back_is_used_again() -> None:
    with redis_server(durable=True) as server:
        async with connected(server.url, timeout_s=2.0) as store, store.hints() as hints:
            await hints.subscribe("queue")
            await lifecycle(store, "a")
            names = aiter(hints)
            async with asyncio.timeout(20):
                assert await anext(names) == "queue"
                server.kill()
                with pytest.raises(StoreUnavailableError, match="can't be reached"):
                    await store.task("a", None)
                assert store.healthy_for_s() < 1
                server.start()
                await eventually(store.ping)
                assert await anext(names) == "queue", "after a reconnection every name is given once"
            await lifecycle(store, "b")


async def test_a_server_that_stands_still_is_unavailable_within_the_timeout() -> None:
    with redis_server() as server:
        async with connected(server.url, timeout_s=0.5) as store:
            await worker(store)
            server.pause()
            started = time.monotonic()
            try:
                with pytest.raises(StoreUnavailableError, match="within"):
                    await admit(store, "a")
            finally:
                server.resume()
            assert time.monotonic() - started < 5
            assert store.healthy_for_s() < 5
            await eventually(store.ping)
            await admit(store, "a")
            assert await store.audit() == []


async def test_a_full_server_refuses_new_tasks_and_lets_accepted_ones_go_on() -> None:
    with redis_server(maxmemory="8mb") as server:
        async with connected(server.url, memory_watermark=2.0) as store:
            await worker(store, slots_total=4)
            await running(store, "a")
            await running(store, "b")
            await running(store, "c")
            await admit(store, "w")
            with pytest.raises(StoreUnavailableError, match="full"):
                for number in range(1000):
                    await admit(store, f"t{number}", payload=b"x" * 100_000)
            assert isinstance(await store.admit(new_task("a"), LIMITS), Admitted)
            assert await store.append([batch("a", 1, 0, 3)]) == ["appended"]
            await store.heartbeat("w1", heartbeat(), LEASE_MS, now_ms=T + 1)
            await store.replica_heartbeat("r1", "http://r1", 2000, now_ms=T)
            assert await store.complete("a", 1, end(3), now_ms=T)
            assert (await store.requeue("b", 1, "worker_lost", failure=True, now_ms=T)).state == "queued"
            await claim(store, "b")
            await store.cancel("c", None, now_ms=T)
            await store.release("w1", "c", 1)
            await store.sweep(now_ms=T, healthy_ms=0)
            await store.drain_worker("w1", 1000, now_ms=T)
            assert await store.delete_task("c")
            assert await store.audit() == []
        async with connected(server.url) as store:
            assert await store.admit(new_task("more"), LIMITS) == Refused(reason="memory")
            assert isinstance(await store.admit(new_task("a"), LIMITS), Admitted)


async def test_the_wrong_address_is_said_without_its_password() -> None:
    with pytest.raises(StoreUnavailableError) as caught:
        await Store.connect("redis://user:hush@127.0.0.1:1/0", timeout_s=2)
    assert "127.0.0.1:1" in str(caught.value) and "hush" not in str(caught.value)
    with pytest.raises(StoreUrlError) as wrong:
        await Store.connect("http://user:hush@127.0.0.1:1")
    assert "hush" not in str(wrong.value)


async def test_the_whole_life_on_a_cluster(cluster: ClusterGroup) -> None:
    async with connected(cluster.url) as store, store.hints() as hints:
        await hints.subscribe("log:a")
        await lifecycle(store, "a")
        async with asyncio.timeout(10):
            assert await anext(aiter(hints)) == "log:a"
        with contextlib.closing(cluster.holder("{o}:sequence").client()) as client:
            client.script_flush()
        await lifecycle(store, "b")
        assert (await store.snapshot(MODEL, now_ms=T)).waiting == ()
        cluster.holder("{o}:sequence").restart()
        await eventually(store.ping)
        await eventually(lambda: store.models())
        await eventually(lambda: lifecycle(store, "c"))


async def test_a_cluster_whose_every_node_died_under_load_is_used_again(cluster: ClusterGroup) -> None:
    """redis-py's cluster client forgot a node at each broken connection, the last one included, and never came back."""
    async with connected(cluster.url, timeout_s=2.0) as store:
        await worker(store, "w9")
        stop = asyncio.Event()
        unexpected: list[BaseException] = []

        async def ask() -> None:
            while not stop.is_set():
                try:
                    await store.models()
                except StoreUnavailableError:
                    await asyncio.sleep(0.01)
                except Exception as error:
                    unexpected.append(error)
                    return

        async with asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(ask())
            for node in cluster.nodes:
                await asyncio.sleep(0.2)
                node.kill()
            await asyncio.sleep(0.5)
            for node in cluster.nodes:
                await asyncio.to_thread(node.start)
            await eventually(store.models, 30)
            stop.set()
        assert unexpected == []
        await eventually(lambda: worker(store, "w9"))


async def test_a_cluster_failover_is_followed() -> None:
    with cluster_group(3, replicas=1) as group:
        async with connected(group.url, timeout_s=2.0) as store, store.hints() as hints:
            await hints.subscribe("log:b")
            await lifecycle(store, "a")
            holder = group.holder("{o}:sequence")
            await asyncio.to_thread(holder.await_replica)
            await asyncio.to_thread(holder.kill)
            await eventually(lambda: worker(store, slots_total=16), 30)
            await lifecycle(store, "b")
            async with asyncio.timeout(20):
                assert await anext(aiter(hints)) == "log:b"
            record = await store.task("a", "acme")
            assert record is not None and record.status == "completed"


async def test_background_jobs_are_refused_on_a_cluster() -> None:
    with pytest.raises(StoreUrlError, match="jobs"):
        await Store.connect("redis+cluster://127.0.0.1:1", jobs=True)


async def test_a_sentinel_failover_is_followed() -> None:
    with sentinel_group() as group:
        async with connected(group.url) as store:
            await lifecycle(store, "a")
            await asyncio.to_thread(group.master().await_replica)
            await asyncio.to_thread(group.fail_over)
            await eventually(lambda: worker(store, slots_total=16))
            await eventually(lambda: lifecycle(store, "b"))
            record = await store.task("a", "acme")
            assert record is not None and record.status == "completed"
