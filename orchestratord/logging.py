"""Log lines: JSON or console, on stderr, each with the correlation id of the request it belongs to.

Read `configure` first. Libraries' own loggers (uvicorn, asyncio) go through the same renderer. Bodies, prompts, keys
and query strings are never logged; an unexpected exception is logged by its type and its stack, without its message,
which might quote one.
"""

from __future__ import annotations

import logging
import sys
import traceback
from typing import Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger


def configure(level: str, form: Literal["auto", "json", "console"], stream: TextIO | None = None) -> None:
    """Set up structlog and the standard library's root logger. Called once by the program, never at import."""
    target: TextIO | None = stream or sys.stderr
    is_terminal = target is not None and target.isatty()
    as_json = form == "json" or (form == "auto" and not is_terminal)
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _quiet_exceptions,
    ]
    renderer: Processor = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(colors=is_terminal, pad_event_to=0)
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
    )
    handler = logging.StreamHandler(target)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("uvicorn.error", "sse_starlette", "arq", "aiohttp", "asyncio"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(root.level),
        cache_logger_on_first_use=False,
    )


def describe_exception(error: BaseException) -> dict[str, object]:
    """Type and stack of an exception, innermost frame last, without messages and values."""
    frames = traceback.extract_tb(error.__traceback__)[-12:]
    described: dict[str, object] = {
        "error_type": f"{type(error).__module__}.{type(error).__qualname__}",
        "error_frames": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
    }
    if isinstance(error, BaseExceptionGroup):
        described["errors"] = [describe_exception(inner) for inner in error.exceptions[:4]]
    elif error.__cause__ is not None:
        described["error_cause"] = describe_exception(error.__cause__)
    return described


def _quiet_exceptions(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Replace `exc_info` by a description that can't quote what a client sent."""
    info = event.pop("exc_info", None)
    record = event.get("_record")
    if info is None and isinstance(record, logging.LogRecord):
        info, record.exc_info, record.exc_text = record.exc_info, None, None
    error: object = info
    if info is True:
        error = sys.exc_info()[1]
    elif isinstance(info, tuple):
        error = info[1]
    if isinstance(error, BaseException):
        event.update(describe_exception(error))
    return event
