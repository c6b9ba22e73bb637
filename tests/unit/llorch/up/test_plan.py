from __future__ import annotations

import sys
from pathlib import Path

import pytest

from llorch.up import plan
from llorch.up.plan import UpOptions, is_loopback, local_url, restart_delay_s, threads_per_worker
from llorch.up.readiness import judge
from llorch.up.report import Summary, announcement
from llorch.up.stack import without_password


def test_two_restarts_at_once_then_doubling_up_to_half_a_minute() -> None:
    deaths = [100.0 + n for n in range(9)]
    delays = [restart_delay_s(deaths[: n + 1], deaths[n]) for n in range(9)]
    assert delays == [0, 0, 1, 2, 4, 8, 16, 30, 30]


def test_deaths_of_more_than_a_minute_ago_are_forgiven() -> None:
    assert restart_delay_s([0, 1, 2, 3, 70], 70) == 0
    assert restart_delay_s([0, 30, 59.9], 59.9) == 1
    assert restart_delay_s([0, 30, 60], 60) == 0


@pytest.mark.parametrize(
    ("cores", "workers", "threads"), [(9, 2, 4), (8, 2, 3), (2, 4, 1), (2, 1, 1), (1, 1, 1), (64, 1, 63)]
)
def test_cores_are_divided(cores: int, workers: int, threads: int) -> None:
    assert threads_per_worker(cores, workers) == threads


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "localhost", "LOCALHOST.", "::1", "[::1]", "a.localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", "", "localhost.example.org"])
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8080"),
        ("0.0.0.0", "http://127.0.0.1:8080"),
        ("::", "http://[::1]:8080"),
        ("::1", "http://[::1]:8080"),
        ("10.0.0.7", "http://10.0.0.7:8080"),
        ("gpu1", "http://gpu1:8080"),
    ],
)
def test_how_this_machine_reaches_it(host: str, url: str) -> None:
    assert local_url(host, 8080) == url


def test_no_secret_is_in_a_command_line() -> None:
    options = UpOptions(Path("/d"), device="cuda:0", slots=4, threads=3)
    keys = {"LLORCH_API_KEYS": "admin=s3cret-1", "LLORCH_WORKER_KEY": "s3cret-2"}
    daemon = plan.orchestratord_plan(options, 8080, "redis://:s3cret-3@h", keys)
    worker = plan.worker_plan(options, "up-1-1", 20001, "http://127.0.0.1:8080", keys)
    redis = plan.redis_plan(Path("/d"), Path("/d/redis-ready.json"))
    assert not any("s3cret" in word for part in (daemon, worker, redis) for word in part.argv)
    assert daemon.environment == {**keys, "LLORCH_REDIS_URL": "redis://:s3cret-3@h"}
    assert worker.environment == {"LLORCH_WORKER_KEY": "s3cret-2", "OMP_NUM_THREADS": "3"}
    assert list(worker.argv[:6]) == [sys.executable, "-P", "-m", "llorch_pool", "worker", "spawn"]
    assert list(worker.argv[worker.argv.index("--") :]) == ["--", "--threads", "3", "--drain-timeout", "10"]
    assert " --id up-1-1 --host 127.0.0.1 --port 20001 " in " ".join(worker.argv)
    assert " --device cuda:0 --slots 4" in " ".join(worker.argv)
    assert list(redis.argv[4:]) == ["redis", "--data-dir", "/d/redis", "--ready-file", "/d/redis-ready.json"]


def test_a_wildcard_host_advertises_an_address_that_others_reach() -> None:
    options = UpOptions(Path("/d"), host="0.0.0.0", advertised_host="10.0.0.7")
    assert " --advertise-url http://10.0.0.7:8080" in " ".join(plan.orchestratord_plan(options, 8080, "u", {}).argv)


def test_a_redis_url_in_the_ready_file_has_no_password() -> None:
    assert without_password("redis://user:pw@host:6379/0") == "redis://host:6379/0"
    assert without_password("unix:///run/redis.sock") == "unix:///run/redis.sock"


@pytest.mark.parametrize(
    ("health", "listed", "takes_work", "text"),
    [
        (None, None, False, "starting"),
        ({"status": "starting", "detail": "loading weights"}, None, False, "loading weights"),
        ({"status": "ready", "instance_id": "b"}, None, False, "registering"),
        ({"status": "ready", "instance_id": "b"}, {"instance_id": "a", "state": "ready"}, False, "registering"),
        ({"status": "ready", "instance_id": "b"}, {"instance_id": "b", "state": "ready"}, True, "ready"),
        ({"status": "ready", "instance_id": "b"}, {"instance_id": "b", "state": "draining"}, False, "draining"),
        ({"status": "ready"}, {"state": "ready"}, False, "registering"),
        ({"status": "failed", "detail": "no such device"}, {}, False, "no such device"),
    ],
)
def test_a_worker_counts_when_both_sides_mean_the_same_instance(
    health: dict[str, object] | None, listed: dict[str, object] | None, takes_work: bool, text: str
) -> None:
    state = judge(health, listed)
    assert (state.takes_work, state.text) == (takes_work, text)


def test_the_announcement_can_be_copied() -> None:
    summary = Summary("http://127.0.0.1:8080", "it's", 1, Path("/d"), None, False, None)
    text = announcement(summary)
    assert text.startswith("llorch is up: 1 worker serves it's\n")
    assert 'llorch run "Tell me' in text and "--url" not in text and "Authorization" not in text
    curl = next(line for line in text.splitlines() if line.startswith("  curl"))
    import json
    import shlex

    assert json.loads(shlex.split(curl)[-1])["model"] == "it's"
    keyed = announcement(summary._replace(url="http://127.0.0.1:9", needs_key=True, key_file=Path("/d/api-key")))
    assert "export LLORCH_API_KEY=$(cat /d/api-key)" in keyed
    assert "Bearer $LLORCH_API_KEY" in keyed and "--url http://127.0.0.1:9" in keyed
