"""Reads systemd units: sections, repeated keys, specifiers. Read `Unit` first."""

from __future__ import annotations

import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
UNITS = ROOT / "deploy" / "systemd"


class Unit:
    """One unit file. `values` keeps every occurrence of a key, in order; an empty value resets a list."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values: dict[tuple[str, str], list[str]] = {}
        section = ""
        for line in path.read_text("utf-8").splitlines():
            text = line.strip()
            if not text or text[0] in "#;":
                continue
            assert not text.endswith("\\"), f"{path.name}: continued lines aren't read here"
            if text[0] == "[":
                section = text.strip("[]")
                continue
            key, equals, value = text.partition("=")
            assert equals and section, f"{path.name}: {text!r} is no setting"
            self._values.setdefault((section, key), []).append(value)

    def values(self, key: str, section: str = "Service") -> list[str]:
        """Every value of a key."""
        return self._values.get((section, key), [])

    def value(self, key: str, section: str = "Service") -> str:
        """The value of a key that stands there once."""
        (found,) = self.values(key, section)
        return found

    def keys(self, section: str = "Service") -> set[str]:
        """Names of the settings of a section."""
        return {key for place, key in self._values if place == section}

    def command(self, specifiers: dict[str, str]) -> list[str]:
        """ExecStart as argv, with `%x` replaced."""
        line = self.value("ExecStart")
        for name, value in specifiers.items():
            line = line.replace(f"%{name}", value)
        return shlex.split(line)

    def environment(self, specifiers: dict[str, str]) -> dict[str, str]:
        """Environment= as a mapping, with `%x` replaced."""
        found: dict[str, str] = {}
        for line in self.values("Environment"):
            for name, value in specifiers.items():
                line = line.replace(f"%{name}", value)
            found |= dict(pair.split("=", 1) for pair in shlex.split(line))
        return found


def read_env_file(path: Path, *, commented: bool = False) -> dict[str, str]:
    """Settings of an EnvironmentFile; with `commented` those too that stand there as `#NAME=value`."""
    found: dict[str, str] = {}
    for line in path.read_text("utf-8").splitlines():
        text = line.removeprefix("#") if commented else line
        name, equals, value = text.partition("=")
        if equals and name.isupper() and name.replace("_", "").isalnum() and not name[0].isspace():
            found[name] = value
    return found
