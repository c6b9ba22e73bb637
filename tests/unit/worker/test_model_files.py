"""Model folders are found, their digests tell them apart, and what is missing is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llorch_demo import MODEL_DIR
from worker import model_files
from worker.model_files import ModelFilesError, digest, resolve


def model(path: Path, weights: bytes = b"weights" * 100) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"a": 1}')
    (path / "tokenizer.json").write_text("{}")
    (path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}" + weights)
    return path


def test_ways_to_name_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLORCH_MODELS", str(tmp_path / "home"))
    path = model(tmp_path / "home" / "tiny")
    assert resolve("demo") == model_files.ModelFolder(MODEL_DIR, "demo")
    assert resolve("tiny").path == path
    assert resolve(str(path)).name == "tiny"
    assert resolve(f"file:{path}", "other").name == "other"


@pytest.mark.parametrize(
    ("missing", "words"),
    [("config.json", "config.json"), ("tokenizer.json", "save_pretrained"), ("model.safetensors", "safetensors")],
)
def test_what_is_missing_is_named(tmp_path: Path, missing: str, words: str) -> None:
    path = model(tmp_path / "m")
    (path / missing).unlink()
    with pytest.raises(ModelFilesError, match=words):
        resolve(str(path))
    with pytest.raises(ModelFilesError, match="no model folder"):
        resolve(str(tmp_path / "nowhere"))


def test_equal_folders_have_equal_digests(tmp_path: Path) -> None:
    first, second = digest(model(tmp_path / "a")), digest(model(tmp_path / "b"))
    assert first == second
    assert first.method == "full" and first.value.startswith("sha256:")
    other = model(tmp_path / "c", b"weighty" * 100)
    assert digest(other) != first
    config = model(tmp_path / "d")
    (config / "config.json").write_text('{"a": 2}')
    assert digest(config) != first


def test_large_models_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "FULL_HASH_BYTES", 1000)
    monkeypatch.setattr(model_files, "SAMPLE_BYTES", 64)
    one, same = model(tmp_path / "a", bytes(10_000)), model(tmp_path / "b", bytes(10_000))
    assert digest(one) == digest(same)
    assert digest(one).method == "sampled"
    longer = digest(model(tmp_path / "c", bytes(10_001)))
    changed = digest(model(tmp_path / "d", b"\1" + bytes(9_999)))
    assert len({digest(one).value, longer.value, changed.value}) == 3


def test_a_recorded_digest_is_taken(tmp_path: Path) -> None:
    path = model(tmp_path / "m")
    (path / "model.json").write_text(json.dumps({"digest": "sha256:abc"}))
    assert digest(path) == ("sha256:abc", "recorded")
