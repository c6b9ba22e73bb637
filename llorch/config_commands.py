"""`llorch config show` and `llorch completion install|show`."""

from __future__ import annotations

from typing import Annotated

import typer

from llorch.config import SETTINGS, Settings
from llorch.errors import UsageProblem
from llorch.output import Column, JsonOption, OutputOption, chosen, emit

SHELLS = ("bash", "zsh", "fish", "powershell", "pwsh")

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True, help="Settings.")
completion_app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True, help="Completion.")


@app.callback()
def _config() -> None:  # pyright: ignore[reportUnusedFunction] - keeps `show` a subcommand
    """Show settings and where they come from."""


@app.command("show")
def show(
    origin: Annotated[bool, typer.Option("--origin", help="Say where each value comes from.")] = False,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show every setting's value. Secrets are shown as `(set)`."""
    settings = Settings()
    rows: list[dict[str, str | None]] = []
    for setting in SETTINGS:
        found = settings.get(setting.name)
        value = "(set)" if setting.secret and found.value else found.value
        row = {"setting": setting.name, "value": value, "environment": setting.env, "help": setting.help}
        if origin:
            row["origin"] = found.origin
        rows.append(row)
    columns = [Column("SETTING", "setting"), Column("VALUE", "value")]
    columns += (
        [Column("ORIGIN", "origin")] if origin else [Column("ENVIRONMENT", "environment"), Column("HELP", "help")]
    )
    emit(rows, columns, chosen(output, as_json))


Shell = Annotated[str | None, typer.Argument(metavar="[SHELL]", help="bash, zsh, fish, powershell or pwsh.")]


@completion_app.command("install")
def install(ctx: typer.Context, shell: Shell = None) -> None:
    """Install completion for this shell, or the one named."""
    from typer.completion import install_callback

    install_callback(ctx, ctx.command.params[0], _shell(shell))


@completion_app.command("show")
def show_completion(ctx: typer.Context, shell: Shell = None) -> None:
    """Print the completion script for this shell, or the one named."""
    from typer.completion import show_callback

    show_callback(ctx, ctx.command.params[0], _shell(shell))


def _shell(name: str | None) -> str:
    if name is None:
        import shellingham

        try:
            name = str(shellingham.detect_shell()[0])
        except shellingham.ShellDetectionFailure:
            raise UsageProblem("can't tell which shell this is", next_step="llorch completion show bash") from None
    if name not in SHELLS:
        raise UsageProblem(f"completion is for {', '.join(SHELLS)}", next_step="llorch completion -h")
    return name
