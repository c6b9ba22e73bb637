"""Machines with nothing on them but what every Linux machine has."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.fleet.conftest import NewMachine
from tests.support.sshd import Machine, Operator

TOOLS = "sh bash tar gzip head tail cat rm mv mkdir mktemp chmod uname getconf sed df awk kill env sleep id"


def bare_path(folder: Path, **programs: str) -> str:
    """A PATH that holds the tools of any Linux machine, and these programs (name: where it is)."""
    folder.mkdir(parents=True)
    found = {name: shutil.which(name) for name in TOOLS.split()}
    for name, path in {**found, **programs}.items():
        if path:
            (folder / name).symlink_to(path)
    return str(folder)


def add_bare(op: Operator, new_machine: NewMachine, name: str, environ: dict[str, str]) -> Machine:
    made = new_machine(name, environ=environ)
    added = op.llorch("pool", "add", name, made.address, "-y")
    assert f"llorch pool bootstrap {name}" in added.stderr
    return made
