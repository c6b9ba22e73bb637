"""What `llorch up` says: words on stderr, or with --json one event a line on stdout.

A line that changes (progress) is drawn in place on a terminal, and elsewhere printed when it says something new, not
more than every two seconds.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llorch.output import clean

PROGRESS_EVERY_S = 2.0


class Reporter:
    """Says things. `say` for what happened, `progress` for what goes on."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._in_place = sys.stderr.isatty() and not as_json
        self._drawn = ""
        self._printed_at = 0.0

    def say(self, event: str, text: str, **fields: Any) -> None:
        """Something happened: `text` for people, `event` and `fields` for programs."""
        if self._as_json:
            line = {"event": event, "at_ms": int(time.time() * 1000), **fields}
            print(json.dumps(line, ensure_ascii=False, separators=(",", ":")), flush=True)
            return
        self._erase()
        print(clean(text, keep_newlines=True), file=sys.stderr, flush=True)

    def progress(self, states: Mapping[str, str]) -> None:
        """Where each part stands."""
        text = clean(" · ".join(f"{name}: {state}" for name, state in states.items()))
        if text == self._drawn or self._as_json:
            return
        if self._in_place:
            sys.stderr.write(f"\r\x1b[K{text[: _columns() - 1]}")
            sys.stderr.flush()
            self._drawn = text
        elif time.monotonic() - self._printed_at >= PROGRESS_EVERY_S:
            self._printed_at = time.monotonic()
            self._drawn = text
            print(text, file=sys.stderr, flush=True)

    def _erase(self) -> None:
        if self._in_place and self._drawn:
            sys.stderr.write("\r\x1b[K")
        self._drawn = ""


def _columns() -> int:
    import shutil

    return shutil.get_terminal_size().columns


class Summary(NamedTuple):
    """What stands at the end of a start."""

    url: str
    model: str
    workers: int
    data_dir: Path
    key_file: Path | None
    needs_key: bool
    network_url: str | None
    """Where other machines reach it, if they can."""


def announcement(summary: Summary) -> str:
    """The lines that say what runs and how to use it."""
    url, model = summary.url, clean(summary.model)
    noun = "1 worker serves" if summary.workers == 1 else f"{summary.workers} workers serve"
    lines = [
        f"llorch is up: {noun} {model}",
        f"  API        {url}/v1 (OpenAI) and {url}/v2/tasks",
        f"  API docs   {url}/docs",
        f"  dashboard  {url}/",
        f"  data       {summary.data_dir}  (logs in {summary.data_dir / 'logs'})",
    ]
    if summary.network_url is not None:
        lines.append(f"  network    {summary.network_url}")
    if summary.key_file is not None:
        lines.append(f"  key        export LLORCH_API_KEY=$(cat {summary.key_file})")
    elif summary.needs_key:
        lines.append("  key        export LLORCH_API_KEY=...  (one of LLORCH_API_KEYS)")
    address = "" if url == "http://127.0.0.1:8080" else f" --url {url}"
    header = ' -H "Authorization: Bearer $LLORCH_API_KEY"' if summary.needs_key else ""
    key = 'os.environ["LLORCH_API_KEY"]' if summary.needs_key else '"unused"'
    messages = [{"role": "user", "content": "Tell me a story."}]
    body = shlex.quote(json.dumps({"model": summary.model, "stream": True, "messages": messages}))
    lines += [
        "Try",
        f'  llorch run{address} "Tell me a story about a fox."',
        f"  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json'{header} -d {body}",
        f'  OpenAI(base_url="{url}/v1", api_key={key}).chat.completions.create(model="{model}", messages=[...])',
        "Ctrl-C stops everything; `llorch up` goes on where it stopped.",
    ]
    return "\n".join(lines)
