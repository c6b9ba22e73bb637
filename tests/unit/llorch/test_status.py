from __future__ import annotations

import json
from typing import Any

import pytest

from llorch import cli
from llorch.http import Api
from llorch.status import alerts, devices, screen
from llorch.watch import FleetFeed
from llorch_wire.sse import frame
from tests.unit.llorch.conftest import Scripted, as_json, error, stream


def worker(worker_id: str, **fields: Any) -> dict[str, Any]:
    shown = {
        "worker_id": worker_id, "state": "ready", "model": "demo", "pool": "local", "device": "cpu",
        "slots_total": 8, "slots_used": 2, "tokens_per_second": 12.34, "vram_total_bytes": 0, "vram_used_bytes": 0,
    }  # fmt: skip
    return shown | fields


def snapshot(**fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "url": "http://h:1", "at_ms": 0, "ready": {"ready": True, "reason": None}, "version": {"version": "0.1.0"},
        "pools": [], "devices": [], "workers": [], "queues": [],
    }  # fmt: skip
    found |= fields
    found["alerts"] = [alert._asdict() for alert in alerts(found)]
    return found


def test_nothing_wrong_is_no_alert() -> None:
    queue = {"model": "demo", "priority": "batch", "depth": 3, "oldest_age_ms": 9}
    found = snapshot(workers=[worker("w")], queues=[queue])
    assert not found["alerts"]


def test_alerts_are_sorted_and_name_a_command() -> None:
    found = alerts(
        snapshot(
            ready={"ready": False, "reason": "Redis is away"},
            workers=[
                worker("d", state="draining"),
                worker("l", state="lost"),
                worker("f", state="failed"),
            ],
            queues=[
                {"model": "big", "priority": "batch", "depth": 4, "oldest_age_ms": 1},
                {"model": "none", "priority": "batch", "depth": 0, "oldest_age_ms": 0},
            ],
        )
    )
    assert [(alert.level, alert.text) for alert in found] == [
        ("critical", "orchestratord is not ready: Redis is away"),
        ("critical", "4 tasks wait for big, which no worker serves"),
        ("critical", "worker l is lost"),
        ("critical", "worker f is failed"),
        ("warning", "worker d takes no new tasks"),
    ]
    assert all(alert.next_step.startswith("llorch ") for alert in found)


def test_a_long_wait_is_an_alert() -> None:
    queue = {"model": "demo", "priority": "interactive", "depth": 1, "oldest_age_ms": 45_000}
    (alert,) = alerts(snapshot(workers=[worker("w")], queues=[queue]))
    assert alert.text == "interactive tasks for demo wait up to 45.0 s"


def test_devices_are_counted_once() -> None:
    gpu = {"device": "cuda:0 NVIDIA H100", "vram_total_bytes": 80, "vram_used_bytes": 20}
    found = devices([worker("a", **gpu), worker("b", **(gpu | {"vram_used_bytes": 30})), worker("c", state="lost")])
    assert found == [
        {"pool": "local", "device": "cuda:0 NVIDIA H100", "workers": 2, "vram_total_bytes": 80, "vram_used_bytes": 30}
    ]


def test_the_screen() -> None:
    lines = screen(
        snapshot(
            pools=[{"pool": "local", "workers_ready": 1, "workers_total": 2, "slots_used": 2, "slots_total": 16,
                    "models": ["demo"]}],
            devices=devices([worker("w1", vram_total_bytes=2**34, vram_used_bytes=2**33)]),
            workers=[worker("w1"), worker("w\x1b[2J", state="lost")],
            queues=[{"model": "demo", "priority": "batch", "tenant": "t", "depth": 7, "oldest_age_ms": 1500}],
        ),
        events=["12:00:00 lost w: no heartbeat"],
    )  # fmt: skip
    text = "\n".join(lines)
    assert lines[0] == "orchestratord 0.1.0 at http://h:1: ready, 7 waiting"
    assert "local  1/2 workers  2/16   demo" in text
    assert "cpu     local        1  8.0 GiB of 16.0 GiB" in text
    assert "w1        ready  demo   local  2/8     12.3" in text
    assert "demo   batch     t             7   1.5 s" in text
    assert "CRITICAL worker w\\x1b[2J is lost    next: llorch doctor" in text
    assert "\x1b" not in text
    assert lines[-1] == "12:00:00 lost w: no heartbeat"


def serve(server: Scripted) -> None:
    server.on("GET /v2/workers", as_json({"workers": [worker("w1")]}))
    server.on("GET /ready", as_json({"ready": True}))
    server.on("GET /v2/meta/version", as_json({"version": "0.1.0"}))
    server.on("GET /v2/pools", error("NOT_FOUND", "no such path", 404))
    server.on("GET /v2/queue", as_json({"depth": 0, "queues": []}))


def test_json_and_tsv(server: Scripted, capfd: pytest.CaptureFixture[str]) -> None:
    serve(server)
    assert cli.main(["status", "--json", "--url", server.url]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["ready"] == {"ready": True, "reason": None}
    assert found["workers"][0]["worker_id"] == "w1"
    assert cli.main(["status", "--url", server.url]) == 0
    assert capfd.readouterr().out == f"orchestratord\t{server.url}\tready\t\nworker\tw1\tready\t2/8\n"


def test_not_ready_is_shown_not_raised(server: Scripted, capfd: pytest.CaptureFixture[str]) -> None:
    serve(server)
    server.on("GET /ready", error("STORE_UNAVAILABLE", "Redis is away", 503))
    assert cli.main(["status", "-o", "table", "--url", server.url]) == 0
    assert "CRITICAL orchestratord is not ready: Redis is away (STORE_UNAVAILABLE)" in capfd.readouterr().out


def test_queue_and_workers(server: Scripted, capfd: pytest.CaptureFixture[str]) -> None:
    serve(server)
    queue = {"model": "demo", "priority": "batch", "tenant": "t", "depth": 7, "oldest_age_ms": 1500}
    server.on("GET /v2/queue", as_json({"queues": [queue]}))
    assert cli.main(["queue", "show", "--url", server.url]) == 0
    assert capfd.readouterr().out == "demo\tbatch\tt\t7\t1.5 s\n"
    assert cli.main(["worker", "list", "--url", server.url, "-o", "name"]) == 0
    assert capfd.readouterr().out == "w1\n"
    assert cli.main(["worker", "list", "--state", "lost", "--url", server.url, "-o", "name"]) == 0
    assert capfd.readouterr().out == ""


def test_drain_and_undrain(server: Scripted, capfd: pytest.CaptureFixture[str]) -> None:
    server.on("POST /v2/workers/a%20b/drain", as_json({}))
    server.on("POST /v2/workers/no/drain", error("NOT_FOUND", "no such worker", 404))
    server.on("POST /v2/workers/w/undrain", as_json({}))
    assert cli.main(["worker", "drain", "a b", "--deadline", "1.5", "--url", server.url]) == 0
    assert server.requests[0].body == {"deadline_ms": 1500}
    assert cli.main(["worker", "drain", "a b", "no", "--url", server.url]) == 3
    assert cli.main(["worker", "drain", "no", "--url", server.url]) == 1
    assert "no worker 'no' is registered\nnext:  llorch worker list\n" in capfd.readouterr().err
    assert cli.main(["worker", "undrain", "w", "--url", server.url]) == 0
    assert "w: takes tasks again" in capfd.readouterr().err


@pytest.mark.parametrize(("verb", "later"), [("undrain", "takes tasks again"), ("drain", "gets no new tasks")])
def test_of_a_lost_worker_it_is_said(
    server: Scripted, capfd: pytest.CaptureFixture[str], verb: str, later: str
) -> None:
    server.on(f"POST /v2/workers/w/{verb}", as_json({"worker_id": "w", "state": "lost"}))
    server.on(f"POST /v2/workers/ok/{verb}", as_json({"worker_id": "ok", "state": "ready"}))
    assert cli.main(["worker", verb, "w", "--url", server.url]) == 1
    err = capfd.readouterr().err
    assert "w is lost" in err and f"it {later} once it is back" in err and "next:  llorch doctor" in err
    assert cli.main(["worker", verb, "ok", "w", "--url", server.url]) == 3


def test_one_that_drains_by_itself_does_not_take_tasks_again(
    server: Scripted, capfd: pytest.CaptureFixture[str]
) -> None:
    server.on("POST /v2/workers/w/undrain", as_json({"worker_id": "w", "state": "draining"}))
    assert cli.main(["worker", "undrain", "w", "--url", server.url]) == 0
    assert "w: is draining by itself, and takes no tasks yet" in capfd.readouterr().err


def test_a_state_that_no_worker_has_is_refused(server: Scripted, capfd: pytest.CaptureFixture[str]) -> None:
    server.on("GET /v2/workers", as_json({"workers": [{"worker_id": "w", "state": "lost"}]}))
    assert cli.main(["worker", "list", "--state", "bogus", "--url", server.url]) == 2
    assert "next:  one of: draining, failed, lost, ready" in capfd.readouterr().err
    assert cli.main(["worker", "list", "--state", "lost", "-o", "name", "--url", server.url]) == 0
    assert capfd.readouterr().out == "w\n"


def test_the_states_are_those_of_orchestratord() -> None:
    from typing import get_args, get_type_hints

    from llorch.workers_http import STATES
    from orchestratord.store.types import WorkerView

    assert sorted(get_args(get_type_hints(WorkerView)["state"])) == list(STATES)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "command",
    [
        "run x --temperature",
        "run x --top-p",
        "run x --timeout",
        "worker drain w --deadline",
        "worker stop w --grace",
        "worker spawn demo --idle-timeout",
        "worker spawn demo --ready-timeout",
    ],
)
def test_nan_and_inf_are_no_numbers(capfd: pytest.CaptureFixture[str], command: str, value: str) -> None:
    assert cli.main([*command.split(), value]) == 2
    err = capfd.readouterr().err
    assert command.split()[-1] in err, err


@pytest.mark.parametrize("value", ["0", "-5"])
def test_a_worker_has_some_time_to_become_ready(capfd: pytest.CaptureFixture[str], value: str) -> None:
    assert cli.main(["worker", "spawn", "demo", "--ready-timeout", value]) == 2
    assert "--ready-timeout" in capfd.readouterr().err


def test_the_feed_reconnects_after_its_cursor(server: Scripted) -> None:
    def event(number: int) -> bytes:
        return frame("lost", json.dumps({"kind": "lost", "subject": f"w{number}", "text": "x"}).encode(), f"{number}-0")

    server.on("GET /v2/fleet/events", stream(event(1)), stream(event(2)), error("NOT_FOUND", "gone", 404))
    feed = FleetFeed(Api(server.url), pause_s=0.001)
    feed.start()
    feed._thread.join(10)
    assert [found["subject"] for found in feed.latest()] == ["w1", "w2"]
    assert [found["subject"] for found in feed.take()] == ["w1", "w2"]
    assert feed.take() == []
    assert [request.headers.get("Last-Event-ID") for request in server.requests] == [None, "1-0", "2-0"]
