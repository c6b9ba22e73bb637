"""Workers of a `llorch up` on a pool machine: theirs to start again, maybe of another orchestratord."""

from __future__ import annotations

from typing import Any

import pytest

from llorch.fleet.agreement import compare
from llorch_wire.pool import PoolStatus, WorkerInfo

NOW = 10_000_000


def status(**worker: Any) -> PoolStatus:
    known = {"worker_id": "up-1-1", "state": "ready", "url": "http://127.0.0.1:1", "orchestrator": "http://127.0.0.1:2"}
    return PoolStatus(
        host="h",
        version="",
        python="",
        devices=[],
        models=[],
        workers=[WorkerInfo(**{**known, "supervisor": "llorch up", "supervisor_pid": 77, **worker})],
        strays=[],
        models_dir="",
        state_dir="",
        disk_free_bytes=0,
        disk_total_bytes=0,
    )


ROW = {"worker_id": "up-1-1", "state": "ready", "url": "http://127.0.0.1:1", "pool": "local"}


@pytest.mark.parametrize("rows", [[], [ROW]])
@pytest.mark.parametrize("state", ["ready", "starting", "exited", "pid-reused"])
def test_nothing_to_say_while_its_supervisor_lives(rows: list[dict[str, Any]], state: str) -> None:
    assert compare({"box": status(state=state)}, rows, NOW) == []


def test_one_whose_supervisor_is_gone_is_judged_like_any_other() -> None:
    (unknown,) = compare({"box": status(supervisor_pid=0)}, [], NOW)
    assert "does not know it" in unknown.text
    dead = compare({"box": status(supervisor_pid=0, state="exited")}, [ROW], NOW)
    assert [item.repair.action for item in dead if item.repair] == ["cleanup", "forget"]


def test_two_under_one_name_name_the_supervisor() -> None:
    (found,) = compare({"box": status()}, [{**ROW, "url": "http://127.0.0.1:9"}], NOW)
    assert "two workers under one name" in found.text
    assert found.command == "on box, stop `llorch up`: kill 77"
    twice = compare({"a": status(), "b": status()}, None, NOW)
    assert [item.command for item in twice] == ["on b, stop `llorch up`: kill 77"]
