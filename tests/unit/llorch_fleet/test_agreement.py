"""Pools against orchestratord: every disagreement is found once, with its repair; agreement is silent."""

from __future__ import annotations

from typing import Any

from llorch.fleet.agreement import Repair, compare
from llorch_wire.pool import PoolStatus, Stray, WorkerInfo

NOW = 1_000_000_000


def worker(worker_id: str = "w1", state: str = "ready", **fields: Any) -> WorkerInfo:
    base = {"url": "http://10.0.0.5:1", "orchestrator": "http://o", "model_digest": "sha256:a", "started_at_ms": 1}
    return WorkerInfo(worker_id=worker_id, state=state, **{**base, **fields})


def status(*workers: WorkerInfo, strays: list[Stray] | None = None) -> PoolStatus:
    return PoolStatus(
        host="h", version="0.1.0", python="3.12", devices=[], models=[], workers=list(workers), strays=strays or [],
        models_dir="", state_dir="", disk_free_bytes=0, disk_total_bytes=0,
    )  # fmt: skip


def known(worker_id: str = "w1", state: str = "ready", pool: str = "a", **fields: Any) -> dict[str, Any]:
    return {"worker_id": worker_id, "state": state, "pool": pool, "url": "http://10.0.0.5:1", **fields}


def test_agreement_is_silent() -> None:
    assert compare({"a": status(worker())}, [known(model_digest="sha256:a")], NOW) == []


def test_a_young_worker_may_still_register() -> None:
    assert compare({"a": status(worker(started_at_ms=NOW - 5000))}, [], NOW) == []
    (found,) = compare({"a": status(worker())}, [], NOW)
    assert found.level == "error" and "does not know it" in found.text and found.repair is None


def test_a_worker_that_serves_by_itself_is_no_disagreement() -> None:
    assert compare({"a": status(worker(orchestrator=""))}, [], NOW) == []


def test_a_dead_entry_is_cleaned_up_and_forgotten() -> None:
    found = compare({"a": status(worker(state="exited"))}, [known()], NOW)
    assert {item.repair for item in found} == {Repair("cleanup", "a"), Repair("forget", "w1")}


def test_a_reboot() -> None:
    (stays,) = compare({"a": status(worker(state="rebooted", on_boot=True))}, [], NOW)
    assert stays.repair == Repair("restore", "a")
    (goes,) = compare({"a": status(worker(state="rebooted"))}, [], NOW)
    assert goes.repair == Repair("cleanup", "a")


def test_two_workers_under_one_name() -> None:
    found = compare({"a": status(worker()), "b": status(worker())}, [known()], NOW)
    assert any("runs on a and on b" in item.text for item in found)
    found = compare({"a": status(worker())}, [known(url="http://10.0.0.6:2")], NOW)
    assert "two workers under one name" in found[0].text


def test_left_over_at_orchestratord() -> None:
    (found,) = compare({"a": status()}, [known(state="lost"), known("other", pool="not-here")], NOW)
    assert found.level == "warning" and found.repair == Repair("forget", "w1")


def test_lost_though_it_runs() -> None:
    (found,) = compare({"a": status(worker())}, [known(state="lost")], NOW)
    assert "can it reach" in found.text and found.repair is None


def test_a_stray_process() -> None:
    (found,) = compare({"a": status(strays=[Stray(pid=7, worker_id="w9", command="python")])}, [], NOW)
    assert found.repair == Repair("cleanup", "a")


def test_without_orchestratord_pools_are_still_checked() -> None:
    assert compare({"a": status(worker())}, None, NOW) == []
    assert compare({"a": status(worker(state="exited"))}, None, NOW)
