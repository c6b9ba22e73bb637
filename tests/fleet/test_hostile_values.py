"""Arguments with spaces, quotes, `$()` and newlines reach llorch-pool byte for byte: none is spliced into a shell."""

from __future__ import annotations

import json

import pytest

from tests.support.sshd import Machine, Operator

pytestmark = pytest.mark.e2e

HOSTILE = [
    "a b", "  lead", "trail  ", "'", '"', "''\"\"", "$(touch owned)", "`touch owned`", "a\nb", "a\\nb", "\\",
    "; touch owned", "&& touch owned", "| tee owned", "> owned", "*", "~", "$HOME", "${PATH}", "%s%n%%", "\t",
    "ünïcødé ☃ 𝄞", "\x1b[31mred", "a\rb", "{a,b}", "!!", "#x", "--help", "-o ProxyCommand=touch owned", "x" * 20_000,
]  # fmt: skip


def test_hostile_arguments_arrive_as_they_were_typed(op: Operator, machine: Machine) -> None:
    """An echo in place of llorch-pool gives back the request that came; the name in it must be the one sent."""
    echo = machine.home / "echo-pool"
    echo.write_text(
        "#!/bin/sh\n"
        'echo \'{"event":"hello","version":"0.1.0","protocol":1,"host":"h","pid":1}\'\n'
        "read -r line\n"
        'printf \'%s\\n\' "$line" >> "$HOME/requests"\n'
        'echo \'{"event":"result","value":{"name":"x","ok":true,"bytes":0}}\'\n'
        'echo \'{"event":"end","rc":0}\'\n'
    )
    echo.chmod(0o755)
    op.llorch("pool", "add", "echo", machine.address, "-y", "--command", str(echo), check=None)
    (machine.home / "requests").unlink(missing_ok=True)
    for value in HOSTILE:
        op.llorch("model", "verify", "-p", "echo", "--", value)
    came = [json.loads(line)["command"]["name"] for line in (machine.home / "requests").read_text().splitlines()]
    assert came == HOSTILE
    assert not [path for path in (machine.home, op.folder) if (path / "owned").exists()]


def test_a_hostile_command_path_stays_one_word(op: Operator, machine: Machine) -> None:
    folder = machine.home / 'it\'s $(a) "folder"'
    folder.mkdir()
    program = folder / "llorch pool"
    program.symlink_to(next(path for path in op.environ["PATH"].split(":") if "venv" in path) + "/llorch-pool")
    op.llorch("pool", "add", "quoted", machine.address, "-y", "--command", str(program))
    assert op.llorch("worker", "list", "-p", "quoted", "--json").stdout.strip() == "[]"
