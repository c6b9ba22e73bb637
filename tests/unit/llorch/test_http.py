from __future__ import annotations

from typing import Any

import pytest

from llorch.errors import ApiFailure, ExitCode, TimedOut, Unreachable, UsageProblem
from llorch.http import Api, connect, rows, segment
from llorch_wire.sse import frame
from tests.support.stack import free_port
from tests.unit.llorch.conftest import Scripted, as_json, error, hang_up, stream


def test_a_request_and_its_answer(server: Scripted) -> None:
    server.on("GET /v2/tasks", as_json({"tasks": [{"task_id": "t"}]}))
    api = Api(server.url + "/", "k3y-k3y-k3y")
    assert rows(api.get("/v2/tasks", {"limit": 5, "model": None, "status": "a b&c"}), "tasks") == [{"task_id": "t"}]
    assert server.paths() == ["GET /v2/tasks?limit=5&status=a+b%26c"]
    assert server.requests[0].headers["Authorization"] == "Bearer k3y-k3y-k3y"


def test_the_key_comes_from_settings_and_bodies_are_utf8(server: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLORCH_URL", server.url)
    monkeypatch.setenv("LLORCH_API_KEY", " from-env-123 ")
    server.on("POST /v2/tasks", as_json({}, 202))
    connect().post("/v2/tasks", {"prompt": "grüße 🦊"})
    assert server.requests[0].body == {"prompt": "grüße 🦊"}
    assert server.requests[0].headers["Authorization"] == "Bearer from-env-123"


@pytest.mark.parametrize("key", ["a b\n", "", "schlüssel"])
def test_a_key_that_is_no_header_value_is_refused_without_being_shown(key: str) -> None:
    if key == "a b\n":
        key = "a\nb"
    with pytest.raises(UsageProblem) as raised:
        Api("http://h", key)
    assert raised.value.message == "LLORCH_API_KEY must be printable ASCII"


@pytest.mark.parametrize("url", ["", "h:1", "http://", "http://h:0", "http://h:99999", "http://h/?q=1", "http://a b"])
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(UsageProblem):
        Api(url)


@pytest.mark.parametrize(
    ("reply", "code", "exit_code"),
    [
        (error("MODEL_NOT_FOUND", "no model `x`", 404), "MODEL_NOT_FOUND", ExitCode.FAILED),
        (error("INVALID_PARAMS", "`top_p`: must be…", 400, param="top_p"), "INVALID_PARAMS", ExitCode.USAGE),
        (error("UNAUTHORIZED", "send a key", 401), "UNAUTHORIZED", ExitCode.ACCESS),
        (error("FORBIDDEN", "not yours", 403), "FORBIDDEN", ExitCode.ACCESS),
        (error("QUEUE_FULL", "full", 429, retriable=True, retry_after_ms=700), "QUEUE_FULL", ExitCode.FAILED),
    ],
)
def test_error_objects(server: Scripted, reply: Any, code: str, exit_code: int) -> None:
    server.on("GET /x", reply)
    with pytest.raises(ApiFailure) as raised:
        Api(server.url).get("/x")
    failure = raised.value
    assert (failure.code, failure.exit_code) == (code, exit_code)
    assert failure.next_step
    assert failure.retry_after_ms == (700 if code == "QUEUE_FULL" else None)


@pytest.mark.parametrize("reply", [as_json("nginx", 502), as_json({"error": "no"}, 500), as_json([1], 404)])
def test_an_error_that_is_not_orchestratords(server: Scripted, reply: Any) -> None:
    server.on("GET /x", reply)
    with pytest.raises(Unreachable, match="not orchestratord"):
        Api(server.url).get("/x")


def test_nobody_there_and_a_cut_differ(server: Scripted) -> None:
    server.on("GET /x", hang_up)
    with pytest.raises(Unreachable, match="the connection was cut") as cut:
        Api(server.url).get("/x")
    assert cut.value.connected
    with pytest.raises(Unreachable, match="nothing listens there") as refused:
        Api(f"http://127.0.0.1:{free_port()}").get("/x")
    assert not refused.value.connected
    assert refused.value.next_step.startswith("llorch up")


def test_silence_has_a_deadline(server: Scripted) -> None:
    import threading

    release = threading.Event()
    server.on("GET /x", lambda handler: release.wait(30) and None)
    try:
        with pytest.raises(TimedOut, match=r"within 0\.05 s"):
            Api(server.url, timeout_s=0.05).get("/x")
    finally:
        release.set()


def test_a_stream_gives_frames_and_names_its_cursor(server: Scripted) -> None:
    server.on("GET /events", stream(b": keep-alive\n\n", frame("token", b'{"i":0}', "1-1"), frame("end", b"{}", "1-2")))
    with Api(server.url).stream("/events", after="0-1") as events:
        found = [item for batch in events for item in batch]
    assert [(item.event, item.id) for item in found] == [("token", "1-1"), ("end", "1-2")]
    assert server.requests[0].headers["Last-Event-ID"] == "0-1"


def test_a_stream_that_is_refused(server: Scripted) -> None:
    server.on("GET /events", error("GONE", "the log was dropped", 410), as_json({"not": "a stream"}))
    with pytest.raises(ApiFailure, match="the log was dropped"):
        Api(server.url).stream("/events")
    with pytest.raises(Unreachable, match="answered 200 application/json"):
        Api(server.url).stream("/events")


def test_ids_are_one_segment() -> None:
    assert segment("../a b?c#d/é") == "..%2Fa%20b%3Fc%23d%2F%C3%A9"


def test_answers_without_their_list() -> None:
    for document in (None, [], {"other": 1}, {"tasks": {}}):
        with pytest.raises(Exception, match="has no `tasks`"):
            rows(document, "tasks")
