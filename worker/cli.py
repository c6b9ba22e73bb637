"""`llorch-worker`: flags to settings, settings to a running worker. `llorch-worker bench …` measures instead.

Read `main` first.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from typing import Literal, get_args, get_origin

from llorch_wire.layers import SettingsError, flag_name
from worker.settings import NO_FLAG, Settings, load

USAGE_EXIT, FAILED_EXIT = 2, 1


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script; exits with 0, 1 (failed) or 2 (wrong usage or settings)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["bench"]:
        from worker.bench import main as bench

        sys.exit(bench(arguments[1:]))
    given = vars(build_parser().parse_args(arguments))
    try:
        settings = load({name: value for name, value in given.items() if value is not None})
    except SettingsError as error:
        sys.stderr.write(f"llorch-worker: {error}\n")
        sys.exit(USAGE_EXIT)
    sys.exit(serve(settings))


def build_parser() -> argparse.ArgumentParser:
    """One flag for each setting that has one. Values are checked by `settings.load`, which knows all sources."""
    parser = argparse.ArgumentParser(
        prog="llorch-worker",
        description="Serves one model on this machine, to orchestratord or by itself.",
        epilog="`llorch-worker bench --help` measures an engine. LLORCH_WORKER_KEY is the key that orchestratord "
        "sends; it has no flag, since a command line is public.",
        argument_default=argparse.SUPPRESS,
    )
    for name, info in Settings.model_fields.items():
        if name in NO_FLAG:
            continue
        help_text = (info.description or "").replace("%", "%%")
        if info.default not in (None, (), False) and not info.is_required():
            help_text += f" (default: {info.default})"
        if info.annotation is bool:
            parser.add_argument(flag_name(name), action=argparse.BooleanOptionalAction, help=help_text)
        elif get_origin(info.annotation) is Literal:
            parser.add_argument(flag_name(name), choices=get_args(info.annotation), help=help_text)
        else:
            parser.add_argument(flag_name(name), metavar=name.rpartition("_")[2].upper(), help=help_text)
    return parser


def serve(settings: Settings) -> int:
    """Run a worker until it is told to stop; its exit status."""
    import uvloop

    from worker.http_server import listen
    from worker.logs import configure
    from worker.model_files import ModelFilesError, resolve
    from worker.tokenizer import ModelTokenizer

    configure(settings.log_level, settings.log_format)
    try:
        folder = resolve(settings.model, settings.model_name)
        tokenizer = ModelTokenizer.load(folder.path)
        if settings.ready_file is not None:
            settings.ready_file.unlink(missing_ok=True)
        sock = listen(settings)
    except ModelFilesError as error:
        sys.stderr.write(f"llorch-worker: {error}\n")
        return FAILED_EXIT
    except OSError as error:
        sys.stderr.write(f"llorch-worker: can't listen on {settings.host}:{settings.port}: {error.strerror}\n")
        return FAILED_EXIT

    async def run() -> int:
        from worker.runtime import Worker

        worker = Worker(settings, folder, tokenizer, sock)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, worker.stop)
        sys.stderr.write(f"llorch-worker {worker.worker_id}: {folder.name} at {worker.url}, loading\n")
        return await worker.run()

    with sock, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())
