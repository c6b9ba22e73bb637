"""Write docs/cli.md from `llorch --help` and the help of every command below it; `--check` only compares.

The helps are taken from the command tree itself, in this process, at a fixed width, so that the page is the same on
every machine.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "cli.md"
WIDTH = "100"

INTRODUCTION = """\
# The command line

Generated from `--help` by `tools/generate_cli_docs.py`; `make docs-check` fails when it is stale.

Data goes to stdout, words go to stderr. Every error ends with a line `next:` that says what to type.

| | |
|---|---|
| output | `-o table\\|json\\|jsonl\\|tsv\\|name`, `--json`; a table on a terminal, TSV without a header in a pipe |
| settings | flag > `LLORCH_*` > `./llorch.toml` > `$XDG_CONFIG_HOME/llorch/config.toml` > default |
| which one counts | `llorch config show --origin` |
| address | `--url` or `LLORCH_URL`; default `http://127.0.0.1:8080` |
| key | `LLORCH_API_KEY`; it has no flag, since a command line is public |
| colours | on a terminal, unless `NO_COLOR` is set |
| completion | `llorch completion install` |

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | failed |
| 2 | what was typed, or a setting, can't work |
| 3 | a part of a fleet failed, the rest is done |
| 4 | a key or a host key was not accepted |
| 5 | nobody could be reached |
| 124 | the time given was over |
| 130 | Ctrl-C |
"""


def page() -> str:
    """The whole page."""
    sys.path.insert(0, str(ROOT))
    os.environ["COLUMNS"] = WIDTH
    import typer

    from llorch.command_tree import LazyGroup

    sections: list[str] = [INTRODUCTION]

    def walk(command: Any, name: str, parent: Any) -> None:
        context = typer.Context(command, info_name=name, parent=parent, **command.context_settings)
        path = context.command_path
        level = "##" if parent is None or parent.parent is None else "###"
        text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines()).strip()
        sections.append(f"{level} `{path}`\n\n```text\n{text}\n```\n")
        for child in command.list_commands(context) if hasattr(command, "list_commands") else ():
            found = command.get_command(context, child)
            if found is not None and not found.hidden:
                walk(found, child, context)

    walk(LazyGroup(), "llorch", None)
    return "\n".join(sections)


def main() -> int:
    """Write the page, or with --check say whether it is what it would be."""
    wanted = page()
    if "--check" in sys.argv[1:]:
        if PAGE.exists() and PAGE.read_text(encoding="utf-8") == wanted:
            return 0
        print("docs/cli.md is stale: run .venv/bin/python tools/generate_cli_docs.py")
        return 1
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
