"""Reads Dockerfiles: instructions with their continuations joined, stages, build arguments. Read `Dockerfile` first."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

KNOWN = set(
    "FROM ARG RUN COPY ENV USER WORKDIR VOLUME EXPOSE HEALTHCHECK STOPSIGNAL ENTRYPOINT CMD".split(),
)


@dataclass
class Stage:
    """One FROM and what follows it."""

    image: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        """Arguments of every such instruction."""
        return [text for name, text in self.steps if name == instruction]

    @property
    def environment(self) -> dict[str, str]:
        """Everything that ENV sets."""
        return dict(pair.split("=", 1) for text in self.all("ENV") for pair in shlex.split(text))


class Dockerfile:
    """A parsed Dockerfile. Raises ValueError for what this reader, or docker, doesn't know."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.arguments: dict[str, str] = {}
        """ARG before the first FROM, with its default."""
        self.stages: list[Stage] = []
        for name, text in _instructions(path.read_text("utf-8")):
            if name == "FROM":
                image, *rest = text.split()
                alias = rest[1] if len(rest) == 2 and rest[0].upper() == "AS" else ""
                if rest and not alias:
                    raise ValueError(f"{path.name}: FROM {text}")
                self.stages.append(Stage(self._filled(image), alias))
            elif not self.stages:
                if name != "ARG":
                    raise ValueError(f"{path.name}: {name} before FROM")
                key, _, default = text.partition("=")
                self.arguments[key] = default.strip('"')
            else:
                self.stages[-1].steps.append((name, text))

    @property
    def last(self) -> Stage:
        """The stage that becomes the image."""
        return self.stages[-1]

    def _filled(self, text: str) -> str:
        return re.sub(r"\$\{(\w+)\}", lambda match: self.arguments[match[1]], text)


def _instructions(text: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    pending = ""
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        pending += line.rstrip()
        if pending.endswith("\\"):
            pending = pending[:-1] + " "
            continue
        name, _, rest = pending.strip().partition(" ")
        if name not in KNOWN:
            raise ValueError(f"unknown instruction {name!r}")
        found.append((name, rest.strip()))
        pending = ""
    if pending:
        raise ValueError("the last line goes on")
    return found


def exec_form(text: str) -> list[str]:
    """argv of an ENTRYPOINT, CMD or HEALTHCHECK in exec form. Raises ValueError for shell form."""
    argv = json.loads(text[text.index("[") :])
    if not isinstance(argv, list) or not all(isinstance(word, str) for word in argv):
        raise ValueError(text)
    return argv
