from __future__ import annotations

import json
import os
from pathlib import Path

from llorch.up.logs import KEPT_FILES, Highlights, LogFile, plain


def write(log: LogFile, text: str) -> None:
    with log.open_for_child() as descriptor:
        os.write(descriptor, text.encode())


def test_only_whole_new_lines_are_given(tmp_path: Path) -> None:
    write(LogFile(tmp_path / "a.log"), "of an earlier life\n")
    log = LogFile(tmp_path / "a.log")
    write(log, "one\ntw")
    assert log.new_lines() == ["one"]
    write(log, "o\nthree\n")
    assert log.new_lines() == ["two", "three"]
    assert log.new_lines() == []
    assert (tmp_path / "a.log").stat().st_mode & 0o777 == 0o600


def test_rotation_keeps_every_line_and_a_bound(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "a.log", max_bytes=100)
    with log.open_for_child() as child:  # the child's own descriptor, open all the time
        for number in range(60):
            os.write(child, f"line {number:02}\n".encode())
            log.rotate()
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["a.log", "a.log.1", "a.log.2", "a.log.3"][: KEPT_FILES + 1]
    kept = "".join(file.read_text() for file in (*reversed(files[1:]), files[0])).splitlines()
    assert kept == [f"line {number:02}" for number in range(60 - len(kept), 60)]
    assert len(kept) >= 40


def test_a_missing_file_has_no_lines(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "none.log")
    assert (log.new_lines(), log.tail(), log.rotate()) == ([], [], False)


def test_the_tail_is_readable(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "a.log")
    write(log, "\n".join(["x"] * 20 + [json.dumps({"level": "error", "event": "boom", "code": 3})]) + "\n")
    assert log.tail(2) == ["x", "boom code=3"]
    write(log, "of the next child\n")
    assert log.tail() == ["of the next child"]


def test_warnings_are_shown_once_in_a_while() -> None:
    now = [0.0]
    highlights = Highlights(clock=lambda: now[0])
    lines = [json.dumps({"level": level, "event": "x", "n": 1}) for level in ("info", "warning", "error", "debug")]
    assert highlights.choose("w", ["plain", "{broken", *lines]) == ["x n=1"]
    assert highlights.choose("w", lines) == []
    assert highlights.choose("other", lines) == ["x n=1"]
    now[0] = 31
    assert highlights.choose("w", lines) == ["x n=1"]


def test_long_and_odd_lines() -> None:
    assert len(plain("x" * 10_000)) == 400
    assert plain(json.dumps({"event": "e", "stack": ["a"], "nested": {"a": 1}, "ok": True})) == "e ok=True"
