"""Log lines on stderr, JSON or console. Prompts, texts, token ids, keys and bodies are never logged.

Read `configure` first. An unexpected exception is logged by its type and stack, without its message, which might quote
what a client sent.
"""

from __future__ import annotations

import logging
import sys
import traceback
from typing import Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger


def configure(level: str, form: Literal["auto", "json", "console"], stream: TextIO | None = None) -> None:
    """Set up structlog and the standard library's root logger. The program calls it, nothing does at import."""
    output: TextIO = sys.stderr if stream is None else stream
    as_json = form == "json" or (form == "auto" and not output.isatty())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _without_messages,
    ]
    renderer: Processor = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(colors=output.isatty(), pad_event_to=0)
    )
    handler = logging.StreamHandler(output)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Their debug lines would hold the text of streams, their info lines one line a request.
    for library in ("uvicorn", "uvicorn.error", "uvicorn.access", "sse_starlette", "aiohttp", "asyncio"):
        logging.getLogger(library).setLevel(max(logging.WARNING, root.level))
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(root.level),
        cache_logger_on_first_use=False,
    )


def stack_of(error: BaseException) -> dict[str, object]:
    """Type and innermost frames of an exception, without messages and values."""
    frames = traceback.extract_tb(error.__traceback__)[-12:]
    found: dict[str, object] = {
        "exception": f"{type(error).__module__}.{type(error).__qualname__}",
        "stack": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
    }
    if isinstance(error, BaseExceptionGroup):
        found["exceptions"] = [stack_of(inner) for inner in error.exceptions[:4]]
    elif error.__cause__ is not None:
        found["cause"] = stack_of(error.__cause__)
    return found


def _without_messages(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    info = event.pop("exc_info", None)
    record = event.get("_record")
    if info is None and isinstance(record, logging.LogRecord):
        info, record.exc_info, record.exc_text = record.exc_info, None, None
    error: object = sys.exc_info()[1] if info is True else info[1] if isinstance(info, tuple) else info
    if isinstance(error, BaseException):
        event.update(stack_of(error))
    return event
