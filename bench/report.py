"""Writes a benchmark's result into its own section of docs/benchmarks.md, with commit and hardware, and as JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"


def where() -> str:
    """Commit, processor, date and how busy the machine was, in one line."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=PAGE.parent)
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, commit {commit.stdout.strip()}, {os.cpu_count()} cores of {model}, "
        f"Python {platform.python_version()}, load average {os.getloadavg()[1]:.0f}"
    )


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_section(name: str, body: str) -> None:
    """Replace what stands between this benchmark's markers, or append it."""
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else "# Benchmarks\n"
    section = f"{begin}\n{body.strip()}\n{end}"
    if begin in page:
        before, rest = page.split(begin, 1)
        page = before + section + rest.split(end, 1)[1]
    else:
        page = page.rstrip() + "\n\n" + section + "\n"
    PAGE.write_text(page, encoding="utf-8")


def last_line(result: dict[str, Any]) -> None:
    """The machine-readable result, as the last line of the output."""
    print(json.dumps(result, sort_keys=True))
