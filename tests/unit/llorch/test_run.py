"""`llorch run` and `llorch task watch` against scripted answers: cuts, repeats, gaps, refusals, Ctrl-C."""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import pytest

from llorch import cli, run
from llorch.errors import CliError, TimedOut
from llorch.follow import Follower, Retry
from llorch.http import Api
from llorch_wire.events import EndEvent, ErrorEvent, QueuedEvent, StartedEvent, TokenEvent, encode_data
from llorch_wire.sse import frame
from tests.unit.llorch.conftest import Scripted, as_json, error, hang_up, stream

QUEUED = frame("queued", encode_data(QueuedEvent(task_id="t", queue_position=1)), "0-1")
STARTED = frame(
    "started",
    encode_data(
        StartedEvent(
            task_id="t", worker_id="w", model="demo", model_digest="d", seed=1, attempt=1, determinism="exact",
            started_at_ms=1,
        )
    ),
    "1-0",
)  # fmt: skip
END = frame(
    "end", encode_data(EndEvent(stop_reason="EOS", tokens_in=4, tokens_out=3, decode_time_ms=100)), f"1-{2**64 - 1}"
)


def token(i: int, text: str) -> bytes:
    return frame("token", encode_data(TokenEvent(t=text, i=i, id=7)), f"1-{i + 1}")


WHOLE = (QUEUED, STARTED, token(0, "Once "), token(1, "upon"), token(2, " a time"), END)


class Orchestrator:
    """The scripted server as orchestratord: any task id's events come from the same replies."""

    def __init__(self, server: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server = server
        monkeypatch.setenv("LLORCH_URL", server.url)
        monkeypatch.setattr(run.uuid, "uuid4", lambda: "5b8e")
        monkeypatch.setattr("llorch.follow.BACKOFF_FIRST_S", 0.001)
        monkeypatch.setattr("llorch.follow.BACKOFF_MAX_S", 0.002)
        server.on("GET /v1/models", as_json({"data": [{"id": "demo"}]}))
        server.on("POST /v2/tasks", as_json({"task_id": "5b8e"}, 202))
        server.on("POST /v2/tasks/5b8e/cancel", as_json({"status": "cancelled"}))
        self.events(stream(*WHOLE))

    def events(self, *replies: Any) -> None:
        self.server.on("GET /v2/tasks/5b8e/events", *replies)

    def submitted(self) -> list[dict[str, Any]]:
        return [request.body for request in self.server.requests if request.path == "/v2/tasks"]

    def cursors(self) -> list[str | None]:
        return [r.headers.get("Last-Event-ID") for r in self.server.requests if r.path.endswith("/events")]


@pytest.fixture
def orchestrator(server: Scripted, monkeypatch: pytest.MonkeyPatch) -> Orchestrator:
    return Orchestrator(server, monkeypatch)


def test_text_on_stdout_and_statistics_on_stderr(orchestrator: Orchestrator, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "Tell me"]) == 0
    out, err = capfd.readouterr()
    assert out == "Once upon a time\n"
    assert err.startswith("4 tokens in · 3 out · first after ")
    assert err.endswith("20.0 tokens/s · stopped by EOS\n")
    assert orchestrator.submitted() == [
        {"task_id": "5b8e", "messages": [{"role": "user", "content": "Tell me"}], "model": "demo"}
    ]


def test_every_flag_reaches_the_request(orchestrator: Orchestrator) -> None:
    flags = "--model m --system s --max-tokens 5 --temperature 0 --top-p 0.5 --seed 3 --stop a --stop b".split()
    assert cli.main(["run", *flags, "--priority", "batch", "--session", "x", "hi"]) == 0
    assert orchestrator.submitted() == [
        {
            "task_id": "5b8e",
            "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}],
            "max_tokens": 5,
            "temperature": 0.0,
            "top_p": 0.5,
            "seed": 3,
            "stop": ["a", "b"],
            "priority": "batch",
            "session_id": "x",
            "model": "m",
        }
    ]
    assert "GET /v1/models" not in orchestrator.server.paths()


def test_json_is_the_raw_events(orchestrator: Orchestrator, capfd: pytest.CaptureFixture[str]) -> None:
    refreshed = frame("queued", encode_data(QueuedEvent(task_id="t", queue_position=0)))
    unknown = frame("confetti", b'{"new": "event"}')
    orchestrator.events(stream(QUEUED, refreshed, unknown, *WHOLE[1:]))
    assert cli.main(["run", "--json", "hi"]) == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    names = [line["event"] for line in lines]
    assert names == ["queued", "queued", "confetti", "started", "token", "token", "token", "end"]
    assert [line.get("id") for line in lines[:5]] == ["0-1", None, None, "1-0", "1-1"]
    assert lines[4]["data"] == {"t": "Once ", "i": 0, "id": 7}


def test_a_cut_stream_goes_on_where_it_was(orchestrator: Orchestrator, capfd: pytest.CaptureFixture[str]) -> None:
    unavailable = error("STORE_UNAVAILABLE", "Redis is away", 503, retriable=True, retry_after_ms=1)
    orchestrator.events(
        hang_up, stream(*WHOLE[:3]), hang_up, unavailable, stream(b": keep-alive\n\n"), stream(*WHOLE[3:])
    )
    assert cli.main(["run", "hi"]) == 0
    out, err = capfd.readouterr()
    assert out == "Once upon a time\n"
    assert orchestrator.cursors() == [None, None, "1-1", "1-1", "1-1", "1-1"]
    assert err.count("trying again for up to 600 s]") == err.count("[connected again after ") == 3


def test_repeats_are_dropped_and_gaps_are_errors(orchestrator: Orchestrator, capfd: pytest.CaptureFixture[str]) -> None:
    orchestrator.events(stream(*WHOLE[:4]), stream(*WHOLE[2:]))
    assert cli.main(["run", "hi"]) == 0
    assert capfd.readouterr().out == "Once upon a time\n"
    orchestrator.events(stream(*WHOLE[:3]), stream(*WHOLE[4:]))
    assert cli.main(["run", "hi"]) == 1
    out, err = capfd.readouterr()
    assert out == "Once "
    assert "the stream left out tokens 1 to 1" in err


def test_a_lost_answer_is_asked_for_again_with_the_same_id(orchestrator: Orchestrator) -> None:
    orchestrator.server.on("POST /v2/tasks", hang_up, as_json({"task_id": "5b8e"}, 202))
    assert cli.main(["run", "hi"]) == 0
    first, second = orchestrator.submitted()
    assert first == second


def test_the_first_contact_must_work(server: Scripted, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "hi", "--url", "http://127.0.0.1:9"]) == 5
    out, err = capfd.readouterr()
    assert not out and err.splitlines()[-1].startswith("next:  llorch up")


def test_patience_ends(orchestrator: Orchestrator, capfd: pytest.CaptureFixture[str]) -> None:
    orchestrator.events(stream(*WHOLE[:3]), hang_up)
    assert cli.main(["run", "hi", "--timeout", "0.05"]) == 124
    out, err = capfd.readouterr()
    assert out == "Once "
    assert err.splitlines()[-1] == "next:  llorch task watch 5b8e"


@pytest.mark.parametrize(
    ("event", "next_step"),
    [
        (ErrorEvent(code="CONTEXT_LENGTH_EXCEEDED", message="too long"), "shorten the prompt"),
        (ErrorEvent(code="INVALID_PARAMS", message="no template", param="messages"), "llorch run --raw"),
        (ErrorEvent(code="RETRIES_EXHAUSTED", message="5 attempts"), "llorch task show 5b8e"),
    ],
)
def test_a_failed_task(
    orchestrator: Orchestrator, event: ErrorEvent, next_step: str, capfd: pytest.CaptureFixture[str]
) -> None:
    orchestrator.events(stream(QUEUED, STARTED, token(0, "Half"), frame("error", encode_data(event), "1-9")))
    assert cli.main(["run", "hi"]) == 1
    out, err = capfd.readouterr()
    assert out == "Half\n"
    assert f"error: {event.message} ({event.code})" in err
    assert f"next:  {next_step}" in err


@pytest.mark.parametrize(
    ("models", "code", "message"),
    [([], 1, "no model is served yet"), (["a", "b"], 2, "there are several models: a, b")],
)
def test_no_model_or_several(
    orchestrator: Orchestrator, models: list[str], code: int, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    orchestrator.server.on("GET /v1/models", as_json({"data": [{"id": name} for name in models]}))
    assert cli.main(["run", "hi"]) == code
    assert message in capfd.readouterr().err


def test_ctrl_c_cancels_and_shows_the_end(
    orchestrator: Orchestrator, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shown = run.Printer.show

    def show_then_interrupt(self: run.Printer, batch: Any) -> None:
        shown(self, batch)
        if orchestrator.server.paths()[-1].endswith("/events") and len(orchestrator.cursors()) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(run.Printer, "show", show_then_interrupt)
    cancelled = EndEvent(stop_reason="CANCELLED", tokens_in=4, tokens_out=1)
    orchestrator.events(stream(*WHOLE[:3]), stream(frame("end", encode_data(cancelled), f"1-{2**64 - 1}")))
    assert cli.main(["run", "--json", "hi"]) == 130
    out, err = capfd.readouterr()
    assert "POST /v2/tasks/5b8e/cancel" in orchestrator.server.paths()
    assert json.loads(out.splitlines()[-1])["data"]["stop_reason"] == "CANCELLED"
    assert "cancelling the task" in err


def test_the_prompt_from_stdin(orchestrator: Orchestrator, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin = io.TextIOWrapper(io.BytesIO("Es war 🦊\n".encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert cli.main(["run", "--raw", "-"]) == 0
    assert orchestrator.submitted()[0]["prompt"] == "Es war 🦊\n"


@pytest.mark.parametrize(
    ("data", "message"), [(b"\xff", "UTF-8 (byte 0)"), (b"", "empty"), (b"x" * 9_000_000, "8 MiB")]
)
def test_a_bad_stdin(
    orchestrator: Orchestrator,
    data: bytes,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert cli.main(["run", "-"]) == 2
    assert message in capfd.readouterr().err
    assert not orchestrator.server.requests


def test_bytes_that_are_no_text_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "caf\udce9"]) == 2
    assert "the prompt is not valid UTF-8" in capfd.readouterr().err


def test_watch_shows_a_task_from_its_beginning_or_a_cursor(
    orchestrator: Orchestrator, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["task", "watch", "5b8e"]) == 0
    assert capfd.readouterr().out == "Once upon a time\n"
    orchestrator.events(stream(*WHOLE[4:]))
    assert cli.main(["task", "watch", "5b8e", "--after", "1-2"]) == 0
    assert capfd.readouterr().out == " a time\n"
    assert orchestrator.cursors()[-1] == "1-2"


def test_a_refusal_is_not_waited_out(orchestrator: Orchestrator, capfd: pytest.CaptureFixture[str]) -> None:
    orchestrator.events(error("GONE", "the log was dropped", 410))
    assert cli.main(["task", "watch", "5b8e"]) == 1
    assert len(orchestrator.server.requests) == 1
    assert "the log was dropped (GONE)" in capfd.readouterr().err


def test_cancel_several(orchestrator: Orchestrator, capfd: pytest.CaptureFixture[str]) -> None:
    orchestrator.server.on("POST /v2/tasks/no/cancel", error("NOT_FOUND", "no such task", 404))
    assert cli.main(["task", "cancel", "5b8e"]) == 0
    assert capfd.readouterr().err == "5b8e: cancelled\n"
    assert cli.main(["task", "cancel", "5b8e", "no"]) == 3
    assert "no: no such task (NOT_FOUND)" in capfd.readouterr().err
    assert cli.main(["task", "cancel", "no"]) == 1


def test_list_reads_page_after_page(orchestrator: Orchestrator, capfd: pytest.CaptureFixture[str]) -> None:
    first = [{"task_id": f"a{n}", "status": "queued", "usage": {"tokens_out": 0}} for n in range(200)]
    orchestrator.server.on(
        "GET /v2/tasks", as_json({"tasks": first, "next": "c"}), as_json({"tasks": first[:50], "next": None})
    )
    assert cli.main(["task", "list", "--limit", "300", "-o", "name"]) == 0
    assert len(capfd.readouterr().out.split()) == 250
    assert orchestrator.server.paths() == ["GET /v2/tasks?limit=200", "GET /v2/tasks?limit=100&after=c"]


def test_backoff_grows_and_waits_as_told() -> None:
    now, slept, notes = [0.0], [], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    retry = Retry(10, notes.append, clock=lambda: now[0], sleep=sleep)
    retry.worked()
    with pytest.raises(TimedOut, match="gave up after 10 s"):
        while True:
            retry.wait(TimedOut("silence", next_step="x"), next_step="y")
    assert 9.9 <= sum(slept) <= 10.0
    assert max(slept) <= 2.0 and slept[0] <= 0.1
    assert len(notes) == 1


def test_a_follower_reads_an_unreadable_event_as_an_error(server: Scripted) -> None:
    server.on("GET /v2/tasks/t/events", stream(frame("token", b'{"t": 5}', "1-1")))
    follower = Follower(Api(server.url), "t", Retry(1, print))
    with pytest.raises(CliError, match="a `token` event can't be read"):
        list(follower.events())
