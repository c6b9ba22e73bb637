"""Decimal options: nan and inf pass typer's own limits."""

from __future__ import annotations

import pytest

from llorch import cli


@pytest.mark.parametrize(
    "command",
    [
        "worker list -p a --timeout nan",
        "model list -p a --timeout inf",
        "status --interval nan",
        "task watch x --timeout nan",
    ],
)
def test_what_is_no_number_of_seconds(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command.split()) == 2
    said = capsys.readouterr().err
    assert "is not a finite number" in said or "is not in the range" in said
