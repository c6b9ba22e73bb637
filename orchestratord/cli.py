"""The command `orchestratord`. Read `main` first.

`orchestratord [flags]` runs the daemon; `orchestratord redis --data-dir DIR` runs the embedded Redis alone, in the
foreground. Every setting but the keys has a flag; keys come from the environment or a file, since anybody on the
machine can read a command line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 stopped as asked, 1 failed, 2 a wrong flag or setting."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--version" in given:
        from importlib.metadata import version

        print(f"orchestratord {version('llorch')}")  # noqa: T201 - its answer
        return 0
    if given[:1] == ["redis"]:
        return _redis(given[1:])
    return _serve(given)


def _serve(given: list[str]) -> int:
    from llorch_wire.errors import LlorchError
    from llorch_wire.layers import SettingsError
    from orchestratord.settings import load

    flags = vars(_parser().parse_args(given))
    try:
        settings = load(flags)
        from orchestratord.logging import configure

        configure(settings.log_level, settings.log_format)
        return _run_loop(settings)
    except SettingsError as error:
        return _complain(error, 2)
    except LlorchError as error:
        return _complain(error, 1)


def _run_loop(settings: Any) -> int:
    import asyncio

    import uvloop

    from orchestratord.app import serve

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve(settings))


def _redis(given: list[str]) -> int:
    from llorch_wire.errors import LlorchError
    from llorch_wire.layers import SettingsError
    from orchestratord.embedded_redis import run_foreground
    from orchestratord.logging import configure
    from orchestratord.settings import load

    parser = argparse.ArgumentParser(
        prog="orchestratord redis", description="Run the embedded Redis in the foreground, durable, on a unix socket."
    )
    _add_setting(parser, "data_dir")
    _add_setting(parser, "redis_memory_mb")
    _add_setting(parser, "ready_file")
    _add_setting(parser, "log_level")
    _add_setting(parser, "log_format")
    try:
        settings = load(vars(parser.parse_args(given)), serves=False)
        configure(settings.log_level, settings.log_format)
        return run_foreground(settings.data_dir, ready_file=settings.ready_file, max_memory=settings.redis_memory_bytes)
    except SettingsError as error:
        return _complain(error, 2)
    except LlorchError as error:
        return _complain(error, 1)


def _complain(error: Exception, status: int) -> int:
    sys.stderr.write(f"orchestratord: {error}\n")
    return status


def _parser() -> argparse.ArgumentParser:
    from orchestratord.settings import SECRET, Settings

    parser = argparse.ArgumentParser(
        prog="orchestratord",
        description="Take tasks over HTTP, keep them in Redis, run them on workers.",
        epilog="Every setting is also read from LLORCH_<NAME>, ./llorch.toml and $XDG_CONFIG_HOME/llorch/config.toml. "
        "Keys: LLORCH_API_KEYS='tenant[:weight]=key,…' and LLORCH_WORKER_KEY. "
        "`orchestratord redis --data-dir DIR` runs the embedded Redis alone.",
        allow_abbrev=False,
    )
    for name in Settings.model_fields:
        if name not in SECRET or name.endswith("redis_url"):
            _add_setting(parser, name)
    return parser


def _add_setting(parser: argparse.ArgumentParser, name: str) -> None:
    from orchestratord.settings import Settings

    field = Settings.model_fields[name]
    flag = "--" + name.replace("_", "-")
    text = (field.description or "").replace("%", "%%")
    if field.annotation is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        return
    default = "" if field.default_factory is not None or field.default is None else f" (default {field.default})"
    parser.add_argument(flag, default=None, metavar=name.rsplit("_", 1)[-1].upper(), help=text + default)


if __name__ == "__main__":
    sys.exit(main())
