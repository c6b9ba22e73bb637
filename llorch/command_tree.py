"""The command tree of `llorch`: a table of names, loaded one command at a time.

Read `COMMANDS` first. `llorch --help` and completion read the table alone; running a command imports the
module that holds it and nothing else, so that no command pays for another's imports (plumbum, rich, asyncio).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple, cast

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command


class Source(NamedTuple):
    """Where a command is: `module:attribute`, a function or a typer.Typer. `names`: only these of a group."""

    target: str
    names: Sequence[str] = ()


class Entry(NamedTuple):
    """One line of the table. Of several sources, the first one that has a subcommand provides it."""

    help: str
    sources: Sequence[Source]
    alias: str | None = None


# llorch.fleet reaches machines over SSH, every other module reaches orchestratord over HTTP.
COMMANDS: dict[str, Entry] = {
    "up": Entry("Run the whole stack on this machine, in the foreground.", (Source("llorch.up.command:up"),)),
    "run": Entry("Run a prompt and stream its text.", (Source("llorch.run:run"),)),
    "status": Entry("Show pools, devices, workers, queue and alerts.", (Source("llorch.status:status"),)),
    "task": Entry("List, show, watch and cancel tasks.", (Source("llorch.tasks:app"),), "tasks"),
    "queue": Entry("Show what waits.", (Source("llorch.queue:app"),), "queues"),
    "worker": Entry(
        "Spawn, list, drain and stop workers.",
        (
            Source("llorch.workers_http:app", ("drain", "undrain")),
            Source("llorch.fleet.worker_commands:worker_app"),
            Source("llorch.workers_http:app"),
        ),
        "workers",
    ),
    "model": Entry("Download, list and remove models.", (Source("llorch.fleet.model_commands:model_app"),), "models"),
    "pool": Entry("Add, bootstrap and check machines.", (Source("llorch.fleet.pool_commands:pool_app"),), "pools"),
    "doctor": Entry(
        "Compare what pools, orchestratord and Redis say.", (Source("llorch.fleet.doctor_command:doctor"),)
    ),
    "config": Entry("Show settings and where they come from.", (Source("llorch.config_commands:app"),)),
    "completion": Entry("Install or print shell completion.", (Source("llorch.config_commands:completion_app"),)),
}

_FLEET_PACKAGE = "llorch.fleet"
_CONTEXT = {"help_option_names": ["-h", "--help"]}


class LazyGroup(TyperGroup):
    """The root: names and one-line helps come from the table, a command's module is imported when it is asked for."""

    def __init__(self) -> None:
        placeholders = {name: TyperCommand(name, short_help=entry.help) for name, entry in COMMANDS.items()}
        super().__init__(
            name="llorch",
            commands=cast("Any", placeholders),
            callback=_root,
            params=[],
            context_settings=_CONTEXT,
            help="LLM inference on your own machines. `llorch COMMAND --help` says more.",
            epilog="Settings: flag > LLORCH_* environment > ./llorch.toml > ~/.config/llorch/config.toml",
            no_args_is_help=True,
            rich_markup_mode=None,
        )
        self._listing = False

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command, imported now; its placeholder while only names and helps are listed."""
        if self._listing:
            return self.commands.get(cmd_name)
        name = next((name for name, entry in COMMANDS.items() if cmd_name in (name, entry.alias)), None)
        return None if name is None else load(name)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """List commands without importing them."""
        with self._listed():
            super().format_commands(ctx, formatter)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """Complete names without importing commands."""
        with self._listed():
            return super().shell_complete(ctx, incomplete)

    @contextmanager
    def _listed(self) -> Generator[None]:
        self._listing = True
        try:
            yield
        finally:
            self._listing = False


class MergedGroup(TyperGroup):
    """A group whose subcommands come from several modules; one that isn't needed for a subcommand isn't imported."""

    def __init__(self, name: str, entry: Entry) -> None:
        super().__init__(
            name=name, help=entry.help, context_settings=_CONTEXT, no_args_is_help=True, rich_markup_mode=None
        )
        self._sources = entry.sources

    def list_commands(self, ctx: Any) -> list[str]:
        """Every name that any source has."""
        for source in self._sources:
            for name, command in _group(source).items():
                self.commands.setdefault(name, command)
        return list(self.commands)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The first source's command of that name."""
        for source in self._sources:
            if source.names and cmd_name not in source.names:
                continue
            if (command := _group(source).get(cmd_name)) is not None:
                return command
        return None


def load(name: str) -> Any:
    """The click command behind an entry of the table, None where its module isn't part of this installation."""
    entry = COMMANDS[name]
    if len(entry.sources) > 1:
        return MergedGroup(name, entry)
    found = _import(entry.sources[0])
    return None if found is None else _as_command(name, found)


def _group(source: Source) -> dict[str, Any]:
    found = _import(source)
    if found is None:
        return {}
    commands: dict[str, Any] = getattr(_as_command("", found), "commands", {})
    return {name: command for name, command in commands.items() if not source.names or name in source.names}


def _import(source: Source) -> Any:
    module, _, attribute = source.target.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        # Only the absence of the fleet package itself is forgiven; a module that it lacks is an error to be seen.
        if error.name is not None and (error.name == _FLEET_PACKAGE or error.name.startswith(_FLEET_PACKAGE + ".")):
            return None
        raise


def _as_command(name: str, found: typer.Typer | Callable[..., Any]) -> Any:
    """A click command of a Typer app or of a plain function."""
    if isinstance(found, typer.Typer):
        app = found
    else:
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(name, context_settings=_CONTEXT)(found)
    command = get_command(app)
    command.name = name
    return command


def _root() -> None:
    """The root does nothing by itself."""
