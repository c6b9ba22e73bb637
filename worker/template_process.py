"""The process that renders chat templates: a template that loops or eats memory takes down this and nothing else.

    stdin   {"template": …, "variables": {…}}, then one {"messages": […]} a line
    stdout  {"text": …} or {"error": …} a line, the first one for the template itself

Read `main`. Time is bounded by a CPU timer whose signal kills the process, memory by RLIMIT_AS.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import BinaryIO

from worker.chat_template import ChatTemplate, ChatTemplateError

CPU_LIMIT_S = 2.0
MEMORY_LIMIT_BYTES = 1024 * 2**20


def main() -> None:
    """Answer requests from stdin until it ends."""
    _limit_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is the parent's business
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    first = json.loads(requests.readline())
    try:
        with _cpu_limit():  # compiling folds constants, however large
            template = ChatTemplate(first["template"], first["variables"])
    except ChatTemplateError as error:
        _answer(answers, {"error": str(error)})
        return
    _answer(answers, {"text": ""})
    while line := requests.readline():
        try:
            with _cpu_limit():
                reply = {"text": template.render(json.loads(line)["messages"])}
        except ChatTemplateError as error:
            reply = {"error": str(error)}
        _answer(answers, reply)


@contextmanager
def _cpu_limit() -> Generator[None]:
    """Two seconds of CPU time for the body. The timer's signal, SIGVTALRM, ends the process by default."""
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _answer(answers: BinaryIO, reply: dict[str, str]) -> None:
    answers.write(json.dumps(reply).encode() + b"\n")
    answers.flush()


def _limit_memory() -> None:
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ValueError, OSError):  # macOS refuses RLIMIT_AS; the time limit remains
        pass


if __name__ == "__main__":
    main()
