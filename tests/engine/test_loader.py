"""Folders that can't be loaded: one sentence each, with what to do, and before any time is spent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine.harness import Harness, prompts, request
from worker.engine.assemble import EngineOptions, build_engine
from worker.engine.loader import LoadError


class _Nobody:
    def receive(self, *, wait: bool) -> list[object]:
        return []

    def send(self, message: object) -> None:
        raise AssertionError("nothing is sent while loading")


@pytest.fixture
def folder(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("llama3"), tmp_path / "model"))


def failure(folder: Path, **options) -> LoadError:
    with pytest.raises(LoadError) as caught:
        build_engine(
            EngineOptions(model_dir=folder, **{"device": "cpu", "kv_memory_bytes": 2**22, **options}), _Nobody()
        )
    return caught.value


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in {**config, **changes}.items() if value != "REMOVE"}))


def test_no_folder(tmp_path: Path):
    error = failure(tmp_path / "nothing")
    assert (error.code, "config.json does not exist" in str(error)) == ("CONFIG_MISSING", True)


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_config_that_is_no_json(folder: Path, text: str):
    (folder / "config.json").write_text(text)
    assert failure(folder).code == "CONFIG_CORRUPT"


@pytest.mark.parametrize("key", ["vocab_size", "max_position_embeddings"])
@pytest.mark.parametrize("value", ["REMOVE", 0, "many"])
def test_config_without_a_size(folder: Path, key: str, value: object):
    edit(folder, **{key: value})
    error = failure(folder)
    assert error.code == "CONFIG_CORRUPT"
    assert key in str(error)


def test_an_architecture_that_is_not_run(folder: Path):
    edit(folder, architectures=["Gemma2ForCausalLM"], model_type="gemma2")
    error = failure(folder)
    assert error.code == "UNSUPPORTED_MODEL"
    assert "soft-cap" in str(error)
    assert "LlamaForCausalLM" in str(error), "it says what is supported"


@pytest.mark.parametrize("kept", [0, 5, 8, 100, -1, -1000])
def test_truncated_weights(folder: Path, kept: int):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    error = failure(folder)
    assert error.code == "WEIGHTS_CORRUPT"
    assert "model.safetensors is truncated or corrupt; delete it" in str(error)


def test_a_header_that_is_noise(folder: Path):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:40] = b"\xff" * 32
    path.write_bytes(data)
    assert failure(folder).code == "WEIGHTS_CORRUPT"


def test_trailing_bytes(folder: Path):
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")
    assert failure(folder).code == "WEIGHTS_CORRUPT"


def test_no_weights(folder: Path):
    (folder / "model.safetensors").unlink()
    error = failure(folder)
    assert (error.code, "lacks model.safetensors" in str(error)) == ("WEIGHTS_MISSING", True)


def test_a_missing_shard(folder: Path):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    error = failure(folder)
    assert error.code == "WEIGHTS_MISSING"
    assert "model-00002-of-00002.safetensors" in str(error)


def test_pickles_are_refused(folder: Path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    error = failure(folder)
    assert error.code == "PICKLED_WEIGHTS"
    assert "safetensors" in str(error)


def test_a_missing_weight_is_not_made_up(folder: Path):
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    error = failure(folder)
    assert error.code == "WEIGHTS_INCOMPLETE"
    assert "model.layers.1.mlp.down_proj.weight" in str(error)


def test_weights_of_another_size(folder: Path):
    edit(folder, hidden_size=128)
    error = failure(folder)
    assert error.code == "WEIGHTS_MISMATCH"
    assert "`model.embed_tokens.weight`" in str(error) and "199 x 64" in str(error) and "199 x 128" in str(error)


def test_a_tokenizer_of_another_model(folder: Path):
    vocabulary = {f"t{n}": n for n in range(500)}
    (folder / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"}})
    )
    error = failure(folder)
    assert error.code == "VOCABULARY_MISMATCH"
    assert "499" in str(error)
    assert "198" in str(error)


def test_a_broken_tokenizer(folder: Path):
    (folder / "tokenizer.json").write_text("{}")
    assert failure(folder).code == "TOKENIZER_CORRUPT"


def test_a_cache_too_small_for_anything(folder: Path):
    error = failure(folder, kv_memory_bytes=10)
    assert error.code == "OUT_OF_MEMORY"
    assert "--kv-memory" in str(error)


def test_a_cache_larger_than_the_machine(folder: Path):
    edit(folder, max_position_embeddings=2**40)
    error = failure(folder, kv_memory_bytes=2**62, slots=2**10)
    assert error.code == "OUT_OF_MEMORY"
    assert "lower --kv-memory" in str(error)


def test_a_cache_larger_than_what_is_free(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("worker.engine.cache_size.available_memory_bytes", lambda: 2**21)
    error = failure(folder)
    assert error.code == "OUT_OF_MEMORY"
    assert "lower --kv-memory" in str(error)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_a_device_that_is_not_here(folder: Path):
    error = failure(folder, device="cuda")
    assert error.code == "DEVICE_MISSING"
    assert "--device auto" in str(error)


def test_deterministic_is_refused_where_it_cannot_be_kept(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("worker.engine.assemble.forward_is_exact", lambda *args: False)
    error = failure(folder, deterministic=True)
    assert error.code == "NOT_DETERMINISTIC"
    assert "--dtype float32" in str(error)


def test_deterministic_holds_in_float32(folder: Path):
    assert Harness(folder, {"deterministic": True}).ready.determinism == "exact"


def test_half_precision_promises_no_more_than_the_prefix(folder: Path):
    for dtype in ("bfloat16", "float16"):
        harness = Harness(folder, {"dtype": dtype, "slots": 4})
        assert (harness.ready.determinism, harness.ready.dtype) == ("prefix", dtype)
        got = harness.run(*(request(str(n), p, 8) for n, p in enumerate(prompts(4))))
        assert all(len(line) == 8 for line in got.values())


def test_the_context_is_what_model_option_and_memory_allow(folder: Path):
    assert Harness(folder).ready.context_length == 2048
    assert Harness(folder, {"max_model_len": 100}).ready.context_length == 100
    assert Harness(folder, {"kv_memory_bytes": 7 * 16 * 3 * 2 * 2 * 16 * 4}).ready.context_length == 7 * 16


def test_eos_comes_from_the_generation_config_first(folder: Path):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 9, 10**6, "x"]}))
    assert Harness(folder).ready.eos_token_ids == [5, 9]
    (folder / "generation_config.json").unlink()
    assert Harness(folder).ready.eos_token_ids == [1]
    edit(folder, eos_token_id=None)
    assert Harness(folder).ready.eos_token_ids == []


@pytest.mark.parametrize("length", [2, 3, 5, 8, 9, 20])
def test_a_very_short_context_works(folder: Path, length: int):
    harness = Harness(folder, {"max_model_len": length})
    assert harness.ready.context_length == length
    assert len(harness.run(request("a", [5], 100))["a"]) == length - 1
