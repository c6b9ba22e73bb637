"""Where a daemon's settings come from: flag > environment > ./llorch.toml > $XDG_CONFIG_HOME/llorch/config.toml.

Read `Layers.merge`. What a setting may be is the daemon's own pydantic model; this only finds the values, remembers
where each one came from, and says so when one is wrong. A value is never quoted: it may be a key.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import ValidationError

from llorch_wire.errors import LlorchError

Layer: TypeAlias = dict[str, tuple[object, str]]
"""Name of a setting → its value, and in words where that came from."""


class SettingsError(LlorchError):
    """A setting is missing or wrong; the message names it, says where it came from and what to do."""


@dataclass(frozen=True, slots=True)
class Layers:
    """The sources of one program's settings."""

    fields: Collection[str]
    """Names of all settings."""
    table: str
    """The program's own table in a TOML file."""
    env_prefix: str
    """`max_len` is set by `<env_prefix>MAX_LEN`."""
    shared_env: Mapping[str, str] = field(default_factory=dict[str, str])
    """Variables that several programs read, by setting; the program's own variable counts more."""
    top_level: Mapping[str, str] = field(default_factory=dict[str, str])
    """Names at the top of a TOML file, outside any table, by setting; the table counts more."""

    def merge(self, flags: Mapping[str, object], environ: Mapping[str, str], cwd: Path) -> Layer:
        """The value that counts for each setting that has one. A flag that is None wasn't given.

        Raises SettingsError for a file that can't be read or has a setting that nobody knows.
        """
        merged: Layer = {}
        for layer in (*self._files(environ, cwd), self._environment(environ)):
            merged.update(layer)
        merged.update({name: (value, flag_name(name)) for name, value in flags.items() if value is not None})
        return merged

    def _environment(self, environ: Mapping[str, str]) -> Layer:
        found: Layer = {}
        for name in self.fields:
            for variable in (self.shared_env.get(name, ""), self.env_prefix + name.upper()):
                if environ.get(variable):  # an empty variable counts as unset
                    found[name] = (environ[variable], variable)
        return found

    def _files(self, environ: Mapping[str, str], cwd: Path) -> list[Layer]:
        """The configuration files that exist, weakest first."""
        home = environ.get("XDG_CONFIG_HOME") or str(Path(environ.get("HOME") or Path.home()) / ".config")
        layers: list[Layer] = []
        for path in (Path(home) / "llorch" / "config.toml", cwd / "llorch.toml"):
            try:
                document: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
                reason = error.strerror if isinstance(error, OSError) else "it is not valid TOML"
                raise SettingsError(f"{path}: can't be read: {reason}") from None
            layers.append(self._file(path, document))
        return layers

    def _file(self, path: Path, document: Mapping[str, Any]) -> Layer:
        layer: Layer = {
            name: (document[top], f"{path}: {top}") for name, top in self.top_level.items() if top in document
        }
        table = document.get(self.table, {})
        if not isinstance(table, dict):
            raise SettingsError(f"{path}: `{self.table}` must be a table: write [{self.table}]")
        for name, value in table.items():
            if name not in self.fields:
                raise SettingsError(
                    f"{path}: unknown setting `{name}` in [{self.table}]; remove it or check its spelling"
                )
            layer[name] = (value, f"{path}: [{self.table}] {name}")
        return layer


def values(merged: Layer) -> dict[str, object]:
    """Only the values, for the program's model."""
    return {name: value for name, (value, _) in merged.items()}


def explain(error: ValidationError, merged: Layer) -> SettingsError:
    """A model's complaint, a line for each setting, by where it came from instead of by field."""
    lines: list[str] = []
    for item in error.errors(include_url=False, include_input=False, include_context=False):
        name = str(item["loc"][0]) if item["loc"] else ""
        origin = merged[name][1] if name in merged else name
        message = item["msg"].removeprefix("Value error, ")
        lines.append(f"{origin}: {message[:1].lower()}{message[1:]}")
    return SettingsError("\n".join(dict.fromkeys(lines)))


def flag_name(name: str) -> str:
    """`max_model_len` → `--max-model-len`."""
    return "--" + name.replace("_", "-")
