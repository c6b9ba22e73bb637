"""`llorch status --watch`: look again and again, and show what the fleet feed says as it says it.

Read `watch` first. On a terminal it redraws one screen; elsewhere it prints lines: every fleet event, and with a JSON
format every look too.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from llorch.errors import ApiFailure, CliError
from llorch.http import Api
from llorch.output import Format, clean, duration, use_color
from llorch.status import collect, screen
from llorch_wire.sse import SseFrame

SHOWN_EVENTS = 8
KEPT_EVENTS = 256
LEAST_WAIT_S = 0.2


def watch(api: Api, form: Format, interval_s: float) -> None:
    """Look every `interval_s`, show fleet events as they come, until Ctrl-C; an outage is shown, not an end."""
    feed = FleetFeed(api)
    feed.start()
    on_screen = form is Format.TABLE and sys.stdout.isatty()
    if on_screen:
        sys.stdout.write("\x1b[2J")
    snapshot: Mapping[str, Any] | None = None
    try:
        while True:
            trouble: str | None = None
            try:
                snapshot = collect(api)
            except CliError as error:
                if snapshot is None:
                    raise
                trouble = error.message
            if on_screen:
                _redraw(snapshot, feed, trouble)
            else:
                _append(snapshot, feed, form, trouble)
            feed.wait(interval_s)
    finally:
        feed.stop()


def _redraw(snapshot: Mapping[str, Any], feed: FleetFeed, trouble: str | None) -> None:
    lines = screen(snapshot, color=use_color(sys.stdout), events=[_event_line(event) for event in feed.latest()])
    if trouble is not None:
        lines[0] = clean(f"{trouble}; what follows is {duration(time.time() * 1000 - snapshot['at_ms'])} old")
    # Home, each line cleared to its end, then everything below: no flicker, nothing left of a longer screen.
    sys.stdout.write("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J")
    sys.stdout.flush()


def _append(snapshot: Mapping[str, Any], feed: FleetFeed, form: Format, trouble: str | None) -> None:
    for event in feed.take():
        if form in (Format.JSON, Format.JSONL):
            print(json.dumps({"fleet_event": event}, ensure_ascii=False, separators=(",", ":")))
        else:
            print(_event_line(event))
    if form in (Format.JSON, Format.JSONL):
        line = {"status": snapshot} if trouble is None else {"error": trouble}
        print(json.dumps(line, ensure_ascii=False, separators=(",", ":")))
    elif trouble is not None:
        print(clean(trouble), file=sys.stderr)
    sys.stdout.flush()


def _event_line(event: Mapping[str, Any]) -> str:
    at = time.strftime("%H:%M:%S", time.localtime(event.get("at_ms", 0) / 1000))
    return clean(f"{at} {event.get('kind')} {event.get('subject')}: {event.get('text')}")


class FleetFeed:
    """Reads `/v2/fleet/events` in a thread of its own and keeps the last few hundred; reconnects with its cursor."""

    def __init__(self, api: Api, *, pause_s: float = 1.0) -> None:
        self._api = api
        self._pause_s = pause_s
        self._events: deque[dict[str, Any]] = deque(maxlen=KEPT_EVENTS)
        self._untaken: deque[dict[str, Any]] = deque(maxlen=KEPT_EVENTS)
        self._cursor: str | None = None
        self._arrived = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read, name="fleet-feed", daemon=True)

    def start(self) -> None:
        """Begin reading."""
        self._thread.start()

    def stop(self) -> None:
        """Read no more; the thread ends with the process, since a blocked read can't be called back."""
        self._stopped.set()

    def wait(self, seconds: float) -> None:
        """Until an event has come, at most `seconds`; a burst of events doesn't make it shorter than LEAST_WAIT_S."""
        self._stopped.wait(LEAST_WAIT_S)
        if self._arrived.wait(max(0.0, seconds - LEAST_WAIT_S)):
            self._arrived.clear()

    def latest(self, count: int = SHOWN_EVENTS) -> list[dict[str, Any]]:
        """The newest events, the newest last."""
        return list(self._events)[-count:]

    def take(self) -> list[dict[str, Any]]:
        """Events that were not taken yet."""
        taken: list[dict[str, Any]] = []
        while self._untaken:
            taken.append(self._untaken.popleft())
        return taken

    def _read(self) -> None:
        while not self._stopped.is_set():
            try:
                with self._api.stream("/v2/fleet/events", after=self._cursor) as stream:
                    for frames in stream:
                        for frame in frames:
                            self._keep(frame)
            except ApiFailure as error:
                if error.status in (403, 404, 405):
                    return  # no feed for this key, or in this version: the screen lives without it
            except CliError:
                pass
            self._stopped.wait(self._pause_s)

    def _keep(self, frame: SseFrame) -> None:
        try:
            event = json.loads(frame.data)
        except ValueError:
            return
        self._cursor = frame.id or self._cursor
        self._events.append(event)
        self._untaken.append(event)
        self._arrived.set()
