"""Keys, tenants and operators over HTTP; the pages, health, metrics and the API's description."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from llorch_wire.errors import ApiError, ErrorCode
from orchestratord.settings import Settings
from tests.api.harness import MemoryOrchestrator, serving

ACME, OTHER, ADMIN, WORKER = "acme-key-1", "other-key-2", "admin-key-3", "worker-key-4"
GOOD = {"model": "demo", "prompt": "Once"}
REGISTRATION = {
    "worker_id": "w0", "instance_id": "i", "url": "http://127.0.0.1:1", "model": "demo", "model_digest": "d",
    "dtype": "float32", "device": "cpu", "context_length": 10, "slots_total": 1,
}  # fmt: skip


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
async def keyed(memory: MemoryOrchestrator) -> AsyncIterator[str]:
    settings = Settings.model_validate({"api_keys": f"acme:2={ACME},other={OTHER},admin={ADMIN}", "worker_key": WORKER})
    async with serving(memory, settings) as url:
        yield url


async def status_of(http: aiohttp.ClientSession, method: str, url: str, key: str | None, **more: Any) -> int:
    headers = {**(bearer(key) if key else {}), **more.pop("headers", {})}
    async with http.request(method, url, headers=headers, **more) as reply:
        await reply.read()
        if reply.status == 401:
            assert reply.headers["WWW-Authenticate"].startswith("Bearer")
        return reply.status


@pytest.mark.parametrize("path", ["/v2/tasks", "/v2/queue", "/v1/models"])
async def test_client_endpoints_need_a_client_key(keyed: str, http: aiohttp.ClientSession, path: str) -> None:
    assert await status_of(http, "GET", keyed + path, None) == 401
    for wrong in ("wrong-key-9", ACME[:-1], ACME + "x", ACME.upper(), "é"):
        assert await status_of(http, "GET", keyed + path, wrong) == 401
    assert await status_of(http, "GET", keyed + path, None, headers={"Authorization": f"Basic {ACME}"}) == 401
    assert await status_of(http, "GET", keyed + path, None, headers={"Authorization": "Bearer "}) == 401
    assert await status_of(http, "GET", keyed + path, ACME) == 200


async def test_a_body_is_not_read_without_a_key(
    keyed: str, http: aiohttp.ClientSession, memory: MemoryOrchestrator
) -> None:
    assert await status_of(http, "POST", f"{keyed}/v2/tasks", None, json=GOOD) == 401
    assert await status_of(http, "POST", f"{keyed}/v2/tasks", WORKER, json=GOOD) == 403
    assert await status_of(http, "POST", f"{keyed}/v1/chat/completions", None, json=GOOD) == 401
    assert memory.calls == 0


async def test_another_tenants_task_does_not_exist(keyed: str, http: aiohttp.ClientSession) -> None:
    async with http.post(f"{keyed}/v2/tasks", json=GOOD, headers=bearer(ACME)) as reply:
        task_id = (await reply.json())["task_id"]
    url = f"{keyed}/v2/tasks/{task_id}"
    for method, path in (("GET", ""), ("GET", "/events"), ("POST", "/cancel"), ("DELETE", "")):
        assert await status_of(http, method, url + path, OTHER) == 404
        assert await status_of(http, method, url + path, ACME) == 200
    async with http.get(f"{keyed}/v2/tasks", headers=bearer(OTHER)) as reply:
        assert (await reply.json())["tasks"] == []


async def test_the_queue_shows_a_tenant_its_own(keyed: str, http: aiohttp.ClientSession) -> None:
    for key, tenants in ((ACME, ["acme"]), (OTHER, []), (ADMIN, ["default", "acme"]), (WORKER, ["default", "acme"])):
        async with http.get(f"{keyed}/v2/queue", headers=bearer(key)) as reply:
            queue = await reply.json()
        assert [row["tenant"] for row in queue["queues"]] == tenants
        assert queue["depth"] == 2 * len(tenants)


async def test_workers_and_operators_have_their_own_key(keyed: str, http: aiohttp.ClientSession) -> None:
    register = f"{keyed}/v2/workers/register"
    assert await status_of(http, "POST", register, None, json=REGISTRATION) == 401
    assert await status_of(http, "POST", register, ADMIN, json=REGISTRATION) == 403
    assert await status_of(http, "POST", register, ACME, json=REGISTRATION) == 403
    assert await status_of(http, "POST", register, WORKER, json=REGISTRATION) == 200
    for path in ("/v2/workers", "/v2/pools", "/v2/fleet/events", "/metrics"):
        assert await status_of(http, "GET", keyed + path, None) == 401
        assert await status_of(http, "GET", keyed + path, ACME) == 403
        assert await status_of(http, "GET", keyed + path, ADMIN) == 200
        assert await status_of(http, "GET", keyed + path, WORKER) == 200
    assert await status_of(http, "DELETE", f"{keyed}/v2/workers/w0", ACME) == 403


async def test_where_clients_have_keys_no_worker_is_let_in_without_one(
    memory: MemoryOrchestrator, http: aiohttp.ClientSession
) -> None:
    """It would be sent every tenant's prompts. A browser's simple request needs no permission of ours to be sent."""
    async with serving(memory, Settings.model_validate({"api_keys": f"acme={ACME},admin={ADMIN}"})) as url:
        simple = {"Content-Type": "text/plain", "Origin": "https://evil.example"}
        for path in ("/v2/workers/register", "/v2/workers/w0/heartbeat"):
            for key in (None, ADMIN, ACME):
                assert await status_of(http, "POST", url + path, key, json=REGISTRATION) == 401
            body = json.dumps(REGISTRATION)
            assert await status_of(http, "POST", url + path, None, data=body, headers=simple) == 401
        async with http.post(f"{url}/v2/workers/register", json=REGISTRATION) as reply:
            assert "LLORCH_WORKER_KEY" in (await reply.json())["error"]["message"]


@pytest.mark.parametrize(
    ("headers", "status", "param"),
    [
        ({"Host": "[::1"}, 400, "Host"),
        ({"Host": "[x]:80"}, 400, "Host"),
        ({"Host": "::1]"}, 400, "Host"),
        ({"Origin": "http://[x"}, 403, "Origin"),
        ({"Origin": "http://[::1"}, 403, "Origin"),
        ({"Origin": "http://"}, 403, "Origin"),
    ],
)
@pytest.mark.parametrize("path", ["/v2/tasks", "/v2/workers", "/v2/workers/register", "/v1/models", "/v2/nothing"])
async def test_a_host_or_origin_that_is_none_is_refused(
    server: str, http: aiohttp.ClientSession, headers: dict[str, str], status: int, param: str, path: str
) -> None:
    method = "POST" if path.endswith("register") else "GET"
    async with http.request(method, server + path, headers=headers) as reply:
        error = (await reply.json())["error"]
        if path == "/v2/nothing":
            assert reply.status == 404
        else:
            assert (reply.status, error["param"]) == (status, param)


async def test_probes_and_pages_need_no_key(keyed: str, http: aiohttp.ClientSession) -> None:
    for path in ("/health", "/ready", "/", "/docs", "/openapi.json", "/v2/meta/version", "/v2/meta/capabilities"):
        assert await status_of(http, "GET", keyed + path, None) == 200


async def test_without_keys_web_pages_of_others_are_refused(server: str, http: aiohttp.ClientSession) -> None:
    """A page on any site may post text/plain to 127.0.0.1, and a rebound name resolves to it."""
    url = f"{server}/v2/tasks"
    assert await status_of(http, "POST", url, None, json=GOOD, headers={"Origin": "https://evil.example"}) == 403
    assert await status_of(http, "POST", url, None, json=GOOD, headers={"Origin": "null"}) == 403
    assert await status_of(http, "POST", url, None, json=GOOD, headers={"Host": "evil.example:80"}) == 403
    assert await status_of(http, "POST", url, None, json=GOOD, headers={"Origin": server}) == 202
    port = server.rpartition(":")[2]
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "llorch.localhost"):
        assert await status_of(http, "POST", url, None, json=GOOD, headers={"Host": host}) == 202
    assert await status_of(http, "POST", url, "whatever-the-client-library-needs", json=GOOD) == 202


@pytest.mark.parametrize("path", ["/", "/docs", "/dashboard/dashboard.js", "/dashboard/style.css"])
async def test_pages_come_whole_and_from_here_alone(server: str, http: aiohttp.ClientSession, path: str) -> None:
    async with http.get(server + path) as reply:
        text = await reply.text()
        assert reply.status == 200
        policy = reply.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
    assert "https://" not in text and "innerHTML" not in text and " style=" not in text and "onclick" not in text
    async with http.get(f"{server}/dashboard/..%2fapp.py") as reply:
        assert reply.status == 404


async def test_ready_and_health_tell_apart(
    server: str, http: aiohttp.ClientSession, memory: MemoryOrchestrator
) -> None:
    memory.state = "draining"
    async with http.get(f"{server}/ready") as reply:
        assert (reply.status, await reply.json()) == (503, {"ready": False, "reason": "draining"})
        assert reply.headers["Retry-After"]
    async with http.get(f"{server}/health") as reply:
        assert (reply.status, (await reply.json())["status"]) == (200, "draining")


async def test_openapi_describes_every_route_and_resolves(server: str, http: aiohttp.ClientSession) -> None:
    async with http.get(f"{server}/openapi.json") as reply:
        document = await reply.json()
    paths = document["paths"]
    for path in (
        "/v2/tasks", "/v2/tasks/{task_id}", "/v2/tasks/{task_id}/events", "/v2/tasks/{task_id}/cancel", "/v2/queue",
        "/v2/workers", "/v2/workers/register", "/v2/workers/{worker_id}/heartbeat", "/v2/workers/{worker_id}/drain",
        "/v2/pools", "/v2/fleet/events", "/v2/meta/version", "/v1/models", "/v1/chat/completions", "/health",
    ):  # fmt: skip
        assert path in paths, path
    body = paths["/v2/tasks"]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"] == {"$ref": "#/components/schemas/TaskRequest"}
    names = set(document["components"]["schemas"])
    text = json.dumps(document)
    references = {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}
    assert references <= names, references - names
    assert {"200", "202", "400", "401", "413", "429", "503"} <= set(paths["/v2/tasks"]["post"]["responses"])


async def test_metrics_without_redis_still_tell_what_is_known(
    server: str, http: aiohttp.ClientSession, memory: MemoryOrchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with http.get(f"{server}/metrics") as reply:
        text = await reply.text()
        assert reply.headers["Content-Type"].startswith("text/plain")
    assert "llorch_store_up 1.0" in text
    assert 'llorch_queue_depth{model="demo",priority="interactive"} 4.0' in text
    assert 'llorch_queue_oldest_age_seconds{model="demo",priority="interactive"} 1.5' in text
    assert 'llorch_tenant_queue_depth{tenant="default"} 2.0' in text
    assert "acme" not in text, "only configured tenants are named"

    async def away() -> Any:
        raise ApiError(ErrorCode.STORE_UNAVAILABLE, "Redis is away")

    monkeypatch.setattr(memory, "queue", away)
    async with http.get(f"{server}/metrics") as reply:
        assert reply.status == 200
        text = await reply.text()
    assert "llorch_store_up 0.0" in text and "llorch_queue_depth{" not in text


async def test_a_crash_is_a_500_that_names_the_log(
    server: str,
    http: aiohttp.ClientSession,
    memory: MemoryOrchestrator,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def crash(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the prompt was: tell nobody")

    monkeypatch.setattr(memory, "submit", crash)
    for path, body in (("/v2/tasks", GOOD), ("/v1/completions", GOOD)):
        async with http.post(server + path, json=body) as reply:
            error = (await reply.json())["error"]
            assert reply.status == 500
            assert error["code"] in ("INTERNAL", "internal") and "tell nobody" not in json.dumps(error)
            identity = reply.headers["X-Correlation-Id"]
        logged = capsys.readouterr()
        assert identity in logged.out + logged.err
        assert "tell nobody" not in logged.out + logged.err
    async with http.get(f"{server}/health") as reply:
        assert reply.status == 200


async def test_too_many_open_requests_are_refused_but_probes_pass(memory: MemoryOrchestrator) -> None:
    memory.hold = True
    async with serving(memory, Settings(max_connections=16)) as server, aiohttp.ClientSession() as http:
        stream = {"Accept": "text/event-stream"}
        opened = [await http.post(f"{server}/v2/tasks", json=GOOD, headers=stream) for _ in range(16)]
        assert {reply.status for reply in opened} == {200}
        async with http.post(f"{server}/v2/tasks", json=GOOD) as reply:
            assert (reply.status, (await reply.json())["error"]["code"]) == (429, "RATE_LIMITED")
        async with http.get(f"{server}/health") as reply:
            assert reply.status == 200
        for reply in opened:
            reply.close()
