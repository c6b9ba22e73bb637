"""`llorch run`: submit a prompt, stream its text, survive whatever happens to orchestratord meanwhile.

Read `submit_and_follow` first. The task's id is made here, so that a submission whose answer was lost is sent again
without becoming a second task; the stream resumes by itself (`llorch.follow`).
"""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from llorch.config import Settings
from llorch.errors import CliError, ExitCode, UsageProblem
from llorch.follow import Follower, Received, Retry
from llorch.http import Api, connect, rows, segment
from llorch.options import UrlOption, finite
from llorch.output import clean, duration, say
from llorch_wire.events import EndEvent, ErrorEvent, MigratedEvent, QueuedEvent, StartedEvent, TokenEvent

MAX_PROMPT_BYTES = 8 * 2**20
PRIORITIES = ("interactive", "batch")
CANCEL_S = 3.0


def run(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The prompt; `-` reads it from stdin.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="Model; default: the only one served.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Send the bare prompt instead of a chat message.")] = False,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, help="At most this many tokens.")] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0, max=2, callback=finite, help="0 is greedy.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", callback=finite, help="Nucleus sampling, above 0 and up to 1.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="The same seed gives the same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Stop string; may be given up to 8 times.")] = None,
    priority: Annotated[str | None, typer.Option("--priority", help="interactive (default) or batch.")] = None,
    session: Annotated[str | None, typer.Option("--session", help="Tasks of a session prefer one worker.")] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout",
            min=0,
            callback=finite,
            help="Seconds to go on trying while orchestratord can't be reached [600].",
        ),
    ] = None,
    url: UrlOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the raw events, one JSON object a line.")] = False,
) -> int:
    """Run a prompt and stream its text to stdout; statistics go to stderr. Ctrl-C cancels the task."""
    if priority is not None and priority not in PRIORITIES:
        raise UsageProblem(f"no priority {priority!r}: use interactive or batch", next_step="llorch run --help")
    text = _prompt(prompt)
    body: dict[str, Any] = {"task_id": str(uuid.uuid4()), **_input(text, system, raw=raw)}
    options = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop": stop or None,
        "priority": priority,
        "session_id": session,
    }
    body |= {name: value for name, value in options.items() if value is not None}
    api = connect(url)
    printer = Printer(as_json=as_json)
    retry = Retry(patience_s(timeout), printer.note)
    body["model"] = Settings().get("model", model).value or retry.call(lambda: only_model(api))
    return submit_and_follow(api, body, printer, retry)


def submit_and_follow(api: Api, body: dict[str, Any], printer: Printer, retry: Retry) -> int:
    """Have the task admitted and show it to its end. Returns the exit code."""
    task_id: str = body["task_id"]
    follower = Follower(api, task_id, retry)
    try:
        retry.call(lambda: api.post("/v2/tasks", body))
        for batch in follower.events():
            printer.show(batch)
    except KeyboardInterrupt:
        printer.note("cancelling the task; Ctrl-C again leaves at once")
        _cancel(api, follower, printer)
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # Nobody reads what is generated any more.
        _cancel(api, follower, None)
        raise
    return printer.finish(task_id)


def _cancel(api: Api, follower: Follower, printer: Printer | None) -> None:
    """Cancel within a few seconds and show the rest; a failure is only noted: this command ends anyway."""
    deadline = time.monotonic() + CANCEL_S
    try:
        api.post(f"/v2/tasks/{segment(follower.task_id)}/cancel", timeout_s=CANCEL_S)
        if printer is not None:
            for batch in follower.once(silence_s=max(0.1, deadline - time.monotonic())):
                printer.show(batch)
                if time.monotonic() > deadline:
                    break
    except CliError as error:
        if getattr(error, "status", None) != 404:
            say(f"the task could not be cancelled: {error.message}; later: llorch task cancel {follower.task_id}")


class Printer:
    """Shows events: text on stdout as it comes, or every event as JSON; remarks and statistics on stderr."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._transient = sys.stderr.isatty() and not as_json
        self._shows_transient = False
        self._begun = time.monotonic()
        self._first_token: float | None = None
        self._last_token: float | None = None
        self._tokens = 0
        self._at_line_start = True
        self._last: EndEvent | ErrorEvent | None = None

    def show(self, batch: Sequence[Received]) -> None:
        """Show the events of one network read, flushed together."""
        for received in batch:
            event = received.event
            if self._as_json:
                self._write(_as_line(received))
            if isinstance(event, TokenEvent):
                self._token(event)
            elif isinstance(event, QueuedEvent):
                self._queued(event)
            elif isinstance(event, StartedEvent):
                self._clear()
            elif isinstance(event, MigratedEvent):
                self.note(f"goes on at worker {event.worker_id} after {event.tokens_kept} tokens: {event.reason}")
            elif isinstance(event, EndEvent | ErrorEvent):
                self._clear()
                self._last = event
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """A remark on stderr, on a line of its own."""
        self._clear()
        if not self._as_json and not self._at_line_start and sys.stdout.isatty() and sys.stderr.isatty():
            print(file=sys.stderr)
            self._at_line_start = True
        say(f"[{text}]")

    def finish(self, task_id: str) -> int:
        """The last line and the exit code."""
        if not self._as_json and not self._at_line_start:
            print(flush=True)
        if isinstance(self._last, ErrorEvent):
            raise CliError(f"{self._last.message} ({self._last.code})", next_step=_after_failure(self._last, task_id))
        if self._last is not None:
            say(self._statistics(self._last))
        return ExitCode.OK

    def _token(self, event: TokenEvent) -> None:
        now = time.monotonic()
        if self._first_token is None:
            self._clear()
            self._first_token = now
        self._last_token = now
        self._tokens += 1
        if event.t and not self._as_json:
            self._write(event.t)
            self._at_line_start = event.t.endswith("\n")

    def _queued(self, event: QueuedEvent) -> None:
        if not self._transient or self._tokens:
            return
        wait = "" if event.predicted_start_ms is None else f", starts in about {duration(event.predicted_start_ms)}"
        sys.stderr.write(f"\r\x1b[Kwaiting at place {event.queue_position}{wait}")
        sys.stderr.flush()
        self._shows_transient = True

    def _clear(self) -> None:
        if self._shows_transient:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._shows_transient = False

    def _statistics(self, end: EndEvent) -> str:
        parts = [f"{end.tokens_in} tokens in", f"{end.tokens_out} out"]
        if self._first_token is not None:
            parts.append(f"first after {duration((self._first_token - self._begun) * 1000)}")
        # The worker's own decode time where it tells it: a cut on the way here says nothing of its speed.
        decode_s = end.decode_time_ms / 1000 or ((self._last_token or 0) - (self._first_token or 0))
        if end.tokens_out > 1 and decode_s > 0:
            parts.append(f"{(end.tokens_out - 1) / decode_s:.1f} tokens/s")
        if end.cached_tokens:
            parts.append(f"{end.cached_tokens} from cache")
        reason = f"stopped by {end.stop_reason}"
        if end.stop_sequence_matched is not None:
            reason += f" {clean(repr(end.stop_sequence_matched))}"
        return " · ".join([*parts, reason])

    def _write(self, text: str) -> None:
        # A terminal must not be steered by generated text; a file or pipe gets it byte for byte.
        sys.stdout.write(_harmless(text) if sys.stdout.isatty() else text)


def _harmless(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in "\n\t" else clean(char) for char in text)


def _as_line(received: Received) -> str:
    frame = received.frame
    head: dict[str, Any] = {"event": frame.event}
    if received.has_id:
        head["id"] = frame.id
    return json.dumps(head | {"data": json.loads(frame.data)}, ensure_ascii=False, separators=(",", ":")) + "\n"


def _after_failure(error: ErrorEvent, task_id: str) -> str:
    if error.code == "CONTEXT_LENGTH_EXCEEDED":
        return "shorten the prompt, or ask for less with --max-tokens"
    if error.code == "INVALID_PARAMS" and error.param == "messages":
        return "llorch run --raw ...    (sends the bare prompt, without a chat template)"
    return f"llorch task show {task_id}"


def patience_s(flag: float | None) -> float:
    """How long to go on trying to reach orchestratord: flag, then the `timeout` setting. Raises UsageProblem."""
    setting = Settings().get("timeout", None if flag is None else str(flag))
    try:
        seconds = float(setting.value or "")
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 10**7:
        raise UsageProblem(
            f"`timeout` is {setting.value!r} in {setting.origin}; it must be seconds",
            next_step="llorch config show --origin",
        )
    return seconds


def only_model(api: Api) -> str:
    """The model that is served, if there is just one. Raises CliError or UsageProblem otherwise."""
    names = [str(row.get("id")) for row in rows(api.get("/v1/models"), "data")]
    if not names:
        raise CliError("no model is served yet: no worker has registered", next_step="llorch worker list")
    if len(names) > 1:
        shown = ", ".join(clean(name) for name in names[:8])
        raise UsageProblem(f"there are several models: {shown}", next_step=f"llorch run --model {clean(names[0])} ...")
    return names[0]


def _input(text: str, system: str | None, *, raw: bool) -> dict[str, Any]:
    if raw:
        if system is not None:
            raise UsageProblem("--system has no place in a --raw prompt", next_step="leave one of them out")
        return {"prompt": text}
    messages = [] if system is None else [{"role": "system", "content": _unicode(system, "--system")}]
    return {"messages": [*messages, {"role": "user", "content": text}]}


def _prompt(given: str) -> str:
    if given != "-":
        text = _unicode(given, "the prompt")
    else:
        data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
        if len(data) > MAX_PROMPT_BYTES:
            raise UsageProblem("the prompt on stdin is larger than 8 MiB", next_step="shorten the prompt")
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UsageProblem(
                f"the prompt on stdin is not UTF-8 (byte {error.start})", next_step="iconv -t utf-8 FILE | llorch run -"
            ) from None
    if not text:
        raise UsageProblem("the prompt is empty", next_step='llorch run "Once upon a time"')
    return text


def _unicode(text: str, what: str) -> str:
    if any("\ud800" <= char <= "\udfff" for char in text):  # how Python hands on bytes that aren't UTF-8
        raise UsageProblem(f"{what} is not valid UTF-8", next_step="check the terminal's encoding (locale)")
    return text
