"""How results are shown: data on stdout in one of five formats, words on stderr. Read `emit` first.

    table   aligned columns, for people (the default on a terminal)
    tsv     the same columns, tab-separated, without a header (the default everywhere else)
    json    one document            jsonl   one object a line          name    the first column alone

Tables are never cut to the width of a terminal: an id that lost its second half is no id.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import IO, Annotated, Any, NamedTuple

import typer

from llorch.errors import UsageProblem


class Format(StrEnum):
    """The output formats."""

    TABLE = "table"
    JSON = "json"
    JSONL = "jsonl"
    TSV = "tsv"
    NAME = "name"


OutputOption = Annotated[
    Format | None,
    typer.Option(
        "--output",
        "-o",
        help="table, json, jsonl, tsv or name. Default: table, or tsv in a pipe.",
        metavar="FORMAT",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Short for -o json.")]

Row = Mapping[str, Any]


class Column(NamedTuple):
    """One column: `key` names the field of a row; `show` renders its value for people (tables and TSV)."""

    header: str
    key: str
    show: Callable[[Any], str] | None = None
    right: bool = False

    def cell(self, row: Row) -> str:
        """The value as text on one line, `-` where there is none."""
        value = row.get(self.key)
        if value is None or value == "":
            return "-"
        return clean(self.show(value) if self.show else str(value)) or "-"


def chosen(output: Format | None, as_json: bool, stream: IO[str] | None = None) -> Format:
    """The format to use: flags, then the `output` setting, then what stdout is."""
    if as_json:
        if output not in (None, Format.JSON, Format.JSONL):
            raise UsageProblem(f"--json and -o {output} exclude each other", next_step="leave one of them out")
        return output or Format.JSON
    if output is not None:
        return output
    from llorch.config import Settings

    setting = Settings().get("output")
    if setting.value is not None:
        try:
            return Format(setting.value)
        except ValueError:
            raise UsageProblem(
                f"`output` is {setting.value!r} in {setting.origin}; it must be table, json, jsonl, tsv or name",
                next_step="llorch config show --origin",
            ) from None
    return Format.TABLE if (stream or sys.stdout).isatty() else Format.TSV


def emit(rows: Sequence[Row], columns: Sequence[Column], form: Format, stream: IO[str] | None = None) -> None:
    """Print rows. JSON formats hold the rows as they are; the others hold `columns`."""
    out = stream or sys.stdout
    if form is Format.JSON:
        print(json.dumps(list(rows), ensure_ascii=False, indent=2), file=out)
    elif form is Format.JSONL:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False, separators=(",", ":")), file=out)
    elif form is Format.NAME:
        for row in rows:
            print(columns[0].cell(row), file=out)
    elif form is Format.TSV:
        for row in rows:
            print("\t".join(column.cell(row) for column in columns), file=out)
    else:
        for line in table(rows, columns, color=use_color(out)):
            print(line, file=out)


def emit_record(record: Row, form: Format, stream: IO[str] | None = None) -> None:
    """Print one object: JSON as it is, otherwise one `key<TAB>value` line a field (aligned on a terminal)."""
    out = stream or sys.stdout
    if form in (Format.JSON, Format.JSONL):
        print(json.dumps(record, ensure_ascii=False, indent=2 if form is Format.JSON else None), file=out)
        return
    if form is Format.NAME:
        print(clean(str(next(iter(record.values()), "-"))), file=out)
        return
    width = max((len(key) for key in record), default=0)
    for key, value in record.items():
        shown = "-" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        print(f"{key:<{width}}  {clean(shown)}" if form is Format.TABLE else f"{key}\t{clean(shown)}", file=out)


def table(rows: Iterable[Row], columns: Sequence[Column], *, color: bool = False) -> list[str]:
    """Aligned lines with a header, no borders."""
    cells = [[column.cell(row) for column in columns] for row in rows]
    widths = [max([len(column.header), *(len(line[at]) for line in cells)]) for at, column in enumerate(columns)]

    def aligned(texts: Sequence[str]) -> str:
        parts = [
            text.rjust(width) if column.right else text.ljust(width)
            for text, width, column in zip(texts, widths, columns, strict=True)
        ]
        return "  ".join(parts).rstrip()

    header = aligned([column.header for column in columns])
    return [f"\x1b[1m{header}\x1b[0m" if color else header, *(aligned(line) for line in cells)]


def say(text: str) -> None:
    """Words for people, on stderr."""
    print(clean(text, keep_newlines=True), file=sys.stderr, flush=True)


def clean(text: str, *, keep_newlines: bool = False) -> str:
    r"""Text that can't move the cursor or break a line: control characters become `\n`, `\t`, `\x1b`."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or (keep_newlines and char == "\n") else char.encode("unicode_escape").decode()
        for char in text
    )


def use_color(stream: IO[str]) -> bool:
    """Whether to colour: a terminal, and neither NO_COLOR (https://no-color.org) nor TERM=dumb is set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def duration(ms: float | None) -> str:
    """Milliseconds for people: `80 ms`, `4.2 s`, `3 min 5 s`, `2 h 10 min`, `3 d 4 h`."""
    if ms is None:
        return "-"
    if ms < 1000:
        return f"{ms:.0f} ms"
    seconds = ms / 1000
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def yes_if(flag: bool) -> str:
    """`yes`, or the empty text that a column shows as `-`."""
    return "yes" if flag else ""


def size(count: float | None) -> str:
    """Bytes for people, in binary units."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
