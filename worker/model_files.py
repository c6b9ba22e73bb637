"""Finds a model folder, reads its small files and says what exactly it holds (its digest). No weights are loaded here.

Read `resolve` first, then `digest`.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llorch_wire.errors import LlorchError

FULL_HASH_BYTES = 2 * 2**30
SAMPLE_BYTES = 2**20
SAMPLES_PER_FILE = 16
CHUNK_BYTES = 4 * 2**20
MAX_JSON_BYTES = 256 * 2**20
DIGEST_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


class ModelFilesError(LlorchError):
    """A model folder is missing, incomplete or unreadable; the message says which file and what to do."""


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder that holds a model, and the name under which clients ask for it."""

    path: Path
    name: str


class ModelDigest(NamedTuple):
    """`value` is `sha256:<hex>`; `method` is `recorded` (model.json), `full` or `sampled`."""

    value: str
    method: str


def resolve(reference: str, name: str | None = None) -> ModelFolder:
    """Folder of `demo`, of a path, or of a name in the models folder (`$LLORCH_MODELS`).

    Raises ModelFilesError when there is none or when it lacks what every model folder has.
    """
    path = _find(reference.removeprefix("file:"))
    if path is None:
        raise ModelFilesError(
            f"no model folder {reference!r}: give a folder with config.json, tokenizer.json and *.safetensors, "
            f"`demo` for the bundled model, or the name of a model in {models_home()}"
        )
    if not (path / "config.json").is_file():
        raise ModelFilesError(f"{path} has no config.json: it isn't a Hugging Face model folder")
    if not (path / "tokenizer.json").is_file():
        raise ModelFilesError(
            f"{path} has no tokenizer.json: convert the tokenizer once with "
            "transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    if not any(path.glob("*.safetensors")):
        raise ModelFilesError(f"{path} has no *.safetensors: other weight formats aren't loaded; convert them first")
    return ModelFolder(path, name or ("demo" if reference == "demo" else path.name))


def models_home() -> Path:
    """Where downloaded models stand on this machine."""
    configured = os.environ.get("LLORCH_MODELS")
    if configured:
        return Path(configured).expanduser()
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "llorch" / "models"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; {} where there is no such file. Raises ModelFilesError for anything else."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelFilesError(f"{path} is larger than {MAX_JSON_BYTES} bytes: this isn't a model's {path.name}")
        value: object = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ModelFilesError(f"can't read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelFilesError(f"{path} isn't valid JSON: download or copy the file again") from error
    if not isinstance(value, dict):
        raise ModelFilesError(f"{path} doesn't hold a JSON object: download or copy the file again")
    return value


def digest(folder: Path, cancelled: Callable[[], bool] = lambda: False) -> ModelDigest:
    """What the folder holds, as one hash: two workers with equal digests run the same weights and tokenizer.

    A digest that llorch-pool recorded in model.json is taken. Otherwise config, tokenizer and all weights are hashed
    whole up to 2 GiB; above that each weight file counts with its size, its header and 16 samples of 1 MiB spread over
    it. Reads from disk: call it off the event loop. Raises ModelFilesError for an unreadable file, or once `cancelled`.
    """
    recorded = read_json(folder / "model.json").get("digest")
    if isinstance(recorded, str) and 0 < len(recorded) <= 256:
        return ModelDigest(recorded, "recorded")
    weights = sorted(folder.glob("*.safetensors"))
    try:
        sampled = sum(path.stat().st_size for path in weights) > FULL_HASH_BYTES
        whole = hashlib.sha256(b"llorch model v1\0")
        for path in [*(folder / name for name in DIGEST_FILES if (folder / name).is_file()), *weights]:
            part = _sampled_hash(path) if sampled and path in weights else _full_hash(path, cancelled)
            whole.update(b"%b\0%b" % (path.name.encode(), part))
    except OSError as error:
        raise ModelFilesError(f"can't read {error.filename}: {error.strerror}") from error
    return ModelDigest(f"sha256:{whole.hexdigest()}", "sampled" if sampled else "full")


def _find(reference: str) -> Path | None:
    if reference == "demo":
        from llorch_demo import MODEL_DIR

        return MODEL_DIR if MODEL_DIR.is_dir() else None
    for candidate in (Path(reference).expanduser(), models_home() / reference):
        if candidate.is_dir():
            return candidate.resolve()
    return None


def _full_hash(path: Path, cancelled: Callable[[], bool]) -> bytes:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            if cancelled():
                raise ModelFilesError("reading the model's files was stopped")
            total.update(chunk)
    return total.digest()


def _sampled_hash(path: Path) -> bytes:
    size = path.stat().st_size
    total = hashlib.sha256(struct.pack("<Q", size))
    with path.open("rb") as file:
        # Format: 8 bytes little-endian header length, then the JSON header (names, shapes, offsets of all tensors).
        header_bytes = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
        file.seek(0)
        total.update(file.read(min(size, 8 + header_bytes, 64 * 2**20)))
        for sample in range(SAMPLES_PER_FILE):
            file.seek(max(0, (size - SAMPLE_BYTES) * sample // (SAMPLES_PER_FILE - 1)))
            total.update(file.read(SAMPLE_BYTES))
    return total.digest()
