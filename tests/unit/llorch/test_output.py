from __future__ import annotations

import io
import json

import pytest

from llorch.errors import UsageProblem
from llorch.output import Column, Format, chosen, clean, duration, emit, emit_record, size, table

ROWS = [{"id": "0191-a", "n": 7, "extra": [1]}, {"id": "b\tc\x1b[2J", "n": None}]
COLUMNS = (Column("ID", "id"), Column("N", "n", right=True))


def emitted(form: Format) -> str:
    out = io.StringIO()
    emit(ROWS, COLUMNS, form, out)
    return out.getvalue()


def test_each_format() -> None:
    assert emitted(Format.TABLE) == "ID           N\n0191-a       7\nb\\tc\\x1b[2J  -\n"
    assert emitted(Format.TSV) == "0191-a\t7\nb\\tc\\x1b[2J\t-\n"
    assert emitted(Format.NAME) == "0191-a\nb\\tc\\x1b[2J\n"
    assert json.loads(emitted(Format.JSON)) == ROWS
    assert [json.loads(line) for line in emitted(Format.JSONL).splitlines()] == ROWS


def test_nothing_is_an_empty_list_or_no_line() -> None:
    for form, text in ((Format.JSON, "[]\n"), (Format.TSV, ""), (Format.JSONL, ""), (Format.TABLE, "ID  N\n")):
        out = io.StringIO()
        emit([], COLUMNS, form, out)
        assert out.getvalue() == text


def test_tables_are_never_cut() -> None:
    long = "x" * 500
    assert table([{"id": long, "n": 1}], COLUMNS)[1] == f"{long}  1"


def test_a_record() -> None:
    out = io.StringIO()
    emit_record({"task_id": "t", "usage": {"tokens_in": 1}, "text": "a\nb", "worker": None}, Format.TSV, out)
    assert out.getvalue() == 'task_id\tt\nusage\t{"tokens_in": 1}\ntext\ta\\nb\nworker\t-\n'


def test_format_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, pipe = io.StringIO(), io.StringIO()
    terminal.isatty = lambda: True
    assert chosen(None, False, terminal) is Format.TABLE
    assert chosen(None, False, pipe) is Format.TSV
    assert chosen(None, True, terminal) is Format.JSON
    assert chosen(Format.JSONL, True, terminal) is Format.JSONL
    with pytest.raises(UsageProblem):
        chosen(Format.TSV, True, terminal)
    monkeypatch.setenv("LLORCH_OUTPUT", "jsonl")
    assert chosen(None, False, terminal) is Format.JSONL
    assert chosen(Format.TABLE, False, pipe) is Format.TABLE
    monkeypatch.setenv("LLORCH_OUTPUT", "yaml")
    with pytest.raises(UsageProblem, match="environment LLORCH_OUTPUT"):
        chosen(None, False, terminal)


def test_clean_keeps_words_of_any_language() -> None:
    assert clean("wörld 日本") == "wörld 日本"
    assert clean("a\nb\x9b", keep_newlines=True) == "a\nb\\x9b"


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (None, "-"),
        (80, "80 ms"),
        (4210, "4.2 s"),
        (185_000, "3 min 5 s"),
        (7_800_000, "2 h 10 min"),
        (1e9, "11 d 13 h"),
    ],
)
def test_durations(ms: float | None, text: str) -> None:
    assert duration(ms) == text


def test_sizes() -> None:
    assert [size(None), size(0), size(1536), size(5 * 2**40)] == ["-", "0 B", "1.5 KiB", "5.0 TiB"]
