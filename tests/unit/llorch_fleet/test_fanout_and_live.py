"""Outcomes of many pools to one exit code, and lines that don't cut ids or move the cursor."""

from __future__ import annotations

import io

import pytest

from llorch.errors import AccessProblem, CliError, ExitCode, PartialFailure, Unreachable
from llorch.fleet.fanout import Outcome, run, settle
from llorch.fleet.live import Live, describe
from llorch.fleet.pools import Pool
from llorch_wire.pool import Log, Progress

A, B = Pool(name="a", host="h"), Pool(name="b", host="h")


def test_exit_codes_of_a_fleet() -> None:
    good = Outcome(A, 1)
    settle([good, Outcome(B, 2)])
    with pytest.raises(Unreachable):
        settle([Outcome(A, error=Unreachable("x", next_step="y"))])
    with pytest.raises(PartialFailure):
        settle([good, Outcome(B, error=Unreachable("x", next_step="y"))])
    with pytest.raises(CliError) as same:
        settle([Outcome(pool, error=Unreachable("x", next_step="y")) for pool in (A, B)])
    assert same.value.exit_code == ExitCode.UNREACHABLE
    with pytest.raises(PartialFailure):
        settle([Outcome(A, error=Unreachable("x", next_step="y")), Outcome(B, error=AccessProblem("x", next_step="y"))])


def test_a_host_that_fails_does_not_stop_the_others() -> None:
    def work(pool: Pool, live: Live, cancel: object) -> str:
        if pool.name == "a":
            raise Unreachable("a is away", next_step="look")
        return pool.name

    first, second = run([A, B], work, quiet=True)
    assert first.error is not None and second.value == "b"


def test_an_unexpected_failure_is_not_swallowed() -> None:
    def work(pool: Pool, live: Live, cancel: object) -> str:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run([A], work, quiet=True)


def test_plain_lines_for_a_new_phase_only() -> None:
    out = io.StringIO()
    live = Live(["a", "b"], stream=out)
    for done in range(100):
        live.event("a", Progress(phase="downloading", text="m", done=done, total=100, unit="bytes"))
    live.event("a", Log(text="evil\x1b[2J\nline", level="warning"))
    live.close()
    lines = out.getvalue().splitlines()
    assert len(lines) == 2 and lines[1] == "a  warning: evil\\x1b[2J\\nline"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_line_a_host_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    out = Terminal()
    live = Live(["a", "bb"], stream=out)
    live.set("bb", "x" * 100, final=True)
    live.set("a", "asking", final=True)
    live.close()
    assert "\x1b[1F\x1b[J" in out.getvalue() and "a   asking" in out.getvalue()
    assert all(len(line) < 60 for line in out.getvalue().splitlines())


def test_progress_in_words() -> None:
    event = Progress(phase="downloading", text="m", done=1 << 30, total=2 << 30, unit="bytes", rate=1 << 20, eta_s=90)
    assert describe(event) == "downloading  m   50 %  1.0 GiB of 2.0 GiB  1.0 MiB/s  1 min 30 s left"
