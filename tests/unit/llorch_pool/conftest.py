"""A machine of one's own for each test: its folders, a context, and repositories with tiny real models."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llorch_pool.context import Context
from llorch_wire.pool import Log, Progress
from tests.support.hub import Hub


class Events(list[Progress | Log]):
    """What a command reported."""

    def logs(self) -> str:
        return "\n".join(event.text for event in self if isinstance(event, Log))

    def progress(self) -> list[Progress]:
        return [event for event in self if isinstance(event, Progress)]


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {
        "HOME": str(tmp_path),
        "PATH": os.environ["PATH"],
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "XDG_DATA_HOME": str(tmp_path / "data"),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
    }


@pytest.fixture
def new_context(environ: dict[str, str], events: Events) -> Callable[..., Context]:
    return lambda **kwargs: Context(events.append, environ=environ, timeout_s=kwargs.get("timeout_s", 60))


@pytest.fixture
def context(new_context: Callable[..., Context], request: pytest.FixtureRequest) -> Context:
    if "hub" in request.fixturenames:
        request.getfixturevalue("hub")  # first: it puts its address into the environment
    return new_context()


def write_safetensors(path: Path, tensors: dict[str, list[int]], seed: int = 0) -> None:
    """A real safetensors file of float32 tensors with the given shapes."""
    header, data = {}, b""
    for name, shape in tensors.items():
        count = 1
        for size in shape:
            count *= size
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + 4 * count]}
        data += bytes((seed + at) % 251 for at in range(4 * count))
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_model(folder: Path, *, seed: int = 0, numbers: int = 250_000) -> Path:
    """A folder as a repository on the Hub has it, with files that a worker does not need."""
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model-00001-of-00002.safetensors", {"a": [numbers]}, seed)
    write_safetensors(folder / "model-00002-of-00002.safetensors", {"b": [numbers // 2, 2]}, seed + 1)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1000,
        "max_position_embeddings": 2048,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "filler": "x" * 5000}))
    (folder / "generation_config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text("{}")
    (folder / "README.md").write_text("a model")
    (folder / "pytorch_model.bin").write_bytes(b"pickle" * 2000)
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    return folder


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    return write_model(tmp_path / "hub" / "acme" / "tiny")


@pytest.fixture
def hub(tmp_path: Path, repo: Path, environ: dict[str, str]) -> Iterator[Hub]:
    with Hub(tmp_path / "hub") as server:
        environ["HF_ENDPOINT"] = server.url
        yield server
