"""Entry point of `llorch`: runs a command and prints its failure. Read `main` first; commands are in command_tree."""

from __future__ import annotations

import os
import sys

try:
    import gc
    from collections.abc import Generator, Sequence
    from contextlib import contextmanager, suppress
    from io import TextIOWrapper
    from typing import TYPE_CHECKING, NoReturn

    from llorch.errors import CliError, ExitCode, UsageProblem
except KeyboardInterrupt:  # Ctrl-C before `main`, which would say it the same way
    os._exit(130)

if TYPE_CHECKING:
    import typer


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. Every failure is printed here, with its next command.

    Without `argv` this is the whole program: it takes the process's arguments, and ends the process.
    """
    if argv is None:
        # A command imports much, and what it imports stays: looking for garbage meanwhile costs 5 % of its start.
        gc.set_threshold(50_000)
        try:
            code = main(sys.argv[1:])
        except KeyboardInterrupt:  # while it was about to end
            code = ExitCode.INTERRUPTED
        _leave(code)
    try:
        _prepare_streams()
        _check_encoding(argv)
        with _head_start(argv):
            return _run(list(argv))
    except CliError as error:
        return _fail(error.message, error.next_step, error.exit_code)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe has left, as `head` does; Python would complain again while it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILED
    except OSError as error:
        where = error.filename or "what was to be written or read"
        return _fail(f"{where}: {error.strerror or error}", "check its permissions and the free space", ExitCode.FAILED)


def _prepare_streams() -> None:
    """A program may be started with its streams closed: what is written to them is lost then, and that is all."""
    # In this order: each takes the lowest number that is free, its own.
    sys.stdin = sys.stdin or os.fdopen(os.open(os.devnull, os.O_RDONLY))
    sys.stdout = sys.stdout or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    sys.stderr = sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character must not end a stream


def _check_encoding(arguments: Sequence[str]) -> None:
    """Refuse arguments that aren't UTF-8, which Python hands on as lone surrogates. Raises UsageProblem.

    `run` looks at its prompt itself; of what else is typed there only the option is named: it may be private.
    """
    for before, item in zip(("", *arguments), arguments, strict=False):
        if item.isascii() or not any("\ud800" <= char <= "\udfff" for char in item):
            continue
        shown = "".join(f"\\x{ord(char) - 0xDC00:02x}" if "\udc80" <= char <= "\udcff" else char for char in item)
        what = f"the argument '{shown}'"
        if arguments[0] == "run":
            option = item.partition("=")[0] if item.startswith("--") else before if before.startswith("-") else ""
            if option in ("", "-", "--", "--system"):
                continue
            what = f"what follows {option}"
        raise UsageProblem(f"{what} is not valid UTF-8", next_step="check the terminal's encoding (locale)")


@contextmanager
def _head_start(arguments: Sequence[str]) -> Generator[None]:
    """Within, a pool that the arguments name may be starting its llorch-pool already: see llorch.fleet.head_start."""
    if len(arguments) < 4 or arguments[0].removesuffix("s") not in ("worker", "model", "pool"):
        yield
        return
    from llorch.fleet.head_start import begun

    with begun(arguments):
        # From here on the pool is loading too: what else this program needs costs no time.
        from llorch_wire.quick_start import import_msgspec

        import_msgspec()
        yield


def _run(arguments: list[str]) -> int:
    if arguments in (["--version"], ["-V"]):
        from importlib.metadata import version

        print(f"llorch {version('llorch')}", flush=True)
        return ExitCode.OK
    import typer

    from llorch.command_tree import LazyGroup

    if "_LLORCH_COMPLETE" in os.environ:
        from typer.main import get_install_completion_arguments

        get_install_completion_arguments()  # registers the shells
    try:
        result = LazyGroup().main(arguments, prog_name="llorch", standalone_mode=False)
        sys.stdout.flush()
    except typer.TyperException as error:
        return _fail_usage(error)
    except typer.Abort:
        return _fail("stopped at a question", "answer it, or give -y", ExitCode.FAILED)
    return result if isinstance(result, int) else ExitCode.OK


def _leave(code: int) -> NoReturn:
    """End the process without taking its modules down one by one, which takes 12 ms."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads any more
            stream.flush()
    os._exit(code)


def _fail_usage(error: typer.TyperException) -> int:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "llorch"
    message = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":
        print(message, file=sys.stderr)
        return ExitCode.USAGE
    return _fail(message[:1].lower() + message[1:].rstrip("."), f"{path} --help", error.exit_code)


def _fail(message: str, next_step: str, code: int) -> int:
    from llorch.output import say, use_color

    mark = "\x1b[31merror:\x1b[0m" if use_color(sys.stderr) else "error:"
    print(f"{mark} ", end="", file=sys.stderr)
    say(message)
    say(f"next:  {next_step}")
    return code
