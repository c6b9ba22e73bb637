"""Where things are on a pool machine. The host's name stands in the state path, because homes may be on NFS.

$XDG_STATE_HOME/llorch/<hostname>/workers/<id>.json    registry entry      <id>.log[.1-10]   its log
                                         /<id>.env     key, 0600           <id>.ready        port file
                                         /spawn.lock   held while a device is chosen
$LLORCH_MODELS | $XDG_DATA_HOME/llorch/models/<name>/  files, model.json   .partial/<name>/  downloads under way
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from llorch_pool.errors import usage_error

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_name(name: str, what: str, flag: str) -> str:
    """`name` if it is safe as a file name and in a URL; otherwise a usage error that names the flag."""
    if not _NAME.fullmatch(name):
        raise usage_error(
            f"{name!r} can't be the name of a {what}",
            f"Give {flag} 1 to 128 letters, digits, dots, dashes or underscores, the first a letter or digit.",
        )
    return name


def _home(environ: Mapping[str, str], variable: str, default: str) -> Path:
    value = environ.get(variable, "")
    # The XDG base directory specification says that relative paths are to be ignored.
    return Path(value) if value.startswith("/") else Path(environ.get("HOME") or str(Path.home())) / default


class Paths(NamedTuple):
    """Folders of one machine and user. Nothing is created here."""

    state: Path
    models: Path
    config: Path

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], hostname: str | None = None) -> Paths:
        """Folders as the environment says; `hostname` defaults to this machine's."""
        host = re.sub(r"[^A-Za-z0-9._-]", "_", hostname or environ.get("LLORCH_HOSTNAME") or os.uname().nodename)
        state = _home(environ, "XDG_STATE_HOME", ".local/state") / "llorch" / (host.lstrip(".") or "localhost")
        models = environ.get("LLORCH_MODELS", "")
        return cls(
            state=state,
            models=Path(models)
            if models.startswith("/")
            else _home(environ, "XDG_DATA_HOME", ".local/share") / "llorch" / "models",
            config=_home(environ, "XDG_CONFIG_HOME", ".config") / "llorch",
        )

    @property
    def workers(self) -> Path:
        """Registry entries, logs and key files of workers."""
        return self.state / "workers"

    @property
    def partial(self) -> Path:
        """Downloads under way: on the same file system as the models, so that a finished one is a rename."""
        return self.models / ".partial"


def python() -> str:
    """This installation's Python. Not by way of `current`, which moves on: a bootstrap keeps what processes name."""
    executable = Path(sys.executable)
    return str(executable.parent.resolve() / executable.name)


def python_at_boot() -> str:
    """This installation's Python by the path that an upgrade leaves in place, where there is one (`current`)."""
    executable = Path(python())
    base = executable.parent.parent.parent.parent  # <base>/venvs/<version>/bin/python
    current = base / "current" / "bin" / executable.name
    return str(current) if current.exists() and current.parent.resolve() == executable.parent else str(executable)


def make_private(folder: Path) -> Path:
    """Create `folder` with mode 0700 (parents as the umask says) and return it."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid == os.getuid():
        folder.chmod(0o700)
    return folder
