"""Signals reach the process that is meant, and no other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from llorch_pool import process


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    running = subprocess.Popen(
        [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "_LLORCH_TEST_MARK": "here it is"},
        start_new_session=True,
    )
    assert running.stdout is not None
    running.stdout.readline()
    yield running
    running.kill()
    running.communicate(timeout=5)


def test_identity_holds_while_it_runs_and_ends_with_it(child: subprocess.Popen[bytes]) -> None:
    identity = process.identify(child.pid)
    assert identity is not None and process.is_alive(identity)
    assert process.send(identity, signal.SIGTERM)
    child.wait(5)
    assert not process.is_alive(identity)
    assert not process.send(identity, signal.SIGTERM)


def test_a_zombie_counts_as_gone(child: subprocess.Popen[bytes]) -> None:
    identity = process.identify(child.pid)
    assert identity is not None
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not process.is_alive(identity)


@pytest.mark.parametrize("change", [{"start_time": 1}, {"boot_id": "another-boot"}])
def test_a_reused_pid_is_left_alone(child: subprocess.Popen[bytes], change: dict[str, Any]) -> None:
    """A pid from an old entry may belong to anybody after a reboot: it must never be signalled."""
    identity = process.identify(child.pid)
    assert identity is not None
    other = identity._replace(**change)
    assert not process.is_alive(other)
    assert not process.send(other, signal.SIGKILL, group=True)
    assert child.poll() is None


def test_a_whole_group_is_ended(child: subprocess.Popen[bytes]) -> None:
    identity = process.identify(child.pid)
    assert identity is not None
    assert process.send(identity, signal.SIGKILL, group=True)
    assert child.wait(5) == -signal.SIGKILL


def test_marked_processes_are_found_by_their_environment(child: subprocess.Popen[bytes]) -> None:
    found = process.marked_processes("_LLORCH_TEST_MARK")
    assert [(marked.process.pid, marked.value) for marked in found] == [(child.pid, "here it is")]


def test_names_with_parentheses_do_not_confuse_the_start_time(tmp_path: object) -> None:
    assert process.start_time(os.getpid()) is not None
    assert process.start_time(2**22 + 1) is None
