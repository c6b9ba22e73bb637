"""Model references and which files of a repository a worker needs. Pure but for the alias file.

hf:org/name[@revision]     a repository on the Hub (HF_ENDPOINT chooses another one)
file:/abs/path             a folder on this machine
alias                      `demo`, or a name from the [aliases] table of $XDG_CONFIG_HOME/llorch/config.toml
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from llorch_pool.errors import PoolError, usage_error
from llorch_pool.paths import check_name

_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
DEMO = "demo"

_WANTED = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
    "model.safetensors.index.json",
}  # fmt: skip


@dataclass(frozen=True)
class ModelRef:
    """A parsed reference. `target` is `org/name` or an absolute path; `revision` "" means the default branch."""

    kind: Literal["hf", "file"]
    target: str
    revision: str = ""

    def __str__(self) -> str:
        return f"{self.kind}:{self.target}" + (f"@{self.revision}" if self.revision else "")

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, which can't move."""
        return bool(_COMMIT.fullmatch(self.revision))

    def default_name(self) -> str:
        """Name under which the model is kept and served where --name isn't given."""
        last = self.target.rstrip("/").rpartition("/")[2]
        name = re.sub(r"[^A-Za-z0-9._-]", "-", last).lstrip("._-")[:128]
        return check_name(name, "model", "--name")


def parse(text: str, aliases: dict[str, str] | None = None) -> ModelRef:
    """Reference from text. Raises a usage error that says what is wrong with it."""
    if text in (aliases or {}):
        text = (aliases or {})[text]
    elif text == DEMO:
        import llorch_demo

        text = f"file:{llorch_demo.MODEL_DIR}"
    kind, separator, rest = text.partition(":")
    if separator and kind == "hf":
        target, at, revision = rest.partition("@")
        if not _REPO.fullmatch(target) or ".." in target:
            raise usage_error(f"{text!r}: `hf:` takes org/name[@revision]", "For example hf:Qwen/Qwen3-0.6B.")
        if at and (not _REVISION.fullmatch(revision) or ".." in revision):
            raise usage_error(f"{text!r}: {revision!r} is not a branch, tag or commit", "For example @main.")
        return ModelRef("hf", target, revision)
    if separator and kind == "file":
        if not rest.startswith("/") or "\0" in rest:
            raise usage_error(f"{text!r}: `file:` takes an absolute path", "For example file:/data/models/llama.")
        return ModelRef("file", rest)
    raise usage_error(
        f"{text!r} is not a model reference",
        f"Give hf:org/name[@revision], file:/abs/path, or an alias ({', '.join(sorted({DEMO, *(aliases or {})}))}).",
    )


def load_aliases(config: Path) -> dict[str, str]:
    """The [aliases] table of config.toml in folder `config`, empty where there is none. Raises PoolError."""
    path = config / "config.toml"
    try:
        table = tomllib.loads(path.read_text()).get("aliases", {})
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PoolError(f"{path}: {error}", next_step="Correct the file.") from error
    if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
        raise PoolError(f"{path}: [aliases] must map names to references", next_step="Correct the file.")
    return {str(name): str(value) for name, value in table.items()}


def wanted(paths: Iterable[str]) -> list[str]:
    """The files of a repository that a worker needs: safetensors weights, config, tokenizer, chat template.

    Weights in other formats, a second copy of the weights (`consolidated.*`), subfolders and code are left out.
    Raises PoolError when a worker could not start from what is there.
    """
    top = [path for path in paths if len(PurePosixPath(path).parts) == 1]
    weights = [path for path in top if path.endswith(".safetensors")]
    named = [path for path in weights if not path.startswith("consolidated")]
    chosen = sorted([*(named or weights), *(path for path in top if path in _WANTED)])
    missing = [name for name in ("config.json", "tokenizer.json") if name not in chosen]
    if not weights:
        pickled = [path for path in top if path.endswith((".bin", ".pt", ".pth", ".ckpt"))]
        what = "only pickled weights, which are refused" if pickled else "no .safetensors weights"
        raise PoolError(
            f"the model has {what}",
            next_step="Choose a repository with safetensors files, or convert it with transformers' save_pretrained.",
            code="format",
        )
    if missing:
        raise PoolError(
            f"the model has no {' and no '.join(missing)}",
            next_step="A worker needs config.json and tokenizer.json beside the weights: `save_pretrained` of "
            "transformers' model and fast tokenizer writes them.",
            code="format",
        )
    return chosen
