"""Settings of the command line and where each came from. Read `Settings.get` first.

    flag  >  LLORCH_* environment  >  ./llorch.toml  >  $XDG_CONFIG_HOME/llorch/config.toml  >  default

A setting's name is the same everywhere: `api_key` in a file is `LLORCH_API_KEY` in the environment. The files are
shared with the daemons, so keys that this program doesn't know are left to them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from llorch.errors import UsageProblem


class Setting(NamedTuple):
    """One setting: `default` None means unset. A secret's value is never shown."""

    name: str
    default: str | None
    help: str
    secret: bool = False

    @property
    def env(self) -> str:
        """The environment variable that sets it."""
        return f"LLORCH_{self.name.upper()}"


SETTINGS: tuple[Setting, ...] = (
    Setting("url", "http://127.0.0.1:8080", "orchestratord's address"),
    Setting("api_key", None, "the key sent to orchestratord", secret=True),
    Setting("model", None, "the model that `llorch run` asks for; default: the only one served"),
    Setting("timeout", "600", "seconds that `llorch run` goes on trying to reach orchestratord"),
    Setting("output", None, "table, json, jsonl, tsv or name; default: table on a terminal, tsv elsewhere"),
    Setting("data_dir", None, "where `llorch up` keeps its data; default: $XDG_DATA_HOME/llorch/up"),
    Setting("redis_url", None, "a Redis for `llorch up` to use instead of its own", secret=True),
    Setting("api_keys", None, "clients' keys that orchestratord accepts: tenant[:weight]=key,...", secret=True),
    Setting("worker_key", None, "the key between orchestratord and its workers", secret=True),
)

_BY_NAME = {setting.name: setting for setting in SETTINGS}


class Resolved(NamedTuple):
    """A setting's value and where it came from, in words."""

    setting: Setting
    value: str | None
    origin: str


class Settings:
    """Reads each source once, when first asked."""

    def __init__(self, environ: Mapping[str, str] | None = None, cwd: Path | None = None) -> None:
        self._environ = os.environ if environ is None else environ
        self._cwd = cwd
        self._files: list[tuple[Path, dict[str, Any]]] | None = None

    def get(self, name: str, flag: str | None = None, *, flag_name: str | None = None) -> Resolved:
        """The value that counts for `name`, `flag` being what was typed, if anything was.

        Raises UsageProblem for a settings file that can't be read or holds another type than text or a number.
        """
        setting = _BY_NAME[name]
        if flag is not None:
            return Resolved(setting, flag, f"flag {flag_name or '--' + name.replace('_', '-')}")
        if value := readable(self._environ, setting.env):
            return Resolved(setting, value, f"environment {setting.env}")
        for path, content in self.files():
            if name in content:
                return Resolved(setting, _as_text(content[name], name, path), str(path))
        return Resolved(setting, setting.default, "default")

    def value(self, name: str, flag: str | None = None) -> str:
        """As `get`, for a setting that always has a value."""
        found = self.get(name, flag).value
        if found is None:
            raise UsageProblem(f"`{name}` is not set", next_step=f"export {_BY_NAME[name].env}=...")
        return found

    def files(self) -> list[tuple[Path, dict[str, Any]]]:
        """The settings files that exist, the one that counts more first."""
        if self._files is None:
            paths = [config_home(self._environ) / "config.toml"]
            with suppress(FileNotFoundError):  # the current folder may have been removed
                paths.insert(0, (self._cwd or Path.cwd()) / "llorch.toml")
            self._files = [(path, _read_toml(path)) for path in paths if path.is_file()]
        return self._files


def readable(environ: Mapping[str, str], variable: str) -> str | None:
    """A variable's value. Raises UsageProblem, without the value, for one that isn't UTF-8."""
    value = environ.get(variable)
    if value and not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise UsageProblem(f"{variable} is not valid UTF-8", next_step=f"export {variable}=...")
    return value


def config_home(environ: Mapping[str, str]) -> Path:
    """`$XDG_CONFIG_HOME/llorch`, with the default of the XDG base directory specification."""
    return _xdg(environ, "XDG_CONFIG_HOME", ".config")


def data_home(environ: Mapping[str, str]) -> Path:
    """`$XDG_DATA_HOME/llorch`."""
    return _xdg(environ, "XDG_DATA_HOME", ".local/share")


def _xdg(environ: Mapping[str, str], variable: str, fallback: str) -> Path:
    base = environ.get(variable, "")
    # The specification has relative paths ignored.
    root = Path(base) if base.startswith("/") else Path(environ.get("HOME") or str(Path.home())) / fallback
    return root / "llorch"


def _read_toml(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageProblem(f"{path} can't be read: {error.strerror}", next_step=f"ls -l {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageProblem(f"{path} is not valid TOML: {error}", next_step="correct that line") from None


def _as_text(value: object, name: str, path: Path) -> str:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise UsageProblem(f"`{name}` in {path} must be text or a number", next_step=f'write {name} = "..." there')
